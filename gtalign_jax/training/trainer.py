"""The loops. A stage is: resume or start, then step, write, save, until its last step.

    grpo:  batch = data.batch(step)
           rollout = sample(policy, batch)              on device, piece by piece
           experience = assess(batch, rollout)          text -> welfare, on the host, meanwhile
           batch = advantages(rewards of all)
           state = update(state, reference, batch)      one jitted, donated step
    sft:   state = update(state, examples.batch(step))

Every process of a pod runs the same loop. Each assesses the completions that it owns; rewards go to
all of them, and what is logged to process 0, whose writers are the only ones that write.

Data and randomness are functions of (key, step), so a stage that was killed repeats from its last
checkpoint exactly.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from gtalign_jax.data.batches import PromptBatch, PromptSet
from gtalign_jax.model.sharding import Layout
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.pod import share
from gtalign_jax.reward.judges import JudgeError
from gtalign_jax.rollout.state import Rollout
from gtalign_jax.training import sft as sft_lib
from gtalign_jax.training.assessing import Assessing
from gtalign_jax.training.collect import Collector, Experience, log_rows, summarise
from gtalign_jax.training.grpo import GRPOConfig
from gtalign_jax.training.learner import Learner, host_metrics
from gtalign_jax.training.metrics import PhaseTimer, RolloutLog
from gtalign_jax.training.panel import Suspicions, panel
from gtalign_jax.training.sft import ExampleSet, SFTConfig
from gtalign_jax.training.stage import Stage
from gtalign_jax.training.state import TrainState, make_optimizer, named_key, schedule

log = logging.getLogger(__name__)

def train_sft(stage: Stage, fresh: Callable[[], TrainState], abstract: TrainState,
              examples: ExampleSet, *, model: ModelConfig, cfg: SFTConfig, layout: Layout,
              dtype: Any) -> TrainState:
    """The cold start; returns its last state."""
    state, key, done, _ = stage.resume(fresh, abstract)
    rate = schedule(cfg, cfg.steps)
    update = sft_lib.make_update(
        model, cfg, make_optimizer(cfg, cfg.steps), layout=layout, dtype=dtype
    )
    timer = PhaseTimer(stage.watch)

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        with timer("update", step + 1):
            batch = examples.batch(step, batch_size=cfg.batch_size, seed=stage.seed)
            state, seen = update(state, share.place(batch, layout.sharding("prompts")))
            metrics = host_metrics([seen])
        stage.dumps.examples(step + 1, metrics, batch)
        metrics["sft/learning_rate"] = float(rate(step))
        spent = timer.take()
        metrics["perf/tokens_per_s"] = metrics["sft/tokens"] / spent["time/update"]
        return state, metrics | spent

    return stage.run(state, key, done, step_fn)


def train_grpo(stage: Stage, fresh: Callable[[], TrainState], abstract: TrainState,
               reference: Params | None, data: PromptSet, collect: Collector, *,
               model: ModelConfig, cfg: GRPOConfig, layout: Layout, dtype: Any,
               rollouts: RolloutLog,
               after: Callable[[int, TrainState], None] | None = None) -> TrainState:
    """GRPO on mutual welfare; returns its last state.

    Args:
      reference: the frozen policy of the KL term in the dtype to compute in; None without one.
      after: called with (steps done, state) at the end of every step, and first of all with what a
        checkpoint holds: the run that saved it may have ended before. Evaluates, for instance.
    """
    saved = collect.abstract(cfg.prompts_per_step, cfg.samples_per_prompt) if cfg.ahead else None
    state, key, done, saved = stage.resume(fresh, abstract, saved)
    rollouts.truncate(done)
    stage.metrics.truncate("evaluate", done)
    if done and after is not None:
        after(done, state)
    learner = Learner.make(model, cfg, layout, collect.layout, filters=collect.filters,
                           dtype=dtype, steps=stage.steps)
    timer, suspicions = PhaseTimer(stage.watch), Suspicions(stage.metrics.rows(stage.name))
    sampling = _Sampling(data, collect, learner, cfg, stage, key)
    if saved is not None and done < stage.steps:
        sampling.restore(saved, done)

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        with timer("rollout", step + 1):
            now = sampling.take(state.params, step)
            prompts, rollout = now.prompts, now.rollout
            batch = learner.begin(state, reference, prompts, rollout)  # while the host scores
        with timer("reward", step + 1):
            experience = collect.finished(now.assessing)
            verdict = experience.verdict(cfg.filter_on)
            try:
                verdict.check(collect.max_missing)
            except JudgeError:  # its replies are what one wants to read then
                _log(experience, rollouts, step + 1, rollout.tokens_QGT.shape[2])
                raise
        with timer("update", step + 1):
            adv_QG = learner.signal(prompts, verdict)
            plans = learner.plans(verdict, adv_QG, rollout.tokens_QGT.shape[2])
            batch = learner.scored(batch, verdict, adv_QG)
            state, seen = learner.update(state, reference, batch, plans)
        with timer("log", step + 1):  # while the devices update
            metrics = learner.facts(adv_QG, step, plans, verdict)
            metrics |= _log(experience, rollouts, step + 1, rollout.tokens_QGT.shape[2])
        with timer("update", step + 1):
            metrics |= host_metrics(seen)
        stage.dumps.rollouts(step + 1, metrics, batch, experience, layout.sharding("prompts"))
        for warning in suspicions.add(step + 1, metrics):
            log.warning("%s", warning)
        spent = timer.take()
        if "rollout/length" in metrics and now.seconds:
            tokens = metrics["rollout/length"] * adv_QG.size
            metrics["perf/tokens_per_s"] = tokens / now.seconds
        return state, metrics | spent

    return stage.run(state, key, done, step_fn, after, sampling.pending)


@dataclasses.dataclass(frozen=True)
class _Sampled:
    """Completions whose judging has begun. `seconds`: of sampling; 0 if a checkpoint held them."""

    prompts: PromptBatch
    rollout: Rollout
    assessing: Assessing
    seconds: float


@dataclasses.dataclass
class _Sampling:
    """Completions of one step after another; with `grpo.ahead` those of the next step, too, so
    that their judging runs while the devices sample and update."""

    data: PromptSet
    collect: Collector
    learner: Learner
    cfg: GRPOConfig
    stage: Stage
    key: jax.Array
    there: dict[int, _Sampled] = dataclasses.field(default_factory=dict)  # by step

    def take(self, params: Params, step: int) -> _Sampled:
        """What is learnt from in a step; its judging has begun.

        It stays there until the next step begins. With `grpo.ahead` a step that is dropped, even
        while the next one's completions are sampled, was begun with completions of an older policy:
        the checkpoint of the state before it must hold these (`pending`), whole as they are. (The
        first step samples its own; where it is dropped, there is no checkpoint to be made.)
        """
        self.there = {at: sampled for at, sampled in self.there.items() if at >= step}
        for at in (step, step + 1) if self.cfg.ahead else (step,):  # after the last step, too: the
            if at not in self.there:                                # run may be prolonged
                self.there[at] = self._sample(params, at)
        return self.there[step]

    def _sample(self, params: Params, step: int) -> _Sampled:
        prompts, began = self._prompts(step), time.perf_counter()
        assessing = self.collect.assessing(prompts, needed=step < self.stage.steps)
        policy = self.learner.reshard(params)  # gone at the end: the update needs its place
        key = named_key(self.key, "rollout", step)
        rollout = self.collect.roll(policy, prompts, key, assessing.add)
        return _Sampled(prompts, rollout, assessing, time.perf_counter() - began)

    def _prompts(self, step: int) -> PromptBatch:
        size = self.cfg.prompts_per_step
        return self.data.batch(step, batch_size=size, seed=self.stage.seed)

    def restore(self, rollout: Rollout, step: int) -> None:
        """Goes on with completions of a checkpoint: the policy that wrote them is gone."""
        prompts = self._prompts(step)
        assessing = self.collect.assessing(prompts)
        assessing.add(rollout)
        self.there[step] = _Sampled(prompts, rollout, assessing, 0.0)

    def pending(self, done: int) -> dict[str, Any]:
        """What the checkpoint after `done` steps must hold."""
        return {"pending": self.there[done].rollout} if self.cfg.ahead else {}


def _log(experience: Experience, rollouts: RolloutLog, step: int, limit: int) -> dict[str, float]:
    """Writes and sums up what all processes have collected: in process 0, and {} elsewhere."""
    whole = experience.at_first()
    if whole is None:
        return {}
    rollouts.write(step, log_rows(whole))
    metrics = summarise(whole) | panel(whole)
    _mention_truncation(metrics["rollout/truncated"], limit)
    return metrics


def _mention_truncation(part: float, limit: int) -> None:
    """Said once for each tenth of the completions, not at every step (R28)."""
    if part > 0.1:
        _warn_once(
            f"more than {min(math.floor(10 * part) * 10, 90)} % of the completions were cut at "
            f"rollout.max_new_tokens={limit}: they have no response to score; raise the limit, or "
            "keep them out of the loss with grpo.mask_truncated=True"
        )


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)
