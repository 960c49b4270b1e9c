"""Scores of one part of a batch, while the next part is sampled.

    assessing = Assessing(...)
    roll(..., assessing.add)       each piece is read and scored in a thread, once it is sampled
    assessing.wait(told)           until all is scored, or the run is told to end
    assessing.result()             waits for what is left

With a judge that answers over a network a step takes about as long as the longer of sampling and
judging, not both. A judge that works on the run's own devices gains nothing by that and has to be
asked by all processes in turn: then (`overlap` False) nothing begins before `result`.
"""

import atexit
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from gtalign_jax.pod import share
from gtalign_jax.rollout.sampler import Rollout

POLL_S = 0.5  # how often one who waits asks whether to go on
EXIT_S = 5.0  # what threads that compute get to come to an end when the program does
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _let_finish() -> None:
    """A thread inside of JAX when Python is taken down would abort the process, and its status
    with it. One that waits for a judge is abandoned harmlessly."""
    end = time.monotonic() + EXIT_S
    for thread in list(_threads):
        thread.join(max(end - time.monotonic(), 0.0))


class Assessing:
    """Completions on their way to scores.

    Args:
      fetch: global rollout -> (own rows, their completions on the host).
      assess: (numbers of the prompts in the batch, completions on the host) -> Experience.
      overlap: score in threads, as soon as there is something to score.
    """

    def __init__(self, fetch: Callable[[Rollout], tuple[np.ndarray, Rollout]],
                 assess: Callable[[np.ndarray, Rollout], Any], overlap: bool):
        self._fetch, self._assess, self._overlap = fetch, assess, overlap
        self._parts: list[Future] = []
        self._later: list[tuple[np.ndarray, Rollout]] = []

    def add(self, rollout: Rollout, first: int = 0, stride: int = 1) -> None:
        """Takes the completions of the batch's prompts number `first`, `first + stride` …"""
        rows, own = self._fetch(rollout)
        self.begin(first + stride * rows, own)

    def begin(self, rows: np.ndarray, own: Rollout) -> None:
        """Takes completions on the host, of the batch's prompts number `rows`."""
        if not self._overlap:
            self._later.append((rows, own))
            return
        part: Future = Future()
        self._parts.append(part)

        def work() -> None:
            try:
                part.set_result(self._assess(rows, own))
            except BaseException as error:  # raised by `result`, in the thread that waits
                part.set_exception(error)

        # A daemon: an interrupted run must not wait for a judge that nobody listens to.
        thread = threading.Thread(target=work, name=f"assess-{len(self._parts)}", daemon=True)
        _threads.add(thread)
        thread.start()

    def wait(self, told: Callable[[], bool]) -> None:
        """Until what is being scored has its scores, or `told()`."""
        while futures.wait(self._parts, POLL_S).not_done and not told():
            pass

    def result(self) -> Any:
        """The Experience of all that was added, in the order of the batch. Raises what scoring
        raised."""
        if self._later:
            return self._assess(*_joined(self._later))
        parts = [part.result() for part in self._parts]
        if len(parts) == 1:
            return parts[0]
        whole = share.in_order([(part.rows_B, part) for part in parts])
        return dataclasses.replace(whole, slots=sum(part.slots for part in parts))


def _joined(parts: list[tuple[np.ndarray, Rollout]]) -> tuple[np.ndarray, Rollout]:
    """All pieces as one, in the order of the batch: a judge of batches wants full ones."""
    at = np.concatenate([rows for rows, _ in parts])
    order = np.argsort(at)
    whole = jax.tree.map(
        lambda *xs: np.concatenate(xs)[order] if np.ndim(xs[0]) else np.sum(xs),
        *[own for _, own in parts],
    )
    return at[order], whole
