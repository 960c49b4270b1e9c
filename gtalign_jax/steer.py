"""Ask a trained policy the same at several prices, and see what the prices change:

    python -m gtalign_jax.steer --model=WHAT --pricing=subscription --pricing=per_token:output=30 \\
        --question=TEXT [--question=TEXT …] [--json]
    python -m gtalign_jax.steer --model=WHAT --pricing=subscription --held_out=256 \\
        --sweep=per_token:output=0,10,30,100,300 --out=DIRECTORY

WHAT is a run's work directory, one of its checkpoints, or a Hugging Face directory or hub name. The
model writes its payoff matrix; each pricing edits it, the rule chooses a cell of the edited matrix,
and the model goes on from there (game/steering.py, rollout/steering.py). All pricings draw with the
same key: up to the matrix their texts are the same.

With --question the matrices stand side by side, as written and at each price, with the answers.
With --held_out=N the first policy of the comparison is the first --pricing: on N held-out prompts
of the run (of the built-in tasks, for an exported model that was taught them) what was chosen, said
and paid for in tokens at each price, with 95 % intervals and paired differences; with --out also as
CSV, JSON and figure. A sweep adds a pricing for each number after its last "=".

The exit status is 2 where a flag or the model is wrong.
"""

import argparse
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gtalign_jax import policies, steer_held_out, steer_questions
from gtalign_jax.command import CHATTY
from gtalign_jax.data import asking
from gtalign_jax.game import pricing
from gtalign_jax.game.decide import RULES
from gtalign_jax.game.pricing import SENSITIVITY, Pricing, Usage
from gtalign_jax.game.steering import DEFAULT_RULE, MODES, ROWS, SteeringConfig
from gtalign_jax.model.load import COMPUTE_DTYPES
from gtalign_jax.pod.ending import MISTAKES
from gtalign_jax.rollout.player import Player
from gtalign_jax.rollout.sampler import SamplerConfig
from gtalign_jax.training.checkpoint import CheckpointError
from gtalign_jax.training.metrics import jsonable

USAGE_FORM = '\'{"input": [DA, CQ, AQ], "output": [DA, CQ, AQ]}\''
ANYTHING = Usage((1, 1, 1), (1, 1, 1))  # stands in for the model's until that is loaded
_SWEEP = re.compile(r"(?P<head>.+=)(?P<numbers>[^=]+)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 if nothing was done."""
    args = _arguments(argv)
    for name, level in CHATTY.items():
        logging.getLogger(name).setLevel(level)
    try:
        configs = _configs(args)
        sampler = SamplerConfig(max_new_tokens=args.max_new_tokens, temperature=args.temperature)
        player = policies.load_player(args.model, instruction=args.instruction, dtype=args.dtype)
        if args.usage is None:
            usage = _usage(player)
            configs = [dataclasses.replace(config, usage=usage) for config in configs]
        found = _carry_out(args, player, configs, sampler)
        if args.json:
            print(json.dumps(jsonable(found), indent=2, ensure_ascii=False, allow_nan=False))
    except (*MISTAKES, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _carry_out(args: argparse.Namespace, player: Player, configs: list[SteeringConfig],
               sampler: SamplerConfig) -> dict[str, Any]:
    """Asks, shows what came out unless it is wanted as JSON, and returns it."""
    console = Console(highlight=False, quiet=args.json)
    if args.held_out:
        return steer_held_out.carry_out(
            console, args.model, player, configs, sampler, count=args.held_out,
            samples=args.samples, seed=args.seed, swept=len(args.swept), out=args.out,
            batch_size=args.batch_size,
        )
    found = steer_questions.answer(player, args.question, configs, sampler, args.seed)
    steer_questions.show(console, found)
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gtalign_jax.steer", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="run, checkpoint, Hugging Face directory or hub name")
    add("--pricing", action="append", default=[], metavar="POLICY[:key=dollars,…]",
        help=f"of {', '.join(pricing.POLICIES)}, or a sum (a + b); tokens by the million; for "
        "several columns: several times")
    add("--question", action="append", default=[], help="what the user asks; may be repeated")
    add("--held_out", type=int, default=0, metavar="N", help="on N held-out prompts instead")
    add("--sweep", default="", metavar="POLICY:key=a,b,…",
        help="one more pricing for each number, from cheap to dear")
    add("--out", type=Path, help="directory for CSV, JSON and figure of --held_out")
    add("--rule", default=DEFAULT_RULE, help=f"of {', '.join(RULES)} (%(default)s)")
    add("--mode", default="action",
        help=f"of {', '.join(MODES)}: force matrix and solved action, or the matrix alone")
    add("--rows", default="played", help=f"of {', '.join(ROWS)}: cells that are open to choice")
    add("--sensitivity", default=",".join(f"{s:g}" for s in SENSITIVITY), metavar="LLM,user",
        help="payoff points per dollar (%(default)s)")
    add("--usage", help=f"expected use per action, {USAGE_FORM}; default: as measured")
    add("--floor", type=float, default=0.0, help="no price chooses a cell with LLM + user below it")
    add("--decimals", type=int, help="of what prices add; default: as the model's own numbers")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token (%(default)s)")
    add("--samples", type=int, default=1, help="completions of each held-out prompt")
    add("--seed", type=int, default=0)
    add("--max_new_tokens", type=int, default=512)
    add("--batch_size", type=int, default=64, help="held-out prompts answered at a time")
    add("--instruction", default="", help=f"of {', '.join(asking.INSTRUCTIONS)}; default: as "
        "the model was taught")
    add("--dtype", default="", help=f"of {', '.join(COMPUTE_DTYPES)}; default: by device")
    add("--json", action="store_true", help="print one JSON document instead of tables")
    return parser.parse_args(argv)


def _configs(args: argparse.Namespace) -> list[SteeringConfig]:
    """One for each price. Raises ValueError for anything that is wrong without the model."""
    if bool(args.question) == bool(args.held_out):
        raise ValueError("allowed: --question=TEXT, once or more, or --held_out=N, and one of them")
    for key, lowest in (("held_out", 0), ("samples", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(args, key) < lowest:
            raise ValueError(f"--{key}={getattr(args, key)}: must be >= {lowest}")
    if not args.held_out and (args.sweep or args.out or args.samples > 1):
        raise ValueError("--sweep, --out and --samples need --held_out=N")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(f"--samples={args.samples} at --temperature=0: all completions of a "
                         "prompt would be the same; allowed: a temperature above 0, or --samples=1")
    args.swept = [_read("--sweep", text) for text in _sweep(args.sweep)]
    prices = [*(_read("--pricing", text) for text in args.pricing), *args.swept]
    names = [price.name for price in prices]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--pricing: {', '.join(names) or 'none given'}; allowed: one or more, "
                         f"each once, of {', '.join(pricing.POLICIES)}")
    usage = ANYTHING if args.usage is None else _given_usage(args.usage)
    return [
        SteeringConfig(
            pricing=price, usage=usage, sensitivity=_sensitivity(args.sensitivity),
            rule=args.rule, mode=args.mode, rows=args.rows, floor=args.floor,
            decimals=args.decimals,
        ) for price in prices
    ]  # fmt: skip


def _read(flag: str, text: str) -> Pricing:
    try:
        return pricing.read(text)
    except ValueError as error:
        raise ValueError(f"{flag}={text}: {error}") from error


def _sweep(text: str) -> list[str]:
    """"per_token:output=0,10" -> ["per_token:output=0", "per_token:output=10"]."""
    if not text:
        return []
    match = _SWEEP.fullmatch(text)
    if match is None:
        raise ValueError(f"--sweep={text}: allowed: POLICY:key=a,b,… as in per_token:output=0,10")
    return [match["head"] + number for number in match["numbers"].split(",")]


def _sensitivity(text: str) -> tuple[float, float]:
    try:
        llm, user = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"--sensitivity={text}: allowed: two numbers, LLM,user, payoff points per dollar"
        ) from None
    return llm, user


def _given_usage(text: str) -> Usage:
    try:
        return pricing.read_usage(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--usage={text:.80}: {error}; allowed: {USAGE_FORM}") from error


def _usage(player: Player) -> Usage:
    if player.usage is None:
        raise ValueError(
            f"what the actions of {player.name} take was not measured (a run's evaluation does "
            f"that, and an export carries it along): give --usage={USAGE_FORM}"
        )
    return player.usage


if __name__ == "__main__":
    sys.exit(main())
