"""How a step's time and memory grow with samples, prompt, completion and depth.

    python -m benchmarks.scale [--size=small] [--axes=G,S,T,L] [--repeats=2]

One of them at a time is varied, the others stay at the base: 8 prompts, G = 8 samples each, S = 256
prompt tokens, T = 128 new ones, L = 4 layers. Each point is a process of `benchmarks.iteration`.
The exponent is the slope of the logarithms, by least squares: 1 is in proportion.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks import compare
from benchmarks.peers import shapes

BASE = {"G": 8, "S": 256, "T": 128, "L": 4}
AXES = {"G": (4, 8, 16, 32), "S": (128, 256, 512, 1024), "T": (64, 128, 256, 512),
        "L": (2, 4, 8, 16)}
FLAGS = {"G": "samples", "S": "prompt-len", "T": "new-tokens", "L": "layers"}
COLUMNS = {"rollout": "rollout_seconds", "update": "update_seconds", "iteration": "seconds",
           "peak memory": "peak_mb"}


def exponent(sizes: list[int], values: list[float]) -> float:
    """k of values = c sizes^k, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def table(axis: str, reports: list[dict]) -> list[str]:
    """Markdown: a line per size, and one of exponents."""
    sizes = list(AXES[axis])
    out = [f"| {axis} | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for size, report in zip(sizes, reports, strict=True):
        *seconds, memory = (report[key] for key in COLUMNS.values())
        out.append(f"| {size} | " + " | ".join(f"{s:.2f} s" for s in seconds) + f" | {memory} MB |")
    slopes = [exponent(sizes, [r[key] for r in reports]) for key in COLUMNS.values()]
    return [*out, "| exponent | " + " | ".join(f"{k:.2f}" for k in slopes) + " |"]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(shapes.SIZES), default="small")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(argv)
    axes, seen = args.axes.split(","), {}
    if unknown := set(axes) - set(AXES):
        parser.error(f"--axes={args.axes}: {sorted(unknown)} is none of {','.join(AXES)}")
    for axis in axes:
        reports = []
        for size in AXES[axis]:
            point = tuple((BASE | {axis: size}).items())
            if point not in seen:
                flags = [f"--{FLAGS[key]}={value}" for key, value in point]
                seen[point] = compare.run(Path(sys.executable), "benchmarks.iteration", [
                    f"--size={args.size}", f"--repeats={args.repeats}", *flags])
                print(f"{axis}={size}: {seen[point]['seconds']} s, {seen[point]['peak_mb']} MB, "
                      f"others used {seen[point]['others']:.0%}", file=sys.stderr, flush=True)
            reports.append(seen[point])
        print("\n".join(table(axis, reports)) + "\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
