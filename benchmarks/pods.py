"""Compiles the shipped experiments for TPU slices and writes the table of docs/pods.md.

    python -m benchmarks.pods [--only=v4:3b,v5e:0.5b] [--out=docs/pods.md] [--keep=runs/pods]

For every machine and size of `gtalign_jax.paper.FITS` it runs the compile command as a user would,
one process after the other, and keeps each JSON in `--keep`: what is there already is not compiled
again (delete it to do so). The last rows are larger machines than the layouts name: the same work
per chip on 8 and on 512 chips, and two slices. On two cores the whole table takes hours; --only
compiles some of it. The table has the rows whose JSON is there.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gtalign_jax.paper import FITS, PROMPTS

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- table: benchmarks/pods.py -->", "<!-- end of table -->"
GIB = 2**30
HEADER = (
    "model", "slice", "chips", "tensor", "fullest program", "peak, GiB", "of", "fits",
    "step, s at least", "MFU at most", "tokens/s/chip at most", "compiled in, min",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a config file's argument, a slice, how many of it, and what differs."""

    machine: str
    size: str
    slice: str
    slices: int = 1
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.machine}-{self.size}-{self.slice}x{self.slices}"

    def command(self, path: Path) -> list[str]:
        return [
            sys.executable, "-m", "gtalign_jax.compile",
            f"--config=configs/tpu_{self.machine}.py:{self.size}", f"--topology={self.slice}",
            f"--slices={self.slices}", f"--json={path}", *self.overrides,
        ]


def scaled(machine: str, size: str, slice_name: str, slices: int, chips: int) -> Case:
    """The same work per chip on more chips: the batch grows with them."""
    fit = FITS[machine][size]
    prompts = PROMPTS * chips // fit.chips
    return Case(machine, size, slice_name, slices, (
        f"--config.grpo.prompts_per_step={prompts}",
        f"--config.evaluate.batch_size={prompts}",
    ))


def cases() -> list[Case]:
    """All rows of the table, small models first."""
    laid_out = [
        Case(machine, size, fit.slice)
        for size in FITS["v4"] for machine in FITS if (fit := FITS[machine].get(size))
    ]
    return [
        *laid_out,
        scaled("v4", "3b", "v4-16", 1, 8),
        scaled("v4", "3b", "v4-1024", 1, 512),
        scaled("v5e", "3b", "v5e-256", 2, 512),
    ]


def compile_case(case: Case, keep: Path) -> None:
    """Runs the command unless its figures are there. Raises CalledProcessError for a mistake."""
    path = keep / f"{case.name}.json"
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    done = subprocess.run(case.command(partial), cwd=ROOT)
    if done.returncode not in (0, 1):
        raise subprocess.CalledProcessError(done.returncode, done.args)
    partial.replace(path)


def cells(case: Case, figures: dict[str, Any]) -> list[str]:
    """A row of the table."""
    fullest = next(p for p in figures["programs"] if p["name"] == figures["tightest"])
    step = figures["step"]
    modelled = ["–"] * 3 if step is None else [
        f"{step['seconds']:,.0f}", f"{100 * step['mfu']:.0f} %",
        f"{step['tokens_per_s_per_chip']:,.0f}",
    ]
    missing = max((p["shortfall"] for p in figures["problems"]), default=0)
    several = f"{case.slices} x " if case.slices > 1 else ""
    return [
        f"Qwen2.5-{case.size.upper()}", several + case.slice, f"{figures['topology']['chips']:,}",
        str(figures["config"]["mesh"]["tensor"]), fullest["name"], f"{fullest['peak'] / GIB:.2f}",
        f"{fullest['capacity'] / GIB:.2f}",
        "yes" if figures["fits"] else f"no: {missing / GIB:.2f} GiB short", *modelled,
        f"{sum(p['compile_s'] for p in figures['programs']) / 60:.1f}",
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put_table(document: str, text: str) -> str:
    """`document` with `text` between the two marks. Raises ValueError where they are missing."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"the document has no {BEGIN} … {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", document, count=1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="machine:size, several with commas")
    parser.add_argument("--out", default=str(ROOT / "docs" / "pods.md"))
    parser.add_argument("--keep", default=str(ROOT / "runs" / "pods"))
    args = parser.parse_args(argv)
    keep, out = Path(args.keep), Path(args.out)
    keep.mkdir(parents=True, exist_ok=True)
    only = set(filter(None, args.only.split(",")))
    for case in cases():
        if not only or f"{case.machine}:{case.size}" in only:
            compile_case(case, keep)
    rows = [
        cells(case, json.loads(path.read_text(encoding="utf-8")))
        for case in cases() if (path := keep / f"{case.name}.json").exists()
    ]
    document = out.read_text(encoding="utf-8")
    out.write_text(put_table(document, table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
