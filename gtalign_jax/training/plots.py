"""What a run looks like afterwards: curves over the GRPO steps, and the table of its stages.

    metrics.jsonl + results.json  ->  welfare.png
    {stage: {metric: value}}      ->  results.json, results.md, text for the console

Curves are of training prompts; dashed lines are the cold start on held-out prompts, where it was
evaluated, and dots the evaluations of the trained policy. Colours are the same in every panel.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gtalign_jax.model.safetensors_io import read_json
from gtalign_jax.training.files import write_whole
from gtalign_jax.training.metrics import METRICS_FILE, read_rows

RESULTS_FILE = "results.json"
BEFORE, COLD_START, AFTER = "before cold start", "after cold start", "after GRPO"
STAGES = (BEFORE, COLD_START, AFTER)

INK, MUTED, GRID = "#1f2328", "#6e7781", "#e6e8eb"
REWARD, USER, LLM, FORMAT, ACTION, LENGTH = (
    "#111827", "#2563eb", "#d97706", "#0f766e", "#9333ea", "#475569",
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a panel: a metric, its label and colour, and the weight of its stroke."""

    name: str
    label: str
    color: str
    width: float = 1.8


@dataclasses.dataclass(frozen=True)
class Panel:
    """A plot: its title, and the curves that share its axis; `share` panels run from 0 to 1."""

    title: str
    curves: tuple[Curve, ...]
    share: bool = False


PANELS = (
    Panel("Mutual welfare", (
        Curve("reward/total", "reward √(U·L)", REWARD, 2.4),
        Curve("welfare/user", "user U", USER),
        Curve("welfare/llm", "LLM L", LLM),
    )),
    Panel("Behaviour (share of completions)", (
        Curve("reward/format", "well-formed chain", FORMAT),
        Curve("reward/right_action", "right kind of action", ACTION),
    ), share=True),
    Panel("Completion length (tokens)", (Curve("rollout/length", "tokens", LENGTH),)),
)

METRICS = (  # metric, label, format, scale: the rows of the final table
    ("reward/total", "social welfare √(U·L)", "{:.3f}", 1),
    ("welfare/user", "user welfare U", "{:.3f}", 1),
    ("welfare/llm", "LLM welfare L", "{:.3f}", 1),
    ("reward/format", "well-formed chain", "{:.1f}%", 100),
    ("reward/right_action", "right kind of action", "{:.1f}%", 100),
    ("rollout/length", "completion tokens", "{:.1f}", 1),
    ("rollout/truncated", "cut at the limit", "{:.1f}%", 100),
)


def welfare_curves(workdir: str | Path, stage: str = "grpo") -> Path:
    """Draws `workdir`/welfare.png from the rows of `stage` in metrics.jsonl; returns its path.

    Raises ValueError where there is no such row.
    """
    workdir = Path(workdir)
    rows = read_rows(workdir / METRICS_FILE, stage=str, step=int)
    rows = [row for row in rows if row["stage"] == stage]
    if not rows:
        raise ValueError(f"{workdir / METRICS_FILE} holds no row of stage {stage!r} to draw")
    results = read_results(workdir)
    panels = [p for p in PANELS if any(_series(rows, c.name)[0].size for c in p.curves)]
    figure = Figure(figsize=(4.6 * len(panels) + 0.4, 3.9), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _draw(axes, panel, rows, results)
    figure.tight_layout(pad=1.2, w_pad=2.0)
    path = workdir / "welfare.png"
    canvas.print_figure(path)
    return path


def save_results(workdir: str | Path, results: Mapping[str, Mapping[str, float]]) -> str:
    """Writes results.json and results.md; returns the table as text for the console."""
    workdir = Path(workdir)
    clean = {  # null is how a number that is not finite was saved before
        stage: {k: math.nan if v is None else float(v) for k, v in row.items()}
        for stage, row in results.items()
    }
    finite = {
        stage: {k: v if math.isfinite(v) else None for k, v in row.items()}
        for stage, row in clean.items()
    }
    write_whole(workdir / RESULTS_FILE, json.dumps(finite, indent=2) + "\n")
    write_whole(workdir / "results.md", final_table(clean, markdown=True))
    return final_table(clean)


def read_results(workdir: str | Path) -> dict[str, dict[str, float]]:
    """What `save_results` wrote; empty where a run has not evaluated anything yet.

    Raises ValueError for a file that holds anything else.
    """
    path = Path(workdir) / RESULTS_FILE
    if not path.exists():
        return {}
    results = read_json(path)
    numbers = [value for row in results.values()
               for value in (row.values() if isinstance(row, dict) else ["no row"])]
    if not all(value is None or type(value) in (int, float) for value in numbers):
        raise ValueError(
            f"{path}: expected {{evaluation: {{metric: number or null}}}}; delete the file, and "
            "the run evaluates anew"
        )
    return results


def final_table(results: Mapping[str, Mapping[str, float]], *, markdown: bool = False) -> str:
    """Metrics down, stages across, and the change from cold start to GRPO.

    `results`: {stage: {metric: value}}. The stages of `STAGES` come first, others as given. Metrics
    without a label of their own follow by name: in the console table only each source's reward, in
    markdown all.
    """
    stages = [s for s in STAGES if s in results] + [s for s in results if s not in STAGES]
    known = {name for name, *_ in METRICS}
    others = sorted({name for row in results.values() for name in row} - known)
    if not markdown:
        others = [name for name in others if name.startswith("source/")]
    rows = [m for m in METRICS if any(m[0] in results[s] for s in stages)]
    rows += [(name, name, "{:.3f}", 1) for name in others]
    has_change = COLD_START in results and AFTER in results
    cells = [["held-out prompts", *stages, *(["change"] if has_change else [])]]
    for name, label, form, scale in rows:
        values = [results[stage].get(name) for stage in stages]
        cells.append([label, *(_shown(v, form, scale) for v in values)])
        if has_change:
            before, after = (results[s].get(name) for s in (COLD_START, AFTER))
            cells[-1].append(_change(before, after, form, scale))
    return _markdown(cells) if markdown else _plain(cells)


def _draw(axes: Axes, panel: Panel, rows: Sequence[Mapping[str, Any]],
          results: Mapping[str, Mapping[str, float]]) -> None:
    cold = results.get(COLD_START, {})
    after = results.get(AFTER, {})
    last = max(row["step"] for row in rows)
    for curve in panel.curves:
        steps, values = _series(rows, curve.name)
        if not steps.size:
            continue
        smooth = _smooth(values)
        axes.plot(steps, values, color=curve.color, linewidth=0.8, alpha=0.28)
        axes.plot(steps, smooth, color=curve.color, linewidth=curve.width, label=curve.label,
                  marker="o" if len(steps) == 1 else None)
        if cold.get(curve.name) is not None:
            axes.axhline(cold[curve.name], color=curve.color, linewidth=1.1, linestyle=(0, (4, 3)))
        if after.get(curve.name) is not None:
            axes.plot([last], [after[curve.name]], "o", color=curve.color, markersize=5.5,
                      markeredgecolor="white", clip_on=False, zorder=5)
    handles, labels = axes.get_legend_handles_labels()
    if cold:
        handles.append(axes.plot([], [], color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)))[0])
        labels.append("cold start, held out")
    if after:
        handles.append(axes.plot([], [], "o", color=MUTED, markersize=5.5)[0])
        labels.append("after GRPO, held out")
    _style(axes, panel, handles, labels)


def _style(axes: Axes, panel: Panel, handles: list[Any], labels: list[str]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel("GRPO step", fontsize=9, color=MUTED)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.share:
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    else:
        low, high = axes.get_ylim()
        if high - low < 1e-3:  # a flat line: no axis in units of 1e-18
            high = low + 0.1
        axes.set_ylim(max(0.0, low - 0.05 * (high - low)), high + 0.05 * (high - low))
    axes.legend(handles, labels, fontsize=8, frameon=False, labelcolor=INK, ncols=2,
                loc="upper left", bbox_to_anchor=(-0.02, -0.19), borderaxespad=0.0)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows where `name` was measured and finite."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, float), np.asarray(values, float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a twelfth of the run; shorter windows at both ends."""
    half = len(values) // 24
    return np.array([
        values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))
    ])


def _shown(value: float | None, form: str, scale: float) -> str:
    return "–" if value is None or not math.isfinite(value) else form.format(value * scale)


def _change(before: float | None, after: float | None, form: str, scale: float) -> str:
    """The difference, in points for a percentage, and its share of `before` elsewhere."""
    if before is None or after is None or not math.isfinite(after - before):
        return "–"
    signed = form.replace("{:", "{:+").format((after - before) * scale)
    if scale == 100:
        return signed.replace("%", " pt")
    return f"{signed} ({(after - before) / before:+.0%})" if before > 0 else signed


def _plain(cells: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    rule = "─" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:]])


def _markdown(cells: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]]]
    return "\n".join(lines) + "\n"
