"""The loops. A stage is: resume or start, then step, write, save, until its last step.

    grpo:  batch = data.batch(step)
           rollout = sample(policy, batch)              on device
           experience = assess(batch, rollout)          text -> welfare, on the host
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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.data.batches import PromptBatch, PromptSet
from gtalign_jax.model.sharding import Layout, param_shardings
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.pod import share
from gtalign_jax.pod.notice import Notice, Preempted
from gtalign_jax.pod.watch import Watch
from gtalign_jax.reward.normalizers import normalize
from gtalign_jax.rollout.filters import Filters
from gtalign_jax.rollout.sampler import Rollout
from gtalign_jax.training import grpo as grpo_lib
from gtalign_jax.training import sft as sft_lib
from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer
from gtalign_jax.training.collect import Collector, Experience, Verdict, log_rows, summarise
from gtalign_jax.training.compiles import compilations
from gtalign_jax.training.grpo import Batch, GRPOConfig
from gtalign_jax.training.logp import cast
from gtalign_jax.training.metrics import Console, Mean, MetricsWriter, PhaseTimer, RolloutLog
from gtalign_jax.training.sft import ExampleSet, SFTConfig
from gtalign_jax.training.state import TrainState, make_optimizer, named_key, schedule

log = logging.getLogger(__name__)

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

    def resume(self, fresh: Callable[[], TrainState],
               abstract: TrainState) -> tuple[TrainState, jax.Array, int]:
        """(state, root key, steps already done); `fresh` is called only without a checkpoint."""
        # On every device: on one of several it could not meet the weights in a jitted function.
        everywhere = abstract.updates.sharding
        key = jax.jit(lambda: jax.random.key(self.seed), out_shardings=everywhere)()
        done = self.checkpoints.latest()
        if done is None:
            self.metrics.truncate(self.name, 0)
            return fresh(), key, 0
        wanted = {
            "state": abstract,
            "key": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
        }
        saved, _ = self.checkpoints.restore(wanted, done)
        self.metrics.truncate(self.name, done)
        self.console.say(f"{self.name}: continuing after step {done}")
        return saved["state"], saved["key"], done

    def run(self, state: TrainState, key: jax.Array, done: int, step_fn: StepFn,
            after: Callable[[int, TrainState], None] | None = None) -> TrainState:
        """Steps `done` … `steps`; saves every `checkpoint.every` steps and after the last one.

        Raises FloatingPointError where a loss or gradient is not finite: such a state is not saved;
        Preempted where a process was told to end: that step is.
        """
        with self.notice, self.console.stage(self.name, self.steps, done):
            for step in range(done, self.steps):
                state, metrics = step_fn(state, step)
                metrics["perf/compilations"] = compilations()
                self.metrics.write(self.name, step + 1, metrics)
                if (step + 1) % self.log_every == 0 or step + 1 == self.steps:
                    self.console.step(step + 1, metrics)
                _check_finite(self.name, step + 1, metrics)
                told = self.notice.given()
                due = (step + 1) % self.checkpoint.every == 0 or step + 1 == self.steps
                if told or due:
                    with self.watch.phase("save", step + 1):
                        self.push()
                        self.checkpoints.save(step + 1, {"state": state, "key": key})
                if told:
                    with self.watch.phase("save", step + 1):
                        self.checkpoints.wait()
                    raise Preempted(f"told to end: {self.name} is saved up to step {step + 1}")
                if after is not None:
                    after(step + 1, state)
        with self.watch.phase("save", self.steps):
            self.checkpoints.wait()
        return state


def _check_finite(stage: str, step: int, metrics: dict[str, float]) -> None:
    for name in (f"{stage}/loss", f"{stage}/grad_norm"):
        if not np.isfinite(metrics[name]):
            raise FloatingPointError(
                f"{name} is {metrics[name]} at step {step} of {stage}; the last checkpoint is from "
                "before it. A lower learning_rate or clip_norm usually mends this."
            )


def host_metrics(seen: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """The metrics of a step's updates: means over all their tokens, maxima over all updates."""
    seen = jax.device_get(seen)
    out = {}
    for name in seen[0]["means"]:
        means = [s["means"][name] for s in seen]
        out[name] = float(functools.reduce(Mean.merge, means).divide())
    for name in seen[0]["maxima"]:
        out[name] = float(max(s["maxima"][name] for s in seen))
    return out


def make_reshard(cfg: ModelConfig, layout: Layout, dtype: Any) -> Callable[[Params], Params]:
    """The jitted cast and move of the weights to where and how rollout needs them, once a step."""
    # A copy even where nothing changes: the weights that it was made of will be donated.
    copy = lambda params: jax.tree.map(jnp.copy, cast(params, dtype))  # noqa: E731
    return jax.jit(copy, out_shardings=param_shardings(cfg, layout))


def train_sft(stage: Stage, fresh: Callable[[], TrainState], abstract: TrainState,
              examples: ExampleSet, *, model: ModelConfig, cfg: SFTConfig, layout: Layout,
              dtype: Any) -> TrainState:
    """The cold start; returns its last state."""
    state, key, done = stage.resume(fresh, abstract)
    rate = schedule(cfg, cfg.steps)
    update = sft_lib.make_update(
        model, cfg, make_optimizer(cfg, cfg.steps), layout=layout, dtype=dtype
    )
    timer = PhaseTimer(stage.watch)

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        with timer("update", step + 1):
            batch = examples.batch(step, batch_size=cfg.batch_size, seed=stage.seed)
            batch = share.place(batch, layout.sharding("prompts"))
            state, seen = update(state, batch)
            metrics = host_metrics([seen])
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
    state, key, done = stage.resume(fresh, abstract)
    rollouts.truncate(done)
    if done and after is not None:
        after(done, state)
    learner = Learner.make(model, cfg, layout, collect.layout, filters=collect.filters,
                           dtype=dtype, steps=stage.steps)
    timer = PhaseTimer(stage.watch)

    def step_fn(state: TrainState, step: int) -> tuple[TrainState, dict[str, float]]:
        prompts = data.batch(step, batch_size=cfg.prompts_per_step, seed=stage.seed)
        with timer("rollout", step + 1):
            policy = learner.reshard(state.params)
            rollout = collect.roll(policy, prompts, named_key(key, "rollout", step))
            del policy  # the rollout's copy of the weights: the update needs its place
            own = collect.fetch(rollout)
        with timer("reward", step + 1):
            experience = collect.assess(prompts, *own)
            verdict = experience.verdict()
        with timer("update", step + 1):
            adv_QG = learner.signal(prompts, verdict)
            batch = learner.batch(prompts, rollout, verdict, adv_QG)
            state, metrics = learner.update(state, reference, batch)
        with timer("log", step + 1):
            metrics |= learner.facts(adv_QG, step)
            metrics |= _log(experience, rollouts, step + 1, rollout.tokens_QGT.shape[2])
        spent = timer.take()
        if "rollout/length" in metrics:
            tokens = metrics["rollout/length"] * adv_QG.size
            metrics["perf/tokens_per_s"] = tokens / spent["time/rollout"]
        return state, metrics | spent

    return stage.run(state, key, done, step_fn, after)


def _log(experience: Experience, rollouts: RolloutLog, step: int, limit: int) -> dict[str, float]:
    """Writes and sums up what all processes have collected: in process 0, and {} elsewhere."""
    whole = experience.at_first()
    if whole is None:
        return {}
    rollouts.write(step, log_rows(whole))
    metrics = summarise(whole)
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


@dataclasses.dataclass(frozen=True)
class Learner:
    """The jitted programs of the GRPO stage, made once."""

    cfg: GRPOConfig
    layout: Layout
    reshard: Callable[[Params], Params]
    one_update: Callable[..., Any]
    logps: Callable[..., jax.Array]
    advantages: Callable[..., jax.Array]
    rate: Callable[[int], float]

    @classmethod
    def make(cls, model: ModelConfig, cfg: GRPOConfig, layout: Layout, rollout: Layout, *,
             filters: Filters, dtype: Any, steps: int) -> "Learner":
        """`rollout`, `filters`: where the sampler wants its weights, and what it draws from."""
        total = steps * cfg.updates_per_step
        options = {"filters": filters, "dtype": dtype}
        optimizer = make_optimizer(cfg, total)
        return cls(
            cfg=cfg,
            layout=layout,
            reshard=make_reshard(model, rollout, dtype),
            one_update=grpo_lib.make_update(model, cfg, optimizer, layout=layout, **options),
            logps=grpo_lib.make_logps(model, cfg, layout=layout, **options),
            advantages=jax.jit(
                lambda reward, valid: grpo_lib.advantages(
                    reward, valid, std=cfg.std, epsilon=cfg.adv_epsilon
                )
            ),
            rate=schedule(cfg, total),
        )

    def signal(self, prompts: PromptBatch, verdict: Verdict) -> np.ndarray:
        """Advantages `[Q, G]` of the whole batch, on the host.

        A few numbers: every process computes all of them, from the same rewards.
        """
        shape = (len(prompts.prompts), -1)
        G = len(verdict.reward_B) // shape[0]
        sources = [prompt.data_source for prompt in prompts.prompts for _ in range(G)]
        reward_B = normalize(self.cfg.normalizer, verdict.reward_B, sources, verdict.valid_B)
        reward_QG = reward_B.reshape(shape).astype(np.float32)
        return np.asarray(self.advantages(reward_QG, verdict.valid_B.reshape(shape)))

    def batch(self, prompts: PromptBatch, rollout: Rollout, verdict: Verdict,
              adv_QG: np.ndarray) -> Batch:
        """Advantages beside the tokens they are about, on the devices, cut by prompt."""
        valid_B = verdict.valid_B
        if self.cfg.mask_truncated:
            valid_B = valid_B & verdict.stopped_B
        return grpo_lib.place(Batch(
            prompt_QS=prompts.tokens_QS,
            prompt_lengths_Q=prompts.lengths_Q,
            tokens_QGT=rollout.tokens_QGT,
            lengths_QG=rollout.lengths_QG,
            adv_QG=adv_QG,
            valid_QG=valid_B.reshape(adv_QG.shape),
            sampler_logp_QGT=rollout.logp_QGT,
            common=prompts.common,
        ), self.layout)

    @functools.cached_property
    def _cut(self) -> Callable[[Batch], list[Batch]]:
        n = self.cfg.minibatches
        pieces = lambda batch: [  # noqa: E731
            jax.tree.map(lambda x, i=i: x[i::n], batch) for i in range(n)
        ]
        return jax.jit(pieces, out_shardings=self.layout.sharding("prompts"))

    def update(self, state: TrainState, reference: Params | None,
               batch: Batch) -> tuple[TrainState, dict[str, float]]:
        """All optimizer updates of a step: `epochs` passes over `minibatches` pieces."""
        if self.cfg.old_logp == "sampler":
            batch = batch.replace(old_logp_QGT=batch.sampler_logp_QGT)
        elif self.cfg.needs_old_logp:
            batch = batch.replace(old_logp_QGT=self.logps(state.params, batch))
        if reference is not None:
            batch = batch.replace(ref_logp_QGT=self.logps(reference, batch))
        pieces = [batch] if self.cfg.minibatches == 1 else self._cut(batch)
        seen = []
        for piece in pieces * self.cfg.epochs:
            state, metrics = self.one_update(state, piece)
            seen.append(metrics)
        return state, host_metrics(seen)

    def facts(self, adv_QG: np.ndarray, step: int) -> dict[str, float]:
        """What is known about a step's batch without the model."""
        return {
            "grpo/learning_rate": float(self.rate((step + 1) * self.cfg.updates_per_step - 1)),
            "grpo/adv_abs": float(np.abs(adv_QG).mean()),
            "grpo/groups_without_signal": float((adv_QG == 0).all(axis=1).mean()),
        }
