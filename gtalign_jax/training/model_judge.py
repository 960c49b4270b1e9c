"""A language model as judge on the run's own devices: no server and no network.

    requests of all processes -> prompts, once each -> batches of few widths -> replies -> verdicts

It is shown what a judge behind a server is shown (`reward.prompts`), answers by the sampler that
the policy answers by, and is read by the same parser.

Memory: its weights stay on the devices for the whole run, beside the policy's, in the dtype of the
computation. Rollout's rules cut them over `mesh.tensor` alone, so a chip holds

    parameters / mesh.tensor x 2 bytes in bfloat16,

and while it judges, the keys and values of its share of `batch_size` rows. The compile command
counts both.

What it says of a request depends on the request alone, up to rounding: not on what else is asked,
in which order or by which process. Limits of servers (rates, timeouts, the deadline) mean nothing
here; what the devices are given, they do.
"""

import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from gtalign_jax.data.batches import WIDTH_MULTIPLE, common_prefix, pad_right
from gtalign_jax.data.chat import decode, encode_chats, load_tokenizer, render_chat, stop_ids
from gtalign_jax.model import load
from gtalign_jax.model.hf import load_config, load_params
from gtalign_jax.model.sharding import Layout, check_model_fits
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.pod import exchange, share
from gtalign_jax.reward import prompts
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judgement, JudgeRequest, missing, read_verdict, scale_of
from gtalign_jax.reward.tasks import TASKS
from gtalign_jax.rollout.sampler import Sampler, SamplerConfig, make_sampler
from gtalign_jax.training.state import named_key

HALVINGS = 3  # widths of batches: prompt_tokens, a half, a quarter and an eighth of it

Told = Callable[[int, Judgement], None]
Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ModelJudge:
    """Callable judge; see the module.

    A collective: every process calls it as often as the others, from the thread in which it makes
    its other collectives, each with its own requests, which may be none.

    Attributes:
      params: in the dtype to compute in, laid out for rollout.
      prefix: what its prompts begin with: the part that is computed once per batch.
      sample, sample_any: the samplers of prompts with that prefix, and of any prompts.
    """

    config: JudgeConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    prefix: Ids
    sample: Sampler
    sample_any: Sampler

    def __call__(self, requests: Sequence[JudgeRequest],
                 told: Told = lambda i, judgement: None) -> list[Judgement]:
        """One Judgement per request, in order. `told` hears of each as it comes, by its number."""
        found: list[Judgement | None] = [None] * len(requests)
        places: dict[Ids, list[int]] = {}
        for i, prompt in enumerate(self._prompts(requests)):
            if isinstance(prompt, Judgement):
                found[i] = prompt
                told(i, prompt)
            else:
                places.setdefault(prompt, []).append(i)
        for batch in self._batches(list(places)):
            began = time.perf_counter()
            replies = self._replies(batch)
            seconds = time.perf_counter() - began
            for ids, (reply, stopped) in zip(batch, replies, strict=True):
                for i in places.get(ids, ()):
                    judged = self._read(requests[i], reply, stopped)
                    found[i] = dataclasses.replace(judged, attempts=1, seconds=seconds)
                    told(i, found[i])
        return found

    @property
    def widths(self) -> tuple[int, ...]:
        """What prompts are padded to, ascending: so many programs may be compiled."""
        parts = (-(-self.config.prompt_tokens // 2**n) for n in range(HALVINGS + 1))
        return tuple(sorted({-(-part // WIDTH_MULTIPLE) * WIDTH_MULTIPLE for part in parts}))

    def _prompts(self, requests: Sequence[JudgeRequest]) -> list[Ids | Judgement]:
        """What the judge is shown of each request, or why it is shown nothing."""
        limit, reasons = self.config.prompt_tokens, list(map(prompts.too_long, requests))
        shown = [request for request, why in zip(requests, reasons, strict=True) if why is None]
        encoded = iter(_encode(self.tokenizer, shown, self.config))
        found: list[Ids | Judgement] = []
        for why in reasons:
            ids = next(encoded) if why is None else ()
            if len(ids) > limit:
                why = f"its prompt has {len(ids)} tokens, more than judge.prompt_tokens={limit}"
            found.append(ids if why is None else missing("too_long", why))
        return found

    def _batches(self, own: list[Ids]) -> list[list[Ids]]:
        """The prompts of all processes, each once, the longest first: what does not fit into the
        devices' memory is tried first, and only the last batch, the narrowest, is not full."""
        arrays = [np.array(ids, np.int32) for ids in own]
        parts = exchange.all_gather(arrays, "requests to the judge")
        distinct = {tuple(ids.tolist()) for part in parts for ids in part}
        ordered = sorted(distinct, key=lambda ids: (-len(ids), ids))
        size = self.config.batch_size
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def _replies(self, batch: list[Ids]) -> list[tuple[str, bool]]:
        """(what it says to each prompt, whether it had come to an end), in every process."""
        size, where = self.config.batch_size, self.layout.sharding("prompts")
        rows = [*batch, *batch[:1] * (size - len(batch))]
        width = next(width for width in self.widths if width >= len(batch[0]))
        tokens_QS, lengths_Q = pad_right(rows, width)
        index_Q = np.array([_index(ids) for ids in rows], np.int32)
        limit_QG = np.where(np.arange(size) < len(batch), self.config.max_tokens, 1)[:, None]
        # A template may write the date, and a rubric of a user's own may run into what precedes it.
        common = len(self.prefix)
        known = all(len(ids) > common and ids[:common] == self.prefix for ids in batch)
        sample = self.sample if known else self.sample_any
        arrays = (tokens_QS, lengths_Q, index_Q, limit_QG.astype(np.int32))
        *inputs, limit_QG = share.place(arrays, where)
        key = named_key(jax.random.key(0), "judge", 0)
        rollout = sample(self.params, *inputs, key, limit_QG).replace(logp_QGT=None, slots=None)
        at_Q, own = share.fetch(share.place(rollout, where), where)
        real_Q = at_Q < len(batch)
        replies = [
            (decode(self.tokenizer, tokens_T[:length]), bool(stopped))
            for tokens_T, length, stopped in zip(
                *(x[real_Q, 0] for x in (own.tokens_QGT, own.lengths_QG, own.stopped_QG)),
                strict=True)
        ]
        return share.everywhere(replies, at_Q[real_Q], "replies of the judge")

    def _read(self, request: JudgeRequest, reply: str, stopped: bool) -> Judgement:
        if not stopped:
            limit = f"the reply is longer than judge.max_tokens={self.config.max_tokens}"
            return missing("truncated", limit, reply)
        return read_verdict(reply, *scale_of(request))


def make(cfg: JudgeConfig, layout: Layout, dtype: Any) -> ModelJudge:
    """The judge that `judge.model` names, its weights in `dtype` on the devices of `layout`.

    Args:
      layout: the run's mesh with rollout's rules.

    Raises:
      ValueError: no such model, one that does not fit the mesh or the settings, or a tokenizer that
        cannot ask it: named by key, value and what is allowed. Nothing is compiled until then.
    """
    check_settings(cfg, layout)
    directory = load.resolve(cfg.model, "judge.model")
    named = f"judge.model={cfg.model!r}"
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"{named} has no config.json; allowed: {load.ALLOWED}")
    try:
        tokenizer = load_tokenizer(directory)
        model = fitted(load_config(directory), layout)
        stops = stop_ids(tokenizer, load.generation_config(load.ModelSource(path=directory)))
        prefix = _check_asking(cfg, model, tokenizer, stops)
        params = load_params(directory, model, layout, dtype)
    except (ValueError, OSError) as error:
        raise ValueError(f"{named}: {error}") from error
    return ModelJudge(
        config=cfg, params=params, tokenizer=tokenizer, layout=layout, prefix=prefix,
        sample=make_sampler(model, settings(cfg), 1, stops, layout, len(prefix)),
        sample_any=make_sampler(model, settings(cfg), 1, stops, layout),
    )


def settings(cfg: JudgeConfig) -> SamplerConfig:
    """How its replies are drawn."""
    return SamplerConfig(cfg.max_tokens, cfg.temperature, top_p=cfg.top_p)


def fitted(model: ModelConfig, layout: Layout) -> ModelConfig:
    """The sizes with a vocabulary that the mesh divides. Raises ValueError where it does not divide
    the rest."""
    model = dataclasses.replace(model, vocab_multiple=layout.axis_size("vocab"))
    check_model_fits(model, layout.mesh)
    return model


def check_settings(cfg: JudgeConfig, layout: Layout) -> None:
    """Raises ValueError for settings that fit a server, but not this judge."""
    shards = layout.axis_size("prompts")
    if cfg.batch_size % shards:
        near = sorted({max(cfg.batch_size // shards, 1) * shards,
                       (cfg.batch_size // shards + 1) * shards})
        raise ValueError(
            f"judge.batch_size={cfg.batch_size} must be a multiple of {shards}, the mesh's batch "
            f"shards: for example {' or '.join(map(str, near))}"
        )
    if not cfg.top_p > 0:
        raise ValueError(f"judge.top_p={cfg.top_p}: with judge.kind='jax' it must be > 0")
    if cfg.reasoning_effort:
        raise ValueError(
            f"judge.reasoning_effort={cfg.reasoning_effort!r}: with judge.kind='jax' only '' is "
            "allowed; judge.thinking switches reasoning"
        )
    other = sorted(cfg.more_fields().keys() - {"chat_template_kwargs"})
    if other:
        raise ValueError(
            f"judge.extra_body={cfg.extra_body!r}: with judge.kind='jax' it may hold "
            f"chat_template_kwargs alone, not {', '.join(other)}"
        )


def _check_asking(cfg: JudgeConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase,
                  stops: tuple[int, ...]) -> Ids:
    """What all prompts begin with. Raises ValueError where tokenizer, template and model cannot
    work together, or no prompt would fit."""
    if max(len(tokenizer) - 1, *stops) >= model.vocab_size:
        raise ValueError(
            f"its tokenizer has {len(tokenizer)} tokens and stops at {stops}, the model knows "
            f"{model.vocab_size}; allowed: ids below that"
        )
    bare = [JudgeRequest("quality", name, "?", "?", "?") for name in TASKS]
    bare.append(JudgeRequest("consistency", "", "?", "?", "?", analyze="?", pareto=("VQ_DA",)))
    for request in bare:
        chat = prompts.messages(request)
        try:
            text = render_chat(tokenizer, chat, _variables(cfg))
        except ValueError as error:
            raise ValueError(f"its chat template takes no system and user message: {error}"
                             ) from error
        if any(message["content"].strip() not in text for message in chat):
            raise ValueError("its chat template leaves out a part of a prompt of a system and a "
                             "user message; allowed: one that shows both as they are")
    encoded = _encode(tokenizer, bare, cfg)
    longest = max(map(len, encoded))
    if longest >= cfg.prompt_tokens:
        raise ValueError(
            f"judge.prompt_tokens={cfg.prompt_tokens}: the rubric alone takes up to {longest} "
            "tokens; it must be larger by the longest response"
        )
    if cfg.prompt_tokens + cfg.max_tokens > model.max_position:
        raise ValueError(
            f"judge.prompt_tokens={cfg.prompt_tokens} + judge.max_tokens={cfg.max_tokens} may be "
            f"at most {model.max_position}, the positions that the model knows"
        )
    return encoded[0][: common_prefix(encoded)]


def _variables(cfg: JudgeConfig) -> dict[str, Any]:
    """Of the chat template."""
    return cfg.more_fields().get("chat_template_kwargs", {})


def _encode(tokenizer: PreTrainedTokenizerBase, requests: Sequence[JudgeRequest],
            cfg: JudgeConfig) -> list[Ids]:
    chats = [prompts.messages(request) for request in requests]
    return list(map(tuple, encode_chats(tokenizer, chats, _variables(cfg))))


def _index(ids: Ids) -> int:
    """What keys the draws of a prompt: equal prompts get equal replies, whoever asks and when."""
    return zlib.crc32(np.array(ids, np.int32).tobytes()) & 0x7FFFFFFF
