"""Checkpoints: a pytree of arrays, a little JSON beside it, and whose they are.

A save is written in the background to a temporary directory and renamed once it is complete, so
that a process killed in the middle leaves the previous checkpoint as the latest one. Each
checkpoint carries the fingerprint of the run that wrote it (model, tokenizer, data, settings);
another run is refused with the list of what differs. Arrays come back bit for bit, onto whatever
sharding and device count the caller's abstract state asks for: checksums say so (integrity.py). A
checkpoint that is damaged is passed over with a warning, and set aside where a run goes on from the
one before.

This module does not know what the state means: any pytree of arrays will do, PRNG keys included.
On a pod every process makes the same calls, and writes and reads its part of the arrays in a
directory that all of them see.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gtalign_jax.pod import exchange
from gtalign_jax.training import integrity
from gtalign_jax.training.manager import RUN, STATE, Keep, open_manager, set_aside

_UNTOLD = ("identity.weights",)  # what older checkpoints do not tell of their runs

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, how many to keep, whether to trust another run's checkpoint."""

    every: int = 10  # optimizer steps between saves; the last step is always saved
    keep: int = 2  # newest checkpoints kept; older ones are deleted
    keep_best: int = 0  # of those evaluated during GRPO, how many of the best are kept besides
    best_metric: str = "reward/total"  # the mean of an evaluation that says so; higher is better
    force: bool = False  # restore although the fingerprint differs

    def __post_init__(self) -> None:
        for key, least in (("every", 1), ("keep", 1), ("keep_best", 0)):
            if getattr(self, key) < least:
                raise ValueError(
                    f"checkpoint.{key}={getattr(self, key)}: expected an integer >= {least}"
                )


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or one that this run must not continue."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return flat


class Checkpointer:
    """The checkpoints of one run, in one directory (local or gs://)."""

    def __init__(
        self,
        directory: str | Path,
        cfg: CheckpointConfig,
        fingerprint: Mapping[str, Any] | None,
        *,
        read_only: bool = False,
        scores: Callable[[], Mapping[int, float]] = dict,
    ) -> None:
        """`fingerprint` is JSON-like (nested dicts allowed): what makes this run this run.

        A training run opens its directory to write, and sweeps up what a killed save left there.
        `scores`, by step, of what is evaluated so far; asked in process 0, for `keep_best`.
        `read_only` (then `fingerprint` may be None: not compared) is for reading beside such a run.
        """
        text = str(directory)
        self.directory = text if "://" in text else os.path.abspath(text)
        self._read_only = read_only
        self._force = cfg.force or (read_only and fingerprint is None)
        self._fingerprint = flatten(json.loads(json.dumps(dict(fingerprint or {}))))
        self._keep = None if read_only else Keep(cfg.keep, cfg.keep_best)
        self._scores = scores
        self._manager = open_manager(self.directory, self._keep)
        self._arrays = ocp.PyTreeCheckpointHandler()  # to read with

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Start saving `state` (a pytree of arrays) as `step`; returns once it is copied to host.

        The arrays may be donated afterwards. A step that is already saved is left as it is.
        Raises CheckpointError where this save, or the one before it, could not be written.
        """
        if self._read_only:
            raise CheckpointError(f"saving step {step}: {self.directory} was opened to read only")
        self.wait()
        if step in self.steps():
            return
        if self._keep.best:  # before orbax asks what may go
            scores = self._scores() if exchange.is_first() else None
            self._keep.scores = exchange.broadcast(scores, "scores of checkpoints")
        state = jax.tree.map(_key_to_data, state)
        run = {"fingerprint": self._fingerprint, "extra": dict(extra or {}),
               "leaves": integrity.records(state)}
        args = ocp.args.Composite(**{
            STATE: ocp.args.PyTreeSave(state), RUN: ocp.args.JsonSave(integrity.seal(run)),
        })
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._unsaved(error, step) from error

    def look(self) -> None:
        """Raises CheckpointError where the save in flight has failed already; does not wait."""
        if self._manager.failed is not None:
            raise self._unsaved(self._manager.failed) from self._manager.failed

    def wait(self) -> None:
        """Block until the save in flight is complete. Raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._unsaved(error) from error

    def _unsaved(self, error: BaseException, step: int | None = None) -> CheckpointError:
        what = "saving" if step is None else f"saving step {step}"
        return CheckpointError(
            f"{what} to {self.directory} failed: {integrity.reason(error)}. What was saved before "
            "is whole: once there is space and the directory can be written, the same command goes "
            "on from there"
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """All complete steps, oldest first: those that process 0 sees. A collective.

        Whether one is damaged shows when it is read.
        """
        return exchange.broadcast(sorted(self._manager.all_steps()), "checkpoint steps")

    def check(self) -> int | None:
        """The newest step of which it can be read whose it is; None where there is none.

        Raises CheckpointError where it belongs to another run.
        """
        for step in reversed(self.steps()):
            found, damage = self._agreed(step, lambda step=step: self._run_of(step))
            if found is not None:
                return step
            log.warning("the checkpoint of step %d in %s is damaged (%s)", step, self.directory,
                        damage)
        return None

    def restore(
        self, abstract_state: Any, step: int | None = None, *, partial: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """The state saved at `step` (default: as `newest`) and its `extra`.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct` (or of arrays): its shardings say where
        each array goes. With `partial` it may lack subtrees of what was saved; those are not read.
        Raises FileNotFoundError without such a step, CheckpointError where the fingerprint differs,
        the saved tree has other arrays, or it is damaged.
        """
        have = self.steps()
        if not have or (step is not None and step not in have):
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}: {have or 'none'}"
            )
        if step is None:
            return self.newest(abstract_state, partial=partial)[1:]
        found, damage = self._read(step, abstract_state, partial)
        if found is None:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} is damaged: {damage}. "
                f"Steps that are there: {have}"
            )
        return found

    def newest(
        self, abstract_state: Any, *, partial: bool = False
    ) -> tuple[int, Any, dict[str, Any]]:
        """(step, state, extra) of the newest checkpoint that is whole; as `restore`.

        Those after it are damaged: a run sets them aside, as N.corrupt, and saves them anew.
        Raises CheckpointError where none is whole: they all stay then.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            found, damage = self._read(step, abstract_state, partial)
            if found is not None:
                self._set_aside(damaged)
                return step, *found
            log.warning("the checkpoint of step %d in %s is damaged (%s): trying the one before",
                        step, self.directory, damage)
            damaged[step] = damage
        rows = "".join(f"\n  step {step}: {damage}" for step, damage in damaged.items())
        # A run beside may have deleted what a reader was about to read.
        advice = "Give the command again" if self._read_only else (
            "Bring one back from a copy, or delete the directory to begin this stage anew")
        raise CheckpointError(
            f"no checkpoint in {self.directory} is whole:{rows or ' there is none'}\nNothing was "
            f"changed. {advice}."
        )

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again."""
        if self._read_only or not damaged:
            return
        problem = None
        if exchange.is_first():
            try:
                for step in damaged:
                    log.warning("the checkpoint of step %d is now %s: delete it when nobody wants "
                                "to look at it", step, set_aside(self._manager.directory, step))
            except OSError as error:
                problem = integrity.reason(error)
        problem = exchange.broadcast(problem, "damaged checkpoints set aside")
        if problem is not None:
            raise CheckpointError(
                f"damaged checkpoints {sorted(damaged)} in {self.directory} could not be renamed: "
                f"{problem}. Move them away, and give the same command again"
            )
        self._manager.reload()

    def _read(self, step: int, abstract_state: Any, partial: bool
              ) -> tuple[tuple[Any, dict[str, Any]] | None, str | None]:
        """((state, extra), None), or (None, what is damaged): the same in every process."""
        wanted = jax.tree.map(_on_disk, abstract_state)

        def read() -> tuple[Any, dict[str, Any]]:
            run, item = self._run_of(step), self._path(step, STATE)
            saved = run.get("leaves")
            if saved is None:  # of before there were checksums
                saved = integrity.named_leaves(self._arrays.metadata(item).tree)
                saved = {name: vars(leaf) for name, leaf in saved.items()}
            self._check_arrays(step, saved, integrity.named_leaves(wanted), partial)
            # Not by the manager, whose barriers would hold the others where one process fails.
            return self._arrays.restore(item, args=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=partial,
            )), run

        found, damage = self._agreed(step, read)
        if found is None:
            return None, damage
        state, run = found
        if "leaves" in run:
            differing = [name for name, record in integrity.records(state).items()
                         if record != run["leaves"][name]]
            if differing:
                return None, f"other values than were saved in {', '.join(differing[:6])}"
        return (jax.tree.map(_data_to_key, abstract_state, state), run["extra"]), None

    def _agreed(self, step: int, read: Callable[[], Any]) -> tuple[Any, str | None]:
        """(what `read` returns, None), or (None, the damage that a process met).

        Raises CheckpointError where a process was refused, or could not ask. A collective.
        """
        found, verdict = None, ("whole", "")
        try:
            found = read()
        except CheckpointError as error:
            verdict = "refused", str(error)
        except Exception as error:  # orbax and TensorStore have no types for what went wrong
            verdict = "damaged" if integrity.is_damage(error) else "failed", integrity.reason(error)
        verdicts = exchange.all_gather(verdict, "checkpoint read")
        for kind, text in verdicts:
            if kind == "refused":
                raise CheckpointError(text)
            if kind == "failed":
                raise CheckpointError(
                    f"the checkpoint of step {step} in {self.directory} cannot be read now: "
                    f"{text}. Nothing was changed; the same command tries it again"
                )
        damage = next((text for kind, text in verdicts if kind == "damaged"), None)
        return (None, damage) if damage else (found, None)

    def close(self) -> None:
        """Finish the save in flight and let go of the directory. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._arrays.close()

    def _path(self, step: int, item: str) -> Any:
        """Of a kind of path that knows gs://, too."""
        return self._manager.directory / str(step) / item

    def _run_of(self, step: int) -> dict[str, Any]:
        """What lies beside the arrays: whose they are (checked here), `extra` and checksums."""
        file = self._path(step, RUN) / "metadata"
        try:
            run = integrity.unseal(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        self._check_fingerprint(step, run["fingerprint"])
        return run

    def _check_fingerprint(self, step: int, saved: Mapping[str, Any]) -> None:
        absent = "(absent)"
        differing = [
            (key, saved.get(key, absent), self._fingerprint.get(key, absent))
            for key in sorted(saved.keys() | self._fingerprint.keys())
            if saved.get(key, absent) != self._fingerprint.get(key, absent)
            and not (key in _UNTOLD and key not in saved)
        ]
        if differing and not self._force:
            rows = "\n".join(f"  {key}: saved {old!r}, now {new!r}" for key, old, new in differing)
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} belongs to another run:\n"
                f"{rows}\nUse another work directory, or set checkpoint.force=True to continue "
                "from it all the same."
            )

    def _check_arrays(self, step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any],
                      partial: bool) -> None:
        """Orbax would pad or cut an array to the shape asked for, and cast it; here that is an
        error."""
        old = {name: f"{tuple(leaf['shape'])} {leaf['dtype']}" for name, leaf in saved.items()}
        new = {name: f"{tuple(leaf.shape)} {leaf.dtype}" for name, leaf in wanted.items()}
        lines = [
            f"  {name}: saved {old.get(name, 'nothing')}, now {new.get(name, 'nothing')}"
            for name in sorted(new if partial else old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        if lines:
            rows = "\n".join(lines[:20] + ["  ..."] * (len(lines) > 20))
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} holds other arrays:\n{rows}"
            )


def _is_key(x: Any) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_to_data(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if _is_key(x) else x


def _data_to_key(abstract: Any, x: jax.Array) -> jax.Array:
    if not _is_key(abstract):
        return x
    impl = []  # jax tells a key's algorithm of a traced key, not of an abstract one
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), abstract)
    return jax.random.wrap_key_data(x, impl=impl[0])


def _on_disk(x: Any) -> jax.ShapeDtypeStruct:
    """What is stored for the array `x`: a typed PRNG key is stored as its integers."""
    sharding = x.sharding
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
