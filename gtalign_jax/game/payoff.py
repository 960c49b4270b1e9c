"""The payoff matrix as a game: Pareto set, equilibria, recommendation (paper section 3).

One game is `payoff_UAP` [2, 3, 2]: U = user actions (VQ, DQ), A = model actions (DA, CQ, AQ),
P = players (LLM, user). Every function takes one game; `jax.vmap` makes a batch of it.
Dominance:  i is dominated  <=>  some j has  x_j >= x_i - t  for both and  x_j > x_i + t  for one
with t = 1e-9. A cycle is impossible (each step raises the sum), so the Pareto set is never empty.
Knows no text: `game.chain` reads and writes matrices.
"""

import flax.struct
import jax
import jax.numpy as jnp

TOLERANCE = 1e-9
LLM, USER = 0, 1


@flax.struct.dataclass
class Solution:
    """What `solve` knows about one game (leading batch axes after `vmap`)."""

    pareto_UA: jax.Array  # bool: not dominated by any cell
    nash_UA: jax.Array  # bool: pure Nash equilibria
    best_llm_UA: jax.Array  # bool: the model's best actions against each user action
    best_user_UA: jax.Array  # bool: the user's best actions against each model action
    recommended: jax.Array  # int32 index into the six cells, user action major
    dilemma: jax.Array  # bool: has pure equilibria and all of them are dominated
    nash_count: jax.Array  # int32
    price_of_anarchy: jax.Array  # best sum / worst equilibrium sum, NaN where undefined


def pareto_mask(payoff_UAP: jax.Array) -> jax.Array:
    """Cells that no other cell dominates, bool [U, A]."""
    cells_IP = payoff_UAP.reshape(-1, 2)
    other_JIP = cells_IP[:, None, :]
    own_JIP = cells_IP[None, :, :]
    no_worse_JI = jnp.all(other_JIP >= own_JIP - TOLERANCE, axis=-1)
    better_JI = jnp.any(other_JIP > own_JIP + TOLERANCE, axis=-1)
    dominated_I = jnp.any(no_worse_JI & better_JI, axis=0)
    return ~dominated_I.reshape(payoff_UAP.shape[:2])


def recommended(payoff_UAP: jax.Array) -> jax.Array:
    """Index (0..5, user action major) of the cell to play: the largest LLM + user on the Pareto
    set, ties by user, then by LLM, then by the lowest index."""
    cells_IP = payoff_UAP.reshape(-1, 2)
    scale = jnp.max(jnp.abs(cells_IP))
    values = (cells_IP.sum(-1), cells_IP[:, USER], cells_IP[:, LLM])
    return first_best(pareto_mask(payoff_UAP).reshape(-1), values, (scale,) * 3)


def first_best(keep_I: jax.Array, values, scales) -> jax.Array:
    """Index of the kept cell with the largest first value, ties by the next value, and so on, at
    last by the lowest index; `scales` bound the numbers that each value was computed from."""
    for value_I, scale in zip(values, scales, strict=True):
        best = jnp.max(jnp.where(keep_I, value_I, -jnp.inf))
        keep_I = keep_I & (value_I >= best - tie(value_I.dtype, scale))
    return jnp.argmax(keep_I).astype(jnp.int32)


def tie(dtype, scale) -> jax.Array:
    """How far apart two equal values may lie: a sum of two rounded decimals is off by a few ulps,
    and 0.1 + 0.2 must tie with 0.3 + 0."""
    return jnp.maximum(TOLERANCE, 4 * jnp.finfo(dtype).eps * scale)


def best_llm(payoff_UAP: jax.Array) -> jax.Array:
    """The model's best responses: actions within 1e-9 of its best, per user action, bool [U, A]."""
    llm_UA = payoff_UAP[..., LLM]
    return llm_UA >= jnp.max(llm_UA, axis=1, keepdims=True) - TOLERANCE


def best_user(payoff_UAP: jax.Array) -> jax.Array:
    """The user's best responses: actions within 1e-9 of its best, per model action, bool [U, A]."""
    user_UA = payoff_UAP[..., USER]
    return user_UA >= jnp.max(user_UA, axis=0, keepdims=True) - TOLERANCE


def nash_mask(payoff_UAP: jax.Array) -> jax.Array:
    """Pure Nash equilibria: cells that are a best response of both players, bool [U, A]."""
    return best_llm(payoff_UAP) & best_user(payoff_UAP)


def is_prisoners_dilemma(payoff_UAP: jax.Array) -> jax.Array:
    """True when pure equilibria exist and each of them is dominated: both could do better."""
    nash_UA = nash_mask(payoff_UAP)
    return jnp.any(nash_UA) & ~jnp.any(nash_UA & pareto_mask(payoff_UAP))


def price_of_anarchy(payoff_UAP: jax.Array) -> jax.Array:
    """Largest LLM + user over the smallest at a pure equilibrium, >= 1; NaN where the game has no
    pure equilibrium or its worst one has no positive sum (the ratio then means nothing)."""
    sum_UA = payoff_UAP.sum(-1)
    worst = jnp.min(jnp.where(nash_mask(payoff_UAP), sum_UA, jnp.inf))
    defined = (worst > 0) & jnp.isfinite(worst)
    return jnp.where(defined, jnp.max(sum_UA) / jnp.where(defined, worst, 1), jnp.nan)


def solve(payoff_UAP: jax.Array) -> Solution:
    """Everything above for one game of finite payoffs."""
    nash_UA = nash_mask(payoff_UAP)
    return Solution(
        pareto_UA=pareto_mask(payoff_UAP),
        nash_UA=nash_UA,
        best_llm_UA=best_llm(payoff_UAP),
        best_user_UA=best_user(payoff_UAP),
        recommended=recommended(payoff_UAP),
        dilemma=is_prisoners_dilemma(payoff_UAP),
        nash_count=nash_UA.sum().astype(jnp.int32),
        price_of_anarchy=price_of_anarchy(payoff_UAP),
    )
