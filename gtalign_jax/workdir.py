"""Where the files of a run lie: in its work directory, or, where that is a bucket, in a local copy.

    workdir=runs/demo       everything lies there; several hosts must share it
    workdir=gs://bucket/x   checkpoints go straight to the bucket, from every process; all else lies
                            on this machine and is copied there, because a bucket's objects cannot
                            be appended to

`pull` brings the bucket's files here, `push` sends there what has changed since. Files are pushed
before each checkpoint is saved: a run that continues on another machine then finds the log of every
step before its checkpoint, and cuts off what comes after.
"""

import os
from pathlib import Path

import fsspec

ELSEWHERE = ("checkpoints", "compiled")  # written to the bucket by those who make them
COPIES = "~/.cache/gtalign_jax/runs"


def is_remote(workdir: str | Path) -> bool:
    return "://" in str(workdir)


def local(workdir: str | Path) -> Path:
    """The local directory that holds the files of `workdir`: itself, unless it is remote."""
    if not is_remote(workdir):
        return Path(workdir)
    root = os.environ.get("GTALIGN_RUNS", COPIES)
    return Path(root).expanduser() / str(workdir).replace("://", "/").rstrip("/")


def is_dir(path: str | Path) -> bool:
    """Whether a directory is there, local or remote."""
    fs, root = fsspec.core.url_to_fs(str(path))
    return fs.isdir(root)


class Files:
    """The files of one run in this process.

    Attributes:
      directory: where they are read and written.
    """

    def __init__(self, workdir: str | Path) -> None:
        self.directory = local(workdir)
        self._remote = str(workdir).rstrip("/") if is_remote(workdir) else None
        self._sent: dict[Path, tuple[int, int]] = {}  # file -> (size, time) when it was last equal

    def pull(self, only: str = "") -> None:
        """Brings what the bucket holds, or `only` the file or directory of that name.

        Nothing happens where the work directory is local. Raises OSError.
        """
        if self._remote is None:
            return
        fs, root = fsspec.core.url_to_fs(self._remote)
        self.directory.mkdir(parents=True, exist_ok=True)
        entries = fs.ls(root, detail=False) if fs.isdir(root) else []
        for entry in entries:
            name = entry.rstrip("/").rsplit("/", 1)[1]
            if name in ELSEWHERE or (only and name != only):
                continue
            for file in fs.find(entry):
                target = self.directory / file[len(root):].lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.{os.getpid()}")
                fs.get_file(file, str(partial))
                partial.replace(target)
                self._sent[target] = _state(target)

    def push(self) -> None:
        """Sends what has changed since it was pulled or pushed. Raises OSError."""
        if self._remote is None:
            return
        fs, root = fsspec.core.url_to_fs(self._remote)
        for file in sorted(self.directory.rglob("*")):
            inside = file.relative_to(self.directory)
            if not file.is_file() or inside.parts[0] in ELSEWHERE or file.name.startswith("."):
                continue
            state = _state(file)
            if self._sent.get(file) != state:
                target = f"{root.rstrip('/')}/{inside.as_posix()}"
                fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                fs.put_file(str(file), target)
                self._sent[file] = state


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
