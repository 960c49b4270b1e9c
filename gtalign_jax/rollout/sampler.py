"""Sampling groups of completions: three jitted functions, wholly on the device.

    prompts_QS  --prefill once-->  PromptCache  --while_loop-->  tokens_QGT, logp_QGT, lengths_QG

State before iteration t: `token_QG` is the token at row position t (at t = 0 the prompt's last
one), the own caches hold positions < t. One iteration feeds it, samples completion token t and
writes it. The loop ends when every row has T tokens or has ended; as rows end it goes on with ever
smaller batches (`rollout.compaction`). It can also be left when rows wait at a text, and be taken
up again with rows out of step (`rollout.steering`).

Lengths, never token ids, say what is real: a length counts the stop token, which is trained on.
A draw depends on (key, prompt index, sample, t) alone, so that any split of the prompts over
devices or processes draws the same tokens. The sampler knows nothing about text.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gtalign_jax.model import decode, forward
from gtalign_jax.model.decode import Cache, PromptCache
from gtalign_jax.model.sharding import Layout, prompt_shards
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.rollout.compaction import Leg, batch_sizes, compact, end, most_live
from gtalign_jax.rollout.draws import choose, is_stop, row_keys, uniform
from gtalign_jax.rollout.filters import Filters
from gtalign_jax.rollout.state import Rollout, State


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How completions are drawn."""

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    micro_batch_prompts: int = 0  # sampled at a time per batch shard, to bound caches; 0: all
    shrink: float = 0.67  # each compiled batch of live rows to the one before it; 0: one for all
    smallest: int = 4  # rows of the smallest, per batch shard

    def __post_init__(self) -> None:
        """Refuses what has no meaning at once: the sampler is made only after the cold start."""
        for key in ("max_new_tokens", "smallest"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be >= 1")
        if not 0 <= self.shrink < 1:
            raise ValueError(f"shrink={self.shrink}: must be in [0, 1) (0 turns it off)")
        Filters(self.temperature, self.top_k, self.top_p)

    @property
    def filters(self) -> Filters:
        return Filters(self.temperature, self.top_k, self.top_p)


def start(cfg: ModelConfig, prompt: PromptCache, last_Q, G: int, T: int,
          layout: Layout | None) -> State:
    """The state before the first token."""
    Q = last_Q.shape[0]
    keys, values = decode.own_caches(cfg, Q, G, T, prompt.v_LQKSH.dtype, layout)
    rollout = Rollout(
        tokens_QGT=jnp.zeros((Q, G, T), jnp.int32),
        logp_QGT=jnp.zeros((Q, G, T), jnp.float32),
        lengths_QG=jnp.zeros((Q, G), jnp.int32),
        stopped_QG=jnp.zeros((Q, G), bool),
        slots=jnp.zeros((), jnp.int32),
    )
    token_QG = jnp.broadcast_to(last_Q[:, None], (Q, G)).astype(jnp.int32)
    return State(jnp.zeros((), jnp.int32), token_QG, jnp.zeros((Q, G), bool),
                 jnp.full((Q, G), T, jnp.int32), jnp.zeros((Q, G), jnp.int32), keys, values,
                 rollout)


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
        filters: Filters, stop_ids: tuple[int, ...], table_VN: jax.Array | None = None, *,
        until: int = 0, shards: int = 1) -> State:
    """Draws until every row is done: it drew a stop token, is at its limit, or waits.

    With `table_VN` (of `stopping.stop_table`) a row waits as soon as it has written the table's
    texts. Rows in step, as all are at first, share one position; otherwise each has its own. With
    `until` it ends sooner: when no more than so many rows of any of the `shards` live.
    """
    in_step = state.t.ndim == 0
    model = decode.ready(params, cfg, prompt, state.values)

    def step(state: State) -> State:
        caches, live_QG = (state.keys, state.values), ~state.done_QG
        if in_step:
            hidden_QGD, k, v = decode.decode_step(
                model, cfg, prompt, *caches, state.token_QG, state.t
            )
        else:
            hidden_QG1D, k, v = decode.extend(
                model, cfg, prompt, *caches, state.token_QG[..., None], state.t,
                live_QG.astype(jnp.int32),
            )
            hidden_QGD = hidden_QG1D[:, :, 0]
        logits_QGV = forward.logits(forward.head_of(params), cfg, hidden_QGD)
        token_QG, logp_QG = choose(logits_QGV, filters, uniform(keys_QG, state.t))
        stop_QG = is_stop(token_QG, stop_ids)
        rollout = _record(state.rollout, state.t, token_QG, logp_QG, live_QG, stop_QG)
        done_QG, seen_QG = stop_QG | (state.t + 1 >= state.limit_QG), state.seen_QG
        if table_VN is not None:
            seen_QG = jnp.where(live_QG, table_VN[token_QG, seen_QG].astype(jnp.int32), seen_QG)
            done_QG |= seen_QG == table_VN.shape[1] - 1
        return State(state.t + 1, jnp.where(live_QG, token_QG, state.token_QG),
                     state.done_QG | done_QG, state.limit_QG, seen_QG, k, v, rollout)

    def unfinished(state: State) -> jax.Array:
        return most_live(state.done_QG, shards) > until

    return jax.lax.while_loop(unfinished, step, state)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The jitted programs of a rollout, made once; calling it runs them in turn.

    prefill(params, tokens_QS, lengths_Q) -> (PromptCache, last token of each prompt `[Q]`)
    first(params, cache, last_Q, index_Q, key, limit_QG, until=rows) -> (Leg, own caches)
    next(params, Leg, caches, size=rows, until=rows) -> the same; takes the caches over

    Each goes on `until` no more rows of any shard live; `size` is the number of rows that it
    decodes. Every size is a program of its own, compiled when a rollout first gets there.
    `pause()` is called between them; where it raises, the rollout is given up.
    """

    config: SamplerConfig
    samples: int
    layout: Layout | None
    prefill: Callable[..., tuple[PromptCache, jax.Array]]
    first: Callable[..., tuple[Leg, tuple[Cache, Cache]]]
    next: Callable[..., tuple[Leg, tuple[Cache, Cache]]]
    pause: Callable[[], None] = lambda: None

    def __call__(self, params: Params, tokens_QS, lengths_Q, index_Q, key,
                 limit_QG=None) -> Rollout:
        """Completions of whole, right-padded prompts.

        `params` are in the dtype to compute in and laid out for rollout; `index_Q` identifies each
        prompt in the step (it keys the randomness); `limit_QG` is the number of completion tokens
        that each row may have, where that is less than the sampler's limit.
        """
        self.pause()
        cache, last_Q = self.prefill(params, tokens_QS, lengths_Q)
        return self.decode(params, cache, last_Q, index_Q, key, limit_QG)

    def sizes(self, prompts: int) -> tuple[int, ...]:
        """Rows per batch shard that are decoded at a time, largest first."""
        rows = prompts * self.samples // prompt_shards(self.layout, prompts)
        return batch_sizes(rows, self.config.shrink, self.config.smallest)

    def decode(self, params: Params, cache: PromptCache, last_Q, index_Q, key,
               limit_QG=None) -> Rollout:
        """Completions after the prompts in `cache`, in ever smaller batches."""
        sizes = (*self.sizes(len(last_Q)), 0)
        leg, caches = self.first(params, cache, last_Q, index_Q, key, limit_QG, until=sizes[1])
        while live := int(leg.live):
            self.pause()
            size, until = next(pair for pair in zip(sizes, sizes[1:], strict=False)
                               if pair[1] < live <= pair[0])
            leg, caches = self.next(params, leg, caches, size=size, until=until)
        return leg.whole


def make_sampler(cfg: ModelConfig, sampler: SamplerConfig, samples: int,
                 stop_ids: tuple[int, ...], layout: Layout | None = None,
                 common: int = 0) -> Sampler:
    """The sampler of `samples` (G) completions per prompt.

    Args:
      sampler: limits and filters; all static.
      stop_ids: ids that end a row; at least one.
      common: how many tokens all prompts begin with, fewer than any has; computed and kept once.
    """
    if not stop_ids:
        raise ValueError("stop_ids is empty: a row could only end by running out of tokens")

    def prefill(params: Params, tokens_QS, lengths_Q) -> tuple[PromptCache, jax.Array]:
        last_Q, stream_lengths_Q = forward.split_prompt(tokens_QS, lengths_Q)
        return decode.prefill(params, cfg, tokens_QS, stream_lengths_Q, layout, common), last_Q

    def go_on(params: Params, leg: Leg, until: int):
        state = run(params, cfg, leg.prompt, leg.state, leg.keys_QG, sampler.filters, stop_ids,
                    until=until, shards=leg.rows_XB.shape[0])
        return end(leg, state)

    def first(params: Params, prompt: PromptCache, last_Q, index_Q, key, limit_QG=None, *,
              until: int):
        Q = len(last_Q)
        X = prompt_shards(layout, Q)
        state = start(cfg, prompt, last_Q, samples, sampler.max_new_tokens, layout)
        if limit_QG is not None:
            state = state.replace(limit_QG=jnp.minimum(limit_QG, state.limit_QG))
        rows_XB = jnp.broadcast_to(jnp.arange(Q * samples // X)[None], (X, Q * samples // X))
        leg = Leg(prompt, state, row_keys(key, index_Q, samples), rows_XB, None, jnp.array(0))
        return go_on(params, leg, until)

    def smaller(params: Params, leg: Leg, caches: tuple[Cache, Cache], *, size: int, until: int):
        return go_on(params, compact(leg, caches, size), until)

    where = None
    if layout is not None:
        keys, prompts = layout.sharding(*decode.PROMPT_CACHE_AXES), layout.sharding("prompts")
        where = (PromptCache(keys, keys, prompts, (keys, keys) if common else None), prompts)
    return Sampler(
        sampler, samples, layout, jax.jit(prefill, out_shardings=where),
        jax.jit(first, static_argnames="until"),
        jax.jit(smaller, static_argnames=("size", "until"), donate_argnames="caches"),
    )
