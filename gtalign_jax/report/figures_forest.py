"""Points with intervals, one line each: measures of several labels beneath each other."""

from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D

from gtalign_jax.evaluation.measures import OVERALL, Estimate, Measure
from gtalign_jax.report import ink
from gtalign_jax.report.ink import Picture

ForestRow = tuple[str, str, float, float, float]
LINE, HEADING = 0.22, 0.26  # inches: of a point, of the label above its points


def forest(name: str, title: str, rows: Sequence[ForestRow], *, caption: str = "",
           form: str = "{:.3f}", scale: float = 1, x: str = "") -> Picture | None:
    """Rows of the same label stand together below it; colour, marker and dash tell the groups.

    Args:
      rows: (label, group, value, low, high). Without a finite value a row is left out; without a
        finite interval only its point is drawn.
      form, scale: how the value at the right end is printed; the axis has the same scale.
      x: what the axis is called.
    """
    groups = list(dict.fromkeys(row[1] for row in rows))
    kept = [row for row in rows if ink.numbers([row[2]])]
    if not kept:
        return None
    labels = list(dict.fromkeys(row[0] for row in kept))
    height = 0.9 + HEADING * len(labels) + LINE * len(kept)
    figure, axes = ink.panel(height)
    ink.quiet(axes, grid="x")
    y = 0.0
    for label in labels:
        axes.text(0, y, ink.short(label, 42), transform=axes.get_yaxis_transform(), va="center",
                  fontsize=ink.TEXT, color=ink.INK, clip_on=False).set_in_layout(False)
        y += 0.5 * (HEADING + LINE)
        for _, group, value, low, high in (row for row in kept if row[0] == label):
            look = ink.style(groups.index(group))
            ends = [scale * end for end in ink.numbers((low, high))]
            if len(ends) == 2:
                axes.plot(ends, [y, y], color=look.color, linewidth=2, solid_capstyle="butt")
            axes.plot([scale * value], [y], look.marker, color=look.color, markersize=7,
                      markeredgecolor=ink.PAPER)
            axes.text(1.02, y, form.format(scale * value), transform=axes.get_yaxis_transform(),
                      va="center", fontsize=ink.SMALL, color=ink.INK, clip_on=False)
            y += LINE
        y += 0.5 * (HEADING - LINE) + 0.04
    axes.set(ylim=(y - 0.1, -0.16), yticks=[])
    ink.ticks(axes.xaxis, 5)
    axes.margins(x=0.08)
    ink.says(axes, x)
    shown = [group for group in groups if any(row[1] == group for row in kept)]
    if len(shown) > 1:
        looks = [ink.style(groups.index(group)) for group in shown]
        handles = [Line2D([], [], color=k.color, marker=k.marker, markersize=7, linewidth=2)
                   for k in looks]
        ink.legend(figure, handles, [ink.short(group) for group in shown])
    told = "; ".join(
        f"{ink.short(label)}, {ink.short(group)}: {form.format(scale * value)}"
        + (f" ({form.format(scale * low)} to {form.format(scale * high)})"
           if len(ink.numbers((low, high))) == 2 else "")
        for label, group, value, low, high in kept
    )
    return ink.draw(name, title, caption, f"{title}. {told}.", figure)


def measure_bars(groups: Mapping[str, Mapping[str, Estimate]], measures: Sequence[Measure],
                 name: str = "measures", title: str = "Measures with 95% intervals",
                 ) -> Picture | None:
    """A line per measure and label; the measures should be of one unit.

    Args:
      groups: {label: {measure name: Estimate}}.
    """
    rows = [
        (measure.label.strip(), label, e.value, e.low, e.high)
        for measure in measures
        for label, found in groups.items() if (e := found.get(measure.name)) is not None
    ]
    first = measures[0] if measures else None
    return forest(name, title, rows, caption=_INTERVALS, form=first.form if first else "{:.3f}",
                  scale=first.scale if first else 1)


def source_bars(groups: Mapping[str, Mapping[str, Mapping[str, Estimate]]], measure: Measure,
                ) -> Picture | None:
    """One measure: a line per data source and label, the overall value first.

    Args:
      groups: {label: {"overall" or source: {measure name: Estimate}}}.
    """
    sources = sorted({source for found in groups.values() for source in found} - {OVERALL})
    rows = [
        (source, label, e.value, e.low, e.high)
        for source in (OVERALL, *sources)
        for label, found in groups.items()
        if (e := found.get(source, {}).get(measure.name)) is not None
    ]
    what = measure.label.strip()
    return forest(f"by_source_{measure.name}", f"{what[0].upper()}{what[1:]}, by data source", rows,
                  caption=_INTERVALS, form=measure.form, scale=measure.scale)


_INTERVALS = "Lines: 95% bootstrap intervals over prompts."
