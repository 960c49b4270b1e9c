"""Orbax's manager of a directory of checkpoints, and what we ask of it besides.

It orders checkpoints by their step, never by a clock. Which of them stay is decided when a new one
is saved: the newest, and the best of those that have been evaluated by then.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp

STATE, RUN = "state", "run"  # the two items of a checkpoint directory


@dataclasses.dataclass
class Keep:
    """Which checkpoints stay.

    Attributes:
      newest: how many of the newest. best: how many of the best besides.
      scores: score by step, of those that are evaluated; the caller brings it up to date, to the
        same in every process.
    """

    newest: int
    best: int = 0
    scores: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """What orbax asks; `checkpoints` have a `step` each."""
        del context
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        scored = sorted((self.scores[step], step) for step in steps if step in self.scores)
        kept = {*steps[-self.newest :], *(step for _, step in scored[::-1][: self.best])}
        return [checkpoint.step in kept for checkpoint in checkpoints]


class Manager(ocp.CheckpointManager):
    """Orbax's, which tells of a failed save only to those who wait for it.

    Attributes:
      failed: what the save in flight has failed with.
    """

    failed: BaseException | None = None

    def _wait_for_checkpointers(self) -> None:  # in the thread that finishes a save
        try:
            super()._wait_for_checkpointers()
        except BaseException as error:
            self.failed = error
            raise


def open_manager(directory: str, keep: Keep | None) -> Manager:
    """To write, and to sweep up what a killed save left there; without `keep` to read only."""
    read_only = keep is None
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep, read_only=read_only, cleanup_tmp_directories=not read_only,
        create=not read_only,
    )
    handlers = {STATE: ocp.PyTreeCheckpointHandler(), RUN: ocp.JsonCheckpointHandler()}
    return Manager(directory, options=options, item_handlers=handlers)


def set_aside(directory: Any, step: int) -> Any:
    """Gives a checkpoint in a manager's directory a name that is no step's and nobody's yet, and
    returns its new path."""
    old, number = directory / str(step), 1
    new = old.with_name(f"{step}.corrupt")
    while new.exists():
        number += 1
        new = old.with_name(f"{step}.corrupt-{number}")
    return old.rename(new)
