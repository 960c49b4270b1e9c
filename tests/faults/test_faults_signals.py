"""SIGTERM and Ctrl-C, wherever they find a run: it saves what it has, and goes on from there."""

import functools
import json
import os
import signal
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs

from gtalign_jax import command, export, judging, report, session
from gtalign_jax import run as run_lib
from gtalign_jax.config import Config
from gtalign_jax.model import load
from gtalign_jax.pod import notice as notice_lib
from gtalign_jax.pod.notice import Notice, Preempted
from gtalign_jax.reward.judges import make_judge
from gtalign_jax.rollout.sampler import Sampler
from gtalign_jax.training import collect
from gtalign_jax.training.assessing import Assessing
from gtalign_jax.training.learner import Learner
from gtalign_jax.training.sft import ExampleSet

STEPS = 6
SETTINGS = {
    "stages": ("sft", "grpo", "evaluate", "export"), "sft__steps": 3, "grpo__steps": STEPS,
    "evaluate__every_steps": 4, "evaluate__temperature": 1.0, "data__test_size": 4,
    "evaluate__batch_size": 8, "checkpoint__every": 100, "grpo__prompts_per_step": 16,
    "rollout__micro_batch_prompts": 1, "rollout__max_new_tokens": 8,
}


def tell(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def on_call(monkeypatch, owner, name, call=1, number=signal.SIGTERM):
    """The process is told to end as call number `call` of a function begins."""
    function, calls = getattr(owner, name), []

    @functools.wraps(function)
    def wrapped(*args, **options):
        calls.append(1)
        if len(calls) == call:
            tell(number)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


def dead_judge(monkeypatch, call):
    """From its call number `call` on it gives no answer; the second who waits for it is told."""
    calls, dead = [], threading.Event()
    on_call(monkeypatch, Assessing, "wait", 2)

    def make(cfg, rules, ask=None):
        honest = make_judge(cfg, rules, ask)

        def judge(requests):
            calls.append(1)
            if len(calls) >= call:
                dead.wait(60)
            return honest(requests)
        return judge

    monkeypatch.setattr(judging, "make_judge", make)


def end_of(directory):
    """Everything that a run leaves behind, as far as no clock is in it."""
    state = ocp.PyTreeCheckpointer().restore(directory / f"checkpoints/grpo/{STEPS}/state")
    return (
        [np.asarray(x).tobytes() for x in jax.tree.leaves(state)],
        {stage: runs.repeatable(runs.metrics(directory, stage))
         for stage in ("sft", "grpo", "evaluate")},
        runs.rows(directory, "rollouts.jsonl"), runs.rows(directory, "evaluations.jsonl"),
        json.loads((directory / "results.json").read_text()),
        (directory / "hf/model.safetensors").read_bytes(),
    )


HITS = (  # where the run is told to end, one after the other; what is saved then, in words
    ((session, "train_tokenizer"), {}, "tokenizer", "there was nothing to save"),
    ((load, "load_model"), {}, "load", "there was nothing to save"),
    ((Sampler, "__call__"), {"number": signal.SIGINT}, "evaluate", "there was nothing to save"),
    ((ExampleSet, "batch"), {"call": 2}, "update of step 2", "sft is saved up to step 2"),
    ((Learner, "begin"), {}, "rollout of step 1", "sft is saved up to step 3"),
    # Two pieces a step, each in several legs; `ahead`: the first step samples those of two.
    ((Sampler, "__call__"), {"call": 8, "number": signal.SIGINT}, "rollout of step 3",
     "grpo is saved up to step 2"),
    ("judge", {"call": 2}, "reward of step 4", "grpo is saved up to step 3"),
    ((run_lib, "evaluate_policy"), {}, "grpo", "grpo is saved up to step 4"),
    ((Learner, "update"), {"call": 2}, "update of step 6", "grpo is saved up to step 6"),
    ((export, "write"), {}, "export", "grpo is saved up to step 6"),
    ((report, "write"), {"number": signal.SIGINT}, "report", "grpo is saved up to step 6"),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_that_is_told_to_end_in_each_of_its_phases_is_the_run_that_never_was(
    tmp_path, monkeypatch, capfd
):
    """With completions sampled ahead, which a checkpoint must hold as they are."""
    monkeypatch.setattr(collect, "decode", runs.fluent)
    whole, told = (runs.config(tmp_path / name, **SETTINGS, grpo__ahead=1, grpo__truncated_is=2.0)
                   for name in ("whole", "told"))
    run_lib.run(whole)
    for place, options, where, saved in HITS:
        with monkeypatch.context() as patch, pytest.raises(Preempted) as ended:
            if place == "judge":
                dead_judge(patch, **options)
            else:
                on_call(patch, *place, **options)
            run_lib.run(told)
        number = options.get("number", signal.SIGTERM)
        said = f"told to end by {number.name} in {where}: {saved}; the same command goes on"
        assert said in str(ended.value), place
        assert ended.value.status == (130 if number == signal.SIGINT else 75)
        assert f"{number.name} in {where}: " in capfd.readouterr().err
    run_lib.run(told)
    for a, b in zip(end_of(tmp_path / "told"), end_of(tmp_path / "whole"), strict=True):
        assert a == b


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_command_ends_in_one_line_with_its_status_and_leaves_no_handler(
    monkeypatch, capsys, number, status
):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(command, "from_flag", lambda flag, cls: Config())
    with pytest.raises(SystemExit) as ended:
        command.carry_out(None, lambda config: os.kill(os.getpid(), number))
    assert ended.value.code == status
    said = f"told to end by {number.name} in start-up: there was nothing to save; the same command"
    assert said in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_native_code_does_not_keep_a_process_where_nothing_is_to_save(monkeypatch):
    monkeypatch.setattr(notice_lib, "NATIVE_S", 0.1)
    left = []
    count = jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda i, x: x * 1.000001 + i, 1.0))
    count(1).block_until_ready()
    with pytest.raises(Preempted), Notice(leave=lambda *about: left.append(about)):
        threading.Timer(0.1, tell).start()
        while not left:
            count(300_000_000).block_until_ready()
    assert [status for _, status in left] == [75] and "SIGTERM in start-up" in left[0][0]


def test_who_is_leaving_already_is_not_disturbed_by_an_echo():
    with Notice():
        with pytest.raises(Preempted):
            tell()
        tell()  # while files are closed and sent


def test_what_is_not_saved_is_held_until_all_can_end_together():
    with pytest.raises(Preempted) as ended, Notice() as notice:
        notice.hold()
        assert not notice.heard()
        tell()
        tell()  # as where a whole group is told, and the wrapper passes it on: the same notice
        assert notice.heard()
        notice.check()
    assert ended.value.together
    with pytest.raises(Preempted) as ended, Notice() as notice:
        notice.hold()
        tell()
        notice.release()
    assert not ended.value.together
