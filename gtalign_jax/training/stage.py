"""The loop of every training stage: resume or start, then step, write, save, until the last step.

Data and randomness are functions of (key, step), so a stage that was killed repeats from its last
checkpoint exactly. So does one that is told to end (pod/notice.py): the step at hand is dropped,
unless its update has begun, and the state before it is saved.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gtalign_jax.pod.notice import Preempted
from gtalign_jax.pod.watch import Watch
from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer
from gtalign_jax.training.compiles import compilations
from gtalign_jax.training.dumps import Dumps
from gtalign_jax.training.guard import Guard, GuardConfig, check_state
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
    guard: GuardConfig
    dumps: Dumps
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
        with self.watch.phase("restore"):
            done, saved, _ = self.checkpoints.newest(wanted)
        self._say_saved(done)
        self.metrics.truncate(self.name, done)
        self.console.say(f"{self.name}: continuing after step {done}")
        return saved["state"], saved["key"], done, saved.get("pending")

    def run(self, state: TrainState, key: jax.Array, done: int, step_fn: StepFn,
            after: Callable[[int, TrainState], None] | None = None,
            pending: Callable[[int], dict[str, Any]] = lambda done: {}) -> TrainState:
        """Steps `done` … `steps`; saves every `checkpoint.every` steps and after the last one.

        `pending(done)`: what is saved after so many steps besides state and key, {} or
        {"pending": tree}. Raises FloatingPointError where too many updates in a row were skipped,
        or the state is not finite: it is not saved; Preempted where a process was told to end: all
        that was learnt is.
        """
        began = done
        guard = Guard.resumed(self.name, self.guard, str(self.dumps.directory), self.metrics)

        def save() -> None:
            with self.watch.phase("save", done):
                check_state(self.name, done, state)
                self.push()
                self.checkpoints.save(done, {"state": state, "key": key, **pending(done)})

        with self.watch.phase(self.name), self.console.stage(self.name, self.steps, done):
            try:
                while done < self.steps:
                    with self._traced(done + 1):
                        new, metrics = step_fn(state, done)
                    self.watch.notice.hold()  # before that, nothing is here that is not saved
                    state, done = new, done + 1
                    self._write(done, metrics | {"perf/compilations": compilations()}, guard)
                    self.checkpoints.look()
                    self.watch.notice.check()
                    if self._due(done):
                        save()
                    if after is not None:
                        after(done, state)
                self._wait(done)
                self.watch.notice.check()
            except Preempted as told:
                if done > began:  # it is held then: all processes are here
                    save()
                    self._wait(done)
                    told.saved = self.watch.notice.saved
                raise
        self.watch.notice.release()
        return state

    def _due(self, done: int) -> bool:
        return done % self.checkpoint.every == 0 or done == self.steps or (
            self.evaluated_every > 0 and done % self.evaluated_every == 0)

    def _wait(self, done: int) -> None:
        with self.watch.phase("save", done):
            self.checkpoints.wait()
        self._say_saved(done)

    def _say_saved(self, done: int) -> None:
        self.watch.notice.saved = f"{self.name} is saved up to step {done}"

    def _write(self, step: int, metrics: dict[str, float], guard: Guard) -> None:
        metrics = metrics | guard.watch(step, metrics)
        self.metrics.write(self.name, step, metrics)
        if step % self.log_every == 0 or step == self.steps:
            self.console.step(step, metrics)
        _check_finite(self.name, step, guard)

    def _traced(self, step: int) -> contextlib.AbstractContextManager:
        """Profiles the step, if it is the one."""
        wanted, directory = self.trace
        return jax.profiler.trace(directory) if step == wanted else contextlib.nullcontext()


def _check_finite(stage: str, step: int, guard: Guard) -> None:
    if guard.lost:
        raise FloatingPointError(f"step {step} of {stage}: {guard.lost}")
