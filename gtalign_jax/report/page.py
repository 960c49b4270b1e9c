"""A run's data as one HTML page, its numbers as JSON and CSV, its figures as PNG.

    RunData -> numbers -> tables, words, pictures -> template.html.j2 -> report.html

The page needs no network and runs no script; its policy forbids both, so that even a completion
that got past the escaping could load and do nothing. Every text goes through jinja2's autoescape;
only the SVG of our own figures is passed on as it is.
"""

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gtalign_jax.evaluation import tables
from gtalign_jax.evaluation.measures import BY_NAME, OVERALL, Estimates, social_welfare
from gtalign_jax.report import examples, figures, numbers, page_tables, words
from gtalign_jax.report.ink import Picture
from gtalign_jax.report.load import RunData
from gtalign_jax.training.files import write_whole
from gtalign_jax.training.metrics import jsonable

PAGE, JSON = "report.html", "report.json"
TILES = ("social_welfare", "user_welfare", "llm_welfare", "answer", "format", "right_action")
IN_ONE_UNIT = ("social_welfare", "user_welfare", "llm_welfare", "answer", "consistency",
               "matrix_quality")  # fmt: skip

# What no HTML document may hold: half a surrogate pair, and control characters.
_UNFIT = re.compile("[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is written: the page, the numbers, {file name: text} of tables, the pictures."""

    html: str
    numbers: Mapping[str, Any]
    tables: Mapping[str, str]
    pictures: Sequence[Picture]


def compose(data: RunData) -> Report:
    """The whole report in memory; nothing is written."""
    found, estimated = numbers.gather(data)
    sections = pictures(data, estimated, found["labels"])
    before, after = found["labels"]["before"], found["labels"]["after"]
    chosen = examples.choose(
        data.groups.get(before, ()) if before else (), data.groups.get(after, ())
    )
    paragraphs = words.summary(found, data.config)
    whole = {
        "name": data.directory.resolve().name,
        "summary": [{"about": about, "text": text} for about, text in paragraphs],
        **found,
        "examples": [_in_numbers(example) for example in chosen],
    }
    html = _environment().get_template("template.html.j2").render(
        name=whole["name"],
        numbers=found,
        summary=paragraphs,
        tiles=tiles(found),
        tables={
            "measures": page_tables.measures(found),
            "sources": page_tables.by_source(found),
            "actions": page_tables.actions(found),
            "pareto": page_tables.pareto(found) + page_tables.against(found),
            "cost": page_tables.cost(found),
        },
        pictures=sections,
        examples=[(example, *_sides(example)) for example in chosen],
        config=data.config,
        info=data.info,
    )
    return Report(
        html=_UNFIT.sub("\ufffd", html.lstrip()),
        numbers=jsonable(whole),
        tables=_csv_files(found, estimated),
        pictures=[picture for part in sections.values() for picture in part],
    )


def save(report: Report, directory: Path) -> Path:
    """Writes everything, the page last, each file whole or not at all; returns the page's path."""
    for folder in ("figures", "tables"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for picture in report.pictures:
        path = directory / "figures" / f"{picture.name}.png"
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(picture.png)
        os.replace(partial, path)
    for name, text in report.tables.items():
        write_whole(directory / "tables" / name, text)
    text = json.dumps(report.numbers, indent=2, allow_nan=False)
    write_whole(directory / JSON, text + "\n")
    write_whole(directory / PAGE, report.html)
    return directory / PAGE


def pictures(data: RunData, estimated: Mapping[str, Estimates],
             labels: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """{section of the page: its figures}; a section without data has none."""
    pair = {label: data.groups[label] for label in (labels["before"], labels["after"]) if label}
    shown = {label: estimated[label] for label in labels["shown"]}
    overall = {label: found[OVERALL] for label, found in estimated.items()}
    points = {
        label: [(row["user_welfare"], row["llm_welfare"]) for row in rows if row["valid"]]
        for label, rows in pair.items()
    }
    matrices = {
        label: [row["payoff"] for row in rows if row["valid"]] for label, rows in pair.items()
    }
    several = len({source for found in shown.values() for source in found}) > 2
    return {
        "measures": _drawn([
            figures.measure_bars({label: found[OVERALL] for label, found in shown.items()},
                                 [BY_NAME[name] for name in IN_ONE_UNIT]) if shown else None,
            figures.source_bars(shown, BY_NAME["social_welfare"]) if several else None,
        ]),
        "curves": _drawn([
            *figures.learning_curves(data.metrics, data.rollouts, overall),
            *figures.hacking_signs(data.metrics),
        ]),
        "plane": _drawn([figures.welfare_plane(points)]),
        "payoffs": _drawn(figures.payoff_heat_maps(matrices)),
        "actions": _drawn(figures.action_shares(data.rollouts)),
        "lengths": _drawn(figures.length_histograms(pair)),
    }


def tiles(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The few numbers on top: {"label", "now", "before", "change", "verdict"} each."""
    before, after = found["labels"]["before"], found["labels"]["after"]
    if after is None:
        return []
    out = []
    for name in TILES:
        measure, now = BY_NAME[name], found["measures"][after].get(OVERALL, {}).get(name)
        if now is None or now["value"] is None:
            continue
        then = found["measures"][before].get(OVERALL, {}).get(name) if before else None
        pair = (found["paired"] or {}).get("differences", {}).get(OVERALL, {}).get(name)
        change = page_tables.difference(measure, pair)
        out.append({
            "label": measure.label, "now": measure.shown(now["value"]),
            "before": measure.shown(then["value"]) if then and then["value"] is not None else "",
            "change": change if pair else None,
        })
    return out


def _drawn(found: Iterable[Picture | None]) -> list[Picture]:
    return [picture for picture in found if picture is not None]


def _environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("gtalign_jax.report", "."),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )
    env.filters |= {
        "cut": examples.Cut.of,
        "number": lambda value: "–" if value is None else f"{value:.3g}",
        "pretty": lambda tree: json.dumps(tree, indent=2, ensure_ascii=False),
        "signed": lambda value: f"{value:+.3f}".replace("-", "−") if value else "unchanged",
        "svg": lambda picture: Markup(picture.svg),
    }
    return env


def _sides(example: examples.Example) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    before = None if example.before is None else examples.shown(example.before)
    return before, examples.shown(example.after)


def _in_numbers(example: examples.Example) -> dict[str, Any]:
    """An example as report.json names it: which completion, and its welfare on both sides."""
    row = example.after
    return {
        "why": example.why, "id": row["id"], "sample": row["sample"],
        "data_source": row["data_source"],
        "social_welfare": {
            "before": None if example.change is None else social_welfare(example.before),
            "after": social_welfare(row),
        },
    }


def _csv_files(found: Mapping[str, Any], estimated: Mapping[str, Estimates]) -> dict[str, str]:
    files = {"measures.csv": tables.csv_text(estimated)} if estimated else {}
    rows = [
        (label, request, response, n)
        for label, table in found["actions"].items()
        for request, counts in table.items() for response, n in counts.items()
    ]
    if rows:
        files["actions.csv"] = _csv(("label", "request", "response", "completions"), rows)
    if found["paired"]:
        pair = found["paired"]["differences"]
        fields = list(next(iter(pair[OVERALL].values()), {}))
        files["paired.csv"] = _csv(("source", "measure", *fields), [
            (source, name, *values.values())
            for source, measures in pair.items() for name, values in measures.items()
        ])
    if found["pareto"]:
        files["pareto.csv"] = _csv(("measure", "before", "after"), [
            (key, found["pareto"][key]["file1"], found["pareto"][key]["file2"])
            for key, *_ in page_tables.PARETO
        ])
    seconds = [
        (stage, phase, value)
        for stage, phases in found["cost"]["seconds"].items() for phase, value in phases.items()
    ]
    if seconds:
        files["seconds.csv"] = _csv(("stage", "phase", "seconds"), seconds)
    return files


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """None, the number that does not exist, becomes an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([head, *rows])
    return out.getvalue()
