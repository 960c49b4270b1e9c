"""What storage can do to the checkpoints of a run, and what the run says and does then."""

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import compiler
import jax
import jax.numpy as jnp
import numpy as np
import pods
import pytest
import runs
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from gtalign_jax import export, workdir
from gtalign_jax import run as run_lib
from gtalign_jax.config import ConfigError, check
from gtalign_jax.model import safetensors_io
from gtalign_jax.training import claim, collect, integrity, metrics
from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from gtalign_jax.training.files import explained, write_whole
from gtalign_jax.training.manager import Keep
from gtalign_jax.training.trackers import TensorBoard

# A coroutine of orbax that has failed is left to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

RUN = {"model": "tiny"}
X = {"w": jax.random.normal(jax.random.key(0), (64, 64)), "b": jnp.ones(5, jnp.bfloat16)}
WANTED = jax.eval_shape(lambda: X)


def largest(step: Path) -> Path:
    return max((step / "state/ocdbt.process_0/d").iterdir(), key=lambda p: p.stat().st_size)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def other_name(step: Path) -> None:
    """JSON that can be read, and says something else."""
    file = step / "run/metadata"
    file.write_text(file.read_text().replace('"tiny"', '"tinz"'))


DAMAGES = {
    "a truncated array file": lambda s: os.truncate(largest(s), largest(s).stat().st_size // 2),
    "a flipped bit in an array": lambda s: flip(largest(s), largest(s).stat().st_size // 2),
    "no array file": lambda s: largest(s).unlink(),
    "no arrays": lambda s: shutil.rmtree(s / "state"),
    "no manifest": lambda s: (s / "state/manifest.ocdbt").unlink(),
    "no JSON": lambda s: (s / "run/metadata").unlink(),
    "half the JSON": lambda s: os.truncate(s / "run/metadata", 20),
    "other JSON": lambda s: (s / "run/metadata").write_text("[1]"),
    "a changed JSON": other_name,
    "nothing in the directory": empty,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Steps 1, 2 and 3, which differ."""
    directory = tmp_path_factory.mktemp("saved") / "ckpt"
    checkpoints = Checkpointer(directory, CheckpointConfig(keep=9), RUN)
    for step in (1, 2, 3):
        checkpoints.save(step, jax.tree.map(lambda x, n=step: x * n, X), {"step": step})
    checkpoints.close()
    return directory


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "ckpt")


def open_at(directory, read_only=False, **cfg) -> Checkpointer:
    cfg = CheckpointConfig(**({"keep": 9} | cfg))
    return Checkpointer(directory, cfg, None if read_only else RUN, read_only=read_only)


def is_state(state, step: int) -> bool:
    return all(np.array_equal(state[name], X[name] * step) for name in X)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_the_one_before_taken_and_its_step_saved_again(
    kind, copy, caplog
):
    DAMAGES[kind](copy / "3")
    checkpoints = open_at(copy)
    step, state, extra = checkpoints.newest(WANTED)
    assert step == 2 and extra == {"step": 2} and is_state(state, 2)
    assert checkpoints.steps() == [1, 2] and checkpoints.latest() == 2
    assert "the checkpoint of step 3" in caplog.text and "is damaged" in caplog.text
    assert (copy / "3.corrupt").is_dir() and not (copy / "3").exists()
    checkpoints.save(3, X)
    checkpoints.close()
    again = open_at(copy)
    assert again.newest(WANTED)[0] == 3 and is_state(again.restore(WANTED, 3)[0], 1)
    again.close()


def test_a_reader_passes_over_a_damaged_checkpoint_and_renames_nothing(copy, caplog):
    DAMAGES["a flipped bit in an array"](copy / "3")
    reader = open_at(copy, read_only=True)
    step, state, _ = reader.newest({"w": WANTED["w"]}, partial=True)
    assert step == 2 and np.array_equal(state["w"], X["w"] * 2)
    assert "other values than were saved in w" in caplog.text
    with pytest.raises(CheckpointError, match="step 3 in .* is damaged: .* w. Steps .*1, 2, 3"):
        reader.restore(WANTED, 3)
    reader.close()
    assert sorted(p.name for p in copy.iterdir()) == ["1", "2", "3"]


def test_where_all_are_damaged_nothing_begins_anew_and_nothing_is_changed(copy):
    for step in (1, 2, 3):
        DAMAGES["a truncated array file"](copy / str(step))
    for _ in range(2):  # nor the second time
        checkpoints = open_at(copy)
        with pytest.raises(CheckpointError) as error:
            checkpoints.newest(WANTED)
        checkpoints.close()
        assert "is whole:\n  step 3: ValueError: OUT_OF_RANGE" in str(error.value)
        assert sorted(p.name for p in copy.iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize("error", [
    PermissionError(13, "Permission denied", "state"), OSError(5, "Input/output error"),
    ValueError("PERMISSION_DENIED: Error reading [os_error_code='13']"),
    ValueError("UNKNOWN: Error reading [os_error_code='5']"),
    ValueError("UNAVAILABLE: storage.googleapis.com"), MemoryError(),
])
def test_storage_that_cannot_be_asked_is_no_damage(copy, monkeypatch, error):
    checkpoints = open_at(copy)

    def refuse(*_, **__):
        raise Exception("Encountered error while reading") from error

    monkeypatch.setattr(checkpoints._arrays, "restore", refuse)
    with pytest.raises(CheckpointError, match="step 3 .* cannot be read now: .*Nothing was chan"):
        checkpoints.newest(WANTED)
    checkpoints.close()
    assert sorted(p.name for p in copy.iterdir()) == ["1", "2", "3"]


def test_another_runs_checkpoint_is_refused_and_not_taken_for_damaged(copy):
    other = Checkpointer(copy, CheckpointConfig(keep=9), {"model": "large"})
    for call in (other.check, lambda: other.newest(WANTED)):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            call()
    other.close()
    assert sorted(p.name for p in copy.iterdir()) == ["1", "2", "3"]


def test_a_half_committed_save_is_not_a_step_and_is_swept_up(copy):
    (copy / "3").rename(copy / "4.orbax-checkpoint-tmp")
    checkpoints = open_at(copy)
    assert checkpoints.newest(WANTED)[0] == 2
    checkpoints.save(4, X)
    checkpoints.close()
    assert sorted(p.name for p in copy.iterdir()) == ["1", "2", "4"]


def test_a_checkpoint_without_checksums_is_still_restored(copy):
    """As all were before there were any."""
    file = copy / "3/run/metadata"
    run = json.loads(file.read_text())
    file.write_text(json.dumps({key: run[key] for key in ("fingerprint", "extra")}))
    checkpoints = open_at(copy)
    step, state, _ = checkpoints.newest(WANTED)
    assert step == 3 and is_state(state, 3)
    with pytest.raises(CheckpointError, match=r"w: saved \(64, 64\) float32, now \(4,\) float32"):
        checkpoints.restore({**WANTED, "w": jnp.ones(4)}, 3)
    checkpoints.close()


def test_sums_are_exact_the_same_on_any_devices_and_see_each_kind_of_change():
    values = np.arange(64, dtype=np.float32).reshape(8, 8) - 9.5
    by_hand = []
    for odd in (0x9E3779B1, 0x85EBCA77):
        total = 0
        for i, b in enumerate(values.view(np.uint32).ravel().tolist()):
            x = (b + odd * i) % 2**32
            x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
            x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
            total += x ^ x >> 16
        by_hand.append(total % 2**32)
    found = integrity.records({"a": {"b": values}})["a.b"]
    assert found == {"shape": [8, 8], "dtype": "float32", "sums": by_hand}
    devices = np.asarray(jax.devices())
    for shape, spec in (((8,), ("x",)), ((4, 2), ("y", "x")), ((2,), (None, "x"))):
        mesh = Mesh(devices[: np.prod(shape)].reshape(shape), ("x", "y")[: len(shape)])
        cut = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
        assert integrity.records({"a": {"b": cut}})["a.b"] == found
    swapped = values[[1, 0, *range(2, 8)]]
    for other in (swapped, -values, values + np.eye(8, dtype=np.float32)):
        assert integrity.records({"a": {"b": other}})["a.b"]["sums"] != by_hand
    for x in (jnp.array([True, False]), jnp.int32(-1), jnp.zeros((0, 3)), jnp.ones(3, jnp.int8)):
        assert integrity.records({"x": x}) == integrity.records({"x": np.asarray(x)})


def test_order_is_by_step_whatever_the_clock_says(copy, monkeypatch):
    for days, step in ((400, "1"), (-400, "3")):
        then = time.time() + days * 86400
        for path in (copy / step, *(copy / step).rglob("*")):
            os.utime(path, (then, then))
    now = time.time
    checkpoints = open_at(copy, keep=2)
    for step, days in ((4, -30), (5, 30), (6, -1000)):
        monkeypatch.setattr(time, "time", lambda days=days: now() + days * 86400)
        checkpoints.save(step, X)
        checkpoints.wait()
        assert checkpoints.steps() == [step - 1, step]
    checkpoints.close()
    again = open_at(copy, keep=2)
    assert again.steps() == [5, 6] and again.newest(WANTED)[0] == 6
    again.close()


def test_the_best_that_are_evaluated_survive_beside_the_newest(tmp_path):
    scores: dict[int, float] = {}
    cfg = CheckpointConfig(keep=1, keep_best=2)
    checkpoints = Checkpointer(tmp_path, cfg, RUN, scores=lambda: dict(scores))
    for step, score in enumerate((0.1, 0.9, 0.3, 0.7, 0.2, 0.8), 1):
        checkpoints.save(step, {"x": jnp.zeros(1)})
        scores[step] = score  # an evaluation comes after the save of its step
    checkpoints.save(7, {"x": jnp.zeros(1)})
    checkpoints.close()
    assert checkpoints.steps() == [2, 6, 7]
    kept = Keep(1, 1, {1: 0.5, 2: 0.5})  # of equal ones the newer
    some = [type("Info", (), {"step": step}) for step in (1, 2, 3)]
    assert kept.should_preserve(some, context=None) == [False, True, True]


def test_a_failed_background_save_shows_without_waiting_for_the_next(tmp_path, monkeypatch):
    checkpoints = open_at(tmp_path)
    checkpoints.look()
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    checkpoints.save(1, X)
    monkeypatch.setattr("pathlib.Path.rename", os.rename)
    end = time.monotonic() + 30
    with pytest.raises(CheckpointError, match=r"saving to .* failed: .*once there is space"):
        while time.monotonic() < end:
            checkpoints.look()
            time.sleep(0.01)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="saving to .* failed"):
        try:
            checkpoints.look()
        finally:  # as a run leaves
            checkpoints.close()
    again = open_at(tmp_path)
    assert again.latest() is None
    again.close()


@pytest.fixture(autouse=True, scope="module")
def collected():
    """So that what is left to the garbage collector is found here and not in another file."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def started(workdir, how: str, **overrides) -> subprocess.Popen:
    """The real command on a tiny run, cold start alone; `how` is run first in its process."""
    flat = runs.settings(workdir, **overrides)
    flags = [f"--config.{key}={value}" for key, value in flat.items()]
    script = ("import sys\nfrom absl import app\nfrom gtalign_jax import main\n"
              f"from gtalign_jax.config import parse_flags\n{how}\n"
              "app.run(main.main, flags_parser=parse_flags)")
    env = {**os.environ, "XLA_FLAGS": compiler.flags(), "PYTHONPATH": pods.PATH}
    arguments = ["--config=configs/demo_cpu.py", "--config.stages=('sft',)", *flags]
    return subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=pods.ROOT, env=env,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_to_end(*args, **overrides) -> tuple[int, str]:
    (done,) = pods.ended([started(*args, **overrides)], within=240)
    return done.status, done.text


FULL = """
import threading, os, time
def fill():
    while not os.path.isdir(WORKDIR + "/checkpoints/sft/2"):
        time.sleep(0.002)
    with open(WORKDIR + "/filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass
threading.Thread(target=fill, daemon=True).start()
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; skipped where we may not mount one."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(where)],
                             capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_with_space_it_goes_on(small_disk):
    workdir = small_disk / "run"
    how = FULL.replace("WORKDIR", repr(str(workdir)))
    status, text = run_to_end(workdir, how, sft__steps=30)
    error = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(error) == 1 and text.strip().endswith(error[0]), text
    assert str(workdir) in error[0] and "space" in error[0], text
    (workdir / "filler").unlink()
    json.loads((workdir / "config.json").read_text())
    status, text = run_to_end(workdir, "", sft__steps=30)
    assert status == 0 and "sft: continuing after step" in text, text
    assert [row["step"] for row in runs.metrics(workdir, "sft")] == list(range(1, 31))


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_ends_a_run_with_one_line(small_disk):
    workdir = small_disk / "run"
    workdir.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, text = run_to_end(workdir, "")
    assert status == 1 and "Traceback" not in text, text
    assert f"error: {workdir}" in text and "Read-only file system; make it readable and" in text


def test_a_second_run_is_refused_until_the_first_one_is_gone(tmp_path):
    script = ("import sys, time, pathlib\nfrom gtalign_jax.workdir import Files\n"
              f"with Files({str(tmp_path)!r}).claimed():\n"
              "    print('mine', flush=True)\n    time.sleep(600)")
    (holder,) = pods.spawn(script, 1)
    try:
        assert holder.stdout.readline() == "mine\n"
        with pytest.raises(claim.TakenError) as error, workdir.Files(tmp_path).claimed():
            pass
        assert str(error.value).startswith(f"{tmp_path} is in use by process {holder.pid} on host ")
        assert "wait for that run or end it, or set another workdir" in str(error.value)
    finally:
        holder.kill()  # -9: the kernel gives the lock back
        holder.communicate()
    for _ in range(2):  # and so does leaving, in the same process
        with workdir.Files(tmp_path).claimed():
            pass


def test_a_run_whose_bucket_was_taken_over_sends_nothing_more(tmp_path, monkeypatch):
    url = f"file://{tmp_path}/bucket/run"
    monkeypatch.setenv("GTALIGN_CACHE", str(tmp_path / "one machine"))
    old = workdir.Files(url)
    with old.claimed():
        old.pull()
        (old.directory / "metrics.jsonl").write_text("old\n")
        old.push()
        (old.directory / "metrics.jsonl").write_text("old\nnot sent yet\n")
        workdir.Files(url).pull("metrics.jsonl")  # as an export beside the run does
        assert (old.directory / "metrics.jsonl").read_text() == "old\nnot sent yet\n"
        with pytest.raises(claim.TakenError, match="in use by process"), \
                workdir.Files(url).claimed():
            pass  # on the same machine they would share the copy
        monkeypatch.setenv("GTALIGN_CACHE", str(tmp_path / "another machine"))
        new = workdir.Files(url)
        with new.claimed():
            new.pull()
            assert not (new.directory / claim.OWNER_FILE).exists()
            (new.directory / "metrics.jsonl").write_text("new\n")
            new.push()
            (old.directory / "metrics.jsonl").write_text("old\nold\n")
            with pytest.raises(claim.TakenError, match=f"{url} was taken over by process "):
                old.push()
            new.push()
    assert (tmp_path / "bucket/run/metrics.jsonl").read_text() == "new\n"


def test_a_file_is_replaced_whole_or_stays_and_the_error_names_it(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    write_whole(file, "old")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space") as error:
        write_whole(file, "new")
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert explained(error.value) == (
        f"{file}: No space left on device; make space there, then the same command goes on from "
        "its last checkpoint"
    )
    lines = metrics.JsonLines(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(lines, "_file", open("/dev/full", "w"))
    with pytest.raises(OSError, match="No space") as error:
        lines.append([{"stage": "sft", "step": 1}])
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="No space"):
        lines.close()


def full(path, *_, **__):
    path.touch()
    raise OSError(28, "No space left on device")


def test_an_event_file_that_cannot_be_written_does_not_block_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    board = TensorBoard(tmp_path)
    board.write("sft", 1, {"a": 1.0})
    events = board._boards["sft"].file_writer.event_writer
    monkeypatch.setattr(events._ev_writer, "write_event", lambda *_: 1 / 0)
    with pytest.raises(OSError, match="an event file could not be written"):
        for step in range(2, 200):
            board.write("sft", step, {"a": 1.0})
            time.sleep(0.01)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_as_if_nothing_was(
    tmp_path, monkeypatch, caplog
):
    """Bit for bit, the rows of its logs included; evaluated steps are saved, and the best kept."""
    monkeypatch.setattr(collect, "decode", runs.fluent)
    config = runs.config(
        tmp_path, stages=("grpo", "evaluate"), grpo__steps=4, checkpoint__every=3,
        evaluate__every_steps=2, checkpoint__keep=2, checkpoint__keep_best=1,
        evaluate__temperature=1.0,
    )
    run_lib.run(config)
    stages = ("grpo", "evaluate")
    before = {stage: runs.repeatable(runs.metrics(tmp_path, stage)) for stage in stages}
    texts = runs.rows(tmp_path, "rollouts.jsonl")
    checkpoints = tmp_path / "checkpoints/grpo"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["2", "3", "4"]
    params, *_ = export.restore_policy(tmp_path, config)
    DAMAGES["no arrays"](checkpoints / "3")
    DAMAGES["half the JSON"](checkpoints / "4")
    run_lib.run(config)
    assert "3.corrupt" in caplog.text and "4.corrupt" in caplog.text
    assert before == {stage: runs.repeatable(runs.metrics(tmp_path, stage)) for stage in stages}
    assert texts == runs.rows(tmp_path, "rollouts.jsonl")
    again, *_ = export.restore_policy(tmp_path, config)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert a.tobytes() == b.tobytes()
    rows = (tmp_path / "metrics.jsonl").read_text()
    high = {"stage": "evaluate", "step": 2, "reward/total": 9.0}
    (tmp_path / "metrics.jsonl").write_text(rows + json.dumps(high) + "\n")
    assert export.best_step(tmp_path, tmp_path, config) == 2
    other = dataclasses.replace(config.checkpoint, best_metric="none/such")
    with pytest.raises(ValueError, match="--best: no checkpoint in .* has a 'none/such'"):
        export.best_step(tmp_path, tmp_path, dataclasses.replace(config, checkpoint=other))


def test_other_weights_under_the_same_path_are_another_run(tmp_path):
    weights = {"w": np.arange(100_000, dtype=np.float32)}
    save_file(weights, tmp_path / "model.safetensors")
    first = safetensors_io.digest(tmp_path)
    save_file({"w": weights["w"] + 1}, tmp_path / "model.safetensors")
    second = safetensors_io.digest(tmp_path)
    assert first != second
    prints = lambda digest: {"identity": {"model": 1, **digest}}  # noqa: E731
    directory = tmp_path / "ckpt"
    for old in ({"weights": first}, {}):
        shutil.rmtree(directory, ignore_errors=True)
        saver = Checkpointer(directory, CheckpointConfig(), prints(old))
        saver.save(1, X)
        saver.close()
        now = Checkpointer(directory, CheckpointConfig(), prints({"weights": second}))
        if old:
            with pytest.raises(CheckpointError, match=f"weights: saved {first!r}, now {second!r}"):
                now.check()
        else:  # of before weights were looked at
            assert now.check() == 1
        now.close()


def test_what_is_best_must_be_evaluated():
    with pytest.raises(ConfigError, match="checkpoint.keep_best=1, evaluate.every_steps=0, stages"):
        check(runs.config("none", checkpoint__keep_best=1), 1)
    check(runs.config("none", checkpoint__keep_best=1, evaluate__every_steps=2), 1)
