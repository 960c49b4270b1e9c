"""config.json in and out: every key we read, every feature we refuse."""

import dataclasses
import json

import numpy as np
import pytest

from gtalign_jax.model import hf
from gtalign_jax.model.spec import ModelConfig, RopeScaling

SMALL = ModelConfig("qwen2", 11, 8, 12, 2, 4, 2, 4, qkv_bias=True, vocab_multiple=16)
QWEN3 = ModelConfig("qwen3", 11, 8, 12, 2, 4, 2, 6, qk_norm=True, tie_embeddings=False)
LLAMA = ModelConfig("llama", 11, 8, 12, 2, 4, 1, 2, rope_scaling=RopeScaling("llama3", 8.0, 32))
HF = {
    "model_type": "qwen2", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_each_key_of_config_json_reaches_its_field():
    cfg = hf.config_from_hf(HF | {
        "rope_theta": 1e6, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "initializer_range": 0.05, "head_dim": 6,
    })
    assert cfg == ModelConfig(
        "qwen2", 11, 8, 12, 2, 4, 2, 6, rope_theta=1e6, norm_eps=1e-5, qkv_bias=True,
        tie_embeddings=True, max_position=64, init_scale=0.05,
    )


def test_absent_keys_mean_the_familys_own_defaults():
    llama = {k: v for k, v in HF.items() if k != "num_key_value_heads"} | {"model_type": "llama"}
    assert hf.config_from_hf(llama).num_kv_heads == 4
    assert hf.config_from_hf(llama).head_dim == 2
    assert not hf.config_from_hf(llama).tie_embeddings
    qwen3 = hf.config_from_hf(HF | {"model_type": "qwen3"})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)
    assert hf.config_from_hf(HF | {"head_dim": None}).head_dim == 2


def test_yarn_without_an_attention_factor_gets_one_tenth_log_factor_plus_one():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    scaling = hf.config_from_hf(HF | {"rope_scaling": rope}).rope_scaling
    assert scaling.attention_factor == pytest.approx(0.1 * np.log(4.0) + 1)  # 1.1386
    both = rope | {"mscale": 2.0, "mscale_all_dim": 1.0}
    scaling = hf.config_from_hf(HF | {"rope_scaling": both}).rope_scaling
    assert scaling.attention_factor == pytest.approx((0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1))
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}
    assert hf.config_from_hf(HF | {"rope_scaling": rope}).rope_scaling.factor == 64 / 16


REFUSED = [
    ({"model_type": "gemma2"}, "model_type='gemma2'.*qwen2, qwen3, llama"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias=True.*False"),
    ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True.*False"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True.*False"),
    ({"quantization_config": {"bits": 4}}, "quantization_config=.*no such key"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures.*Qwen2ForCausalLM"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*full_attention"),
    (
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        "use_sliding_window=True",
    ),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'.*llama3 or yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks.*low_freq_factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "lacks.*factor"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of parameters"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"hidden_size": 0}, "hidden_size=0.*positive integer"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers='2'.*positive integer"),
    ({"head_dim": 3}, "head_dim=3.*even"),
    ({"num_key_value_heads": 3}, "num_kv_heads=3"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_what_is_not_computed_is_refused_by_key_value_and_allowed(change, message):
    with pytest.raises(ValueError, match=message):
        hf.config_from_hf(HF | change)


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="intermediate_size is missing"):
        hf.config_from_hf({k: v for k, v in HF.items() if k != "intermediate_size"})


def test_switches_that_are_off_are_no_reason_to_refuse():
    off = {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0,
           "attention_dropout": 0.0, "layer_types": ["full_attention"] * 2, "rope_scaling": None,
           "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    assert hf.config_from_hf(HF | off) == hf.config_from_hf(HF)


@pytest.mark.parametrize("scaling", [
    None,
    RopeScaling("linear", 2.0, 4096),
    RopeScaling("llama3", 8.0, 64, low_freq_factor=2.0, high_freq_factor=5.0),
    RopeScaling("yarn", 4.0, 64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25,
                truncate=False),
])
@pytest.mark.parametrize("cfg", [SMALL, QWEN3, LLAMA], ids=lambda cfg: cfg.family)
def test_a_config_survives_the_way_out_and_back(cfg, scaling):
    cfg = dataclasses.replace(cfg, rope_scaling=scaling, rope_theta=12_345.0, init_scale=0.5)
    back = hf.config_from_hf(json.loads(json.dumps(hf.config_to_hf(cfg))))
    assert back == dataclasses.replace(cfg, vocab_multiple=1)


def test_unknown_keys_of_the_source_config_survive_and_its_rope_layout_too():
    base = HF | {"eos_token_id": [5, 6], "my_key": {"a": 1}, "attention_dropout": 0.1,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    cfg = hf.config_from_hf(base)
    out = hf.config_to_hf(cfg, base)
    assert base.items() <= out.items()
    assert "rope_theta" not in out
    out = hf.config_to_hf(dataclasses.replace(cfg, rope_theta=5e5), base)
    assert out["rope_theta"] == 5e5 and "rope_parameters" not in out


@pytest.mark.parametrize("cfg, message", [
    (dataclasses.replace(SMALL, qkv_bias=False), "qkv_bias=False.*qwen2.*True"),
    (dataclasses.replace(QWEN3, qk_norm=False), "qk_norm=False.*qwen3.*True"),
    (dataclasses.replace(LLAMA, qkv_bias=True), "qkv_bias=True.*llama.*False"),
    (dataclasses.replace(LLAMA, num_heads=3, num_kv_heads=3), "d_model=8.*num_heads=3"),
])
def test_sizes_that_the_family_cannot_express_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        hf.config_to_hf(cfg)
