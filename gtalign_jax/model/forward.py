"""The transformer over whole sequences: training, and the start of generation.

    full_logits    tokens_BT            -> logits_BTV    plain; what everything is tested against
    common_past    prompts_QS           -> Past          the prefix that all prompts share, once
    run_prompts    prompts_QS           -> keys and values of each prompt, for generation
    shared_hidden  prompts_QS, rows_QGT -> hidden_QGTD   the update: prompts and rows in one pass
    packed_hidden  bins, prompt_keys    -> hidden_BWD    the same without padding

A group's G completions have one prompt. Its keys and values exist once, `[Q, S, K, H]`; every row
attends to them and to its own with one softmax over both (design: shared prompt; idea from Prefix
Grouper, arXiv 2506.05433). Where all prompts begin alike, that prefix is a sequence of its own,
once per batch shard, and what follows it attends to its keys and values, its `Past`.

The split of a sequence: the prompt stream holds all prompt tokens but the last, a row's stream
starts with that last token. So the hidden state at row position t predicts completion token t, and
the prompt stream needs no logits. `lengths_Q` counts the prompt stream, the prefix included.

Masks come from lengths. This module samples nothing and knows no text; the block is `block`'s.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from gtalign_jax.model.attend_dense import NEG, Tags
from gtalign_jax.model.attention import (
    Attend,
    group_attention,
    packed_attention,
    padded_width,
)
from gtalign_jax.model.block import cos_sin, finish, qkv, rms_norm
from gtalign_jax.model.sharding import Layout, gather, prompt_shards
from gtalign_jax.model.spec import Layers, ModelConfig, Params, is_spec, param_specs

# What the backward pass keeps of a block besides its input; the rest it computes anew. "none" keeps
# everything (no rematerialisation), "full" nothing, "dots" the outputs of matrix products with
# weights, "attention" what attention returned: it costs most to repeat per byte.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attended"),
}


def check_remat(name: str) -> None:
    """Raises ValueError for a policy that is none of REMAT_POLICIES."""
    if name not in REMAT_POLICIES:
        raise ValueError(f"remat={name!r}: expected one of {tuple(REMAT_POLICIES)}")


@struct.dataclass
class Past:
    """Keys and values of the prefix common to all prompts, `[L, X, P, K, H]`: X batch shards have
    one copy each."""

    k_LXPKH: jax.Array
    v_LXPKH: jax.Array

    @property
    def width(self) -> int:
        return self.k_LXPKH.shape[2]


def _embed(params: Params, tokens: jax.Array, layout: Layout | None = None) -> jax.Array:
    """Embeddings `[..., D]` of token ids; `layout` where the table is cut as in training."""
    if layout is None:
        return _look_up(params.embed_VD, tokens)
    if layout.rules.embed is None:
        return jnp.take(params.embed_VD, tokens, axis=0)
    return _embed_by_parts(params.embed_VD, tokens, layout)


def _look_up(table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the table, for training: in float32, so that their gradient adds up in float32.

    A token that occurs thousands of times would soon add nothing to a sum in bfloat16.
    """
    return jnp.take(table_VD.astype(jnp.float32), tokens, axis=0).astype(table_VD.dtype)


def _embed_by_parts(table_VD: jax.Array, tokens_QW: jax.Array, layout: Layout) -> jax.Array:
    """Every device looks all tokens up in its own columns; then columns change over to positions.

    By hand, since XLA would sum the table's gradient whole on every device. Here each device has
    its columns' gradient at once, and what travels are the positions' embeddings.
    """
    columns = layout.rules.embed
    # (mesh axis, array axis that it cuts, of [Q, W, D]): the last one cuts columns finest.
    cuts = [(axis, 1 if axis == layout.rules.sequence else 0) for axis in columns]

    def local(table_VD, tokens_QW):
        for axis, at in cuts:
            tokens_QW = jax.lax.all_gather(tokens_QW, axis, axis=at, tiled=True)
        x_QWD = _look_up(table_VD, tokens_QW)
        for axis, at in reversed(cuts):
            x_QWD = jax.lax.all_to_all(x_QWD, axis, split_axis=at, concat_axis=2, tiled=True)
        return x_QWD

    W, spec = tokens_QW.shape[1], layout.rules.spec
    pad = ((0, 0), (0, -W % layout.axis_size("sequence")))
    mapped = jax.shard_map(
        local, mesh=layout.mesh, check_vma=False, out_specs=spec("prompts", "sequence", None),
        in_specs=(spec("vocab", "embed"), spec("prompts", "sequence")),
    )
    return mapped(table_VD, jnp.pad(tokens_QW, pad))[:, :W]


def _run(params: Params, cfg: ModelConfig, tokens_QW, positions_QW, attend: Attend,
         layout: Layout | None, *, past: Past | None = None, before=None,
         emit: Callable = lambda k, v: None, remat: str = "none"):
    """All blocks over groups of W positions; `emit(k, v)` says what is kept of each layer.

    `before`: more keys and values of each layer for `attend`, after those of the past.

    Over devices every block gathers its weights, whole, and works on its own prompts and its own
    stretch of the sequence; only attention changes over from stretches to heads, and back. With
    groups of tens of thousands of positions that moves less than cutting the products would.
    """
    cos, sin = cos_sin(cfg, positions_QW, 4)
    # On one device positions are one axis: CPU kernels are several times faster at two dimensions.
    alone = layout is None or layout.mesh.size == 1
    flat = lambda x: x.reshape(-1, *x.shape[2:]) if alone else x  # noqa: E731
    grouped = lambda x: x.reshape(*tokens_QW.shape, *x.shape[1:]) if alone else x  # noqa: E731

    def pin(x: jax.Array, *axes: str | None) -> jax.Array:
        return x if alone else layout.constrain(x, "prompts", *axes)

    def block(x, xs):
        w, *parts = xs
        w = w if alone else _whole(w, cfg, layout)
        q_k_v = qkv(x, w, cfg, flat(cos), flat(sin))
        # By stretches up to here: else XLA would cut the heads in the middle of rotating them.
        q, k, v = (pin(pin(grouped(y), "sequence"), None, "act_heads") for y in q_k_v)
        attended = attend(q, k, v, *jax.tree.leaves(parts))
        attended = checkpoint_name(pin(attended, None, "act_heads"), "attended")
        x = finish(x, flat(pin(attended, "sequence")), w, cfg)
        return pin(x, "sequence"), emit(k, v)

    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT_POLICIES[remat])
    x_QWD = pin(_embed(params, tokens_QW, layout), "sequence")
    x, emitted = jax.lax.scan(block, flat(x_QWD), (params.layers, past, before))
    return grouped(x), emitted


def _whole(w: Layers, cfg: ModelConfig, layout: Layout) -> Layers:
    """One layer's weights, gathered."""
    return jax.tree.map(
        lambda spec, x: gather(x, layout, spec.axes[1:]), param_specs(cfg).layers, w,
        is_leaf=is_spec,
    )


def run_prompts(params: Params, cfg: ModelConfig, tokens_QS, lengths_Q, layout: Layout | None, *,
                past: Past | None = None, emit: Callable = lambda k, v: None,
                remat: str = "none"):
    """(final `[Q, S, D]`, what was emitted) of prompts alone, without the prefix that is `past`.

    Padded inside to the width that attention wants; `lengths_Q` counts what is real of `tokens_QS`.
    """
    S, P = tokens_QS.shape[1], 0 if past is None else past.width
    W = padded_width(S, layout)
    tokens_QW = jnp.pad(tokens_QS, ((0, 0), (0, W - S)))
    positions_QW = jnp.broadcast_to(P + jnp.arange(W)[None], tokens_QW.shape)
    attend = group_attention(S, 0, 0, P, lengths_Q, layout)
    x_QWD, kept = _run(params, cfg, tokens_QW, positions_QW, attend, layout, past=past,
                       emit=lambda k, v: emit(k[:, :S], v[:, :S]), remat=remat)
    return x_QWD[:, :S], kept


def common_past(params: Params, cfg: ModelConfig, tokens_QS, common: int, layout: Layout | None,
                remat: str = "none") -> Past | None:
    """Keys and values of the first `common` tokens, which all prompts share; None for 0.

    Every batch shard computes them from its own first prompt, so that nothing travels.
    """
    if common == 0:
        return None
    Q, S = tokens_QS.shape
    X = prompt_shards(layout, Q)
    tokens_XP = tokens_QS.reshape(X, Q // X, S)[:, 0, :common]
    whole_X = jnp.full(X, common, jnp.int32)
    return Past(*prompt_keys(params, cfg, tokens_XP, whole_X, layout, remat=remat))


def full_hidden(params: Params, cfg: ModelConfig, tokens_BT, lengths_B) -> jax.Array:
    """Final hidden states `[B, T, D]` of right-padded rows, the plain way."""
    x_BTD, _ = run_prompts(params, cfg, tokens_BT, lengths_B, None)
    return rms_norm(x_BTD, params.final_norm_D, cfg.norm_eps)


def full_logits(params: Params, cfg: ModelConfig, tokens_BT, lengths_B) -> jax.Array:
    """Next-token logits `[B, T, V]` (float32) of right-padded rows; for tests and small models."""
    return logits(head_of(params), cfg, full_hidden(params, cfg, tokens_BT, lengths_B))


def head_of(params: Params) -> jax.Array:
    """The head `[V, D]`, which may be the embedding."""
    return params.embed_VD if params.head_VD is None else params.head_VD


def logits(head_VD: jax.Array, cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Float32 logits over the padded vocabulary; padding ids get `NEG`, so no mass."""
    out = jnp.einsum("...D,VD->...V", hidden, head_VD, preferred_element_type=jnp.float32)
    if cfg.padded_vocab_size == cfg.vocab_size:
        return out
    real = jnp.arange(cfg.padded_vocab_size) < cfg.vocab_size
    return jnp.where(jnp.expand_dims(real, tuple(range(out.ndim - 1))), out, NEG)


def shared_hidden(params: Params, cfg: ModelConfig, tokens_QS, lengths_Q, rows_QGT, *,
                  past: Past | None = None, remat: str = "none",
                  layout: Layout | None = None) -> jax.Array:
    """Final hidden states `[Q, G, T, D]` of rows that share their group's prompt.

    Args:
      tokens_QS, lengths_Q: the prompt stream (prompt without its last token), right-padded.
      rows_QGT: last prompt token, then the completion without its last token, right-padded.
      past: of the prompts' first tokens, from `common_past`; those are not computed again.
      remat: what the backward pass computes anew instead of keeping it, one of REMAT_POLICIES.
    """
    P = 0 if past is None else past.width
    tokens_QS = tokens_QS[:, P:]
    (Q, S), (_, G, T) = tokens_QS.shape, rows_QGT.shape
    W = padded_width(S + G * T, layout)
    tokens_QW = jnp.concatenate([tokens_QS, rows_QGT.reshape(Q, G * T)], axis=1)
    row_QT = lengths_Q[:, None] + jnp.arange(T)[None, :]
    prompt_QS = jnp.broadcast_to(P + jnp.arange(S)[None], (Q, S))
    positions_QW = jnp.concatenate([prompt_QS, jnp.tile(row_QT, (1, G))], axis=1)
    pad = ((0, 0), (0, W - S - G * T))
    attend = group_attention(S, G, T, P, lengths_Q - P, layout)
    x_QWD, _ = _run(params, cfg, jnp.pad(tokens_QW, pad), jnp.pad(positions_QW, pad), attend,
                    layout, past=past, remat=remat)
    rows_QGTD = x_QWD[:, S : S + G * T].reshape(Q, G, T, -1)
    return rms_norm(rows_QGTD, params.final_norm_D, cfg.norm_eps)


@struct.dataclass
class Bins:
    """Completions side by side, `[B, W]` each: the token fed, its position in its sequence, and
    which completion and which of the bin's prompts it belongs to (`attend_dense.Tags`).

    prompts_k, prompts_v: of m prompts before each bin, `[L, B, m S, K, H]`, lengths_Bm of which are
    real.
    """

    tokens_BW: jax.Array
    positions_BW: jax.Array
    tags: Tags
    prompts_k: jax.Array
    prompts_v: jax.Array
    lengths_Bm: jax.Array


def prompt_keys(params: Params, cfg: ModelConfig, tokens_QS, lengths_Q, layout: Layout | None,
                past: Past | None = None, remat: str = "none") -> tuple[jax.Array, jax.Array]:
    """Keys and values `[L, Q, S, K, H]` of the prompt stream without the prefix that is `past`."""
    P = 0 if past is None else past.width
    _, kept = run_prompts(params, cfg, tokens_QS[:, P:], lengths_Q - P, layout, past=past,
                          emit=lambda k, v: (k, v), remat=remat)
    return kept


def packed_hidden(params: Params, cfg: ModelConfig, bins: Bins, *, past: Past | None = None,
                  remat: str = "none", layout: Layout | None = None) -> jax.Array:
    """Final hidden states `[B, W, D]` of packed completions: `shared_hidden` without padding."""
    attend = packed_attention(bins.lengths_Bm, bins.tags, layout)
    x_BWD, _ = _run(params, cfg, bins.tokens_BW, bins.positions_BW, attend, layout, past=past,
                    before=(bins.prompts_k, bins.prompts_v), remat=remat)
    return rms_norm(x_BWD, params.final_norm_D, cfg.norm_eps)


def split_prompt(tokens_QS: jax.Array, lengths_Q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(last token of each prompt `[Q]`, length of the prompt stream `[Q]`).

    The stream keeps its width: its masked tail includes the last token.
    """
    last_Q = jnp.take_along_axis(tokens_QS, (lengths_Q - 1)[:, None], axis=1)[:, 0]
    return last_Q, lengths_Q - 1
