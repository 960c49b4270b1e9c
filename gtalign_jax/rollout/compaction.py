"""Decoding whose batch shrinks as rows end, so that finished rows cost little.

    64 rows --until 43 live--> 43 rows --until 29 live--> 29 rows --> …

The first size decodes whole groups; the smaller ones decode rows, each with its prompt's keys and
values beside it. Sizes are rows of one batch shard, since no row changes over to another device.
Each is a program of its own, compiled when a rollout first comes to it; a host only asks how
many rows live. Own caches stay where they are: their rows move up in place, layer by layer.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from gtalign_jax.model.decode import Cache, PromptCache
from gtalign_jax.rollout.state import Rollout, State


@struct.dataclass
class Leg:
    """Where a rollout stands between two batch sizes, with what it needs to go on.

    rows_XB: which rows of their shards are decoded. whole: all rows `[Q, G, …]` as they stand.
    """

    prompt: PromptCache
    state: State
    keys_QG: jax.Array
    rows_XB: jax.Array
    whole: Rollout | None
    live: jax.Array  # rows of the shard in which most live


def batch_sizes(rows: int, ratio: float, smallest: int) -> tuple[int, ...]:
    """`rows`, then each size at most `ratio` of the one before, down to `smallest`."""
    sizes = [rows]
    while ratio and (size := math.ceil(sizes[-1] * ratio)) >= smallest and size < sizes[-1]:
        sizes.append(size)
    return tuple(sizes)


def by_shard(x: jax.Array, shards: int) -> jax.Array:
    """`[Q, G, …]` as `[X, rows, …]`."""
    return x.reshape(shards, x.shape[0] * x.shape[1] // shards, *x.shape[2:])


def most_live(done_QG: jax.Array, shards: int) -> jax.Array:
    """How many rows live of the shard in which most do."""
    return by_shard(~done_QG, shards).sum(axis=1).max()


def _take(x_XN: jax.Array, at_XB: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, at: x[at])(x_XN, at_XB)


def end(leg: Leg, state: State) -> tuple[Leg, tuple[Cache, Cache]]:
    """(the leg as `state` leaves it, apart from it the own caches, by shard): its rows stand in
    their places in `whole`."""
    X, whole = leg.rows_XB.shape[0], state.rollout
    if leg.whole is not None:
        put = jax.vmap(lambda old, rows, new: old.at[rows].set(new))
        of_rows = lambda old, new: put(  # noqa: E731
            by_shard(old, X), leg.rows_XB, by_shard(new, X)).reshape(old.shape)
        whole = jax.tree.map(of_rows, leg.whole.replace(slots=None), whole.replace(slots=None))
    shards = lambda cache: cache.reshape(cache.shape[0], X, -1, *cache.shape[3:])  # noqa: E731
    caches = jax.tree.map(shards, (state.keys, state.values))
    leg = leg.replace(state=state.replace(keys=None, values=None),
                      whole=whole.replace(slots=state.rollout.slots),
                      live=most_live(state.done_QG, X))
    return leg, caches


def compact(leg: Leg, caches: tuple[Cache, Cache], size: int) -> Leg:
    """The same with `size` rows per shard, `[X size, 1]`: all that live, and as many others."""
    state, prompt = leg.state, leg.prompt
    (Q, G), X = state.token_QG.shape, leg.rows_XB.shape[0]
    at_XB = jnp.argsort(by_shard(state.done_QG, X), axis=1, stable=True)[:, :size]
    keep = lambda x: _take(by_shard(x, X), at_XB).reshape(X * size, 1, *x.shape[2:])  # noqa: E731
    small = jax.tree.map(keep, state.replace(t=None, rollout=state.rollout.replace(slots=None)))
    keys, values = jax.tree.map(lambda cache: _move_up(cache, at_XB), caches)
    state = small.replace(t=state.t, keys=keys, values=values,
                          rollout=small.rollout.replace(slots=state.rollout.slots))

    def of_group(x_LQ: jax.Array) -> jax.Array:
        x_LXQ = x_LQ.reshape(x_LQ.shape[0], X, Q // X, *x_LQ.shape[2:])
        taken = jax.vmap(lambda x_XQ: _take(x_XQ, at_XB // G))(x_LXQ)
        return taken.reshape(x_LQ.shape[0], X * size, *x_LQ.shape[2:])

    prompt = PromptCache(of_group(prompt.k_LQKHS), of_group(prompt.v_LQKSH),
                         of_group(prompt.lengths_Q[None])[0], prompt.common)
    return leg.replace(prompt=prompt, state=state, keys_QG=keep(leg.keys_QG),
                       rows_XB=_take(leg.rows_XB, at_XB))


def _move_up(cache_LXN: jax.Array, at_XB: jax.Array) -> jax.Array:
    """Rows `at_XB` of each shard become its first, a layer at a time: no second cache exists."""
    def one(layer, cache_LXN):
        rows = _take(jax.lax.dynamic_index_in_dim(cache_LXN, layer, keepdims=False), at_XB)
        return jax.lax.dynamic_update_slice(cache_LXN, rows[None], (layer, 0, 0, 0, 0, 0))

    return jax.lax.fori_loop(0, cache_LXN.shape[0], one, cache_LXN)
