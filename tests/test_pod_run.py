"""Whole runs as one, two and four real processes: the same numbers, one ending, nothing twice."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import compiler
import pods
import pytest
import runs

from gtalign_jax.game import chain

pytestmark = pytest.mark.slow
CHILD = Path(__file__).with_name("pod_child.py")
STEPS, SAVED, ROWS = 10, 5, 8 * 2  # GRPO steps, the first of them that is saved, rows of a step
SETTINGS = {
    "stages": "('sft','grpo')", "grpo.steps": STEPS, "checkpoint.every": SAVED,
    "pod.heartbeat_s": 0.5, "pod.silence_s": 15,
}


def start(workdir, processes: int, devices: int, planted: str = "",
          **overrides) -> list[subprocess.Popen]:
    """`processes` of one run in `workdir`, with `devices` each; returns without waiting."""
    flat = runs.settings(workdir, **overrides) | SETTINGS
    flags = [f"--config.{key}={value}" for key, value in flat.items()]
    environ = {
        **os.environ, "PYTHONPATH": pods.PATH, "PLANTED": planted,
        "XLA_FLAGS": compiler.flags(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if processes > 1:
        environ |= {"GTALIGN_COORDINATOR": f"127.0.0.1:{pods.free_port()}",
                    "GTALIGN_PROCESS_COUNT": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, "-u", str(CHILD), "--config=configs/demo_cpu.py", *flags],
            cwd=pods.ROOT, env={**environ, "GTALIGN_PROCESS_INDEX": str(i)} if processes > 1
            else environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]


def finish(children, within: float = 500) -> None:
    for ended in pods.ended(children, within):
        assert ended.status == 0, ended.text[-3000:]


def begin(whole: Path, workdir: Path, keep_step: int | None = None) -> Path:
    """A copy of a run whose cold start is done, and its GRPO up to `keep_step`, if given."""
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("asked-*"))
    if keep_step is None:
        shutil.rmtree(workdir / "checkpoints/grpo")
        (workdir / "rollouts.jsonl").unlink()
    else:
        shutil.rmtree(workdir / f"checkpoints/grpo/{STEPS}")
        assert [p.name for p in (workdir / "checkpoints/grpo").iterdir()] == [str(keep_step)]
    return workdir


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One process with eight devices: the cold start and ten steps of GRPO."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(workdir, 1, 8))
    return workdir


@pytest.fixture(scope="module")
def pair(tmp_path_factory, alone) -> Path:
    """Two processes with four devices each, from the cold start of `alone`."""
    workdir = begin(alone, tmp_path_factory.mktemp("pair") / "run")
    finish(start(workdir, 2, 4))
    return workdir


def check_same(workdir: Path, other: Path) -> None:
    """The same completions with the same rewards, in the same order, and losses up to rounding."""
    ours, theirs = runs.rows(workdir, "rollouts.jsonl"), runs.rows(other, "rollouts.jsonl")
    assert len(ours) == STEPS * ROWS
    for row, expected in zip(ours, theirs, strict=True):
        assert row.pop("logp") == pytest.approx(expected.pop("logp"), abs=1e-3)
        assert row == expected
    ours, theirs = runs.metrics(workdir, "grpo"), runs.metrics(other, "grpo")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for row, expected in zip(runs.repeatable(ours), runs.repeatable(theirs), strict=True):
        assert row.pop("stage") == expected.pop("stage")
        assert row == pytest.approx(expected, abs=1e-5, rel=1e-5)


def asked(workdir: Path) -> list[list[list]]:
    """What each process asked the judge."""
    files = sorted(workdir.glob("asked-*.jsonl"))
    return [runs.rows(workdir, file.name) for file in files]


def check_judged_once(workdir: Path, processes: int, steps: int) -> None:
    """Every completion was judged exactly once, and every process asked about its own share."""
    asked_by = asked(workdir)
    assert [len(rows) for rows in asked_by] == [steps * ROWS // processes] * processes
    logged = runs.rows(workdir, "rollouts.jsonl")[-steps * ROWS :]
    responses = Counter((row["question"], chain.parse(row["completion"]).response)
                        for row in logged)
    assert Counter((q, r) for rows in asked_by for q, r in rows) == responses


def test_two_processes_draw_the_tokens_and_take_the_steps_of_one(alone, pair):
    check_judged_once(alone, 1, STEPS)
    check_judged_once(pair, 2, STEPS)
    check_same(pair, alone)


@pytest.mark.parametrize("processes, devices", [(1, 1), (4, 2)])
@pytest.mark.long
def test_a_checkpoint_of_two_processes_goes_on_with_any_other_number(
    alone, pair, tmp_path, processes, devices
):
    workdir = begin(pair, tmp_path / "run", keep_step=SAVED)
    finish(start(workdir, processes, devices))
    check_judged_once(workdir, processes, STEPS - SAVED)
    check_same(workdir, alone)


@pytest.mark.parametrize("phase, victim, how", [("reward", 1, "raise"), ("update", 1, "stop")])
def test_a_process_that_fails_ends_all_with_a_cause_and_the_same_command_resumes(
    alone, tmp_path, phase, victim, how
):
    workdir = begin(alone, tmp_path / "run")
    children = start(workdir, 2, 4, planted=f"{phase}:{SAVED + 2}:{victim}:{how}")
    (survivor,) = pods.ended([child for i, child in enumerate(children) if i != victim], 500)
    if how == "stop":
        children[victim].send_signal(signal.SIGCONT)
    (failed,) = pods.ended([children[victim]], 60)
    assert failed.status != 0 and survivor.status != 0
    assert f"process {victim} (host" in survivor.text, survivor.text[-3000:]
    assert f"{phase} of step {SAVED + 2}" in survivor.text, survivor.text[-3000:]
    if how == "raise":
        assert "Planted: a planted fault" in survivor.text
    finish(start(workdir, 2, 4))
    check_same(workdir, alone)


def test_one_process_that_is_told_to_end_makes_all_drop_the_step_and_the_run_goes_on(
    alone, tmp_path
):
    told = SAVED + 2
    workdir = begin(alone, tmp_path / "run")
    children = start(workdir, 2, 4, planted=f"reward:{told}:1:term")
    for ended in pods.ended(children, 500):
        assert ended.status == 75, ended.text[-3000:]
        assert f"grpo is saved up to step {told - 1}; the same command goes on" in ended.text
    saved = {path.name for path in (workdir / "checkpoints/grpo").iterdir()}
    assert str(told - 1) in saved and str(told) not in saved
    finish(start(workdir, 1, 8))
    check_same(workdir, alone)
