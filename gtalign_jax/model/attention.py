"""Attention in three forms over one structure: a group's prompt, and rows that share it.

A group is one sequence of width W = S + G T (padded up for the kernel):

    prompt (S) | row 0 (T) | row 1 (T) | … | row G-1 (T)

A prompt position attends to the prompt before it; a row position to the whole prompt and to its own
row before it. With G = 0 this is causal attention.

    dense    two einsums and one softmax; stores its scores; what every test compares with
    flash    JAX's Pallas splash-attention kernel with that structure as its mask: blocks that
             nobody sees are skipped, no scores are stored, memory does not grow with S T
    shared   dense attention of rows that are apart from their prompt: the decode step

Masks come from lengths. The softmax is float32. This module knows no weights.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from gtalign_jax.model.sharding import Layout

NEG = -1e30  # a masked score: finite, so that a row with nothing to attend to stays finite
LANES = 128  # what the kernel's blocks are multiples of
WIDE_BLOCK = 512  # block of long sequences: fewer, fuller matrix products

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def prompt_mask(lengths_Q: jax.Array, S: int) -> jax.Array:
    """True where a prompt position is real, `[Q, S]`."""
    return jnp.arange(S)[None, :] < lengths_Q[:, None]


def causal(T: int) -> jax.Array:
    return jnp.arange(T)[:, None] >= jnp.arange(T)[None, :]


def padded_width(W: int, layout: Layout | None) -> int:
    """The width that a group of W positions is padded to: a whole number of kernel blocks."""
    if layout is None or not layout.flash:
        return W
    block = _block(W)
    return -(-W // block) * block


def _block(W: int) -> int:
    return WIDE_BLOCK if W >= 4 * WIDE_BLOCK else LANES


def group_attention(S: int, G: int, T: int, lengths_Q: jax.Array,
                    layout: Layout | None) -> Attend:
    """`attend(q_QWKRH, k_QWKH, v_QWKH) -> [Q, W, K, R, H]` of groups with G rows of T positions.

    Queries are scaled already. `lengths_Q` counts each prompt's real positions; what lies past a
    row's own length is the caller's to ignore. On a TPU's mesh it is the kernel, elsewhere dense.
    """
    if layout is not None and layout.flash:
        return functools.partial(_flash, S=S, G=G, T=T, lengths_Q=lengths_Q, layout=layout)
    return functools.partial(_dense, S=S, G=G, T=T, lengths_Q=lengths_Q)


def _dense(q_QWKRH, k_QWKH, v_QWKH, *, S: int, G: int, T: int, lengths_Q) -> jax.Array:
    Q = q_QWKRH.shape[0]
    pk, pv = k_QWKH[:, :S], v_QWKH[:, :S]
    prompt_mask_QS = prompt_mask(lengths_Q, S)
    mask_QSS = causal(S)[None] & prompt_mask_QS[:, None, :]
    out = _attend_prompt(q_QWKRH[:, :S], pk, pv, mask_QSS)
    if G == 0:
        return out
    rows = lambda x: x[:, S:].reshape(Q, G, T, *x.shape[2:])  # noqa: E731
    own_mask = jnp.reshape(causal(T), (1, 1, 1, 1, T, T))
    own = attend_shared(
        rows(q_QWKRH), pk, pv, rows(k_QWKH), rows(v_QWKH), prompt_mask_QS, own_mask
    )
    return jnp.concatenate([out, own.reshape(Q, G * T, *own.shape[3:])], axis=1)


def _attend_prompt(q_QSKRH, k_QSKH, v_QSKH, mask_QSS) -> jax.Array:
    """Causal attention inside the prompt stream."""
    scores = jnp.einsum("QTKRH,QSKH->QKRTS", q_QSKRH, k_QSKH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_QSS[:, None, None], scores, NEG)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_QSKH.dtype)
    return jnp.einsum("QKRTS,QSKH->QTKRH", weights, v_QSKH)


def attend_shared(q_QGTKRH, prompt_k_QSKH, prompt_v_QSKH, own_k_QGCKH, own_v_QGCKH,
                  prompt_mask_QS, own_mask) -> jax.Array:
    """Each row attends to its group's prompt and to itself: one softmax over both parts.

    `own_mask` broadcasts against the own scores `[Q, G, K, R, T, C]`.
    """
    f32 = jnp.float32
    shared = jnp.einsum("QGTKRH,QSKH->QKGRTS", q_QGTKRH, prompt_k_QSKH, preferred_element_type=f32)
    shared = jnp.where(prompt_mask_QS[:, None, None, None, None], shared, NEG)
    own = jnp.einsum("QGTKRH,QGCKH->QGKRTC", q_QGTKRH, own_k_QGCKH, preferred_element_type=f32)
    own = jnp.where(own_mask, own, NEG)
    # The maximum only guards the exponentials; it cancels, so no gradient flows through it.
    top_shared = jax.lax.stop_gradient(shared.max(axis=-1, keepdims=True))
    top_own = jax.lax.stop_gradient(own.max(axis=-1, keepdims=True))
    top = jnp.maximum(jnp.swapaxes(top_shared, 1, 2), top_own)
    shared, own = jnp.exp(shared - jnp.swapaxes(top, 1, 2)), jnp.exp(own - top)
    total = jnp.swapaxes(shared.sum(-1), 1, 2) + own.sum(-1)
    dtype = prompt_v_QSKH.dtype
    out = jnp.einsum("QKGRTS,QSKH->QGTKRH", shared.astype(dtype), prompt_v_QSKH)
    out = out + jnp.einsum("QGKRTC,QGCKH->QGTKRH", own.astype(dtype), own_v_QGCKH)
    return (out / jnp.moveaxis(total, -1, 2)[..., None]).astype(dtype)


class SharedPromptMask(splash_mask.Mask):
    """The group's structure for the kernel: who may attend to whom, apart from prompt lengths.

    Positions past S + G T, the padding, form one more row: they see and disturb nobody else.
    """

    def __init__(self, S: int, G: int, T: int, width: int) -> None:
        at = np.arange(width)
        self._shape = (width, width)
        self._key = (S, G, T, width)
        # Row -1 is the prompt; every row starts after it.
        self._row = np.where(at < S, -1, np.minimum((at - S) // max(T, 1), G))

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def __getitem__(self, index) -> np.ndarray:
        """The mask's block of two slices.

        A block that is all of one row's, or apart from the diagonal, is known without its elements:
        there are thousands of blocks, and the kernel's set-up looks at each of them many times.
        """
        rows, columns = (np.arange(w)[i] for w, i in zip(self._shape, index, strict=True))
        q, k = self._row[rows], self._row[columns]
        if columns[0] > rows[-1] or (q[-1] < k[0]) or (k[0] > -1 and k[-1] < q[0]):
            return np.broadcast_to(False, (len(rows), len(columns)))
        if columns[-1] <= rows[0] and (k[-1] == -1 or k[0] == k[-1] == q[0] == q[-1]):
            return np.broadcast_to(True, (len(rows), len(columns)))
        q, k = q[:, None], k[None, :]
        return (rows[:, None] >= columns[None, :]) & ((q == k) | (k == -1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedPromptMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=16)
def _kernel(S: int, G: int, T: int, width: int, heads: int, interpret: bool):
    """The kernel for one key/value head and its `heads` query heads; cached, its mask is walked."""
    block = _block(width)
    mask = splash_mask.MultiHeadMask([SharedPromptMask(S, G, T, width)] * heads)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mqa_single_device(
            mask=mask, block_sizes=sizes, interpret=interpret
        )
    return jax.tree.map(np.asarray, kernel)  # constants of whatever program, on whatever devices


def _flash(q_QWKRH, k_QWKH, v_QWKH, *, S: int, G: int, T: int, lengths_Q,
           layout: Layout) -> jax.Array:
    """The kernel on every device's share: prompts and key/value heads are cut, sequences whole."""
    width, heads = q_QWKRH.shape[1], q_QWKRH.shape[3]
    kernel = _kernel(S, G, T, width, heads, not layout.is_tpu)

    def local(q_QWKRH, k_QWKH, v_QWKH, lengths_Q):
        # Prompt positions past the prompt's length, and the padding, are a segment of their own.
        at_W = jnp.arange(width)
        outside_QW = (at_W[None, :] >= lengths_Q[:, None]) & (at_W < S)[None, :]
        outside_QW |= (at_W >= S + G * T)[None, :]
        segment_QW = outside_QW.astype(jnp.int32)

        def one_head(q_RWH, k_WH, v_WH, segment_W):
            return kernel(q_RWH, k_WH, v_WH, splash.SegmentIds(segment_W, segment_W))

        per_group = jax.vmap(one_head, in_axes=(0, 0, 0, None))
        out_QKRWH = jax.vmap(per_group)(
            jnp.transpose(q_QWKRH, (0, 2, 3, 1, 4)), jnp.swapaxes(k_QWKH, 1, 2),
            jnp.swapaxes(v_QWKH, 1, 2), segment_QW,
        )
        return jnp.transpose(out_QKRWH, (0, 3, 1, 2, 4))

    spec = layout.rules.spec
    q_spec = spec("prompts", None, "act_heads", None, None)
    kv_spec = spec("prompts", None, "act_heads", None)
    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=(q_spec, kv_spec, kv_spec, spec("prompts")),
        out_specs=q_spec, check_vma=False,
    )(q_QWKRH, k_QWKH, v_QWKH, lengths_Q)
