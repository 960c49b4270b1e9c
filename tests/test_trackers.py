"""What the trackers hold is what metrics.jsonl holds; none of them can end or delay a run."""

import json
import logging
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import runs
from tracked import as_tracked, mlflow_run, tensorboard_rows, wandb_records, wandb_rows

from gtalign_jax.config import ConfigError, fingerprint
from gtalign_jax.training import trackers
from gtalign_jax.training.metrics import MetricsWriter, read_rows
from gtalign_jax.training.services import flat_results, mlflow_store, tracked_name
from gtalign_jax.training.trackers import Background, TrackConfig, Tracker, open_trackers

CONFIG = {"seed": 3, "judge": {"api_key_env": "<redacted>"}}
RESULTS = {"after GRPO": {"reward/total": 0.5, "game/price_of_anarchy": float("nan")}}


def opened(workdir: Path, **keys) -> Sequence[Tracker]:
    return open_trackers(TrackConfig(**keys), workdir, name="demo",
                         config_json=json.dumps(CONFIG), settings={"seed": 3})


def follow(workdir: Path, **keys) -> MetricsWriter:
    writer = MetricsWriter(workdir)
    writer.follow(opened(workdir, **keys))
    return writer


def step_of(i: int) -> dict[str, float]:
    return {"reward/total": i / 7, "grpo/kl": 1e-9 * i, "source/math-hard": float("nan"),
            "time/step": time.perf_counter()}


@pytest.fixture(scope="module")
def killed_and_continued(tmp_path_factory) -> Path:
    """SFT, two GRPO steps with an evaluation; then again from GRPO step 1, on to the end."""
    workdir = tmp_path_factory.mktemp("tracked")
    keys = {"wandb": "offline", "mlflow": str(workdir / "mlflow")}
    writer = follow(workdir, **keys)
    writer.write("sft", 1, {"sft/loss": 2.0, "time/step": 1.0})
    for i in (1, 2):
        writer.write("grpo", i, step_of(i))
    writer.write("evaluate", 2, {"reward/total": 0.25})
    writer.close()

    (workdir / "report.html").write_text("<html></html>")
    writer = follow(workdir, **keys)
    writer.truncate("grpo", 1)
    writer.truncate("evaluate", 1)
    for i in (2, 3):
        writer.write("grpo", i, step_of(i))
        writer.write("evaluate", i, {"reward/total": 0.125 * i})
    writer.finish(RESULTS)
    writer.close()
    return workdir


def test_a_name_says_its_stage_first_and_once():
    assert tracked_name("grpo", "grpo/kl") == "grpo/kl"
    assert tracked_name("grpo", "reward/total") == "grpo/reward/total"
    assert tracked_name("evaluate", "reward/total") == "evaluate/reward/total"
    assert flat_results(RESULTS) == {"results/after GRPO/reward/total": 0.5}


def test_wandb_has_each_row_once_in_one_run_across_a_kill(killed_and_continued):
    records = wandb_records(killed_and_continued)
    assert len({r.run.run_id for r in records if r.HasField("run")}) == 1
    assert len(list((killed_and_continued / "wandb").glob("offline-run-*"))) == 2  # two lives
    found = wandb_rows(killed_and_continued)
    assert [row["_step"] for row in found] == list(range(6))  # never back
    for row in read_rows(killed_and_continued / "metrics.jsonl"):
        axis = f"{row['stage']}/step"
        (seen,) = [r for r in found if r.get(axis) == row["step"]]
        expected = as_tracked(row)
        assert seen.keys() - {"_step", "_runtime", "_timestamp", axis} == expected.keys()
        for name, value in expected.items():
            # What the clock said of a step that is repeated is of its first time.
            assert seen[name] == value or (name == "grpo/time/step" and row["step"] == 2)
    axes = {(r.metric.glob_name, r.metric.step_metric) for r in records if r.HasField("metric")}
    assert axes == {(f"{s}/*", f"{s}/step") for s in ("sft", "grpo", "evaluate")}


def test_wandb_has_config_results_and_report_but_nothing_of_the_machine(killed_and_continued):
    records = wandb_records(killed_and_continued)
    first = next(r.run for r in records if r.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert config["seed"] == 3 and config["judge"] == CONFIG["judge"]
    assert (first.display_name, first.project) == ("demo", "gtalign_jax") and not first.host
    summary = {item.key: item.value_json for r in records for item in r.summary.update}
    assert summary["results/after GRPO/reward/total"] == "0.5"
    (artifact,) = [r.artifact for r in records if r.HasField("artifact")]
    assert [entry.path for entry in artifact.manifest.contents] == ["report.html"]
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1, 0]  # killed, finished
    assert not any(r.HasField("output_raw") or r.HasField("stats") for r in records)


def test_mlflow_has_each_row_once_in_one_run_across_a_kill(killed_and_continued):
    client, found = mlflow_run(killed_and_continued / "mlflow", "demo")
    expected: dict[str, dict[int, float]] = {}
    for row in read_rows(killed_and_continued / "metrics.jsonl"):
        for name, value in {**as_tracked(row), f"{row['stage']}/step": row["step"]}.items():
            expected.setdefault(name, {})[row["step"]] = value
    expected["results/after GRPO/reward/total"] = {0: 0.5}
    assert found.data.metrics.keys() == expected.keys()
    for name, values in expected.items():
        history = client.get_metric_history(found.info.run_id, name)
        assert [m.step for m in history] == list(values), name  # none twice
        if name != "grpo/time/step":
            assert [m.value for m in history] == list(values.values())


def test_mlflow_has_config_results_and_report(killed_and_continued):
    client, found = mlflow_run(killed_and_continued / "mlflow", "demo")
    assert found.data.params == {"seed": "3", "judge.api_key_env": "<redacted>"}
    assert (found.info.run_name, found.info.status) == ("demo", "FINISHED")
    folder = Path(client.download_artifacts(found.info.run_id, ""))
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    assert (folder / "report.html").read_text() == "<html></html>"


def test_tensorboard_has_the_same_names_and_values(killed_and_continued):
    rows = read_rows(killed_and_continued / "metrics.jsonl")
    for stage in ("sft", "grpo", "evaluate"):
        seen = {(name, step): value for name, step, value
                in tensorboard_rows(killed_and_continued / "tensorboard" / stage)}
        expected = {(name, row["step"]): value for row in rows if row["stage"] == stage
                    for name, value in row.items()
                    if name not in ("stage", "step") and value is not None}
        assert seen.keys() == expected.keys()
        assert seen == pytest.approx(expected, rel=1e-6)  # it keeps 32 bits


def test_other_settings_are_another_run_and_the_old_ones_again_the_old_run(tmp_path):
    names = [trackers._identity(tmp_path / "trackers.json", settings)
             for settings in ({"seed": 1}, {"seed": 2}, {"seed": 1})]
    assert names[0] == names[2] != names[1]


def test_tracking_is_a_circumstance(tmp_path):
    plain, tracked = (fingerprint(runs.config(tmp_path, **keys)) for keys in (
        {}, {"track__wandb": "offline", "track__name": "x"}))
    assert plain == tracked


class Broken:
    """Fails at every call, or never returns from one."""

    def __init__(self, wait: threading.Event | None = None) -> None:
        self._wait = wait

    def write(self, *_) -> None:
        if self._wait is not None:
            self._wait.wait(60)
        raise OSError("no route to https://me:sesame@host/\nsecond line")

    truncate = finish = close = write


def test_a_tracker_that_fails_is_mentioned_once_and_the_rows_are_written(tmp_path, caplog):
    def never() -> Broken:
        raise ConnectionError("refused")

    writer = MetricsWriter(tmp_path)
    writer.follow([Background("Broken", Broken), Background("Dead", never)])
    for i in (1, 2, 3):
        writer.write("grpo", i, {"reward/total": i})
    writer.finish(RESULTS)
    writer.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    said = sorted(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)
    assert len(said) == 2
    assert said[0].startswith("Broken misses rows of this run, which goes on")
    assert said[0].endswith("OSError: no route to https://host/ second line")
    assert said[1].startswith("Dead misses") and said[1].endswith("ConnectionError: refused")


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_for_long_the_end(tmp_path, caplog):
    wait = threading.Event()
    writer = MetricsWriter(tmp_path)
    writer.follow([Background("Slow", lambda: Broken(wait), close_s=0.3)])
    began = time.monotonic()
    for i in range(1, trackers.QUEUE // 100):
        writer.write("grpo", i, {"reward/total": i})
    writer.close()
    assert time.monotonic() - began < 10
    wait.set()
    assert "Slow misses rows" in caplog.text and "not sent 0.3 s after the end" in caplog.text


@pytest.mark.parametrize("keys, package", [({"wandb": "offline"}, "wandb"),
                                           ({"mlflow": "runs/mlflow"}, "mlflow")])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, keys, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"track\.{package}=.* needs the package {package}: "
                                         r"pip install -r requirements-track\.txt"):
        opened(tmp_path, **keys)


def test_what_is_refused_has_begun_no_run_elsewhere(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(trackers, "Background", lambda name, start: begun.append(name))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match="needs the package mlflow"):
        opened(tmp_path, wandb="offline", mlflow="runs/mlflow")
    assert not begun


def test_without_an_account_online_is_refused_at_the_start(tmp_path, monkeypatch):
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"track\.wandb='online' needs an account"):
        opened(tmp_path, wandb="online")


@pytest.mark.parametrize("keys, message", [
    ({"track__wandb": "on"}, r"track\.wandb='on': expected one of \('', 'online', 'offline'\)"),
    ({"track__mlflow": "file:///x"}, r"track\.mlflow='file:///x': expected a folder, sqlite"),
    ({"track__mlflow": "ftp://me:sesame@x"}, r"track\.mlflow='ftp://x': expected"),
    ({"track__mlflow": "sqlite:///"}, r"track\.mlflow='sqlite:///': expected"),
    ({"track__wandb": "offline", "track__wandb_project": ""}, r"track\.wandb_project=''"),
])
def test_a_bad_value_is_named_with_what_is_allowed(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        runs.config(tmp_path, **keys)


def test_where_mlflow_keeps_things(tmp_path, monkeypatch):
    assert mlflow_store("https://host:5000") == ("https://host:5000", None)
    folder = tmp_path / "a" / "b"
    expected = (f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri())
    assert mlflow_store(str(folder)) == expected == mlflow_store(f"sqlite:///{folder}/mlflow.db")
    assert folder.is_dir()
    monkeypatch.chdir(tmp_path)
    assert mlflow_store("https_runs")[0] == f"sqlite:///{tmp_path}/https_runs/mlflow.db"
