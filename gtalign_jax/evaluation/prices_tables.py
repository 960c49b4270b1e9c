"""A study of prices as tables: cells of text for a terminal, markdown and CSV."""

import csv
import io
import math

from gtalign_jax.evaluation.measures import OVERALL
from gtalign_jax.evaluation.paired import SIGNIFICANT, Difference
from gtalign_jax.evaluation.prices import BY_KIND, MEASURES, Study
from gtalign_jax.evaluation.tables import action_cells, markdown_table, shown

Cells = list[list[str]]
FIELDS = ("pricing", "requests", "measure", "value", "low", "high", "count", "prompts")
BY_NAME = {measure.name: measure for measure in MEASURES}


def tables(study: Study) -> dict[str, Cells]:
    """{title: cells, the first row a head}; titles are sentences."""
    out = {
        "At each price, all requests. 95 % intervals: bootstrap over prompts, within each source.":
            _overall(study),
        "By kind of request.": _by_kind(study),
        "What was done, as shares of the requests of a kind.": action_cells(study.actions),
    }  # fmt: skip
    if study.differences:
        out["Against the first price, prompt by prompt. * adjusted p < 0.05 (Holm, over all)."] = (
            _differences(study))
    if any(study.unsteered.values()):
        out["Where nothing was forced, and why."] = [
            ["pricing", "completions", "reason"],
            *([name, str(count), reason] for name, reasons in study.unsteered.items()
              for reason, count in reasons.items()),
        ]  # fmt: skip
    if study.turned_back:
        out["From each price of the sweep to the next: completions that went back."] = [
            ["pricing", "chosen action takes more tokens", "asks back anew", "completions"],
            *([name, str(n["choice"]), str(n["asks_back"]), str(n["of"])]
              for name, n in study.turned_back.items()),
        ]
    return out


def _overall(study: Study) -> Cells:
    return [["measure", *study.estimates]] + [
        [m.label, *(shown(found[OVERALL][m.name], m) for found in study.estimates.values())]
        for m in MEASURES
    ]


def _by_kind(study: Study) -> Cells:
    columns = [BY_NAME[name] for name in BY_KIND]
    kinds = list(dict.fromkeys(k for found in study.estimates.values() for k in found))
    return [["requests", "", *(m.label for m in columns)]] + [
        [kind, name, *(shown(found[kind][m.name], m) for m in columns)]
        for kind in kinds if kind != OVERALL
        for name, found in study.estimates.items() if kind in found
    ]


def _differences(study: Study) -> Cells:
    return [["measure", *study.differences]] + [
        [m.label, *(_difference(found.get(m.name), m.scale, m.form)
                    for found in study.differences.values())]
        for m in MEASURES
    ]


def _difference(d: Difference | None, scale: float, form: str) -> str:
    if d is None:
        return "–"
    form = form.replace("{:", "{:+")
    ends = "" if math.isnan(d.low) else (
        f" [{form.format(d.low * scale)}, {form.format(d.high * scale)}]")
    return form.format(d.difference * scale) + ends + (
        " *" if d.p_adjusted < SIGNIFICANT else "")


def markdown(study: Study) -> str:
    """All tables under their titles."""
    parts = [f"{title}\n\n{markdown_table(cells)}" for title, cells in tables(study).items()]
    return "\n\n".join(parts) + "\n"


def csv_text(study: Study) -> str:
    """One line for each price, kind of request and measure: value, interval, rows and prompts."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for name, by_kind in study.estimates.items():
        for kind, found in by_kind.items():
            for measure, e in found.items():
                numbers = (v if math.isfinite(v) else "" for v in (e.value, e.low, e.high))
                writer.writerow([name, kind, measure, *numbers, e.count, e.prompts])
    return out.getvalue()
