"""What a directory of a run or of an evaluation holds, read into memory once.

    config.json run_info.json metrics.jsonl rollouts.jsonl evaluations.jsonl
    comparison.json  ->  RunData

A file that is absent is None or empty: a run may be still going, or have had no such stage. One
that is there and cannot be read is an error that names file and line; only half a last line, which
somebody may be writing just now, is left out. Of training completions the texts are not kept: a
run of the paper's size has hundreds of megabytes of them.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gtalign_jax.evaluation.evaluate import EVALUATIONS_FILE
from gtalign_jax.evaluation.measures import by_label
from gtalign_jax.training.metrics import METRICS_FILE, ROLLOUTS_FILE
from gtalign_jax.training.plots import AFTER, BEFORE, COLD_START

COMPARISON_FILE = "comparison.json"
CONFIG_FILE, RUN_INFO_FILE = "config.json", "run_info.json"

TEXTS = ("prompt", "question", "ground_truth", "completion", "judge_reply", "consistency_reply")
FREE = ("rule", "given", "solver")  # notes in place of a reply, of those who cost nothing
OF_CONFIG = ("stages", "model", "sft", "grpo", "reward", "judge")
OF_COMPARISON = ("first", "differences", "by_source", "basic_compare", "coverage_spread")
OF_METRICS = ("stage", "step")
OF_ROW = (
    "id", "data_source", "sample", "question", "ground_truth", "completion", "tokens",
    "reasoning_tokens", "response_tokens", "stopped", "valid", "reward", "user_welfare",
    "llm_welfare", "answer", "format", "payoff", "request_kind", "response_kind", "right_action",
    "judge_score",
)  # fmt: skip
SCORES = ("reward", "user_welfare", "llm_welfare", "answer")

_STEP = re.compile(r"step (\d{1,15})")


class ReportError(ValueError):
    """A directory that no report can be made of; one line that says what is wrong and where."""


@dataclasses.dataclass(frozen=True)
class RunData:
    """What was found.

    Attributes:
      directory: where. config, info: config.json and run_info.json.
      metrics: rows of metrics.jsonl.
      rollouts: rows of rollouts.jsonl without `TEXTS`; `payoff` is {} where there was a matrix.
      groups: {label: rows} of evaluations.jsonl, in the order in which a run evaluates.
      comparison: comparison.json, what an evaluation against a baseline found.
    Rows of completions have besides `replies`, see there.
    """

    directory: Path
    config: Mapping[str, Any] | None
    info: Mapping[str, Any] | None
    metrics: Sequence[Mapping[str, Any]]
    rollouts: Sequence[Mapping[str, Any]]
    groups: Mapping[str, Sequence[Mapping[str, Any]]]
    comparison: Mapping[str, Any] | None


def load(directory: Path) -> RunData:
    """Raises ReportError where there is nothing to report or where a file cannot be read."""
    if not directory.is_dir():
        raise ReportError(f"{directory} is no directory")
    metrics = [_with(row, OF_METRICS, where) for where, row in _rows(directory / METRICS_FILE)]
    rollouts = [
        _slim(_with(row, ("step", *OF_ROW), where))
        for where, row in _rows(directory / ROLLOUTS_FILE)
    ]
    evaluations = [
        _with(row, ("label", *OF_ROW), where) | {"replies": replies(row)}
        for where, row in _rows(directory / EVALUATIONS_FILE)
    ]
    if not (metrics or rollouts or evaluations):
        raise ReportError(
            f"{directory} holds no row of {METRICS_FILE}, {ROLLOUTS_FILE} or {EVALUATIONS_FILE}: "
            "there is nothing to report"
        )
    groups = by_label(evaluations)
    return RunData(
        directory=directory,
        config=_with_keys(directory / CONFIG_FILE, OF_CONFIG),
        info=_object(directory / RUN_INFO_FILE),
        metrics=metrics,
        rollouts=rollouts,
        groups={label: groups[label] for label in sorted(groups, key=_when)},
        comparison=_with_keys(directory / COMPARISON_FILE, OF_COMPARISON),
    )


def step_of(label: str) -> int | None:
    """The GRPO step of an evaluation in the midst of training; None for any other label."""
    match = _STEP.fullmatch(label)
    return int(match[1]) if match else None


def _when(label: str) -> tuple[int, int]:
    """Sorts labels: before training, after the cold start, step by step, others as they came."""
    step = step_of(label)
    if step is not None:
        return 2, step
    return {BEFORE: 0, COLD_START: 1, AFTER: 4}.get(label, 3), 0


def _slim(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in TEXTS}
    return kept | {
        "replies": replies(row), "payoff": None if row["payoff"] is None else {},
    }


def replies(row: Mapping[str, Any]) -> int:
    """How many judgements of a completion were neither a rule's nor the solver's: judges asked,
    for quality and for consistency, or mathematics compared."""
    asked = row["judge_score"] is not None or row.get("judge_error") is not None
    quality = asked and row.get("judge_reply") not in FREE
    reply, error = row.get("consistency_reply"), row.get("consistency_error")
    consistency = (reply is not None or error is not None) and reply not in FREE
    return int(quality) + int(consistency)


def _with(row: dict[str, Any], fields: Sequence[str], where: str) -> dict[str, Any]:
    absent = [field for field in fields if field not in row]
    if absent:
        raise ReportError(
            f"{where} has no {absent[0]!r}; a row needs {', '.join(fields)}: it may have been "
            "written by an earlier version"
        )
    numbers = [row[field] for field in SCORES if field in fields and row["valid"]]
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        raise ReportError(f"{where} is valid, but not all of {', '.join(SCORES)} are numbers")
    return row


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON file that holds an object; None where there is none."""
    if not path.exists():
        return None
    return _parsed(path.read_bytes(), str(path))


def _with_keys(path: Path, keys: Sequence[str]) -> dict[str, Any] | None:
    found = _object(path)
    absent = [key for key in keys if found is not None and key not in found]
    if absent:
        raise ReportError(f"{path} has no {absent[0]!r}; it needs {', '.join(keys)}")
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", row) of a JSONL file, one at a time; nothing where there is none."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                where = f"{path}, line {number},"
                yield where, _parsed(line, where)


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{where} is {type(value).__name__}, expected an object")
    return value
