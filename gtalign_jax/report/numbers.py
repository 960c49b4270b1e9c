"""All numbers of a report, from the rows of a run: what the page shows and report.json holds.

    RunData  ->  {"rows", "labels", "measures", "actions", "paired", "pareto", "cost", …}

Everything is made of strings, finite numbers, lists and dicts, None where a number does not exist:
the page, the JSON and the CSV files cannot disagree, because they are written from this.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax.evaluation import paired, pareto, tables
from gtalign_jax.evaluation.evaluate import EVALUATIONS_FILE
from gtalign_jax.evaluation.measures import (
    MEASURES,
    OVERALL,
    Estimates,
    Measure,
    action_table,
    estimates,
)
from gtalign_jax.report.load import ReportError, RunData, step_of
from gtalign_jax.reward.tasks import TASKS
from gtalign_jax.training.metrics import jsonable
from gtalign_jax.training.plots import AFTER, BEFORE, COLD_START

Row = Mapping[str, Any]
MOST_LABELS = 5  # side by side in a table
OF_PAIR = (
    "on_joint_frontier", "epsilon_coverage", "avg_regret_Linf", "hypervolume_exact", "NSW_avg",
)  # fmt: skip
# One family of Holm's adjustment, the one that `python -m gtalign_jax.evaluate` tests, so that both
# say the same; all other measures are a second one. By source the first alone is tested.
MAIN = (
    "user_welfare", "llm_welfare", "social_welfare", "answer", "format", "right_action",
    "matrix_quality", "tokens", "reasoning_tokens", "response_tokens",
)  # fmt: skip


def gather(data: RunData) -> tuple[dict[str, Any], dict[str, Estimates]]:
    """(all numbers, the estimates behind them for the figures)."""
    found = {label: estimates(rows, seed=_seed(data)) for label, rows in data.groups.items()}
    before, after = compared(list(data.groups))
    pair = _pair(data, before, after) if before else None
    return {
        "rows": {
            "metrics": len(data.metrics),
            "rollouts": len(data.rollouts),
            "evaluations": {label: len(rows) for label, rows in data.groups.items()},
        },
        "labels": {"shown": shown_labels(list(data.groups)), "before": before, "after": after},
        "prompts": {
            label: len({row["id"] for row in rows}) for label, rows in data.groups.items()
        },
        "sources": sorted({row["data_source"] for rows in data.groups.values() for row in rows}),
        "missing": {
            "training": _missing(data.rollouts),
            **{label: _missing(rows) for label, rows in data.groups.items()},
        },
        "measures": tables.as_json(found),
        "actions": {label: action_table(rows) for label, rows in data.groups.items()},
        "paired": pair,
        "pareto": _pareto(data, before, after) if before else None,
        "against": None if before else _against(data),
        "progress": progress(data),
        "cost": cost(data),
    }, found


def compared(labels: Sequence[str]) -> tuple[str | None, str | None]:
    """(before, after): the two labels whose difference a reader wants; None where there is none.

    GRPO is measured from the cold start, a cold start from the policy as it was; of a run that is
    still going the newest step is the after.
    """
    if not labels:
        return None, None
    after = AFTER if AFTER in labels else labels[-1]
    others = [label for label in labels if label != after and step_of(label) is None]
    if after == COLD_START:
        others = [label for label in others if label == BEFORE]
    if COLD_START in others and (after == AFTER or step_of(after) is not None):
        return COLD_START, after
    return (others[-1] if others else None), after


def shown_labels(labels: Sequence[str]) -> list[str]:
    """What stands side by side: no evaluation in the midst of training, but the one compared."""
    before, after = compared(labels)
    kept = [label for label in labels if step_of(label) is None or label in (before, after)]
    first = [label for label in kept if label not in (before, after)]
    room = MOST_LABELS - (len(kept) - len(first))
    return [label for label in kept if label not in first or label in first[:room]]


def _seed(data: RunData) -> int:
    """The run's own, as its other tables have it."""
    return (data.config or {}).get("seed", 0)


def _missing(rows: Sequence[Row]) -> dict[str, int]:
    return {"missing": sum(not row["valid"] for row in rows), "of": len(rows)}


def _pair(data: RunData, before: str, after: str) -> dict[str, Any] | None:
    """Differences after - before on the same prompts; None where they share no prompt."""
    measures = [m for m in MEASURES if _is_mean(m)]
    sides = [[_values(row, measures) for row in data.groups[label]] for label in (before, after)]
    shared = {row["id"] for row in sides[0]} & {row["id"] for row in sides[1]}
    if not shared:
        return None
    matching = _matched(data, *sides, [m.name for m in measures])
    held = [m.name for m in measures if matching.complete_B([m.name]).any()]
    main = [name for name in MAIN if name in held]
    rest = [name for name in held if name not in MAIN]
    seed = _seed(data)
    found: dict[str, dict[str, paired.Difference]] = {OVERALL: {}}
    for family in (main, rest):
        if family:
            found[OVERALL] |= paired.assess(matching.select(family), seed)
    if main:
        found |= paired.assess_by_source(matching.select(main), seed)
    return {
        "pairs": len(matching.ids),
        "prompts": len(set(matching.ids)),
        "only_before": len(matching.only_first),
        "only_after": len(matching.only_second),
        "samples_unmatched": matching.samples_unmatched,
        "differences": {
            source: jsonable(part) for source, part in found.items()
        },
    }


def _is_mean(measure: Measure) -> bool:
    """Whether it is a mean over judged rows: a ratio of sums has no value for each prompt."""
    return not measure.of_missing and measure.per is Measure.per


def _values(row: Row, measures: Sequence[Measure]) -> dict[str, Any]:
    """A row as the paired test reads it, one field for each measure."""
    kept = {key: row[key] for key in ("id", "data_source", "sample", "valid")}
    if not row["valid"]:
        return kept
    values = {m.name: m.of(row) for m in measures}
    return kept | {
        name: None if value is None or not math.isfinite(value) else float(value)
        for name, value in values.items()
    }


def _matched(data: RunData, first: Sequence[Row], second: Sequence[Row],
             measures: Sequence[str]) -> paired.Matching:
    try:
        return paired.match(first, second, measures)
    except ValueError as error:
        raise ReportError(f"{data.directory / EVALUATIONS_FILE}: {error}") from error


def _pareto(data: RunData, before: str, after: str) -> dict[str, Any] | None:
    """The Pareto measures of the pairs that were judged on both sides; None without one."""
    first, second = data.groups[before], data.groups[after]
    if not {row["id"] for row in first} & {row["id"] for row in second}:
        return None
    matching = _matched(data, first, second, ("user_welfare", "llm_welfare"))
    both_B = matching.complete_B(("user_welfare", "llm_welfare"))
    if not both_B.any():
        return None
    points = [np.stack([x[0, both_B], x[1, both_B]], axis=1)
              for x in (matching.first_MB, matching.second_MB)]
    return jsonable(pareto.compare(*points, pareto.EPS))


def _against(data: RunData) -> dict[str, Any] | None:
    """What comparison.json says of a baseline whose completions are in a file of its own."""
    found = data.comparison
    if found is None:
        return None
    file, label = found["first"]["file"], found["first"]["label"]
    return {
        "name": label or file.replace("\\", "/").rsplit("/", 1)[-1],
        "differences": {OVERALL: found["differences"], **found["by_source"]},
        "pareto": {
            key: found[key] for key in (*OF_PAIR, "basic_compare", "coverage_spread", "epsilon")
        },
    }


def progress(data: RunData) -> dict[str, Any]:
    """{stage: {"done", "of"}}: steps there are metrics of, and steps that the config asks for."""
    config = data.config or {}
    found: dict[str, dict[str, Any]] = {}
    for stage in ("grpo", "sft"):
        done = max((row["step"] for row in data.metrics if row["stage"] == stage), default=0)
        if stage == "sft" and not done and found.get("grpo", {}).get("done"):
            continue  # the cold start of another run
        wanted = config.get(stage, {}).get("steps") if stage in config.get("stages", ()) else None
        if done or wanted:
            found[stage] = {"done": done, "of": wanted}
    return {stage: found[stage] for stage in ("sft", "grpo") if stage in found}


def cost(data: RunData) -> dict[str, Any]:
    """What the run took, as far as its files tell; what a resumed run did over is not in them."""
    seconds: dict[str, dict[str, float]] = {}
    for row in data.metrics:
        for name, value in row.items():
            if name.startswith("time/") and value is not None:
                part = seconds.setdefault(row["stage"], {})
                part[name.removeprefix("time/")] = part.get(name.removeprefix("time/"), 0) + value
    devices = (data.info or {}).get("devices")
    total = sum(part["step"] for part in seconds.values() if "step" in part)
    evaluations = [row for rows in data.groups.values() for row in rows]
    return {
        "seconds": seconds,
        "seconds_total": total,
        "devices": devices,
        "chip_hours": total * devices["count"] / 3600 if devices and total else None,
        "tokens": {
            "cold start, trained on": sum(
                row.get("sft/tokens") or 0 for row in data.metrics if row["stage"] == "sft"
            ),
            "training, sampled": sum(row["tokens"] for row in data.rollouts),
            "evaluations, sampled": sum(row["tokens"] for row in evaluations),
        },
        "completions": {"training": len(data.rollouts), "evaluations": len(evaluations)},
        "judge_calls": {
            "training": judge_calls(data.rollouts, data.config),
            "evaluations": judge_calls(evaluations, data.config),
        },
    }


def judge_calls(rows: Sequence[Row], config: Mapping[str, Any] | None) -> int | None:
    """Judgements that a server was asked for (repeated attempts not counted); None if unknown.

    Rows say how often a judge was asked; in older ones, mathematics is taken to be compared by
    algebra, where it may be.
    """
    if config is None or "judge" not in config:
        return None
    if config["judge"]["kind"] != "http":
        return 0
    algebra = config["reward"]["math"] != "judge"
    return sum(
        max(row["replies"] - (algebra and _is_math(row)), 0)
        if row.get("judge_attempts") is None else int(row["judge_attempts"] > 0)
        for row in rows
    )


def _is_math(row: Row) -> bool:
    task = TASKS.get(row["data_source"])
    return task is not None and task.measure == "math"
