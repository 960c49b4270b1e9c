"""The published sizes of well-known models, for planning a run without a download.

`config(name)` has the keys of that model's config.json on the hub which decide what is computed;
`hf_config.config_from_hf` reads it as it reads a file. Nothing here is used to load weights: they
come with their own config.json.
"""

from typing import Any

# Size: width, feed-forward width, layers, query heads, k/v heads, vocabulary rows, head tied to
# the embedding, longest position of the base model, its epsilon of the norms.
_QWEN25 = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True, 32_768, 1e-6),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True, 131_072, 1e-6),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True, 32_768, 1e-6),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False, 131_072, 1e-6),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False, 131_072, 1e-5),
    "32B": (5120, 27_648, 64, 40, 8, 152_064, False, 131_072, 1e-5),
    "72B": (8192, 29_568, 80, 64, 8, 152_064, False, 131_072, 1e-5),
}
# Size: width, feed-forward width, layers, query heads, tied. Eight k/v heads of 128 in all.
_QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12_288, 36, 32, False),
    "14B": (5120, 17_408, 40, 40, False),
    "32B": (5120, 25_600, 64, 64, False),
}
# Name: width, feed-forward width, layers, query heads, head size, tied, factor of the rotary
# scaling. Eight k/v heads in all.
_LLAMA = {
    "3.1-8B": (4096, 14_336, 32, 32, 128, False, 8.0),
    "3.1-70B": (8192, 28_672, 80, 64, 128, False, 8.0),
    "3.2-1B": (2048, 8192, 16, 32, 64, True, 32.0),
    "3.2-3B": (3072, 8192, 28, 24, 128, True, 32.0),
}


def _qwen25(size: str, instruct: bool) -> dict[str, Any]:
    """The instruction-tuned models state a window of 32,768 tokens and an epsilon of 1e-6."""
    width, hidden, layers, heads, kv_heads, vocabulary, tied, longest, epsilon = _QWEN25[size]
    return {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu",
        "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "max_position_embeddings": 32_768 if instruct else longest,
        "rms_norm_eps": 1e-6 if instruct else epsilon, "rope_theta": 1e6,
        "tie_word_embeddings": tied, "initializer_range": 0.02,
    }


def _qwen3(size: str) -> dict[str, Any]:
    width, hidden, layers, heads, tied = _QWEN3[size]
    return {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu",
        "attention_bias": False,
        "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151_936, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": None, "tie_word_embeddings": tied,
        "initializer_range": 0.02,
    }


def _llama(name: str) -> dict[str, Any]:
    width, hidden, layers, heads, head_dim, tied, factor = _LLAMA[name]
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False,
        "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": head_dim,
        "vocab_size": 128_256, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": tied, "initializer_range": 0.02,
    }


_CONFIGS = {
    **{f"Qwen/Qwen2.5-{size}": _qwen25(size, instruct=False) for size in _QWEN25},
    **{f"Qwen/Qwen2.5-{size}-Instruct": _qwen25(size, instruct=True) for size in _QWEN25},
    **{f"Qwen/Qwen3-{size}": _qwen3(size) for size in _QWEN3},
    **{f"meta-llama/Llama-{name}{kind}": _llama(name)
       for name in _LLAMA for kind in ("", "-Instruct")},
}
NAMES = tuple(_CONFIGS)


def config(name: str) -> dict[str, Any] | None:
    """What the config.json of the hub repository `name` says, None where it is not known here."""
    return _CONFIGS.get(name)
