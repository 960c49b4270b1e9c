"""Sampling groups of completions: two jitted functions, wholly on the device.

    prompts_QS  --prefill once-->  PromptCache  --while_loop-->  tokens_QGT, logp_QGT, lengths_QG

State before iteration t: `token_QG` is the token at row position t (at t = 0 the prompt's last
one), the own caches hold positions < t. One iteration feeds it, samples completion token t and
writes it. The loop ends when every row has T tokens or has ended. It can also be left when rows
wait at a text, and be taken up again with rows out of step (`rollout.steering`).

Lengths, never token ids, say what is real: a length counts the stop token, which is trained on.
A draw depends on (key, prompt index, sample, t) alone, so that any split of the prompts over
devices or processes draws the same tokens. The sampler knows nothing about text.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from gtalign_jax.model import forward
from gtalign_jax.model.forward import PromptCache
from gtalign_jax.model.sharding import Layout
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.rollout import filters as filters_lib
from gtalign_jax.rollout.filters import Filters


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How completions are drawn."""

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    micro_batch_prompts: int = 0  # sampled at a time per batch shard, to bound caches; 0: all

    def __post_init__(self) -> None:
        """Refuses what has no meaning at once: the sampler is made only after the cold start."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be >= 1")
        Filters(self.temperature, self.top_k, self.top_p)

    @property
    def filters(self) -> Filters:
        return Filters(self.temperature, self.top_k, self.top_p)


@struct.dataclass
class Rollout:
    """What was sampled.

    tokens_QGT: completion ids; what lies past a row's length is 0 and means nothing.
    logp_QGT: log-probability of each token under the distribution it was drawn from; 0 past it.
    lengths_QG: number of completion tokens, the stop token included.
    stopped_QG: the row ended by a stop token (otherwise it was cut at the limit).
    slots: row positions computed, those of finished rows too: iterations times Q G.
    """

    tokens_QGT: jax.Array
    logp_QGT: jax.Array
    lengths_QG: jax.Array
    stopped_QG: jax.Array
    slots: jax.Array


@struct.dataclass
class State:
    """Between two tokens.

    t: the position to feed next, one number where all rows are in step, else `[Q, G]`.
    token_QG: the token to feed there. done_QG: nothing more is drawn for the row, for now.
    seen_QG: how much of the text that rows wait at each has just written (`rollout.stopping`).
    """

    t: jax.Array
    token_QG: jax.Array
    done_QG: jax.Array
    seen_QG: jax.Array
    k_LQGTKH: jax.Array
    v_LQGTKH: jax.Array
    rollout: Rollout


def draw(logits_QGV: jax.Array, uniform_QG: jax.Array) -> jax.Array:
    """Inverse-CDF sampling: one uniform number per row instead of V Gumbels."""
    weights = jnp.exp(logits_QGV - logits_QGV.max(axis=-1, keepdims=True))
    mass = jnp.cumsum(weights, axis=-1)
    # A parallel sum is not monotone: it may rise by a rounding error at a token without mass, which
    # must not be drawn for that, and its last entry need not be its largest.
    mass = jnp.where(weights > 0, mass, 0.0)
    above = mass > (uniform_QG * mass.max(axis=-1))[..., None]
    return jnp.argmax(above, axis=-1).astype(jnp.int32)


def row_keys(key: jax.Array, index_Q: jax.Array, G: int) -> jax.Array:
    """One key per row, from (key, prompt index, sample)."""
    keys_Q = jax.vmap(lambda q: jax.random.fold_in(key, q))(index_Q)
    return jax.vmap(
        lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(jnp.arange(G))
    )(keys_Q)


def uniform(keys_QG: jax.Array, t: jax.Array) -> jax.Array:
    """A uniform number in [0, 1) per row for position t, one for all rows or one for each."""
    draw_one = lambda key, t: jax.random.uniform(jax.random.fold_in(key, t))  # noqa: E731
    return jax.vmap(jax.vmap(draw_one))(keys_QG, jnp.broadcast_to(t, keys_QG.shape))


def choose(logits_QGV: jax.Array, filters: Filters, uniform_QG: jax.Array):
    """(token `[Q, G]`, its log-probability `[Q, G]`) under the filtered distribution."""
    logits_QGV = filters_lib.apply(logits_QGV, filters)
    if filters.temperature == 0:
        token_QG = jnp.argmax(logits_QGV, axis=-1).astype(jnp.int32)
    else:
        token_QG = draw(logits_QGV, uniform_QG)
    picked = jnp.take_along_axis(logits_QGV, token_QG[..., None], axis=-1)[..., 0]
    return token_QG, picked - jax.nn.logsumexp(logits_QGV, axis=-1)


def is_stop(token_QG: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    stop = jnp.zeros(token_QG.shape, bool)
    for stop_id in stop_ids:
        stop |= token_QG == stop_id
    return stop


def start(cfg: ModelConfig, prompt: PromptCache, last_Q, G: int, T: int,
          layout: Layout | None) -> State:
    """The state before the first token."""
    Q = last_Q.shape[0]
    cache = jnp.zeros(
        (cfg.num_layers, Q, G, T, cfg.num_kv_heads, cfg.head_dim), prompt.k_LQSKH.dtype
    )
    if layout is not None:
        cache = layout.constrain(cache, *forward.OWN_CACHE_AXES)
    rollout = Rollout(
        tokens_QGT=jnp.zeros((Q, G, T), jnp.int32),
        logp_QGT=jnp.zeros((Q, G, T), jnp.float32),
        lengths_QG=jnp.zeros((Q, G), jnp.int32),
        stopped_QG=jnp.zeros((Q, G), bool),
        slots=jnp.zeros((), jnp.int32),
    )
    token_QG = jnp.broadcast_to(last_Q[:, None], (Q, G)).astype(jnp.int32)
    return State(jnp.zeros((), jnp.int32), token_QG, jnp.zeros((Q, G), bool),
                 jnp.zeros((Q, G), jnp.int32), cache, cache, rollout)


def _record(rollout: Rollout, t, token_QG, logp_QG, live_QG, stop_QG) -> Rollout:
    """Writes completion token t of the rows that are still live."""
    def put(array_QGT, new_QG):
        if t.ndim == 0:
            new = jnp.where(live_QG, new_QG, 0)[..., None].astype(array_QGT.dtype)
            return jax.lax.dynamic_update_slice(array_QGT, new, (0, 0, t))
        here_QGT = live_QG[..., None] & (jnp.arange(array_QGT.shape[2])[None, None] == t[..., None])
        return jnp.where(here_QGT, new_QG[..., None], array_QGT)

    return Rollout(
        tokens_QGT=put(rollout.tokens_QGT, token_QG),
        logp_QGT=put(rollout.logp_QGT, logp_QG),
        lengths_QG=rollout.lengths_QG + live_QG.astype(jnp.int32),
        stopped_QG=rollout.stopped_QG | (live_QG & stop_QG),
        slots=rollout.slots + live_QG.size,
    )


def run(params: Params, cfg: ModelConfig, prompt: PromptCache, state: State, keys_QG: jax.Array,
        filters: Filters, stop_ids: tuple[int, ...], table_VN: jax.Array | None = None) -> State:
    """Draws until every row is done: it drew a stop token, is at the limit T, or waits.

    With `table_VN` (of `stopping.stop_table`) a row waits as soon as it has written the table's
    texts. Rows in step, as all are at first, share one position; otherwise each has its own.
    """
    T, in_step = state.rollout.tokens_QGT.shape[2], state.t.ndim == 0

    def step(state: State) -> State:
        caches, live_QG = (state.k_LQGTKH, state.v_LQGTKH), ~state.done_QG
        if in_step:
            hidden_QGD, k, v = forward.decode_step(
                params, cfg, prompt, *caches, state.token_QG, state.t
            )
        else:
            hidden_QG1D, k, v = forward.extend(
                params, cfg, prompt, *caches, state.token_QG[..., None], state.t,
                live_QG.astype(jnp.int32),
            )
            hidden_QGD = hidden_QG1D[:, :, 0]
        logits_QGV = forward.logits(forward.head_of(params), cfg, hidden_QGD)
        token_QG, logp_QG = choose(logits_QGV, filters, uniform(keys_QG, state.t))
        stop_QG = is_stop(token_QG, stop_ids)
        rollout = _record(state.rollout, state.t, token_QG, logp_QG, live_QG, stop_QG)
        done_QG, seen_QG = stop_QG | (state.t + 1 >= T), state.seen_QG
        if table_VN is not None:
            seen_QG = jnp.where(live_QG, table_VN[token_QG, seen_QG].astype(jnp.int32), seen_QG)
            done_QG |= seen_QG == table_VN.shape[1] - 1
        return State(state.t + 1, jnp.where(live_QG, token_QG, state.token_QG),
                     state.done_QG | done_QG, seen_QG, k, v, rollout)

    return jax.lax.while_loop(lambda state: ~jnp.all(state.done_QG), step, state)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The two jitted programs of a rollout, made once; calling it runs one after the other.

    prefill(params, tokens_QS, lengths_Q) -> (PromptCache, last token of each prompt `[Q]`)
    decode(params, cache, last_Q, index_Q, key) -> Rollout
    """

    prefill: Callable[..., tuple[PromptCache, jax.Array]]
    decode: Callable[..., Rollout]

    def __call__(self, params: Params, tokens_QS, lengths_Q, index_Q, key) -> Rollout:
        """Completions of whole, right-padded prompts.

        `params` are in the dtype to compute in and laid out for rollout; `index_Q` identifies each
        prompt in the step (it keys the randomness).
        """
        cache, last_Q = self.prefill(params, tokens_QS, lengths_Q)
        return self.decode(params, cache, last_Q, index_Q, key)


def make_sampler(cfg: ModelConfig, sampler: SamplerConfig, samples: int,
                 stop_ids: tuple[int, ...], layout: Layout | None = None) -> Sampler:
    """The sampler of `samples` (G) completions per prompt.

    Args:
      sampler: limits and filters; all static.
      stop_ids: ids that end a row; at least one.
    """
    if not stop_ids:
        raise ValueError("stop_ids is empty: a row could only end by running out of tokens")
    T, filters = sampler.max_new_tokens, sampler.filters

    def prefill(params: Params, tokens_QS, lengths_Q) -> tuple[PromptCache, jax.Array]:
        last_Q, stream_lengths_Q = forward.split_prompt(tokens_QS, lengths_Q)
        return forward.prefill(params, cfg, tokens_QS, stream_lengths_Q, layout), last_Q

    def decode(params: Params, prompt: PromptCache, last_Q, index_Q, key) -> Rollout:
        keys_QG = row_keys(key, index_Q, samples)
        state = start(cfg, prompt, last_Q, samples, T, layout)
        return run(params, cfg, prompt, state, keys_QG, filters, stop_ids).rollout

    where = None
    if layout is not None:
        keys, prompts = layout.sharding(*forward.PROMPT_CACHE_AXES), layout.sharding("prompts")
        where = (PromptCache(keys, keys, prompts), prompts)
    return Sampler(jax.jit(prefill, out_shardings=where), jax.jit(decode))
