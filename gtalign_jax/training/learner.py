"""What the trainer does with a step's completions once they are scored.

    rewards --advantages--> Batch (--pack--> Packed) --logps of old policy, reference--> updates

The jitted programs are made once. Packed or padded is a choice of the config alone: both have the
same loss (`packed`, `grpo`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.data.batches import PromptBatch
from gtalign_jax.model.sharding import Layout, param_shardings
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.pod import share
from gtalign_jax.reward.normalizers import normalize
from gtalign_jax.rollout.filters import Filters
from gtalign_jax.rollout.state import Rollout
from gtalign_jax.training import grpo as grpo_lib
from gtalign_jax.training import packed as packed_lib
from gtalign_jax.training.collect import Verdict
from gtalign_jax.training.grpo import Batch, GRPOConfig
from gtalign_jax.training.logp import cast
from gtalign_jax.training.metrics import NONFINITE, Mean
from gtalign_jax.training.packed import Packed
from gtalign_jax.training.packing import Packing, Placed, make_plan
from gtalign_jax.training.state import TrainState, make_optimizer, schedule


def host_metrics(seen: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    """The metrics of a step's updates: means over all their tokens, maxima over all updates.

    A mean over nothing is left out: where all groups are filtered, an entropy of 0 would be untrue.
    An update that was skipped is in `<stage>/skipped` and says what was not finite; it is in no
    other metric, unless all were skipped.
    """
    seen = jax.device_get(seen)
    done = [s for s in seen if not _nonfinite(s)] or seen
    out = dict.fromkeys((name for s in seen for name in _nonfinite(s)), 1.0)
    for name in seen[0]["means"]:
        of = seen if name.endswith("/skipped") else done
        whole = functools.reduce(Mean.merge, [s["means"][name] for s in of])
        if whole.count:
            out[name] = float(whole.divide())
    for name in seen[0]["maxima"]:
        if not name.startswith(NONFINITE):
            out[name] = float(max(s["maxima"][name] for s in done))
    return out


def _nonfinite(seen: dict[str, dict[str, Any]]) -> list[str]:
    """What an update was skipped for."""
    return [name for name, flag in seen["maxima"].items() if name.startswith(NONFINITE) and flag]


def make_reshard(cfg: ModelConfig, layout: Layout, dtype: Any) -> Callable[[Params], Params]:
    """The jitted cast and move of the weights to where and how rollout needs them, once a step."""
    # A copy even where nothing changes: the weights that it was made of will be donated.
    copy = lambda params: jax.tree.map(jnp.copy, cast(params, dtype))  # noqa: E731
    return jax.jit(copy, out_shardings=param_shardings(cfg, layout))


def _rates(cfg: GRPOConfig, updates: int) -> np.ndarray:
    """On the host and at once: asked for during an update, the device would answer after it."""
    rate = schedule(cfg, updates)
    return np.asarray(jax.vmap(lambda n: jnp.float32(rate(n)))(jnp.arange(updates)))


def without_spread(values_QG: np.ndarray, valid_QG: np.ndarray) -> np.ndarray:
    """`[Q]`: groups whose values are equal, exactly, wherever they are valid and no NaN.

    A group of one such value has no spread; of one with none at all nothing is known: False.
    """
    known_QG = valid_QG & ~np.isnan(values_QG)
    low_Q = np.min(values_QG, axis=1, where=known_QG, initial=np.inf)
    return low_Q == np.max(values_QG, axis=1, where=known_QG, initial=-np.inf)


@dataclasses.dataclass(frozen=True)
class Learner:
    """The jitted programs of the GRPO stage, made once."""

    cfg: GRPOConfig
    layout: Layout
    reshard: Callable[[Params], Params]
    one_update: Callable[..., Any]
    logps: Callable[..., jax.Array]
    advantages: Callable[..., jax.Array]
    rates: np.ndarray  # the learning rate of each update

    @classmethod
    def make(cls, model: ModelConfig, cfg: GRPOConfig, layout: Layout, rollout: Layout, *,
             filters: Filters, dtype: Any, steps: int) -> "Learner":
        """`rollout`, `filters`: where the sampler wants its weights, and what it draws from."""
        total, update_lib = steps * cfg.updates_per_step, packed_lib if cfg.pack else grpo_lib
        options = {"filters": filters, "dtype": dtype}
        optimizer = make_optimizer(cfg, total)
        return cls(
            cfg=cfg,
            layout=layout,
            reshard=make_reshard(model, rollout, dtype),
            one_update=update_lib.make_update(model, cfg, optimizer, layout=layout, **options),
            logps=update_lib.make_logps(model, cfg, layout=layout, **options),
            advantages=jax.jit(
                lambda reward, valid: grpo_lib.advantages(
                    reward, valid, std=cfg.std, epsilon=cfg.adv_epsilon
                )
            ),
            rates=_rates(cfg, total),
        )

    def signal(self, prompts: PromptBatch, verdict: Verdict) -> np.ndarray:
        """Advantages `[Q, G]` of the whole batch, on the host; 0 where there is no score, and in
        groups that `grpo.filter_on` leaves out.

        A few numbers: every process computes all of them, from the same rewards.
        """
        Q = len(prompts.prompts)
        shape = (Q, len(verdict.reward_B) // Q)
        sources = [prompt.data_source for prompt in prompts.prompts for _ in range(shape[1])]
        scored_QG = self._scored(verdict, shape)
        reward_B = normalize(self.cfg.normalizer, verdict.reward_B, sources, scored_QG.reshape(-1))
        reward_QG = reward_B.reshape(shape).astype(np.float32)
        return np.asarray(self.advantages(reward_QG, scored_QG))

    def _filtered(self, verdict: Verdict, shape: tuple[int, int]) -> np.ndarray:
        """`[Q]`: groups in which the factor `grpo.filter_on` tells no completion from another."""
        if not self.cfg.filter_on:
            return np.zeros(shape[0], bool)
        if verdict.filter_B is None:
            raise ValueError(
                f"grpo.filter_on={self.cfg.filter_on!r}, but the verdict holds no factor: it must "
                "be made by Experience.verdict(cfg.filter_on)"
            )
        return without_spread(verdict.filter_B.reshape(shape), verdict.valid_B.reshape(shape))

    def _scored(self, verdict: Verdict, shape: tuple[int, int]) -> np.ndarray:
        """`[Q, G]`: completions whose reward counts."""
        return verdict.valid_B.reshape(shape) & ~self._filtered(verdict, shape)[:, None]

    def begin(self, state: TrainState, reference: Params | None, prompts: PromptBatch,
              rollout: Rollout) -> Batch:
        """The batch without its scores, on the devices, cut by prompt.

        What needs no score is under way: log-probabilities of the old policy and of the reference,
        unless completions will be packed, which takes the scores.
        """
        shape = rollout.lengths_QG.shape
        batch = grpo_lib.place(Batch(
            prompt_QS=prompts.tokens_QS,
            prompt_lengths_Q=prompts.lengths_Q,
            tokens_QGT=rollout.tokens_QGT,
            lengths_QG=rollout.lengths_QG,
            adv_QG=np.zeros(shape, np.float32),
            valid_QG=np.ones(shape, bool),
            sampler_logp_QGT=rollout.logp_QGT,
            common=prompts.common,
        ), self.layout)
        return batch if self.cfg.pack else self._with_logps(state, reference, batch)

    def scored(self, batch: Batch, verdict: Verdict, adv_QG: np.ndarray) -> Batch:
        """Advantages beside the tokens they are about."""
        valid_QG = self._in_loss(verdict, adv_QG.shape)
        adv_QG, valid_QG = share.place((adv_QG, valid_QG), self.layout.sharding("prompts"))
        return batch.replace(adv_QG=adv_QG, valid_QG=valid_QG)

    def _in_loss(self, verdict: Verdict, shape: tuple[int, int]) -> np.ndarray:
        """`[Q, G]`: completions that are in the loss."""
        stopped_QG = verdict.stopped_B.reshape(shape)
        return self._scored(verdict, shape) & (stopped_QG | (not self.cfg.mask_truncated))

    @functools.cached_property
    def _cut(self) -> Callable[[Batch], list[Batch]]:
        n = self.cfg.minibatches
        pieces = lambda batch: [  # noqa: E731
            jax.tree.map(lambda x, i=i: x[i::n], batch) for i in range(n)
        ]
        return jax.jit(pieces, out_shardings=self.layout.sharding("prompts"))

    @functools.cached_property
    def _pack(self) -> Callable[..., Packed]:
        return jax.jit(functools.partial(packed_lib.pack, grpo=self.cfg))

    def plans(self, verdict: Verdict, adv_QG: np.ndarray, width: int) -> list[Packing]:
        """Where the completions of each minibatch lie, if they are packed; else nothing.

        Rows that cannot change the gradient are left out: not judged, of a group that is filtered,
        or without advantage where there is no KL term either.
        """
        if not self.cfg.pack:
            return []
        lengths_QG = verdict.lengths_B.reshape(adv_QG.shape)
        counts_QG = self._in_loss(verdict, adv_QG.shape) & ((adv_QG != 0) | (self.cfg.beta > 0))
        n, shards = self.cfg.minibatches, self.layout.axis_size("prompts")
        return [
            Packing(make_plan(lengths_QG[i::n], counts_QG[i::n], width, self.cfg.pack, shards),
                    lengths_QG[i::n], width, self.cfg.pack_rows)
            for i in range(n)
        ]

    def _placed(self, packing: Packing) -> tuple[Placed, jax.Array]:
        laid = share.place(packing.placed, self.layout.sharding("prompts"))
        return laid, share.place(np.int32(packing.pieces), self.layout.sharding())

    def update(self, state: TrainState, reference: Params | None, batch: Batch,
               plans: Sequence[Packing] = ()) -> tuple[TrainState, list[dict[str, Any]]]:
        """All optimizer updates of a step: `epochs` passes over `minibatches` pieces.

        Returns (state, each update's metrics); nothing is waited for.
        """
        if not plans:
            batch = self._with_logps(state, reference, batch)
        pieces = [batch] if self.cfg.minibatches == 1 else self._cut(batch)
        if plans:
            pieces = [self._pack(piece, *self._placed(plan))
                      for piece, plan in zip(pieces, plans, strict=True)]
            pieces = [self._with_logps(state, reference, piece) for piece in pieces]
        seen = []
        for piece in pieces * self.cfg.epochs:
            state, metrics = self.one_update(state, piece)
            seen.append(metrics)
        return state, seen

    def _with_logps(self, state: TrainState, reference: Params | None,
                    batch: Batch | Packed) -> Batch | Packed:
        """With the log-probabilities of the old policy and of the reference, if they are needed and
        not there yet."""
        sampler, old, ref = batch.logps
        if old is None and self.cfg.old_logp == "sampler":
            old = sampler
        elif old is None and self.cfg.needs_old_logp:
            old = self.logps(state.params, batch)
        if ref is None and reference is not None:
            ref = self.logps(reference, batch)
        return batch.with_logps(old, ref)

    def facts(self, adv_QG: np.ndarray, step: int, plans: Sequence[Packing] = (),
              verdict: Verdict | None = None) -> dict[str, float]:
        """What is known about a step's batch without the model.

        `verdict` is needed where `grpo.filter_on` is set: groups filtered are among those without
        signal, and counted by themselves, too.
        """
        out = {
            "grpo/learning_rate": float(self.rates[(step + 1) * self.cfg.updates_per_step - 1]),
            "grpo/adv_abs": float(np.abs(adv_QG).mean()),
            "grpo/groups_without_signal": float((adv_QG == 0).all(axis=1).mean()),
        }
        if not np.isfinite(adv_QG).all():
            out[f"{NONFINITE}reward"] = 1.0
        if self.cfg.filter_on:
            out["grpo/groups_filtered"] = float(self._filtered(verdict, adv_QG.shape).mean())
        if plans:
            out["grpo/padding"] = 1 - float(np.mean([plan.fill for plan in plans]))
        return out
