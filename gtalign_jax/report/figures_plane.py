"""Pictures in the plane of both sides' welfare: clouds of completions, and points with intervals.

    x = user welfare U, y = LLM welfare L;  curves of equal social welfare: sqrt(U L) = constant
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gtalign_jax.evaluation.pareto import joint_frontier
from gtalign_jax.report import ink
from gtalign_jax.report.ink import Picture

MOST_SHOWN = 400  # marks per label: more only hide each other
ISO = np.arange(0.1, 3, 0.1)  # levels of social welfare that have a curve, as far as they fit
PlanePoint = tuple[str, float, float, float, float, float, float]


def welfare_plane(groups: Mapping[str, Any], name: str = "welfare_plane",
                  title: str = "Welfare of both sides, completion by completion",
                  ) -> Picture | None:
    """Both clouds with their frontiers and means.

    Args:
      groups: {label: points [N, 2] of (user, LLM)}; pairs with a None or NaN are left out.
    """
    clouds = {label: finite_pairs(points) for label, points in groups.items()}
    shown = {label: cloud for label, cloud in clouds.items() if len(cloud)}
    if not shown:
        return None
    figure, axes = ink.panel(4.2)
    limits = _frame(axes, np.concatenate(list(shown.values())))
    handles, labels, told, hidden = [], [], [], False
    for i, (label, cloud) in enumerate(clouds.items()):
        if not len(cloud):
            continue
        look = ink.style(i)
        places, counts = clumps(cloud)
        hidden |= len(places) > MOST_SHOWN
        areas = 9 + 300 * counts / len(cloud)
        axes.scatter(*places[:MOST_SHOWN].T, areas[:MOST_SHOWN], look.color, alpha=0.4,
                     marker=look.marker, linewidths=0)
        stairs = joint_frontier(cloud)
        ends = np.array([[limits[0], stairs[0, 1]], *stairs, [stairs[-1, 0], limits[2]]])
        axes.step(*ends.T, where="pre", color=look.color, linestyle=look.dash, linewidth=2)
        handles.append(Line2D([], [], color=look.color, linestyle=look.dash, marker=look.marker,
                              markersize=5, linewidth=2))
        labels.append(ink.short(label))
        mean = cloud.mean(axis=0)
        told.append(f"{ink.short(label)}: mean user welfare {mean[0]:.3f}, mean LLM welfare "
                    f"{mean[1]:.3f}, {len(stairs)} completions on the frontier of {len(cloud)}")
    for i, cloud in enumerate(clouds.values()):  # above all clouds
        if len(cloud):
            look = ink.style(i)
            axes.plot(*cloud.mean(axis=0)[:, None], look.marker, color=look.color, markersize=11,
                      markeredgecolor=ink.INK, markeredgewidth=2, zorder=6)
    handles.append(Line2D([], [], linestyle="none", marker="o", color="none", markersize=9,
                          markeredgecolor=ink.INK, markeredgewidth=2))
    labels.append("mean")
    ink.legend(figure, handles, labels)
    caption = ("Each mark stands for the completions of one spot (0.01 wide), its area for their "
               "number; each stepped line is the Pareto frontier of all completions of its label; "
               "grey curves join points of equal social welfare √(U·L).")
    if hidden:
        caption += f" Of each label the {MOST_SHOWN} fullest spots are shown."
    return ink.draw(name, title, caption, f"{title}. {'; '.join(told)}.", figure)


def plane_points(name: str, title: str, points: Sequence[PlanePoint],
                 caption: str = "") -> Picture | None:
    """Points with intervals along both axes.

    Args:
      points: (label, user, user_low, user_high, llm, llm_low, llm_high); one without a finite
        (user, llm) is left out, an interval that is not finite is not drawn.
    """
    looks = {label: ink.style(i) for i, label in enumerate(dict.fromkeys(p[0] for p in points))}
    kept = [p for p in points if len(finite_pairs([(p[1], p[4])]))]
    if not kept:
        return None
    figure, axes = ink.panel(4.2)
    ends = [[(u, v), *finite_pairs([(lo, v), (hi, v), (u, low), (u, high)])]
            for _, u, lo, hi, v, low, high in kept]
    _frame(axes, np.array([pair for group in ends for pair in group], float))
    for label, user, *rest in kept:
        look = looks[label]
        low, high, llm, llm_low, llm_high = rest
        if ink.numbers((low, high)) == [low, high]:
            axes.plot([low, high], [llm, llm], color=look.color, linewidth=1.6)
        if ink.numbers((llm_low, llm_high)) == [llm_low, llm_high]:
            axes.plot([user, user], [llm_low, llm_high], color=look.color, linewidth=1.6)
        axes.plot([user], [llm], look.marker, color=look.color, markersize=9,
                  markeredgecolor=ink.PAPER, zorder=5)
    labels = list(dict.fromkeys(p[0] for p in kept))
    handles = [Line2D([], [], linestyle="none", marker=looks[label].marker, markersize=8,
                      color=looks[label].color) for label in labels]
    ink.legend(figure, handles, [ink.short(label) for label in labels])
    told = "; ".join(f"{ink.short(p[0])}: user {p[1]:.3f}, LLM {p[4]:.3f}" for p in kept)
    grey = "Grey curves join points of equal social welfare √(U·L)."
    return ink.draw(name, title, f"{caption} {grey}".strip(), f"{title}. {told}.", figure)


def clumps(points_N2: np.ndarray, width: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """(mean of the points of each occupied square of `width`, their number), fullest first."""
    squares, which_N, counts = np.unique(np.floor(points_N2 / width), axis=0, return_inverse=True,
                                         return_counts=True)
    sums = np.zeros_like(squares)
    np.add.at(sums, which_N.reshape(-1), points_N2)
    order = np.argsort(-counts, kind="stable")
    return (sums / counts[:, None])[order], counts[order]


def finite_pairs(points: Any) -> np.ndarray:
    """[N, 2] of the pairs of which both are finite numbers."""
    pairs = [pair for pair in points if len(ink.numbers(pair)) == 2]
    return np.array(pairs, float).reshape(-1, 2)


def _frame(axes: Axes, points_N2: np.ndarray) -> tuple[float, float, float, float]:
    """Limits around the points, and the curves of equal social welfare within them."""
    low, high = points_N2.min(axis=0), points_N2.max(axis=0)
    room = np.maximum(0.06 * (high - low), 0.02)
    (left, bottom), (right, top) = low - room, high + room
    axes.set(xlim=(left, right), ylim=(bottom, top))
    ink.quiet(axes, grid="both")
    for level in ISO:
        x = np.linspace(max(left, 1e-3), right, 200)
        y = level**2 / x
        inside = (y >= bottom) & (y <= top)
        if inside.sum() < 8:
            continue
        axes.plot(x[inside], y[inside], color=ink.MUTED, linewidth=0.7, alpha=0.55)
        at = np.flatnonzero(inside)[int(0.9 * inside.sum())]  # lower right: clouds thin out there
        axes.text(x[at], y[at], f"{level:.1f}", fontsize=8.5, color=ink.MUTED, ha="center",
                  va="center", bbox={"facecolor": ink.PAPER, "linewidth": 0, "pad": 0.6})
    ink.ticks(axes.xaxis, 6)
    ink.ticks(axes.yaxis, 6)
    ink.says(axes, "user welfare U", "LLM welfare L")
    return float(left), float(right), float(bottom), float(top)
