"""Attention of rows as plain matrix products, a bounded number of scores at a time.

    rows  [Q, G, T]  attend to   past [P] (common to all) | prompt [Q, S] | themselves, causally

The keys of each row are joined, so that a piece of the work is one batch of matrix products and one
softmax. Pieces are small enough for their scores to stay in a CPU's cache (there is a factor of
four in that); a row too long for it is cut into stretches, each of which reads no key after it. The
backward pass computes the scores anew from the sum of exponentials that the forward pass keeps, as
flash attention does (Dao et al., arXiv 2205.14135), and writes each gradient as the product that
needs no large array turned over. The softmax is float32.

Packed completions (`training.packing`) are rows in which several stand side by side, with the
prompts of several groups before them; tags say which position belongs to which.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

NEG = -1e30  # a masked score: finite, so that a row with nothing to attend to stays finite


def scores_for(platform: str) -> int:
    """Scores at a time: on a CPU 8 MB in float32; elsewhere many, large products are fast there."""
    return 2**21 if platform == "cpu" else 2**28


class Rows(NamedTuple):
    """Queries (scaled), keys and values of the rows: `[Q, G, T, K, R, H]`, `[Q, G, T, K, H]`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


class Tags(NamedTuple):
    """For each position of packed rows, `[Q, G, T]`: the completion that it belongs to (any number
    of its own), and which of the m prompts before the row is that completion's."""

    row: jax.Array
    slot: jax.Array


class Before(NamedTuple):
    """What stands before all rows: `[P, K, H]`; and before those of each group: `[Q, S, K, H]`, m
    prompts of S / m positions each, of which lengths_Qm are real. P and S may be 0. tags: None
    where every row is one completion."""

    past_k: jax.Array
    past_v: jax.Array
    prompt_k: jax.Array
    prompt_v: jax.Array
    lengths_Qm: jax.Array
    tags: Tags | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attend(rows: Rows, before: Before, most: int) -> jax.Array:
    """What each position attends to, `[Q, G, T, K, R, H]`, with about `most` scores at a time."""
    return _forward(rows, before, most)[0]


def _forward(rows: Rows, before: Before, most: int):
    a, b = _piece(rows, before, most)

    def groups(xs):
        pieces, prompt = xs
        part = lambda xs: _attend(xs[0], _joined(*xs, before, prompt), most)  # noqa: E731
        return jax.lax.map(part, pieces)

    pieces = (_cut((rows, before.tags), a, b), _groups(tuple(before[2:5]), a))
    out, lse = jax.lax.map(groups, pieces)
    out, lse = _uncut(out), _uncut(lse)
    return out, (rows, before, out, lse)


def _backward(most: int, kept, grad: jax.Array):
    rows, before, out, lse = kept
    a, b = _piece(rows, before, most)
    P, S = before.past_k.shape[0], before.prompt_k.shape[1]

    def groups(past_grads, xs):
        pieces, prompt = xs

        def part(sums, xs):
            rows, tags, *rest = xs
            dq, dk, dv = _gradients(rows, _joined(rows, tags, before, prompt), most, *rest)
            split = [jnp.split(x, (P, P + S), axis=2) for x in (dk, dv)]
            new = [(past.sum((0, 1)), shared.sum(1)) for past, shared, _ in split]
            return jax.tree.map(jnp.add, sums, new), Rows(dq, split[0][2], split[1][2])

        zeros = lambda x: jnp.zeros(x.shape, jnp.float32)  # noqa: E731
        start = [(past, zeros(x)) for past, x in zip(past_grads, prompt[:2], strict=True)]
        sums, grads = jax.lax.scan(part, start, pieces)
        return [past for past, _ in sums], (grads, [shared for _, shared in sums])

    pieces = (_cut((rows, before.tags, out, lse, grad), a, b), _groups(tuple(before[2:5]), a))
    start = [jnp.zeros(x.shape, jnp.float32) for x in before[:2]]
    past_grads, (grads, shared) = jax.lax.scan(groups, start, pieces)
    shared = [x.reshape(before.prompt_k.shape) for x in shared]
    like = [x.astype(k.dtype) for x, k in zip((*past_grads, *shared), before[:4], strict=True)]
    grads = jax.tree.map(lambda x, like: _uncut(x).astype(like.dtype), grads, rows)
    return grads, Before(*like, None, None)


attend.defvjp(_forward, _backward)


def _piece(rows: Rows, before: Before, most: int) -> tuple[int, int]:
    """(groups, rows of each) that are attended to at a time; several groups only as a whole."""
    Q, G, T, K, R, _ = rows.q.shape
    fit = most // (K * R * (before.past_k.shape[0] + before.prompt_k.shape[1] + T))
    if fit >= G * T:
        return _largest(Q, fit // (G * T)), G
    return 1, _largest(G, fit // T)


def _largest(n: int, fit: int) -> int:
    """The largest divisor of n that is at most `fit`; at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(fit, 1))


def _stretch(T: int, fit: int) -> int:
    """Positions of a row at a time: each stretch is compiled by itself, so not too many."""
    return max(_largest(T, fit), min(d for d in range(1, T + 1) if T % d == 0 and T // d <= 8))


def _groups(tree, a: int):
    """`[Q, …]` as `[Q / a, a, …]`."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // a, a, *x.shape[1:]), tree)


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
    """Keys and values `[a, b, C, K, H]` of a piece; what stands where, for who sees whom."""

    k: jax.Array
    v: jax.Array
    lengths_am: jax.Array
    tags: Tags | None
    past: int
    prompts: int

    def seen(self, first: int, last: int) -> jax.Array:
        """`[a, b or 1, last - first, C]`: what positions first … last of a row see of the keys up
        to their last."""
        (a, b, *_), m = self.k.shape, self.lengths_am.shape[1]
        query, own = jnp.arange(first, last)[:, None], jnp.arange(last)[None, :]
        causal, prompt = (own <= query)[None, None], jnp.arange(self.prompts)
        width = max(self.prompts // m, 1)
        real_aS = prompt[None] % width < self.lengths_am[:, prompt // width]
        real, n = real_aS[:, None, None, :], last - first
        if self.tags is not None:
            row, slot = (x[:, :, :, None] for x in self.tags)
            at = slice(first, last)
            causal &= row[:, :, at] == jnp.swapaxes(row[:, :, :last], 2, 3)
            real &= slot[:, :, at] == jnp.expand_dims(prompt // width, (0, 1, 2))
        rows = 1 if self.tags is None else b
        wide = lambda x, C: jnp.broadcast_to(x, (a, rows, n, C))  # noqa: E731
        return jnp.concatenate([wide(True, self.past), wide(real, self.prompts),
                                wide(causal, last)], axis=3)

    def keys(self, last: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values up to a row's position `last`."""
        until = self.past + self.prompts + last
        return self.k[:, :, :until], self.v[:, :, :until]


def _joined(rows: Rows, tags: Tags | None, before: Before, prompt) -> _Joined:
    a, b = rows.k.shape[:2]
    prompt_k, prompt_v, lengths_am = prompt

    def join(past, shared, own):
        past = jnp.broadcast_to(past[None, None], (a, b, *past.shape))
        shared = jnp.broadcast_to(shared[:, None], (a, b, *shared.shape[1:]))
        return jnp.concatenate([past, shared, own], axis=2)

    return _Joined(join(before.past_k, prompt_k, rows.k), join(before.past_v, prompt_v, rows.v),
                   lengths_am, tags, before.past_k.shape[0], prompt_k.shape[1])


def _batches(x: jax.Array) -> jax.Array:
    """`[a, b, T, K, …, H]` as `[a b K, T …, H]`: one matrix per row and key head."""
    a, b, T, K, *_, H = x.shape
    return jnp.moveaxis(x, 3, 2).reshape(a * b * K, -1, H)


def _transposed(x: jax.Array) -> jax.Array:
    """`[a, b, C, K, H]` as `[a b K, H, C]`."""
    a, b, C, K, H = x.shape
    return jnp.moveaxis(x, 2, 4).reshape(a * b * K, H, C)


def _scores(q, k, seen) -> jax.Array:
    """Masked, `[a, b, K, T, R, C]`, float32."""
    a, b, T, K, R, _ = q.shape
    scores = jnp.einsum("BMH,BHC->BMC", _batches(q), _transposed(k),
                        preferred_element_type=jnp.float32)
    return jnp.where(seen[:, :, None, :, None, :], scores.reshape(a, b, K, T, R, -1), NEG)


def _stretches(rows: Rows, joined: _Joined, most: int) -> list[tuple[int, int]]:
    a, b, T, K, R, _ = rows.q.shape
    scores = a * b * K * R * T * joined.k.shape[2]
    size = T if scores <= most or a * b > 1 else _stretch(T, most * T // scores)
    return [(at, at + size) for at in range(0, T, size)]


def _attend(rows: Rows, joined: _Joined, most: int) -> tuple[jax.Array, jax.Array]:
    """(out `[a, b, T, K, R, H]`, log of the sum of exponentials `[a, b, T, K, R]`) of a piece."""
    parts = []
    for first, last in _stretches(rows, joined, most):
        q, (k, v) = rows.q[:, :, first:last], joined.keys(last)
        a, b, T, K, R, H = q.shape
        scores = _scores(q, k, joined.seen(first, last))
        top = scores.max(axis=-1)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(axis=-1)
        out = jnp.einsum("BMC,BCH->BMH", weights.reshape(a * b * K, T * R, -1).astype(v.dtype),
                         _batches(v), preferred_element_type=jnp.float32)
        out = out.reshape(a, b, K, T, R, H) / total[..., None]
        parts.append((jnp.moveaxis(out, 2, 3).astype(v.dtype),
                      jnp.moveaxis(top + jnp.log(total), 2, 3)))
    return tuple(jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))


def _gradients(rows: Rows, joined: _Joined, most: int, out, lse, grad):
    """(dq `[a, b, T, K, R, H]`, dk and dv `[a, b, C, K, H]`), float32, of a piece."""
    dqs, dk, dv = [], jnp.zeros(joined.k.shape, jnp.float32), jnp.zeros(joined.v.shape, jnp.float32)
    for first, last in _stretches(rows, joined, most):
        own = tuple(x[:, :, first:last] for x in (rows.q, out, lse, grad))
        dq, *more = _stretch_gradients(*own, *joined.keys(last), joined.seen(first, last))
        dqs.append(dq)
        until = more[0].shape[2]
        dk, dv = (x.at[:, :, :until].add(y) for x, y in zip((dk, dv), more, strict=True))
    return jnp.concatenate(dqs, axis=2), dk, dv


def _stretch_gradients(q, out, lse, grad, k, v, seen):
    a, b, T, K, R, H = q.shape
    f32, dtype, C = jnp.float32, v.dtype, k.shape[2]
    lse = jnp.moveaxis(lse, 3, 2)[..., None]
    weights = jnp.exp(_scores(q, k, seen) - lse).reshape(a * b * K, T * R, C)
    grad_BMH, q_BMH = _batches(grad), _batches(q)
    dv = jnp.einsum("BMH,BMC->BHC", grad_BMH, weights.astype(dtype), preferred_element_type=f32)
    along = (_batches(out).astype(f32) * grad_BMH.astype(f32)).sum(axis=-1, keepdims=True)
    dweights = jnp.einsum("BMH,BHC->BMC", grad_BMH, _transposed(v), preferred_element_type=f32)
    dscores = (weights * (dweights - along)).astype(dtype)
    dq = jnp.einsum("BMC,BCH->BMH", dscores, _batches(k), preferred_element_type=f32)
    dk = jnp.einsum("BMH,BMC->BHC", q_BMH, dscores, preferred_element_type=f32)
    dq = jnp.moveaxis(dq.reshape(a, b, K, T, R, H), 2, 3)
    return dq, *(jnp.moveaxis(x.reshape(a, b, K, H, C), 4, 2) for x in (dk, dv))
