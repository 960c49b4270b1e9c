"""What all speed benchmarks share: sizes, flags, prompts, the clock of an iteration, the report.

Only the standard library is imported: the peers run in environments of their own.
"""

import argparse
import contextlib
import dataclasses
import json
import random
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

PARTS = ("rollout", "update", "iteration")
LOWEST_ID = 5  # ids below it are left to special tokens
BETA = 0.04  # weight of the KL term
LEARNING_RATE = 1e-6
DEVIATION = 0.02  # of the random weights


@dataclasses.dataclass(frozen=True)
class Size:
    """A decoder in Qwen2's form, with tied embeddings; the names are those of our model."""

    vocab: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


SIZES = {
    "small": Size(4_096, 256, 704, 4, 8, 2, 32),
    "big": Size(32_768, 768, 2_048, 12, 12, 4, 64),
}


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark understands."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="completions per prompt")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--common-prefix", type=int, default=0,
                        help="so many first tokens are the same in all prompts")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--lengths", choices=("fixed", "longtail"), default="fixed")
    parser.add_argument("--warmup", type=int, default=1, help="runs that are not counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where the common flags contradict each other."""
    for name in ("prompts", "samples", "prompt_len", "new_tokens", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.warmup < 0:
        parser.error("--warmup must not be negative")
    if not 0 <= args.common_prefix <= args.prompt_len:
        parser.error("--common-prefix must lie between 0 and --prompt-len")


def parse_peer(parser: argparse.ArgumentParser, argv: Sequence[str] | None,
               parts: Sequence[str]) -> argparse.Namespace:
    """The flags of a peer, which measures `parts`, the last of them unless told otherwise."""
    args = parser.parse_args(argv)
    check(parser, args)
    args.part = args.part or parts[-1]
    if args.part not in parts:
        parser.error(f"--part={args.part} is not measured here, only {', '.join(parts)}")
    if args.lengths != "fixed":
        parser.error("--lengths: the peers are measured with fixed lengths only")
    return args


def add_micro(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--micro", type=int,
                        help="sequences per forward and backward pass (default: 8, or all)")


def micro_of(parser: argparse.ArgumentParser, args: argparse.Namespace, multiple: int = 1) -> int:
    """The micro-batch in sequences; it divides the batch and is a multiple of `multiple`."""
    rows = args.prompts * args.samples
    if args.samples < 2:
        parser.error("--samples: GRPO compares at least 2 completions of a prompt")
    micro = args.micro or min(rows, max(8 // multiple, 1) * multiple)
    if micro < 1 or rows % micro or micro % multiple:
        parser.error(f"--micro={micro} must divide the {rows} sequences"
                     + (f" and be a multiple of {multiple}" if multiple > 1 else ""))
    return micro


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    """The prompts' token ids: the same for the same flags, in every program."""
    source = random.Random(args.seed)
    highest = SIZES[args.size].vocab - 1

    def draw(count: int) -> list[int]:
        return [source.randint(LOWEST_ID, highest) for _ in range(count)]

    common = draw(args.common_prefix)
    return [common + draw(args.prompt_len - args.common_prefix) for _ in range(args.prompts)]


def to_text(ids: Sequence[int]) -> str:
    """Token ids as words, for peers that insist on text."""
    return " ".join(map(str, ids))


def reward(ids: Sequence[int], new_tokens: int) -> float:
    """A reward that differs between completions; raises where one has not the expected length."""
    if len(ids) != new_tokens:
        raise ValueError(f"a completion has {len(ids)} tokens instead of {new_tokens}")
    return sum(token % 2 for token in ids) / new_tokens


class Clock:
    """Splits the iterations of a training loop into rollout, reward and the rest: the update."""

    def __init__(self):
        self.rollouts: list[float] = []
        self.updates: list[float] = []
        self.iterations: list[float] = []
        self.start()

    def start(self) -> None:
        self._spent = dict.fromkeys(("rollout", "reward"), 0.0)
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._spent[name] += time.perf_counter() - began

    def end(self) -> None:
        """The iteration is over, and the next one begins."""
        spent = time.perf_counter() - self._began
        if not self._spent["rollout"]:
            raise RuntimeError("an iteration without a rollout: the hooks do not fit this version")
        self.rollouts.append(self._spent["rollout"])
        self.updates.append(spent - sum(self._spent.values()))
        self.iterations.append(spent)
        self.start()

    def report(self, program: str, args: argparse.Namespace, **extra) -> None:
        """Reports args.part, with the parts of an iteration where it is the iteration."""
        parts = {"rollout": self.rollouts, "update": self.updates, "iteration": self.iterations}
        if len(self.iterations) != args.warmup + args.repeats:
            raise RuntimeError(f"{len(self.iterations)} iterations were timed instead of "
                               f"{args.warmup} + {args.repeats}")
        seconds = {name: spent[args.warmup:] for name, spent in parts.items()}
        if args.part == "iteration":
            extra |= {f"{name}_seconds": _rounded(statistics.median(seconds[name]))
                      for name in ("rollout", "update")}
        report(program, args, seconds[args.part], **extra)


def report(program: str, args: argparse.Namespace, seconds: Sequence[float], **extra) -> None:
    """Prints the one line of JSON that a benchmark is run for."""
    rows = args.prompts * args.samples
    counted = args.new_tokens if args.part == "rollout" else args.prompt_len + args.new_tokens
    median = statistics.median(seconds)
    common = ("part", "size", "prompts", "samples", "prompt_len", "common_prefix", "new_tokens")
    print(json.dumps({
        "program": program,
        **{name: getattr(args, name) for name in common},
        "seconds": _rounded(median),
        "all_seconds": [_rounded(spent) for spent in seconds],
        "tokens_per_s": round(rows * counted / median, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **extra,
    }), flush=True)


def _rounded(seconds: float) -> float:
    return round(seconds, 4)


def quiet() -> contextlib.redirect_stdout:
    """What libraries print goes to standard error, so that the report is alone."""
    return contextlib.redirect_stdout(sys.stderr)
