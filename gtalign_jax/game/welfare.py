"""Two utilities become one number: the welfare family of the paper's reward (sections 3 and 5).

Every member is symmetric in scale (raising both utilities by a factor raises the welfare by it):

    CES_rho(U, L) = ((U**rho + L**rho) / 2) ** (1 / rho),   Cobb-Douglas = sqrt(U L) = CES_0

rho = 1 is the linear mean, rho -> -inf the smaller of both, rho -> inf the larger. What the
utilities are made of is the business of `reward.factors`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def cobb_douglas(user: jax.Array, llm: jax.Array, rho: float) -> jax.Array:
    """Geometric mean, zero as soon as one side gets nothing; `rho` has no influence."""
    del rho
    return jnp.sqrt(user * llm)


def linear(user: jax.Array, llm: jax.Array, rho: float) -> jax.Array:
    """Arithmetic mean (baseline of the paper); `rho` has no influence."""
    del rho
    return (user + llm) / 2


def user_only(user: jax.Array, llm: jax.Array, rho: float) -> jax.Array:
    """The user's utility alone (baseline of the paper)."""
    del llm, rho
    return user


def llm_only(user: jax.Array, llm: jax.Array, rho: float) -> jax.Array:
    """The model's utility alone (baseline of the paper)."""
    del user, rho
    return llm


def ces(user: jax.Array, llm: jax.Array, rho: float) -> jax.Array:
    """Constant elasticity of substitution with a static exponent `rho`, infinities included.

    Written around the geometric mean, log CES = mean(log) + log cosh(rho d) / rho with
    d = half the difference of logs: the textbook form cancels to nothing for small rho.
    """
    if rho == math.inf:
        return jnp.maximum(user, llm)
    if rho == -math.inf:
        return jnp.minimum(user, llm)
    if rho == 0:
        return cobb_douglas(user, llm, rho)
    positive = (user > 0) & (llm > 0)
    log_user = jnp.log(jnp.where(positive, user, 1))
    log_llm = jnp.log(jnp.where(positive, llm, 1))
    z = rho * (log_user - log_llm) / 2
    small = jnp.abs(z) < 1
    log_cosh = jnp.where(
        small,
        jnp.log1p(2 * jnp.sinh(jnp.where(small, z, 0) / 2) ** 2),
        jnp.abs(z) + jnp.log1p(jnp.exp(-2 * jnp.abs(z))) - math.log(2),
    )
    inside = jnp.exp((log_user + log_llm) / 2 + log_cosh / rho)
    if rho < 0:  # a side with nothing pulls the mean to nothing
        return jnp.where(positive, inside, 0)
    return jnp.where(positive, inside, jnp.maximum(user, llm) * 0.5 ** (1 / rho))


AGGREGATIONS: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "cobb_douglas": cobb_douglas,
    "linear": linear,
    "user": user_only,
    "llm": llm_only,
    "ces": ces,
}


def aggregate(user: jax.Array, llm: jax.Array, kind: str, rho: float = 0.0) -> jax.Array:
    """Welfare of utilities >= 0 of equal shape; `kind` and `rho` are static.

    Raises ValueError for an unknown `kind`.
    """
    if kind not in AGGREGATIONS:
        raise ValueError(f"welfare={kind!r} is unknown; allowed: {', '.join(AGGREGATIONS)}")
    return AGGREGATIONS[kind](user, llm, rho)
