"""The tables of a report page, as cells of text.

    numbers  ->  [Table]      measures, by source, behaviour, actions, Pareto, cost

A cell has the number, below it its interval or count, and where there is one a verdict in words:
no table says anything by colour alone. The HTML is made of these by the template.
"""

import dataclasses
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax.evaluation import pareto as pareto_lib
from gtalign_jax.evaluation.measures import BY_NAME, MEASURES, OVERALL, Measure
from gtalign_jax.evaluation.tables import BY_SOURCE
from gtalign_jax.report import words
from gtalign_jax.report.figures_time import KIND_LABELS
from gtalign_jax.reward.rules import RIGHT_KINDS

Numbers = Mapping[str, Any]
BEHAVIOUR = (
    "asks_when_ambiguous", "asks_when_definite", "harm", "plain_refusal", "constructive",
    "over_refusal",
)  # fmt: skip
STAGES = {"sft": "cold start", "grpo": "GRPO", "evaluate": "evaluation"}
MARKS = {"better": "▲ better", "worse": "▼ worse", "changed": "◆ changed"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number as text, what stands small below it, and a verdict: a key of `MARKS` or ""."""

    text: str
    below: str = ""
    verdict: str = ""

    @property
    def mark(self) -> str:
        return MARKS.get(self.verdict, "")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows are (head, cells); a head of two parts is (group, name), equal groups adjoining."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[Sequence[str], Sequence[Cell]]]
    note: str = ""

    def groups(self) -> list[tuple[str | None, list[tuple[str, Sequence[Cell]]]]]:
        """[(group or None, [(name, cells), …]), …]."""
        return [
            (group, [(head[-1], cells) for head, cells in rows])
            for group, rows in itertools.groupby(
                self.rows, key=lambda row: row[0][0] if len(row[0]) > 1 else None
            )
        ]


def measures(numbers: Numbers) -> list[Table]:
    """The overall measures, then what was done on requests of each kind."""
    main = [m for m in MEASURES if m.name not in BEHAVIOUR]
    behaviour = [BY_NAME[name] for name in BEHAVIOUR]
    return [table for table in (
        _overall(numbers, "measures", "All measures on held-out prompts", main),
        _overall(numbers, "behaviour", "Asking back and refusing", behaviour),
    ) if table.rows]


def _overall(numbers: Numbers, name: str, caption: str, chosen: Sequence[Measure]) -> Table:
    before, after = numbers["labels"]["before"], numbers["labels"]["after"]
    pair = [before, after] if before else []  # on a phone the first columns are what is seen
    others = [label for label in numbers["labels"]["shown"] if label not in pair]
    differences = (numbers["paired"] or {}).get("differences", {}).get(OVERALL, {})
    rows = []
    for m in chosen:
        found = [numbers["measures"][label].get(OVERALL, {}).get(m.name)
                 for label in (*pair, *others)]
        if not any(f and f["value"] is not None for f in found):
            continue
        cells = [estimate(m, f) for f in found]
        if before:
            cells.insert(2, difference(m, differences.get(m.name)))
        rows.append(((words.named(m),), cells))
    columns = [*pair, *(["change"] if before else []), *others]
    note = "" if name == "behaviour" else (
        "In brackets 95 % bootstrap intervals over prompts, resampled within each source."
    )
    if before and note:
        note += (
            f" The change is from “{before}” to “{after}” on the same prompts,"
            " with its interval and the p-value of a paired permutation test, Holm-adjusted: within"
            " the welfares, answer quality, format, action, matrix quality and tokens, and within"
            " all other measures."
        )
    return Table(name, caption, columns, rows, note)


def by_source(numbers: Numbers) -> list[Table]:
    """Every source with every label, the paper's measures across."""
    if len(numbers["sources"]) < 2:
        return []
    differences = (numbers["paired"] or {}).get("differences", {})
    columns = [BY_NAME[name].label for name in BY_SOURCE]
    rows = []
    for source in numbers["sources"]:
        for label in numbers["labels"]["shown"]:
            found = numbers["measures"][label].get(source)
            if found is None:
                continue
            cells = [estimate(BY_NAME[name], found[name]) for name in BY_SOURCE]
            if differences:
                is_after = label == numbers["labels"]["after"]
                moved = differences.get(source, {}).get("social_welfare") if is_after else None
                cells.append(difference(BY_NAME["social_welfare"], moved) if is_after else Cell(""))
            rows.append(((source, label), cells))
    if differences:
        columns.append("change of social welfare")
    return [Table("by_source", "Measures by source", columns, rows)]


def actions(numbers: Numbers) -> list[Table]:
    """What was done on which kind of request; what the request calls for is marked."""
    chosen = {label: numbers["actions"][label] for label in numbers["labels"]["shown"]}
    requests = list(dict.fromkeys(kind for table in chosen.values() for kind in table))
    rows, columns = [], []
    for request in requests:
        for label, table in chosen.items():
            if request not in table:
                continue
            counts, total = table[request], sum(table[request].values())
            columns = list(counts)
            rows.append(((request, label), [
                Cell(f"{n / total:.1%}", f"{n:,} of {total:,}"
                     + (" · called for" if kind in RIGHT_KINDS[request] else ""))
                for kind, n in counts.items()
            ]))
    heads = [KIND_LABELS[kind] for kind in columns]
    note = "Shares of the judged completions on requests of a kind. " \
           "“Called for” marks the moves that serve both sides."
    return [Table("actions", "What was asked and what was done", heads, rows, note)] if rows else []


PARETO = (  # key of pareto.compare, label, form, scale, better
    ("on_joint_frontier", "on the frontier of both", "{:.1f}%", 100, "higher"),
    ("epsilon_coverage", "within ε of that frontier", "{:.1f}%", 100, "higher"),
    ("avg_regret_Linf", "average regret L∞, share of the range", "{:.3f}", 1, "lower"),
    ("hypervolume_exact", "hypervolume", "{:.3f}", 1, "higher"),
    ("NSW_avg", "Nash welfare √(U·L)", "{:.3f}", 1, "higher"),
)


def pareto(numbers: Numbers) -> list[Table]:
    """Both policies as clouds of (user, LLM) welfare on the same prompts."""
    if numbers["pareto"] is None:
        return []
    before, after = numbers["labels"]["before"], numbers["labels"]["after"]
    return [_pareto(numbers["pareto"], before, after)]


def against(numbers: Numbers) -> list[Table]:
    """The same, and the differences, against a baseline that only comparison.json knows."""
    found = numbers["against"]
    if found is None:
        return []
    rows = []
    for source, part in found["differences"].items():
        for name, d in part.items():
            measure = BY_NAME.get(name) or Measure(name, name, "{:.3f}", operator.itemgetter(name))
            cells = [Cell(measure.shown(d["first"])), Cell(measure.shown(d["second"])),
                     difference(measure, d)]
            rows.append(((source, words.named(measure)), cells))
    columns = [found["name"], numbers["labels"]["after"]]
    return [
        Table("against", f"Against “{found['name']}”", [*columns, "change"], rows,
              "Paired differences on the same prompts, p-values Holm-adjusted."),
        _pareto(found["pareto"], *columns),
    ]


def _pareto(found: Mapping[str, Any], before: str, after: str) -> Table:
    counts, total = found["basic_compare"], found["basic_compare"]["common_count"]
    rows = [(("better for one side, for no side worse",), [
        Cell(f"{counts[key] / total:.1%}", f"{counts[key]:,} of {total:,}")
        for key in ("file1_dominates_file2", "file2_dominates_file1")
    ])]
    rows += [
        ((f"{label} ({better} is better)",),
         [Cell(form.format(found[key][side] * scale)) for side in pareto_lib.SIDES])
        for key, label, form, scale, better in PARETO
    ]
    rows += [
        ((f"{who}'s range covered",),
         [Cell(f"{found['coverage_spread'][side][key]:.1%}") for side in pareto_lib.SIDES])
        for who, key in (("user", "u_cov"), ("LLM", "l_cov"))
    ]
    note = (
        f"{total:,} pairs of judged completions of the same prompts, ε = {found['epsilon']:g}; "
        f"{counts['equal']:,} pairs are equal, {counts['incomparable']:,} are neither better nor "
        "worse."
    )
    return Table("pareto", "Pareto measures of the pair", [before, after], rows, note)


def cost(numbers: Numbers) -> list[Table]:
    """Seconds by stage and phase; tokens, completions and judgements by place."""
    spent = numbers["cost"]
    rows: list[tuple[Sequence[str], Sequence[Cell]]] = []
    for key, phases in spent["seconds"].items():
        stage = STAGES.get(key, key)
        total = phases.get("step")
        named = {name: value for name, value in phases.items() if name != "step"}
        rest = total - sum(named.values()) if total is not None else 0.0
        if rest > 0.0005 * (total or 0):
            named["between the phases"] = rest
        rows += [((stage, name), [
            Cell(words.duration(value)), Cell(f"{value / total:.1%}" if total else "–"),
        ]) for name, value in named.items()]
        if total is not None:
            rows.append(((stage, "all"), [Cell(words.duration(total)), Cell("100.0%")]))
    found = []
    if rows:
        found.append(Table("seconds", "Time by phase", ["time", "share of the stage"], rows,
                           "Steps that a resumed run did twice are counted once; what lies between "
                           "stages (start, evaluations, export) is not in it."))
    amounts = [
        *((f"tokens: {name}", n) for name, n in spent["tokens"].items()),
        *((f"completions: {name}", n) for name, n in spent["completions"].items()),
        *((f"judgements by a server: {name}", n) for name, n in spent["judge_calls"].items()
          if n is not None),
    ]
    amounts = [(name, n) for name, n in amounts if n]
    if amounts:
        found.append(Table("amounts", "Tokens and judgements", ["amount"],
                           [((name,), [Cell(f"{n:,.0f}")]) for name, n in amounts]))
    return found


def estimate(measure: Measure, found: Mapping[str, Any] | None) -> Cell:
    """A measure of one label; "–" where it has no value."""
    if found is None or found["value"] is None:
        return Cell("–")
    if found["low"] is None:
        return Cell(measure.shown(found["value"]))
    return Cell(measure.shown(found["value"]),
                f"[{measure.shown(found['low'])}, {measure.shown(found['high'])}]")


def difference(measure: Measure, found: Mapping[str, Any] | None) -> Cell:
    """A paired difference with interval, p and what it means."""
    if found is None:
        return Cell("–")
    below = words.p_text(found["p_adjusted"])
    if found["low"] is not None:
        low, high = (words.change(measure, found[key]) for key in ("low", "high"))
        below = f"[{low}, {high}], {below}"
    return Cell(words.change(measure, found["difference"]), below,
                words.direction(measure, found))
