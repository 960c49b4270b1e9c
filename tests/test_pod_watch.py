"""The watch: whatever happens to one process, every process ends soon, and says what happened."""

import signal
import subprocess
import sys
import time

import pods
import pytest

from gtalign_jax.pod import ending
from gtalign_jax.pod.start import PodConfig
from gtalign_jax.pod.watch import Watch

CHILD = """
import os, signal, sys, time
import numpy as np
from jax.experimental import multihost_utils
from gtalign_jax.pod import exchange
from gtalign_jax.pod.start import PodConfig, start
from gtalign_jax.pod.watch import Watch

WHAT, WHO = {what!r}, {who}
cfg = PodConfig(start_s=60, heartbeat_s=0.3, silence_s=2, update_s=2 if WHAT == "late" else 60)
start(cfg)
me = exchange.process_index()
with Watch(cfg) as watch:
    multihost_utils.process_allgather(np.zeros(1))
    with watch.phase("rollout", 7):
        exchange.all_gather(me)
        time.sleep(0.4)
    with watch.phase("update", 7):
        time.sleep(0.4)
        if me == WHO:
            if WHAT.startswith("SIG"):
                print("hit", flush=True)
                os.kill(os.getpid(), getattr(signal, WHAT))
            if WHAT == "raise":
                raise FloatingPointError("the loss is nan")
            if WHAT in ("late", "slow"):
                time.sleep(60 if WHAT == "late" else 4)
        {wait}
print("after the watch", flush=True)
"""
# How the others wait for the one that is hit: on the host, or inside a collective.
HOST_WAIT = "exchange.all_gather(me)"
DEVICE_WAIT = "multihost_utils.process_allgather(np.zeros(1))"
WITHIN = 14.0  # silence of 2 s, a linger of process 0, and a slow machine


def run(what, who, wait, count=2):
    return pods.spawn(CHILD.format(what=what, who=who, wait=wait), count)


def wait_for_line(child, line):
    for text in child.stdout:
        if line in text:
            return time.monotonic()
    raise AssertionError(f"{line!r} never came")


@pytest.mark.slow
def test_a_run_that_ends_well_ends_everywhere_though_one_takes_longer():
    # Process 1 works for twice the silence after process 0 has come to its end, but it beats.
    for result in pods.ended(run("slow", 1, "pass")):
        assert result.status == 0 and "after the watch" in result.text, result.text
        assert "error:" not in result.text


@pytest.mark.slow
@pytest.mark.parametrize(("how", "wait", "count"), [
    ("SIGUSR1", HOST_WAIT, 3), ("SIGKILL", DEVICE_WAIT, 2),
])
def test_a_killed_process_ends_the_others_by_name(how, wait, count):
    children = run(how, 1, wait, count)
    hit = wait_for_line(children[1], "hit")
    results = pods.ended(children)
    assert time.monotonic() - hit < WITHIN
    assert results[1].status == -signal.Signals[how]
    for result in results[:1] + results[2:]:
        assert result.status in (ending.EXIT, ending.EXIT_FAILED), result.text
        assert "process 1 (host" in result.text.rpartition("error: ")[2]
        assert "after the watch" not in result.text


@pytest.mark.slow
def test_a_process_that_is_told_to_end_where_nothing_is_to_save_takes_the_others_along():
    for result in pods.ended(run("SIGTERM", 1, HOST_WAIT)):
        assert result.status == ending.EXIT_PREEMPTED, result.text
        assert "process 1 (host" in result.text and "error:" not in result.text
        assert "told to end by SIGTERM in update of step 7: there was nothing" in result.text


@pytest.mark.slow
def test_a_stopped_process_ends_the_others_and_itself_when_it_goes_on():
    children = run("SIGSTOP", 1, DEVICE_WAIT)
    pods.wait_until_stopped(children[1])
    hit = time.monotonic()
    first = pods.ended(children[:1])[0]
    assert time.monotonic() - hit < WITHIN
    assert first.status == ending.EXIT
    assert "error: process 1 (host" in first.text and "has been silent for 2." in first.text
    assert "last seen in update of step 7" in first.text
    assert "process_allgather" in first.text, "the stacks show where it waited"
    children[1].send_signal(signal.SIGCONT)
    second = pods.ended(children[1:])[0]
    # JAX's own fatal log may be faster than ours, now that process 0 is gone.
    assert second.status in (ending.EXIT, ending.EXIT_FAILED, -signal.SIGABRT), second.text


@pytest.mark.slow
def test_a_stopped_process_zero_ends_the_others_though_no_request_is_answered():
    children = run("SIGSTOP", 0, HOST_WAIT)
    pods.wait_until_stopped(children[0])
    hit = time.monotonic()
    second = pods.ended(children[1:])[0]
    assert time.monotonic() - hit < WITHIN
    assert second.status == ending.EXIT
    assert "error: process 0 has not answered process 1" in second.text
    children[0].send_signal(signal.SIGCONT)
    first = pods.ended(children[:1])[0]
    assert first.status == ending.EXIT
    assert "error: process 0 (host" in first.text and "did not run for" in first.text


@pytest.mark.slow
def test_a_killed_process_zero_ends_the_others():
    children = run("SIGKILL", 0, HOST_WAIT)
    hit = wait_for_line(children[0], "hit")
    second = pods.ended(children)[1]
    assert time.monotonic() - hit < WITHIN
    assert second.status in (ending.EXIT, ending.EXIT_FAILED, -signal.SIGABRT)
    assert "all_gather" in second.text, "the stacks show where it waited"


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_what_one_process_raises_ends_all_with_that_cause(who):
    began = time.monotonic()
    results = pods.ended(run("raise", who, DEVICE_WAIT))
    assert time.monotonic() - began < 30
    failed, other = results[who], results[1 - who]
    assert failed.status == ending.EXIT_FAILED and "Traceback" in failed.text
    assert other.status == ending.EXIT, other.text
    for result in results:
        cause = result.text.rpartition("error: ")[2]
        assert cause.startswith(f"process {who} (host")
        assert "failed in update of step 7: FloatingPointError: the loss is nan" in cause


@pytest.mark.slow
def test_a_phase_over_its_deadline_ends_all():
    for result in pods.ended(run("late", 1, HOST_WAIT)):
        assert result.status == ending.EXIT
        assert "passed the deadline of 2 s in update of step 7" in result.text


ALONE = """
import time
from gtalign_jax.pod.start import PodConfig
from gtalign_jax.pod.watch import Watch

with Watch(PodConfig(save_s=0.5, heartbeat_s=1, silence_s={silence_s})) as watch:
    with watch.phase("save", 3):
        {stall}
"""


def alone(**values):
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(**values)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_one_process_alone_has_deadlines_too():
    status, text = alone(stall="time.sleep(60)", silence_s=60)
    assert status == ending.EXIT
    assert "passed the deadline of 0.5 s in save of step 3" in text
    assert 'File "<string>", line 8 in <module>' in text, "the stack of the main thread"


def test_native_code_that_keeps_the_interpreter_to_itself_has_a_deadline_too():
    # PyDLL calls hold the interpreter's lock: no Python thread runs for a minute.
    status, text = alone(stall="__import__('ctypes').PyDLL(None).sleep(60)", silence_s=2)
    assert status == 1 and "Timeout (0:00:02.500000)!" in text


def test_phases_have_their_own_deadlines_and_the_outer_one_comes_back():
    cfg = PodConfig(rollout_s=11, other_s=22)
    with Watch(cfg) as watch:
        assert str(watch._phase) == "start of the run" and watch._phase.limit_s == 22
        with watch.phase("rollout", 4):
            outer = watch._phase
            with watch.phase("prefill"):
                assert (str(watch._phase), watch._phase.limit_s) == ("prefill", 22)
            assert (str(watch._phase), watch._phase.limit_s) == ("rollout of step 4", 11)
            assert watch._phase.began >= outer.began
    assert not any(thread.is_alive() for thread in watch._threads)


def test_with_one_process_an_exception_goes_its_way():
    with pytest.raises(ZeroDivisionError), Watch(PodConfig()) as watch, watch.phase("update", 1):
        _ = 1 // 0
    assert not any(thread.is_alive() for thread in watch._threads)
