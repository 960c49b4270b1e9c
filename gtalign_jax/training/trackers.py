"""Where a run's numbers go besides metrics.jsonl: TensorBoard, and on request two more services.

    TensorBoard        always: <work directory>/tensorboard/<stage>
    Weights & Biases   track.wandb="online", or "offline": to <work directory>/wandb, from where
                       `wandb sync <work directory>/wandb/offline-run-*` sends it later
    MLflow             track.mlflow=FOLDER (offline: FOLDER/mlflow.db), sqlite:///FILE or a server

All three get the rows of metrics.jsonl under the names that these have. TensorBoard holds each
stage in a directory of its own. In the two others one run holds all stages, and stages share names
(`reward/total` is of GRPO's completions, and of held-out ones): a name says its stage first, once,
so `grpo/kl`, `grpo/reward/total`, `evaluate/reward/total`, `sft/time/update`. The x axis is the
stage's own step: MLflow's `step`; in Weights & Biases the metric `<stage>/step`, because its own
step counts rows and never goes back. What is not finite is left out. Beside the rows go the
config without secrets, the closing evaluations as `results/<label>/<name>`, and report.html.

A run that is killed and continued stays one run there, too, as long as its config does (but for
circumstances). Rows that were sent before the kill are not sent again, nor can they be taken back:
steps that are repeated keep the seconds of their first time. Seconds aside they are the same rows.

Both services are spoken to from threads of their own. Where one fails, that is said once, and the
training goes on, without waiting; metrics.jsonl has all rows. Only process 0 tracks.
"""

import dataclasses
import errno
import hashlib
import importlib
import json
import logging
import os
import queue
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from gtalign_jax.training.files import naming
from gtalign_jax.training.services import SERVERS, MLflow, Results, Wandb, read_known, write_json

log = logging.getLogger(__name__)

WANDB_MODES = ("", "online", "offline")
TRACKERS_FILE = "trackers.json"
CLOSE_S = 25.0  # what a run waits at its end for what is still to be sent
MLFLOW_ENVIRONMENT = {  # what is set there already, stays
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # with 7, a dead server is noticed after four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
QUEUE = 10_000  # rows that may wait to be sent; what comes on top is left out


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """Which services besides TensorBoard follow a run; `pip install -r requirements-track.txt`."""

    name: str = ""  # of the run; "": its work directory's name
    wandb: str = ""  # "online", "offline"; "": not at all
    wandb_project: str = "gtalign_jax"
    wandb_entity: str = ""  # "": the account's default
    mlflow: str = ""  # a folder, sqlite:///FILE, http(s)://SERVER; "": not at all
    mlflow_experiment: str = "gtalign_jax"

    def __post_init__(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ValueError(f"track.wandb={self.wandb!r}: expected one of {WANDB_MODES}")
        scheme, _, rest = self.mlflow.partition("://")
        if "://" in self.mlflow and (scheme not in ("http", "https", "sqlite") or not rest
                                     or (scheme == "sqlite" and not rest.strip("/"))):
            raise ValueError(
                f"track.mlflow={without_credentials(self.mlflow)!r}: expected a folder, "
                "sqlite:///FILE, http://SERVER or https://SERVER"
            )
        for asked, key in ((self.wandb, "wandb_project"), (self.mlflow, "mlflow_experiment")):
            if asked and not getattr(self, key):
                raise ValueError(f"track.{key}='': expected a name")


class Tracker(Protocol):
    """What follows a run. Steps of a stage come in order; values are finite."""

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One row of a stage."""

    def truncate(self, stage: str, step: int) -> None:
        """The run continues after `step`: what came later is forgotten, where that is possible."""

    def finish(self, results: Results, directory: Path) -> None:
        """The run has reached its end: evaluations by label, and where the report may lie."""

    def close(self) -> None:
        """Nothing more will come; without `finish` before, because the run was interrupted."""


class TensorBoard:
    """Event files, one directory per stage."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._boards: dict[str, SummaryWriter] = {}

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        board = self._board(stage, None)
        for name, value in values.items():
            if not _worker(board).is_alive():
                raise OSError(errno.EIO, "an event file could not be written, as on a full disk",
                              str(self._directory))
            board.add_scalar(name, value, step)

    def truncate(self, stage: str, step: int) -> None:
        self._board(stage, step + 1)

    def finish(self, results: Results, directory: Path) -> None:
        del results, directory

    def flush(self) -> None:
        with naming(self._directory):
            for board in self._boards.values():
                board.flush()

    def close(self) -> None:
        with naming(self._directory):
            for board in self._boards.values():
                if _worker(board).is_alive():
                    board.close()
                else:  # nobody reads the queue, which would be waited for at exit
                    board.file_writer.event_writer._event_queue.cancel_join_thread()

    def _board(self, stage: str, purge_step: int | None) -> SummaryWriter:
        if stage not in self._boards:
            directory = str(self._directory / stage)
            self._boards[stage] = SummaryWriter(
                directory, purge_step=purge_step, flush_secs=20, max_queue=QUEUE
            )
        return self._boards[stage]


def _worker(board: SummaryWriter) -> threading.Thread:
    """The thread that writes: it ends with its first error, tells nobody, and the queue to it, once
    it is full, would block the run for good."""
    return board.file_writer.event_writer._worker


class Background:
    """A tracker in a thread of its own: it can neither end the training nor hold it up."""

    def __init__(self, name: str, start: Callable[[], Tracker], close_s: float = CLOSE_S) -> None:
        """`start` makes the tracker, in that thread, at once; where it fails, with each row."""
        self._name, self._start, self._close_s = name, start, close_s
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(QUEUE)
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._put("write", stage, step, dict(values))

    def truncate(self, stage: str, step: int) -> None:
        self._put("truncate", stage, step)

    def finish(self, results: Results, directory: Path) -> None:
        self._put("finish", {label: dict(means) for label, means in results.items()}, directory)

    def close(self) -> None:
        self._put("close")
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            self._warn(f"{self._queue.qsize() + 1} rows not sent {self._close_s:g} s after the end")

    def _put(self, method: str, *arguments: Any) -> None:
        try:
            self._queue.put_nowait((method, arguments))
        except queue.Full:
            self._warn(f"{QUEUE} rows wait to be sent")

    def _work(self) -> None:
        tracker = self._attempt(self._start)
        while True:
            method, arguments = self._queue.get()
            if tracker is None and method != "close":
                tracker = self._attempt(self._start)
            if tracker is not None:
                self._attempt(getattr(tracker, method), *arguments)
            if method == "close":
                return

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        # Whatever it is, of whichever library: a training is worth more than its picture.
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")
            return None

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            text = " ".join(without_credentials(problem).split())
            log.warning("%s misses rows of this run, which goes on (metrics.jsonl has all): %.300s",
                        self._name, text)


def open_trackers(cfg: TrackConfig, directory: Path, *, name: str, config_json: str,
                  settings: Mapping[str, Any]) -> Sequence[Tracker]:
    """The services that `cfg` asks for, in threads of their own.

    Args:
      directory: the work directory, or its copy here: remembers which run this is.
      name: of the run, where `cfg` has none.
      config_json: the resolved config without secrets.
      settings: those that make a run another one: with them, it is another one there, too.
    Raises ValueError where a package or the credentials of an online service are missing.
    """
    if not (cfg.wandb or cfg.mlflow):
        return ()
    identity = _identity(directory / TRACKERS_FILE, settings)
    name, config = cfg.name or name, json.loads(config_json)
    # Both first: what is refused must not have begun a run at the other service.
    wandb = _load_wandb(cfg) if cfg.wandb else None
    mlflow = _load_mlflow(cfg) if cfg.mlflow else None
    found: list[Tracker] = []
    if cfg.wandb:
        found.append(Background("Weights & Biases", lambda: Wandb(
            wandb, directory, identity, name=name, config=config, mode=cfg.wandb,
            project=cfg.wandb_project, entity=cfg.wandb_entity,
        )))
    if cfg.mlflow:
        found.append(Background("MLflow", lambda: MLflow(
            mlflow, cfg.mlflow, identity, name=name, config=config,
            experiment=cfg.mlflow_experiment,
        )))
    return found


def _load_wandb(cfg: TrackConfig) -> ModuleType:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # of its own crashes, to its makers
    os.environ.setdefault("WANDB_SILENT", "true")
    wandb = _load("wandb", f"track.wandb={cfg.wandb!r}")
    if cfg.wandb == "online" and not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "track.wandb='online' needs an account: run `wandb login`, set WANDB_API_KEY, or use "
            "track.wandb=offline"
        )
    return wandb


def _load_mlflow(cfg: TrackConfig) -> ModuleType:
    for variable, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    asked = f"track.mlflow={without_credentials(cfg.mlflow)!r}"
    mlflow = _load("mlflow", asked)
    if not cfg.mlflow.startswith(SERVERS):
        for package in ("sqlalchemy", "alembic"):
            _load(package, asked)
    # A new store tells of each of its tables, a dead server of each attempt to reach it.
    for name, level in (("mlflow", "WARNING"), ("alembic", "WARNING"),
                        ("urllib3.connectionpool", "ERROR")):
        logging.getLogger(name).setLevel(level)
    return mlflow


def _load(package: str, asked: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{asked} needs the package {package}: pip install -r requirements-track.txt ({error})"
        ) from error


def without_credentials(text: str) -> str:
    """Text without the user and the password of its URLs."""
    return re.sub(r"(?<=://)[^/\s]+@", "", text)


def _identity(path: Path, settings: Mapping[str, Any]) -> str:
    """The name that a run of these settings had here before, or a new one."""
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    known = read_known(path)
    if digest not in known:
        known[digest] = uuid.uuid4().hex[:12]
        write_json(path, known)
    return known[digest]
