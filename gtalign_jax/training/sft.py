"""Cold start: supervised fine-tuning on rendered reasoning chains.

    loss = -mean over completion tokens of log p(token | prompt, tokens before)

The loss is on the completion alone (its stop token included), never on the prompt, nor on a part
of the completion that was given to the model (a matrix that prices have edited). A row is a
group of one, so that this stage runs the very forward pass of the GRPO update.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from gtalign_jax.data.batches import epoch_rows, pad_right
from gtalign_jax.model.forward import check_remat
from gtalign_jax.model.sharding import Layout, prompt_shards
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.training.logp import cast, completion_logps, completion_mask
from gtalign_jax.training.metrics import Mean
from gtalign_jax.training.micro import accumulate, piece_count
from gtalign_jax.training.state import (
    OptimizerConfig,
    TrainState,
    state_shardings,
    update_if_finite,
)


@dataclasses.dataclass(frozen=True)
class SFTConfig(OptimizerConfig):
    """The cold-start stage."""

    steps: int = 100
    batch_size: int = 32  # rows per update
    micro_batch_size: int = 0  # rows per forward/backward and batch shard; 0: all
    examples: str = "builtin"  # "builtin", or a JSONL file of {"messages", "completion"}
    repriced: float = 0.0  # share of built-in chains whose matrix a random price has edited
    max_completion_tokens: int = 1024
    logit_chunk: int = 128
    remat: str = "none"  # what the backward pass computes anew: model.forward.REMAT_POLICIES
    log_every: int = 20  # steps between lines on the console; the files get every step

    def __post_init__(self) -> None:
        super().__post_init__()
        check_remat(self.remat)
        if not 0 <= self.repriced <= 1:
            raise ValueError(f"sft.repriced={self.repriced}: must be a share, from 0 to 1")
        if self.repriced and self.examples != "builtin":
            raise ValueError(
                f"sft.repriced={self.repriced}, sft.examples={self.examples!r}: only built-in "
                "chains can be rewritten for other prices; allowed with a file: 0"
            )
        if self.log_every < 1:
            raise ValueError(f"sft.log_every={self.log_every}: must be >= 1")


@struct.dataclass
class SFTBatch:
    """Prompts `[B, S]` and completions `[B, T]`, right-padded, with their lengths.

    given_B2: first and last-plus-one position of completion tokens that were given to the model,
    not written by it; None where there are none in the whole data.
    """

    prompt_BS: jax.Array
    prompt_lengths_B: jax.Array
    tokens_BT: jax.Array
    lengths_B: jax.Array
    given_B2: jax.Array | None = None


def loss_and_grads(params: Params, batch: SFTBatch, *, cfg: ModelConfig, sft: SFTConfig,
                   dtype: Any = jnp.float32, layout: Layout | None = None):
    """(mean negative log-likelihood in nats per token, gradients), exact under micro-batches."""
    B, T = batch.tokens_BT.shape
    live_BT = completion_mask(batch.lengths_B[:, None], T)[:, 0]
    if batch.given_B2 is not None:
        at_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
        live_BT &= (at_BT < batch.given_B2[:, :1]) | (at_BT >= batch.given_B2[:, 1:])
    weights_BT = live_BT / jnp.maximum(live_BT.sum(), 1)

    def loss(params: Params, part: SFTBatch, weights: jax.Array) -> jax.Array:
        logp_B1T, _ = completion_logps(
            params, cfg, part.prompt_BS, part.prompt_lengths_B, part.tokens_BT[:, None],
            logit_chunk=sft.logit_chunk, dtype=dtype, remat=sft.remat,
            layout=layout,
        )
        return -(jnp.where(weights > 0, logp_B1T[:, 0], 0.0) * weights).sum()

    weights = cast(params, dtype)

    def one(piece: tuple[SFTBatch, jax.Array]):
        return jax.value_and_grad(loss)(weights, *piece), {}

    shards = prompt_shards(layout)
    pieces = piece_count(B, sft.micro_batch_size, shards)
    (total, grads), _ = accumulate(one, (batch, weights_BT), pieces)
    return total, grads


def make_update(cfg: ModelConfig, sft: SFTConfig, optimizer: optax.GradientTransformation, *,
                layout: Layout, dtype: Any = jnp.float32) -> Callable:
    """The jitted `update(state, batch) -> (state', metrics)`; `state` is donated and stays put.

    It stays as it was where loss or gradient is not finite.
    """
    def update(state: TrainState, batch: SFTBatch):
        loss, grads = loss_and_grads(state.params, batch, cfg=cfg, sft=sft, dtype=dtype,
                                     layout=layout)
        tokens = Mean(batch.lengths_B.sum().astype(jnp.float32), jnp.ones(()))
        seen = {"means": {"sft/tokens": tokens}, "maxima": {}}
        return update_if_finite(state, loss, grads, optimizer, "sft", seen)

    shardings = state_shardings(cfg, optimizer, layout)
    return jax.jit(update, donate_argnames=("state",), out_shardings=(shardings, None))


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """Tokenised (prompt, completion) pairs. `batch(step)` is a pure function of seed and step.

    given: for each completion the span of its tokens without loss, (0, 0) for none; None: nowhere.
    """

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    prompt_width: int
    completion_width: int
    given: Sequence[tuple[int, int]] | None = None

    def batch(self, step: int, *, batch_size: int, seed: int) -> SFTBatch:
        """Rows `step * batch_size …` of an endless sequence of shuffled epochs."""
        stream = range(step * batch_size, (step + 1) * batch_size)
        rows = epoch_rows(len(self.prompts), stream, seed)
        prompt_BS, prompt_lengths_B = pad_right([self.prompts[i] for i in rows], self.prompt_width)
        tokens_BT, lengths_B = pad_right([self.completions[i] for i in rows], self.completion_width)
        given_B2 = self.given and np.array([self.given[i] for i in rows], np.int32)
        return SFTBatch(prompt_BS, prompt_lengths_B, tokens_BT, lengths_B, given_B2)
