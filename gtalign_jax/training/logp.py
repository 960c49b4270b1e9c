"""Log-probabilities of completions under a policy, sharing each group's prompt.

The head runs over chunks of the time axis and is recomputed in the backward pass, so no
[.., T, V] array exists: the largest has `logit_chunk` positions per row.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gtalign_jax.model import forward
from gtalign_jax.model.forward import Past
from gtalign_jax.model.sharding import Layout
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.rollout import filters as filters_lib
from gtalign_jax.rollout.filters import UNFILTERED, Filters


def completion_mask(lengths_QG: jax.Array, T: int) -> jax.Array:
    """True where a completion token is real, `[Q, G, T]`."""
    return jnp.arange(T)[None, None, :] < lengths_QG[:, :, None]


def cast(params: Params, dtype) -> Params:
    """The weights in the dtype to compute in; gradients with respect to these are half as large."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


def fed_tokens(last_Q: jax.Array, tokens_QGT: jax.Array) -> jax.Array:
    """What predicts each completion token, `[Q, G, T]`: the token before it, at first the prompt's
    last one."""
    first_QG1 = jnp.broadcast_to(last_Q[:, None, None], (*tokens_QGT.shape[:2], 1))
    return jnp.concatenate([first_QG1.astype(tokens_QGT.dtype), tokens_QGT[:, :, :-1]], axis=2)


def completion_logps(params: Params, cfg: ModelConfig, prompt_QS, prompt_lengths_Q, tokens_QGT, *,
                     filters: Filters = UNFILTERED, logit_chunk: int = 128, dtype=jnp.float32,
                     remat: str = "none", past: Past | None = None,
                     layout: Layout | None = None) -> tuple[jax.Array, jax.Array]:
    """(log-probability, entropy in nats), float32 `[Q, G, T]`, of every completion position.

    Args:
      prompt_QS, prompt_lengths_Q: whole prompts, right-padded, one per group.
      tokens_QGT: completions, right-padded. Values past a row's length are finite and meaningless:
        mask them.
      filters: those of the sampler, so that both sides speak of one distribution.
      dtype: of the matmuls; the log-softmax is float32.
      past: keys and values of the tokens that all prompts begin with (`forward.common_past`).
    """
    params = cast(params, dtype)
    last_Q, stream_lengths_Q = forward.split_prompt(prompt_QS, prompt_lengths_Q)
    rows_QGT = fed_tokens(last_Q, tokens_QGT)
    hidden_QGTD = forward.shared_hidden(
        params, cfg, prompt_QS, stream_lengths_Q, rows_QGT, past=past, remat=remat, layout=layout
    )
    return head(params, cfg, hidden_QGTD, tokens_QGT, filters, logit_chunk, layout)


def head(params: Params, cfg: ModelConfig, hidden_QGTD, tokens_QGT, filters: Filters,
         logit_chunk: int, layout: Layout | None) -> tuple[jax.Array, jax.Array]:
    """(log-probability, entropy) `[Q, G, T]` of tokens after final hidden states."""
    head_VD = forward.head_of(params)
    chunked = functools.partial(_chunked_head, cfg=cfg, filters=filters, logit_chunk=logit_chunk)
    if layout is None:
        return chunked(head_VD, hidden_QGTD, tokens_QGT)
    return _over_devices(chunked, layout)(head_VD, hidden_QGTD, tokens_QGT)


def _over_devices(chunked: Callable, layout: Layout) -> Callable:
    """`chunked` on every device's own prompts and stretch of time, with the whole head.

    By hand, since XLA would sum the head's gradient over the devices anew for every chunk. The
    gradient of this gather is one reduce-scatter. `layout` has the rules of training, which cut the
    head along `embed` and nowhere else.
    """
    columns = layout.rules.embed
    stretches = layout.axis_size("sequence")

    def local(head_VD, hidden_QGTD, tokens_QGT):
        head_VD = jax.lax.all_gather(head_VD, columns, axis=1, tiled=True)
        return chunked(head_VD, hidden_QGTD, tokens_QGT)

    spec = layout.rules.spec
    rows = spec("prompts", None, "sequence")
    mapped = jax.shard_map(
        local, mesh=layout.mesh, check_vma=False, out_specs=(rows, rows),
        in_specs=(spec("vocab", "embed"), spec("prompts", None, "sequence", None), rows),
    )

    def run(head_VD, hidden_QGTD, tokens_QGT):
        T = tokens_QGT.shape[2]
        pad = ((0, 0), (0, 0), (0, -T % stretches))
        # Between the gradient's reduce-scatter and the sum over micro-batches: a pass of the TPU
        # compiler that would move one past the other fails on an untied head (libtpu 0.0.42: a
        # RET_CHECK in while_loop_all_reduce_code_motion).
        head_VD = jax.lax.optimization_barrier(head_VD)
        out = mapped(head_VD, jnp.pad(hidden_QGTD, (*pad, (0, 0))), jnp.pad(tokens_QGT, pad))
        return tuple(x[:, :, :T] for x in out)

    return run


def _chunked_head(head_VD, hidden_QGTD, tokens_QGT, *, cfg: ModelConfig, filters: Filters,
                  logit_chunk: int) -> tuple[jax.Array, jax.Array]:
    """(log-probability, entropy) `[Q, G, T]`, `logit_chunk` positions of every row at a time."""
    Q, G, T, D = hidden_QGTD.shape
    chunks = -(-T // logit_chunk)
    width = -(-T // chunks)
    pad = ((0, 0), (0, 0), (0, chunks * width - T))

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, (*pad, *[(0, 0)] * (x.ndim - 3)))
        x = x.reshape(Q * G, chunks, width, *x.shape[3:])
        return jnp.moveaxis(x, 1, 0).reshape(chunks, Q * G * width, *x.shape[3:])

    logp, entropy = head_logps(head_VD, cut(hidden_QGTD), cut(tokens_QGT), cfg, filters)
    join = lambda x: jnp.moveaxis(  # noqa: E731
        x.reshape(chunks, Q * G, width), 0, 1).reshape(Q, G, chunks * width)[:, :, :T]
    return join(logp), join(entropy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def head_logps(head_VD, hidden_CMD, tokens_CM, cfg: ModelConfig,
               filters: Filters) -> tuple[jax.Array, jax.Array]:
    """(log-probability, entropy) `[C, M]` of tokens after hidden states, one chunk C at a time.

    The gradient is that of the log-probability alone: entropy is reported, not trained. With p the
    distribution, d logp / d logits = onehot(token) - p. No more than one chunk's logits exist at
    any time: a single chunk's are kept for the gradient, of several they are computed anew. The
    head's gradient adds up in float32.
    """
    return _head_forward(head_VD, hidden_CMD, tokens_CM, cfg, filters)[0]


def _chunk_logits(head_VD, hidden_MD, tokens_M, cfg: ModelConfig, filters: Filters) -> jax.Array:
    logits_MV = forward.logits(head_VD, cfg, hidden_MD)
    return filters_lib.apply(logits_MV, filters, keep_ids=tokens_M)


def _head_forward(head_VD, hidden_CMD, tokens_CM, cfg: ModelConfig, filters: Filters):
    def one(hidden_MD, tokens_M):
        logits_MV = _chunk_logits(head_VD, hidden_MD, tokens_M, cfg, filters)
        top_M = logits_MV.max(axis=-1)
        weights_MV = jnp.exp(logits_MV - top_M[:, None])
        sum_M = weights_MV.sum(axis=-1)
        total_M = top_M + jnp.log(sum_M)
        picked_M = jnp.take_along_axis(logits_MV, tokens_M[:, None], axis=-1)[:, 0]
        # Dropped logits are huge and have no weight.
        mean_M = (weights_MV * jnp.maximum(logits_MV, forward.NEG / 2)).sum(axis=-1) / sum_M
        return picked_M - total_M, total_M - mean_M, total_M, weights_MV / sum_M[:, None]

    if len(hidden_CMD) == 1:
        *out, p_MV = one(hidden_CMD[0], tokens_CM[0])
        logp, entropy, total = (x[None] for x in out)
    else:
        logp, entropy, total = jax.lax.map(lambda xs: one(*xs)[:3], (hidden_CMD, tokens_CM))
        p_MV = None
    return (logp, entropy), (head_VD, hidden_CMD, tokens_CM, total, p_MV)


def _head_backward(cfg: ModelConfig, filters: Filters, kept, grads):
    head_VD, hidden_CMD, tokens_CM, total_CM, kept_MV = kept
    scale = 1 / max(filters.temperature, filters_lib.COLDEST) if filters.temperature > 0 else 1.0

    def one(head_grad_DV, xs):
        hidden_MD, tokens_M, total_M, grad_M = xs
        p_MV = kept_MV
        if p_MV is None:
            logits_MV = _chunk_logits(head_VD, hidden_MD, tokens_M, cfg, filters)
            p_MV = jnp.exp(logits_MV - total_M[:, None])
        is_token_MV = jnp.arange(p_MV.shape[-1])[None, :] == tokens_M[:, None]
        scaled_M1 = (scale * grad_M)[:, None]
        dlogits_MV = (jnp.where(is_token_MV, scaled_M1, 0.0) - scaled_M1 * p_MV).astype(
            head_VD.dtype)
        hidden_grad = jnp.einsum("MV,VD->MD", dlogits_MV, head_VD)
        head_grad_DV += jnp.einsum("MD,MV->DV", hidden_MD, dlogits_MV,
                                   preferred_element_type=jnp.float32)
        return head_grad_DV, hidden_grad

    start = jnp.zeros(head_VD.shape[::-1], jnp.float32)
    head_grad_DV, hidden_grads = jax.lax.scan(
        one, start, (hidden_CMD, tokens_CM, total_CM, grads[0]))
    return head_grad_DV.T.astype(head_VD.dtype), hidden_grads, None


head_logps.defvjp(_head_forward, _head_backward)
