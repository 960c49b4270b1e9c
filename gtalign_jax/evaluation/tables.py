"""Estimates as tables: for a terminal, as markdown, CSV and JSON.

    {label: rows}  ->  measures.md, measures.csv, measures.json, text for the console

A label is what was evaluated ("after GRPO"); `measures.estimates` makes the numbers. In files a
number that does not exist is empty (CSV) or null (JSON).
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gtalign_jax.evaluation.measures import (
    BY_NAME,
    MEASURES,
    OVERALL,
    Estimate,
    Estimates,
    Measure,
    Row,
    action_table,
    estimates,
)
from gtalign_jax.training.files import write_whole
from gtalign_jax.training.metrics import jsonable

BY_SOURCE = (  # the columns of the tables by source: the paper's
    "format", "answer", "user_welfare", "llm_welfare", "social_welfare", "tokens",
    "answer_per_1000_tokens", "right_action",
)  # fmt: skip
FIELDS = ("label", "source", "measure", "value", "low", "high", "count", "prompts")

Groups = Mapping[str, Estimates]


def save(directory: Path, rows_by_label: Mapping[str, Sequence[Row]], seed: int = 0) -> Groups:
    """Writes measures.{md,csv,json} of what was evaluated into `directory`; returns the numbers."""
    groups = {label: estimates(rows, seed=seed) for label, rows in rows_by_label.items()}
    actions = {label: action_table(rows) for label, rows in rows_by_label.items()}
    for name, text in (
        ("measures.md", markdown(groups, actions)),
        ("measures.csv", csv_text(groups)),
        ("measures.json", json.dumps({
            "measures": as_json(groups), "actions": actions,
        }, indent=2, ensure_ascii=False) + "\n"),
    ):
        write_whole(directory / name, text)
    return groups


def shown(estimate: Estimate, measure: Measure) -> str:
    """"0.766 [0.751, 0.780]"; without brackets where there is no interval."""
    text = measure.shown(estimate.value)
    if not math.isfinite(estimate.low):
        return text
    return f"{text} [{measure.shown(estimate.low)}, {measure.shown(estimate.high)}]"


def used(groups: Groups, source: str = OVERALL) -> list[Measure]:
    """The measures that have a value in some group, in their order."""
    return [
        m for m in MEASURES
        if any(math.isfinite(group[source][m.name].value) for group in groups.values()
               if group.get(source))
    ]


def overall_cells(groups: Groups, source: str = OVERALL) -> list[list[str]]:
    """Measures down, labels across, with a head."""
    cells = [["measure", *groups]]
    for m in used(groups, source):
        values = (group.get(source, {}).get(m.name) for group in groups.values())
        cells.append([m.label, *("–" if v is None else shown(v, m) for v in values)])
    return cells


def source_cells(groups: Groups) -> list[list[str]]:
    """A row for each source and label, `BY_SOURCE` across, with a head."""
    columns = [BY_NAME[name] for name in BY_SOURCE]
    cells = [["source", "", *(m.label for m in columns)]]
    for source in sources(groups):
        for label, group in groups.items():
            if source in group:
                cells.append([source, label, *(shown(group[source][m.name], m) for m in columns)])
    return cells


def sources(groups: Groups) -> list[str]:
    """All data sources of all groups, sorted."""
    return sorted({source for group in groups.values() for source in group} - {OVERALL})


def action_cells(actions: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[list[str]]:
    """Kinds of request down for each label, kinds of response across, as shares of the row."""
    cells: list[list[str]] = []
    for label, table in actions.items():
        for request, counts in table.items():
            if not cells:
                cells.append(["request", "", *(kind.replace("_", " + ") for kind in counts), "n"])
            total = sum(counts.values())
            cells.append([request, label, *(f"{n / total:.1%}" for n in counts.values()),
                          str(total)])
    return cells


def console(groups: Groups, width: int = 160) -> str:
    """The overall table, and each source's social welfare, for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = overall_cells(groups)
    for source in sources(groups) if len(sources(groups)) > 1 else ():
        values = (group.get(source, {}).get("social_welfare") for group in groups.values())
        cells.append([f"social welfare, {source}", *(
            "–" if v is None else shown(v, BY_NAME["social_welfare"]) for v in values)])
    for i, name in enumerate(cells[0]):
        table.add_column(Text(name), justify="right" if i else "left")
    for row in cells[1:]:
        table.add_row(*map(Text, row))
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def markdown(groups: Groups, actions: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """All tables: overall, by source, and what was done on which kind of request."""
    parts = ["95 % intervals: bootstrap over prompts, within each source.",
             markdown_table(overall_cells(groups))]
    if len(sources(groups)) > 1:
        parts.append(markdown_table(source_cells(groups)))
    if any(actions.values()):
        parts.append("What was done, as shares of the requests of a kind:")
        parts.append(markdown_table(action_cells(actions)))
    return "\n\n".join(parts) + "\n"


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the head; numbers to the right."""
    plain = [[cell.replace("|", "\\|").replace("\n", " ").strip() for cell in row] for row in cells]
    rule = ["---", *["---:"] * (len(plain[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (plain[0], rule, *plain[1:]))


def csv_text(groups: Groups) -> str:
    """One line for each label, source and measure: value, interval, rows and prompts."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for label, group in groups.items():
        for source, found in group.items():
            for name, e in found.items():
                numbers = (v if math.isfinite(v) else "" for v in (e.value, e.low, e.high))
                writer.writerow([label, source, name, *numbers, e.count, e.prompts])
    return out.getvalue()


def as_json(groups: Groups) -> dict[str, Any]:
    """{label: {source: {measure: {value, low, high, count, prompts}}}}, null for NaN."""
    return jsonable(groups)
