"""The table of published models: read like their files, and as large as their checkpoints."""

import pytest

from gtalign_jax.model import known
from gtalign_jax.model.hf_config import config_from_hf
from gtalign_jax.model.spec import RopeScaling, num_params

# Number of weights in the published safetensors files, a tied head counted once.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
}


def test_every_model_of_the_table_has_a_published_size():
    assert {name.removesuffix("-Instruct") for name in known.NAMES} == set(PUBLISHED)
    assert known.config("Qwen/Qwen2.5-4B") is None


@pytest.mark.parametrize("name", known.NAMES)
def test_a_model_of_the_table_has_as_many_weights_as_its_checkpoint(name):
    cfg = config_from_hf(known.config(name))
    assert num_params(cfg) == PUBLISHED[name.removesuffix("-Instruct")]


def test_base_and_instruction_tuned_models_differ_where_their_files_do():
    def rest(name):
        cfg = config_from_hf(known.config(name))
        return cfg.max_position, cfg.norm_eps

    assert rest("Qwen/Qwen2.5-32B") == (131_072, 1e-5)
    assert rest("Qwen/Qwen2.5-32B-Instruct") == (32_768, 1e-6)
    assert rest("Qwen/Qwen2.5-3B") == rest("Qwen/Qwen2.5-3B-Instruct") == (32_768, 1e-6)


def test_families_have_their_own_switches():
    qwen25 = config_from_hf(known.config("Qwen/Qwen2.5-7B-Instruct"))
    assert (qwen25.qkv_bias, qwen25.qk_norm, qwen25.head_dim) == (True, False, 128)
    qwen3 = config_from_hf(known.config("Qwen/Qwen3-0.6B"))
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    assert qwen25.rope_theta == qwen3.rope_theta == 1e6
    llama = config_from_hf(known.config("meta-llama/Llama-3.2-1B-Instruct"))
    assert (llama.qkv_bias, llama.qk_norm, llama.head_dim) == (False, False, 64)
    assert llama.rope_scaling == RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
    assert config_from_hf(known.config("meta-llama/Llama-3.1-8B")).rope_scaling.factor == 8.0
