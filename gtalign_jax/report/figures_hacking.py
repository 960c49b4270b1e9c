"""Pictures of what a policy does when it plays the reward: copying over steps, Q by length.

    rows of metrics.jsonl with `hacking/…` (training.panel)  ->  at most two pictures
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from gtalign_jax.report import ink
from gtalign_jax.report.figures_time import by_pool, pooled
from gtalign_jax.report.ink import Picture
from gtalign_jax.training.panel import DECILES, N

Row = Mapping[str, Any]
SHARES = (
    ("hacking/repeated_ngrams", "repeats itself"),
    ("hacking/copied_prompt", "copies the question"),
    ("hacking/same_matrix", "the same matrix"),
)
BY_LENGTH = tuple(f"hacking/q_by_length_{i}" for i in range(DECILES))


def hacking_signs(metrics_rows: Sequence[Row]) -> list[Picture]:
    """Shares over GRPO steps, and Q by decile of length early and late; none without the data."""
    rows = [row for row in metrics_rows if row["stage"] == "grpo"]
    pictures = (_shares(rows), _by_length(rows))
    return [picture for picture in pictures if picture is not None]


def _shares(rows: Sequence[Row]) -> Picture | None:
    known = [row for row in rows if any(ink.numbers([row.get(name)]) for name, _ in SHARES)]
    if not known:
        return None
    pools = pooled(row["step"] for row in known)
    lines = []
    for metric, label in SHARES:
        means = [_mean(part, metric) for part in by_pool(known, pools)]
        points = [(float(np.mean(pool)), mean) for pool, mean in zip(pools, means, strict=True)]
        lines.append((label, [point for point in points if math.isfinite(point[1])]))
    size = len(pools[0])
    caption = (f"Share of a response's {N}-word sequences that it has written before, or that stand"
               " in the question; share of the payoff matrices that are the most frequent one.")
    if size > 1:
        caption += f" Each point pools {size} neighbouring steps."
    return _picture("hacking_shares", "Repetition during training", caption, lines, "GRPO step")


def _by_length(rows: Sequence[Row]) -> Picture | None:
    known = [row for row in rows if any(ink.numbers([row.get(name)]) for name in BY_LENGTH)]
    if not known:
        return None
    third = max(1, len(known) // 3)
    parts = [known] if len(known) < 2 else [known[:third], known[-third:]]
    lines = []
    for part in parts:
        means = [_mean(part, name) for name in BY_LENGTH]
        first, last = part[0]["step"], part[-1]["step"]
        label = f"step {first}" if first == last else f"steps {first}–{last}"
        lines.append((label, [(i, x) for i, x in enumerate(means, start=1) if math.isfinite(x)]))
    caption = ("Mean answer quality of the training completions of a step, in tenths from the "
               "shortest to the longest.")
    return _picture("q_by_length", "Answer quality by length", caption, lines,
                    "tenth of the completions, by length")


def _mean(rows: Sequence[Row], metric: str) -> float:
    values = ink.numbers(row.get(metric) for row in rows)
    return float(np.mean(values)) if values else math.nan


def _picture(name: str, title: str, caption: str,
             lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], x: str) -> Picture:
    """Lines of shares, as (label, points); one without points is left out."""
    figure, axes = ink.panel()
    handles, labels, told = [], [], []
    for i, (label, points) in enumerate(lines):
        if not points:
            continue
        style = ink.style(i)
        look = dict(color=style.color, linestyle=style.dash, marker=style.marker, linewidth=2,
                    markersize=4.5)
        axes.plot(*np.array(points).T, markevery=max(1, len(points) // 6), clip_on=False, **look)
        handles.append(Line2D([], [], **look))
        labels.append(label)
        told.append(f"{label} from {points[0][1]:.0%} at {points[0][0]:g} to {points[-1][1]:.0%} "
                    f"at {points[-1][0]:g}")
    ink.ticks(axes.xaxis, 6, integer=True)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ink.says(axes, x)
    ink.legend(figure, handles, labels)
    return ink.draw(name, title, caption, f"{title}: {'; '.join(told)}.", figure)
