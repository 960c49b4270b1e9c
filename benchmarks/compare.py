"""Ours beside what a user would take instead: alternately, process by process, in one run.

    benchmarks/peers/setup.sh /tmp/peers          # once
    python -m benchmarks.compare --peers=/tmp/peers [--workloads=square/small,gtalign/small]
        [--rounds=3] [--only=ours,tunix] [--json=FILE]

    square     8 prompts x 8 samples, prompt 128, 128 new tokens
    gtalign    8 x 8, prompt 768 of which all begin with the same 640, 256 new tokens

Each round runs every program once, each in a process of its own with the same environment
(`GLIBC_TUNABLES` included), and notes what share of the processors others used meanwhile. The table
has the median over rounds, their range, and ours against the better peer of each line. The figures
of every run go to `--json` as they come, so that nothing is lost if it is interrupted.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.peers import shapes

SHAPES = {
    "square": ["--prompt-len=128", "--new-tokens=128"],
    "gtalign": ["--prompt-len=768", "--common-prefix=640", "--new-tokens=256"],
}
# The allocator keeps what it has, in large pages: the gain is largest for PyTorch.
TUNABLES = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
            "glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=268435456")
# The largest micro-batches that were no slower than smaller ones, in sequences.
MICRO = {"big": {"ours": 8, "trl": 8, "tunix": 8}, "small": {"ours": 8, "trl": 8, "tunix": 8}}
# The peers have all logits of a micro-batch at a time; ours as many as peers' memory allows.
LOGITS = {"big": "--logit-chunk=128", "small": "--logit-chunk=256"}


@dataclasses.dataclass(frozen=True)
class Program:
    """One process of a round: whose it is, its environment, its module and flags."""

    who: str
    environment: str
    module: str
    flags: tuple[str, ...] = ()


def programs(size: str) -> list[Program]:
    micro = {who: f"--micro={n}" for who, n in MICRO[size].items()}
    return [
        Program("ours", "ours", "benchmarks.rollout"),
        Program("ours", "ours", "benchmarks.iteration", (micro["ours"], LOGITS[size])),
        Program("huggingface", "trl", "benchmarks.peers.huggingface"),
        Program("trl", "trl", "benchmarks.peers.trl_grpo", (micro["trl"],)),
        Program("tunix", "tunix", "benchmarks.peers.tunix_grpo", ("--part=rollout",)),
        Program("tunix", "tunix", "benchmarks.peers.tunix_grpo", (micro["tunix"],)),
    ]


def busy() -> tuple[float, float]:
    """(processor seconds used by all since boot, those that there were)."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / 100, sum(ticks) / 100


def run(python: Path, module: str, flags: list[str], tunables: bool = True) -> dict:
    """The report of one process, with the share of all processors that others used meanwhile."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"),
                   "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    if tunables:
        environment["GLIBC_TUNABLES"] = TUNABLES
    command = [str(python), "-m", module, *flags]
    before, own = busy(), os.times()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after, now = busy(), os.times()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n"
                           f"{done.stderr[-3000:]}")
    ours = sum(now[:4]) - sum(own[:4])
    others = (after[0] - before[0] - ours) / max(after[1] - before[1], 1e-9)
    return json.loads(done.stdout.splitlines()[-1]) | {"others": round(max(others, 0.0), 3)}


def lines(report: dict) -> dict[str, float]:
    """The figures of a report by line of the table: seconds, and MB for memory."""
    part, found = report["part"], {report["part"]: report["seconds"]}
    found[f"peak memory, {part}"] = report["peak_mb"]
    if part == "iteration":
        found |= {"update": report["update_seconds"], "rollout": report["rollout_seconds"]}
    return found


def table(workload: str, results: list[tuple[str, dict]]) -> list[str]:
    """Markdown: one line per quantity, one column per program."""
    by_line: dict[str, dict[str, list[float]]] = {}
    for who, report in results:
        for line, value in lines(report).items():
            by_line.setdefault(line, {}).setdefault(who, []).append(value)
    whos = ["ours", *sorted({who for who, _ in results} - {"ours"})]
    out = [f"| {workload} | " + " | ".join(whos) + " | ours is better by |",
           "|---" * (len(whos) + 2) + "|"]
    for line in ("rollout", "update", "iteration", "peak memory, rollout",
                 "peak memory, iteration"):
        values = by_line.get(line, {})
        if not values:
            continue
        cells = [show(line, values.get(who, [])) for who in whos]
        others = {who: statistics.median(v) for who, v in values.items() if who != "ours"}
        better = "–"
        if others and "ours" in values:
            who = min(others, key=others.get)
            mine = values["ours"]
            ratio = others[who] / statistics.median(mine)
            low, high = min(values[who]) / max(mine), max(values[who]) / min(mine)
            better = f"{ratio:.2f}× ({low:.2f}–{high:.2f}) of {who}"
        out.append(f"| {line} | " + " | ".join([*cells, better]) + " |")
    return out


def show(line: str, values: list[float]) -> str:
    if not values:
        return "–"
    form = "{:.0f}" if "memory" in line else "{:.3g}"
    unit = "MB" if "memory" in line else "s"
    text = f"{form.format(statistics.median(values))} {unit}"
    if min(values) < max(values):
        text += f" ({form.format(min(values))}–{form.format(max(values))})"
    return text


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--workloads", default="square/small,square/big,gtalign/small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="in each process")
    parser.add_argument("--only", default="", help="of ours, huggingface, trl, tunix")
    parser.add_argument("--plain-malloc", action="store_true", help="no allocator settings")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    for workload in args.workloads.split(","):
        shape, _, size = workload.partition("/")
        if shape not in SHAPES or size not in shapes.SIZES:
            parser.error(f"--workloads={workload}: expected {'|'.join(SHAPES)}/"
                         f"{'|'.join(shapes.SIZES)}")
        wanted = [p for p in programs(size) if not args.only or p.who in args.only.split(",")]
        flags, results = [f"--size={size}", f"--repeats={args.repeats}", *SHAPES[shape]], []
        for round_ in range(args.rounds):
            for program in wanted:
                began = time.perf_counter()
                python = args.peers / program.environment / "bin" / "python"
                report = run(python, program.module, [*flags, *program.flags],
                             not args.plain_malloc)
                results.append((program.who, report))
                print(f"{workload} round {round_ + 1} of {args.rounds}: {program.module} "
                      f"{report['part']} {report['seconds']:.3f} s, {report['peak_mb']} MB, others "
                      f"used {report['others']:.0%} ({time.perf_counter() - began:.0f} s)",
                      file=sys.stderr, flush=True)
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps({"workload": workload, "who": program.who} | report)
                                   + "\n")
        print("\n".join(table(workload, results)), flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
