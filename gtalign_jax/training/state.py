"""What training carries from step to step, and the optimizer that moves it.

`TrainState` holds float32 master parameters, the optimizer's state and the number of optimizer
updates done. Schedules count those updates, never micro-batches or rollout steps.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from gtalign_jax.model.sharding import Layout, param_shardings, placed
from gtalign_jax.model.spec import ModelConfig, Params, abstract_params
from gtalign_jax.training.metrics import NONFINITE, Mean

DECAYS = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, decay and gradient clipping."""

    learning_rate: float = 1e-6
    warmup_updates: int = 0  # linear from 0; update number warmup_updates runs at learning_rate
    decay: str = "constant"  # after warm-up, to `final_fraction` when all updates are done
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"decay={self.decay!r}: expected one of {DECAYS}")
        for key in ("learning_rate", "clip_norm", "eps"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be > 0")
        if self.warmup_updates < 0:
            raise ValueError(f"warmup_updates={self.warmup_updates}: must be >= 0")


@struct.dataclass
class TrainState:
    """params: float32 master weights; opt_state: optax's; updates: optimizer updates done."""

    params: Params
    opt_state: Any
    updates: jax.Array


def schedule(cfg: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate of update number n = 0, 1, … ."""
    peak, rest = cfg.learning_rate, max(total_updates - cfg.warmup_updates, 1)
    match cfg.decay:
        case "linear":
            after = optax.linear_schedule(peak, peak * cfg.final_fraction, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, cfg.final_fraction)
        case _:
            after = optax.constant_schedule(peak)
    if cfg.warmup_updates == 0:
        return after
    warmup = optax.linear_schedule(0.0, peak, cfg.warmup_updates)
    return optax.join_schedules([warmup, after], [cfg.warmup_updates])


def make_optimizer(cfg: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; weight decay spares norms and biases."""
    def decayed(params: Params) -> Any:
        def is_matrix(path: Any, leaf: Any) -> bool:
            name = jax.tree_util.keystr(path)
            return "norm" not in name and "bias" not in name

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(
            schedule(cfg, total_updates), cfg.b1, cfg.b2, cfg.eps,
            weight_decay=cfg.weight_decay, mask=decayed,
        ),
    )


def state_shardings(cfg: ModelConfig, optimizer: optax.GradientTransformation,
                    layout: Layout) -> TrainState:
    """Shardings in the shape of `TrainState`: moments lie where their weights lie."""
    abstract = jax.eval_shape(lambda p: new_state(p, optimizer), abstract_params(cfg))
    params = param_shardings(cfg, layout)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, abstract.opt_state, params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(params, opt_state, everywhere)


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_state(params: Params, cfg: ModelConfig, optimizer: optax.GradientTransformation,
               layout: Layout) -> TrainState:
    """`new_state`, laid out by rule. It takes `params` over: they are deleted, not copied."""
    return make_start(cfg, optimizer, layout)(params)


def make_start(cfg: ModelConfig, optimizer: optax.GradientTransformation,
               layout: Layout) -> Callable[[Params], TrainState]:
    """The jitted function inside `make_state`."""
    return jax.jit(
        lambda p: new_state(p, optimizer), donate_argnums=0,
        out_shardings=state_shardings(cfg, optimizer, layout),
    )


def discard(params: Params) -> None:
    """Frees weights that nobody needs any more, whoever still holds them."""
    for x in jax.tree.leaves(params):
        x.delete()


def abstract_state(cfg: ModelConfig, optimizer: optax.GradientTransformation,
                   layout: Layout) -> TrainState:
    """`ShapeDtypeStruct`s with shardings in the shape of `TrainState`, to restore into."""
    shapes = jax.eval_shape(lambda p: new_state(p, optimizer), abstract_params(cfg))
    return placed(shapes, state_shardings(cfg, optimizer, layout))


def apply_gradients(state: TrainState, grads: Params,
                    optimizer: optax.GradientTransformation) -> TrainState:
    """One optimizer update."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.updates + 1)


def update_if_finite(state: TrainState, loss: jax.Array, grads: Params,
                     optimizer: optax.GradientTransformation, stage: str, seen: dict[str, Any]
                     ) -> tuple[TrainState, dict[str, Any]]:
    """(state after one optimizer update, the metrics `seen` with those of the update).

    Where the loss, the gradient's norm or what a maximum of `seen` under NONFINITE is about is not
    finite, the state comes out as it was, to the last bit: the update is skipped.
    """
    norm, one = optax.tree.norm(grads), jnp.ones(())
    maxima = seen["maxima"] | {
        f"{NONFINITE}{name}": (~jnp.isfinite(x)).astype(jnp.float32)
        for name, x in (("loss", loss), ("gradient", norm))
    }
    flags = [x for name, x in maxima.items() if name.startswith(NONFINITE)]
    skipped = functools.reduce(jnp.maximum, flags)
    means = seen["means"] | {
        f"{stage}/{name}": Mean(x, one)
        for name, x in (("loss", loss), ("grad_norm", norm), ("skipped", skipped))
    }
    # A choice by element is made where a leaf is written; a branch would hold the state twice.
    new = jax.tree.map(lambda new, old: jnp.where(skipped > 0, old, new),
                       apply_gradients(state, grads, optimizer), state)
    return new, {"means": means, "maxima": maxima}


def named_key(key: jax.Array, name: str, step: int) -> jax.Array:
    """A key by name and step: nothing is threaded through a loop, so a resumed run repeats it."""
    named = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    return jax.random.fold_in(named, step)
