"""Rows that come and go: the sampler's loop for a server, in three jitted programs.

A slot is one row of a batch, with a prompt, tokens, settings and a key of its own. Slots share each
decode step and nothing else, so what a row draws does not depend on who sits beside it:

    admit    one prompt              -> a slot, prefilled
    run      a few steps of all rows -> their new tokens, and who ended or paused
    splice   a slot goes back to a position and is fed tokens that nobody sampled

Positions are the sampler's: own-cache position 0 holds the last prompt token, and completion token
t is drawn by feeding position t. So `length_B`, the number of completion tokens, is also where the
pending token `token_B` goes. A draw depends on (seed, t) alone: it is what `make_sampler` draws
with key(seed) for prompt index 0 and sample 0.

Temperature, top-p, limits and keys are data, not constants of the programs. Widths come from short
lists, so that every program is compiled once. Knows no text: a row pauses where an automaton over
token ids (`stopping.stop_table`) ends.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gtalign_jax.model import decode, forward
from gtalign_jax.model.decode import Cache, PromptCache
from gtalign_jax.model.sharding import Layout, prompt_shards
from gtalign_jax.model.spec import ModelConfig, Params, abstract_params
from gtalign_jax.rollout import filters
from gtalign_jax.rollout.draws import draw, greedy, is_stop, row_keys, uniform

PROMPT_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the longest prompt
FORCED_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1)  # of the longest completion
COARSE = 64  # widths are multiples of it: between finer ones there is nothing to gain


@dataclasses.dataclass(frozen=True)
class SlotsConfig:
    """Sizes of the programs: slots B, prompt tokens S, completion tokens T, steps per `run`."""

    slots: int = 8
    prompt_tokens: int = 1024
    new_tokens: int = 512
    burst: int = 8

    def __post_init__(self) -> None:
        for key, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{key}={value}: must be >= 1")

    @property
    def prompt_widths(self) -> tuple[int, ...]:
        """To which a prompt is padded."""
        return _widths(self.prompt_tokens, PROMPT_WIDTHS)

    @property
    def forced_widths(self) -> tuple[int, ...]:
        """To which what is forced is padded, the token before it included."""
        return _widths(self.new_tokens + 1, FORCED_WIDTHS)


def _widths(longest: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """Ends with `longest` itself."""
    coarse = [math.ceil(longest * fraction / COARSE) * COARSE for fraction in fractions]
    return tuple(sorted({min(width, longest) for width in coarse}))


@struct.dataclass
class Settings:
    """How one row is drawn: scalars.

    seed: of its key. limit: completion tokens at most. pause: stop where the automaton ends.
    """

    seed: jax.Array
    limit: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    pause: jax.Array


def settings(seed: int, limit: int, temperature: float, top_p: float, pause: bool) -> Settings:
    """Settings in the dtypes that the programs are compiled for; of a seed the low 32 bits count,
    as in `jax.random.key`."""
    return Settings(np.uint32(seed & 0xFFFFFFFF), np.int32(limit), np.float32(temperature),
                    np.float32(top_p), np.bool_(pause))


@struct.dataclass
class Slots:
    """All rows: caches with Q = B and G = 1, and `[B]` each of the rest.

    token_B: pending, at position length_B. seen_B: the automaton's state. pause_B: whether its end
    pauses the row. live_B: the row decodes; a slot that is free, ended or paused does not.
    """

    prompt: PromptCache
    keys: Cache
    values: Cache
    key_B: jax.Array
    token_B: jax.Array
    length_B: jax.Array
    limit_B: jax.Array
    temperature_B: jax.Array
    top_p_B: jax.Array
    seen_B: jax.Array
    pause_B: jax.Array
    live_B: jax.Array


@struct.dataclass
class News:
    """What a run brought: its tokens `[B, burst]`, of which the first count_B are real.

    At most one of paused_B (the automaton ended) and stopped_B (by a stop token, which is the last
    of the tokens) holds; a row that is neither and no longer live_B has reached its limit.
    """

    tokens_BN: jax.Array
    count_B: jax.Array
    live_B: jax.Array
    paused_B: jax.Array
    stopped_B: jax.Array


@dataclasses.dataclass(frozen=True)
class SlotPrograms:
    """The jitted programs; `slots` is donated to each and comes back.

    empty() -> Slots
    admit(params, slots, row, tokens_QS [1, one of prompt_widths], length_Q [1], Settings) -> Slots
    run(params, slots, table_VA, drop_B, go_B) -> (Slots, News); frees the rows of drop_B first and
      lets the paused rows of go_B, which are below their limit, go on (they do not pause again)
    splice(params, slots, row, tokens_F [one of forced_widths], start, count) -> Slots; feeds the
      first `count` tokens at positions start, start + 1, …; the one after them becomes the pending
      token, and the row goes on (it does not pause again)
    """

    config: SlotsConfig
    empty: Callable[..., Slots]
    admit: Callable[..., Slots]
    run: Callable[..., tuple[Slots, News]]
    splice: Callable[..., Slots]


def make_slots(cfg: ModelConfig, config: SlotsConfig, stop_ids: tuple[int, ...],
               layout: Layout | None = None) -> SlotPrograms:
    """The programs for a model. Raises ValueError where a mesh cuts the slots unevenly."""
    if not stop_ids:
        raise ValueError("stop_ids is empty: a row could only end by running out of tokens")
    if layout is not None and config.slots % layout.axis_size("prompts"):
        raise ValueError(
            f"slots={config.slots}: must be a multiple of {layout.axis_size('prompts')}, into "
            f"which the mesh {dict(layout.mesh.shape)} cuts the rows"
        )

    def empty(params: Params) -> Slots:
        return _empty(cfg, config, params.embed_VD.dtype, layout)

    def admit(params: Params, slots: Slots, row, tokens_QS, length_Q, how: Settings) -> Slots:
        return _admit(params, cfg, layout, slots, row, tokens_QS, length_Q, how)

    def run(params: Params, slots: Slots, table_VA, drop_B, go_B) -> tuple[Slots, News]:
        live_B = (slots.live_B | go_B) & ~drop_B
        slots = slots.replace(live_B=live_B, pause_B=slots.pause_B & ~go_B)

        def unfinished(carry) -> jax.Array:
            n, slots, _ = carry
            return (n < config.burst) & jnp.any(slots.live_B)

        model = decode.ready(params, cfg, slots.prompt, slots.values)

        def step(carry):
            n, slots, news = carry
            return n + 1, *_step(model, cfg, stop_ids, table_VA, n, slots, news)

        start = (jnp.zeros((), jnp.int32), slots, _no_news(config))
        _, slots, news = jax.lax.while_loop(unfinished, step, start)
        return slots, news.replace(live_B=slots.live_B)

    def splice(params: Params, slots: Slots, row, tokens_F, start, count) -> Slots:
        return _splice(params, cfg, slots, row, tokens_F, start, count)

    where = _shardings(cfg, config, layout)
    pair = None if where is None else (where, layout.sharding())
    donated = {"donate_argnames": "slots"}
    return SlotPrograms(
        config,
        jax.jit(empty, out_shardings=where),
        jax.jit(admit, out_shardings=where, **donated),
        jax.jit(run, out_shardings=pair, **donated),
        jax.jit(splice, out_shardings=where, **donated),
    )


def _empty(cfg: ModelConfig, config: SlotsConfig, dtype, layout: Layout | None) -> Slots:
    B, S, T = config.slots, config.prompt_tokens, config.new_tokens
    zeros = lambda dtype, *shape: jnp.zeros((*shape, B), dtype)  # noqa: E731
    K, H = cfg.num_kv_heads, cfg.head_dim
    prompt = lambda *shape: jnp.zeros((cfg.num_layers, B, K, *shape), dtype)  # noqa: E731
    return Slots(
        PromptCache(prompt(H, S), prompt(S, H), zeros(jnp.int32)),
        *decode.own_caches(cfg, B, 1, T, dtype, layout),
        key_B=jax.random.split(jax.random.key(0), B), token_B=zeros(jnp.int32),
        length_B=zeros(jnp.int32), limit_B=zeros(jnp.int32), temperature_B=zeros(jnp.float32),
        top_p_B=zeros(jnp.float32), seen_B=zeros(jnp.int8), pause_B=zeros(bool),
        live_B=zeros(bool),
    )


def _shardings(cfg: ModelConfig, config: SlotsConfig, layout: Layout | None):
    """Where slots lie: caches by rows and heads, everything else whole on every device."""
    if layout is None:
        return None
    shapes = jax.eval_shape(lambda p: _empty(cfg, config, p.embed_VD.dtype, layout),
                            abstract_params(cfg))
    prompt, own = (layout.sharding(*axes) for axes in
                   (decode.PROMPT_CACHE_AXES, decode.OWN_CACHE_AXES))
    whole = jax.tree.map(lambda _: layout.sharding(), shapes)
    return whole.replace(prompt=PromptCache(prompt, prompt, layout.sharding()),
                         keys=jax.tree.map(lambda _: own, shapes.keys),
                         values=jax.tree.map(lambda _: own, shapes.values))


def _admit(params: Params, cfg: ModelConfig, layout: Layout | None, slots: Slots, row, tokens_QS,
           length_Q, how: Settings) -> Slots:
    """What lies in the slot past the new prompt's width or length is masked by its length."""
    last_Q, stream_Q = forward.split_prompt(tokens_QS, length_Q)
    # Where a mesh cuts rows, each part of it reads the prompt: one part alone would be no faster.
    parts = prompt_shards(layout)
    new = decode.prefill(params, cfg, jnp.tile(tokens_QS, (parts, 1)), jnp.tile(stream_Q, parts),
                          layout)
    put = lambda cache, new: jax.lax.dynamic_update_slice(  # noqa: E731
        cache, new[:, :1], (0, row, 0, 0, 0)
    )
    return slots.replace(
        prompt=PromptCache(
            put(slots.prompt.k_LQKHS, new.k_LQKHS), put(slots.prompt.v_LQKSH, new.v_LQKSH),
            slots.prompt.lengths_Q.at[row].set(stream_Q[0]),
        ),
        key_B=slots.key_B.at[row].set(
            row_keys(jax.random.key(how.seed), jnp.zeros(1, jnp.int32), 1)[0, 0]
        ),
        token_B=slots.token_B.at[row].set(last_Q[0]),
        length_B=slots.length_B.at[row].set(0),
        limit_B=slots.limit_B.at[row].set(how.limit),
        temperature_B=slots.temperature_B.at[row].set(how.temperature),
        top_p_B=slots.top_p_B.at[row].set(how.top_p),
        seen_B=slots.seen_B.at[row].set(0),
        pause_B=slots.pause_B.at[row].set(how.pause),
        live_B=slots.live_B.at[row].set(True),
    )


def _no_news(config: SlotsConfig) -> News:
    none_B = jnp.zeros(config.slots, bool)
    return News(jnp.zeros((config.slots, config.burst), jnp.int32),
                jnp.zeros(config.slots, jnp.int32), none_B, none_B, none_B)


def _step(model: decode.Model, cfg: ModelConfig, stop_ids: tuple[int, ...], table_VA, n,
          slots: Slots, news: News) -> tuple[Slots, News]:
    """One token of every live row; the n-th of this run."""
    live_B = slots.live_B
    hidden_QGFD, k, v = decode.extend(
        model, cfg, slots.prompt, slots.keys, slots.values, slots.token_B[:, None, None],
        slots.length_B[:, None], live_B[:, None].astype(jnp.int32),
    )
    logits_BV = forward.logits(forward.head_of(model.params), cfg, hidden_QGFD[:, 0, 0])
    logits_BV = filters.apply_rows(logits_BV, slots.temperature_B, slots.top_p_B)
    uniform_B = uniform(slots.key_B[:, None], slots.length_B[:, None])[:, 0]
    weights_BV = jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True))
    new_B = jnp.where(slots.temperature_B == 0, greedy(logits_BV), draw(weights_BV, uniform_B))

    token_B = jnp.where(live_B, new_B, slots.token_B)
    length_B = slots.length_B + live_B.astype(jnp.int32)
    seen_B = jnp.where(live_B, table_VA[token_B, slots.seen_B], slots.seen_B)
    stopped_B = live_B & is_stop(token_B, stop_ids)
    # At its limit a row pauses all the same: what is forced may be shorter than what was sampled.
    paused_B = live_B & ~stopped_B & slots.pause_B & (seen_B == table_VA.shape[1] - 1)
    ended_B = stopped_B | (length_B >= slots.limit_B)
    slots = slots.replace(
        keys=k, values=v, token_B=token_B, length_B=length_B, seen_B=seen_B,
        live_B=live_B & ~ended_B & ~paused_B,
    )
    return slots, News(
        tokens_BN=jax.lax.dynamic_update_slice_in_dim(
            news.tokens_BN, jnp.where(live_B, new_B, 0)[:, None], n, axis=1
        ),
        count_B=news.count_B + live_B.astype(jnp.int32),
        live_B=news.live_B, paused_B=news.paused_B | paused_B,
        stopped_B=news.stopped_B | stopped_B,
    )


def _splice(params: Params, cfg: ModelConfig, slots: Slots, row, tokens_F, start, count) -> Slots:
    """One row alone is fed: the others wait no longer than for a step that is a little wider."""
    take = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, row, 1, axis)  # noqa: E731
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, 1)  # noqa: E731
    own = lambda caches: tuple(take(cache, 1) for cache in caches)  # noqa: E731
    prompt = PromptCache(take(slots.prompt.k_LQKHS, 1), take(slots.prompt.v_LQKSH, 1),
                         take(slots.prompt.lengths_Q, 0))
    _, k, v = decode.extend(
        decode.ready(params, cfg, prompt, slots.values), cfg, prompt, own(slots.keys),
        own(slots.values),
        tokens_F[None, None], start[None, None], count[None, None],
    )
    return slots.replace(
        keys=tuple(map(put, slots.keys, k)), values=tuple(map(put, slots.values, v)),
        token_B=slots.token_B.at[row].set(tokens_F[count]),
        length_B=slots.length_B.at[row].set(start + count),
        pause_B=slots.pause_B.at[row].set(False),
        live_B=slots.live_B.at[row].set(True),
    )
