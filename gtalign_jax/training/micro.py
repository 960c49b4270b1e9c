"""Micro-batches: a function of a batch as an exact sum over its pieces."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def piece_count(rows: int, micro: int, shards: int) -> int:
    """Micro-batches that a batch of `rows` is cut into, with `micro` rows on each of `shards`.

    One where `micro` is 0, or as large as a shard's whole part.
    """
    return max(rows // (micro * shards), 1) if micro else 1


def cut(tree: Any, pieces: int) -> Any:
    """Cuts the leading axis of every leaf into `pieces`, strided: `[P, n / P, ...]`.

    Strided, so that every device keeps a share of each piece.
    """
    def one(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 0, 1)

    return jax.tree.map(one, tree)


def uncut(tree: Any) -> Any:
    """Undoes `cut`: `[P, n / P, ...] -> [n, ...]`."""
    def one(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return jax.tree.map(one, tree)


def accumulate(fn: Callable[[Any], tuple[Any, Any]], batch: Any, pieces: int) -> tuple[Any, Any]:
    """`fn(piece) -> (sums, maxima)` over all pieces: the first tree added, the second's maximum.

    Sums are float32, whatever the pieces' are.
    """
    if pieces <= 1:
        sums, maxima = fn(batch)
        return _wide(sums), maxima
    parts = cut(batch, pieces)
    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts))
    step = lambda carry, piece: (_add(carry, fn(piece)), None)  # noqa: E731
    return jax.lax.scan(step, _nothing(shapes, -jnp.inf), parts)[0]


def accumulate_some(fn: Callable[[jax.Array], tuple[Any, Any]], pieces: jax.Array
                    ) -> tuple[Any, Any]:
    """The same over `fn(i)`, i < `pieces`, a number that only a run knows.

    All is 0 where that is none; maxima are of what is 0 or more.
    """
    shapes = jax.eval_shape(fn, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.lax.fori_loop(0, pieces, lambda i, carry: _add(carry, fn(i)), _nothing(shapes, 0.0))


def _wide(sums: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), sums)


def _add(carry: tuple[Any, Any], new: tuple[Any, Any]) -> tuple[Any, Any]:
    (sums, maxima), (more, others) = carry, new
    return (jax.tree.map(jnp.add, sums, _wide(more)), jax.tree.map(jnp.maximum, maxima, others))


def _nothing(shapes: tuple[Any, Any], least: float) -> tuple[Any, Any]:
    """Sums and maxima before the first piece."""
    return (jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes[0]),
            jax.tree.map(lambda s: jnp.full(s.shape, least, s.dtype), shapes[1]))
