"""Log-probabilities of completions under a policy, sharing each group's prompt.

The head runs over chunks of the time axis and is recomputed in the backward pass, so no
[.., T, V] array exists: the largest has `logit_chunk` positions per row.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gtalign_jax.model import forward
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


def completion_logps(params: Params, cfg: ModelConfig, prompt_QS, prompt_lengths_Q, tokens_QGT, *,
                     filters: Filters = UNFILTERED, logit_chunk: int = 128, dtype=jnp.float32,
                     remat: str = "none",
                     layout: Layout | None = None) -> tuple[jax.Array, jax.Array]:
    """(log-probability, entropy in nats), float32 `[Q, G, T]`, of every completion position.

    Args:
      prompt_QS, prompt_lengths_Q: whole prompts, right-padded, one per group.
      tokens_QGT: completions, right-padded. Values past a row's length are finite and meaningless:
        mask them.
      filters: those of the sampler, so that both sides speak of one distribution.
      dtype: of the matmuls; the log-softmax is float32.
    """
    params = cast(params, dtype)
    last_Q, stream_lengths_Q = forward.split_prompt(prompt_QS, prompt_lengths_Q)
    first_QG1 = jnp.broadcast_to(last_Q[:, None, None], (*tokens_QGT.shape[:2], 1))
    rows_QGT = jnp.concatenate([first_QG1.astype(tokens_QGT.dtype), tokens_QGT[:, :, :-1]], axis=2)
    hidden_QGTD = forward.shared_hidden(
        params, cfg, prompt_QS, stream_lengths_Q, rows_QGT, remat=remat, layout=layout
    )
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
    """(log-probability, entropy) `[Q, G, T]`, `logit_chunk` positions at a time."""
    Q, G, T, D = hidden_QGTD.shape
    dtype = head_VD.dtype
    head_VD = head_VD.astype(jnp.float32)  # so that its gradient adds up over chunks in float32
    chunks = -(-T // logit_chunk)
    width = -(-T // chunks)
    pad = chunks * width - T
    hidden_QGTD = jnp.pad(hidden_QGTD, ((0, 0), (0, 0), (0, pad), (0, 0)))
    tokens_QGT = jnp.pad(tokens_QGT, ((0, 0), (0, 0), (0, pad)))

    @jax.checkpoint
    def head(hidden_QGCD, tokens_QGC):
        logits_QGCV = forward.logits(head_VD.astype(dtype), cfg, hidden_QGCD)
        logits_QGCV = filters_lib.apply(logits_QGCV, filters, keep_ids=tokens_QGC)
        total_QGC = jax.nn.logsumexp(logits_QGCV, axis=-1)
        # A masked sum, not a gather, whose gradient would be a scatter into zeros `[Q, G, C, V]`.
        ids_V = jnp.arange(logits_QGCV.shape[-1])
        is_token = ids_V[None, None, None, :] == tokens_QGC[..., None]
        picked = jnp.where(is_token, logits_QGCV, 0.0).sum(axis=-1)
        p_QGCV = jnp.exp(jax.lax.stop_gradient(logits_QGCV - total_QGC[..., None]))
        # Entropy is reported, not trained: no gradient, so nothing is kept for it.
        entropy_QGC = jax.lax.stop_gradient(total_QGC) - (
            p_QGCV * jax.lax.stop_gradient(logits_QGCV)
        ).sum(axis=-1)
        return picked - total_QGC, entropy_QGC

    if chunks == 1:
        return head(hidden_QGTD, tokens_QGT)
    hidden = jnp.moveaxis(hidden_QGTD.reshape(Q, G, chunks, width, D), 2, 0)
    tokens = jnp.moveaxis(tokens_QGT.reshape(Q, G, chunks, width), 2, 0)
    logp, entropy = jax.lax.map(lambda xs: head(*xs), (hidden, tokens))
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(Q, G, chunks * width)[:, :, :T]  # noqa: E731
    return join(logp), join(entropy)
