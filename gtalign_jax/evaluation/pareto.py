"""Two policies as two clouds of (user welfare, LLM welfare) points on the same prompts.

    compare(first_B2, second_B2, eps) -> numbers of both, of which more is better but for regret

A point of the joint Pareto frontier is one that no point of either policy beats in both welfares.
With f on that frontier and ranges over both clouds together, the regret of a point p is

    regret(p) = min over f of max((f - p) / range, 0)      the larger of both sides' shortfalls

and eps-coverage is the share of points with regret <= eps. Everything sorts once: O(B log B). The
names in `compare`'s answer, and the small floor under welfares before roots, are those of the
original's comparison script, so that numbers can be put side by side; the hypervolume is not
(there it is the area of the frontier's last point alone, here that of the whole dominated region).

Knows no files and no ids; numpy alone, so that a comparison needs no accelerator. Of the letters
in names, B are prompts or completions, F points of a frontier, 2 is (user, LLM).
"""

import math
from typing import Any

import numpy as np

EPS = 0.05  # the usual slack of dominance and coverage: that of the paper's table 3
WELFARE_FLOOR = 1e-9  # added before roots and logarithms: a side that gets nothing is no -infinity
SIDES = ("file1", "file2")


def compare(first_B2: np.ndarray, second_B2: np.ndarray, eps: float = 0.0, rho: float = 0.0,
            alpha: float = 0.5) -> dict[str, Any]:
    """All measures of two policies; row b of both is the same prompt. Paper section 4, Table 3.

    Args:
      first_B2, second_B2: user welfare, LLM welfare. eps: slack of dominance (in welfare) and of
        coverage (in shares of the range). rho: exponent of `CES_avg`; 0 is the geometric mean,
        -infinity the worse side's welfare. alpha: the user's exponent in `CobbDouglas_avg`.
    Raises ValueError for points that are not finite pairs in equal numbers, and for bad numbers.
    """
    first_B2, second_B2 = _points(first_B2, "first"), _points(second_B2, "second")
    if len(first_B2) != len(second_B2):
        raise ValueError(
            f"{len(first_B2)} points of the first and {len(second_B2)} of the second policy: "
            "row b of both must be the same prompt"
        )
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps}: must be a finite number >= 0")
    both = np.concatenate([first_B2, second_B2])
    low_2, high_2 = both.min(axis=0), both.max(axis=0)
    frontier_F2, range_2 = joint_frontier(both), high_2 - low_2
    clouds = dict(zip(SIDES, (first_B2, second_B2), strict=True))
    regrets = {side: regret(x, frontier_F2, range_2) for side, x in clouds.items()}
    return {
        "basic_compare": dominance_counts(first_B2, second_B2, eps),
        "ranges": {
            "u_min": float(low_2[0]), "u_max": float(high_2[0]),
            "l_min": float(low_2[1]), "l_max": float(high_2[1]),
        },
        "epsilon": float(eps),
        "epsilon_coverage": {side: coverage(x, eps) for side, x in regrets.items()},
        "avg_regret_Linf": {side: float(x.mean()) for side, x in regrets.items()},
        "social_welfare_alpha": float(alpha),
        "NSW_avg": {side: float(nash_welfare(x).mean()) for side, x in clouds.items()},
        "CobbDouglas_avg": {
            side: float(cobb_douglas(x, alpha).mean()) for side, x in clouds.items()
        },
        "CES_rho": float(rho),
        "CES_avg": {side: float(ces_welfare(x, rho).mean()) for side, x in clouds.items()},
        "coverage_spread": {side: spread(x, range_2) for side, x in clouds.items()},
        "hypervolume_exact": {side: hypervolume(x, low_2) for side, x in clouds.items()},
        "joint_frontier": frontier_F2.tolist(),
        "on_joint_frontier": {side: coverage(x, 0.0) for side, x in regrets.items()},
    }  # fmt: skip


def dominance_counts(first_B2: np.ndarray, second_B2: np.ndarray, eps: float) -> dict[str, int]:
    """On how many prompts each side dominates the other, both are equal, or neither of these.

    One side reaches the other if it is >= other - eps in both welfares and > other - eps in one;
    it dominates if it is not reached itself.
    """
    reaches, reached = _reaches(first_B2, second_B2, eps), _reaches(second_B2, first_B2, eps)
    equal = (first_B2 == second_B2).all(axis=1)
    first, second = reaches & ~reached, reached & ~reaches
    return {
        "common_count": len(first_B2),
        "file1_dominates_file2": int(first.sum()),
        "file2_dominates_file1": int(second.sum()),
        "equal": int(equal.sum()),
        "incomparable": int((~first & ~second & ~equal).sum()),
    }


def _reaches(one_B2: np.ndarray, other_B2: np.ndarray, eps: float) -> np.ndarray:
    bar_B2 = other_B2 - eps
    return (one_B2 >= bar_B2).all(axis=1) & (one_B2 > bar_B2).any(axis=1)


def joint_frontier(points_B2: np.ndarray) -> np.ndarray:
    """The points that none beats in one welfare without losing in the other, each once.

    Sorted: user welfare rises, LLM welfare falls, both strictly. [F, 2]
    """
    order = np.lexsort((-points_B2[:, 1], -points_B2[:, 0]))
    sorted_B2 = points_B2[order]  # from the user's best to the user's worst
    best_so_far = np.maximum.accumulate(sorted_B2[:, 1])
    kept = np.concatenate([[True], sorted_B2[1:, 1] > best_so_far[:-1]])
    return sorted_B2[kept][::-1]


def regret(points_B2: np.ndarray, frontier_F2: np.ndarray, range_2: np.ndarray) -> np.ndarray:
    """How far each point is below the frontier's nearest point, as a share of the ranges. [B]

    The distance is the larger of both sides' shortfalls (L-infinity). Along the frontier the user's
    shortfall rises and the LLM's falls: the smallest maximum is where they cross, which a binary
    search for all points at once finds. A range of 0 counts as 1.
    """
    span_2 = np.where(range_2 > 0, range_2, 1.0)[None]

    def shortfall(at_B: np.ndarray) -> np.ndarray:
        return (frontier_F2[at_B] - points_B2) / span_2

    low_B = np.zeros(len(points_B2), int)
    high_B = np.full(len(points_B2), len(frontier_F2) - 1)
    while (low_B < high_B).any():
        middle_B = (low_B + high_B) // 2
        user_B, llm_B = shortfall(middle_B).T
        crossed_B = user_B >= llm_B
        low_B = np.where(crossed_B, low_B, np.minimum(middle_B + 1, high_B))
        high_B = np.where(crossed_B, middle_B, high_B)
    after_B = shortfall(low_B).max(axis=1)
    before_B = shortfall(np.maximum(low_B - 1, 0)).max(axis=1)
    return np.maximum(np.minimum(before_B, after_B), 0.0)


def coverage(regret_B: np.ndarray, eps: float) -> float:
    """Share of points that reach some point of the frontier but for eps of the range."""
    return float((regret_B <= eps).mean())


def hypervolume(points_B2: np.ndarray, reference_2: np.ndarray) -> float:
    """The exact area between the points' own frontier and the reference point, in welfare squared.

    Points below the reference in one welfare add nothing beyond it.
    """
    frontier_F2 = joint_frontier(np.maximum(points_B2, reference_2[None]))
    widths_F = np.diff(frontier_F2[:, 0], prepend=reference_2[0])
    return float((widths_F * (frontier_F2[:, 1] - reference_2[1])).sum())


def nash_welfare(points_B2: np.ndarray) -> np.ndarray:
    """sqrt(U L) of each point: the reward of the paper (section 3). [B]"""
    return cobb_douglas(points_B2, 0.5)


def cobb_douglas(points_B2: np.ndarray, alpha: float) -> np.ndarray:
    """U**alpha L**(1 - alpha) of each point. [B]

    Here and in `ces_welfare` a negative welfare counts as 0, and each is raised by WELFARE_FLOOR.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: must be between 0 and 1")
    user_B, llm_B = _raised(points_B2)
    return user_B**alpha * llm_B ** (1 - alpha)


def ces_welfare(points_B2: np.ndarray, rho: float) -> np.ndarray:
    """((U**rho + L**rho) / 2) ** (1 / rho) of each point, limits at 0 and infinities included. [B]

    Written around the geometric mean as in `game.welfare.ces`, in float64: the textbook form
    cancels to nothing for small rho.
    """
    if math.isnan(rho):
        raise ValueError("rho=nan: must be a number or an infinity")
    user_B, llm_B = _raised(points_B2)
    if math.isinf(rho):
        return np.maximum(user_B, llm_B) if rho > 0 else np.minimum(user_B, llm_B)
    if rho == 0:
        return nash_welfare(points_B2)
    z = np.abs(rho * (np.log(user_B) - np.log(llm_B)) / 2)
    near_zero = np.log1p(2 * np.sinh(np.minimum(z, 1) / 2) ** 2)
    log_cosh = np.where(z < 1, near_zero, z + np.log1p(np.exp(-2 * z)) - math.log(2))
    return np.sqrt(user_B * llm_B) * np.exp(log_cosh / rho)


def _raised(points_B2: np.ndarray) -> np.ndarray:
    return (np.maximum(points_B2, 0.0) + WELFARE_FLOOR).T


def spread(points_B2: np.ndarray, range_2: np.ndarray) -> dict[str, float]:
    """Share of the joint range that the points span in each welfare; 0 where the range is 0."""
    own_2 = np.ptp(points_B2, axis=0)
    share_2 = np.where(range_2 > 0, own_2 / np.where(range_2 > 0, range_2, 1.0), 0.0)
    return {
        "u_cov": float(share_2[0]), "l_cov": float(share_2[1]), "mean_cov": float(share_2.mean())
    }  # fmt: skip


def _points(points: Any, name: str) -> np.ndarray:
    points_B2 = np.asarray(points, np.float64)
    if points_B2.ndim != 2 or points_B2.shape[1] != 2 or not len(points_B2):
        raise ValueError(f"{name}: shape {points_B2.shape}; must be [B, 2] with B >= 1")
    if not np.isfinite(points_B2).all():
        raise ValueError(f"{name}: welfares must be finite numbers")
    return points_B2
