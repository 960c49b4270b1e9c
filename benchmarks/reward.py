"""How fast completions become rewards, and how little a judge waits for us.

    python -m benchmarks.reward [--completions=4096 --repeats=5 --seed=0 --algebra=0.35]
    python -m benchmarks.reward --judge [--completions=4096 --concurrency=256 --latency=2]

Without --judge: parse, solve and score, the judge's grades being given, beside the same formulas
as plain Python applies them to one completion after the other; the rewards of both must agree to
1e-9. A quarter of the completions is mathematics, whose answers are the reference's string or a
whole number beside a whole number: ours then needs no algebra, and the plain program asks
math-verify wherever the strings differ; "without_math" leaves these completions out. What an
answer in another notation costs us, as it goes to math-verify's processes, is in "algebra", by
itself, for the share of --algebra of the mathematical completions.

With --judge: wall time of that many requests to a server of its own process that takes --latency
seconds for each, beside the floor ceil(completions / concurrency) * latency.

One line of JSON; times are medians of the repeats after a warm-up. Where others use the machine
too, the processor's seconds say more than the clock's.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import completions, plain_reward
from gtalign_jax.game.chain import KEYS
from gtalign_jax.reward import math_equal, scoring, tasks
from gtalign_jax.reward.http_judge import HttpJudge
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import JudgeRequest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = scoring.RewardConfig(consistency="solver")


def ours(rows: Sequence[completions.Row]) -> scoring.Scores:
    """Rewards of the rows."""
    prompts, texts = [row.prompt for row in rows], [row.text for row in rows]
    return scoring.score(prompts, texts, _nobody, CONFIG, [row.given for row in rows])


def plain(rows: Sequence[completions.Row]) -> list[tuple[float, dict[str, Any]]]:
    """(reward, metrics of the game) of the rows, one after the other."""
    return [
        plain_reward.reward(row.prompt.data_source, row.prompt.ground_truth, row.text,
                            row.given.get("quality"))
        for row in rows
    ]


def furthest(found: scoring.Scores, wanted: list[tuple[float, dict[str, Any]]]) -> float:
    """The largest difference of any reward or metric; NaN where only one of both is NaN."""
    apart = 0.0
    for row, (reward, game) in enumerate(wanted):
        pairs = [(found.reward_B[row], reward)]
        pairs += [
            (found.game[name][row], KEYS.index(value) if name == "recommended" else value)
            for name, value in game.items()
        ]
        both_undefined = [math.isnan(a) and math.isnan(b) for a, b in pairs]
        apart = max([abs(float(a) - b) for (a, b), skip in zip(pairs, both_undefined, strict=True)
                     if not skip] + [apart], key=lambda x: (math.isnan(x), x))
    return apart


def _nobody(requests: Sequence[JudgeRequest]) -> list:
    if requests:
        raise RuntimeError(f"all grades are given, and yet {len(requests)} requests")
    return []


def _is_math(row: completions.Row) -> bool:
    return tasks.task_of(row.prompt.data_source).measure == "math"


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each repeat, by the clock and of this process's processors."""

    wall: list[float]
    cpu: list[float]

    def shown(self, name: str) -> dict[str, Any]:
        return {f"{name}seconds": round(statistics.median(self.wall), 4),
                f"{name}cpu_seconds": round(statistics.median(self.cpu), 4),
                f"{name}all_seconds": [round(s, 4) for s in self.wall]}

    def over(self, other: "Times") -> dict[str, float]:
        """How many times as long as the other: by the clock, and of the processor."""
        return {"wall": round(statistics.median(self.wall) / statistics.median(other.wall), 2),
                "cpu": round(statistics.median(self.cpu) / statistics.median(other.cpu), 2)}


def timed(repeats: int, once: Callable[[], Any]) -> tuple[Times, Any]:
    """(the times, what the last repeat returned), after a warm-up."""
    once()
    times = Times([], [])
    for _ in range(repeats):
        began, busy = time.perf_counter(), time.process_time()
        result = once()
        times.wall.append(time.perf_counter() - began)
        times.cpu.append(time.process_time() - busy)
    return times, result


def scored(args: argparse.Namespace) -> dict[str, Any]:
    """Ours beside plain Python."""
    rows = completions.rows(args.completions, args.seed)
    words = sorted(len(row.text.split()) for row in rows)
    rest = [row for row in rows if not _is_math(row)]
    times, found = timed(args.repeats, lambda: ours(rows))
    rest_times, _ = timed(args.repeats, lambda: ours(rest))
    plain_times, wanted = timed(args.repeats, lambda: plain(rows))
    plain_rest_times, _ = timed(args.repeats, lambda: plain(rest))
    apart = furthest(found, wanted)
    if not apart <= 1e-9:
        raise RuntimeError(f"the rewards or games are {apart} apart")
    return {
        "program": "reward", "completions": len(rows), "cores": os.cpu_count(),
        "words": {"p5": words[len(words) // 20], "median": words[len(words) // 2],
                  "max": words[-1]},
        "scored_above_zero": int((found.reward_B > 0).sum()), "apart": apart,
        **times.shown(""), **plain_times.shown("plain_"), "ratio": plain_times.over(times),
        "without_math": {"completions": len(rest), **rest_times.shown(""),
                         **plain_rest_times.shown("plain_"),
                         "ratio": plain_rest_times.over(rest_times)},
        "algebra": algebra(args),
    }  # fmt: skip


def algebra(args: argparse.Namespace) -> dict[str, Any]:
    """Mathematics by itself, with answers that only algebra settles among them."""
    rows = completions.rows(args.completions, args.seed, args.algebra)
    pairs = [(row.prompt.ground_truth, row.text) for row in rows if _is_math(row)]
    checker = math_equal.MathChecker()
    try:
        times, found = timed(args.repeats, lambda: checker(pairs))
    finally:
        checker.close()
    return {"completions": len(pairs), "share": args.algebra,
            "equal": sum(score == 1.0 for score, _ in found),
            **times.shown("")}


def judged(args: argparse.Namespace) -> dict[str, Any]:
    """The wait for a judge of known latency."""
    rows = completions.rows(args.completions, args.seed)
    requests = [
        JudgeRequest("quality", "ambig_qa", row.prompt.question, row.prompt.ground_truth, row.text)
        for row in rows
    ]
    command = [sys.executable, "-m", "benchmarks.fake_judge", f"--latency={args.latency}"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as server:
        url = server.stdout.readline().strip()
        judge = HttpJudge(JudgeConfig(
            kind="http", base_url=url, model="fake", concurrency=args.concurrency))
        judge(requests[:1])  # imports and connects
        began, busy = time.perf_counter(), time.process_time()
        found = judge(requests)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        judge.close()
        with urllib.request.urlopen(f"{url}/stats") as answer:
            stats = json.load(answer)
        server.stdin.close()
    failed = [judgement.error for judgement in found if judgement.score != 1.0]
    if failed or stats["asked"] != len(rows) + 1:
        raise RuntimeError(f"{len(failed)} failures ({failed[:3]}); the server counted {stats}")
    floor = math.ceil(len(rows) / args.concurrency) * args.latency
    return {
        "program": "judge", "completions": len(rows), "concurrency": args.concurrency,
        "most_at_once": stats["most"], "latency": args.latency, "floor_seconds": floor,
        "seconds": round(seconds, 2), "over_floor": round(seconds / floor - 1, 4),
        "cpu_seconds": round(busy, 2),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algebra", type=float, default=0.35)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--latency", type=float, default=2.0, help="seconds")
    args = parser.parse_args(argv)
    print(json.dumps(judged(args) if args.judge else scored(args)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
