"""Every judgement, kept by what was judged: nothing is asked twice, and a run can be scored again.

A judgement is found by a hash of the judge (model and its settings), the version of the prompts and
the prompt itself, completion and all. It is one line of JSON in a file that only grows; a process
that is killed loses at most the line that it was writing. A reader skips a line that is not whole.

    {"key", "score", "reply", "kind", "data_source", "model", "version", "time"}

Failures are not kept: asked again, they may go well. A process appends to files of its own,
`<process>-<number>.jsonl`, at most MAX_BYTES each, so that a bucket is sent little; it reads all.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gtalign_jax.reward import prompts
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import (
    Judge,
    Judgement,
    JudgeRequest,
    missing,
    read_verdict,
    scale_of,
)

MAX_BYTES = 32 << 20

log = logging.getLogger(__name__)


class JudgementStore:
    """The judgements of a directory. Safe to use from several threads."""

    def __init__(self, directory: str | Path, process: int = 0):
        """Reads what is there; the directory is created with the first judgement."""
        self._directory, self._process = Path(directory), process
        self._lock = threading.Lock()
        self._places: dict[bytes, tuple[Path, int]] = {}  # a hash -> where its line begins
        self._file: Path | None = None
        for path in sorted(filter(Path.is_file, self._directory.glob("*.jsonl"))):
            for at, row in _rows(path):
                self._places[bytes.fromhex(row["key"])] = (path, at)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of a key, None where there is none (any more: files may be changed by others)."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        path, at = place
        try:
            with path.open("rb") as file:
                file.seek(at)
                row = _row(file.readline())
        except FileNotFoundError:
            row = None
        if row is None or row["key"] != key:
            with self._lock:
                self._places.pop(bytes.fromhex(key), None)
            return None
        return row

    def put(self, key: str, **fields: Any) -> None:
        """Appends a row; a key that is there already keeps its row."""
        line = json.dumps({"key": key, **fields}, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            if bytes.fromhex(key) in self._places:
                return
            if self._file is None or self._file.stat().st_size + len(line) > MAX_BYTES:
                self._file = self._next_file()
            # One write each, to a file opened to append: whole, or not there.
            handle = os.open(self._file, os.O_WRONLY | os.O_APPEND)
            try:
                at = os.fstat(handle).st_size
                written = os.write(handle, line)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._file)) from error
            finally:
                os.close(handle)
            if written < len(line):
                path, self._file = self._file, None  # nothing may follow half a line
                raise OSError(f"{path}: {written} of {len(line)} bytes written; is the disk full?")
            self._places[bytes.fromhex(key)] = (self._file, at)

    def _next_file(self) -> Path:
        """A new one for every process and every start: what a killed one left half is no one's."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for number in range(1_000_000):
            path = self._directory / f"{self._process:04d}-{number:06d}.jsonl"
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            return path
        raise OSError(f"{self._directory}: too many files of process {self._process}")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    at, bad = 0, 0
    with path.open("rb") as file:
        for line in file:
            row = _row(line)
            if row is None:
                bad += 1
            else:
                yield at, row
            at += len(line)
    if bad:
        log.warning("%s: %d lines are no judgements and are left out", path, bad)


def _row(line: bytes) -> dict[str, Any] | None:
    """A whole row, None for anything else."""
    try:
        row = json.loads(line)
        bytes.fromhex(row["key"])
        return row if line.endswith(b"\n") and isinstance(row["reply"], str) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def key_of(request: JudgeRequest, judge: dict[str, Any]) -> str:
    """The hash by which the judgement of a request by a judge (`JudgeConfig.identity`) is found."""
    what = [prompts.VERSION, judge, prompts.messages(request), scale_of(request)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def remembering(cfg: JudgeConfig, store: JudgementStore, ask: Callable[..., list[Judgement]]
                ) -> Judge:
    """`ask`, a judge that tells of each judgement as it comes, asked only what the store lacks.

    Of equal requests one is asked. With `judge.mode="replay"` nothing is asked: what the store does
    not hold is missing.
    """
    judge = cfg.identity()

    def remembered(requests: Sequence[JudgeRequest]) -> list[Judgement]:
        keys = [key_of(request, judge) for request in requests]
        found = {key: _stored(store.get(key), request)
                 for key, request in zip(keys, requests, strict=True)}
        lacking = {key: request for key, request in zip(keys, requests, strict=True)
                   if found[key] is None}
        if cfg.mode == "replay":
            gone = missing("not_stored", "judge.mode='replay': the store holds no such judgement")
            found |= dict.fromkeys(lacking, gone)
        else:  # also without any: a model on the run's own devices is asked by all processes
            names = list(lacking)

            def keep(i: int, judgement: Judgement) -> None:
                if judgement.score is not None:
                    request = lacking[names[i]]
                    store.put(names[i], score=judgement.score, reply=judgement.reply,
                              kind=request.kind, data_source=request.data_source,
                              model=cfg.model, version=prompts.VERSION, time=time.time())

            found |= zip(names, ask(list(lacking.values()), keep), strict=True)
        return [found[key] for key in keys]

    return remembered


def _stored(row: dict[str, Any] | None, request: JudgeRequest) -> Judgement | None:
    """The judgement of a row, its reply read anew: a store is as good as the parser of today."""
    if row is None:
        return None
    read = read_verdict(row["reply"], *scale_of(request))
    if read.score is None:
        return None
    return Judgement(read.score, read.reply, stored=True)
