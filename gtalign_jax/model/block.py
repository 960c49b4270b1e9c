"""One block of the transformer, whatever the shape of what goes through it.

    x = x + o(attention(qkv(norm(x))))        x = x + down(silu(gate(norm(x))) * up(norm(x)))

Leading axes are anything: positions of a prompt, or one token of every row. Softmax and norms are
float32; the rest runs in the dtype of the weights. Who attends to whom is the caller's.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gtalign_jax.model.spec import Layers, ModelConfig


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


def cos_sin(cfg: ModelConfig, positions: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
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


@struct.dataclass
class Fused:
    """One block's weights for few positions: products with the same input joined into one."""

    attn_norm_LD: jax.Array
    qkv_DM: jax.Array
    o_MD: jax.Array
    mlp_norm_LD: jax.Array
    gate_up_DF: jax.Array
    down_LFD: jax.Array
    qkv_bias_M: jax.Array | None
    q_norm_LH: jax.Array | None
    k_norm_LH: jax.Array | None


def fuse(w: Layers) -> Fused:
    """The same weights of one block (without the leading `L`), joined."""
    D = w.attn_norm_LD.shape[0]
    flat = lambda *ws: jnp.concatenate([x.reshape(D, -1) for x in ws], axis=1)  # noqa: E731
    bias = None
    if w.q_bias_LNH is not None:
        bias = jnp.concatenate([b.reshape(-1) for b in (w.q_bias_LNH, w.k_bias_LKH, w.v_bias_LKH)])
    return Fused(
        attn_norm_LD=w.attn_norm_LD, qkv_DM=flat(w.q_LDNH, w.k_LDKH, w.v_LDKH),
        o_MD=w.o_LNHD.reshape(-1, D), mlp_norm_LD=w.mlp_norm_LD,
        gate_up_DF=flat(w.gate_LDF, w.up_LDF), down_LFD=w.down_LFD, qkv_bias_M=bias,
        q_norm_LH=w.q_norm_LH, k_norm_LH=w.k_norm_LH,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, w: jax.Array, axes: str) -> jax.Array:
    """`einsum(axes, x, w)`, with the weight's gradient written in the weight's own layout.

    What autodiff writes down is its transpose, for which a CPU turns over all of y's gradient.
    """
    return jnp.einsum(axes, x, w)


def _product_backward(axes: str, kept, grad: jax.Array):
    (x, w), (inputs, of_y) = kept, axes.split("->")
    of_x, of_w = inputs.split(",")
    return (jnp.einsum(f"{of_y},{of_w}->{of_x}", grad, w),
            jnp.einsum(f"{of_x},{of_y}->{of_w}", x, grad))


product.defvjp(lambda x, w, axes: (product(x, w, axes), (x, w)), _product_backward)


def _linear(x: jax.Array, w: jax.Array) -> jax.Array:
    return product(x, w, "...D,DF->...F")


def _project(x: jax.Array, w: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`x[..., D] @ w[D, heads, H] (+ bias)` -> `[..., heads, H]`."""
    y = product(x, w, "...D,DNH->...NH")
    return y if bias is None else y + jnp.expand_dims(bias, tuple(range(y.ndim - 2)))


def _heads(x: jax.Array, w: Layers | Fused, cfg: ModelConfig) -> list[jax.Array]:
    """Queries, keys and values `[..., heads, H]`."""
    if isinstance(w, Layers):
        return [_project(x, w.q_LDNH, w.q_bias_LNH), _project(x, w.k_LDKH, w.k_bias_LKH),
                _project(x, w.v_LDKH, w.v_bias_LKH)]
    y = _linear(x, w.qkv_DM)
    if w.qkv_bias_M is not None:
        y = y + jnp.expand_dims(w.qkv_bias_M, tuple(range(y.ndim - 1)))
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    return [y[..., a * H : b * H].reshape(*y.shape[:-1], b - a, H)
            for a, b in ((0, N), (N, N + K), (N + K, N + 2 * K))]


def qkv(x: jax.Array, w: Layers | Fused, cfg: ModelConfig, cos: jax.Array, sin: jax.Array):
    """Normalised and rotated queries `[..., K, R, H]`, keys and values `[..., K, H]`."""
    q, k, v = _heads(rms_norm(x, w.attn_norm_LD, cfg.norm_eps), w, cfg)
    if cfg.qk_norm:
        q = rms_norm(q, w.q_norm_LH, cfg.norm_eps)
        k = rms_norm(k, w.k_norm_LH, cfg.norm_eps)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    q = q.reshape(*q.shape[:-2], cfg.num_kv_heads, cfg.queries_per_kv, cfg.head_dim)
    return q * jnp.asarray(1 / math.sqrt(cfg.head_dim), q.dtype), k, v


def finish(x: jax.Array, attended: jax.Array, w: Layers | Fused, cfg: ModelConfig) -> jax.Array:
    """Output projection, residual, and the gated feed-forward."""
    before = attended.shape[:-3]
    if isinstance(w, Layers):
        attended = attended.reshape(*before, cfg.num_heads, cfg.head_dim)
        x = x + product(attended, w.o_LNHD, "...NH,NHD->...D")
    else:
        x = x + _linear(attended.reshape(*before, -1), w.o_MD)
    y = rms_norm(x, w.mlp_norm_LD, cfg.norm_eps)
    if isinstance(w, Layers):
        gate, up = _linear(y, w.gate_LDF), _linear(y, w.up_LDF)
    else:
        gate, up = jnp.split(_linear(y, w.gate_up_DF), 2, axis=-1)
    return x + _linear(jax.nn.silu(gate) * up, w.down_LFD)
