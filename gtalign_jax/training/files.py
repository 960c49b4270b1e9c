"""Files of a run: there as a whole or not at all, and errors that say which file it was."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_REMEDIES = {  # by what the operating system says
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make space there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it readable and writable"),
}


def write_whole(path: Path, content: str | Iterable[bytes]) -> None:
    """Writes a file that is there as a whole or not at all: a full disk leaves the old one.

    `content`: text, or lines, which need not be in memory all at once.
    Raises OSError, which names `path`.
    """
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        try:
            if isinstance(content, str):
                content = [content.encode("utf-8", "backslashreplace")]
            with partial.open("wb") as file:
                file.writelines(content)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes errors of the operating system name `path`: that of a full disk names nothing."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def explained(error: OSError) -> str:
    """One line for the user: which file, what the operating system says of it, what to do."""
    where = error.filename if error.filename is not None else type(error).__name__
    remedy = _REMEDIES.get(error.errno)
    advice = f"; {remedy}, then the same command goes on from its last checkpoint" if remedy else ""
    return f"{where}: {error.strerror or error}{advice}"
