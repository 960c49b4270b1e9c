"""A policy on held-out prompts: the training reward's own code, greedy or sampled.

Batches have a size of their own and one width; the last one is filled up with repeats, which are
left out of every mean. Which prompts are used depends on nothing but the config, so that the
numbers before and after training are about the same prompts.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gtalign_jax.data.batches import PromptSet
from gtalign_jax.pod import exchange
from gtalign_jax.training.collect import Collector, log_rows, summarise
from gtalign_jax.training.files import write_whole
from gtalign_jax.training.metrics import read_rows

log = logging.getLogger(__name__)

EVALUATIONS_FILE = "evaluations.jsonl"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """How held-out prompts are answered."""

    prompts: int = 0  # how many held-out prompts, evenly spread; 0: all
    batch_size: int = 64  # prompts per call of the sampler
    temperature: float = 0.0  # 0: greedy
    samples: int = 1  # completions per prompt
    every_steps: int = 0  # also during GRPO, every so many steps; 0: only before and after

    def __post_init__(self) -> None:
        for key in ("batch_size", "samples"):
            if getattr(self, key) < 1:
                raise ValueError(f"evaluate.{key}={getattr(self, key)}: must be >= 1")
        for key in ("prompts", "temperature", "every_steps"):
            if getattr(self, key) < 0:
                raise ValueError(f"evaluate.{key}={getattr(self, key)}: must be >= 0")


def evaluate(params: Any, collect: Collector, prompts: PromptSet, cfg: EvaluateConfig,
             key: jax.Array, told: Callable[[int, int], None] = lambda done, count: None,
             ) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(means over the held-out prompts, one row per completion); the rows in process 0 alone.

    Args:
      params: laid out for rollout, in the dtype to compute in.
      key: keys the sampling (unused at temperature 0).
      told: called after each batch with how many prompts are answered, and how many there are.
    """
    count = min(cfg.prompts or len(prompts), len(prompts))
    if cfg.samples > 1 and not cfg.temperature:
        log.warning("evaluate.samples=%d at evaluate.temperature=0: the completions of a prompt "
                    "are all the same; set a temperature, such as 1.0", cfg.samples)
    # Evenly spread: held-out files follow each other, and each of them must be heard.
    wanted = [i * len(prompts) // count for i in range(count)]
    places, parts = [], []
    for start in range(0, count, cfg.batch_size):
        chosen = wanted[start : start + cfg.batch_size]
        real = len(chosen)
        chosen = chosen + chosen[:1] * (cfg.batch_size - real)
        at_Q, own = collect.fetch(collect.roll(params, prompts.take(chosen), key))
        is_real = at_Q < real
        places.append(start + at_Q[is_real])
        parts.append(jax.tree.map(lambda x, i=is_real: x[i] if x.ndim else x[None], own))
        told(start + real, count)
    rollout = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    rollout = rollout.replace(slots=rollout.slots.sum())
    assessing = collect.assessing(prompts.take(wanted))
    assessing.begin(np.concatenate(places), rollout)
    whole = collect.finished(assessing).at_first()
    means = None if whole is None else summarise(whole)
    return exchange.broadcast(means, "evaluation"), [] if whole is None else log_rows(whole)


class Progress:
    """Says now and then how far an evaluation is and how long it will take; for `told`."""

    def __init__(self, say: Callable[[str], None], label: str, every_s: float = 20.0) -> None:
        self._say, self._label, self._every_s = say, label, every_s
        self._said = time.perf_counter()
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int, count: int) -> None:
        now = time.perf_counter()
        if self._first is None:  # it compiled: no measure of those that follow
            self._first = now, done
        elif now - self._said >= self._every_s:
            self._said, (began, before) = now, self._first
            minutes, seconds = divmod(round((now - began) / (done - before) * (count - done)), 60)
            left = f"{minutes}:{seconds:02} left" if done < count else "now they are scored"
            self._say(f"{self._label}: {done:,} of {count:,} held-out prompts, {left}")


def save_rows(path: Path, label: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to evaluations.jsonl, in place of what `label` has there, all at once."""
    old = read_rows(path, label=str) if path.exists() else []
    kept = [row for row in old if row["label"] != label]
    rows = (*kept, *({"label": label, **row} for row in rows))
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
