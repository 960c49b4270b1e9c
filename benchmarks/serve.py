"""Load on a real server: many clients at once, every kind of request, for a while.

    python -m benchmarks.serve --model=runs/demo [--clients=64] [--seconds=60] [--out=FILE.json]
        [--slots=8 --queue=64 --new_tokens=N] [--fuzz=0]

Starts `python -m gtalign_jax.serve` on loopback and lets the clients ask until the time is over:
steered and not, streamed and not, and now and then one that hangs up in the middle. A 429 is
waited for as Retry-After says and asked again; whatever else goes wrong is an error, and a request
that never ends is lost. One JSON line says how it went: counts, latency, tokens per second, and the
server's memory (RSS) before, after and at its peak. The status is 1 where anything went wrong.

--fuzz=N sends N schemathesis examples per operation afterwards (needs requirements-test.txt).
"""

import argparse
import asyncio
import dataclasses
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai

from gtalign_jax.data import builtin

ROOT = Path(__file__).resolve().parent.parent
LOST_S = 600.0  # a request that takes longer than any deadline of the server's
PRICES = ("subscription", "per_token", "per_token:output=3000", "per_request:price=0.02")
HANGS_UP = 0.05  # of the streams


@dataclasses.dataclass
class Tally:
    """What became of all requests."""

    counts: Counter = dataclasses.field(default_factory=Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)  # of streams: to the first text
    tokens: int = 0
    errors: Counter = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request of the mix."""

    question: str
    seed: int
    price: str | None
    stream: bool
    hangs_up: bool

    def body(self, model: str) -> dict[str, Any]:
        body = {
            "model": model, "messages": [{"role": "user", "content": self.question}],
            "seed": self.seed,
        }  # fmt: skip
        return body | ({"extra_body": {"pricing": self.price}} if self.price else {})


def draw(rng: random.Random, questions: list[str]) -> Ask:
    stream = rng.random() < 0.5
    price = rng.choice(PRICES) if rng.random() < 0.5 else None
    hangs_up = stream and rng.random() < HANGS_UP
    return Ask(rng.choice(questions), rng.randrange(2**31), price, stream, hangs_up)


async def client(
    url: str, model: str, until: float, rng: random.Random, questions: list[str], tally: Tally
) -> None:
    """One user: asks, waits for the answer, asks again; once at least."""
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=LOST_S
    ) as api:
        while True:
            ask = draw(rng, questions)
            tally.counts["asked"] += 1
            try:
                await _answered(api, model, ask, tally)
            except (openai.APITimeoutError, TimeoutError):
                tally.counts["lost"] += 1
            except openai.APIError as error:
                tally.errors[f"{type(error).__name__}: {error}"[:120]] += 1
            else:
                tally.counts["hung_up" if ask.hangs_up else "answered"] += 1
                tally.counts["steered" if ask.price else "plain"] += 1
                tally.counts["streamed" if ask.stream else "whole"] += 1
            if time.monotonic() > until:
                return


async def _answered(api: openai.AsyncOpenAI, model: str, ask: Ask, tally: Tally) -> None:
    """Asks until it is let in, and reads the whole answer."""
    began = time.monotonic()
    async with asyncio.timeout(LOST_S):
        while True:
            try:
                if ask.stream:
                    await _stream(api, model, ask, tally)
                else:
                    reply = await api.chat.completions.create(**ask.body(model))
                    _check(reply.choices[0].message.gtalign, ask)
                    tally.tokens += reply.usage.completion_tokens
                break
            except openai.RateLimitError as error:
                tally.counts["refused"] += 1
                await asyncio.sleep(float(error.response.headers["retry-after"]))
    if not ask.hangs_up:
        tally.seconds.append(time.monotonic() - began)


async def _stream(api: openai.AsyncOpenAI, model: str, ask: Ask, tally: Tally) -> None:
    began, text, game = time.monotonic(), "", None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with await api.chat.completions.create(**ask.body(model), **options) as chunks:
        async for chunk in chunks:
            for choice in chunk.choices:
                if choice.delta.content and not text:
                    tally.first.append(time.monotonic() - began)
                text += choice.delta.content or ""
                game = (choice.delta.model_extra or {}).get("gtalign") or game
            if ask.hangs_up:
                return
            if chunk.usage:
                tally.tokens += chunk.usage.completion_tokens
    _check(game, ask)
    if text not in game["chain"]:
        tally.errors["the streamed text is not in the chain"] += 1


def _check(game: dict[str, Any], ask: Ask) -> None:
    if game["seed"] != ask.seed:
        raise openai.APIError(f"asked with seed {ask.seed}, answered with {game['seed']}", None,
                              body=None)  # fmt: skip


class Served:
    """The server's process, and its memory as /proc has it."""

    def __init__(self, args: argparse.Namespace) -> None:
        command = [
            sys.executable, "-m", "gtalign_jax.serve", f"--model={args.model}", "--port=0",
            "--name=served", f"--slots={args.slots}", f"--queue={args.queue}",
        ]  # fmt: skip
        if args.new_tokens:
            command.append(f"--new_tokens={args.new_tokens}")
        self.log = (args.log or Path("/dev/null")).open("w")
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        line = self.process.stdout.readline()
        if not line.startswith("ready: "):
            raise SystemExit(f"the server did not start: {self.process.wait()} (--log=FILE)")
        self.url = line.removeprefix("ready: ").strip()

    def memory(self, field: str) -> float:
        """MiB; VmRSS or VmHWM."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) / 1024

    def end(self) -> int:
        self.process.terminate()
        status = self.process.wait(120)
        self.log.close()
        return status


async def load(url: str, args: argparse.Namespace) -> tuple[Tally, float]:
    """All clients at once for `seconds`, and then until the last one has its answer."""
    tally, began = Tally(), time.monotonic()
    questions = [prompt.question for prompt in builtin.generate("test", 200, args.seed)]
    async with asyncio.TaskGroup() as group:
        for number in range(args.clients):
            rng = random.Random(f"{args.seed} {number}")
            group.create_task(
                client(url, "served", began + args.seconds, rng, questions, tally)
            )
    return tally, time.monotonic() - began


def summary(tally: Tally, took: float) -> dict[str, Any]:
    """The figures; latencies in seconds."""
    done = tally.counts["answered"]
    cuts = statistics.quantiles(tally.seconds, n=100) if len(tally.seconds) > 1 else [0.0] * 99
    return {
        **{name: tally.counts[name] for name in (
            "asked", "answered", "hung_up", "lost", "refused", "steered", "plain", "streamed",
            "whole",
        )},
        "errors": sum(tally.errors.values()), "errors_by_kind": dict(tally.errors),
        "seconds": round(took, 1), "requests_per_s": round(done / took, 2),
        "tokens_per_s": round(tally.tokens / took, 1),
        "latency_s": {f"p{p}": round(cuts[p - 1], 2) for p in (50, 90, 99)}
        | {"max": round(max(tally.seconds, default=0.0), 2)},
        "first_text_s": round(statistics.median(tally.first), 2) if tally.first else None,
    }  # fmt: skip


def fuzz(url: str, examples: int) -> int:
    """Schemathesis against the running server; its exit status."""
    return subprocess.run(
        [
            "schemathesis", "run", f"{url}/openapi.json", "--checks=all",
            # What no schema can say: that the last message is the user's, a text's tokens.
            "--exclude-checks=positive_data_acceptance", f"--max-examples={examples}", "--seed=1",
        ],
        check=False,
    ).returncode  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--clients", type=int, default=64)
    add("--seconds", type=float, default=60.0)
    add("--seed", type=int, default=0)
    add("--slots", type=int, default=8)
    add("--queue", type=int, default=64)
    add("--new_tokens", type=int, default=0, help="0: the server's own default")
    add("--fuzz", type=int, default=0, help="schemathesis examples per operation afterwards")
    add("--log", type=Path, help="where the server's log goes; default: nowhere")
    add("--out", type=Path, help="file for the JSON line, besides standard output")
    args = parser.parse_args()
    served = Served(args)
    try:
        asyncio.run(load(served.url, argparse.Namespace(clients=4, seconds=3, seed=args.seed)))
        before = served.memory("VmRSS")  # after a first few, which load and compile things
        tally, took = asyncio.run(load(served.url, args))
        found = summary(tally, took)
        found["rss_mib"] = {
            "start": round(before), "end": round(served.memory("VmRSS")),
            "peak": round(served.memory("VmHWM")),
        }  # fmt: skip
        if args.fuzz:
            found["fuzz_status"] = fuzz(served.url, args.fuzz)
    finally:
        status = served.end()
    found["exit_status"] = status
    line = json.dumps(found)
    print(line)
    if args.out:
        args.out.write_text(line + "\n", encoding="utf-8")
    wrong = found["errors"] or found["lost"] or status or found.get("fuzz_status", 0)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
