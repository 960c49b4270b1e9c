"""One run at a time in a work directory.

    here         an flock on `.run.lock`, which the kernel gives back however the process ends
    in a bucket  a token in `owner.json`: whoever came last owns the run, and a process that finds
                 another's token there stops before it overwrites anything of it

Nobody can ask a machine that is lost whether its process still runs. So a bucket's older run is not
waited for: the newer one goes on, and the older one ends at its next save. Who only reads needs
neither.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gtalign_jax.training.checkpoint import CheckpointError
from gtalign_jax.training.files import naming

LOCK_FILE, OWNER_FILE = ".run.lock", "owner.json"

log = logging.getLogger(__name__)


class TakenError(CheckpointError):
    """Another process writes to the work directory."""


@contextlib.contextmanager
def locked(file: Path, workdir: object) -> Iterator[None]:
    """Holds the lock `file` of `workdir`; its directory is made if it is not there.

    Raises TakenError, which says who holds it. File systems that know no locks get a warning.
    """
    with naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        opened = file.open("a+", encoding="utf-8")
    with opened:  # closing it gives the lock back
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            opened.seek(0)
            raise TakenError(
                f"{workdir} is in use by {described(read(opened.read()))}: wait for that run or "
                "end it, or set another workdir. The lock ends with its process"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            log.warning("%s: its file system knows no locks (%s), so nothing keeps a second run "
                        "from %s", file, error.strerror, workdir)
        with naming(file):
            opened.truncate(0)
            opened.write(json.dumps(owner()) + "\n")
            opened.flush()
        yield


def is_held(file: Path) -> bool:
    """Whether a process of this machine, this one included, holds the lock `file`."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def owner() -> dict[str, Any]:
    """This process, in words, and a token that no other has."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since,
            "token": uuid.uuid4().hex}


def described(who: Mapping[str, Any]) -> str:
    return (f"process {who.get('pid', '?')} on host {who.get('host', '?')} since "
            f"{who.get('since', '?')}")


def read(text: str) -> dict[str, Any]:
    """Who wrote it; nothing is known of one who has only just taken the lock."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}
