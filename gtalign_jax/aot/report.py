"""What the compiled programs add up to: a verdict, a table, a JSON.

    verdict(rows, config, model, topology) -> Verdict: fits, or what does not and what would mend it
    step(rows, …)                          -> Step: seconds, MFU and tokens/s/chip of one GRPO step
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
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


def _count(n: float, units: str = "") -> str:
    """1.23e14 as "123 T"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if n >= size:
            return f"{n / size:,.1f} {prefix}{units}"
    return "–" if n == 0 else f"{n:,.0f} {units}".rstrip()


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
        f"{kind}{' (DCN)' if dcn else ''} {count:,}x {gib(size)}"
        for (kind, dcn), (count, size) in sorted(traffic(row).items())
    )


def tables(rows: Sequence[Row], topology: Topology) -> Group:
    """Memory in one table, work in another under it; a program is a row of both."""
    memory = Table(title="memory per chip, GiB", title_justify="left")
    for name in ("program", "arguments", "outputs", "aliased", "temporaries", "code", "resident",
                 "peak", f"of {gib(topology.chip.hbm_bytes)}", "fits"):
        memory.add_column(name, justify="left" if name == "program" else "right")
    work = Table(title="one call of each, per chip", title_justify="left")
    for name in ("program", "calls/step", "FLOPs", "HBM bytes", "collectives: count, GiB per chip",
                 "compute s", "HBM s", "ICI s", "DCN s", "at least s", "compiled in s"):
        work.add_column(name, justify="left" if name[:2] in ("pr", "co") else "right")
    for row in rows:
        share = "host" if row.capacity is None else f"{100 * row.peak / row.capacity:.0f}%"
        resident = sum(row.resident.values())
        sizes = (row.arguments, row.outputs, row.aliased, row.temporaries, row.code, resident,
                 row.peak)
        memory.add_row(row.name, *map(gib, sizes), share, "yes" if row.fits else "NO")
        t = row.times
        seconds = [""] * 5 if t is None else [
            f"{s:,.3f}" for s in (t.compute, t.hbm, t.ici, t.dcn, t.total)
        ]
        work.add_row(row.name, str(row.calls or "–"), _count(row.flops), _count(row.hbm_bytes, "B"),
                     _traffic_text(row), *seconds, f"{row.compile_s:.0f}")
    return Group(memory, work)


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
