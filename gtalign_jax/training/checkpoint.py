"""Checkpoints: a pytree of arrays, a little JSON beside it, and whose they are.

A save is written in the background to a temporary directory and renamed once it is complete, so
that a process killed in the middle leaves the previous checkpoint as the latest one. Each
checkpoint carries the fingerprint of the run that wrote it (model, tokenizer, data, settings);
another run is refused with the list of what differs. Arrays come back bit for bit, onto whatever
sharding and device count the caller's abstract state asks for.

This module does not know what the state means: any pytree of arrays will do, PRNG keys included.
On a pod every process makes the same calls, and writes and reads its part of the arrays in a
directory that all of them see.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gtalign_jax.pod import exchange

_STATE, _RUN = "state", "run"  # the two items of a checkpoint directory


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, how many to keep, whether to trust another run's checkpoint."""

    every: int = 10  # optimizer steps between saves; the last step is always saved
    keep: int = 2  # newest checkpoints kept; older ones are deleted
    force: bool = False  # restore although the fingerprint differs

    def __post_init__(self) -> None:
        for key, value in (("every", self.every), ("keep", self.keep)):
            if value < 1:
                raise ValueError(f"checkpoint.{key}={value}: expected an integer >= 1")


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
    ) -> None:
        """`fingerprint` is JSON-like (nested dicts allowed): what makes this run this run.

        A training run opens its directory to write, and sweeps up what a killed save left there.
        `read_only` (then `fingerprint` may be None: not compared) is for reading beside such a run.
        """
        text = str(directory)
        self.directory = text if "://" in text else os.path.abspath(text)
        self._read_only = read_only
        self._force = cfg.force or (read_only and fingerprint is None)
        self._fingerprint = flatten(json.loads(json.dumps(dict(fingerprint or {}))))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else cfg.keep,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        handlers = {
            _STATE: ocp.PyTreeCheckpointHandler(),
            _RUN: ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

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
        run = {"fingerprint": self._fingerprint, "extra": dict(extra or {})}
        args = ocp.args.Composite(
            **{
                _STATE: ocp.args.PyTreeSave(jax.tree.map(_key_to_data, state)),
                _RUN: ocp.args.JsonSave(run),
            }
        )
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise CheckpointError(f"saving step {step} to {self.directory}: {error}") from error

    def wait(self) -> None:
        """Block until the save in flight is complete. Raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise CheckpointError(f"saving to {self.directory} failed: {error}") from error

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """All complete steps, oldest first: those that process 0 sees. A collective."""
        return exchange.broadcast(sorted(self._manager.all_steps()), "checkpoint steps")

    def check(self) -> None:
        """Raises CheckpointError where the newest checkpoint belongs to another run."""
        if (step := self.latest()) is not None:
            self._run_of(step)

    def restore(
        self, abstract_state: Any, step: int | None = None, *, partial: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """The state saved at `step` (default: the newest) and its `extra`.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct` (or of arrays): its shardings say where
        each array goes. With `partial` it may lack subtrees of what was saved; those are not read.
        Raises FileNotFoundError without such a step, CheckpointError where the fingerprint differs
        or the saved tree has other shapes.
        """
        have = self.steps()
        step = max(have, default=None) if step is None else step
        if step not in have:
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}: {have or 'none'}"
            )
        run = self._run_of(step)
        wanted = jax.tree.map(_on_disk, abstract_state)
        self._check_shapes(step, wanted, partial)
        args = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=partial,
        )
        state = self._manager.restore(step, args=ocp.args.Composite(**{_STATE: args}))[_STATE]
        return jax.tree.map(_data_to_key, abstract_state, state), run["extra"]

    def close(self) -> None:
        """Finish the save in flight and let go of the directory. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _run_of(self, step: int) -> dict[str, Any]:
        """What lies beside the arrays: whose they are (checked here) and `extra`."""
        run = self._manager.restore(step, args=ocp.args.Composite(**{_RUN: ocp.args.JsonRestore()}))
        self._check_fingerprint(step, run[_RUN]["fingerprint"])
        return run[_RUN]

    def _check_fingerprint(self, step: int, saved: Mapping[str, Any]) -> None:
        absent = "(absent)"
        differing = [
            (key, saved.get(key, absent), self._fingerprint.get(key, absent))
            for key in sorted(saved.keys() | self._fingerprint.keys())
            if saved.get(key, absent) != self._fingerprint.get(key, absent)
        ]
        if differing and not self._force:
            rows = "\n".join(f"  {key}: saved {old!r}, now {new!r}" for key, old, new in differing)
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} belongs to another run:\n"
                f"{rows}\nUse another work directory, or set checkpoint.force=True to continue "
                "from it all the same."
            )

    def _check_shapes(self, step: int, wanted: Any, partial: bool) -> None:
        """Orbax would pad or cut an array to the shape asked for; here that is an error."""
        saved = _shapes(self._manager.item_metadata(step)[_STATE].tree)
        asked = _shapes(wanted)
        lines = [
            f"  {name}: saved {saved.get(name, 'nothing')}, now {asked.get(name, 'nothing')}"
            for name in sorted(asked if partial else saved.keys() | asked.keys())
            if saved.get(name) != asked.get(name)
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


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape by dotted name, the same for a saved tree (dicts) and a live one (dataclasses)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in leaves
    }
