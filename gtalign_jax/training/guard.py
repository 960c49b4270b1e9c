"""Numbers that go wrong: updates that were skipped, figures that jump, a state not fit to be saved.

    rows of metrics.jsonl -> Guard -> {"alarm/<name>": 0 or 1}, warnings; FloatingPointError

An alarm is raised by a figure above its threshold, or above `guard.spike` times the median of the
steps before. It changes nothing about the training: a person is told where to look, once for each
episode. What was skipped, the update itself has decided (`training.state`).
"""

import collections
import dataclasses
import logging
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gtalign_jax.pod import exchange
from gtalign_jax.training.metrics import NONFINITE, MetricsWriter
from gtalign_jax.training.state import TrainState

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
WINDOW = 20  # steps whose median a figure is compared with; before there are so many, with none
QUIET = 10  # steps without an alarm that end its episode: the next one is a new one


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What is too much. Of a threshold 0 means: no such alarm."""

    max_skips: int = 3  # steps in a row with a skipped update that end the run
    kl: float = 1.0  # grpo/kl, nats per token
    logp_gap: float = 0.2  # rollout/logp_gap, nats: the mean over tokens; bfloat16 makes some 0.02
    logp_gap_max: float = 10.0  # rollout/logp_gap_max, nats: the worst token of a step
    grad_norm: float = 0.0  # <stage>/grad_norm, before clipping; off: it depends on the model
    spike: float = 10.0  # any of them, as a multiple of its median over the last 20 steps

    def __post_init__(self) -> None:
        if self.max_skips < 1:
            raise ValueError(f"guard.max_skips={self.max_skips}: must be >= 1")
        for key in (*(alarm.name for alarm in ALARMS), "spike"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"guard.{key}={getattr(self, key)}: must be >= 0 (0 turns it off)")


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A figure to watch. `name` is its key in GuardConfig; `least`: below it nothing is a spike,
    since small figures may well grow tenfold; `meaning`: what it usually is."""

    name: str
    metric: str
    least: float
    meaning: str


ALARMS = (
    Alarm("kl", "grpo/kl", 0.1,
          "The policy runs away from its reference, usually after updates that were too large: see "
          "grpo/grad_norm of the steps before; a lower grpo.learning_rate or a larger grpo.beta "
          "holds it."),
    Alarm("logp_gap", "rollout/logp_gap", 0.05,
          "Sampler and trainer disagree about the same tokens: weights that were not passed on, a "
          "precision that does not suffice (model.compute_dtype), or a policy that has moved far "
          "within one step (grpo.ahead, grpo.epochs); grpo.truncated_is bounds the harm."),
    Alarm("logp_gap_max", "rollout/logp_gap_max", 2.0,
          "Of some token sampler and trainer disagree: one such token is rounding at an unlikely "
          "place, one at every step a fault in sampling; grpo.truncated_is bounds the harm."),
    Alarm("grad_norm", "{stage}/grad_norm", 1.0,
          "One batch pulls much harder than those before: clip_norm bounds what it does. Where it "
          "happens again and again a lower learning_rate is due; `reward` and `completion` in "
          "rollouts.jsonl show what was special about the step."),
)

WORDS = {
    "loss": "loss", "gradient": "gradient", "reward": "reward", "logp": "logp of the policy",
    "old_logp": "logp of the old policy", "ref_logp": "logp of the reference",
    "sampler_logp": "logp of the sampler",
}


def nonfinite(row: Row) -> list[str]:
    """What was not finite in a step, in words, causes first."""
    return [words for name, words in reversed(WORDS.items()) if row.get(f"{NONFINITE}{name}")]


class Guard:
    """Watches the rows of a stage's metrics: how many steps in a row skipped, and the alarms.

    Its state follows from the rows that it was given: a run that resumes goes on as if it had never
    stopped.
    """

    def __init__(self, stage: str, cfg: GuardConfig, dumps: str,
                 before: Iterable[Row] = ()) -> None:
        """`dumps`: where batches of skipped updates lie, for messages. `before`: earlier rows."""
        self._stage, self._cfg, self._dumps = stage, cfg, dumps
        self._skips, self._last = 0, {}
        self._metrics = {a.name: a.metric.format(stage=stage) for a in ALARMS}
        self._seen = {a.name: collections.deque(maxlen=WINDOW) for a in ALARMS}
        self._until = dict.fromkeys(self._metrics, -1)  # the step that ends each alarm's episode
        for row in before:
            self._add(row["step"], row)

    @classmethod
    def resumed(cls, stage: str, cfg: GuardConfig, dumps: str, metrics: MetricsWriter) -> "Guard":
        """With the rows that are written already, which process 0 has. A collective."""
        kept = {"step", f"{stage}/skipped", *(alarm.metric.format(stage=stage) for alarm in ALARMS)}
        rows = [{name: value for name, value in row.items() if name in kept}
                for row in metrics.rows(stage)]
        return cls(stage, cfg, dumps, exchange.broadcast(rows, "guard"))

    def watch(self, step: int, metrics: Row) -> dict[str, float]:
        """The metrics `alarm/…` of a step; warns about what there is to warn about."""
        alarms, warnings = self._add(step, metrics)
        if exchange.is_first():
            for warning in warnings:
                log.warning("%s", warning)
        return alarms

    @property
    def lost(self) -> str:
        """Why the run must end: too many steps in a row, up to the last one, skipped; else ""."""
        if self._skips < self._cfg.max_skips:
            return ""
        return (
            f"guard.max_skips={self._cfg.max_skips} steps in a row had an update that was skipped, "
            f"the last one since there was {_listed(self._last)}; their batches lie in "
            f"{self._dumps}. A lower learning_rate or clip_norm usually mends this, set with "
            "checkpoint.force=True; if the last checkpoint's weights are spoilt already, delete it "
            "to go on from the one before; if some rows of the data are at fault, leave them out."
        )

    def _add(self, step: int, row: Row) -> tuple[dict[str, float], list[str]]:
        warnings = []
        skipped = row.get(f"{self._stage}/skipped")
        self._skips, self._last = (self._skips + 1 if skipped else 0), row
        if skipped:
            warnings.append(
                f"{self._stage}: an update of step {step} was skipped and left the weights as they "
                f"were ({self._skips} of guard.max_skips={self._cfg.max_skips} steps in a row): "
                f"there was {_listed(row)}"
            )
        alarms = {}
        for alarm in ALARMS:
            value = row.get(self._metrics[alarm.name])
            if value is None or not math.isfinite(value):
                continue
            said = self._excess(alarm, value)
            alarms[f"alarm/{alarm.name}"] = float(said is not None)
            self._seen[alarm.name].append(value)
            if said is not None:
                if step > self._until[alarm.name]:
                    warnings.append(f"{self._stage}, step {step}: {said}. {alarm.meaning}")
                self._until[alarm.name] = step + QUIET
        return alarms, warnings

    def _excess(self, alarm: Alarm, value: float) -> str | None:
        """What is too much about the value, if anything."""
        limit, spike, seen = getattr(self._cfg, alarm.name), self._cfg.spike, self._seen[alarm.name]
        shown = f"{self._metrics[alarm.name]} is {value:.3g}"
        if limit and value > limit:
            return f"{shown}, above guard.{alarm.name}={limit:g}"
        if not spike or len(seen) < WINDOW or value < alarm.least:
            return None
        median = statistics.median(seen)
        if value > spike * median:
            return f"{shown}, above guard.spike={spike:g} times {median:.3g}, its median of late"
        return None


def _listed(row: Row) -> str:
    return " and ".join(f"no finite {what}" for what in nonfinite(row))


@jax.jit
def _finite(parts: dict[str, Any]) -> dict[str, jax.Array]:
    """Of each tree: whether all its numbers are finite."""
    return {
        name: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
        for name, tree in parts.items()
    }


def check_state(stage: str, step: int, state: TrainState) -> None:
    """Raises FloatingPointError for a state that must not be saved. A collective: all ask."""
    found = _finite({"weights": state.params, "optimizer's moments": state.opt_state})
    bad = [name for name, finite in jax.device_get(found).items() if not finite]
    if bad:
        raise FloatingPointError(
            f"the {' and '.join(bad)} of {stage} are not all finite after step {step}, so they are "
            "not saved; the last checkpoint, from before, stays: the same command goes on from "
            f"there. A lower {stage}.learning_rate usually mends this (with checkpoint.force=True)."
        )
