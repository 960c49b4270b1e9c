"""GRPO: group-relative advantages and the clipped policy-gradient update.

    A = (R - mean_group) / (std_group + eps)
    loss per token = -min(r A, clip(r, 1 - low, 1 + high) A) + beta KL(policy || reference)

(DeepSeekMath, arXiv 2402.03300, eq. 3.) Options: no division by std and a constant length (Dr.
GRPO, arXiv 2503.20783); sequence-level ratios (GSPO, arXiv 2507.18071); truncated importance
sampling between sampler and trainer.

Deviations from the GTAlign paper, which trains with PPO:
  1. no critic: the group's mean is the baseline;
  2. the KL term is in the loss, not in the reward;
  3. a completion whose judge failed is missing: out of its group's statistics and of the loss.

Every mean is a (sum, count): each token's weight is divided by the whole batch's count before the
batch is cut, so that micro-batches and devices add up to exactly the full-batch gradient.
This module knows no text and no reward.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gtalign_jax.model import forward
from gtalign_jax.model.forward import Past, check_remat
from gtalign_jax.model.sharding import Layout, prompt_shards
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.pod import share
from gtalign_jax.rollout.filters import UNFILTERED, Filters
from gtalign_jax.training.logp import cast, completion_logps, completion_mask
from gtalign_jax.training.metrics import NONFINITE, Mean
from gtalign_jax.training.micro import accumulate, cut, piece_count, uncut
from gtalign_jax.training.state import (
    OptimizerConfig,
    TrainState,
    state_shardings,
    update_if_finite,
)

CHOICES = {
    "std": ("group", "none"),
    "ratio": ("token", "sequence"),
    "kl": ("k1", "k2", "k3"),
    "aggregation": ("token", "sequence", "constant"),
    "old_logp": ("trainer", "sampler"),
}


@dataclasses.dataclass(frozen=True)
class GRPOConfig(OptimizerConfig):
    """The GRPO stage. Batches are counted in prompts; see the table that a run prints."""

    steps: int = 150
    prompts_per_step: int = 64  # Q
    samples_per_prompt: int = 8  # G
    micro_batch_prompts: int = 0  # per forward/backward and batch shard; 0: all of a minibatch
    minibatches: int = 1  # optimizer updates per pass over a step's batch
    epochs: int = 1  # passes over a step's batch
    std: str = "group"  # "none": Dr. GRPO
    adv_epsilon: float = 1e-4
    normalizer: str = "none"  # per-source normaliser before grouping (reward/normalizers.py)
    ratio: str = "token"  # "sequence": GSPO
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "token"  # "sequence": mean of means; "constant": Dr. GRPO
    reference: bool = True  # hold a frozen reference policy
    beta: float = 0.001  # weight of the KL towards it
    kl: str = "k3"
    kl_clamp: float = 10.0  # |log ratio| to the reference is clamped here
    old_logp: str = "trainer"  # "sampler": trust the sampler's log-probabilities
    ahead: int = 0  # 1: a step's completions are sampled before the update of the step before
    truncated_is: float = 0.0  # cap of exp(trainer logp - sampler logp); 0: off
    mask_truncated: bool = False  # keep completions cut at the limit out of the loss
    # A factor of the reward (reward.factors.NAMES, such as "answer") or a component that a task of
    # reward.tasks declares; "": off. A group in which it is the same, to the last bit, for all
    # judged completions says nothing about the task: what still sets their rewards apart is shape
    # (length, format). Such a group is treated as if it had no score: out of the normaliser, of the
    # policy's loss, of the KL term and of the count of tokens that the loss is divided by; the
    # gradient is that of the batch without it.
    filter_on: str = ""
    logit_chunk: int = 128
    profile_step: int = 0  # of this step a trace is written to WORKDIR/profile; 0: of none
    pack: int = 0  # groups whose completions may share a row of the update; 0: all are padded
    pack_rows: int = 1  # packed rows per forward/backward and batch shard
    remat: str = "none"  # what the backward pass computes anew: model.forward.REMAT_POLICIES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_remat(self.remat)
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"grpo.{key}={getattr(self, key)!r}: expected one of {allowed}"
                )
        for key in ("beta", "clip_low", "clip_high", "truncated_is", "adv_epsilon", "kl_clamp",
                    "pack"):
            if getattr(self, key) < 0:
                raise ValueError(f"grpo.{key}={getattr(self, key)}: must be >= 0")
        if self.pack_rows < 1:
            raise ValueError(f"grpo.pack_rows={self.pack_rows}: must be >= 1")
        if self.ahead not in (0, 1):
            raise ValueError(f"grpo.ahead={self.ahead}: expected 0 or 1")
        if self.ahead and not self.truncated_is:
            raise ValueError(
                f"grpo.ahead={self.ahead} with grpo.truncated_is=0: completions of the policy "
                "before an update need weights; set grpo.truncated_is, 2.0 for instance"
            )
        if self.truncated_is and self.old_logp == "sampler":
            raise ValueError(
                f"grpo.truncated_is={self.truncated_is} with grpo.old_logp='sampler': it weighs "
                "the trainer's old log-probabilities against the sampler's; set "
                "grpo.old_logp='trainer', or grpo.truncated_is=0"
            )
        if self.reference and self.beta == 0:
            raise ValueError(
                "grpo.reference=True with grpo.beta=0: the reference would be held in memory and "
                "never used; set grpo.reference=False, or grpo.beta > 0"
            )
        if self.beta > 0 and not self.reference:
            raise ValueError(
                f"grpo.beta={self.beta} with grpo.reference=False: the KL needs a reference; set "
                "grpo.reference=True, or grpo.beta=0"
            )

    @property
    def updates_per_step(self) -> int:
        return self.minibatches * self.epochs

    @property
    def needs_old_logp(self) -> bool:
        """One update on its own samples is on-policy: the old policy is the current one."""
        return self.updates_per_step > 1 and self.old_logp == "trainer"


@struct.dataclass
class Batch:
    """Scored rollouts. `valid_QG`: judged, and not masked.

    `old_logp_QGT` None: on-policy. `ref_logp_QGT` None: no KL term. `common`: how many tokens all
    prompts begin with, fewer than any has; they are computed once, not once per prompt.
    """

    prompt_QS: jax.Array
    prompt_lengths_Q: jax.Array
    tokens_QGT: jax.Array
    lengths_QG: jax.Array
    adv_QG: jax.Array
    valid_QG: jax.Array
    sampler_logp_QGT: jax.Array
    old_logp_QGT: jax.Array | None = None
    ref_logp_QGT: jax.Array | None = None
    common: int = struct.field(pytree_node=False, default=0)

    @property
    def logps(self) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Of the sampler, the old policy and the reference."""
        return self.sampler_logp_QGT, self.old_logp_QGT, self.ref_logp_QGT

    def with_logps(self, old: jax.Array | None, ref: jax.Array | None) -> "Batch":
        return self.replace(old_logp_QGT=old, ref_logp_QGT=ref)


def advantages(reward_QG, valid_QG, *, std: str = "group", epsilon: float = 1e-4) -> jax.Array:
    """Group-relative advantages `[Q, G]`, float32.

    Statistics (ddof 0) run over the valid members only; others get 0. A group whose valid rewards
    are all equal, or with fewer than two, gives zeros: rounding in the mean is no signal. Rewards
    come as float64: two that differ by its rounding may lie on either side of where float32 rounds
    up, so one step of float32 counts as equal, too. Of a valid reward that is not finite nothing in
    its group is: no comparison would notice a NaN, the update does.
    """
    reward_QG = jnp.where(valid_QG, reward_QG.astype(jnp.float32), 0.0)
    count_Q1 = jnp.maximum(valid_QG.sum(axis=1, keepdims=True), 1)
    centred = jnp.where(valid_QG, reward_QG - reward_QG.sum(1, keepdims=True) / count_Q1, 0.0)
    low_Q1 = jnp.min(reward_QG, axis=1, keepdims=True, where=valid_QG, initial=jnp.inf)
    high_Q1 = jnp.max(reward_QG, axis=1, keepdims=True, where=valid_QG, initial=-jnp.inf)
    if std == "group":
        variance_Q1 = (centred**2).sum(axis=1, keepdims=True) / count_Q1
        centred = centred / (jnp.sqrt(variance_Q1) + epsilon)
    differ_Q1 = high_Q1 > jnp.nextafter(low_Q1, jnp.inf)
    differ_Q1 |= ~jnp.isfinite(reward_QG).all(axis=1, keepdims=True)
    return jnp.where(valid_QG & differ_Q1, centred, 0.0)


def token_weights(lengths_QG, valid_QG, T: int, aggregation: str) -> jax.Array:
    """`[Q, G, T]` weights that sum a per-token loss into its mean over the whole batch.

    "token": every token counts the same. "sequence": every row counts the same. "constant": every
    row is divided by T, whatever its length. A batch without a valid token has zero weights.
    """
    live_QGT = (completion_mask(lengths_QG, T) & valid_QG[:, :, None]).astype(jnp.float32)
    rows = (valid_QG & (lengths_QG > 0)).sum().astype(jnp.float32)
    match aggregation:
        case "token":
            return live_QGT / jnp.maximum(live_QGT.sum(), 1.0)
        case "sequence":
            per_row = live_QGT / jnp.maximum(lengths_QG, 1)[:, :, None].astype(jnp.float32)
            return per_row / jnp.maximum(rows, 1.0)
        case "constant":
            return live_QGT / (T * jnp.maximum(rows, 1.0))
    raise ValueError(f"aggregation={aggregation!r}: expected one of {CHOICES['aggregation']}")


def kl_estimate(logp, ref_logp, kind: str, clamp: float) -> jax.Array:
    """Per-token estimates of KL(policy || reference) from samples of the policy.

    With d = logp - ref_logp, clamped to ±clamp: k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d
    (Schulman, "Approximating KL divergence"). As a loss term k1 has zero expected gradient.
    """
    d = jnp.clip(logp - ref_logp, -clamp, clamp)
    match kind:
        case "k1":
            return d
        case "k2":
            return 0.5 * d * d
        case "k3":
            return jnp.expm1(-d) + d
    raise ValueError(f"kl={kind!r}: expected one of {CHOICES['kl']}")


@struct.dataclass
class Tokens:
    """What the loss needs to know of each completion token, arrays of one shape.

    mask: the token is real. weights: of its loss in the mean over the whole batch (0: not in it).
    old_logp, ref_logp: None as in `Batch`.
    """

    mask: jax.Array
    weights: jax.Array
    adv: jax.Array
    sampler_logp: jax.Array
    old_logp: jax.Array | None
    ref_logp: jax.Array | None


def policy_loss(logp, of: Tokens, row_mean: Callable[[jax.Array], jax.Array],
                cfg: GRPOConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped surrogate per token, and what there is to watch about it.

    `row_mean(x)`: for every token the mean of x, which is 0 where no token is, over its completion.
    Where no token is, what comes out means nothing.
    """
    old = jax.lax.stop_gradient(logp) if of.old_logp is None else of.old_logp
    log_ratio = jnp.where(of.mask, logp - old, 0.0)
    if cfg.ratio == "sequence":
        log_ratio = row_mean(log_ratio)
    ratio = jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))
    plain = ratio * of.adv
    clipped = jnp.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high) * of.adv
    loss = -jnp.minimum(plain, clipped)
    gap = jax.lax.stop_gradient(jnp.where(of.mask, logp, 0.0)) - of.sampler_logp
    if cfg.truncated_is > 0:
        behaviour = jnp.where(of.mask, old - of.sampler_logp, 0.0)
        weight = jnp.minimum(jnp.exp(jnp.minimum(behaviour, 20.0)), cfg.truncated_is)
        loss = loss * jax.lax.stop_gradient(weight)
    return loss, {"ratio": ratio, "clip_fraction": (clipped < plain) * 1.0, "gap": jnp.abs(gap)}


def _loss(params: Params, past: Past | None, batch: Batch, weights_QGT, *, cfg: ModelConfig,
          grpo: GRPOConfig, **options: Any) -> tuple[jax.Array, dict[str, Any]]:
    logp, entropy = completion_logps(
        params, cfg, batch.prompt_QS, batch.prompt_lengths_Q, batch.tokens_QGT, past=past,
        logit_chunk=grpo.logit_chunk, remat=grpo.remat, **options,
    )
    mask_QGT = completion_mask(batch.lengths_QG, logp.shape[2])
    length_QG1 = jnp.maximum(batch.lengths_QG, 1)[:, :, None]

    def row_mean(x_QGT: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x_QGT.sum(axis=2, keepdims=True) / length_QG1, x_QGT.shape)

    of = Tokens(mask_QGT, weights_QGT, jnp.broadcast_to(batch.adv_QG[:, :, None], logp.shape),
                batch.sampler_logp_QGT, batch.old_logp_QGT, batch.ref_logp_QGT)
    return objective(logp, entropy, of, row_mean, grpo)


def objective(logp, entropy, of: Tokens, row_mean: Callable[[jax.Array], jax.Array],
              grpo: GRPOConfig) -> tuple[jax.Array, dict[str, Any]]:
    """(the loss as a sum over tokens, metrics)."""
    per_token, seen = policy_loss(logp, of, row_mean, grpo)
    live = of.weights > 0
    count = live.sum().astype(jnp.float32)

    def mean(x: jax.Array) -> Mean:
        return Mean(jax.lax.stop_gradient(jnp.where(live, x, 0.0).sum()), count)

    means = {
        "grpo/entropy": mean(entropy),
        "grpo/clip_fraction": mean(seen["clip_fraction"]),
        "grpo/ratio": mean(seen["ratio"]),
        "rollout/logp_gap": mean(seen["gap"]),
    }
    if of.ref_logp is not None:
        kl = kl_estimate(logp, of.ref_logp, grpo.kl, grpo.kl_clamp)
        means["grpo/kl"] = mean(kl)
        per_token = per_token + grpo.beta * kl
    loss = (jnp.where(live, per_token, 0.0) * of.weights).sum()
    gap = jnp.where(live, seen["gap"], 0.0)
    maxima = {"rollout/logp_gap_max": gap.max(), **_nonfinite(logp, of, live)}
    return loss, {"means": means, "maxima": maxima}


def _nonfinite(logp, of: Tokens, live) -> dict[str, jax.Array]:
    """1 for those whose log-probability of some live token is not finite. The loss may not show it:
    ratios are clamped, and the sampler's need not be in it."""
    whose = {"logp": logp, "sampler_logp": of.sampler_logp, "old_logp": of.old_logp,
             "ref_logp": of.ref_logp}
    return {f"{NONFINITE}{name}": jnp.any(live & ~jnp.isfinite(x)).astype(jnp.float32)
            for name, x in whose.items() if x is not None}


def loss_and_grads(params: Params, batch: Batch, *, cfg: ModelConfig, grpo: GRPOConfig,
                   filters: Filters = UNFILTERED, dtype: Any = jnp.float32,
                   layout: Layout | None = None):
    """(loss, gradients, metrics) of a batch, accumulated over micro-batches of prompts.

    The prefix common to all prompts goes forward once, before the first micro-batch; what all of
    them say about its keys and values adds up, and goes back through it once, after the last.
    """
    Q, _, T = batch.tokens_QGT.shape
    weights_QGT = token_weights(batch.lengths_QG, batch.valid_QG, T, grpo.aggregation)
    loss = functools.partial(
        _loss, cfg=cfg, grpo=grpo, filters=filters, dtype=dtype, layout=layout
    )

    weights = cast(params, dtype)  # once, not in every piece
    past, back = jax.vjp(lambda weights: forward.common_past(
        weights, cfg, batch.prompt_QS, batch.common, layout, grpo.remat), weights)

    def one(piece: tuple[Batch, jax.Array]):
        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, seen), (grads, past_grads) = both(weights, past, *piece)
        return (value, grads, past_grads, seen["means"]), seen["maxima"]

    pieces = _pieces(Q, grpo, layout)
    (value, grads, past_grads, means), maxima = accumulate(one, (batch, weights_QGT), pieces)
    if past is not None:
        past_grads = jax.tree.map(lambda g, x: g.astype(x.dtype), past_grads, past)
        grads = jax.tree.map(lambda g, more: g + more.astype(g.dtype), grads, *back(past_grads))
    return value, grads, {"means": means, "maxima": maxima}


def _pieces(Q: int, grpo: GRPOConfig, layout: Layout | None) -> int:
    return piece_count(Q, grpo.micro_batch_prompts, prompt_shards(layout))


def make_update(cfg: ModelConfig, grpo: GRPOConfig, optimizer: optax.GradientTransformation, *,
                layout: Layout, filters: Filters = UNFILTERED, dtype: Any = jnp.float32,
                grads_of: Callable = loss_and_grads) -> Callable:
    """The jitted `update(state, batch) -> (state', metrics)`; `state` is donated.

    `grads_of` is `loss_and_grads` for the kind of batch that it will be given. Where the loss, the
    gradient or a log-probability is not finite, state' is state (`update_if_finite`).
    Metrics are `{"means": {name: Mean}, "maxima": {name: scalar}}`. The new state lies where the
    old one lay: left to choose, the compiler would move the norms, and compile for that once more.
    """
    def update(state: TrainState, batch: Any):
        loss, grads, seen = grads_of(
            state.params, batch, cfg=cfg, grpo=grpo, filters=filters, dtype=dtype, layout=layout
        )
        return update_if_finite(state, loss, grads, optimizer, "grpo", seen)

    shardings = state_shardings(cfg, optimizer, layout)
    return jax.jit(update, donate_argnames=("state",), out_shardings=(shardings, None))


def make_logps(cfg: ModelConfig, grpo: GRPOConfig, *, layout: Layout,
               filters: Filters = UNFILTERED, dtype: Any = jnp.float32
               ) -> Callable[..., jax.Array]:
    """The jitted `logps(params, batch) -> logp_QGT` with the training graph, in micro-batches.

    For the old policy, and for the reference.
    """
    def logps(params: Params, batch: Batch) -> jax.Array:
        past = forward.common_past(cast(params, dtype), cfg, batch.prompt_QS, batch.common, layout)

        def one(part: Batch) -> jax.Array:
            return completion_logps(
                params, cfg, part.prompt_QS, part.prompt_lengths_Q, part.tokens_QGT,
                past=past, filters=filters, logit_chunk=grpo.logit_chunk, dtype=dtype,
                layout=layout,
            )[0]

        # Of a whole step's batch: as many as its minibatches are cut into, together.
        part = batch.tokens_QGT.shape[0] // grpo.minibatches
        pieces = grpo.minibatches * _pieces(part, grpo, layout)
        return one(batch) if pieces <= 1 else uncut(jax.lax.map(one, cut(batch, pieces)))

    return jax.jit(logps, out_shardings=layout.sharding("prompts"))


def place(batch: Batch, layout: Layout) -> Batch:
    """Moves a batch to the devices, cut by prompt; each process sends its own devices' part."""
    return share.place(batch, layout.sharding("prompts"))
