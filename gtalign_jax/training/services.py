"""The two services that may follow a run, each as a tracker (trackers.py): one run of each.

What a metric is called there is `tracked_name`. Neither knows of threads: what fails, raises.
"""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from gtalign_jax.model.safetensors_io import read_json
from gtalign_jax.training.files import write_whole

WANDB_ROWS_FILE, REPORT_FILE = "wandb.json", "report.html"
INIT_S = 30.0  # what it may take to answer at all
FINISH_S = 20.0  # what Weights & Biases may take to send the rest of a run
SERVERS = ("http://", "https://")  # how the address of an MLflow server begins
_RUN_TAG = "gtalign_jax.run"

Results = Mapping[str, Mapping[str, float]]


class Wandb:
    """One run of Weights & Biases. Its own step counts rows; curves go over `<stage>/step`."""

    def __init__(self, module: ModuleType, directory: Path, identity: str, *, name: str,
                 config: Mapping[str, Any], mode: str, project: str, entity: str) -> None:
        """Begins the run `identity`, or goes on with it. Its files go to `directory`/wandb."""
        self._module, self._identity = module, identity
        self._file = directory / WANDB_ROWS_FILE  # offline, nobody else knows what was sent
        known = read_known(self._file).get(identity, {})
        self._run = module.init(
            project=project, entity=entity or None, mode=mode,
            id=identity, resume="allow", name=name, config=dict(config), dir=str(directory),
            reinit="create_new",
            settings=module.Settings(
                silent=True, console="off", init_timeout=INIT_S, finish_timeout=FINISH_S,
                # Machine, user and command line are nobody's business, and may hold secrets.
                host="", disable_git=True, disable_code=True, save_code=False, x_disable_meta=True,
                x_disable_machine_info=True, x_disable_stats=True, x_save_requirements=False,
            ),
        )
        # Online the service may know of later rows than a file that came back from a bucket.
        self._last = _merge(known.get("last", {}), self._run.summary)
        self._rows = max(known.get("rows", 0), self._run.step)
        self._defined: set[str] = set()
        self._finished = False

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if step <= self._last.get(stage, 0):
            return
        if stage not in self._defined:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._defined.add(stage)
        row = {tracked_name(stage, name): value for name, value in values.items()}
        self._run.log({f"{stage}/step": step, **row}, step=self._rows, commit=True)
        self._rows, self._last[stage] = self._rows + 1, step
        sent = {"rows": self._rows, "last": self._last}
        write_json(self._file, read_known(self._file) | {self._identity: sent})

    def truncate(self, stage: str, step: int) -> None:
        pass

    def finish(self, results: Results, directory: Path) -> None:
        self._run.summary.update(flat_results(results))
        if (directory / REPORT_FILE).exists():
            report = self._module.Artifact(f"report-{self._identity}", type="report")
            report.add_file(str(directory / REPORT_FILE), policy="immutable")
            self._run.log_artifact(report)
        self._finished = True

    def close(self) -> None:
        self._run.finish(exit_code=0 if self._finished else 1)


class MLflow:
    """One run of MLflow, found again by a tag. Its store remembers how far each stage is."""

    def __init__(self, module: ModuleType, where: str, identity: str, *, name: str,
                 config: Mapping[str, Any], experiment: str) -> None:
        """Begins the run tagged `identity` in the store `where`, or goes on with it."""
        self._metric = module.entities.Metric
        uri, artifacts = mlflow_store(where)
        self._client = client = module.MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(experiment)
        number = (known.experiment_id if known else
                  client.create_experiment(experiment, artifact_location=artifacts))
        found = client.search_runs([number], f"tags.`{_RUN_TAG}` = '{identity}'")
        run = found[0] if found else client.create_run(
            number, run_name=name, tags={_RUN_TAG: identity}
        )
        self._id = run.info.run_id
        if found:
            client.update_run(self._id, status="RUNNING")
        else:  # parameters are written once: circumstances may change, and the file says how
            for key, value in _flat(config).items():
                client.log_param(self._id, key, value[:6000])
        client.log_dict(self._id, dict(config), "config.json")
        self._last = _merge({}, run.data.metrics)
        self._finished = False

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if step <= self._last.get(stage, 0):
            return
        row = {tracked_name(stage, name): value for name, value in values.items()}
        self._log({f"{stage}/step": step, **row}, step)
        self._last[stage] = step

    def truncate(self, stage: str, step: int) -> None:
        pass

    def finish(self, results: Results, directory: Path) -> None:
        old = self._client.get_run(self._id).data.metrics
        self._log({k: v for k, v in flat_results(results).items() if old.get(k) != v}, 0)
        if (directory / REPORT_FILE).exists():
            self._client.log_artifact(self._id, str(directory / REPORT_FILE))
        self._finished = True

    def close(self) -> None:
        self._client.set_terminated(self._id, "FINISHED" if self._finished else "KILLED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):  # a server takes no more at once
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])


def tracked_name(stage: str, name: str) -> str:
    """A metric's name in a run that holds all stages: `<stage>/<area>/<name>`, the stage once."""
    return name if name.startswith(f"{stage}/") else f"{stage}/{name}"


def flat_results(results: Results) -> dict[str, float]:
    """`results/<label>/<name>` of every number that is finite."""
    return {f"results/{label}/{name}": float(value) for label, means in results.items()
            for name, value in means.items() if math.isfinite(value)}


def mlflow_store(where: str) -> tuple[str, str | None]:
    """(MLflow's tracking URI, where a local one keeps files) of `track.mlflow`; makes a folder."""
    if where.startswith(SERVERS):
        return where, None
    is_file = where.startswith("sqlite://")
    # As in SQLAlchemy, what follows the third stroke is the path.
    file = Path(where.removeprefix("sqlite:///") if is_file else Path(where) / "mlflow.db")
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{file}", (file.parent / "artifacts").as_uri()


def _merge(last: Mapping[str, int], values: Any) -> dict[str, int]:
    """The last step by stage, of a file and of what a service shows as the latest values."""
    merged = dict(last)
    for name in dict(values):
        stage, _, metric = name.partition("/")
        if metric == "step":
            merged[stage] = max(merged.get(stage, 0), int(values[name]))
    return merged


def _flat(tree: Any, key: str = "") -> dict[str, str]:
    if not isinstance(tree, Mapping):
        return {key: str(tree)}
    parts = (_flat(value, f"{key}.{name}" if key else name) for name, value in tree.items())
    return {name: value for part in parts for name, value in part.items()}


def read_known(path: Path) -> dict[str, Any]:
    """The JSON object of a file, {} where there is none. Raises ValueError for anything else."""
    with contextlib.suppress(FileNotFoundError):
        return read_json(path)
    return {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value) + "\n")
