"""The demo with a judge that fails: what is learnt, and is anything scored that should not be?

    python -m benchmarks.faulty_judge [--steps=50 --share=0.3 --concurrency=16
        --requests_per_minute=6000 --seed=0 --out=DIRECTORY]

The rules of the built-in tasks sit behind a server on loopback, and the demo asks it over HTTP:
once as it is, once with `share` of all requests failing, in every way that tests/judging.py knows
(rate limits, errors, hangs, half replies, resets, another model, garbage, drift in form …). Both go
on from one cold start. One line of JSON:

    missing         share of the judgements that failed for good, by cause
    wrong           completions whose score is not what the rule says; must be 0
    scored_missing  completions without a judgement that have a score all the same; must be 0
    in_flight, per_minute   the most at once, and within any 60 s, as the server saw it
    reward, reward_faultless   mean of the last ten steps, `noise` its standard error between steps

Exit status 1 where a check fails.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the server is the one that the tests use

from judging import Asked, Plan, most_within, serving  # noqa: E402

from gtalign_jax.reward.judges import JudgeRequest  # noqa: E402
from gtalign_jax.reward.rules import RULES  # noqa: E402
from gtalign_jax.reward.tasks import TASKS  # noqa: E402

TIMEOUT_S = 2.0
SOURCES = {TASKS[source].rubric: source for source in RULES}


def grade(asked: Asked) -> str:
    """What the rule of the task says, whose rubric the prompt begins with."""
    source = next(source for rubric, source in SOURCES.items() if asked.prompt.startswith(rubric))
    parts = asked.parts
    request = JudgeRequest("quality", source, parts["question"], parts.get("reference", ""),
                           parts["response"])
    return f"{RULES[source](request):g}"


def train(workdir: Path, server, args: argparse.Namespace) -> None:
    """The demo's cold start, unless it is there, and `steps` steps of GRPO."""
    run_demo({
        "workdir": workdir, "seed": args.seed, "grpo.steps": args.steps, "checkpoint.every": 25,
        "judge.kind": "http", "judge.rules": False, "judge.base_url": server.url,
        "judge.concurrency": args.concurrency, "judge.timeout_s": TIMEOUT_S, "judge.retries": 1,
        "judge.requests_per_minute": args.requests_per_minute,
        # The golden samples may meet a planned failure, as any other request.
        "judge.preflight": False,
    })


def run_demo(settings: dict) -> None:
    """The demo's training stages in a process of their own, with these settings."""
    usual = {"stages": "('sft','grpo')", "data.test_size": 8, "judge.model": "judge-1"}
    words = [f"--config.{key}={value}" for key, value in (usual | settings).items()]
    command = [sys.executable, "-m", "gtalign_jax.main", "--config=configs/demo_cpu.py", *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)


def rows(workdir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def curve(workdir: Path) -> list[float]:
    """The reward of every step."""
    return [row["reward/total"] for row in rows(workdir, "metrics.jsonl") if row["stage"] == "grpo"]


def in_flight(asked: list[Asked]) -> int:
    """The most requests that the client had open at once; it leaves each after its time-out."""
    events = []
    for one in asked:
        until = min(one.ended or one.at + TIMEOUT_S, one.at + TIMEOUT_S)
        events += [(one.at, 1), (until, -1)]
    running = most = 0
    for _, change in sorted(events):
        running += change
        most = max(most, running)
    return most


def judged(workdir: Path) -> dict:
    """What became of the judgements, against the rules themselves."""
    logged, wrong, scored_missing, causes = rows(workdir, "rollouts.jsonl"), 0, 0, {}
    wanted = [row for row in logged if row["judge_reply"] is not None]
    for row in wanted:
        if row["judge_score"] is None:
            cause = row["judge_cause"]
            causes[cause] = causes.get(cause, 0) + 1
            scored_missing += row["valid"] or row["reward"] != 0
            continue
        request = JudgeRequest("quality", row["data_source"], row["question"], row["ground_truth"],
                               response_of(row["completion"]))
        wrong += row["judge_score"] != float(f"{RULES[row['data_source']](request):g}")
    missing = {cause: round(count / len(wanted), 4) for cause, count in sorted(causes.items())}
    return {"judgements": len(wanted), "missing": missing, "wrong": wrong,
            "missing_share": round(sum(causes.values()) / len(wanted), 4),
            "scored_missing": scored_missing}


def response_of(completion: str) -> str:
    from gtalign_jax.game.chain import parse

    return parse(completion).response


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests_per_minute", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    out = args.out or Path(tempfile.mkdtemp(prefix="faulty-judge-"))
    good, bad = out / "good", out / "bad"
    with serving(grade=grade) as server:
        train(good, server, args)
    if not bad.exists():
        shutil.copytree(good / "checkpoints" / "sft", bad / "checkpoints" / "sft")
        shutil.copytree(good / "tokenizer", bad / "tokenizer")
    with serving(grade=grade, behave=Plan(args.share, args.seed)) as server:
        train(bad, server, args)
        asked = server.asked
    faultless, faulty = curve(good), curve(bad)
    last, last_good = faulty[-10:], faultless[-10:]
    noise = (statistics.variance(last) + statistics.variance(last_good)) ** 0.5 / len(last) ** 0.5
    result = judged(bad) | {
        "steps": len(faulty), "requests": len(asked),
        "failed_requests": round(sum(bool(one.fault) for one in asked) / max(len(asked), 1), 4),
        "faults": sorted({one.fault for one in asked if one.fault}),
        "in_flight": in_flight(asked),
        "per_minute": int(most_within(60.0, [one.at for one in asked])),
        "reward": round(statistics.mean(last), 4),
        "reward_faultless": round(statistics.mean(last_good), 4), "noise": round(noise, 4),
    }
    print(json.dumps(result))
    learnt = abs(result["reward"] - result["reward_faultless"]) <= 3 * noise
    kept = (result["in_flight"] <= args.concurrency
            and result["per_minute"] <= args.requests_per_minute)
    sound = result["wrong"] == result["scored_missing"] == 0 and len(faulty) == args.steps
    return 0 if learnt and kept and sound else 1


if __name__ == "__main__":
    sys.exit(main())
