"""The GRPO update on packed completions: the same loss and gradient, without padding.

    Batch, Placed  --pack-->  Packed  --update-->  state'

Prompts go forward once, the prefix common to all of them before them; then completions, bin after
bin (`training.packing`), attend to their keys and values. What all bins say about those adds up and
goes back through the prompts once. The loop over micro-batches of bins ends with the last bin that
is in use, so shapes are static and padding is not computed.

Weights are those of the whole batch, so rows that are left out change no other row's gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gtalign_jax.model import forward
from gtalign_jax.model.attend_dense import Tags
from gtalign_jax.model.forward import Bins, Past
from gtalign_jax.model.sharding import Layout
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.rollout.filters import UNFILTERED, Filters
from gtalign_jax.training import grpo as grpo_lib
from gtalign_jax.training.grpo import Batch, GRPOConfig, Tokens, objective, token_weights
from gtalign_jax.training.logp import cast, fed_tokens, head
from gtalign_jax.training.micro import accumulate_some
from gtalign_jax.training.packing import Placed, take


@struct.dataclass
class Packed:
    """A batch in bins, X batch shards of N each, `[X, N, W]`; 0 where nothing lies. N is a whole
    number of micro-batches.

    inputs, targets: the token fed and the one that is learnt. positions: in the whole sequence.
    placed: what lies where. tokens: what the loss needs. pieces: micro-batches of bins in use.
    prompt_QS, lengths_Q: prompt streams (without their last token). rows: per shard. common: as in
    `Batch`.
    """

    inputs: jax.Array
    targets: jax.Array
    positions: jax.Array
    placed: Placed
    tokens: Tokens
    pieces: jax.Array
    prompt_QS: jax.Array
    lengths_Q: jax.Array
    rows: int = struct.field(pytree_node=False)
    common: int = struct.field(pytree_node=False)

    @property
    def logps(self) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Of the sampler, the old policy and the reference."""
        return self.tokens.sampler_logp, self.tokens.old_logp, self.tokens.ref_logp

    def with_logps(self, old: jax.Array | None, ref: jax.Array | None) -> "Packed":
        return self.replace(tokens=self.tokens.replace(old_logp=old, ref_logp=ref))


def pack(batch: Batch, placed: Placed, pieces: jax.Array, grpo: GRPOConfig) -> Packed:
    """The batch as `placed` says; all on the device."""
    Q, G, T = batch.tokens_QGT.shape
    last_Q, lengths_Q = forward.split_prompt(batch.prompt_QS, batch.prompt_lengths_Q)
    weights_QGT = token_weights(batch.lengths_QG, batch.valid_QG, T, grpo.aggregation)
    start_QG = jnp.broadcast_to(lengths_Q[:, None], (Q, G))
    at = functools.partial(take, placed=placed)
    maybe = lambda x: None if x is None else at(x)  # noqa: E731
    rows = Q * G // placed.row_XNW.shape[0]
    tokens = Tokens(
        mask=placed.row_XNW < rows, weights=at(weights_QGT), adv=at(batch.adv_QG),
        sampler_logp=at(batch.sampler_logp_QGT), old_logp=maybe(batch.old_logp_QGT),
        ref_logp=maybe(batch.ref_logp_QGT),
    )
    return Packed(
        inputs=at(fed_tokens(last_Q, batch.tokens_QGT)), targets=at(batch.tokens_QGT),
        positions=at(start_QG) + placed.offset_XNW, placed=placed, tokens=tokens, pieces=pieces,
        prompt_QS=batch.prompt_QS, lengths_Q=lengths_Q, rows=rows, common=batch.common,
    )


def _piece(packed: Packed, i: jax.Array, size: int) -> Packed:
    """Bins i size … of every shard, with nothing that is not cut by bins."""
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)  # noqa: E731
    return jax.tree.map(part, packed.replace(pieces=None, prompt_QS=None, lengths_Q=None))


def _logps(params: Params, past: Past | None, prompts: tuple[jax.Array, jax.Array], piece: Packed,
           lengths_Q, *, cfg: ModelConfig, grpo: GRPOConfig, filters: Filters,
           layout: Layout | None) -> tuple[jax.Array, jax.Array]:
    """(log-probability, entropy) `[X, n, W]` of the tokens of n bins per shard."""
    X, n, W = piece.inputs.shape
    m = piece.placed.groups_XNm.shape[2]
    merge = lambda x: x.reshape(X * n, *x.shape[2:])  # noqa: E731

    def of_groups(x_Q: jax.Array) -> jax.Array:
        x_XQ = x_Q.reshape(X, x_Q.shape[0] // X, *x_Q.shape[1:])
        return merge(jax.vmap(lambda x, at: x[at])(x_XQ, piece.placed.groups_XNm))

    def before(x_LQSKH: jax.Array) -> jax.Array:
        taken = jax.vmap(of_groups)(x_LQSKH)
        return taken.reshape(*taken.shape[:2], m * taken.shape[3], *taken.shape[4:])

    tags = Tags(merge(piece.placed.row_XNW), merge(piece.placed.slot_XNW))
    bins = Bins(merge(piece.inputs), merge(piece.positions), tags, *map(before, prompts),
                of_groups(lengths_Q - piece.common))
    hidden_BWD = forward.packed_hidden(params, cfg, bins, past=past, remat=grpo.remat,
                                       layout=layout)
    out = head(params, cfg, hidden_BWD[:, None], merge(piece.targets)[:, None], filters,
               grpo.logit_chunk, layout)
    return tuple(x.reshape(X, n, W) for x in out)


def _row_mean(piece: Packed, x_XNW: jax.Array) -> jax.Array:
    """For every token the mean over its completion, which lies in one bin."""
    of_row = jax.vmap(lambda x, row: jnp.zeros(piece.rows + 1).at[row].add(x))
    sums, counts = (of_row(x.astype(jnp.float32), piece.placed.row_XNW)
                    for x in (x_XNW, piece.tokens.mask))
    means_XR = sums / jnp.maximum(counts, 1)
    return jax.vmap(lambda x, row: x[row])(means_XR, piece.placed.row_XNW)


def _prompts(weights: Params, past: Past | None, packed: Packed, cfg: ModelConfig,
             grpo: GRPOConfig, layout: Layout | None):
    return forward.prompt_keys(weights, cfg, packed.prompt_QS, packed.lengths_Q, layout, past,
                               grpo.remat)


def loss_and_grads(params: Params, packed: Packed, *, cfg: ModelConfig, grpo: GRPOConfig,
                   filters: Filters = UNFILTERED, dtype: Any = jnp.float32,
                   layout: Layout | None = None):
    """(loss, gradients, metrics) of a batch: those of `grpo.loss_and_grads`."""
    weights = cast(params, dtype)
    past, back_past = jax.vjp(lambda weights: forward.common_past(
        weights, cfg, packed.prompt_QS, packed.common, layout, grpo.remat), weights)
    prompts, back_prompts = jax.vjp(
        lambda weights, past: _prompts(weights, past, packed, cfg, grpo, layout), weights, past)

    def loss(weights: Params, past: Past | None, prompts, piece: Packed):
        logp, entropy = _logps(weights, past, prompts, piece, packed.lengths_Q, cfg=cfg, grpo=grpo,
                               filters=filters, layout=layout)
        return objective(logp, entropy, piece.tokens, functools.partial(_row_mean, piece), grpo)

    def one(i):
        piece = _piece(packed, i, grpo.pack_rows)
        both = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (value, seen), grads = both(weights, past, prompts, piece)
        return (value, *grads, seen["means"]), seen["maxima"]

    (value, grads, past_grads, prompt_grads, means), maxima = accumulate_some(one, packed.pieces)
    like = lambda grads, of: jax.tree.map(lambda g, x: g.astype(x.dtype), grads, of)  # noqa: E731
    more, past_more = back_prompts(like(prompt_grads, prompts))
    parts = [more]
    if past is not None:
        total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), past_grads, past_more)
        parts += back_past(like(total, past))
    for part in parts:
        grads = jax.tree.map(lambda g, x: g + x.astype(g.dtype), grads, part)
    return value, grads, {"means": means, "maxima": maxima}


make_update = functools.partial(grpo_lib.make_update, grads_of=loss_and_grads)


def make_logps(cfg: ModelConfig, grpo: GRPOConfig, *, layout: Layout,
               filters: Filters = UNFILTERED, dtype: Any = jnp.float32
               ) -> Callable[..., jax.Array]:
    """The jitted `logps(params, packed) -> logp_XNW`; 0 in bins that are not in use."""
    def logps(params: Params, packed: Packed) -> jax.Array:
        weights = cast(params, dtype)
        past = forward.common_past(weights, cfg, packed.prompt_QS, packed.common, layout)
        prompts = _prompts(weights, past, packed, cfg, grpo, layout)

        def one(i, logp_XNW):
            piece = _piece(packed, i, grpo.pack_rows)
            new, _ = _logps(weights, past, prompts, piece, packed.lengths_Q, cfg=cfg, grpo=grpo,
                            filters=filters, layout=layout)
            return jax.lax.dynamic_update_slice_in_dim(logp_XNW, new, i * grpo.pack_rows, axis=1)

        return jax.lax.fori_loop(0, packed.pieces, one, jnp.zeros(packed.inputs.shape))

    return jax.jit(logps, out_shardings=layout.sharding("prompts"))
