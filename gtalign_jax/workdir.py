"""Where the files of a run lie: in its work directory, or, where that is a URL, in a local copy.

    workdir=runs/demo       everything lies there; several hosts must share it
    workdir=gs://bucket/x   checkpoints go straight to the bucket, from every process; all else lies
                            in a copy on the machine of process 0 and is sent from there, because a
                            bucket's objects cannot be appended to

The bucket's files are what counts. `pull` makes the copy equal to them when a run starts, `push`
sends what has changed since: before each checkpoint is saved, after each evaluation, and at the end
of the run, also of one that fails. A push comes *before* its save. The save is written in the
background and shows once it is complete, so that a checkpoint which can be seen has all rows up to
its step beside it, wherever the machine was lost; rows that came after it are cut off when the run
continues. The other way round, a checkpoint could be there without its rows.

A changed file is sent whole. For rollouts.jsonl that adds up: the paper's 512 completions a step,
about 6 KB each, make 30 MB from one save to the next (every ten steps), 450 MB after all 150 steps,
and 3.6 GB sent in the whole run; it grows with the square of a run's length.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from gtalign_jax.model import load
from gtalign_jax.training import claim
from gtalign_jax.training.checkpoint import CheckpointError

# Sent to the bucket by those who make them.
ELSEWHERE = ("checkpoints", "compiled", "evaluation", "hf", claim.OWNER_FILE)
PAUSES_S = (2.0, 10.0, 30.0)  # before storage that has failed is tried again

log = logging.getLogger(__name__)


class TransferError(CheckpointError):
    """Files of a run that could not be read from, or sent to, where its work directory is."""


def is_remote(workdir: str | Path) -> bool:
    return "://" in str(workdir)


def local(workdir: str | Path) -> Path:
    """The local directory of the files of `workdir`: itself, or a copy under `$GTALIGN_CACHE`."""
    if not is_remote(workdir):
        return Path(workdir)
    url = str(workdir).rstrip("/")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return load.cache_dir().with_name("runs") / f"{url.rsplit('/', 1)[1]}-{digest}"


def is_dir(path: str | Path) -> bool:
    """Whether a directory is there, local or remote. Raises TransferError where nobody can tell."""
    if not is_remote(path):
        return Path(path).is_dir()
    fs, root = _open(str(path))
    return _persist(f"looking at {path}", _kind, fs, root) == "directory"


class Files:
    """The files of one run in this process. Of several, the first pulls all of them and pushes.

    Attributes:
      directory: where they are read and written.
    """

    def __init__(self, workdir: str | Path, directory: Path | None = None) -> None:
        """Raises ValueError for a URL that nothing installed here can open."""
        self.directory = directory or local(workdir)
        self._url = str(workdir).rstrip("/") if is_remote(workdir) else None
        self._sent: dict[Path, tuple[int, int]] = {}  # file -> (size, time) when it was last equal
        self._owner: dict[str, Any] = {}
        if self._url is not None:
            self._fs, root = _open(self._url)
            self._root = root.rstrip("/")

    @property
    def _lock(self) -> Path:
        if self._url is None:
            return self.directory / claim.LOCK_FILE
        # Not in the copy, which `pull` deletes.
        return self.directory.with_name(f"{self.directory.name}{claim.LOCK_FILE}")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes this process the only one that writes here. Raises claim.TakenError.

        Where the work directory is a bucket, an older run of another machine ends at its next push.
        """
        with claim.locked(self._lock, self._url or self.directory):
            if self._url is not None:
                self._owner = claim.owner()
                _persist(f"writing {self._url}/{claim.OWNER_FILE}", self._fs.pipe_file,
                         f"{self._root}/{claim.OWNER_FILE}", json.dumps(self._owner).encode())
            yield

    def _check_owner(self) -> None:
        file = f"{self._url}/{claim.OWNER_FILE}"
        found = _persist(f"reading {file}", self._fs.cat_file, f"{self._root}/{claim.OWNER_FILE}")
        who = claim.read(found.decode(errors="replace"))
        if who.get("token") != self._owner["token"]:
            raise claim.TakenError(
                f"{self._url} was taken over by {claim.described(who)}: this run ends, and writes "
                "nothing more there. End one of the two, or set another workdir"
            )

    def pull(self, only: str = "") -> None:
        """Makes the copy equal to the bucket, or brings `only` the file or directory of that name.

        What an earlier run left in the copy is deleted first, unless `only` is given: it was sent,
        or it came after the last checkpoint. Nothing happens where the work directory is local, nor
        with `only` where a run of this machine has the copy: it is newer then, and being written.
        Raises TransferError.
        """
        if self._url is None or (only and claim.is_held(self._lock)):
            return
        names = _persist(f"listing {self._url}", self._remote_files, only)
        if not only:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in names:
            target = self.directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # Several processes of a host may bring the same file.
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            remote = f"{self._root}/{name}"
            _persist(f"reading {self._url}/{name}", self._fs.get_file, remote, str(partial))
            partial.replace(target)
            self._sent[target] = _state(target)

    def _remote_files(self, only: str) -> list[str]:
        """Names inside the run; checkpoints are not even listed: they have many thousand files."""
        if _kind(self._fs, self._root) is None:
            return []
        names = []
        for entry in self._fs.ls(self._root, detail=True):
            # A bucket may hold an empty object "directory/" as a sign that there is a directory.
            top = entry["name"].rstrip("/")[len(self._root) :].lstrip("/")
            if not top or top in ELSEWHERE or (only and top != only):
                continue
            if entry["type"] == "file":
                names.append(top)
            else:
                found = (path[len(self._root) + 1 :] for path in self._fs.find(entry["name"]))
                names += [name for name in found if not name.endswith("/")]
        return names

    def push(self) -> None:
        """Sends what has changed, and deletes what was deleted, since the last pull or push.

        Raises TransferError, which names file and URL, where storage fails again and again, and
        claim.TakenError where another run has come since `claimed`.
        """
        if self._url is None:
            return
        if self._owner:
            self._check_owner()
        for file in [file for file in self._sent if not file.exists()]:
            # First: a file's mark must not arrive while what it no longer fits is still there.
            name = self._name(file)
            _persist(f"deleting {self._url}/{name}", _delete, self._fs, f"{self._root}/{name}")
            del self._sent[file]
        for file in sorted(self.directory.rglob("*")):
            name = self._name(file)
            if file.name.startswith(".") or not file.is_file():
                continue
            try:
                state = _state(file)
                if self._sent.get(file) != state:
                    what = f"sending {file} to {self._url}/{name}"
                    _persist(what, self._fs.put_file, str(file), f"{self._root}/{name}")
                    self._sent[file] = state
            except (FileNotFoundError, TransferError):
                if file.exists():  # else it was a tracker's own, and is gone again
                    raise

    def _name(self, file: Path) -> str:
        return file.relative_to(self.directory).as_posix()


@contextlib.contextmanager
def to_write(out: str | Path) -> Iterator[Path]:
    """A local directory to write to: `out`, or one whose files go to the URL `out` at the end.

    That one lies in the system's temporary directory, which must have room for it.
    """
    if not is_remote(out):
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="gtalign-") as folder:
        files = Files(out, Path(folder) / "out")
        yield files.directory
        files.push()


def _open(url: str) -> tuple[Any, str]:
    """(file system, path in it). Listings are not remembered: others write there meanwhile."""
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False, auto_mkdir=True)
    except (ImportError, ValueError) as error:
        advice = "; for gs://: pip install -r requirements-tpu.txt"
        raise ValueError(f"{url} cannot be opened: {error}{advice}") from error


def _kind(fs: Any, path: str) -> str | None:
    """"file", "directory" or None. Unlike `isdir`, raises where storage does not answer: a run
    that took that for nothing there would begin anew and overwrite what is."""
    try:
        return fs.info(path)["type"]
    except FileNotFoundError:
        return None


def _delete(fs: Any, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # a first attempt may have done it
        fs.rm_file(path)


def _persist(what: str, action: Callable[..., Any], *arguments: Any) -> Any:
    """`action(*arguments)`, some more times if it fails. Raises TransferError."""
    for pause in (*PAUSES_S, None):
        try:
            return action(*arguments)
        except Exception as error:  # drivers have kinds of their own: gcsfs.retry.HttpError
            problem = f"{what} failed: {type(error).__name__}: {error}"
            if pause is None:
                raise TransferError(f"{problem} (tried {len(PAUSES_S) + 1} times)") from error
        log.warning("%s; trying again in %g s", problem, pause)
        time.sleep(pause)


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
