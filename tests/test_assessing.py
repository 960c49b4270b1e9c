"""Scoring of one piece of a batch while the next is sampled."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from gtalign_jax.training.assessing import Assessing

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Scored:
    rows_B: np.ndarray
    names_B: tuple[str, ...]
    slots: int


def assess(at_Q, own):
    return Scored(at_Q, tuple(f"{q}" for q in at_Q), int(own.sum()))


def fetch(rollout):
    return np.arange(len(rollout)), rollout


def test_pieces_come_back_in_the_order_of_the_batch_with_their_slots_added_up():
    assessing = Assessing(fetch, assess, overlap=True)
    for i in range(3):  # prompts i, i + 3, i + 6 …
        assessing.add(np.full(4, i + 1), i, 3)
    whole = assessing.result()
    assert whole.rows_B.tolist() == list(range(12))
    assert whole.names_B == tuple(map(str, range(12)))
    assert whole.slots == 4 * (1 + 2 + 3)


def test_a_piece_is_scored_before_the_next_one_is_there():
    judged = threading.Event()

    def noted(at_Q, own):
        judged.set()
        return assess(at_Q, own)

    assessing = Assessing(fetch, noted, overlap=True)
    assessing.add(np.ones(2), 0, 2)
    assert judged.wait(20)  # nobody has asked for the result, nor sampled the second piece
    assessing.add(np.ones(2), 1, 2)
    assert assessing.result().rows_B.tolist() == [0, 1, 2, 3]


def test_without_overlap_nothing_is_scored_before_the_result_nor_in_another_thread():
    threads = []

    def noted(at_Q, own):
        threads.append(threading.current_thread())
        return assess(at_Q, own)

    assessing = Assessing(fetch, noted, overlap=False)
    assessing.add(np.ones(2))
    assert not threads
    assert assessing.result().rows_B.tolist() == [0, 1]
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize("overlap", [True, False])
def test_what_scoring_raises_is_raised_where_the_result_is_wanted(overlap):
    def broken(at_Q, own):
        raise KeyError("planted")

    assessing = Assessing(fetch, broken, overlap)
    assessing.add(np.ones(2))
    with pytest.raises(KeyError, match="planted"):
        assessing.result()


@pytest.mark.slow
def test_a_program_that_ends_while_something_is_scored_ends_with_its_own_status():
    """A thread inside of JAX when Python is taken down would abort the process."""
    script = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
from gtalign_jax.training.assessing import Assessing
step = jax.jit(lambda x: (x @ x).sum())
began = time.monotonic()
def assess(at, own):
    while time.monotonic() < began + 3:
        step(jnp.ones((64, 64))).block_until_ready()
assessing = Assessing(lambda rollout: (np.arange(2), rollout), assess, overlap=True)
assessing.add(np.ones(2))
time.sleep(1)
sys.exit(75)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 75, ended.stderr


def test_pieces_that_were_left_for_later_are_scored_as_one_batch():
    calls = []

    def noted(at_Q, own):
        calls.append((at_Q.tolist(), own["x"].tolist(), int(own["slots"])))
        return assess(at_Q, own["x"])

    assessing = Assessing(lambda r: (np.arange(2), r), noted, overlap=False)
    for i in range(2):
        assessing.add({"x": np.array([i, i + 2]), "slots": np.array(5)}, i, 2)
    assessing.result()
    assert calls == [([0, 1, 2, 3], [0, 1, 2, 3], 10)]
