"""What judging adds to a step: beside sampling, beside the update, or after both.

    python -m benchmarks.overlap [--steps=12 --latency=0.2 --concurrency=32 --out=DIRECTORY]

The demo's GRPO, from one cold start, with the rules of the built-in tasks behind a server on
loopback that takes `latency` seconds for each judgement. One line of JSON, medians over the steps
after the first two, in seconds:

    free        nobody is waited for: the rules judge in the process
    after       the batch is sampled in one piece, then judged
    beside      in four pieces, each judged while the next is sampled
    ahead       sampled one step ahead of the updates (grpo.ahead=1)
    judge       what judging alone takes at this latency and concurrency
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.faulty_judge import grade, rows, run_demo, serving

AHEAD = {"grpo.ahead": 1, "grpo.truncated_is": 2.0}
WAYS = {"free": {"judge.kind": "rule"}, "after": {}, "beside": {"rollout.micro_batch_prompts": 4},
        "ahead": AHEAD, "ahead, in pieces": AHEAD | {"rollout.micro_batch_prompts": 4}}


def train(workdir: Path, url: str, args: argparse.Namespace, more: dict) -> None:
    run_demo({
        "workdir": workdir, "grpo.steps": args.steps, "checkpoint.every": 1000,
        "judge.kind": "http", "judge.rules": more.get("judge.kind") == "rule",
        "judge.base_url": url, "judge.concurrency": args.concurrency, "judge.store": "none",
        "judge.preflight": False,
    } | more)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    out = args.out or Path(tempfile.mkdtemp(prefix="overlap-"))
    result, first = {}, None
    for way, more in WAYS.items():
        workdir = out / way.replace(", ", "-").replace(" ", "-")
        if first is not None:
            for part in ("checkpoints/sft", "tokenizer"):
                shutil.copytree(first / part, workdir / part, dirs_exist_ok=True)
        first = first or workdir
        with serving(grade=grade, latency_s=args.latency) as server:
            train(workdir, server.url, args, more)
            asked = len(server.asked) / args.steps
        steps = [row for row in rows(workdir, "metrics.jsonl") if row["stage"] == "grpo"][2:]
        result[way] = {
            name: round(statistics.median(row[f"time/{name}"] for row in steps), 3)
            for name in ("step", "rollout", "reward", "update")
        }
    judge_s = math.ceil(asked / args.concurrency) * args.latency
    print(json.dumps(result | {"judgements": round(asked, 1), "judge": round(judge_s, 3)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
