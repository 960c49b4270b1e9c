"""Is a run that was interrupted the run that was not? Everything that it leaves is compared.

Clocks, counts of compilations and what is drawn from them (report, TensorBoard) are not.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import runs

STAGES = ("sft", "grpo")
WHOLE_FILES = ("results.json", "results.md", "results.digest")


def differences(run: Path, whole: Path) -> list[str]:
    """What `run` has otherwise than `whole`, in words; nothing where they are the same."""
    found = _guarded("metrics.jsonl", _metrics, run, whole)
    for name in ("rollouts.jsonl", "evaluations.jsonl"):
        found += _guarded(name, _rows, name, run, whole)
    exported = sorted(p.relative_to(whole) for p in whole.glob("hf/**/*") if p.is_file())
    for name in (*WHOLE_FILES, *exported):
        if not (run / name).exists():
            found.append(f"{name} is not there")
        elif (run / name).read_bytes() != (whole / name).read_bytes():
            found.append(f"{name} has other bytes")
    for stage in STAGES:
        found += _guarded(f"checkpoints of {stage}", _checkpoints, stage, run, whole)
    return found


def _guarded(name: str, compare: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """What cannot even be read is a difference, not the end of the comparison."""
    try:
        return compare(*arguments)
    except (OSError, ValueError, KeyError) as error:
        return [f"{name} cannot be compared: {type(error).__name__}: {error}"]


def _metrics(run: Path, whole: Path) -> list[str]:
    found, both = [], [runs.rows(at, "metrics.jsonl") for at in (run, whole)]
    for stage in STAGES:
        steps, wanted = ([row["step"] for row in rows if row["stage"] == stage] for rows in both)
        repeated = sorted({step for step in steps if steps.count(step) > 1})
        lost = sorted(set(wanted) - set(steps))
        if repeated or lost or steps != wanted:
            found.append(f"metrics.jsonl: {stage} has steps {repeated} more than once, {lost} not "
                         f"at all, and {'not ' * (steps != sorted(steps))}in order")
    return found or _first_unlike("metrics.jsonl", *map(runs.repeatable, both))


def _rows(name: str, run: Path, whole: Path) -> list[str]:
    return _first_unlike(name, runs.rows(run, name), runs.rows(whole, name))


def _first_unlike(name: str, rows: Sequence[dict], wanted: Sequence[dict]) -> list[str]:
    for i, (row, other) in enumerate(zip(rows, wanted, strict=False)):
        for key in sorted(row.keys() | other.keys()):
            if row.get(key) != other.get(key):
                return [f"{name}, line {i + 1}: {key} is {str(row.get(key))[:80]}, uninterrupted "
                        f"{str(other.get(key))[:80]}"]
    if len(rows) != len(wanted):
        return [f"{name} has {len(rows)} lines, uninterrupted {len(wanted)}"]
    return []


def committed(run: Path, stage: str) -> list[int]:
    """The complete saves of a stage, oldest first, as their directories are named."""
    found = (run / "checkpoints" / stage).glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit())


def _checkpoints(stage: str, run: Path, whole: Path) -> list[str]:
    steps, wanted = committed(run, stage), committed(whole, stage)
    if steps[-1:] != wanted[-1:]:
        return [f"checkpoints of {stage}: {steps}, uninterrupted {wanted}"]
    found = []
    for step in set(steps) & set(wanted):
        arrays, others = saved(run, stage, step), saved(whole, stage, step)
        found += [f"checkpoint {stage} {step}: {name}" for name in sorted(arrays.keys() ^ others)]
        found += [f"checkpoint {stage} {step}: {name} has other bits"
                  for name in sorted(arrays.keys() & others)
                  if arrays[name].tobytes() != others[name].tobytes()]
    return found


def saved(run: Path, stage: str, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by name: weights, optimizer, number of updates, random key."""
    path, reader = run / "checkpoints" / stage / str(step) / "state", ocp.PyTreeCheckpointer()
    tree = reader.metadata(path).item_metadata.tree
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    leaves, _ = jax.tree_util.tree_flatten_with_path(reader.restore(path, restore_args=on_host))
    return {jax.tree_util.keystr(at, simple=True, separator="."): leaf for at, leaf in leaves}
