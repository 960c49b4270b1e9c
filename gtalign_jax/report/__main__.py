"""Report on what a run or an evaluation left in its directory:

    python -m gtalign_jax.report DIRECTORY [--out=DIRECTORY]

Writes report.html, which opens without a network, report.json, tables/*.csv and figures/*.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gtalign_jax import report


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m gtalign_jax.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("directory", type=Path, help="of a run or of an evaluation")
    parser.add_argument("--out", type=Path, help="where to write; by default there")
    args = parser.parse_args(argv)
    try:
        path = report.write(args.directory, args.out)
    except (report.ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
