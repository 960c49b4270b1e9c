"""Pictures over training steps: learning curves with bands, and which actions were chosen.

    rows of the steps of one bin  ->  evaluation.measures  ->  a point and its band

A long run has more steps than a picture has room for: neighbouring steps are pooled, so that a
curve has at most `MOST_POINTS` points, each of them a plain statistic of the completions it pools.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Transform

from gtalign_jax.evaluation.measures import (
    BY_NAME,
    OVERALL,
    UNREADABLE,
    Estimate,
    estimates,
    social_welfare,
)
from gtalign_jax.report import ink
from gtalign_jax.report.ink import Picture
from gtalign_jax.reward.rules import REQUEST_KINDS, RESPONSE_KINDS, RIGHT_KINDS
from gtalign_jax.training.plots import AFTER, COLD_START

Row = Mapping[str, Any]
MOST_POINTS, MOST_BARS = 50, 30
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A series: the measure of the completions; where these are not at hand the metric, if any."""

    measure: str
    metric: str
    label: str
    color: str
    marker: str
    dash: Any = "-"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of curves that share an axis; `share`: it runs from 0 to 100%."""

    name: str
    title: str
    curves: tuple[Curve, ...]
    share: bool = False


SOLID, DASHED, DOTTED = "-", (0, (5, 2)), (0, (1.2, 1.5))
PANELS = (
    Panel("welfare", "Mutual welfare during training", (
        Curve("social_welfare", "reward/total", "social √(U·L)", "social", "D"),
        Curve("user_welfare", "welfare/user", "user U", "user", "o", DASHED),
        Curve("llm_welfare", "welfare/llm", "LLM L", "llm", "s", DOTTED),
    )),
    Panel("behaviour", "Behaviour during training", (
        Curve("format", "reward/format", "well-formed chain", "format", "^"),
        Curve("right_action", "reward/right_action", "right kind of action", "action", "D", DASHED),
    ), share=True),
    Panel("lengths", "Tokens per completion during training", (
        Curve("reasoning_tokens", "", "reasoning", "reasoning", "o"),
        Curve("response_tokens", "rollout/response_tokens", "response", "response", "s", DASHED),
    )),
)
MEASURED = tuple(BY_NAME[curve.measure] for panel in PANELS for curve in panel.curves)
SCALARS = (  # of metrics.jsonl alone: name, stage, metric, title
    ("cold_start_loss", "sft", "sft/loss", "Loss of the cold start"),
    ("kl", "grpo", "grpo/kl", "Distance from the reference (KL per token)"),
    ("entropy", "grpo", "grpo/entropy", "Entropy of the policy (nats per token)"),
)
KINDS = (*RESPONSE_KINDS, UNREADABLE)
KIND_LABELS = {
    "answer": "answers", "ask": "asks back", "answer_ask": "answers and asks",
    "refuse": "refuses", "constructive": "offers instead", "none": "says nothing",
    UNREADABLE: "unreadable",
}  # fmt: skip
KIND_HATCHES = dict(zip(KINDS, ("", "//", "||", "xx", "\\\\", "--", "++"), strict=True))


def learning_curves(metrics_rows: Sequence[Row], rollout_rows: Sequence[Row],
                    evaluation: Mapping[str, Mapping[str, Estimate]]) -> list[Picture]:
    """One picture per panel with data.

    Args:
      metrics_rows: of metrics.jsonl. rollout_rows: of rollouts.jsonl (rows of GRPO are used).
      evaluation: {label: {measure: Estimate}} of held-out prompts; "after cold start" stands at
        step 0, "step 20" at 20, "after GRPO" at the last step; other labels are left out.
    """
    grpo = [row for row in rollout_rows if row["stage"] == "grpo"]
    steps = [row["step"] for row in metrics_rows if row["stage"] == "grpo"]
    pools = pooled([*steps, *(row["step"] for row in grpo)])
    held_out = _held_out(evaluation, pools[-1][-1] if pools else 0)
    found = _measured(grpo, pools) or _metered(metrics_rows, pools)
    pictures = [_curves(panel, found, held_out, pools, bool(grpo)) for panel in PANELS]
    pictures.insert(1, _spread(grpo, pools))
    pictures += [_scalar(metrics_rows, *scalar) for scalar in SCALARS]
    return [picture for picture in pictures if picture is not None]


def action_shares(rollout_rows: Sequence[Row]) -> list[Picture]:
    """What was done during GRPO, one picture per kind of request; the wanted kinds lie at the
    bottom of each bar, below the thick line."""
    rows = [row for row in rollout_rows if row["stage"] == "grpo" and row["valid"]]
    pictures = []
    pools = pooled((row["step"] for row in rows), MOST_BARS)
    for request in REQUEST_KINDS:
        chosen = [row for row in rows if row["request_kind"] == request]
        if chosen:
            pictures.append(_actions(request, chosen, pools))
    return pictures


def pooled(steps: Iterable[int], most: int = MOST_POINTS) -> list[list[int]]:
    """The distinct steps in order, cut into at most `most` runs of equal length (but the last)."""
    ordered = sorted(set(steps))
    size = max(1, math.ceil(len(ordered) / most))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def by_pool(rows: Iterable[Row], pools: Sequence[Sequence[int]]) -> list[list[Row]]:
    """The rows of each pool of steps."""
    place = {step: i for i, pool in enumerate(pools) for step in pool}
    found: list[list[Row]] = [[] for _ in pools]
    for row in rows:
        found[place[row["step"]]].append(row)
    return found


def _measured(rows: Sequence[Row], pools: Sequence[Sequence[int]]) -> list[dict[str, Estimate]]:
    """Per pool {measure: Estimate} of its completions; empty without any."""
    if not rows:
        return []
    return [estimates(part, MEASURED, resamples=400)[OVERALL] if part else {}
            for part in by_pool(rows, pools)]


def _metered(rows: Sequence[Row], pools: Sequence[Sequence[int]]) -> list[dict[str, Estimate]]:
    """The same from the metrics of the steps, without intervals."""
    parts = by_pool((row for row in rows if row["stage"] == "grpo"), pools)
    found = []
    for part in parts:
        found.append({})
        for curve in (curve for panel in PANELS for curve in panel.curves):
            values = ink.numbers(row.get(curve.metric) for row in part)
            if values:
                mean = float(np.mean(values))
                found[-1][curve.measure] = Estimate(mean, math.nan, math.nan, len(values), 0)
    return found


def _held_out(evaluation: Mapping[str, Mapping[str, Estimate]],
              last: int) -> list[tuple[int, Mapping[str, Estimate]]]:
    """(step, estimates) of the evaluations that have a place on the axis of steps."""
    points = []
    for label, found in evaluation.items():
        match = re.fullmatch(r"step (\d+)", label)
        step = {COLD_START: 0, AFTER: last}.get(label, int(match[1]) if match else None)
        if step is not None:
            points.append((step, found))
    return sorted(points, key=lambda point: point[0])


def _curves(panel: Panel, found: Sequence[Mapping[str, Estimate]],
            held_out: Sequence[tuple[int, Mapping[str, Estimate]]],
            pools: Sequence[Sequence[int]], has_rows: bool) -> Picture | None:
    figure, axes = ink.panel()
    handles, labels, told, has_marks = [], [], [], False
    for i, curve in enumerate(panel.curves):
        color = ink.PALETTE[curve.color]
        moved = ink.aside(axes, 5 * (i - (len(panel.curves) - 1) / 2))
        points = _points([(float(np.mean(p)), f) for p, f in zip(pools, found, strict=True)],
                         curve.measure)
        marks = _points(held_out, curve.measure)
        if not (points or marks):
            continue
        if points:
            _line(axes, points, color, curve.marker, curve.dash, moved)
        for x, value, low, high in marks:
            axes.plot([x, x], [low, high], color=color, linewidth=1.3, zorder=4, transform=moved)
            axes.plot([x], [value], curve.marker, color=color, markerfacecolor=ink.PAPER,
                      markersize=7, markeredgewidth=1.6, clip_on=False, zorder=5, transform=moved)
        has_marks |= bool(marks)
        # What was moved aside does not count for the limits by itself.
        spots = [(x, y) for x, *ys in (*points, *marks) for y in ink.numbers(ys)]
        axes.update_datalim(spots)
        axes.autoscale_view()
        label = curve.label if has_rows or curve.metric != "reward/total" else "reward"
        handles.append(Line2D([], [], color=color, linestyle=curve.dash, marker=curve.marker,
                              markersize=4.5, linewidth=2))
        labels.append(label)
        told.append(f"{label} {_from_to(points or marks, panel.share)}")
    if not labels:
        return None
    if has_marks:
        handles.append(Line2D([], [], color=ink.MUTED, linestyle="none", marker="o", markersize=7,
                              markerfacecolor=ink.PAPER, markeredgewidth=1.6))
        labels.append("held out")
    _finish(axes, panel.share)
    ink.legend(figure, handles, labels)
    caption = _caption(pools, has_rows, has_marks)
    return ink.draw(panel.name, panel.title, caption, f"{panel.title}: {'; '.join(told)}.", figure)


def _caption(pools: Sequence[Sequence[int]], has_rows: bool, has_marks: bool) -> str:
    parts = ["Means over training completions."]
    if has_rows:
        parts.append("Bands: 95% bootstrap intervals over prompts.")
    parts.append(_pooling(pools))
    if has_marks:
        parts.append("Hollow marks: held-out prompts, with 95% intervals.")
    return " ".join(filter(None, parts))


def _pooling(pools: Sequence[Sequence[int]]) -> str:
    size = len(pools[0]) if pools else 1
    return f"Each point pools {size} neighbouring steps." if size > 1 else ""


def _points(found: Iterable[tuple[float, Mapping[str, Estimate]]],
            measure: str) -> list[tuple[float, float, float, float]]:
    """(x, value, low, high) where there is a value."""
    picked = [(x, f[measure]) for x, f in found if measure in f]
    return [(x, e.value, e.low, e.high) for x, e in picked if math.isfinite(e.value)]


def _line(axes: Axes, points: Sequence[tuple[float, float, float, float]], color: str,
          marker: str, dash: Any, alone: Transform) -> None:
    """A curve and its band; a single point and its interval, which have a place of their own."""
    x, value, low, high = np.array(points, float).T
    if len(x) == 1:
        axes.plot(x, value, marker, color=color, markersize=7, zorder=3, transform=alone)
        axes.plot([x[0], x[0]], [low[0], high[0]], color=color, linewidth=4, alpha=0.35,
                  transform=alone)
        return
    axes.plot(x, value, color=color, linestyle=dash, linewidth=2, zorder=3, marker=marker,
              markersize=4.5, markevery=max(1, len(x) // 6))
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def _from_to(points: Sequence[tuple[float, float, float, float]], share: bool) -> str:
    form = "{:.0%}" if share else "{:.3g}"
    first, last = form.format(points[0][1]), form.format(points[-1][1])
    if len(points) == 1:
        return f"{first} at step {points[0][0]:g}"
    return f"from {first} at step {points[0][0]:g} to {last} at step {points[-1][0]:g}"


def _finish(axes: Axes, share: bool, x: str = "GRPO step") -> None:
    ink.ticks(axes.xaxis, 6, integer=True)
    if share:
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    else:
        low, high = axes.get_ylim()
        if high - low < 1e-3:  # a flat line: no axis in units of 1e-18
            axes.set_ylim(low - 0.05, high + 0.05)
        ink.ticks(axes.yaxis, 6)
    ink.says(axes, x)


def _spread(rows: Sequence[Row], pools: Sequence[Sequence[int]]) -> Picture | None:
    """How differently the completions of a step fare: quantiles of their social welfare."""
    valid = [row for row in rows if row["valid"]]
    points = [
        (float(np.mean(pool)), *np.quantile([social_welfare(row) for row in part], QUANTILES))
        for pool, part in zip(pools, by_pool(valid, pools), strict=True) if part
    ]
    if not points:
        return None
    figure, axes = ink.panel()
    x, lowest, low, middle, high, highest = np.array(points).T
    color = ink.PALETTE["social"]
    for below, above, alpha in ((lowest, highest, 0.14), (low, high, 0.28)):
        if len(x) == 1:
            axes.plot([x[0], x[0]], [below[0], above[0]], color=color, linewidth=9, alpha=alpha,
                      solid_capstyle="butt")
        else:
            axes.fill_between(x, below, above, color=color, alpha=alpha, linewidth=0)
    axes.plot(x, middle, color=color, linewidth=2, marker="D", markersize=4.5,
              markevery=max(1, len(x) // 6))
    _finish(axes, share=False)
    handles = [Line2D([], [], color=color, linewidth=2, marker="D", markersize=4.5),
               Patch(color=color, alpha=0.42, linewidth=0), Patch(color=color, alpha=0.14,
                                                                  linewidth=0)]
    ink.legend(figure, handles, ["median", "25–75%", "10–90%"])
    title = "Spread of social welfare over completions"
    caption = f"Quantiles over the training completions of a step. {_pooling(pools)}".strip()
    alt = (f"{title}: the median goes from {middle[0]:.3g} to {middle[-1]:.3g}, the range from "
           f"10% to 90% is {lowest[0]:.3g} to {highest[0]:.3g} at first and {lowest[-1]:.3g} to "
           f"{highest[-1]:.3g} at last.")
    return ink.draw("welfare_spread", title, caption, alt, figure)


def _scalar(rows: Sequence[Row], name: str, stage: str, metric: str, title: str) -> Picture | None:
    chosen = [row for row in rows if row["stage"] == stage and ink.numbers([row.get(metric)])]
    if not chosen:
        return None
    figure, axes = ink.panel(2.6)
    pools = pooled(row["step"] for row in chosen)
    points = [(float(np.mean(pool)), float(np.mean([row[metric] for row in part])), math.nan,
               math.nan) for pool, part in zip(pools, by_pool(chosen, pools), strict=True)]
    _line(axes, points, ink.PALETTE["social"], "o", SOLID, axes.transData)
    _finish(axes, False, "GRPO step" if stage == "grpo" else "cold start step")
    return ink.draw(name, title, _pooling(pools), f"{title}: {_from_to(points, False)}.", figure)


def shares_by_pool(rows: Sequence[Row], pools: Sequence[Sequence[int]]) -> np.ndarray:
    """Share of each of `KINDS` among the rows of each pool [pools, kinds]; NaN without rows."""
    found = np.full((len(pools), len(KINDS)), math.nan)
    for i, part in enumerate(by_pool(rows, pools)):
        counts = Counter(row["response_kind"] or UNREADABLE for row in part)
        if part:
            found[i] = [counts[kind] / len(part) for kind in KINDS]
    return found


def _actions(request: str, rows: Sequence[Row], pools: Sequence[Sequence[int]]) -> Picture:
    pooling = _pooling(pools).replace("point", "bar")
    shares = shares_by_pool(rows, pools)
    known = np.isfinite(shares[:, 0])  # a step may have no such prompt
    pools = [pool for pool, is_known in zip(pools, known, strict=True) if is_known]
    share = dict(zip(KINDS, shares[known].T, strict=True))
    wanted = [kind for kind in KINDS if kind in RIGHT_KINDS[request]]
    order = [*wanted, *(kind for kind in KINDS if kind not in wanted)]
    x = np.array([(pool[0] + pool[-1]) / 2 for pool in pools])
    width = np.array([0.94 * (pool[-1] - pool[0] + 1) for pool in pools])
    figure, axes = ink.panel()
    handles: list[Artist] = []
    labels, base = [], np.zeros(len(pools))
    for kind in order:
        if not np.any(share[kind] > 0):
            continue
        # Bars, not areas: a single step is seen, too, and a step without such prompts is a gap.
        look = dict(facecolor=ink.PALETTE[kind], hatch=KIND_HATCHES[kind],
                    edgecolor=ink.PAPER, linewidth=0.5)
        axes.bar(x, share[kind], width, base, **look)
        base = base + share[kind]
        handles.append(Patch(**look))
        labels.append(("✓ " if kind in wanted else "") + KIND_LABELS[kind])
    right = sum(share[kind] for kind in wanted)
    axes.hlines(right, x - width / 2, x + width / 2, color=ink.INK, linewidth=2.4, zorder=4)
    _finish(axes, share=True)
    ink.legend(figure, handles, labels)
    title = f"What is done on {request} requests"
    names = " or ".join(f"“{KIND_LABELS[kind]}”" for kind in wanted)
    caption = " ".join(filter(None, (
        f"Share of training completions; ✓ and below the thick line: what serves both sides, "
        f"{names}.", pooling)))
    alt = f"{title}: {names} goes from {right[0]:.0%} to {right[-1]:.0%}."
    return ink.draw(f"actions_{request}", title, caption, alt, figure)
