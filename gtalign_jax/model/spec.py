"""What a model is: its sizes, and one declaration per weight.

`param_specs(cfg)` is a tree of `Spec(shape, axes, init)`. Initialisation, shardings and the
abstract tree that restoring and ahead-of-time compilation need are all maps over that one tree.
Layers are stacked on a leading `L` axis. This module knows no file format (see `hf.py`).
"""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

FAMILIES = ("qwen2", "qwen3", "llama")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Long-context scaling of the rotary frequencies; `kind` is "linear", "llama3" or "yarn"."""

    kind: str
    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a Qwen2 / Qwen3 / Llama style decoder. Hashable: a static argument."""

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    max_position: int = 4096
    init_scale: float = 0.02
    vocab_multiple: int = 1  # rows of the embedding are padded up to a multiple of this

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"model.family={self.family!r}: expected one of {FAMILIES}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must be a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}"
            )

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


@struct.dataclass
class Layers:
    """The weights of all blocks, stacked on `L`. Absent ones (no bias, no qk-norm) are None."""

    attn_norm_LD: Any
    q_LDNH: Any
    k_LDKH: Any
    v_LDKH: Any
    o_LNHD: Any
    mlp_norm_LD: Any
    gate_LDF: Any
    up_LDF: Any
    down_LFD: Any
    q_bias_LNH: Any = None
    k_bias_LKH: Any = None
    v_bias_LKH: Any = None
    q_norm_LH: Any = None
    k_norm_LH: Any = None


@struct.dataclass
class Params:
    """All weights. `head_VD` is None when the head is tied to the embedding."""

    embed_VD: Any
    layers: Layers
    final_norm_D: Any
    head_VD: Any = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """One weight: its shape, the logical axis of each dimension, and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str  # "normal" | "residual" | "ones" | "zeros"


def is_spec(x: Any) -> bool:
    return isinstance(x, Spec)


def param_specs(cfg: ModelConfig) -> Params:
    """The tree of `Spec`s, in the shape of `Params`."""
    L, D, F, V = cfg.num_layers, cfg.d_model, cfg.d_ff, cfg.padded_vocab_size
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def layer(shape: tuple[int, ...], axes: tuple[str | None, ...], init: str) -> Spec:
        return Spec((L, *shape), ("layers", *axes), init)

    bias, qk_norm = cfg.qkv_bias, cfg.qk_norm
    layers = Layers(
        attn_norm_LD=layer((D,), (None,), "ones"),
        q_LDNH=layer((D, N, H), ("embed", "heads", None), "normal"),
        k_LDKH=layer((D, K, H), ("embed", "kv_heads", None), "normal"),
        v_LDKH=layer((D, K, H), ("embed", "kv_heads", None), "normal"),
        o_LNHD=layer((N, H, D), ("heads", None, "embed"), "residual"),
        mlp_norm_LD=layer((D,), (None,), "ones"),
        gate_LDF=layer((D, F), ("embed", "mlp"), "normal"),
        up_LDF=layer((D, F), ("embed", "mlp"), "normal"),
        down_LFD=layer((F, D), ("mlp", "embed"), "residual"),
        q_bias_LNH=layer((N, H), ("heads", None), "zeros") if bias else None,
        k_bias_LKH=layer((K, H), ("kv_heads", None), "zeros") if bias else None,
        v_bias_LKH=layer((K, H), ("kv_heads", None), "zeros") if bias else None,
        q_norm_LH=layer((H,), (None,), "ones") if qk_norm else None,
        k_norm_LH=layer((H,), (None,), "ones") if qk_norm else None,
    )
    table = Spec((V, D), ("vocab", "embed"), "normal")
    return Params(
        embed_VD=table,
        layers=layers,
        final_norm_D=Spec((D,), (None,), "ones"),
        head_VD=None if cfg.tie_embeddings else table,
    )


def abstract_params(cfg: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """`ShapeDtypeStruct`s in the shape of `Params`: what a checkpoint or a compiler needs."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, dtype), param_specs(cfg), is_leaf=is_spec
    )


def init_params(cfg: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random weights: N(0, init_scale), the two residual projections divided by sqrt(2 L).

    Each weight's key is folded from its own name, so that adding a weight changes no other.
    Padded vocabulary rows are zero.
    """
    specs = param_specs(cfg)

    def make(path: Any, spec: Spec) -> jax.Array:
        name = jax.tree_util.keystr(path)
        scale = cfg.init_scale / (2 * cfg.num_layers) ** 0.5 if spec.init == "residual" \
            else cfg.init_scale
        match spec.init:
            case "ones":
                return jnp.ones(spec.shape, dtype)
            case "zeros":
                return jnp.zeros(spec.shape, dtype)
        leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
        value = scale * jax.random.normal(leaf_key, spec.shape, dtype)
        if spec.axes[0] == "vocab":
            real_V = jnp.arange(spec.shape[0]) < cfg.vocab_size
            value = jnp.where(real_V[:, None], value, 0)
        return value

    return jax.tree_util.tree_map_with_path(make, specs, is_leaf=is_spec)


def num_params(cfg: ModelConfig) -> int:
    """Number of weights, padding rows of the vocabulary not counted."""
    specs = jax.tree.leaves(param_specs(cfg), is_leaf=is_spec)
    total = 0
    for spec in specs:
        shape = (cfg.vocab_size, *spec.shape[1:]) if spec.axes[0] == "vocab" else spec.shape
        size = 1
        for n in shape:
            size *= n
        total += size
    return total
