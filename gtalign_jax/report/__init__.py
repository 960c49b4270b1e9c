"""What a run or an evaluation found, on one page that opens anywhere: `write(directory)`.

load      the files of a directory -> RunData
numbers   RunData -> all numbers
words, page_tables, figures, examples   numbers -> what is read
page      all of it -> report.html, report.json, tables/*.csv, figures/*.png
"""

from pathlib import Path

from gtalign_jax.report import load, page
from gtalign_jax.report.load import ReportError

__all__ = ["ReportError", "write"]


def write(directory: str | Path, out: str | Path | None = None) -> Path:
    """Reports on `directory`, into it or into `out`; returns the path of report.html.

    Raises ReportError, with one line for the user, where there is nothing to report or a file
    cannot be read; then nothing is written.
    """
    report = page.compose(load.load(Path(directory)))
    return page.save(report, Path(directory if out is None else out))
