"""Sizes, declarations and random initial weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.model.spec import (
    ModelConfig,
    abstract_params,
    init_params,
    is_spec,
    num_params,
    param_specs,
)

CFG = ModelConfig("qwen2", 300, 64, 96, 8, 4, 2, 16, qkv_bias=True, vocab_multiple=128)


def named(params) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {".".join(key.name for key in path): np.asarray(x) for path, x in flat}


def test_the_number_of_weights_is_that_of_the_published_model():
    # Qwen2.5-0.5B: 494,032,768 parameters, tied; Llama 3.2 1B: 1,235,814,400, tied.
    qwen = ModelConfig("qwen2", 151_936, 896, 4864, 24, 14, 2, 64, qkv_bias=True,
                       vocab_multiple=1024)
    assert num_params(qwen) == 494_032_768
    llama = ModelConfig("llama", 128_256, 2048, 8192, 16, 32, 8, 64)
    assert num_params(llama) == 1_235_814_400
    # Qwen3-8B: 8,190,735,360, untied.
    qwen3 = ModelConfig("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True,
                        tie_embeddings=False)
    assert num_params(qwen3) == 8_190_735_360


@pytest.mark.parametrize("switches", [
    dict(qkv_bias=True), dict(qk_norm=True), dict(tie_embeddings=False), dict(vocab_multiple=7),
])
def test_specs_abstract_tree_and_initial_weights_agree(switches):
    cfg = ModelConfig("llama", 10, 8, 12, 2, 4, 2, 4, **switches)
    specs = jax.tree.leaves(param_specs(cfg), is_leaf=is_spec)
    abstract = jax.tree.leaves(abstract_params(cfg, jnp.bfloat16))
    initial = jax.tree.leaves(init_params(cfg, jax.random.key(0), jnp.bfloat16))
    assert len(specs) == len(abstract) == len(initial)
    for spec, shape, value in zip(specs, abstract, initial, strict=True):
        assert spec.shape == shape.shape == value.shape and len(spec.axes) == len(spec.shape)
        assert shape.dtype == value.dtype == jnp.bfloat16


def test_the_vocabulary_is_padded_up_to_the_multiple_with_zero_rows():
    assert CFG.padded_vocab_size == 384
    assert dataclasses.replace(CFG, vocab_size=384).padded_vocab_size == 384
    embed = named(init_params(CFG, jax.random.key(0)))["embed_VD"]
    assert not embed[300:].any() and embed[:300].any(axis=1).all()


def test_initial_weights_have_the_declared_spread_and_residual_ones_a_smaller_one():
    weights = named(init_params(dataclasses.replace(CFG, init_scale=0.05), jax.random.key(0)))
    for name, x in weights.items():
        if "norm" in name:
            assert (x == 1).all(), name
        elif "bias" in name:
            assert not x.any(), name
        else:
            # 8 layers: the two projections into the residual stream shrink by sqrt(16) = 4.
            expected = 0.05 / 4 if name.endswith(("o_LNHD", "down_LFD")) else 0.05
            real = x[:300] if name == "embed_VD" else x
            assert real.std() == pytest.approx(expected, rel=0.05), name
            assert abs(real.mean()) < expected / 20, name


def test_each_weight_has_its_own_key_so_that_a_new_weight_changes_no_other():
    plain = named(init_params(dataclasses.replace(CFG, qkv_bias=False), jax.random.key(3)))
    more = named(init_params(
        dataclasses.replace(CFG, qk_norm=True, tie_embeddings=False), jax.random.key(3)
    ))
    assert set(more) - set(plain) == {
        "head_VD", "layers.q_norm_LH", "layers.k_norm_LH", "layers.q_bias_LNH",
        "layers.k_bias_LKH", "layers.v_bias_LKH",
    }
    for name, x in plain.items():
        np.testing.assert_array_equal(x, more[name])
    assert not np.array_equal(more["embed_VD"], more["head_VD"])
    assert not np.array_equal(more["layers.k_LDKH"], more["layers.v_LDKH"])
    assert not np.array_equal(more["layers.gate_LDF"], more["layers.up_LDF"])


def test_an_unknown_family_and_heads_that_do_not_group_are_refused():
    with pytest.raises(ValueError, match="model.family='gemma'.*qwen2.*qwen3.*llama"):
        dataclasses.replace(CFG, family="gemma")
    with pytest.raises(ValueError, match="model.num_heads=4.*model.num_kv_heads=3"):
        dataclasses.replace(CFG, num_kv_heads=3)
