"""Drawing a token: from logits, and a key for every row and position.

Inverse-CDF sampling needs one uniform number per row instead of one Gumbel per token. The CDF is
searched in two levels, blocks of the vocabulary and then one block, so that neither a sort nor a
running sum over the vocabulary is needed.
"""

import jax
import jax.numpy as jnp

from gtalign_jax.rollout import filters as filters_lib
from gtalign_jax.rollout.filters import Filters

BLOCK = 128  # tokens of the vocabulary whose mass is first summed up


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


def first(where: jax.Array) -> jax.Array:
    """Index of the first True along the last axis; its length where there is none.

    A minimum over indices: on a CPU an argmax over a vocabulary takes ten times as long.
    """
    n = where.shape[-1]
    index = jnp.expand_dims(jnp.arange(n, dtype=jnp.int32), tuple(range(where.ndim - 1)))
    return jnp.where(where, index, n).min(axis=-1)


def greedy(logits: jax.Array) -> jax.Array:
    """The most likely token, `[...]` int32; of equals the first."""
    return first(logits == logits.max(axis=-1, keepdims=True))


def _pick(weights: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(index, what is left of `share` inside it) where the running sum first passes `share` of all.

    An index without mass is never picked. Both shares are in [0, 1).
    """
    sums = jnp.cumsum(weights, axis=-1)
    # A parallel sum is not monotone: it may rise by a rounding error at an index without mass,
    # which must not be picked for that, and its last entry need not be its largest.
    mass = jnp.where(weights > 0, sums, 0.0)
    wanted = share * mass.max(axis=-1)
    at = jnp.minimum(first(mass > wanted[..., None]), weights.shape[-1] - 1)
    take = lambda x: jnp.take_along_axis(x, at[..., None], axis=-1)[..., 0]  # noqa: E731
    inside = (wanted - (take(sums) - take(weights))) / take(weights)
    return at, jnp.clip(inside, 0.0, 1 - 2**-24)


def draw(weights: jax.Array, share: jax.Array) -> jax.Array:
    """A token drawn in proportion to `weights[..., V]` by a uniform number each, int32."""
    V = weights.shape[-1]
    block = min(BLOCK, V)
    pad = [(0, 0)] * (weights.ndim - 1) + [(0, -V % block)]
    blocks = jnp.pad(weights, pad).reshape(*weights.shape[:-1], -1, block)
    at, share = _pick(blocks.sum(axis=-1), share)
    inside = jnp.take_along_axis(blocks, at[..., None, None], axis=-2)[..., 0, :]
    return at * block + _pick(inside, share)[0]


def choose(logits_QGV: jax.Array, filters: Filters, uniform_QG: jax.Array):
    """(token `[Q, G]`, its log-probability `[Q, G]`) under the filtered distribution."""
    logits_QGV = filters_lib.apply(logits_QGV, filters)
    top_QG1 = logits_QGV.max(axis=-1, keepdims=True)
    weights_QGV = jnp.exp(logits_QGV - top_QG1)
    if filters.temperature == 0:
        token_QG = greedy(logits_QGV)
    else:
        token_QG = draw(weights_QGV, uniform_QG)
    picked_QG = jnp.take_along_axis(logits_QGV, token_QG[..., None], axis=-1)[..., 0]
    return token_QG, picked_QG - top_QG1[..., 0] - jnp.log(weights_QGV.sum(axis=-1))


def is_stop(token_QG: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    stop = jnp.zeros(token_QG.shape, bool)
    for stop_id in stop_ids:
        stop |= token_QG == stop_id
    return stop
