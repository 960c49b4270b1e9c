"""A work directory in a bucket: another directory, named by a URL, stands in for it."""

import json
import sys
from pathlib import Path

import fsspec
import pytest
import runs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from gtalign_jax import export, workdir
from gtalign_jax import main as command
from gtalign_jax import run as run_lib
from gtalign_jax.training import collect
from gtalign_jax.training import stage as stage_lib
from gtalign_jax.training.checkpoint import Checkpointer
from gtalign_jax.workdir import Files, TransferError


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv("GTALIGN_CACHE", str(tmp_path / "copies"))


def test_a_local_directory_is_itself_and_nothing_is_copied(tmp_path):
    files = Files(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("row\n")
    files.push()
    files.pull()
    assert files.directory == tmp_path and workdir.local(tmp_path) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_was_pushed_on_one_machine_is_found_on_another(tmp_path, monkeypatch):
    bucket = tmp_path / "bucket"
    here = Files(f"file://{bucket}/run")
    here.pull()  # nothing is there yet
    (here.directory / "tokenizer").mkdir(parents=True)
    (here.directory / "tokenizer/vocab.json").write_text("{}")
    (here.directory / "metrics.jsonl").write_text("1\n")
    here.push()
    (here.directory / "metrics.jsonl").write_text("1\n2\n")
    here.push()
    (bucket / "run/checkpoints/grpo/5").mkdir(parents=True)
    (bucket / "run/checkpoints/grpo/5/state").write_text("large")

    monkeypatch.setenv("GTALIGN_CACHE", str(tmp_path / "other machine"))
    there = Files(f"file://{bucket}/run")
    there.pull("tokenizer")
    assert not (there.directory / "metrics.jsonl").exists()
    there.pull()
    assert (there.directory / "metrics.jsonl").read_text() == "1\n2\n"
    assert (there.directory / "tokenizer/vocab.json").read_text() == "{}"
    assert not (there.directory / "checkpoints").exists()  # each process reads its part there


def test_only_what_has_changed_is_sent_again(tmp_path):
    files = Files(f"file://{tmp_path}/run")
    files.directory.mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (files.directory / name).write_text("old")
    files.push()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text("seen in the bucket")
    (files.directory / "metrics.jsonl").write_text("newer")
    files.push()
    assert (tmp_path / "run/config.json").read_text() == "seen in the bucket"
    assert (tmp_path / "run/metrics.jsonl").read_text() == "newer"


def test_a_directory_is_found_where_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    for root in (f"{tmp_path}", f"file://{tmp_path}"):
        assert workdir.is_dir(f"{root}/run") and not workdir.is_dir(f"{root}/none")


class HttpError(Exception):
    """As gcsfs has it: no OSError."""


@pytest.fixture
def outage(monkeypatch):
    """Makes calls of a method of the file system fail: all, or the first few."""
    monkeypatch.setattr(workdir, "PAUSES_S", (0.0, 0.0))
    calls = []

    def plan(method: str, failing: int = 1000) -> list[str]:
        honest = getattr(LocalFileSystem, method)

        def wrapped(self, path, *args, **options):
            calls.append(Path(path).name)
            if len(calls) <= failing:
                raise HttpError("503, Service Unavailable")
            return honest(self, path, *args, **options)

        monkeypatch.setattr(LocalFileSystem, method, wrapped)
        return calls

    return plan


def test_the_copy_becomes_what_the_bucket_holds_and_leftovers_of_another_run_go(tmp_path):
    bucket = tmp_path / "run"
    (bucket / "hf").mkdir(parents=True)
    (bucket / "hf/model.safetensors").write_text("large")
    (bucket / "metrics.jsonl").write_text("1\n")
    files = Files(f"file://{bucket}")
    files.directory.mkdir(parents=True)
    (files.directory / "results.json").write_text("of a run whose bucket was emptied since")
    (files.directory / "metrics.jsonl").write_text("1\n2\n")
    files.pull()
    files.push()
    assert [path.name for path in files.directory.iterdir()] == ["metrics.jsonl"]
    assert (bucket / "metrics.jsonl").read_text() == "1\n"
    assert not (bucket / "results.json").exists()


def test_what_is_deleted_here_is_deleted_there(tmp_path):
    files = Files(f"file://{tmp_path}/run")
    files.directory.mkdir(parents=True)
    (files.directory / "results.json").write_text("{}")
    files.push()
    (files.directory / "results.json").unlink()
    (files.directory / "results.digest").write_text("new")
    files.push()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["results.digest"]


def test_urls_have_copies_of_their_own(tmp_path):
    urls = ("gs://a/run", "gs://b/run", "gs://a/run/run", "s3://a/run")
    directories = {workdir.local(url) for url in urls}
    assert len(directories) == 4
    assert {path.parent for path in directories} == {tmp_path / "copies/runs"}
    assert workdir.local("gs://a/run/") == workdir.local("gs://a/run")


def test_an_upload_that_fails_twice_is_tried_again(tmp_path, outage):
    files = Files(f"file://{tmp_path}/run")
    files.directory.mkdir(parents=True)
    (files.directory / "config.json").write_text("{}")
    asked = outage("put_file", failing=2)
    files.push()
    assert asked == ["config.json"] * 3
    assert (tmp_path / "run/config.json").read_text() == "{}"


def test_an_upload_that_never_works_names_file_and_url(tmp_path, outage):
    url = f"file://{tmp_path}/run"
    files = Files(url)
    files.directory.mkdir(parents=True)
    (files.directory / "config.json").write_text("{}")
    asked = outage("put_file")
    with pytest.raises(TransferError) as error:
        files.push()
    assert str(error.value) == (
        f"sending {files.directory}/config.json to {url}/config.json failed: HttpError: "
        "503, Service Unavailable (tried 3 times)"
    )
    assert len(asked) == 3


def test_storage_that_does_not_answer_is_not_taken_for_an_empty_one(tmp_path, outage):
    (tmp_path / "run").mkdir()
    files = Files(f"file://{tmp_path}/run")
    files.directory.mkdir(parents=True)
    (files.directory / "metrics.jsonl").write_text("1\n")
    outage("info")
    with pytest.raises(TransferError, match=f"listing file://{tmp_path}/run failed"):
        files.pull()
    with pytest.raises(TransferError, match="looking at"):
        workdir.is_dir(f"file://{tmp_path}/run")
    assert (files.directory / "metrics.jsonl").exists()


def test_a_missing_driver_is_named_with_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    monkeypatch.delitem(_registry, "gs", raising=False)
    monkeypatch.setattr("gtalign_jax.command.from_flag", lambda *_: runs.config("gs://bucket/run"))
    with pytest.raises(SystemExit) as status:
        command.main([])
    assert status.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: gs://bucket/run cannot be opened: ")
    assert "pip install -r requirements-tpu.txt" in said
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="nonsense://x cannot be opened: Protocol not known"):
        Files("nonsense://x")


def test_an_object_store_without_directories_does_as_well(tmp_path):
    files = Files("memory://bucket/run")
    files.pull()
    (files.directory / "tensorboard/grpo").mkdir(parents=True)
    (files.directory / "tensorboard/grpo/events").write_bytes(b"\0")
    (files.directory / "config.json").write_text("{}")
    files.push()
    with fsspec.open("memory://bucket/run/checkpoints/grpo/5/state", "wb") as file:
        file.write(b"large")
    for path in ("tensorboard/grpo/events", "config.json"):
        (files.directory / path).unlink()
    again = Files("memory://bucket/run")
    again.pull()
    found = [str(p.relative_to(again.directory)) for p in again.directory.rglob("*") if p.is_file()]
    assert sorted(found) == ["config.json", "tensorboard/grpo/events"]
    assert workdir.is_dir("memory://bucket/run/checkpoints/grpo")
    assert not workdir.is_dir("memory://bucket/run/checkpoints/sft")


@pytest.mark.slow
def test_a_run_in_a_bucket_fails_and_goes_on_on_another_machine(tmp_path, monkeypatch):
    bucket, out = tmp_path / "bucket/run", tmp_path / "out"
    config = runs.config(f"file://{bucket}", stages=("grpo", "export"), grpo__steps=2)
    # Orbax knows no file:// URLs; it is given the path behind them.
    where = lambda root, stage: f"{root}/checkpoints/{stage}".removeprefix("file://")  # noqa: E731
    monkeypatch.setattr(export, "checkpoint_dir", where)
    monkeypatch.setattr(collect, "decode", runs.fluent)
    check, save, saved = stage_lib._check_finite, Checkpointer.save, []

    def diverging(stage, step, guard):
        check(stage, step, guard)
        if step == 2:
            raise FloatingPointError(f"planted at step {step}")

    def looking(self, step, *args):
        """What lies in the bucket when a checkpoint is about to be written."""
        saved.append(step)
        rows, rollouts = runs.metrics(bucket, "grpo"), runs.rows(bucket, "rollouts.jsonl")
        assert [row["step"] for row in rows] == list(range(1, step + 1))
        assert [row["step"] for row in rollouts[::16]] == list(range(1, step + 1))
        save(self, step, *args)

    monkeypatch.setattr(Checkpointer, "save", looking)
    with monkeypatch.context() as planted, pytest.raises(FloatingPointError, match="at step 2"):
        planted.setattr(stage_lib, "_check_finite", diverging)
        run_lib.run(config)
    before, texts = runs.metrics(bucket, "grpo"), runs.rows(bucket, "rollouts.jsonl")
    assert [row["step"] for row in before] == [1, 2], "the log of the failed step was sent, too"
    assert json.loads((bucket / "config.json").read_text())["workdir"] == f"file://{bucket}"

    monkeypatch.setenv("GTALIGN_CACHE", str(tmp_path / "other machine"))
    run_lib.run(config)
    assert saved == [1, 2], "the second run went on where the first had saved"
    assert runs.repeatable(runs.metrics(bucket, "grpo")) == runs.repeatable(before)
    assert runs.rows(bucket, "rollouts.jsonl") == texts
    assert (bucket / "welfare.png").stat().st_size > 10_000
    assert not list((tmp_path / "other machine").rglob("*.safetensors")), "only in the bucket"
    assert export.main(["--workdir", f"file://{bucket}", "--out", f"file://{out}"]) == 0
    weights = (bucket / "hf/model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == weights
    assert {p.name for p in out.iterdir()} == {p.name for p in (bucket / "hf").iterdir()}
