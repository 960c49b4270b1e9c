"""What the compiled programs add up to: a verdict, a table, a JSON.

    verdict(rows, config, model, topology) -> Verdict: fits, or what does not and what would mend it
    step(rows, …)                          -> Step: seconds, MFU and tokens/s/chip of one GRPO step
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from gtalign_jax.aot import knobs, roofline
from gtalign_jax.aot.chips import GIB
from gtalign_jax.aot.measure import Row
from gtalign_jax.aot.topology import Topology
from gtalign_jax.config import Config
from gtalign_jax.model.spec import ModelConfig


@dataclasses.dataclass(frozen=True)
class Problem:
    """A program that does not fit: by how many bytes per chip, and what would mend it."""

    program: str
    shortfall: int
    at_least: bool  # the compiler gave up: the shortfall is what it counted until then
    knobs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    fits: bool
    tightest: str  # the program with the least room
    problems: tuple[Problem, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One GRPO step as the roofline models it: every completion at its full length.

    seconds: of all programs on the chips, one after the other. by_program: its parts.
    useful_flops: of one chip, what is repeated to save memory not counted; mfu: these against what
      the chip could do in that time.
    """

    seconds: float
    by_program: Mapping[str, float]
    useful_flops: float
    mfu: float
    tokens_per_s_per_chip: float


def verdict(rows: Sequence[Row], config: Config, model: ModelConfig,
            topology: Topology) -> Verdict:
    """Whether every program fits its chip."""
    problems = tuple(
        Problem(row.name, row.shortfall, bool(row.refused),
                tuple(knobs.advice(row, config, model, topology)))
        for row in rows if not row.fits
    )
    on_chip = [row for row in rows if row.capacity is not None]
    tightest = max(on_chip, key=lambda row: row.peak / row.capacity)
    return Verdict(not problems, tightest.name, problems)


def step(rows: Sequence[Row], config: Config, topology: Topology) -> Step | None:
    """The modelled GRPO step; None where the run has none, or not every program has a time."""
    parts = [row for row in rows if row.calls and row.where == "chip"]
    if not parts or any(row.times is None for row in parts):
        return None
    seconds = sum(row.calls * row.times.total for row in parts)
    useful = sum(row.calls * row.useful_flops for row in parts)
    grpo = config.grpo
    tokens = grpo.prompts_per_step * grpo.samples_per_prompt * config.rollout.max_new_tokens
    return Step(
        seconds, {row.name: row.calls * row.times.total for row in parts}, useful,
        roofline.mfu(useful * topology.chips, seconds, topology),
        tokens / seconds / topology.chips,
    )


def gib(n: float) -> str:
    """Bytes as GiB; what is below a hundredth as "<0.01"."""
    return "–" if n == 0 else "<0.01" if n < 0.005 * GIB else f"{n / GIB:,.2f}"


def _count(n: float) -> str:
    """1.23e14 as "123.0 T"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= size:
            return f"{n / size:,.1f} {prefix}"
    return "–" if n == 0 else f"{n:,.0f}"


def traffic(row: Row) -> dict[tuple[str, bool], tuple[int, float]]:
    """(kind, over DCN) -> (executions, bytes arriving at a chip) of one call."""
    out: dict[tuple[str, bool], tuple[int, float]] = {}
    for found in row.collectives:
        key = (found.kind, found.over_dcn)
        count, size = out.get(key, (0, 0.0))
        times = row.loop_steps if found.in_loop else 1
        out[key] = (count + found.count * times, size + found.total_bytes(row.loop_steps))
    return out


def _traffic_text(row: Row) -> str:
    return "\n".join(
        f"{count:,} {kind}{' (DCN)' if dcn else ''} {gib(size)}"
        for (kind, dcn), (count, size) in sorted(traffic(row).items())
    )


def table(rows: Sequence[Row], topology: Topology) -> Table:
    """One row per program; all figures are of one chip and one call, sizes in GiB."""
    out = Table(
        title=f"{topology.chips} {topology.chip.generation} chips of "
              f"{gib(topology.chip.hbm_bytes)} GiB; per chip and call, GiB",
        title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )
    for name in ("program", "calls\na step", "argu-\nments", "out-\nputs", "tempo-\nraries",
                 "held\nbeside", "peak", "of a\nchip", "FLOPs", "HBM\ntraffic",
                 "collectives and\nwhat arrives", "at least", "compiled\nin"):
        is_text = name == "program" or name.startswith("coll")
        out.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        style = None if row.fits else "bold red"
        share = "host" if row.capacity is None else f"{100 * row.peak / row.capacity:.0f}%"
        sizes = (row.arguments, row.outputs - row.aliased, row.temporaries + row.code,
                 sum(row.resident.values()), row.peak)
        out.add_row(
            row.name, str(row.calls or ""), *map(gib, sizes),
            share if row.fits else f"{share} !", _count(row.flops), gib(row.hbm_bytes),
            _traffic_text(row), _time_text(row), f"{row.compile_s:.0f} s", style=style,
        )
    return out


def _time_text(row: Row) -> str:
    """The modelled seconds of a call, and what they are spent on."""
    if row.times is None:
        return "–"
    value = row.times.total
    shown = f"{value:,.2f} s" if value >= 0.1 else f"{1e3 * value:,.2f} ms"
    return f"{shown} {row.times.bound}"


def summary(rows: Sequence[Row], found: Verdict, modelled: Step | None,
            topology: Topology) -> str:
    """The bottom line, as text."""
    lines = []
    if modelled is not None:
        lines.append(
            f"a GRPO step takes at least {modelled.seconds:,.1f} s by roofline (every completion "
            f"at full length; nothing was measured): MFU {100 * modelled.mfu:.1f}%, "
            f"{modelled.tokens_per_s_per_chip:,.0f} completion tokens/s/chip"
        )
    row = next(row for row in rows if row.name == found.tightest)
    machine = f"{topology.name}" + (f" x {topology.slices}" if topology.slices > 1 else "")
    if found.fits:
        lines.append(
            f"fits {machine}: the fullest program is {row.name} with {gib(row.peak)} of "
            f"{gib(topology.chip.hbm_bytes)} GiB per chip"
        )
    for problem in found.problems:
        least = "at least " if problem.at_least else ""
        lines.append(
            f"does not fit {machine}: {problem.program} lacks {least}{gib(problem.shortfall)} GiB "
            "on each chip; what would help: " + "; ".join(problem.knobs)
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row], found: Verdict, modelled: Step | None) -> dict[str, Any]:
    """The figures of the tables, bytes and seconds unrounded."""
    return {
        "fits": found.fits,
        "tightest": found.tightest,
        "problems": [dataclasses.asdict(problem) for problem in found.problems],
        "step": None if modelled is None else dataclasses.asdict(modelled),
        "programs": [_row_json(row) for row in rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    out = {
        name: getattr(row, name)
        for name in ("name", "stage", "where", "calls", "fits", "capacity", "peak", "shortfall",
                     "arguments", "outputs", "aliased", "temporaries", "code", "refused", "flops",
                     "useful_flops", "hbm_bytes", "loop_steps", "compile_s")
    }
    return out | {
        "resident": dict(row.resident),
        "kernels": dict(row.kernels),
        "collectives": [
            {"kind": kind, "over_dcn": dcn, "count": count, "bytes": size}
            for (kind, dcn), (count, size) in sorted(traffic(row).items())
        ],
        "seconds": None if row.times is None else dataclasses.asdict(row.times),
    }
