"""One step's experience: sample, detokenise, score. Shared by GRPO and evaluation.

    prompts_QS -> Rollout -> texts -> Scores

This is the only place where tokens become text on their way to a reward. Each process reads and
scores the completions of its own prompts (pod/share.py), so that every completion is judged once.
"""

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from transformers import PreTrainedTokenizerBase

from gtalign_jax.data.batches import PromptBatch
from gtalign_jax.data.chat import decode, encode_completion
from gtalign_jax.data.prompt import Prompt
from gtalign_jax.game.chain import KEYS
from gtalign_jax.model.sharding import Layout
from gtalign_jax.pod import share
from gtalign_jax.pod.notice import Notice
from gtalign_jax.reward.judges import Judge, JudgeError, Judgement
from gtalign_jax.reward.rules import RESPONSE_KINDS, request_kind, response_kind, right_kinds
from gtalign_jax.reward.scoring import RewardConfig, Scores, score
from gtalign_jax.rollout.filters import Filters
from gtalign_jax.rollout.sampler import Rollout
from gtalign_jax.training.assessing import Assessing
from gtalign_jax.training.micro import piece_count, uncut

log = logging.getLogger(__name__)

MIN_PROBLEMS = 8  # fewer judgements that fail are no sign, where few completions can be judged


@dataclasses.dataclass(frozen=True)
class Experience:
    """Scored completions, on the host: this process's own, or after `at_first` all of them.

    Attributes:
      rows_B: place of each completion in the whole batch, which is prompt-major.
      samples: G. slots: row positions that the sampler computed for the whole batch.
      lengths_B, stopped_B: as in Rollout. logp_B: log-probability of the whole completion.
      response_lengths_B: tokens of the response alone.
      kinds_B: `rules.response_kind` of each response; None where there is none.
      right_B: it is one that the prompt calls for (`rules.right_kinds`).
    """

    rows_B: np.ndarray
    samples: int
    slots: int
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    lengths_B: np.ndarray
    stopped_B: np.ndarray
    logp_B: np.ndarray
    scores: Scores
    response_lengths_B: np.ndarray
    kinds_B: tuple[str | None, ...]
    right_B: tuple[bool, ...]

    def at_first(self) -> "Experience | None":
        """That of all processes as one, in process 0, for logs; None elsewhere. A collective."""
        whole = share.at_first(self, self.rows_B, "experience")
        if whole is not None:
            _mention_missing(whole.scores)
        return whole

    def verdict(self, filter_on: str = "") -> "Verdict":
        """What every process needs of the whole batch's scores. A collective.

        `filter_on`: the factor, or component of a task, that is to be in it; "" for none.
        """
        named = self.scores.factors | self.scores.components
        values_B = named[filter_on] if filter_on else None
        problem_B = tuple(map(_problem, self.scores.judgements, self.scores.consistency_judgements))
        sources_B = tuple(prompt.data_source for prompt in self.prompts)
        own = Verdict(self.scores.reward_B, self.scores.valid_B, self.stopped_B, self.lengths_B,
                      values_B, problem_B, sources_B)
        return share.everywhere(own, self.rows_B, "verdict")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Rewards of a whole batch of completions; where `valid_B` is False they mean nothing.

    filter_B: the factor that `grpo.filter_on` names; None where it names none.
    problem_B: of rows that were to be judged "" or what went wrong, "cause: words"; None of others.
    sources_B: their data sources.
    """

    reward_B: np.ndarray
    valid_B: np.ndarray
    stopped_B: np.ndarray
    lengths_B: np.ndarray
    filter_B: np.ndarray | None = None
    problem_B: tuple[str | None, ...] = ()
    sources_B: tuple[str, ...] = ()

    def check(self, max_missing: float) -> None:
        """Raises JudgeError where MIN_PROBLEMS judgements, and a larger share, are missing: of all,
        or of one source. Algebra and rules do not make up for a judge that is down."""
        for source in ("", *sorted(set(self.sources_B))):
            wanted = [problem for problem, of in zip(self.problem_B, self.sources_B, strict=True)
                      if problem is not None and source in ("", of)]
            problems = [problem for problem in wanted if problem]
            if len(problems) < MIN_PROBLEMS or len(problems) <= max_missing * len(wanted):
                continue
            causes = Counter(problem.partition(": ")[0] for problem in problems)
            cause, count = causes.most_common(1)[0]
            example = next(p for p in problems if p.startswith(f"{cause}: "))
            of = f" of {source}" if source else ""
            raise JudgeError(
                f"{len(problems)} of {len(wanted)} completions{of} could not be judged, more than "
                f"judge.max_missing={max_missing:g} allows; {count} of them by {example}"
            )


@dataclasses.dataclass(frozen=True)
class Collector:
    """What turns a batch of prompts into experience."""

    sample: Callable[..., Rollout]
    tokenizer: PreTrainedTokenizerBase
    judge: Judge
    reward: RewardConfig
    layout: Layout
    filters: Filters
    micro_batch_prompts: int = 0  # sampled at a time per batch shard; 0: all
    overlap: bool = True  # score what is sampled while the rest is (training/assessing.py)
    max_missing: float = 1.0  # the share of judgements that may fail
    max_new_tokens: int = 0  # T of its rollouts
    notice: Notice = dataclasses.field(default_factory=Notice)

    @property
    def sharding(self) -> NamedSharding:
        """Where the rows of a rollout lie."""
        return self.layout.sharding("prompts")

    def assessing(self, batch: PromptBatch, needed: bool = True) -> Assessing:
        """What will score completions of the batch, piece by piece; at once, if it is `needed`."""
        overlap = self.overlap and needed
        return Assessing(self.fetch, functools.partial(self.assess, batch), overlap)

    def finished(self, assessing: Assessing) -> Experience:
        """Its scores. A collective; in all processes Preempted, where one is told to end while it
        waits for a judge."""
        assessing.wait(self.notice.heard)
        self.notice.check()
        return assessing.result()

    def roll(self, params: Any, batch: PromptBatch, key: jax.Array,
             sampled: Callable[[Rollout, int, int], None] = lambda *piece: None) -> Rollout:
        """Sampled completions, on the devices, cut by prompt.

        `sampled` gets each piece of the batch once it is there: (rollout, first prompt, stride).
        """
        Q = len(batch.lengths_Q)
        shards = self.layout.axis_size("prompts")
        pieces = piece_count(Q, self.micro_batch_prompts, shards)
        rollouts = []
        for i in range(pieces):  # strided, as `cut` does
            rows = (x[i::pieces] for x in (batch.tokens_QS, batch.lengths_Q, batch.index_Q))
            rollouts.append(self.sample(params, *share.place(tuple(rows), self.sharding), key))
            sampled(rollouts[-1], i, pieces)
        whole = rollouts[0] if pieces == 1 else self._join(rollouts)
        rows = share.place(whole.replace(slots=None), self.sharding)
        return rows.replace(slots=whole.slots)

    def abstract(self, Q: int, G: int) -> Rollout:
        """Shapes, types and places of a rollout of Q prompts, for a checkpoint that holds one."""
        def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            rows = self.sharding if shape else self.layout.sharding()
            return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

        T = self.max_new_tokens
        return Rollout(
            tokens_QGT=array(jnp.int32, Q, G, T), logp_QGT=array(jnp.float32, Q, G, T),
            lengths_QG=array(jnp.int32, Q, G), stopped_QG=array(bool, Q, G), slots=array(jnp.int32),
        )

    @functools.cached_property
    def _join(self) -> Callable[[list[Rollout]], Rollout]:
        def join(rollouts: list[Rollout]) -> Rollout:
            stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *rollouts)
            slots = stacked.slots.sum()
            return uncut(stacked.replace(slots=None)).replace(slots=slots)

        return jax.jit(join)

    def fetch(self, rollout: Rollout) -> tuple[np.ndarray, Rollout]:
        """(which prompts of the batch are this process's own, their completions on the host)."""
        return share.fetch(rollout, self.sharding)

    def assess(self, batch: PromptBatch, at_Q: np.ndarray, rollout: Rollout) -> Experience:
        """Text and scores of completions on the host, of the prompts number `at_Q` of the batch."""
        Q, G, T = rollout.tokens_QGT.shape
        prompts = tuple(batch.prompts[q] for q in at_Q for _ in range(G))
        texts = tuple(
            decode(self.tokenizer, ids[:length])
            for ids, length in zip(
                rollout.tokens_QGT.reshape(Q * G, T), rollout.lengths_QG.reshape(-1), strict=True
            )
        )
        scores = score(prompts, texts, self.judge, self.reward)
        responses = [chain.response for chain in scores.chains]
        kinds = tuple(None if text is None else response_kind(text) for text in responses)
        return Experience(
            rows_B=(at_Q[:, None] * G + np.arange(G)[None]).reshape(-1),
            samples=G,
            slots=int(rollout.slots),
            prompts=prompts,
            texts=texts,
            lengths_B=rollout.lengths_QG.reshape(-1),
            stopped_B=rollout.stopped_QG.reshape(-1),
            logp_B=rollout.logp_QGT.sum(axis=2).reshape(-1),
            scores=scores,
            response_lengths_B=self._response_lengths(responses, rollout.lengths_QG.reshape(-1)),
            kinds_B=kinds,
            right_B=tuple(
                kind in right_kinds(prompt) for kind, prompt in zip(kinds, prompts, strict=True)
            ),
        )

    def _response_lengths(self, responses: Sequence[str | None],
                          lengths_B: np.ndarray) -> np.ndarray:
        """Tokens of each response, written anew: where in the completion's own tokens it began is
        not known to the text. At most the whole completion."""
        counts = [len(encode_completion(self.tokenizer, text or "")) for text in responses]
        return np.minimum(np.array(counts, lengths_B.dtype), lengths_B)


def _problem(*judgements: Judgement | None) -> str | None:
    """What went wrong with a row's judgements, "" if nothing, None if there are none."""
    asked = [judgement for judgement in judgements if judgement is not None]
    bad = next((judgement for judgement in asked if judgement.score is None), None)
    return f"{bad.cause}: {bad.error}" if bad else "" if asked else None


def _mention_missing(scores: Scores) -> None:
    """With a reason: a judge that never answers leaves a run that looks well and learns nothing."""
    missing = int((~scores.valid_B).sum())
    if missing:
        asked = (*scores.judgements, *scores.consistency_judgements)
        bad = [j for j in asked if j is not None and j.score is None]
        (cause, count), *_ = Counter(j.cause for j in bad).most_common(1)
        reason = next(j.error for j in bad if j.cause == cause)
        log.warning("%d of %d completions have no score and are left out, %d because: %s",
                    missing, len(scores.valid_B), count, reason)


def mean(values: Any, where: Any = None) -> float:
    """The mean of the entries that count; NaN (absent from the files) where none does."""
    values = np.asarray(values, np.float64)
    where = np.ones(values.shape, bool) if where is None else np.asarray(where, bool)
    return float(values[where].mean()) if where.any() else float("nan")


def summarise(experience: Experience) -> dict[str, float]:
    """Means over the judged completions: `reward/…`, `welfare/…`, `game/…`, `rollout/…`, and the
    share of each kind of response, `action/…`.

    Welfare by source is `source/<name>`. A judge's failures are counted in `reward/missing`, and
    appear in no other mean.
    """
    scores, lengths_B = experience.scores, experience.lengths_B
    valid = scores.valid_B
    parsed = valid & scores.parsed_B
    out = {
        "reward/total": mean(scores.reward_B, valid),
        "welfare/user": mean(scores.user_welfare_B, valid),
        "welfare/llm": mean(scores.llm_welfare_B, valid),
        "reward/missing": mean(~valid),
        "reward/parsed": mean(scores.parsed_B, valid),
        "rollout/length": mean(lengths_B),
        "rollout/length_max": float(lengths_B.max()),
        "rollout/truncated": mean(~experience.stopped_B),
        "rollout/wasted_slots": 1 - float(lengths_B.sum()) / max(experience.slots, 1),
        "rollout/response_tokens": mean(experience.response_lengths_B, valid),
        "rollout/response_words": mean(
            [len((chain.response or "").split()) for chain in scores.chains],
            valid & np.array([chain.error is None for chain in scores.chains], bool),
        ),
    }
    out |= {f"reward/{name}": mean(values, valid) for name, values in scores.factors.items()}
    out |= {  # the price of anarchy of many a matrix is undefined: those are left out
        f"game/{name}": mean(values, parsed & np.isfinite(values))
        for name, values in scores.game.items()
        if name != "recommended"  # an index of a cell: its mean says nothing
    }
    out |= _judge_means(scores)
    out["reward/right_action"] = mean(experience.right_B, valid)
    for kind in RESPONSE_KINDS:
        out[f"action/{kind}"] = mean([found == kind for found in experience.kinds_B], valid)
    sources = np.array([prompt.data_source for prompt in experience.prompts])
    for source in sorted(set(sources)):
        out[f"source/{source}"] = mean(scores.reward_B, valid & (sources == source))
    return {name: value for name, value in out.items() if not np.isnan(value)}


def _judge_means(scores: Scores) -> dict[str, float]:
    """How judging went, `judge/…`, and the components that tasks declare, `component/…`."""
    asked = (*scores.judgements, *scores.consistency_judgements)
    found = [judgement for judgement in asked if judgement is not None]
    live = [judgement for judgement in found if judgement.attempts]
    out = {f"component/{name}": mean(values, ~np.isnan(values))
           for name, values in scores.components.items()}
    if not found:
        return out
    out["judge/missing"] = mean([judgement.score is None for judgement in found])
    out["judge/stored"] = mean([judgement.stored for judgement in found])
    for cause, count in Counter(judgement.cause for judgement in found).items():
        if cause is not None:
            out[f"judge/missing_{cause}"] = count / len(found)
    if live:
        out["judge/attempts"] = mean([judgement.attempts for judgement in live])
        out["judge/seconds"] = mean([judgement.seconds for judgement in live])
    return out


def log_rows(experience: Experience) -> list[dict[str, Any]]:
    """One row per completion for the logs (R32); `evaluation.measures` sums them up."""
    scores, rows = experience.scores, []
    for b, (prompt, text) in enumerate(zip(experience.prompts, experience.texts, strict=True)):
        tokens, answered = int(experience.lengths_B[b]), int(experience.response_lengths_B[b])
        rows.append({
            "id": prompt.id,
            "data_source": prompt.data_source,
            "sample": b % experience.samples,
            "prompt": [dict(message) for message in prompt.messages],
            "question": prompt.question,
            "ground_truth": prompt.ground_truth,
            "completion": text,
            "tokens": tokens,
            "reasoning_tokens": tokens - answered,
            "response_tokens": answered,
            "response_words": len((scores.chains[b].response or "").split()),
            "stopped": bool(experience.stopped_B[b]),
            "logp": float(experience.logp_B[b]),
            "valid": bool(scores.valid_B[b]),
            "reward": float(scores.reward_B[b]),
            "user_welfare": float(scores.user_welfare_B[b]),
            "llm_welfare": float(scores.llm_welfare_B[b]),
            **{name: float(values[b]) for name, values in scores.factors.items()},
            **{f"component/{name}": float(values[b]) for name, values in scores.components.items()
               if np.isfinite(values[b])},
            "request_kind": request_kind(prompt.data_source, prompt.ground_truth),
            "response_kind": experience.kinds_B[b],
            "right_action": experience.right_B[b],
            **_game_fields(scores, b),
            **_judge_fields(scores, b),
        })
    return rows


def _game_fields(scores: Scores, b: int) -> dict[str, Any]:
    """The matrix that completion `b` wrote and its solution; null where there is none."""
    chain = scores.chains[b]
    solved = {name: float(values[b]) for name, values in scores.game.items()}
    known = {name: value if np.isfinite(value) else None for name, value in solved.items()}
    cell = known.pop("recommended")
    return {
        "payoff": chain.payoff,
        "chain_error": chain.error,
        "pareto_set": None if chain.payoff is None else list(scores.pareto[b]),
        "recommended": None if cell is None else KEYS[int(cell)],
        **known,
    }


def _judge_fields(scores: Scores, b: int) -> dict[str, Any]:
    """What the judges said about completion `b`; null where nobody was asked."""
    judgement, consistency = scores.judgements[b], scores.consistency_judgements[b]
    return {
        "judge_score": None if judgement is None else judgement.score,
        "judge_reply": None if judgement is None else judgement.reply,
        "judge_error": None if judgement is None else judgement.error,
        "judge_cause": None if judgement is None else judgement.cause,
        "judge_attempts": None if judgement is None else judgement.attempts,
        "consistency_reply": None if consistency is None else consistency.reply,
        "consistency_error": None if consistency is None else consistency.error,
    }
