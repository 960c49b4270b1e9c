"""Temperature, top-k and top-p as transforms of logits; nothing is ever sorted.

A nucleus is "every token at least as likely as a threshold". The threshold is found by bisection
on the bits of a float32: non-negative floats order like their integers, so 31 halvings are exact.
Ties at the threshold are all kept. The same function serves the sampler and the trainer, so that
log-probabilities are those of the distribution that was really sampled.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gtalign_jax.model.forward import NEG

COLDEST = 1e-6  # temperatures above 0 count as at least this: logits must not overflow


@dataclasses.dataclass(frozen=True)
class Filters:
    """How logits become the sampled distribution. Temperature 0 means the most likely token."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be >= 0 (0 turns it off)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1] (1 turns it off)")

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


UNFILTERED = Filters()


def _largest_threshold(p: jax.Array, enough) -> jax.Array:
    """The largest float t `[..., 1]` for which `enough(p >= t)` holds over the last axis."""
    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        keep = enough(p >= jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(keep, middle, low), jnp.where(keep, high, middle - 1)

    low = jnp.zeros((*p.shape[:-1], 1), jnp.int32)
    high = jax.lax.bitcast_convert_type(p.max(axis=-1, keepdims=True), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _nucleus(p: jax.Array, top_p) -> jax.Array:
    """`p[..., V]` with 0 for what lies outside the smallest set that holds `top_p` of its mass."""
    # Relative to what top-k left; the small slack absorbs the rounding of the sum.
    target = top_p * p.sum(-1, keepdims=True) * (1 - 1e-6)
    threshold = _largest_threshold(
        p, lambda m: jnp.where(m, p, 0.0).sum(-1, keepdims=True) >= target
    )
    return jnp.where(p >= threshold, p, 0.0)


def apply(logits: jax.Array, filters: Filters, keep_ids: jax.Array | None = None) -> jax.Array:
    """Logits of the sampled distribution, `[..., V]` float32; dropped tokens get `NEG`.

    Temperature first, then top-k, then top-p on what is left. `keep_ids` `[...]` are never
    dropped: in the trainer the policy may have moved away from a token that was sampled.
    At temperature 0 the logits are returned as they are: the log-probability reported for a
    greedy token is the untempered model's.
    """
    if filters.temperature > 0:
        logits = logits / max(filters.temperature, COLDEST)
    if not filters.truncates or filters.temperature == 0:
        return logits
    p = jax.nn.softmax(jax.lax.stop_gradient(logits), axis=-1)
    if filters.top_k > 0:
        k = min(filters.top_k, p.shape[-1])
        threshold = _largest_threshold(p, lambda m: m.sum(-1, keepdims=True) >= k)
        p = jnp.where(p >= threshold, p, 0.0)
    if filters.top_p < 1:
        p = _nucleus(p, filters.top_p)
    kept = p > 0
    if keep_ids is not None:
        ids = jnp.arange(logits.shape[-1])
        kept |= jnp.expand_dims(ids, tuple(range(keep_ids.ndim))) == keep_ids[..., None]
    return jnp.where(kept, logits, NEG)


def apply_rows(logits_BV: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """`apply` where every row has its own temperature and top-p, which are data of the program.

    The nucleus is looked for only when some row asks for one.
    """
    greedy_B1, top_p_B1 = temperature_B[:, None] == 0, top_p_B[:, None]
    logits_BV = logits_BV / jnp.where(greedy_B1, 1.0, jnp.maximum(temperature_B, COLDEST)[:, None])
    narrow_B1 = (top_p_B1 < 1) & ~greedy_B1

    def cut(logits_BV: jax.Array) -> jax.Array:
        kept_BV = _nucleus(jax.nn.softmax(logits_BV, axis=-1), top_p_B1) > 0
        return jnp.where(kept_BV | ~narrow_B1, logits_BV, NEG)

    return jax.lax.cond(jnp.any(narrow_B1), cut, lambda logits_BV: logits_BV, logits_BV)
