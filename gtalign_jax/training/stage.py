"""The loop of every training stage: resume or start, then step, write, save, until the last step.

Data and randomness are functions of (key, step), so a stage that was killed repeats from its last
checkpoint exactly.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gtalign_jax.pod.notice import Notice, Preempted
from gtalign_jax.pod.watch import Watch
from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer
from gtalign_jax.training.compiles import compilations
from gtalign_jax.training.metrics import Console, MetricsWriter
from gtalign_jax.training.state import TrainState

StepFn = Callable[[TrainState, int], tuple[TrainState, dict[str, float]]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run: how long it is, and where its progress goes."""

    name: str
    steps: int
    seed: int
    checkpoints: Checkpointer
    checkpoint: CheckpointConfig
    metrics: MetricsWriter
    console: Console
    watch: Watch
    notice: Notice
    push: Callable[[], None] = lambda: None  # what is to be done with the files before each save
    log_every: int = 1  # steps between lines on the console; the files get every step
    evaluated_every: int = 0  # steps between evaluations whose states must be saved, too
    trace: tuple[int, str] = (0, "")  # the step of which a profile is written, and where

    def resume(self, fresh: Callable[[], TrainState], abstract: TrainState, pending: Any = None
               ) -> tuple[TrainState, jax.Array, int, Any]:
        """(state, root key, steps already done, what was pending then).

        `fresh` is called only without a checkpoint. `pending`: abstract, what `run` saves besides.
        """
        # On every device: on one of several it could not meet the weights in a jitted function.
        everywhere = abstract.updates.sharding
        key = jax.jit(lambda: jax.random.key(self.seed), out_shardings=everywhere)()
        if self.checkpoints.latest() is None:
            self.metrics.truncate(self.name, 0)
            return fresh(), key, 0, None
        wanted = {
            "state": abstract,
            "key": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
        } | ({} if pending is None else {"pending": pending})
        done, saved, _ = self.checkpoints.newest(wanted)
        self.metrics.truncate(self.name, done)
        self.console.say(f"{self.name}: continuing after step {done}")
        return saved["state"], saved["key"], done, saved.get("pending")

    def run(self, state: TrainState, key: jax.Array, done: int, step_fn: StepFn,
            after: Callable[[int, TrainState], None] | None = None,
            pending: Callable[[], dict[str, Any]] = dict) -> TrainState:
        """Steps `done` … `steps`; saves every `checkpoint.every` steps and after the last one.

        `pending`: what is saved besides state and key, {} or {"pending": tree}.
        Raises FloatingPointError where a loss or gradient is not finite: such a state is not saved;
        Preempted where a process was told to end: that step is.
        """
        with self.notice, self.console.stage(self.name, self.steps, done):
            for step in range(done, self.steps):
                with self._traced(step + 1):
                    state, metrics = step_fn(state, step)
                metrics["perf/compilations"] = compilations()
                self.metrics.write(self.name, step + 1, metrics)
                if (step + 1) % self.log_every == 0 or step + 1 == self.steps:
                    self.console.step(step + 1, metrics)
                _check_finite(self.name, step + 1, metrics)
                self.checkpoints.look()
                told = self.notice.given()
                due = (step + 1) % self.checkpoint.every == 0 or step + 1 == self.steps or (
                    self.evaluated_every and (step + 1) % self.evaluated_every == 0)
                if told or due:
                    with self.watch.phase("save", step + 1):
                        self.push()
                        saved = {"state": state, "key": key, **pending()}
                        self.checkpoints.save(step + 1, saved)
                if told:
                    with self.watch.phase("save", step + 1):
                        self.checkpoints.wait()
                    raise Preempted(f"told to end: {self.name} is saved up to step {step + 1}")
                if after is not None:
                    after(step + 1, state)
        with self.watch.phase("save", self.steps):
            self.checkpoints.wait()
        return state

    def _traced(self, step: int) -> contextlib.AbstractContextManager:
        """Profiles the step, if it is the one."""
        wanted, directory = self.trace
        return jax.profiler.trace(directory) if step == wanted else contextlib.nullcontext()


def _check_finite(stage: str, step: int, metrics: dict[str, float]) -> None:
    for name in (f"{stage}/loss", f"{stage}/grad_norm"):
        if not np.isfinite(metrics[name]):
            raise FloatingPointError(
                f"{name} is {metrics[name]} at step {step} of {stage}; the last checkpoint is from "
                "before it. A lower learning_rate or clip_norm usually mends this."
            )
