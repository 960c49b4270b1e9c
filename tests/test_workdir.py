"""A work directory in a bucket: another directory, named by a URL, stands in for it."""

import pytest
import runs

from gtalign_jax import export, workdir
from gtalign_jax import run as run_lib
from gtalign_jax.training import collect
from gtalign_jax.workdir import Files


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv("GTALIGN_RUNS", str(tmp_path / "copies"))


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

    monkeypatch.setenv("GTALIGN_RUNS", str(tmp_path / "other machine"))
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


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "decode", runs.fluent)
    # Orbax knows no file:// URLs; it is given the path behind them.
    where = lambda root, stage: f"{root}/checkpoints/{stage}".removeprefix("file://")  # noqa: E731
    monkeypatch.setattr(export, "checkpoint_dir", where)
    bucket, plain = tmp_path / "bucket/run", tmp_path / "plain"
    run_lib.run(runs.config(plain, stages=("sft", "grpo", "export")))
    run_lib.run(runs.config(f"file://{bucket}", stages=("sft",)))
    monkeypatch.setenv("GTALIGN_RUNS", str(tmp_path / "other machine"))
    run_lib.run(runs.config(f"file://{bucket}", stages=("sft", "grpo", "export")))
    for stage in ("sft", "grpo"):
        assert runs.repeatable(runs.metrics(bucket, stage)) == runs.repeatable(
            runs.metrics(plain, stage)
        )
    assert runs.rows(bucket, "rollouts.jsonl") == runs.rows(plain, "rollouts.jsonl")
    assert (bucket / "hf/model.safetensors").read_bytes() == (
        plain / "hf/model.safetensors"
    ).read_bytes()
    out = tmp_path / "out"
    assert export.main(["--workdir", f"file://{bucket}", "--out", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (
        plain / "hf/model.safetensors"
    ).read_bytes()
