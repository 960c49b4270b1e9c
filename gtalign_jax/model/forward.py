"""The transformer's forward pass, in a few shapes that share one block.

    full_logits       tokens_BT           -> logits_BTV     plain; what everything is tested against
    prefill           prompts_QS          -> PromptCache    keys and values of each prompt, once
    decode_step       token_QG + caches   -> hidden_QGD     one token of every row
    extend            tokens_QGF + caches -> hidden_QGFD    several tokens, of rows out of step
    shared_hidden     prompts_QS, rows_QGT -> hidden_QGTD   the update: prompt and rows in one pass

A group's G completions have one prompt. Its keys and values exist once, `[Q, S, K, H]`; every row
attends to them and to its own with one softmax over both (design: shared prompt; idea from Prefix
Grouper, arXiv 2506.05433).

The split of a sequence: the prompt stream holds all prompt tokens but the last, a row's stream
starts with that last token. So the hidden state at row position t predicts completion token t, and
the prompt stream needs no logits. `lengths_Q` counts the prompt stream.

Masks come from lengths. Softmax and norms are float32; the rest runs in the dtype of the params
given (cast once, by the caller). This module samples nothing and knows no text.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from gtalign_jax.model.attention import (
    NEG,
    Attend,
    attend_shared,
    group_attention,
    padded_width,
    prompt_mask,
)
from gtalign_jax.model.sharding import Layout, gather
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


# Logical axes of keys and values: of the prompts, and of the rows' own tokens.
PROMPT_CACHE_AXES = ("layers", "prompts", None, "act_heads", None)  # LQSKH
OWN_CACHE_AXES = ("layers", "prompts", None, None, "act_heads", None)  # LQGTKH


@struct.dataclass
class PromptCache:
    """Keys and values of the prompt stream, `[L, Q, S, K, H]`, and its true length `[Q]`."""

    k_LQSKH: jax.Array
    v_LQSKH: jax.Array
    lengths_Q: jax.Array


def rope_frequencies(cfg: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse wavelengths `[H/2]` (radians per position) and the factor on cos and sin.

    Scaling kinds: "linear", "llama3" (Llama 3.1 model card), "yarn" (arXiv 2309.00071, §3).
    """
    half = cfg.head_dim // 2
    freq = cfg.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = cfg.rope_scaling
    if scaling is None:
        return freq.astype(np.float32), 1.0
    slow = freq / scaling.factor
    if scaling.kind == "linear":
        return slow.astype(np.float32), 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_max_position * freq / (2 * np.pi)
        blend = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blend = np.clip(blend, 0.0, 1.0)
        return (blend * freq + (1 - blend) * slow).astype(np.float32), 1.0
    if scaling.kind == "yarn":
        def dimension(turns: float) -> float:
            ratio = scaling.original_max_position / (turns * 2 * np.pi)
            return half * np.log(ratio) / np.log(cfg.rope_theta)

        low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
        if scaling.truncate:
            low, high = np.floor(low), np.ceil(high)
        low, high = max(low, 0.0), min(high, 2.0 * half - 1)
        ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return (ramp * slow + (1 - ramp) * freq).astype(np.float32), scaling.attention_factor
    raise ValueError(f"rope_scaling.kind={scaling.kind!r}: expected linear, llama3 or yarn")


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of `x[..., heads, H]` by cos, sin `[..., 1, H/2]` (rotate-half layout)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _cos_sin(cfg: ModelConfig, positions: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin for integer `positions`, for an `ndim`-D array `[..., heads, H]`."""
    freq, factor = rope_frequencies(cfg)
    angle = positions[..., None].astype(jnp.float32) * jnp.expand_dims(
        jnp.asarray(freq), tuple(range(positions.ndim))
    )
    angle = jnp.expand_dims(angle, -2)
    angle = jnp.reshape(angle, (1,) * (ndim - angle.ndim) + angle.shape)
    return factor * jnp.cos(angle), factor * jnp.sin(angle)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * weight` over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale = jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
    return x32.astype(x.dtype) * scale


def _project(x: jax.Array, w: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`x[..., D] @ w[D, heads, H] (+ bias)` -> `[..., heads, H]`."""
    y = jnp.einsum("...D,DNH->...NH", x, w)
    return y if bias is None else y + jnp.expand_dims(bias, tuple(range(y.ndim - 2)))


def _qkv(x: jax.Array, w: Layers, cfg: ModelConfig, cos: jax.Array, sin: jax.Array):
    """Normalised and rotated queries `[..., K, R, H]`, keys and values `[..., K, H]`."""
    x = rms_norm(x, w.attn_norm_LD, cfg.norm_eps)
    q = _project(x, w.q_LDNH, w.q_bias_LNH)
    k = _project(x, w.k_LDKH, w.k_bias_LKH)
    v = _project(x, w.v_LDKH, w.v_bias_LKH)
    if cfg.qk_norm:
        q = rms_norm(q, w.q_norm_LH, cfg.norm_eps)
        k = rms_norm(k, w.k_norm_LH, cfg.norm_eps)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    q = q.reshape(*q.shape[:-2], cfg.num_kv_heads, cfg.queries_per_kv, cfg.head_dim)
    return q * jnp.asarray(1 / math.sqrt(cfg.head_dim), q.dtype), k, v


def _finish(x: jax.Array, attended: jax.Array, w: Layers, cfg: ModelConfig) -> jax.Array:
    """Output projection, residual, and the gated feed-forward."""
    attended = attended.reshape(*attended.shape[:-3], cfg.num_heads, cfg.head_dim)
    x = x + jnp.einsum("...NH,NHD->...D", attended, w.o_LNHD)
    y = rms_norm(x, w.mlp_norm_LD, cfg.norm_eps)
    gate = jnp.einsum("...D,DF->...F", y, w.gate_LDF)
    up = jnp.einsum("...D,DF->...F", y, w.up_LDF)
    return x + jnp.einsum("...F,FD->...D", jax.nn.silu(gate) * up, w.down_LFD)


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
         layout: Layout | None, *, emit: Callable = lambda k, v: None, remat: str = "none"):
    """All blocks over groups of W positions; `emit(k, v)` says what is kept of each layer.

    Over devices every block gathers its weights, whole, and works on its own prompts and its own
    stretch of the sequence; only attention changes over from stretches to heads, and back. With
    groups of tens of thousands of positions that moves less than cutting the products would.
    """
    cos, sin = _cos_sin(cfg, positions_QW, 4)

    def pin(x: jax.Array, *axes: str | None) -> jax.Array:
        return x if layout is None else layout.constrain(x, "prompts", *axes)

    def block(x_QWD, w: Layers):
        w = w if layout is None else _whole(w, cfg, layout)
        qkv = _qkv(x_QWD, w, cfg, cos, sin)
        # By stretches up to here: else XLA would cut the heads in the middle of rotating them.
        q, k, v = (pin(pin(x, "sequence"), None, "act_heads") for x in qkv)
        attended = checkpoint_name(pin(attend(q, k, v), None, "act_heads"), "attended")
        x_QWD = _finish(x_QWD, pin(attended, "sequence"), w, cfg)
        return pin(x_QWD, "sequence"), emit(k, v)

    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT_POLICIES[remat])
    return jax.lax.scan(block, pin(_embed(params, tokens_QW, layout), "sequence"), params.layers)


def _whole(w: Layers, cfg: ModelConfig, layout: Layout) -> Layers:
    """One layer's weights, gathered."""
    return jax.tree.map(
        lambda spec, x: gather(x, layout, spec.axes[1:]), param_specs(cfg).layers, w,
        is_leaf=is_spec,
    )


def _run_prompts(params: Params, cfg: ModelConfig, tokens_QS, lengths_Q, layout: Layout | None,
                 emit: Callable = lambda k, v: None):
    """`_run` over prompts alone, padded to the width that attention wants."""
    S = tokens_QS.shape[1]
    W = padded_width(S, layout)
    tokens_QW = jnp.pad(tokens_QS, ((0, 0), (0, W - S)))
    positions_QW = jnp.broadcast_to(jnp.arange(W)[None], tokens_QW.shape)
    attend = group_attention(S, 0, 0, lengths_Q, layout)
    x_QWD, kept = _run(params, cfg, tokens_QW, positions_QW, attend, layout, emit=emit)
    return x_QWD[:, :S], kept


def full_hidden(params: Params, cfg: ModelConfig, tokens_BT, lengths_B) -> jax.Array:
    """Final hidden states `[B, T, D]` of right-padded rows, the plain way."""
    x_BTD, _ = _run_prompts(params, cfg, tokens_BT, lengths_B, None)
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


def prefill(params: Params, cfg: ModelConfig, tokens_QS, lengths_Q,
            layout: Layout | None = None) -> PromptCache:
    """Keys and values of the prompt stream (all prompt tokens but the last)."""
    S = tokens_QS.shape[1]
    _, (k, v) = _run_prompts(
        params, cfg, tokens_QS, lengths_Q, layout, emit=lambda k, v: (k[:, :S], v[:, :S])
    )
    return PromptCache(k, v, lengths_Q)


def decode_step(params: Params, cfg: ModelConfig, prompt: PromptCache, k_LQGTKH, v_LQGTKH,
                token_QG, t) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token of every row, written at own-cache position `t` (the same for all rows).

    Returns (final hidden `[Q, G, D]`, the two own caches with position t filled).
    """
    positions_QGF = (prompt.lengths_Q + t)[:, None, None]
    own_mask = jnp.reshape(jnp.arange(k_LQGTKH.shape[3]) <= t, (1, 1, 1, 1, 1, -1))

    def write(cache, new, layer):
        return jax.lax.dynamic_update_slice(cache, new[None], (layer, 0, 0, t, 0, 0))

    x, k, v = _cached(params, cfg, prompt, k_LQGTKH, v_LQGTKH, token_QG[..., None], positions_QGF,
                      own_mask, write)
    return x[:, :, 0], k, v


def extend(params: Params, cfg: ModelConfig, prompt: PromptCache, k_LQGTKH, v_LQGTKH, tokens_QGF,
           start_QG, count_QG) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Some tokens of every row at once, at own-cache positions that differ from row to row.

    Row (q, g) feeds its first `count_QG` tokens at positions start, start + 1, …; the rest of its F
    writes nothing, and neither does a position past the cache. With F = 1 it is `decode_step` of
    rows that are not in step.

    Returns (final hidden `[Q, G, F, D]`, the two own caches).
    """
    (Q, G, F), T = tokens_QGF.shape, k_LQGTKH.shape[3]
    at_QGF = start_QG[..., None] + jnp.arange(F)[None, None]
    own_mask = jnp.arange(T)[None, None, None] <= at_QGF[..., None]
    to_QGF = jnp.where(jnp.arange(F)[None, None] < count_QG[..., None], at_QGF, T)
    q_QGF = jnp.broadcast_to(jnp.arange(Q)[:, None, None], (Q, G, F))
    g_QGF = jnp.broadcast_to(jnp.arange(G)[None, :, None], (Q, G, F))

    def write(cache, new, layer):
        # Not by vmap: that would turn the whole cache over, and back, for a few positions.
        where = (jnp.broadcast_to(layer, (Q, G, F)), q_QGF, g_QGF, to_QGF)
        return cache.at[where].set(new, mode="drop")

    return _cached(params, cfg, prompt, k_LQGTKH, v_LQGTKH, tokens_QGF,
                   prompt.lengths_Q[:, None, None] + at_QGF, own_mask[:, :, None, None], write)


def _cached(params: Params, cfg: ModelConfig, prompt: PromptCache, k_LQGTKH, v_LQGTKH, tokens_QGF,
            positions_QGF, own_mask, write: Callable) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All blocks over new tokens of rows whose earlier ones are in the own caches.

    `own_mask` is that of attend_shared; `write(cache, new_QGFKH, layer)` returns the cache with a
    layer's new keys or values in it.
    """
    cos, sin = _cos_sin(cfg, positions_QGF, 5)
    prompt_mask_QS = prompt_mask(prompt.lengths_Q, prompt.k_LQSKH.shape[2])

    def block(carry, xs):
        x_QGFD, k_cache, v_cache = carry
        w, prompt_k, prompt_v, layer = xs
        q, k, v = _qkv(x_QGFD, w, cfg, cos, sin)
        # The caches are carried, not scanned over, so that XLA updates them in place.
        k_cache, v_cache = write(k_cache, k, layer), write(v_cache, v, layer)
        own_k = jax.lax.dynamic_index_in_dim(k_cache, layer, keepdims=False)
        own_v = jax.lax.dynamic_index_in_dim(v_cache, layer, keepdims=False)
        attended = attend_shared(q, prompt_k, prompt_v, own_k, own_v, prompt_mask_QS, own_mask)
        return (_finish(x_QGFD, attended, w, cfg), k_cache, v_cache), None

    x = jnp.take(params.embed_VD, tokens_QGF, axis=0)
    xs = (params.layers, prompt.k_LQSKH, prompt.v_LQSKH, jnp.arange(cfg.num_layers))
    (x, k_LQGTKH, v_LQGTKH), _ = jax.lax.scan(block, (x, k_LQGTKH, v_LQGTKH), xs)
    return rms_norm(x, params.final_norm_D, cfg.norm_eps), k_LQGTKH, v_LQGTKH


def shared_hidden(params: Params, cfg: ModelConfig, tokens_QS, lengths_Q, rows_QGT, *,
                  remat: str = "none", layout: Layout | None = None) -> jax.Array:
    """Final hidden states `[Q, G, T, D]` of rows that share their group's prompt.

    Args:
      tokens_QS, lengths_Q: the prompt stream (prompt without its last token), right-padded.
      rows_QGT: last prompt token, then the completion without its last token, right-padded.
      remat: what the backward pass computes anew instead of keeping it, one of REMAT_POLICIES.
    """
    (Q, S), (_, G, T) = tokens_QS.shape, rows_QGT.shape
    W = padded_width(S + G * T, layout)
    tokens_QW = jnp.concatenate([tokens_QS, rows_QGT.reshape(Q, G * T)], axis=1)
    row_QT = lengths_Q[:, None] + jnp.arange(T)[None, :]
    prompt_QS = jnp.broadcast_to(jnp.arange(S)[None], (Q, S))
    positions_QW = jnp.concatenate([prompt_QS, jnp.tile(row_QT, (1, G))], axis=1)
    pad = ((0, 0), (0, W - S - G * T))
    attend = group_attention(S, G, T, lengths_Q, layout)
    x_QWD, _ = _run(params, cfg, jnp.pad(tokens_QW, pad), jnp.pad(positions_QW, pad), attend,
                    layout, remat=remat)
    rows_QGTD = x_QWD[:, S : S + G * T].reshape(Q, G, T, -1)
    return rms_norm(rows_QGTD, params.final_norm_D, cfg.norm_eps)


def split_prompt(tokens_QS: jax.Array, lengths_Q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(last token of each prompt `[Q]`, length of the prompt stream `[Q]`).

    The stream keeps its width: its masked tail includes the last token.
    """
    last_Q = jnp.take_along_axis(tokens_QS, (lengths_Q - 1)[:, None], axis=1)[:, 0]
    return last_Q, lengths_Q - 1
