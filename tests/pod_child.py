"""The real command as one process of a pod, with a test's ears and hands in it.

    python tests/pod_child.py --config=…

Completions read as chains that name their tokens, so that a model of a few steps has rewards to
tell apart and a single other token shows in the log. What the judge is asked is noted, a line for
each request, in `workdir`/asked-PROCESS.jsonl. PLANTED="reward:2:1:stop" plants a fault: in that
phase of that step that process is stopped ("stop"), killed ("kill"), told to end ("term") or raises
("raise").
"""

import functools
import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import runs
from absl import app

from gtalign_jax import judging
from gtalign_jax import main as command
from gtalign_jax.config import parse_flags
from gtalign_jax.game.chain import render
from gtalign_jax.pod import exchange
from gtalign_jax.reward.judges import make_judge
from gtalign_jax.training import checkpoint, collect, trainer

BEATS_S = 2.0  # several heartbeats of the tests, also on a busy machine


class Planted(Exception):
    pass


def fail(how: str) -> None:
    print(f"planted at {time.time():.3f}", flush=True)
    if how == "raise":
        raise Planted("a planted fault")
    if how == "stop":  # the others can only know the phase of a process that still said where it is
        time.sleep(BEATS_S)
    signals = {"stop": signal.SIGSTOP, "kill": signal.SIGKILL, "term": signal.SIGTERM}
    os.kill(os.getpid(), signals[how])


def legible(tokenizer, ids) -> str:
    """Stands in for `decode`: a well-formed chain about the tokens themselves."""
    del tokenizer
    told = " ".join(str(int(i)) for i in ids)
    dice = zlib.crc32(told.encode())
    return render(told, runs.PAYOFF, "DQ_AQ", "Which one? " * (1 + dice % 5) + told)


def noting_judge(cfg, rules, ask=None):
    """The run's judge; each request leaves a line behind."""
    honest = make_judge(cfg, rules, ask)

    def judge(requests):
        workdir = next(a.split("=", 1)[1] for a in sys.argv if a.startswith("--config.workdir="))
        with (Path(workdir) / f"asked-{exchange.process_index()}.jsonl").open("a") as file:
            for request in requests:
                file.write(json.dumps([request.question, request.response]) + "\n")
        return honest(requests)

    return judge


def plant(owner, name: str, step: int, how: str) -> None:
    """Makes call number `step` of a method fail."""
    method, calls = getattr(owner, name), []

    @functools.wraps(method)
    def wrapped(*args, **options):
        calls.append(1)
        if len(calls) == step:
            fail(how)
        return method(*args, **options)

    setattr(owner, name, wrapped)


PLACES = {
    "rollout": (collect.Collector, "roll"),
    "reward": (collect.Collector, "assess"),
    "update": (trainer.Learner, "update"),
    "save": (checkpoint.Checkpointer, "save"),
}

if __name__ == "__main__":
    collect.decode = legible
    judging.make_judge = noting_judge
    if planted := os.environ.get("PLANTED"):
        phase, step, process, how = planted.split(":")
        if os.environ.get("GTALIGN_PROCESS_INDEX") == process:
            plant(*PLACES[phase], int(step), how)
    app.run(command.main, flags_parser=parse_flags)
