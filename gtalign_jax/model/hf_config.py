"""`config.json` of a Hugging Face directory <-> `ModelConfig`.

What we cannot compute exactly is refused here, by key: another activation, a bias on the output
projection, sliding-window layers, quantised weights, other kinds of rotary scaling. Keys that do
not change the computation (dropout, cache switches, token ids) are not read, and survive a round
trip through `config_to_hf(cfg, base)`. This module reads no weights.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

from gtalign_jax.model.spec import FAMILIES, ModelConfig, RopeScaling

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# ModelConfig field -> key of config.json, where the value is the same in both.
SAME_VALUE = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_position": "max_position_embeddings",
    "init_scale": "initializer_range",
}
MAX_SIZE = 2**31 - 1
ROPE_KEYS = (
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"
)
# Features that would change the result; absent or null counts as "off".
OFF = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "quantization_config": (),
    "partial_rotary_factor": (1, 1.0),
}


def _refuse(key: str, value: Any, allowed: Any) -> ValueError:
    return ValueError(f"config.json: {key}={value!r:.200} is not supported; allowed: {allowed}")


def _size(config: Mapping[str, Any], key: str) -> int:
    """A required positive integer."""
    if key not in config:
        raise ValueError(f"config.json: {key} is missing; keys present: {sorted(config)}")
    return _whole(key, config[key])


def _whole(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise _refuse(key, value, f"a positive integer up to {MAX_SIZE}")
    return value


def _positive(key: str, value: Any) -> float:
    # An integer may be finite and yet no float.
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise _refuse(key, value, "a finite number above 0")
    return float(value)


def _switch(key: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _refuse(key, value, "true or false")
    return value


def _check_features(config: Mapping[str, Any], family: str) -> None:
    """Raises ValueError for anything this decoder does not compute."""
    for key, allowed in OFF.items():
        value = config.get(key)
        # transformers' Qwen2 never reads attention_bias: its q, k, v are always biased, o never.
        if value is None or (family == "qwen2" and key == "attention_bias"):
            continue
        if value not in allowed:
            raise _refuse(key, value, " or ".join(map(repr, allowed)) or "no such key")
    architectures = config.get("architectures")
    if architectures not in (None, [], [ARCHITECTURES[family]]):
        raise _refuse("architectures", architectures, [ARCHITECTURES[family]])
    kinds = config.get("layer_types")
    if kinds is not None and (type(kinds) is not list
                              or any(kind != "full_attention" for kind in kinds)):
        raise _refuse("layer_types", kinds, "full_attention in every layer")
    window, first = config.get("sliding_window"), config.get("max_window_layers", 28)
    in_use = config.get("use_sliding_window") and window is not None
    if kinds is None and in_use and (type(first) is not int
                                     or first < _size(config, "num_hidden_layers")):
        raise _refuse(
            "use_sliding_window", True,
            f"False, or max_window_layers (here {first!r:.80}) of at least num_hidden_layers",
        )


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """The factor on cos and sin: given, or 0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22)."""
    if rope.get("attention_factor") is not None:
        return _positive("rope_scaling.attention_factor", rope["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        over, under = (_positive(f"rope_scaling.{key}", rope[key])
                       for key in ("mscale", "mscale_all_dim"))
        return scale(over) / scale(under)
    return scale(1.0)


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either layout: `rope_theta` + `rope_scaling`, or `rope_parameters`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise _refuse("rope_scaling", rope, "an object, or null")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise _refuse("rope_parameters", rope, "one set of parameters for all layers")
    theta = _positive(
        "rope_theta", rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse("rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], 1.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise _refuse("rope_scaling.rope_type", kind, "default, linear, llama3 or yarn")
    longest = _size(config, "max_position_embeddings")
    original = _whole(
        "original_max_position_embeddings", config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings") or longest
    )
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = longest / original
    needed = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()
    missing = [key for key in needed if rope.get(key) is None]
    if factor is None or missing:
        raise ValueError(
            f"config.json: rope_scaling of type {kind} lacks {missing or ['factor']}; "
            f"keys present: {sorted(rope)}"
        )
    def number(key: str, default: Any = None) -> float:
        return _positive(f"rope_scaling.{key}", rope.get(key) or default)

    factor = _positive("rope_scaling.factor", factor)
    if kind == "linear":
        return theta, RopeScaling(kind, factor, longest)
    if kind == "llama3":
        return theta, RopeScaling(
            kind, factor, original,
            low_freq_factor=number("low_freq_factor"), high_freq_factor=number("high_freq_factor"),
        )
    return theta, RopeScaling(
        kind, factor, original,
        beta_fast=number("beta_fast", 32), beta_slow=number("beta_slow", 1),
        attention_factor=_yarn_attention_factor(rope, factor),
        truncate=_switch("rope_scaling.truncate", rope.get("truncate", True)),
    )


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a parsed `config.json` (vocabulary not padded).

    Raises:
      ValueError: a missing key, or a feature that is not computed; names key, value, allowed.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise _refuse("model_type", family, ", ".join(FAMILIES))
    _check_features(config, family)
    heads, width = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    # The families' own defaults, where a file relies on them: Llama has one k/v head per query
    # head, Qwen3 has 128 per head; the others divide the width.
    kv_heads, head_dim = heads, width // heads
    if config.get("num_key_value_heads") is not None or family != "llama":
        kv_heads = _size(config, "num_key_value_heads")
    if config.get("head_dim") is not None:
        head_dim = _size(config, "head_dim")
    elif family == "qwen3" and "head_dim" not in config:
        head_dim = 128
    if head_dim % 2 or not head_dim:
        raise _refuse("head_dim", head_dim, "an even number")
    theta, scaling = _rope(config)
    return ModelConfig(
        family=family,
        vocab_size=_size(config, "vocab_size"),
        d_model=width,
        d_ff=_size(config, "intermediate_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tie_embeddings=_switch("tie_word_embeddings", config.get("tie_word_embeddings", False)),
        max_position=_size(config, "max_position_embeddings"),
        init_scale=_positive("initializer_range", config.get("initializer_range", 0.02)),
    )


def _rope_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The layout that every transformers version reads."""
    scaling = cfg.rope_scaling
    if scaling is None:
        return {"rope_theta": cfg.rope_theta, "rope_scaling": None}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor,
                 "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow,
                 "attention_factor": scaling.attention_factor, "truncate": scaling.truncate}
    return {"rope_theta": cfg.rope_theta, "rope_scaling": rope}


def config_to_hf(cfg: ModelConfig, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A `config.json` that describes `cfg`; keys of `base` that we do not know stay as they are.

    Raises:
      ValueError: the family's architecture cannot express `cfg` (read back, it would differ).
    """
    out: dict[str, Any] = dict(base or {})
    out |= {"model_type": cfg.family, "architectures": [ARCHITECTURES[cfg.family]]}
    out |= {key: getattr(cfg, field) for field, key in SAME_VALUE.items()}
    if base is None:
        out |= {"hidden_act": "silu", "use_cache": True}
    if base is None or _rope(base) != (cfg.rope_theta, cfg.rope_scaling):
        out = {key: value for key, value in out.items() if key not in ROPE_KEYS}
        out |= _rope_to_hf(cfg)
    kinds = out.get("layer_types")
    if kinds is not None and len(kinds) != cfg.num_layers:
        out["layer_types"] = ["full_attention"] * cfg.num_layers
    back = dataclasses.replace(config_from_hf(out), vocab_multiple=cfg.vocab_multiple)
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(cfg, field.name), getattr(back, field.name)
        if ours != theirs:
            raise ValueError(
                f"model.{field.name}={ours!r}: the {cfg.family} family of transformers cannot "
                f"express it; allowed: {theirs!r}"
            )
    if cfg.family == "llama" and cfg.d_model % cfg.num_heads:
        raise ValueError(
            f"model.d_model={cfg.d_model}: transformers' llama needs a multiple of "
            f"model.num_heads={cfg.num_heads}"
        )
    return out
