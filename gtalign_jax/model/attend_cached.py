"""Attention of rows that generate: to what all prompts share, to their prompt, to themselves.

    common  k_XKHP    the prefix common to all prompts, once per batch shard
    prompt  k_QKHS    the rest of each group's prompt, once per group
    own     k_LABKHC  what each row has written, in the caches
    new     k_QGFKH   what is being fed; it goes into the caches afterwards

One softmax over all of it, taken part by part: a running maximum, the sum and the weighted values
are corrected whenever a part brings a larger score (Milakov and Gimelshein, arXiv 1805.02867). So
no two parts are ever joined into one array, and of the own caches only the blocks that hold
something are read. Keys lie transposed and values as they are, as matrix products want them. The
softmax is float32. This module knows no weights.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from gtalign_jax.model.attend_dense import NEG

SMALLEST_BLOCK = 128  # positions of the own caches that are read at a time,
MOST_BLOCKS = 8  # or more, so that they are not read in more blocks than this
MOST_PIECES = 4  # arrays of a layer's own cache: each of them is compiled by itself


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


def own_pieces(T: int) -> int:
    """Arrays that a layer's own cache is cut into where layers are unrolled."""
    return own_width(T) // own_block(T) if T <= MOST_PIECES * SMALLEST_BLOCK else 1


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


def _part(q, k, v, seen=None, *, flat: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(top `[…, M]`, total, out `[…, M, H]`) of one part: q `[…, M, H]`, k `[…, H, C]`, v
    `[…, C, H]`, seen `[…, 1 or M, C]`.

    Where nothing is seen, what comes out is scaled to nothing by a part with a real key, and the
    tokens fed are always such a part.

    flat: as one axis of matrices, which is what a CPU's kernels are fast at. Axes that are cut over
    devices cannot be joined without gathering them.
    """
    before, f32 = q.shape[:-2], jnp.float32
    if flat:
        seen = None if seen is None else jnp.broadcast_to(seen, (*before, *seen.shape[-2:]))
        q, k, v, seen = jax.tree.map(
            lambda x: x.reshape(math.prod(before), *x.shape[-2:]), (q, k, v, seen))
    scores = jnp.einsum("...MH,...HC->...MC", q, k, preferred_element_type=f32)
    if seen is not None:
        scores = jnp.where(seen, scores, NEG)
    top = scores.max(axis=-1)
    weights = jnp.exp(scores - top[..., None])
    out = jnp.einsum("...MC,...CH->...MH", weights.astype(v.dtype), v, preferred_element_type=f32)
    return tuple(x.reshape(*before, *x.shape[q.ndim - 2 :])
                 for x in (top, weights.sum(axis=-1), out))


def new(q_QGKMH, k_QGFKH, v_QGFKH, flat: bool) -> Running:
    """The tokens fed: each sees itself and those before it."""
    M, F = q_QGKMH.shape[3], k_QGFKH.shape[2]
    query_M = jnp.tile(jnp.arange(F), M // F)
    seen_MF = jnp.arange(F)[None, :] <= query_M[:, None]
    seen = jnp.expand_dims(seen_MF, (0, 1, 2)) if F > 1 else None
    return Running(*_part(q_QGKMH, jnp.einsum("QGFKH->QGKHF", k_QGFKH),
                          jnp.einsum("QGFKH->QGKFH", v_QGFKH), seen, flat=flat))


def add_shared(running: Running, q_QGKMH, k_AKHS, v_AKSH, seen_AS=None, *,
               flat: bool) -> Running:
    """A part that is shared: every Q / A groups one after the other read one copy.

    A = Q for prompts, of which `seen_AS` is real; the number of batch shards for the prefix.
    """
    (Q, G, K, M, H), A = q_QGKMH.shape, k_AKHS.shape[0]
    rows = Q * G // A
    q = q_QGKMH.reshape(A, rows, K, M, H).swapaxes(1, 2).reshape(A, K, rows * M, H)
    seen = None if seen_AS is None else seen_AS[:, None, None]
    part = _part(q, k_AKHS, v_AKSH, seen, flat=flat)

    def by_row(x: jax.Array) -> jax.Array:
        x = x.reshape(A, K, rows, M, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(Q, G, K, M, *x.shape[4:])

    return _join(running, Running(*map(by_row, part)))


def add_pieces(running: Running, q_QGKMH, caches: Sequence[tuple[jax.Array, jax.Array]],
               before_QG, flat: bool) -> Running:
    """`add_own` for one layer's caches in pieces of their own: those that hold nothing are left
    out, and none is copied out of a larger array."""
    before, width = jnp.max(before_QG), caches[0][1].shape[4]
    running = add_own(running, q_QGKMH, *caches[0], 0, before_QG, flat=flat)
    for i, piece in enumerate(caches[1:], start=1):
        more = lambda running, at=i * width, piece=piece: add_own(  # noqa: E731
            running, q_QGKMH, *piece, 0, before_QG - at, flat=flat)
        running = jax.lax.cond(before > i * width, more, lambda running: running, running)
    return running


def add_own(running: Running, q_QGKMH, k_LABKHC, v_LABKCH, layer, before_QG, *,
            flat: bool) -> Running:
    """The rows' own positions before `before_QG` (it may broadcast), block by block.

    The rows are the first of each of the A parts of the caches: Q G = A b with b <= B.
    """
    (Q, G, K, _, H), (_, A, _, _, _, C) = q_QGKMH.shape, k_LABKHC.shape
    block, rows = own_block(C), Q * G // A

    def add(i, running: Running) -> Running:
        at = i * block
        k = jax.lax.dynamic_slice(k_LABKHC, (layer, 0, 0, 0, 0, at), (1, A, rows, K, H, block))
        v = jax.lax.dynamic_slice(v_LABKCH, (layer, 0, 0, 0, at, 0), (1, A, rows, K, block, H))
        seen_QGC = jnp.expand_dims(at + jnp.arange(block), (0, 1)) < before_QG[..., None]
        part = _part(q_QGKMH, k.reshape(Q, G, K, H, block), v.reshape(Q, G, K, block, H),
                     seen_QGC[:, :, None, None], flat=flat)
        return _join(running, Running(*part))

    if C == block:
        return add(0, running)
    blocks = jnp.minimum((jnp.max(before_QG) + block - 1) // block, C // block)
    return jax.lax.fori_loop(0, blocks, add, running)
