"""The figures of a report, each a function from numbers to `ink.Picture`s.

Curves over training are in figures_time and figures_hacking, the welfare plane in figures_plane,
points with intervals in figures_forest; here are payoff matrices and lengths. Where there is
nothing to draw, the answer is None or an empty list. All are reached through this module.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from gtalign_jax.game import payoff
from gtalign_jax.game.chain import ACTIONS, KEYS, PLAYERS, USER_ACTIONS
from gtalign_jax.report import ink
from gtalign_jax.report.figures_forest import forest, measure_bars, source_bars
from gtalign_jax.report.figures_hacking import hacking_signs
from gtalign_jax.report.figures_plane import plane_points, welfare_plane
from gtalign_jax.report.figures_time import action_shares, learning_curves
from gtalign_jax.report.ink import Picture

__all__ = [
    "action_shares", "forest", "hacking_signs", "learning_curves", "length_histograms",
    "measure_bars", "payoff_heat_maps", "plane_points", "source_bars", "welfare_plane",
]  # fmt: skip

Matrix = Mapping[str, Mapping[str, float]]
LARGEST = 100.0  # asked for are payoffs between -5 and 5; one of 1e9 would be all that a mean shows
MOST_BINS = 30
ON_LIGHT, ON_DARK = "#0d1117", "#fefefe"  # text in a coloured cell: the same in both themes
LENGTHS = (
    ("reasoning_tokens", "Reasoning length", "tokens before the response"),
    ("response_words", "Response length", "words of the response"),
)


def payoff_heat_maps(groups: Mapping[str, Sequence[Matrix]]) -> list[Picture]:
    """Per label the mean payoff matrix of each side, and how often each cell is recommended.

    The colours of payoffs mean the same in all labels; shares run from 0 to 100%.
    """
    found = {label: _cells(matrices) for label, matrices in groups.items()}
    means = {label: cells_NUAP.mean(axis=0) for label, cells_NUAP in found.items()
             if len(cells_NUAP)}
    if not means:
        return []
    low = min(float(mean.min()) for mean in means.values())
    high = max(float(mean.max()) for mean in means.values())
    pictures = []
    for i, (label, cells_NUAP) in enumerate(found.items()):
        if len(cells_NUAP):
            left_out = sum(m is not None for m in groups[label]) - len(cells_NUAP)
            pictures.append(_heat_maps(f"payoff_{i + 1}", label, cells_NUAP, left_out,
                                       (low, high)))
    return pictures


def recommended_shares(cells_NUAP: np.ndarray) -> np.ndarray:
    """How often each cell is the recommended one of its game [U, A]; the shares sum to 1."""
    choice_N = np.asarray(jax.jit(jax.vmap(payoff.recommended))(jnp.asarray(cells_NUAP)))
    counts = np.bincount(choice_N, minlength=len(KEYS))
    return (counts / len(choice_N)).reshape(len(USER_ACTIONS), len(ACTIONS))


def length_histograms(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Picture]:
    """How long reasoning and response are, all labels over each other.

    Args:
      groups: {label: rows}; rows without a score are left out.
    """
    pictures = []
    for field, title, what in LENGTHS:
        values = {
            label: np.array(ink.numbers(row[field] for row in rows if row["valid"]))
            for label, rows in groups.items()
        }
        if any(len(v) for v in values.values()):
            pictures.append(_histogram(f"histogram_{field}", title, what, values))
    return pictures


def _cells(matrices: Sequence[Matrix | None]) -> np.ndarray:
    """Matrices as an array [N, U, A, P], without absent ones and those of absurd numbers."""
    arrays = [[[matrix[key][player] for player in PLAYERS] for key in KEYS]
              for matrix in matrices if matrix is not None]
    kept = [a for a in arrays if all(abs(value) <= LARGEST for cell in a for value in cell)]
    return np.array(kept, float).reshape(-1, len(USER_ACTIONS), len(ACTIONS), len(PLAYERS))


def _heat_maps(name: str, label: str, cells_NUAP: np.ndarray, left_out: int,
               limits: tuple[float, float]) -> Picture:
    mean_UAP, share_UA = cells_NUAP.mean(axis=0), recommended_shares(cells_NUAP)
    figure = ink.blank(4.9)
    for axes, what, values_UA, ends, form in zip(
        figure.subplots(3, 1),
        ("mean payoff of the LLM", "mean payoff of the user", "recommended cell, share of games"),
        (mean_UAP[..., payoff.LLM], mean_UAP[..., payoff.USER], share_UA),
        (limits, limits, (0.0, 1.0)),
        ("{:.2f}", "{:.2f}", "{:.0%}"), strict=True,
    ):
        _heat_map(axes, values_UA, ends, form)
        ink.says(axes, y=what)
    caption = (f"Means over the payoff matrices that completions wrote ({len(cells_NUAP)}). Rows: "
               "vague (VQ) or detailed (DQ) question; columns: direct answer (DA), clarifying "
               "question (CQ), answer and follow-up question (AQ). Colours of payoffs: from "
               f"{limits[0]:.2f} (dark) to {limits[1]:.2f} (bright) in all labels.")
    if left_out:
        caption += f" Left out for numbers beyond ±{LARGEST:g}: {left_out}."
    title = f"Payoffs, {ink.short(label, 26)}"
    told = "; ".join(
        f"{key} LLM {llm:.2f}, user {user:.2f}, recommended {share:.0%}"
        for key, (llm, user), share in zip(KEYS, mean_UAP.reshape(-1, 2), share_UA.reshape(-1),
                                           strict=True)
    )
    return ink.draw(name, title, caption, f"{title}. {told}.", figure)


def _heat_map(axes: Axes, values_UA: np.ndarray, ends: tuple[float, float], form: str) -> None:
    """Cells as rectangles: an image would be pixels inside the SVG."""
    low, high = ends
    for (u, a), value in np.ndenumerate(values_UA):
        place = (value - low) / (high - low) if high > low else 0.5
        color = colormaps["cividis"](place)
        axes.add_patch(Rectangle((a, u), 1, 1, facecolor=color, edgecolor=ink.PAPER, linewidth=2))
        axes.text(a + 0.5, u + 0.5, form.format(value), ha="center", va="center",
                  fontsize=ink.TEXT, color=ON_LIGHT if place > 0.5 else ON_DARK)
    ink.quiet(axes)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(labelcolor=ink.INK)
    axes.set(xlim=(0, len(ACTIONS)), ylim=(len(USER_ACTIONS), 0))
    axes.set_xticks(np.arange(len(ACTIONS)) + 0.5, ACTIONS)
    axes.set_yticks(np.arange(len(USER_ACTIONS)) + 0.5, USER_ACTIONS)


def bin_edges(values: np.ndarray) -> np.ndarray:
    """Edges half way between whole numbers, at most `MOST_BINS` bins of one width."""
    low, high = math.floor(values.min()), math.floor(values.max())
    width = math.ceil((high - low + 1) / MOST_BINS)
    return np.arange(low, high + width + 1, width) - 0.5


def _histogram(name: str, title: str, what: str, values: Mapping[str, np.ndarray]) -> Picture:
    figure, axes = ink.panel(3.0)
    edges = bin_edges(np.concatenate(list(values.values())))
    handles, labels, told = [], [], []
    for i, (label, numbers) in enumerate(values.items()):
        if not len(numbers):
            continue
        look = ink.style(i)
        shares = np.histogram(numbers, edges)[0] / len(numbers)
        axes.stairs(shares, edges, fill=True, color=look.color, alpha=0.14, linewidth=0)
        axes.stairs(shares, edges, color=look.color, linestyle=look.dash, linewidth=2)
        axes.plot([numbers.mean()], [0], look.marker, color=look.color, markersize=8,
                  markeredgecolor=ink.PAPER, clip_on=False, zorder=5)
        handles.append(Line2D([], [], color=look.color, linestyle=look.dash, marker=look.marker,
                              markersize=6, linewidth=2))
        labels.append(f"{ink.short(label, 26)}, mean {numbers.mean():.1f}")
        told.append(f"{ink.short(label)}: mean {numbers.mean():.1f}, from {numbers.min():g} to "
                    f"{numbers.max():g}, {len(numbers)} completions")
    axes.set_ylim(bottom=0)
    ink.ticks(axes.xaxis, 6, integer=True)
    ink.ticks(axes.yaxis, 5)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ink.says(axes, what, "share of completions")
    ink.legend(figure, handles, labels)
    caption = "Marks on the axis: means."
    return ink.draw(name, title, caption, f"{title}. {'; '.join(told)}.", figure)
