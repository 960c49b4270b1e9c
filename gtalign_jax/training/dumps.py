"""Batches of updates that were skipped, in files that one can look into.

    WORKDIR/nonfinite/<stage>-<step>/   arrays.npz   what the update was made of, by name
                                        rows.jsonl   prompt, completion, reward … of each row
                                        facts.json   what was not finite, and how to read the arrays

On a pod each process writes the rows that it owns, process 1 to arrays.1.npz and so on; nothing is
exchanged, so nobody waits.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from gtalign_jax.pod import exchange, share
from gtalign_jax.training.collect import Experience, log_rows
from gtalign_jax.training.grpo import Batch
from gtalign_jax.training.guard import nonfinite
from gtalign_jax.training.metrics import NONFINITE, jsonable
from gtalign_jax.training.sft import SFTBatch

log = logging.getLogger(__name__)

LIMIT = 5  # batches of a run: after those, more tell nothing new
LOAD = "numpy.load('arrays.npz')['NAME']; letters: Q prompts, G samples, B rows, S and T positions"


@dataclasses.dataclass(frozen=True)
class Dumps:
    """Writes them to `directory`. `decode`: token ids -> text."""

    directory: Path
    decode: Callable[[Sequence[int]], str]

    def examples(self, step: int, metrics: Mapping[str, float], batch: SFTBatch) -> None:
        """A batch of the cold start, if its update was skipped: numpy arrays, whole everywhere."""
        if not metrics["sft/skipped"] or not exchange.is_first():
            return
        texts = [
            [self.decode(ids[:n]) for ids, n in zip(ids_BX, lengths_B, strict=True)]
            for ids_BX, lengths_B in ((batch.prompt_BS, batch.prompt_lengths_B),
                                      (batch.tokens_BT, batch.lengths_B))
        ]
        rows = [{"prompt": p, "completion": c} for p, c in zip(*texts, strict=True)]
        self._write("sft", step, metrics, _arrays(batch), rows)

    def rollouts(self, step: int, metrics: Mapping[str, float], batch: Batch,
                 experience: Experience, sharding: NamedSharding) -> None:
        """The own rows of a GRPO step of which an update was skipped; `sharding`: of the batch."""
        if not metrics["grpo/skipped"]:
            return
        _, arrays = share.fetch(_arrays(batch), sharding)
        scores = {"reward_B": experience.scores.reward_B, "scored_B": experience.scores.valid_B}
        self._write("grpo", step, metrics, arrays | scores, log_rows(experience))

    def _write(self, stage: str, step: int, metrics: Mapping[str, float],
               arrays: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, Any]]) -> None:
        """Fails with no more than a warning: a full disk must not end a run that goes on."""
        process = exchange.process_index()
        suffix = f".{process}" if process else ""
        out = self.directory / f"{stage}-{step}"
        others = [path for path in self.directory.glob("*") if path != out]
        if len(others) >= LIMIT:
            return
        facts = {
            "stage": stage, "step": step, "process": process, "not finite": nonfinite(metrics),
            "metrics": {name: value for name, value in metrics.items()
                        if name.startswith((NONFINITE, f"{stage}/", "rollout/"))},
            "arrays": {name: [str(x.dtype), *x.shape] for name, x in arrays.items()},
            "to load": LOAD,
        }
        lines = [json.dumps(jsonable(row), ensure_ascii=False) + "\n" for row in rows]
        try:
            out.mkdir(parents=True, exist_ok=True)
            np.savez(out / f"arrays{suffix}.npz", **arrays)
            (out / f"rows{suffix}.jsonl").write_text(
                "".join(lines), "utf-8", "backslashreplace", "\n")
            (out / f"facts{suffix}.json").write_text(
                json.dumps(jsonable(facts), indent=2) + "\n", "utf-8")
        except OSError as error:
            log.warning("the batch of step %d of %s could not be dumped: %s", step, stage, error)
            return
        last = ", the last one that is dumped" if len(others) == LIMIT - 1 else ""
        log.warning("the batch of the skipped update lies in %s%s", out, last)


def _arrays(batch: Batch | SFTBatch) -> dict[str, Any]:
    """Its arrays by name; those that it has not got are left out."""
    return {name: x for name, x in vars(batch).items() if hasattr(x, "shape")}
