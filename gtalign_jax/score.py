"""Score completions without training anything:

    python -m gtalign_jax.score --input=FILE.jsonl --out=OUT.jsonl \\
        [--welfare=cobb_douglas|linear|user|llm|ces] [--rho=R] [--consistency[=judge|solver]] \\
        [--judge=rule|http|none --judge_url=URL --judge_model=NAME] [--task=MODULE:NAME ...]

A row of the input is an object with `data_source`, `ground_truth` and `completion`; optional are
`question` or `prompt` (text or chat, shown to the judge), `judge_score` and `pareto_judge_score`
(raw scores; absent or null: the configured judge is asked). The output has one row for each, in
order, with the row's other fields and

    user_welfare, llm_welfare, score   null where the row is not valid
    valid                              false where a score is missing, with the reason in `error`
    q_user ... consistency             every factor (null where missing)
    payoff, payoff_error               the matrix as parsed, or null and why
    pareto_set                         its undominated cells, sorted; null without a matrix
    judge_reply                        what the judge said, if it was asked

A line that is no such row becomes {"line", "input", "valid": false, "error"} at its place, is
reported with file and line, and makes the exit status 1. OUT appears when all is scored; until then
it grows as OUT.partial.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gtalign_jax.data.prompt import Prompt
from gtalign_jax.data.sources import parse_line
from gtalign_jax.game.welfare import AGGREGATIONS
from gtalign_jax.reward import factors as factors_lib
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judge, make_judge
from gtalign_jax.reward.rules import RULES
from gtalign_jax.reward.scoring import RewardConfig, Scores, score
from gtalign_jax.reward.tasks import task_of

ROWS_AT_ONCE = 1024
GIVEN = {"judge_score": "quality", "pareto_judge_score": "consistency"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 if some lines were bad, 2 if nothing was done."""
    args = _arguments(argv)
    try:
        cfg = RewardConfig(welfare=args.welfare, rho=args.rho, consistency=args.consistency,
                           tasks=tuple(args.task))
        judge_cfg = JudgeConfig(
            kind=args.judge, base_url=args.judge_url, model=args.judge_model,
            concurrency=args.judge_concurrency, timeout_s=args.judge_timeout, deadline_s=math.inf,
        )  # fmt: skip
        lines = args.input.read_bytes().split(b"\n")
        if args.out.is_dir() or args.out.resolve() == args.input.resolve():
            raise ValueError(f"--out={args.out} must be a new file, not a folder or the input")
        partial = args.out.with_name(args.out.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as out:
            counts = _score_lines(lines, args.input, out, make_judge(judge_cfg, RULES), cfg)
        os.replace(partial, args.out)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.out}: {counts['scored']} rows scored, {counts['missing']} without a score, "
        f"{counts['bad']} bad lines"
    )
    return 1 if counts["bad"] else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gtalign_jax.score", description=__doc__.partition(":")[0],
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--input", type=Path, required=True, help="JSONL file to score")
    add("--out", type=Path, required=True, help="JSONL file to write")
    add("--welfare", default="cobb_douglas", choices=list(AGGREGATIONS))
    add("--rho", type=float, default=0.0, help="exponent of --welfare=ces; 0 is Cobb-Douglas")
    add(
        "--consistency", nargs="?", const="judge", default="none",
        choices=["none", "judge", "solver"], help="weigh whether <analyze> follows the matrix",
    )  # fmt: skip
    add("--task", action="append", default=[], help="import path of a task of your own")
    add("--judge", default="rule", choices=["rule", "http", "none"])
    add("--judge_url", default="", help="base URL of an OpenAI-compatible server")
    add("--judge_model", default="")
    add("--judge_concurrency", type=int, default=JudgeConfig.concurrency)
    add("--judge_timeout", type=float, default=JudgeConfig.timeout_s, help="seconds an attempt")
    return parser.parse_args(argv)


def _score_lines(
    lines: Sequence[bytes], path: Path, out: Any, judge: Judge, cfg: RewardConfig
) -> Counter:
    """Writes one output row per line that is not blank; counts scored, missing and bad."""
    counts: Counter = Counter()
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    for start in range(0, len(numbered), ROWS_AT_ONCE):
        chunk = numbered[start : start + ROWS_AT_ONCE]
        read = [_read(line, cfg.tasks) for _, line in chunk]
        rows = [row for row, problem in read if problem is None]
        results = iter(_results(rows, judge, cfg))
        for (number, line), (_, problem) in zip(chunk, read, strict=True):
            if problem is None:
                result = next(results)
                counts["scored" if result["valid"] else "missing"] += 1
            else:
                print(f"error: {path}:{number}: {problem}", file=sys.stderr)
                text = line.decode("utf-8", errors="backslashreplace")
                result = {"line": number, "input": text, "valid": False, "error": problem}
                counts["bad"] += 1
            out.write(json.dumps(result) + "\n")
        out.flush()
    return counts


def _read(line: bytes, own_tasks: tuple[str, ...]) -> tuple[dict[str, Any], str | None]:
    """(row, what is wrong with it)."""
    row, problem = parse_line(line)
    if problem is not None:
        return {}, problem
    for name in ("data_source", "ground_truth", "completion"):
        if name not in row:
            return {}, f"field {name!r} is missing (fields: {', '.join(map(str, row)) or 'none'})"
        if not isinstance(row[name], str):
            return {}, f"field {name!r} must be a string, not {type(row[name]).__name__}"
    for name in GIVEN:
        value = row.get(name)
        number_like = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer may be finite and yet no float.
        if value is not None and not (number_like and abs(value) <= sys.float_info.max):
            return {}, f"field {name!r} must be a finite number or null, not {value!r}"
    try:
        task_of(row["data_source"], own_tasks)
    except ValueError as error:
        return {}, str(error)
    return row, None


def _results(rows: Sequence[dict[str, Any]], judge: Judge, cfg: RewardConfig) -> Iterator[dict]:
    if not rows:
        return
    prompts = [
        Prompt(str(i), row["data_source"], (), row["ground_truth"], question_of(row))
        for i, row in enumerate(rows)
    ]
    given = [
        {kind: row[name] for name, kind in GIVEN.items() if row.get(name) is not None}
        for row in rows
    ]
    scores = score(prompts, [row["completion"] for row in rows], judge, cfg, given)
    for i, row in enumerate(rows):
        yield {**row, **_result(scores, i)}


def question_of(row: dict[str, Any]) -> str:
    """The user's words: `question`, else `prompt`, of which the last user turn if it is a chat."""
    value = row.get("question") or row.get("prompt") or ""
    if isinstance(value, str):
        return value
    turns = [t for t in value if isinstance(t, dict)] if isinstance(value, list) else []
    said = [str(t.get("content", "")) for t in turns if t.get("role") == "user"]
    return said[-1] if said else json.dumps(value)


def _result(scores: Scores, i: int) -> dict[str, Any]:
    chain, valid = scores.chains[i], bool(scores.valid_B[i])
    asked = [j for j in (scores.judgements[i], scores.consistency_judgements[i]) if j is not None]
    result: dict[str, Any] = {
        "user_welfare": float(scores.user_welfare_B[i]) if valid else None,
        "llm_welfare": float(scores.llm_welfare_B[i]) if valid else None,
        "score": float(scores.reward_B[i]) if valid else None,
        "valid": valid,
        "error": None if valid else "; ".join(j.error or "" for j in asked if j.score is None),
    }
    for name in factors_lib.NAMES:
        result[name] = float(scores.factors[name][i]) if valid else None
    result["payoff"] = chain.payoff
    result["payoff_error"] = chain.error if chain.payoff is None else None
    result["pareto_set"] = sorted(scores.pareto[i]) if chain.payoff is not None else None
    result["judge_reply"] = "\n".join(j.reply for j in asked if j.reply != "given") or None
    return result


if __name__ == "__main__":
    sys.exit(main())
