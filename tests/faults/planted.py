"""The real command, which kills itself with -9 in the place that KILL_AT names.

    KILL_AT=rollout python tests/faults/planted.py --config=…

A place is where it is in the run of `TINY`: a phase of a step (as the watch is told of them), on
entering or leaving it, or a function. Completions read as chains, since a model of a few steps
writes none.
"""

import contextlib
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import jax  # noqa: E402
import runs  # noqa: E402
from absl import app  # noqa: E402

from gtalign_jax import main as command  # noqa: E402
from gtalign_jax import report  # noqa: E402
from gtalign_jax import run as run_lib  # noqa: E402
from gtalign_jax.config import parse_flags  # noqa: E402
from gtalign_jax.model import hf  # noqa: E402
from gtalign_jax.pod.watch import Watch  # noqa: E402
from gtalign_jax.training import collect  # noqa: E402

TINY = runs.SETTINGS | {
    "stages": "('sft','grpo','evaluate','export')", "sft.steps": 6, "sft.log_every": 1,
    "grpo.steps": 6, "data.train_size": 24, "checkpoint.every": 2, "evaluate.every_steps": 1,
}
# (stage, phase, step, whether on entering or leaving it). An epoch has three steps of GRPO. Saves
# are every two steps and go on in the background after that phase; evaluations follow each step.
PHASES = {
    "cold start": ("sft", "update", 3, "enter"),
    "save of the cold start": ("sft", "save", 4, "leave"),
    "last step of the cold start": ("sft", "save", 6, "enter"),
    "rollout": ("grpo", "rollout", 2, "enter"),
    "judging": ("grpo", "reward", 3, "enter"),
    "update": ("grpo", "update", 3, "leave"),
    "evaluation": ("grpo", "evaluate", 3, "enter"),
    "evaluation that is written": ("grpo", "evaluate", 4, "leave"),
    "epoch boundary": ("grpo", "rollout", 4, "enter"),
    "before a save": ("grpo", "save", 4, "enter"),
    "save": ("grpo", "save", 4, "leave"),
    "last step": ("grpo", "save", 6, "enter"),
    "last save": ("grpo", "save", 6, "leave"),
    "before the export": ("grpo", "export", 6, "enter"),
}
FUNCTIONS = {  # (owner, name, whether on entering or leaving it)
    "start-up": (run_lib, "open_session", "leave"),
    "between the stages": (run_lib, "run_grpo", "enter"),
    "export": (hf, "write_shards", "leave"),
    "report": (report, "write", "enter"),
}
COMPILATIONS = 60  # about halfway to the first update
PLACES = ("compilation", *FUNCTIONS, *PHASES)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_compilation(number: int) -> None:
    seen = []

    def on_event(event: str, duration: float, **_: Any) -> None:
        seen.extend(["one"] * (event == "/jax/core/compile/backend_compile_duration"))
        if len(seen) == number:
            die()

    jax.monitoring.register_event_duration_secs_listener(on_event)


def at_function(owner: Any, name: str, moment: str) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        if moment == "enter":
            die()
        function(*args, **options)
        die()

    setattr(owner, name, wrapped)


def at_phase(stage: str, phase: str, step: int, moment: str) -> None:
    """Phases without a step belong to the one that was last spoken of."""
    now = {"stage": "", "step": 0}
    for name in ("sft", "grpo"):
        setattr(run_lib, f"run_{name}", in_stage(now, name, getattr(run_lib, f"run_{name}")))
    enter = Watch.phase

    @contextlib.contextmanager
    def watched(watch: Watch, name: str, number: int | None = None):
        now["step"] = number or now["step"]
        here = (now["stage"], name, now["step"]) == (stage, phase, step)
        if here and moment == "enter":
            die()
        with enter(watch, name, number):
            yield
        if here:
            die()

    Watch.phase = watched


def in_stage(now: dict, name: str, run_stage: Any) -> Any:
    @functools.wraps(run_stage)
    def wrapped(*args: Any, **options: Any) -> Any:
        now.update(stage=name, step=0)
        return run_stage(*args, **options)

    return wrapped


if __name__ == "__main__":
    collect.decode = runs.fluent
    place = os.environ.get("KILL_AT")
    if place == "compilation":
        at_compilation(COMPILATIONS)
    elif place in FUNCTIONS:
        at_function(*FUNCTIONS[place])
    elif place:
        at_phase(*PHASES[place])
    app.run(command.main, flags_parser=parse_flags)
