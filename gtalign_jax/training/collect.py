"""One step's experience: sample, detokenise, score. Shared by GRPO and evaluation.

    prompts_QS -> Rollout -> texts -> Scores

This is the only place where tokens become text on their way to a reward.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from gtalign_jax.data.batches import PromptBatch
from gtalign_jax.data.chat import decode
from gtalign_jax.data.prompt import Prompt
from gtalign_jax.model.sharding import Layout
from gtalign_jax.reward.judges import Judge
from gtalign_jax.reward.rules import response_kind, right_kinds
from gtalign_jax.reward.scoring import RewardConfig, Scores, score
from gtalign_jax.rollout.filters import Filters
from gtalign_jax.rollout.sampler import Rollout
from gtalign_jax.training.micro import uncut

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experience:
    """Scored completions of Q prompts × G samples, on the host; rows are prompt-major.

    `right_B`: the response is of a kind that its prompt calls for (`rules.right_kinds`).
    """

    batch: PromptBatch
    rollout: Rollout
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    scores: Scores
    right_B: tuple[bool, ...]

    @property
    def samples(self) -> int:
        return self.rollout.tokens_QGT.shape[1]


@dataclasses.dataclass(frozen=True)
class Collector:
    """What turns a batch of prompts into experience."""

    sample: Callable[..., Rollout]
    tokenizer: PreTrainedTokenizerBase
    judge: Judge
    reward: RewardConfig
    layout: Layout
    filters: Filters
    micro_batch_prompts: int = 0  # prompts sampled at a time; 0: all

    def roll(self, params: Any, batch: PromptBatch, key: jax.Array) -> Rollout:
        """Sampled completions, on the devices."""
        Q = len(batch.lengths_Q)
        pieces = Q // (self.micro_batch_prompts or Q)
        put = lambda x: jax.device_put(x, self.layout.sharding("prompts"))  # noqa: E731
        rollouts = []
        for i in range(pieces):  # strided, as `cut` does
            rows = (put(x[i::pieces]) for x in (batch.tokens_QS, batch.lengths_Q, batch.index_Q))
            rollouts.append(self.sample(params, *rows, key))
        return rollouts[0] if pieces == 1 else self._join(rollouts)

    @functools.cached_property
    def _join(self) -> Callable[[list[Rollout]], Rollout]:
        def join(rollouts: list[Rollout]) -> Rollout:
            stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *rollouts)
            slots = stacked.slots.sum()
            return uncut(stacked.replace(slots=None)).replace(slots=slots)

        return jax.jit(join)

    def assess(self, batch: PromptBatch, rollout: Rollout) -> Experience:
        """Text and scores of a rollout that is on the host."""
        G = rollout.tokens_QGT.shape[1]
        prompts = tuple(prompt for prompt in batch.prompts for _ in range(G))
        texts = tuple(
            decode(self.tokenizer, ids[:length])
            for ids, length in zip(
                rollout.tokens_QGT.reshape(len(prompts), -1), rollout.lengths_QG.reshape(-1),
                strict=True,
            )
        )
        scores = score(prompts, texts, self.judge, self.reward)
        _mention_missing(scores)
        right = tuple(
            chain.response is not None and response_kind(chain.response) in right_kinds(prompt)
            for prompt, chain in zip(prompts, scores.chains, strict=True)
        )
        return Experience(batch, rollout, prompts, texts, scores, right)


def _mention_missing(scores: Scores) -> None:
    """With a reason: a judge that never answers leaves a run that looks well and learns nothing."""
    missing = int((~scores.valid_B).sum())
    if missing:
        asked = (*scores.judgements, *scores.consistency_judgements)
        reason = next(j.error for j in asked if j is not None and j.score is None)
        log.warning("%d of %d completions have no score and are left out, one because: %s",
                    missing, len(scores.valid_B), reason)


def mean(values: Any, where: Any = None) -> float:
    """The mean of the entries that count; NaN (absent from the files) where none does."""
    values = np.asarray(values, np.float64)
    where = np.ones(values.shape, bool) if where is None else np.asarray(where, bool)
    return float(values[where].mean()) if where.any() else float("nan")


def summarise(experience: Experience) -> dict[str, float]:
    """Means over the judged completions: `reward/…`, `welfare/…`, `game/…`, `rollout/…`.

    Welfare by source is `source/<name>`. A judge's failures are counted in `reward/missing`, and
    appear in no other mean.
    """
    scores, rollout = experience.scores, experience.rollout
    valid = scores.valid_B
    parsed = valid & scores.parsed_B
    out = {
        "reward/total": mean(scores.reward_B, valid),
        "welfare/user": mean(scores.user_welfare_B, valid),
        "welfare/llm": mean(scores.llm_welfare_B, valid),
        "reward/missing": mean(~valid),
        "reward/parsed": mean(scores.parsed_B, valid),
        "rollout/length": mean(rollout.lengths_QG),
        "rollout/length_max": float(rollout.lengths_QG.max()),
        "rollout/truncated": mean(~rollout.stopped_QG),
        "rollout/wasted_slots": 1 - float(rollout.lengths_QG.sum())
        / max(int(rollout.slots), 1),
        "rollout/response_words": mean(
            [len((chain.response or "").split()) for chain in scores.chains], parsed
        ),
    }
    out |= {f"reward/{name}": mean(values, valid) for name, values in scores.factors.items()}
    out |= {  # the price of anarchy of many a matrix is undefined: those are left out
        f"game/{name}": mean(values, parsed & np.isfinite(values))
        for name, values in scores.game.items()
        if name != "recommended"  # an index of a cell: its mean says nothing
    }
    out["reward/right_action"] = mean(experience.right_B, valid)
    sources = np.array([prompt.data_source for prompt in experience.prompts])
    for source in sorted(set(sources)):
        out[f"source/{source}"] = mean(scores.reward_B, valid & (sources == source))
    return {name: value for name, value in out.items() if not np.isnan(value)}


def log_rows(experience: Experience) -> list[Mapping[str, Any]]:
    """One row per completion for the rollout log (R32)."""
    scores, rows = experience.scores, []
    rollout = experience.rollout
    for b, (prompt, text) in enumerate(zip(experience.prompts, experience.texts, strict=True)):
        q, g = divmod(b, experience.samples)
        judgement, chain = scores.judgements[b], scores.chains[b]
        consistency = scores.consistency_judgements[b]
        rows.append({
            "id": prompt.id,
            "data_source": prompt.data_source,
            "sample": g,
            "prompt": [dict(message) for message in prompt.messages],
            "question": prompt.question,
            "ground_truth": prompt.ground_truth,
            "completion": text,
            "tokens": int(rollout.lengths_QG[q, g]),
            "stopped": bool(rollout.stopped_QG[q, g]),
            "logp": float(rollout.logp_QGT[q, g].sum()),
            "valid": bool(scores.valid_B[b]),
            "reward": float(scores.reward_B[b]),
            "user_welfare": float(scores.user_welfare_B[b]),
            "llm_welfare": float(scores.llm_welfare_B[b]),
            **{name: float(values[b]) for name, values in scores.factors.items()},
            "payoff": chain.payoff,
            "chain_error": chain.error,
            "right_action": experience.right_B[b],
            "judge_score": None if judgement is None else judgement.score,
            "judge_reply": None if judgement is None else judgement.reply,
            "judge_error": None if judgement is None else judgement.error,
            "consistency_reply": None if consistency is None else consistency.reply,
            "consistency_error": None if consistency is None else consistency.error,
        })
    return rows
