"""The factors of mutual welfare and the two utilities (paper section 4).

    Len(n; a, b) = sigmoid(slope (n - a)) sigmoid(slope (b - n)),  slope = 0.005
    reading   = Len(words of the response; 20, 500)
    latency   = exp(-characters before <response> / 500)
    verbosity = Len(words of the whole completion; 500, 1000)
    matrix quality = 1/12 sum over six cells of [user != LLM] + [|user - LLM| / max(|.|) > 0.1]

    U = 1e-4 + 0.5 q_user + 0.2 reading + 0.3 latency
    L = 1e-4 + 0.4 q_llm + 0.2 format + 0.2 matrix quality + 0.2 verbosity
    with consistency:  0.35 q_llm + 0.2 format + 0.2 matrix + 0.2 consistency + 0.05 verbosity

q_user, q_llm and consistency are measured elsewhere (`reward.tasks`, judges) or, for consistency,
by `consistency_by_solver`. Arrays may have any shape; knows nothing of batches.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gtalign_jax.game import payoff as game

NAMES = (
    "q_user", "q_llm", "answer", "reading", "latency", "format", "matrix_quality", "verbosity",
    "consistency",
)  # fmt: skip


@dataclass(frozen=True)
class UserWeights:
    """Weights of the user's utility."""

    quality: float = 0.5
    reading: float = 0.2
    latency: float = 0.3


@dataclass(frozen=True)
class LLMWeights:
    """Weights of the model's utility."""

    quality: float = 0.4
    format: float = 0.2
    matrix_quality: float = 0.2
    verbosity: float = 0.2
    consistency: float = 0.0


def length_window(count: jax.Array, low: float, high: float, slope: float) -> jax.Array:
    """Soft indicator in (0, 1) that a count lies between `low` and `high`; `slope` per count."""
    return jax.nn.sigmoid(slope * (count - low)) * jax.nn.sigmoid(slope * (high - count))


def latency(chars: jax.Array, scale: float) -> jax.Array:
    """exp(-chars / scale) in (0, 1]: what is left of the user's patience when the answer begins."""
    return jnp.exp(-chars / scale)


def matrix_quality(payoff_UAP: jax.Array) -> jax.Array:
    """Share in [0, 1] of the twelve signs that both players' payoffs were told apart."""
    llm_UA, user_UA = payoff_UAP[..., game.LLM], payoff_UAP[..., game.USER]
    largest_UA = jnp.maximum(jnp.maximum(jnp.abs(user_UA), jnp.abs(llm_UA)), 1e-8)
    differ_UA = user_UA != llm_UA
    clearly_UA = jnp.abs(user_UA - llm_UA) / largest_UA > 0.1
    return (differ_UA.sum() + clearly_UA.sum()) / (2 * llm_UA.size)


def utilities(
    factors: Mapping[str, jax.Array], user: UserWeights, llm: LLMWeights, floor: float
) -> tuple[jax.Array, jax.Array]:
    """(U, L) from factors in [0, 1] of equal shape; `floor` keeps both above zero."""
    user_utility = (
        floor
        + user.quality * factors["q_user"]
        + user.reading * factors["reading"]
        + user.latency * factors["latency"]
    )
    llm_utility = (
        floor
        + llm.quality * factors["q_llm"]
        + llm.format * factors["format"]
        + llm.matrix_quality * factors["matrix_quality"]
        + llm.verbosity * factors["verbosity"]
        + llm.consistency * factors["consistency"]
    )
    return user_utility, llm_utility


_MENTION = re.compile(
    r"(?=[ACDFVacdf])(?:"  # the letters that a mention begins with: most places are none at once
    r"(?<![A-Za-z])(?:(?P<user>VQ|DQ)[ _-]?)?(?P<action>DA|CQ|AQ)(?![A-Za-z])"
    r"|(?P<DA>(?i:direct(?:ly)? answer|answer(?:ing|s)? (?:it |this )?directly))"
    r"|(?P<CQ>(?i:clarif(?:y|ying|ication)))"
    r"|(?P<AQ>(?i:follow-?\s?up))"
    r")"
)


def consistency_by_solver(analyze: str, pareto: Collection[str]) -> float:
    """Does the analysis end on an action of the Pareto set? 1, 0.5 or 0, without a judge.

    1 when the last cell (`DQ_CQ`) or action (`CQ`, "clarifying question") that it names lies in
    `pareto`, 0.5 when one named before does, else 0. An action lies in the set when some cell of
    it does. The last one counts, as it is where the instruction wants the choice: a text that
    lists everything gains nothing by that.
    """
    actions = {key.partition("_")[2] for key in pareto}
    inside = []
    for match in _MENTION.finditer(analyze):
        if match["user"]:
            inside.append(f"{match['user']}_{match['action']}" in pareto)
        else:
            inside.append((match["action"] or match.lastgroup) in actions)
    if not inside:
        return 0.0
    return 1.0 if inside[-1] else 0.5 * any(inside)
