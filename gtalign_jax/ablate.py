"""The command: `python -m gtalign_jax.ablate --config=configs/ablation_cpu.py [--config.key=value]`

Trains the same cold start under several rewards and seeds, one run after the other in one process
(on a pod: in every process), and compares them.

The same command goes on where it was stopped: a run that is finished is skipped, one that was
killed continues from its last checkpoint. A run that diverges is noted and the others go on; the
status is then 1. SIGTERM ends with status 75, Ctrl-C with 130, a mistake of the user's with 2.
"""

import contextlib
import functools
import gc
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
from absl import app
from jax.experimental.compilation_cache import compilation_cache

from gtalign_jax.bench import check_config
from gtalign_jax.command import carry_out
from gtalign_jax.config import Config, define_flag, parse_flags
from gtalign_jax.evaluation import ablation_tables
from gtalign_jax.evaluation.ablation import Comparison
from gtalign_jax.evaluation.measures import Row, by_label
from gtalign_jax.freeze import ConfigError, to_dict
from gtalign_jax.model.safetensors_io import read_json
from gtalign_jax.pod import exchange
from gtalign_jax.pod.ending import EXIT_FAILED
from gtalign_jax.pod.exchange import is_first
from gtalign_jax.pod.start import check_same
from gtalign_jax.report.figures_forest import forest
from gtalign_jax.report.figures_plane import plane_points
from gtalign_jax.report.ink import Picture
from gtalign_jax.run import run as run_one
from gtalign_jax.training import plots
from gtalign_jax.training.checkpoint import flatten
from gtalign_jax.training.files import write_whole
from gtalign_jax.training.metrics import read_rows
from gtalign_jax.variants import COLD_START, Ablation, Run, plan

NOTE_FILE = "ablation.json"  # in a run's directory, when it is over
ELSEWHERE = ("workdir", "pod.")  # where a run is computed and kept, which may change
KEPT_FROM_S = 0.2  # programs that compiled faster are not kept


class Note(TypedDict):
    """How a run ended: with which settings, after how many seconds, and why if it failed."""

    config: dict[str, Any]
    seconds: float
    failed: str | None


def ablate(ablation: Ablation) -> dict[str, str]:
    """All runs that are not finished yet. Returns the reasons of those that failed, by directory.

    Raises what `run.run` does, except for a divergence, which is noted.
    """
    runs = plan(ablation)
    _check(runs)
    failed: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    for number, item in enumerate(runs, 1):
        found = _note(item.config) if is_first() else None
        note = exchange.broadcast(found, "an ablation's note")
        title = f"run {number} of {len(runs)}: seed {item.seed}, {item.name}"
        if note is None and item.cold_start in failed:
            note = Note(config={}, seconds=0.0, failed="its cold start failed")
        if note is None:
            _say(f"\n── {title}{_left(runs[number - 1 :], seconds)} ──")
            note = _train(item)
        else:
            _say(f"{title}: {note['failed'] or 'finished'} before")
        if note["failed"]:
            failed[item.config.workdir] = note["failed"]
        else:
            seconds.setdefault(_kind(item), []).append(note["seconds"])
    return failed


def _check(runs: Sequence[Run]) -> None:
    """Raises ConfigError for what is wrong with the runs' settings, before the first of them."""
    problems: list[str] = []
    for item in runs:
        try:
            check_config(item.config)
        except ConfigError as error:
            problems += [line for line in str(error).splitlines() if line not in problems]
    if problems:
        raise ConfigError("\n".join(f"run.{line}" for line in problems))


def _train(item: Run) -> Note:
    """One run, from where it was left. What it is based on is there before it begins."""
    config, began = item.config, time.monotonic()
    if item.cold_start and is_first():
        _share(Path(item.cold_start), Path(config.workdir))
    exchange.broadcast(None, "the cold start is there")
    reason = None
    try:
        run_one(config)
    except FloatingPointError as error:
        reason = str(error)
        _say(f"failed: {reason}")
    note = Note(config=_settings(config), seconds=time.monotonic() - began, failed=reason)
    if is_first():
        write_whole(Path(config.workdir) / NOTE_FILE, json.dumps(note, indent=2) + "\n")
    gc.collect()  # the next run makes its own functions: what these have compiled is of no use
    jax.clear_caches()
    return note


def _share(source: Path, target: Path) -> None:
    """Gives a run the weights and the tokenizer of the cold start in `source`.

    They appear under their names when they are complete. What is there already stays.
    """
    for name in ("tokenizer", "checkpoints/sft"):
        there, here = source / name, target / name
        if here.exists() or not there.exists():  # a model from elsewhere has its own tokenizer
            continue
        here.parent.mkdir(parents=True, exist_ok=True)
        partial = here.with_name(f".{here.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(there, partial, copy_function=_link)
        partial.replace(here)


def _link(source: str, target: str) -> None:
    """The same file twice where the file system can do that: nobody writes into these files."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _settings(config: Config) -> dict[str, Any]:
    """What a finished run is recognised by; as JSON would hold it."""
    flat = flatten(to_dict(config))
    return {key: value for key, value in flat.items() if not key.startswith(ELSEWHERE)}


def _note(config: Config) -> Note | None:
    """How this run ended before, if it did and with these settings."""
    file = Path(config.workdir) / NOTE_FILE
    if not file.exists():
        return None
    note = read_json(file)
    if not isinstance(note.get("config"), dict) or not {"seconds", "failed"} <= note.keys():
        raise ValueError(f"{file}: no note of how a run ended; delete it, and the run goes on")
    default = _settings(Config())  # of a key that did not exist then
    known = default | note["config"]
    return note if all(known[key] == value for key, value in _settings(config).items()) else None


def _kind(item: Run) -> str:
    """Runs of a kind take about the same time."""
    if item.name == COLD_START:
        return "cold start"
    return "from a cold start" if item.cold_start else "both"


def _left(runs: Sequence[Run], seconds: dict[str, list[float]]) -> str:
    """How long these runs will take, once there has been one of each kind."""
    if not all(_kind(item) in seconds for item in runs):
        return ""
    total = sum(sum(times) / len(times) for times in (seconds[_kind(item)] for item in runs))
    return f" (about {total / 60:.0f} minutes left)"


def report(ablation: Ablation, failed: Mapping[str, str]) -> str:
    """Writes ablation.{md,csv,json} and pictures; returns what they say in words."""
    directory = Path(ablation.workdir)
    policies: dict[str, dict[int, list[Row]]] = {}
    for item in plan(ablation):
        labels = {COLD_START: plots.COLD_START} if item.name == COLD_START else {
            item.name: plots.AFTER}
        if item.name != COLD_START and not item.cold_start:
            labels |= {f"{item.name}_{COLD_START}": plots.COLD_START}
        if item.config.workdir in failed:
            continue
        rows = by_label(read_rows(Path(item.config.workdir) / "evaluations.jsonl"))
        for name, label in labels.items():
            policies.setdefault(name, {})[item.seed] = rows[label]
    if not set(policies) & set(ablation.rewards):
        return "no run has come to its end: there is nothing to compare"
    reward = ablation.run.reward
    weights = reward.llm if reward.consistency == "none" else reward.llm_consistent
    comparison = Comparison(policies, weights)
    found = ablation_tables.find(comparison, failed)
    ablation_tables.save(directory, found)
    pictures = _pictures(found)
    for picture in pictures:
        (directory / f"{picture.name}.png").write_bytes(picture.png)
    names = ", ".join(f"{directory}/{name}" for name in (
        "ablation.md", "ablation.csv", "ablation.json", *(f"{p.name}.png" for p in pictures)))
    said = [f"- {line}".replace("**", "") for line in ablation_tables.words(found)]
    return "\n".join((*said, f"written: {names}"))


def _pictures(found: ablation_tables.Findings) -> list[Picture]:
    """The rewards in the plane of both sides' welfare, and their differences from the reference."""
    points = []
    for name, outcomes in found.outcomes.items():
        user, llm = outcomes["user_welfare"], outcomes["llm_welfare"]
        points.append((ablation_tables.label(name), user.value, user.low, user.high,
                       llm.value, llm.low, llm.high))
    rows = []
    for name in ("social_welfare", "user_welfare", "llm_welfare", "answer"):
        for other in found.outcomes:  # the reference, too: each keeps its colour in both pictures
            c = found.contrasts.get(other, {}).get(name)
            numbers = (c.difference, c.low, c.high) if c else (math.nan,) * 3
            rows.append((found.measures[name].label, ablation_tables.label(other), *numbers))
    reference = ablation_tables.label(found.reference)
    about = "Means over all seeds, with 95 % intervals over seeds and prompts."
    pictures = (
        plane_points("ablation_plane", "Both sides' welfare under each reward", points, about),
        forest("ablation_differences", f"Differences from {reference}", rows, caption=about,
               form="{:+.3f}", x="difference"),
    )
    return [picture for picture in pictures if picture is not None]


def _say(text: str) -> None:
    if is_first():
        print(text, flush=True)


@contextlib.contextmanager
def kept_programs(directory: str) -> Iterator[None]:
    """Compiled programs are kept in `directory`: most runs compile what one before them did."""
    settings = {
        "jax_compilation_cache_dir": directory,
        "jax_persistent_cache_min_compile_time_secs": KEPT_FROM_S,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        compilation_cache.reset_cache()
        for name, value in before.items():
            jax.config.update(name, value)


def whole(ablation: Ablation) -> None:
    """The runs, then their comparison. Ends the process with status 1 where a run failed."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of each look at a checkpoint
    said = f"{ablation.rewards} {ablation.seeds} {ablation.workdir}"
    check_same("the ablation", {"rewards, seeds, workdir": said})
    with kept_programs(os.path.abspath(f"{ablation.workdir}/compiled")):
        failed = ablate(ablation)
    if is_first():
        for workdir, reason in failed.items():
            print(f"error: {workdir}: {reason}", file=sys.stderr)
        print(f"\n{report(ablation, failed)}", flush=True)
    if failed:
        sys.exit(EXIT_FAILED)


def main(argv: list[str]) -> None:
    del argv
    carry_out(_CONFIG, whole, cls=Ablation, common=lambda ablation: ablation.run)


if __name__ == "__main__":
    _CONFIG = define_flag("configs/ablation_cpu.py")
    app.run(main, flags_parser=functools.partial(parse_flags, cls=Ablation))
