"""Numbers on their way from the device to a person and to files.

    Mean           (sum, count): exact under micro-batches and hosts, divided once
    PhaseTimer     seconds by phase of a step
    MetricsWriter  metrics.jsonl, TensorBoard and other trackers, names `area/name`
    RolloutLog     one JSONL row per completion
    Console        one line per step and a progress bar

The two logs can be cut back to a step, so that a resumed run leaves no row twice. A kill in the
middle of a write leaves at most half a line, which is dropped when the file is opened again.
Files are written by one process: on a pod, the others' writers have `enabled=False` and do nothing.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from gtalign_jax.pod.watch import Watch
from gtalign_jax.training.files import naming, write_whole
from gtalign_jax.training.trackers import TensorBoard, Tracker

NONFINITE = "nonfinite/"  # names of metrics that are 1 where something was not finite
METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
RECENT = 15  # steps whose median seconds tell the time that is left


@struct.dataclass
class Mean:
    """A mean that is not divided yet; sums of Means (leaf by leaf) are Means of the union."""

    sum: jax.Array
    count: jax.Array

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)

    def divide(self) -> jax.Array:
        """sum / count; 0 where nothing was counted, with finite gradients."""
        return self.sum / jnp.where(self.count == 0, 1, self.count)


class PhaseTimer:
    """Seconds by phase: `with timer("sample", step): …`. A phase entered twice adds up.

    The watch, if there is one, learns which phase this process is in.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = watch
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase: str, step: int | None = None) -> Iterator[None]:
        began = time.perf_counter()
        try:
            watched = self._watch.phase(phase, step) if self._watch else contextlib.nullcontext()
            with watched, jax.profiler.TraceAnnotation(phase):
                yield
        finally:
            spent = time.perf_counter() - began
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent

    def take(self) -> dict[str, float]:
        """{"time/<phase>": seconds} since the last take, "time/step" the wall time; starts anew."""
        now = time.perf_counter()
        taken = {f"time/{phase}": spent for phase, spent in self._seconds.items()}
        taken["time/step"] = now - self._began
        self._seconds, self._began = {}, now
        return taken


class JsonLines:
    """A JSONL file of rows with a "stage" and a "step", appended to line by line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_half_line(self.path)
        self._file = self._open()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows in one write, flushed: a reader never sees a step by half."""
        with naming(self.path):
            self._file.write("".join(_dumps(row) + "\n" for row in rows))
            self._file.flush()

    def truncate(self, stage: str, step: int) -> int:
        """Drop the rows of `stage` after `step`; returns how many. Other stages stay."""
        self._file.close()
        parsed = functools.partial(_parsed, self.path, stage=str, step=int)
        late = sum(_is_after(row, stage, step) for _, row in parsed())
        if late:
            kept = (line for line, row in parsed() if not _is_after(row, stage, step))
            write_whole(self.path, kept)
        self._file = self._open()
        return late

    def close(self) -> None:
        with naming(self.path):  # what a full disk has not taken is still to be written
            self._file.close()

    def _open(self) -> TextIO:
        # Half a surrogate pair has no UTF-8; backslashreplace writes it as JSON's own escape.
        return self.path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")


class MetricsWriter:
    """Scalars of a run: `metrics.jsonl`, TensorBoard, and what else follows it (trackers.py)."""

    def __init__(self, workdir: str | Path, enabled: bool = True) -> None:
        self._workdir = Path(workdir)
        self._lines = JsonLines(self._workdir / METRICS_FILE) if enabled else None
        self._board = TensorBoard(self._workdir / "tensorboard")
        self._trackers: tuple[Tracker, ...] = (self._board,)

    def follow(self, trackers: Sequence[Tracker]) -> None:
        """From now on these get the rows, too."""
        self._trackers = (*self._trackers, *trackers)

    def write(self, stage: str, step: int, metrics: Mapping[str, Any]) -> None:
        """One row of scalars. One that is not finite is null in JSON, absent elsewhere."""
        if self._lines is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._lines.append([{"stage": stage, "step": step, **values}])
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.write(stage, step, finite)

    def truncate(self, stage: str, step: int) -> None:
        """Forget what was written about `stage` after `step`: call it when a run resumes there."""
        if self._lines is None:
            return
        self._lines.truncate(stage, step)
        for tracker in self._trackers:
            tracker.truncate(stage, step)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """What was written about `stage`; nothing in a process that does not write."""
        if self._lines is None:
            return []
        rows = read_rows(self._lines.path, stage=str, step=int)
        return [row for row in rows if row["stage"] == stage]

    def steps(self, stage: str) -> list[int]:
        """The steps that `stage` has rows of; none in a process that does not write."""
        return [row["step"] for row in self.rows(stage)]

    def values(self, stage: str, name: str) -> dict[int, float]:
        """{step: value} of one metric, without those that are not finite."""
        rows = self.rows(stage)
        return {row["step"]: row[name] for row in rows if row.get(name) is not None}

    def flush(self) -> None:
        """What was written is in the files; of TensorBoard's, but for the last moment's."""
        self._board.flush()

    def finish(self, results: Mapping[str, Mapping[str, float]]) -> None:
        """The run has reached its end, with these held-out means by label."""
        if self._lines is None:
            return
        for tracker in self._trackers:
            tracker.finish(results, self._workdir)

    def close(self) -> None:
        with ThreadPoolExecutor() as pool:  # each may wait for a network; they do so together
            closing = pool.map(lambda tracker: tracker.close(), self._trackers)
            if self._lines is not None:
                self._lines.close()
        list(closing)  # raises what they raised


class RolloutLog:
    """Every completion of a run: prompt, text, factors, payoff matrix, the judge's reply."""

    def __init__(self, workdir: str | Path, stage: str = "grpo", enabled: bool = True) -> None:
        self._stage = stage
        self._lines = JsonLines(Path(workdir) / ROLLOUTS_FILE) if enabled else None

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """One JSON line per completion; arrays become lists, non-finite numbers null."""
        if self._lines is not None:
            self._lines.append([{"stage": self._stage, "step": step, **row} for row in rows])

    def truncate(self, step: int) -> None:
        """Drop the rows of steps after `step`."""
        if self._lines is not None:
            self._lines.truncate(self._stage, step)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def read_rows(path: str | Path, **needed: type) -> list[dict[str, Any]]:
    """The rows of a JSONL file; half a line at its end, left by a kill, is no row.

    `needed`: fields that every row must have, and their types. Raises ValueError, naming file and
    line, for a line that is no such row.
    """
    return [row for _, row in _parsed(Path(path), **needed)]


def _parsed(path: Path, **needed: type) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line with its row, one at a time: completions of a whole run are gigabytes as objects.

    Bytes end lines with b"\n" alone; text also ends them elsewhere, at U+2028 or a carriage return.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, is no JSON: {error}; delete the line") \
                    from error
            whole = isinstance(row, dict) and all(type(row.get(k)) is t for k, t in needed.items())
            if not whole:
                kinds = ", ".join(f"{key} ({kind.__name__})" for key, kind in needed.items())
                raise ValueError(f"{path}, line {number}, is no row with {kinds}; delete the line")
            yield line, row


@dataclasses.dataclass(frozen=True)
class Column:
    """How one metric reads on the console line."""

    name: str
    label: str
    form: str
    scale: float = 1.0


COLUMNS = (
    Column("sft/loss", "loss", "{:.4f}"),
    Column("reward/total", "reward", "{:.3f}"),
    Column("welfare/user", "user", "{:.3f}"),
    Column("welfare/llm", "llm", "{:.3f}"),
    Column("reward/format", "format", "{:.0f}%", 100),
    Column("reward/right_action", "right", "{:.0f}%", 100),
    Column("grpo/kl", "kl", "{:.4f}"),
    Column("grpo/entropy", "entropy", "{:.3f}"),
    Column("rollout/length", "length", "{:.0f}"),
    Column("rollout/truncated", "cut", "{:.0f}%", 100),
    Column("perf/tokens_per_s", "tok/s", "{:,.0f}"),
)


def step_line(metrics: Mapping[str, float]) -> str:
    """The metrics of a step that have a column, in the order of `COLUMNS`, then its seconds.

    A metric that is absent has no place in the line; one that is not finite is shown as it is.
    """
    parts = [
        f"{column.label} {_shown(column, metrics[column.name])}"
        for column in COLUMNS
        if column.name in metrics
    ]
    phases = [
        f"{name.removeprefix('time/')} {spent:.1f}"
        for name, spent in metrics.items()
        if name.startswith("time/") and name != "time/step" and spent >= 0.05
    ]
    if "time/step" in metrics:
        detail = f" ({', '.join(phases)})" if phases else ""
        parts.append(f"{metrics['time/step']:.1f}s{detail}")
    return " | ".join(parts)


class Console:
    """What a person watches: one line per step, and a bar with the time left.

    On a terminal the bar stays at the bottom; elsewhere (a log file) each line carries the count
    and the time left instead.
    """

    def __init__(self, file: TextIO | None = None, enabled: bool = True) -> None:
        self._rich = RichConsole(file=file, highlight=False, soft_wrap=True, quiet=not enabled)
        self._bar: Progress | None = None
        self._task: Any = None
        self._stage, self._total, self._done = "", 0, 0
        self._seconds: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._last = 0.0

    def say(self, text: str = "") -> None:
        """A line (or a table) above the bar."""
        self._rich.print(text, markup=False)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[None]:
        """The steps of one stage, `done` of `total` of them before (a resumed run)."""
        self._stage, self._total, self._done = name, total, done
        self._seconds.clear()
        self._last = time.perf_counter()
        if self._rich.is_terminal and not self._rich.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), _TimeLeft(self), console=self._rich, transient=True,
            )
            self._task = self._bar.add_task(name, total=total, completed=done)
            self._bar.start()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of `step` (1 is the first) and move the bar there."""
        now = time.perf_counter()
        self._seconds.append((now - self._last) / max(step - self._done, 1))
        self._last, self._done = now, step
        head = f"{self._stage} {step:>{len(str(self._total))}}/{self._total}"
        if self._bar is None:
            head += f" [{self.time_left()} left]"
        else:
            self._bar.update(self._task, completed=step)
        self.say(f"{head} | {step_line(metrics)}")

    def time_left(self) -> str:
        """Steps to go times the median of the last steps: a compilation does not distort it."""
        recent = sorted(self._seconds)
        if not recent:
            return "-:--"
        seconds = round((self._total - self._done) * recent[len(recent) // 2])
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _TimeLeft(ProgressColumn):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        return Text(f"{self._console.time_left()} left", style="cyan")


def _shown(column: Column, value: float) -> str:
    return column.form.format(value * column.scale) if math.isfinite(value) else str(value)


def _is_after(row: Mapping[str, Any], stage: str, step: int) -> bool:
    return row["stage"] == stage and row["step"] > step


def _drop_half_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def _dumps(row: Mapping[str, Any]) -> str:
    return json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False)


def jsonable(value: Any) -> Any:
    """The same as JSON would hold it: dataclasses as objects, arrays as lists, None for every
    number that is not finite."""
    if dataclasses.is_dataclass(value):
        return jsonable(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
