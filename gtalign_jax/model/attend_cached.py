"""Attention of rows that generate: to what all prompts share, to their prompt, to themselves.

    common  k_XKHP    the prefix common to all prompts, once per batch shard
    prompt  k_QKHS    the rest of each group's prompt, once per group
    own     k_LABKHC  what each row has written, in the caches
    new     k_QGFKH   what is being fed; it goes into the caches afterwards

One softmax over all of it, taken part by part: a running maximum, the sum and the weighted values
are corrected whenever a part brings a larger score (Milakov and Gimelshein, arXiv 1805.02867). So
no two parts are ever joined into one array, and of the own caches only the blocks that hold
something are read. Keys lie transposed, values as they are, and every product is one of batches of
matrices, as matrix libraries want them. The softmax is float32. This module knows no weights.
"""

import jax
import jax.numpy as jnp
from flax import struct

from gtalign_jax.model.attend_dense import NEG

SMALLEST_BLOCK = 128  # positions of the own caches that are read at a time,
MOST_BLOCKS = 8  # or more, so that they are not read in more blocks than this


@struct.dataclass
class Running:
    """A softmax under way over rows of K R heads and F positions, M = R F; all float32.

    top: the largest score. total: the sum of exponentials. out: the weighted values.
    """

    top_QGKM: jax.Array
    total_QGKM: jax.Array
    out_QGKMH: jax.Array


def own_block(C: int) -> int:
    """Positions of an own cache of C that are read at a time."""
    return min(C, -(-C // (MOST_BLOCKS * SMALLEST_BLOCK)) * SMALLEST_BLOCK)


def own_width(T: int) -> int:
    """Positions of an own cache for T tokens: whole blocks, or one smaller block."""
    return -(-T // own_block(T)) * own_block(T)


def queries(q_QGFKRH: jax.Array) -> jax.Array:
    """`[Q, G, K, M, H]`."""
    Q, G, F, K, R, H = q_QGFKRH.shape
    return jnp.einsum("QGFKRH->QGKRFH", q_QGFKRH).reshape(Q, G, K, R * F, H)


def finish(running: Running, F: int, dtype) -> jax.Array:
    """What was attended to, `[Q, G, F, K, R, H]`."""
    out = running.out_QGKMH / running.total_QGKM[..., None]
    Q, G, K, M, H = out.shape
    out = out.reshape(Q, G, K, M // F, F, H)
    return jnp.einsum("QGKRFH->QGFKRH", out).astype(dtype)


def _join(a: Running, b: Running) -> Running:
    """One softmax over what both are about."""
    top = jnp.maximum(a.top_QGKM, b.top_QGKM)
    of_a, of_b = jnp.exp(a.top_QGKM - top), jnp.exp(b.top_QGKM - top)
    return Running(top, a.total_QGKM * of_a + b.total_QGKM * of_b,
                   a.out_QGKMH * of_a[..., None] + b.out_QGKMH * of_b[..., None])


def _part(q_BMH, k_BHC, v_BCH, seen_BMC=None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(top `[B, M]`, total, out `[B, M, H]`) of one part.

    Where nothing is seen, what comes out is scaled to nothing by a part with a real key, and the
    tokens fed are always such a part.
    """
    f32 = jnp.float32
    scores = jnp.einsum("BMH,BHC->BMC", q_BMH, k_BHC, preferred_element_type=f32)
    if seen_BMC is not None:
        scores = jnp.where(seen_BMC, scores, NEG)
    top = scores.max(axis=-1)
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum("BMC,BCH->BMH", weights.astype(v_BCH.dtype), v_BCH,
                     preferred_element_type=f32)
    return top, weights.sum(axis=-1), out


def new(q_QGKMH, k_QGFKH, v_QGFKH) -> Running:
    """The tokens fed: each sees itself and those before it."""
    (Q, G, K, M, H), F = q_QGKMH.shape, k_QGFKH.shape[2]
    k = jnp.einsum("QGFKH->QGKHF", k_QGFKH).reshape(Q * G * K, H, F)
    v = jnp.einsum("QGFKH->QGKFH", v_QGFKH).reshape(Q * G * K, F, H)
    query_M = jnp.tile(jnp.arange(F), M // F)
    seen = (jnp.arange(F)[None, :] <= query_M[:, None])[None] if F > 1 else None
    part = _part(q_QGKMH.reshape(Q * G * K, M, H), k, v, seen)
    return Running(*(x.reshape(Q, G, K, M, *x.shape[2:]) for x in part))


def add_shared(running: Running, q_QGKMH, k_AKHS, v_AKSH, seen_AS=None) -> Running:
    """A part that is shared: every Q / A groups one after the other read one copy.

    A = Q for prompts, of which `seen_AS` is real; the number of batch shards for the prefix.
    """
    (Q, G, K, M, H), (A, _, _, S) = q_QGKMH.shape, k_AKHS.shape
    rows = Q * G // A
    q = q_QGKMH.reshape(A, rows, K, M, H).swapaxes(1, 2).reshape(A * K, rows * M, H)
    seen = None
    if seen_AS is not None:
        seen = jnp.broadcast_to(seen_AS[:, None, None], (A, K, 1, S)).reshape(A * K, 1, S)
    part = _part(q, k_AKHS.reshape(A * K, H, S), v_AKSH.reshape(A * K, S, H), seen)

    def by_row(x: jax.Array) -> jax.Array:
        x = x.reshape(A, K, rows, M, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(Q, G, K, M, *x.shape[4:])

    return _join(running, Running(*map(by_row, part)))


def add_own(running: Running, q_QGKMH, k_LABKHC, v_LABKCH, layer, before_QG) -> Running:
    """The rows' own positions before `before_QG` (it may broadcast), block by block.

    The rows are the first of each of the A parts of the caches: Q G = A b with b <= B.
    """
    (Q, G, K, M, H), (_, A, _, _, _, C) = q_QGKMH.shape, k_LABKHC.shape
    block, rows = own_block(C), Q * G // A

    def add(i, running: Running) -> Running:
        at = i * block
        k = jax.lax.dynamic_slice(k_LABKHC, (layer, 0, 0, 0, 0, at), (1, A, rows, K, H, block))
        v = jax.lax.dynamic_slice(v_LABKCH, (layer, 0, 0, 0, at, 0), (1, A, rows, K, block, H))
        seen_QGC = jnp.expand_dims(at + jnp.arange(block), (0, 1)) < before_QG[..., None]
        seen = jnp.broadcast_to(seen_QGC[:, :, None], (*seen_QGC.shape[:2], K, block))
        seen = jnp.broadcast_to(seen, (Q, G, K, block)).reshape(Q * G * K, 1, block)
        part = _part(q_QGKMH.reshape(Q * G * K, M, H), k.reshape(Q * G * K, H, block),
                     v.reshape(Q * G * K, block, H), seen)
        return _join(running, Running(*(x.reshape(Q, G, K, M, *x.shape[2:]) for x in part)))

    if C == block:
        return add(0, running)
    blocks = jnp.minimum((jnp.max(before_QG) + block - 1) // block, C // block)
    return jax.lax.fori_loop(0, blocks, add, running)
