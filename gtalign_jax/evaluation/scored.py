"""A file of scored completions, read with care: one JSON object a line.

Rows need `id`, `user_welfare` and `llm_welfare`, as `gtalign_jax.score` and evaluations write them.
Of rows with `label` one label is read at a time: a label is one policy. `valid` false or a null
welfare means missing: such a row is kept, without `social_welfare` = sqrt(U L), which every other
row is given. A line that is no row is left out and named with file and line.
"""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gtalign_jax.data.sources import parse_line

WELFARES = ("user_welfare", "llm_welfare")


@dataclasses.dataclass(frozen=True)
class Scored:
    """One policy's rows: those of `label` in `path`, or all of them."""

    path: Path
    label: str | None
    rows: tuple[dict[str, Any], ...]
    missing: int  # rows without a score; those without an id, too, are not in `rows`
    bad: tuple[str, ...]  # lines that are no row, each with file and line

    @property
    def name(self) -> str:
        return str(self.path) + (f" ({self.label})" if self.label is not None else "")


def read(path: Path, label: str | None) -> Scored:
    """The rows of a JSONL file that have this label; without a label, all must have the same.

    Raises ValueError for a label that no row has, for a choice of labels that was not made, and
    where no row has an id.
    """
    rows, bad, labels = [], [], Counter()
    missing = without_id = 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        row, problem = _parse(line)
        if problem is None:
            labels[row.get("label")] += 1
            if label is not None and row.get("label") != label:
                continue
            problem = _problem(row)
            without_id += row.get("id") is None
        if problem is not None:
            bad.append(f"{path}:{number}: {problem}")
            continue
        is_missing = _is_missing(row)
        missing += is_missing
        if row.get("id") is not None:
            rows.append(row if is_missing else _with_social_welfare(row))
    names = ", ".join(repr(name) for name in labels if name is not None)
    if label is not None and label not in labels:
        raise ValueError(f"{path}: no row has the label {label!r}; it has {names or 'no labels'}")
    if label is None and len(labels) > 1:
        raise ValueError(
            f"{path}: its rows have several labels ({names}): choose one with --first-label=NAME "
            "or --second-label=NAME"
        )
    if not rows:
        raise ValueError(_why_empty(path, bad, without_id))
    return Scored(path, label, tuple(rows), missing, tuple(bad))


def _why_empty(path: Path, bad: Sequence[str], without_id: int) -> str:
    if without_id and without_id >= len(bad):
        return (
            f"{path}: no row has an `id`, by which completions of the same prompt are matched. "
            "Give each prompt's rows the same unique `id` in both files (gtalign_jax.score hands "
            "on the fields of its input: add it there), for example the number of the prompt"
        )
    return f"{path}: it has no row to compare" + (f"; {bad[0]}" if bad else "")


def _parse(line: bytes) -> tuple[dict[str, Any], str | None]:
    """(row, what is wrong with it)."""
    row, problem = parse_line(line)
    for field in ("label", "sample"):  # rows are told apart by them
        if isinstance(row.get(field), dict | list):
            return {}, f"field {field!r} must be a number or a string, not {row[field]!r}"
    return row, problem


def _problem(row: dict[str, Any]) -> str | None:
    """What keeps a row from being compared, if anything does; a missing score does not."""
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        return f"field 'id' must be a string or a whole number, not {name!r}"
    if row.get("valid") is False:  # the judge failed; score's row for a bad line has no id either
        return None
    if name is None:
        return "field 'id' is missing: rows are matched by it"
    for field in WELFARES:
        if field not in row:
            return (
                f"field {field!r} is missing: score the completions first "
                "(python -m gtalign_jax.score)"
            )
        value = row[field]
        number_like = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer may be finite and yet no float.
        if value is not None and not (number_like and abs(value) <= sys.float_info.max):
            return f"field {field!r} must be a finite number or null, not {value!r}"
    return None


def _is_missing(row: dict[str, Any]) -> bool:
    return row.get("valid") is False or any(row[field] is None for field in WELFARES)


def _with_social_welfare(row: dict[str, Any]) -> dict[str, Any]:
    user, llm = (max(row[field], 0.0) for field in WELFARES)
    return {**row, "social_welfare": math.sqrt(user) * math.sqrt(llm)}
