"""Attention of whole sequences: a group's prompt, the rows that share it, and what came before.

A group is one sequence of width W = S + G T (padded up for the kernel):

    past (P) | prompt (S) | row 0 (T) | row 1 (T) | … | row G-1 (T)

A prompt position attends to the past and to the prompt before it; a row position to the past, the
whole prompt and its own row before it. With G = 0 this is causal attention. The past, a prefix
common to all groups, is given as keys and values; no position of it is computed here.

    dense    matrix products and one softmax, a bounded number of scores at a time; what every test
             compares with
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

from gtalign_jax.model.sharding import Layout

NEG = -1e30  # a masked score: finite, so that a row with nothing to attend to stays finite
LANES = 128  # what the kernel's blocks are multiples of
WIDE_BLOCK = 512  # block of long sequences: fewer, fuller matrix products

SCORES = 2**21  # of dense attention, at a time: 8 MB stay in a CPU's cache; more is not faster

Attend = Callable[..., jax.Array]


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


def group_attention(S: int, G: int, T: int, P: int, lengths_Q: jax.Array,
                    layout: Layout | None) -> Attend:
    """`attend(q_QWKRH, k_QWKH, v_QWKH, *past) -> [Q, W, K, R, H]` of groups with G rows of T.

    `past` is nothing where P = 0, else keys and values `[X, P, K, H]` for X batch shards. Queries
    are scaled already. `lengths_Q` counts each prompt's real positions of S; what lies past a row's
    own length is the caller's to ignore. On a TPU's mesh it is the kernel, elsewhere dense.
    """
    flash = layout is not None and layout.flash
    local = functools.partial(_flash if flash else _dense, S=S, G=G, T=T, P=P)
    if flash:
        local = functools.partial(local, interpret=not layout.is_tpu)
    if layout is None or lengths_Q.shape[0] % layout.axis_size("prompts"):
        return lambda *qkv: local(lengths_Q, *qkv)
    # By hand on every device's share: prompts and key/value heads are cut, sequences whole.
    spec = layout.rules.spec
    q_spec = spec("prompts", None, "act_heads", None, None)
    kv_specs = (spec("prompts", None, "act_heads", None),) * (4 if P else 2)
    mapped = jax.shard_map(
        local, mesh=layout.mesh, in_specs=(spec("prompts"), q_spec, *kv_specs), out_specs=q_spec,
        check_vma=False,
    )
    return lambda *qkv: mapped(lengths_Q, *qkv)


def _dense(lengths_Q, q_QWKRH, k_QWKH, v_QWKH, past_k_XPKH=None, past_v_XPKH=None, *, S: int,
           G: int, T: int, P: int) -> jax.Array:
    """Prompts first, then rows; each as many at a time as SCORES allows, and computed anew in the
    backward pass if it is not all of them."""
    Q, _, K, R, _ = q_QWKRH.shape
    past = None if P == 0 else (past_k_XPKH[0], past_v_XPKH[0])
    mask_QS = prompt_mask(lengths_Q, S)
    prompts = tuple(x[:, :S] for x in (k_QWKH, v_QWKH))
    out = _in_pieces(
        functools.partial(_attend_prompt, past), SCORES // max(K * R * S * (P + S), 1),
        (q_QWKRH[:, :S], *prompts, mask_QS),
    )
    if G == 0:
        return out
    rows = tuple(x[:, S:].reshape(Q, G, T, *x.shape[2:]) for x in (q_QWKRH, k_QWKH, v_QWKH))
    at_once = SCORES // max(K * R * T * (P + S + T), 1)

    if at_once >= G:
        attend = lambda q, k, v, *prompt: _attend_rows(past, prompt, (q, k, v))  # noqa: E731
        own = _in_pieces(attend, at_once // G, (*rows, *prompts, mask_QS))
    else:
        def group(xs):
            prompt = tuple(x[None] for x in xs[3:])
            row = lambda *xs: _attend_rows(past, prompt, tuple(x[None] for x in xs))[0]  # noqa: E731
            return _in_pieces(row, at_once, xs[:3])

        own = jax.lax.map(group, (*rows, *prompts, mask_QS))
    return jnp.concatenate([out, own.reshape(Q, G * T, *own.shape[3:])], axis=1)


def _in_pieces(fn: Callable, at_once: int, args: tuple[jax.Array, ...]) -> jax.Array:
    """`fn(*args)` in pieces of the leading axis, of at most `at_once`; the same if all fits."""
    n = args[0].shape[0]
    size = max(d for d in range(1, n + 1) if n % d == 0 and d <= max(at_once, 1))
    if size == n:
        return fn(*args)
    again = jax.checkpoint(lambda xs: fn(*xs), prevent_cse=False)
    pieces = tuple(x.reshape(n // size, size, *x.shape[1:]) for x in args)
    out = jax.lax.map(again, pieces)
    return out.reshape(n, *out.shape[2:])


def _softmax(parts: list[jax.Array], orders: list[str]) -> tuple[list[jax.Array], jax.Array]:
    """(exponentials of each part's scores, their total `QGKTR`) under one common maximum.

    `orders`: each part's axes before that of its keys. The maximum only guards the exponentials; it
    cancels, so no gradient flows through it.
    """
    tops = [jnp.einsum(f"{order}->QGKTR", jax.lax.stop_gradient(part.max(axis=-1)))
            for part, order in zip(parts, orders, strict=True)]
    top = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp(part - jnp.einsum(f"QGKTR->{order}", top)[..., None])
               for part, order in zip(parts, orders, strict=True)]
    totals = [jnp.einsum(f"{order}->QGKTR", w.sum(axis=-1))
              for w, order in zip(weights, orders, strict=True)]
    return weights, functools.reduce(jnp.add, totals)


def _attend_rows(past, prompt, rows) -> jax.Array:
    """Rows `[Q, G, T, …]` attend to the past, to their group's prompt and to themselves.

    Axes of scores are in the order in which the products give them: nothing large is turned over.
    """
    (q, k, v), (prompt_k, prompt_v, mask_QS), f32 = rows, prompt, jnp.float32
    T = q.shape[2]
    own = jnp.einsum("QGTKRH,QGCKH->QGKTRC", q, k, preferred_element_type=f32)
    own = jnp.where(jnp.reshape(causal(T), (1, 1, 1, T, 1, T)), own, NEG)
    shared = jnp.einsum("QGTKRH,QSKH->QKGTRS", q, prompt_k, preferred_element_type=f32)
    shared = jnp.where(mask_QS[:, None, None, None, None], shared, NEG)
    parts, orders = [own, shared], ["QGKTR", "QKGTR"]
    if past is not None:
        parts.append(jnp.einsum("QGTKRH,PKH->KQGTRP", q, past[0], preferred_element_type=f32))
        orders.append("KQGTR")
    weights, total = _softmax(parts, orders)
    weights = [w.astype(v.dtype) for w in weights]
    out = jnp.einsum("QGKTRC,QGCKH->QGTKRH", weights[0], v)
    out = out + jnp.einsum("QKGTRS,QSKH->QGTKRH", weights[1], prompt_v)
    if past is not None:
        out = out + jnp.einsum("KQGTRP,PKH->QGTKRH", weights[2], past[1])
    return (out / jnp.einsum("QGKTR->QGTKR", total)[..., None]).astype(v.dtype)


def _attend_prompt(past, q_QSKRH, k_QSKH, v_QSKH, mask_QS) -> jax.Array:
    """Prompts alone: each is a row without a prompt before it, and padding that nobody sees."""
    S = q_QSKRH.shape[1]
    f32, seen = jnp.float32, causal(S)[None] & mask_QS[:, None, :]
    own = jnp.einsum("QTKRH,QSKH->QKTRS", q_QSKRH, k_QSKH, preferred_element_type=f32)
    own = jnp.where(seen[:, None, :, None], own, NEG)[:, None]
    parts, orders = [own], ["QGKTR"]
    if past is not None:
        parts.append(jnp.einsum("QTKRH,PKH->KQTRP", q_QSKRH, past[0],
                                preferred_element_type=f32)[:, :, None])
        orders.append("KQGTR")
    weights, total = _softmax(parts, orders)
    weights = [w.astype(v_QSKH.dtype) for w in weights]
    out = jnp.einsum("QKTRS,QSKH->QTKRH", weights[0][:, 0], v_QSKH)
    if past is not None:
        out = out + jnp.einsum("KQTRP,PKH->QTKRH", weights[1][:, :, 0], past[1])
    return (out / jnp.einsum("QKTR->QTKR", total[:, 0])[..., None]).astype(v_QSKH.dtype)


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
