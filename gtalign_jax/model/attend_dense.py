"""Attention of rows as plain matrix products, a bounded number of scores at a time.

    rows  [Q, G, T]  attend to   past [P] (common to all) | prompt [Q, S] | themselves, causally

The keys of each row are joined, so that a piece of the work is one batch of matrix products and one
softmax. Pieces are small enough for their scores to stay in a CPU's cache (there is a factor of
four in that). The backward pass computes the scores anew from the sum of exponentials that the
forward pass keeps, as flash attention does (Dao et al., arXiv 2205.14135), and writes each gradient
as the product that needs no large array turned over. The softmax is float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

NEG = -1e30  # a masked score: finite, so that a row with nothing to attend to stays finite
SCORES = {"cpu": 2**21}  # at a time, by platform: 8 MB in float32
MANY_SCORES = 2**28  # elsewhere, where large products are what is fast


class Rows(NamedTuple):
    """Queries (scaled), keys and values of the rows: `[Q, G, T, K, R, H]`, `[Q, G, T, K, H]`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


class Before(NamedTuple):
    """What stands before all rows: `[P, K, H]`; and before those of each group: `[Q, S, K, H]`, of
    which lengths_Q are real. P and S may be 0."""

    past_k: jax.Array
    past_v: jax.Array
    prompt_k: jax.Array
    prompt_v: jax.Array
    lengths_Q: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend(rows: Rows, before: Before, most: int) -> jax.Array:
    """What each position attends to, `[Q, G, T, K, R, H]`, with about `most` scores at a time."""
    return _forward(rows, before, most)[0]


def _forward(rows: Rows, before: Before, most: int):
    a, b = _piece(rows, before, most)

    def groups(xs):
        rows, prompt = xs
        part = lambda rows: _attend(rows, _joined(rows, before, prompt), before)  # noqa: E731
        return jax.lax.map(part, rows)

    pieces = (_cut(rows, a, b), jax.tree.map(lambda x: _groups(x, a), tuple(before[2:])))
    out, lse = jax.lax.map(groups, pieces)
    out, lse = _uncut(out), _uncut(lse)
    return out, (rows, before, out, lse)


def _backward(most: int, kept, grad: jax.Array):
    rows, before, out, lse = kept
    a, b = _piece(rows, before, most)
    P, S = before.past_k.shape[0], before.prompt_k.shape[1]

    def groups(past_grads, xs):
        rows_etc, prompt = xs

        def part(sums, xs):
            rows, *rest = xs
            dq, dk, dv = _gradients(rows, _joined(rows, before, prompt), before, *rest)
            split = [jnp.split(x, (P, P + S), axis=2) for x in (dk, dv)]
            new = [(past.sum((0, 1)), shared.sum(1)) for past, shared, _ in split]
            return jax.tree.map(jnp.add, sums, new), Rows(dq, split[0][2], split[1][2])

        zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
        start = [(past, zeros(x)) for past, x in zip(past_grads, prompt[:2], strict=True)]
        sums, grads = jax.lax.scan(part, start, rows_etc)
        return [past for past, _ in sums], (grads, [shared for _, shared in sums])

    pieces = ((_cut(rows, a, b), *(_cut(x, a, b) for x in (out, lse, grad))),
              jax.tree.map(lambda x: _groups(x, a), tuple(before[2:])))
    start = [jnp.zeros(x.shape, jnp.float32) for x in before[:2]]
    past_grads, (grads, shared) = jax.lax.scan(groups, start, pieces)
    shared = [x.reshape(before.prompt_k.shape) for x in shared]
    like = [x.astype(k.dtype) for x, k in zip((*past_grads, *shared), before[:4], strict=True)]
    grads = jax.tree.map(lambda x, like: _uncut(x).astype(like.dtype), grads, rows)
    return grads, Before(*like, None)


attend.defvjp(_forward, _backward)


def _piece(rows: Rows, before: Before, most: int) -> tuple[int, int]:
    """(groups, rows of each) that are attended to at a time; several groups only as a whole."""
    Q, G, T, K, R, _ = rows.q.shape
    fit = most // (T * K * R * (before.past_k.shape[0] + before.prompt_k.shape[1] + T))
    largest = lambda n, fit: max(d for d in range(1, n + 1) if n % d == 0 and d <= max(fit, 1))  # noqa: E731
    return (largest(Q, fit // G), G) if fit >= G else (1, largest(G, fit))


def _groups(x: jax.Array, a: int) -> jax.Array:
    """`[Q, …]` as `[Q / a, a, …]`."""
    return x.reshape(x.shape[0] // a, a, *x.shape[1:])


def _cut(tree, a: int, b: int):
    """`[Q, G, …]` as `[Q / a, G / b, a, b, …]`."""
    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // a, a, x.shape[1] // b, b, *x.shape[2:])
        return jnp.swapaxes(x, 1, 2)

    return jax.tree.map(one, tree)


def _uncut(x: jax.Array) -> jax.Array:
    """Undoes `_cut`."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], *x.shape[4:])


class _Joined(NamedTuple):
    """Keys and values `[a, b, C, K, H]` of a piece, and what each position sees of them."""

    k: jax.Array
    v: jax.Array
    seen_aTC: jax.Array


def _joined(rows: Rows, before: Before, prompt) -> _Joined:
    a, b, T = rows.k.shape[:3]
    prompt_k, prompt_v, lengths_a = prompt

    def join(past, shared, own):
        past = jnp.broadcast_to(past[None, None], (a, b, *past.shape))
        shared = jnp.broadcast_to(shared[:, None], (a, b, *shared.shape[1:]))
        return jnp.concatenate([past, shared, own], axis=2)

    P, S = before.past_k.shape[0], prompt_k.shape[1]
    column_C = jnp.arange(P + S + T)[None, None, :]
    real = (column_C < P + lengths_a[:, None, None]) & (column_C < P + S)
    own = (column_C >= P + S) & (column_C - (P + S) <= jnp.arange(T)[None, :, None])
    seen = jnp.broadcast_to(real, (a, T, P + S + T)) | own
    return _Joined(join(before.past_k, prompt_k, rows.k), join(before.past_v, prompt_v, rows.v),
                   seen)


def _batches(x: jax.Array) -> jax.Array:
    """`[a, b, T, K, …, H]` as `[a b K, T …, H]`: one matrix per row and key head."""
    a, b, T, K, *_, H = x.shape
    return jnp.moveaxis(x, 3, 2).reshape(a * b * K, -1, H)


def _transposed(x: jax.Array) -> jax.Array:
    """`[a, b, C, K, H]` as `[a b K, H, C]`."""
    a, b, C, K, H = x.shape
    return jnp.moveaxis(x, 2, 4).reshape(a * b * K, H, C)


def _scores(rows: Rows, joined: _Joined) -> jax.Array:
    """Masked, `[a, b, K, T, R, C]`, float32."""
    a, b, T, K, R, _ = rows.q.shape
    scores = jnp.einsum("BMH,BHC->BMC", _batches(rows.q), _transposed(joined.k),
                        preferred_element_type=jnp.float32)
    seen = joined.seen_aTC[:, None, None, :, None, :]
    return jnp.where(seen, scores.reshape(a, b, K, T, R, -1), NEG)


def _attend(rows: Rows, joined: _Joined, before: Before) -> tuple[jax.Array, jax.Array]:
    """(out `[a, b, T, K, R, H]`, log of the sum of exponentials `[a, b, K, T, R]`) of a piece."""
    a, b, T, K, R, H = rows.q.shape
    scores = _scores(rows, joined)
    top = scores.max(axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(axis=-1)
    out = jnp.einsum("BMC,BCH->BMH", weights.reshape(a * b * K, T * R, -1).astype(joined.v.dtype),
                     _batches(joined.v), preferred_element_type=jnp.float32)
    out = out.reshape(a, b, K, T, R, H) / total[..., None]
    return jnp.moveaxis(out, 2, 3).astype(rows.v.dtype), top + jnp.log(total)


def _gradients(rows: Rows, joined: _Joined, before: Before, out, lse, grad):
    """(dq `[a, b, T, K, R, H]`, dk and dv `[a, b, C, K, H]`), float32, of a piece."""
    a, b, T, K, R, H = rows.q.shape
    f32, dtype, C = jnp.float32, rows.v.dtype, joined.k.shape[2]
    weights = jnp.exp(_scores(rows, joined) - lse[..., None]).reshape(a * b * K, T * R, C)
    grad_BMH, q_BMH = _batches(grad), _batches(rows.q)
    dv = jnp.einsum("BMH,BMC->BHC", grad_BMH, weights.astype(dtype), preferred_element_type=f32)
    along = (_batches(out).astype(f32) * grad_BMH.astype(f32)).sum(axis=-1, keepdims=True)
    dweights = jnp.einsum("BMH,BHC->BMC", grad_BMH, _transposed(joined.v),
                          preferred_element_type=f32)
    dscores = (weights * (dweights - along)).astype(dtype)
    dq = jnp.einsum("BMC,BCH->BMH", dscores, _batches(joined.k), preferred_element_type=f32)
    dk = jnp.einsum("BMH,BMC->BHC", q_BMH, dscores, preferred_element_type=f32)
    dq = jnp.moveaxis(dq.reshape(a, b, K, T, R, H), 2, 3)
    dk, dv = (jnp.moveaxis(x.reshape(a, b, K, H, C), 4, 2) for x in (dk, dv))
    return dq, dk, dv
