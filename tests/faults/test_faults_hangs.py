"""A phase that does not come to its end ends the process, and says which phase it was."""

import functools
import threading
import time
import types

import pytest
import runs

from gtalign_jax import export, report, session
from gtalign_jax import run as run_lib
from gtalign_jax.model import load
from gtalign_jax.pod import ending, watch
from gtalign_jax.rollout.sampler import Sampler
from gtalign_jax.training import collect
from gtalign_jax.training.assessing import Assessing
from gtalign_jax.training.checkpoint import Checkpointer
from gtalign_jax.training.learner import Learner

DAY_S = 86400.0  # longer than any deadline


class Hung(BaseException):
    """Stands for the end of the process: nobody catches that."""


def hang(monkeypatch, owner, name, call=1) -> list[tuple[str, int]]:
    """Call number `call` of a function does not return: a day goes by at once, and the watch ends
    the process. Returns the list of what it ended it with, (cause, status)."""
    function, calls, ended = getattr(owner, name), [], []
    day, gone = threading.Event(), threading.Event()

    @functools.wraps(function)
    def wrapped(*args, **options):
        calls.append(1)
        if len(calls) != call:
            return function(*args, **options)
        day.set()
        assert gone.wait(20), "the watch let it hang"
        raise Hung

    def end(self, cause, status=ending.EXIT):
        ended.append((cause, status))
        self._over.set()
        gone.set()

    clock = types.SimpleNamespace(**vars(time))
    clock.monotonic = lambda: time.monotonic() + day.is_set() * DAY_S
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(watch.Watch, "_end", end)
    monkeypatch.setattr(owner, name, wrapped)
    return ended


PLACES = (
    ((session, "train_tokenizer"), "tokenizer"),
    ((session, "open_bench"), "start of the run"),
    ((load, "load_model"), "load"),
    ((Sampler, "__call__"), "evaluate"),
    ((Checkpointer, "save"), "save of step 1"),
    ((Learner, "begin"), "rollout of step 1"),
    ((Assessing, "wait"), "reward of step 1"),
    ((Learner, "update"), "update of step 1"),
    ((Checkpointer, "newest"), "restore"),
    ((export, "write"), "export"),
    ((report, "write"), "report"),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_phase_that_hangs_ends_the_process_with_its_name_and_its_deadline(tmp_path, monkeypatch):
    """In one run after the other in the same directory: each gets further than the one before."""
    monkeypatch.setattr(collect, "decode", runs.fluent)
    config = runs.config(tmp_path, stages=("sft", "grpo", "evaluate", "export"), grpo__steps=2,
                         data__test_size=4)
    for place, phase in PLACES:
        with monkeypatch.context() as patch:
            ended = hang(patch, *place)
            with pytest.raises(Hung):
                run_lib.run(config)
        (cause, status), *more = ended
        assert status == ending.EXIT == 70 and not more
        assert "passed the deadline of" in cause, place
        assert cause.endswith(f" s in {phase}"), (place, cause)
    run_lib.run(config)
    assert [row["step"] for row in runs.metrics(tmp_path, "grpo")] == [1, 2]
