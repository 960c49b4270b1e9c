"""Attention of whole sequences: a group's prompt, the rows that share it, and what came before.

A group is one sequence of width W = S + G T (padded up for the kernel):

    past (P) | prompt (S) | row 0 (T) | row 1 (T) | … | row G-1 (T)

A prompt position attends to the past and to the prompt before it; a row position to the past, the
whole prompt and its own row before it. With G = 0 this is causal attention. The past, a prefix
common to all groups, is given as keys and values; no position of it is computed here.

    dense    matrix products (`attend_dense`); what every test compares with
    flash    JAX's Pallas splash-attention kernel with that structure as its mask: blocks that
             nobody sees are skipped, no scores are stored, memory does not grow with S T

Masks come from lengths. The softmax is float32. This module knows no weights. Rows that generate
have their own form, `attend_cached`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from gtalign_jax.model import attend_dense
from gtalign_jax.model.attend_dense import Before, Rows, Tags, attend
from gtalign_jax.model.sharding import Layout, platform_of

LANES = 128  # what the kernel's blocks are multiples of
WIDE_BLOCK = 512  # block of long sequences: fewer, fuller matrix products

Attend = Callable[..., jax.Array]


def prompt_mask(lengths_Q: jax.Array, S: int) -> jax.Array:
    """True where a prompt position is real, `[Q, S]`."""
    return jnp.arange(S)[None, :] < lengths_Q[:, None]


def padded_width(W: int, layout: Layout | None) -> int:
    """The width that a group of W positions is padded to: a whole number of kernel blocks."""
    if layout is None or not layout.flash:
        return W
    block = _block(W)
    return -(-W // block) * block


def _block(W: int) -> int:
    return WIDE_BLOCK if W >= 4 * WIDE_BLOCK else LANES


def group_attention(S: int, G: int, T: int, P: int, lengths_Q: jax.Array,
                    layout: Layout | None) -> Attend:
    """`attend(q_QWKRH, k_QWKH, v_QWKH, *past) -> [Q, W, K, R, H]` of groups with G rows of T.

    `past` is nothing where P = 0, else keys and values `[X, P, K, H]` for X batch shards. Queries
    are scaled already. `lengths_Q` counts each prompt's real positions of S; what lies past a row's
    own length is the caller's to ignore. On a TPU's mesh it is the kernel, elsewhere dense.
    """
    flash = layout is not None and layout.flash
    platform = platform_of(layout)
    more = {"interpret": platform != "tpu"} if flash else {
        "scores": attend_dense.scores_for(platform)}
    local = functools.partial(_flash if flash else _dense, S=S, G=G, T=T, P=P, **more)
    return functools.partial(_on_shares(local, lengths_Q, layout), lengths_Q)


def _on_shares(local: Callable, of_prompts, layout: Layout | None) -> Callable[..., jax.Array]:
    """`local(of_prompts, q, *keys and values)` by hand on every device's share: prompts and
    key/value heads are cut, sequences whole. As it is where the devices do not divide the prompts.

    `of_prompts`: a tree of arrays `[Q, …]` that do not depend on heads.
    """
    prompts = len(jax.tree.leaves(of_prompts)[0])
    if layout is None or prompts % layout.axis_size("prompts"):
        return local
    spec = layout.rules.spec
    kv_spec = spec("prompts", None, "act_heads", None)
    q_spec = spec("prompts", None, "act_heads", None, None)

    def run(of_prompts, q, *kv) -> jax.Array:
        specs = (jax.tree.map(lambda _: spec("prompts"), of_prompts), q_spec, *[kv_spec] * len(kv))
        mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=q_spec,
                               check_vma=False)
        return mapped(of_prompts, q, *kv)

    return run


def packed_attention(lengths_Bm: jax.Array, tags: Tags, layout: Layout | None) -> Attend:
    """`attend(q_BWKRH, k_BWKH, v_BWKH, *past, prompts_k, prompts_v) -> [B, W, K, R, H]` of bins in
    which completions stand side by side (`training.packing`).

    `past` as in `group_attention`; the prompts are `[B, m S, K, H]`, `lengths_Bm` of each real.
    Raises ValueError where attention is the kernel, which knows no such rows.
    """
    if layout is not None and layout.flash:
        raise ValueError(
            "grpo.pack with model.attention='flash': the kernel knows no packed rows; set "
            "model.attention='dense', or grpo.pack=0"
        )
    most = attend_dense.scores_for(platform_of(layout))

    def local(of_bins: tuple[jax.Array, Tags], q, k, v, *before) -> jax.Array:
        lengths_Bm, tags = of_bins
        past = tuple(x[0] for x in before[:-2]) or (jnp.zeros((0, *k.shape[2:]), k.dtype),) * 2
        rows, tags = jax.tree.map(lambda x: x[:, None], (Rows(q, k, v), tags))
        return attend(rows, Before(*past, *before[-2:], lengths_Bm, tags), most)[:, 0]

    of_bins = (lengths_Bm, tags)
    return functools.partial(_on_shares(local, of_bins, layout), of_bins)


def _dense(lengths_Q, q_QWKRH, k_QWKH, v_QWKH, past_k_XPKH=None, past_v_XPKH=None, *, S: int,
           G: int, T: int, P: int, scores: int) -> jax.Array:
    """Prompts first, each a row with nothing but the past before it; then the rows."""
    (Q, _, K, _, H), dtype = q_QWKRH.shape, k_QWKH.dtype
    past = (jnp.zeros((0, K, H), dtype),) * 2 if P == 0 else (past_k_XPKH[0], past_v_XPKH[0])
    everything = (q_QWKRH, k_QWKH, v_QWKH)
    prompts = Rows(*(x[:, None, :S] for x in everything))
    nothing = (jnp.zeros((Q, 0, K, H), dtype),) * 2
    out = attend(prompts, Before(*past, *nothing, lengths_Q[:, None]), scores)[:, 0]
    if G == 0:
        return out
    rows = Rows(*(x[:, S:].reshape(Q, G, T, *x.shape[2:]) for x in everything))
    own = attend(rows, Before(*past, *(x[:, 0] for x in prompts[1:]), lengths_Q[:, None]), scores)
    return jnp.concatenate([out, own.reshape(Q, G * T, *own.shape[3:])], axis=1)


class SharedPromptMask(splash_mask.Mask):
    """The group's structure for the kernel: who may attend to whom, apart from prompt lengths.

    The first `past` columns are the past, which all see. Positions past S + G T, the padding, form
    one more row: they see and disturb nobody else.
    """

    def __init__(self, S: int, G: int, T: int, width: int, past: int = 0) -> None:
        at = np.arange(width)
        self._shape = (width, past + width)
        self._key = (S, G, T, width, past)
        self._past = past
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
        columns = columns - self._past
        if columns[0] < 0 and columns[-1] >= 0:  # a block of both: the kernel has none
            past = np.broadcast_to(True, (len(rows), int((columns < 0).sum())))
            start, stop, _ = index[1].indices(self._shape[1])
            rest = self[index[0], slice(self._past, stop)]
            return np.concatenate([past, rest], axis=1)
        if columns[-1] < 0:
            return np.broadcast_to(True, (len(rows), len(columns)))
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
def _kernel(S: int, G: int, T: int, width: int, past: int, heads: int, interpret: bool):
    """The kernel for one key/value head and its `heads` query heads; cached, its mask is walked."""
    block = _block(width)
    mask = splash_mask.MultiHeadMask([SharedPromptMask(S, G, T, width, past)] * heads)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mqa_single_device(
            mask=mask, block_sizes=sizes, interpret=interpret
        )
    return jax.tree.map(np.asarray, kernel)  # constants of whatever program, on whatever devices


def _flash(lengths_Q, q_QWKRH, k_QWKH, v_QWKH, past_k_XPKH=None, past_v_XPKH=None, *, S: int,
           G: int, T: int, P: int, interpret: bool) -> jax.Array:
    """The kernel; the past stands before every group's own keys, padded to whole blocks."""
    Q, width, _, heads, _ = q_QWKRH.shape
    past = -(-P // _block(width)) * _block(width)
    kernel = _kernel(S, G, T, width, past, heads, interpret)
    # Prompt positions past the prompt's length, and all padding, are a segment of their own.
    at_W = jnp.arange(width)
    outside_QW = (at_W[None, :] >= lengths_Q[:, None]) & (at_W < S)[None, :]
    outside_QW |= (at_W >= S + G * T)[None, :]
    before_QP = jnp.broadcast_to((jnp.arange(past) >= P)[None], (Q, past))
    keys = jnp.concatenate([before_QP, outside_QW], axis=1).astype(jnp.int32)

    def behind_past(x_QWKH, past_XPKH):
        if past_XPKH is None:
            return x_QWKH
        before = jnp.pad(past_XPKH, ((0, 0), (0, past - P), (0, 0), (0, 0)))
        before = jnp.broadcast_to(before, (Q, *before.shape[1:]))
        return jnp.concatenate([before, x_QWKH], axis=1)

    def one_head(q_RWH, k_CH, v_CH, query_W, key_C):
        return kernel(q_RWH, k_CH, v_CH, splash.SegmentIds(query_W, key_C))

    per_group = jax.vmap(one_head, in_axes=(0, 0, 0, None, None))
    out_QKRWH = jax.vmap(per_group)(
        jnp.transpose(q_QWKRH, (0, 2, 3, 1, 4)),
        jnp.swapaxes(behind_past(k_QWKH, past_k_XPKH), 1, 2),
        jnp.swapaxes(behind_past(v_QWKH, past_v_XPKH), 1, 2),
        outside_QW.astype(jnp.int32), keys,
    )
    return jnp.transpose(out_QKRWH, (0, 3, 1, 2, 4))
