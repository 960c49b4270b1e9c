"""The decoder against transformers' own, on tiny random models of each family.

Every parameter is drawn at random, norms and biases too: an ignored bias or a swapped pair of
norms would pass with transformers' initial ones and zeros.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.model import hf
from gtalign_jax.model.forward import full_logits
from gtalign_jax.model.spec import ModelConfig, init_params
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

SIZES = dict(
    vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32, rope_theta=10_000.0,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, rope_theta=5_000.0)
YARN_SMOOTH = YARN | dict(truncate=False, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3)
# name -> (config class, its own settings)
MODELS = {
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen2-untied-yarn": ("Qwen2Config", dict(tie_word_embeddings=False, rope_parameters=YARN)),
    "qwen2-yarn-smooth": ("Qwen2Config", dict(rope_parameters=YARN_SMOOTH)),
    "qwen3-wide-heads": ("Qwen3Config", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-theta": (
        "Qwen3Config",
        dict(head_dim=4, num_key_value_heads=6, rms_norm_eps=1e-3,
             rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    ),
    "llama-llama3": ("LlamaConfig", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama-untied": ("LlamaConfig", dict(tie_word_embeddings=False, num_key_value_heads=1)),
    "llama-linear": (
        "LlamaConfig",
        dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=10_000.0)),
    ),
}


def build(name: str):
    """A transformers model in float32 whose every parameter is random."""
    kind, own = MODELS[name]
    config = getattr(transformers, kind)(**SIZES | own, attn_implementation="eager")
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in path else 0.2 * noise)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only lose by being shared out, and the test machine has few cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)` -> (transformers model, its directory); each is built once."""
    @functools.cache
    def make(name: str):
        model, directory = build(name), tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        return model, directory

    return make


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows [3, 70] of true lengths 70, 41, 1; the padding is not one token id."""
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 70))
    return tokens, np.array([70, 41, 1])


def reference_logits(model, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    mask = np.arange(tokens.shape[1])[None] < lengths[:, None]
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask, dtype=torch.long))
    return out.logits.float().numpy()


def assert_same_logits(cfg: ModelConfig, params, model, tolerance: float = 1e-4) -> None:
    tokens, lengths = rows()
    expected = reference_logits(model, tokens, lengths)
    assert expected.std() > 0.5, "logits too small for the tolerance to mean anything"
    run = jax.jit(full_logits, static_argnums=1)
    got = np.asarray(run(params, cfg, jnp.asarray(tokens), jnp.asarray(lengths)))
    assert got.dtype == np.float32 and got.shape[-1] == cfg.padded_vocab_size
    for row, length in enumerate(lengths):
        difference = got[row, :length, : cfg.vocab_size] - expected[row, :length]
        assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers_on_right_padded_rows(saved, name):
    model, directory = saved(name)
    cfg = hf.load_config(directory)
    assert_same_logits(cfg, hf.load_params(directory, cfg), model)


def test_a_head_dim_other_than_width_over_heads_works_where_the_family_implies_it(tmp_path):
    config = transformers.Qwen2Config(**SIZES, attn_implementation="eager")
    config.head_dim = 12  # not a field of Qwen2Config, but its model reads it
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    cfg = hf.load_config(tmp_path)
    assert (cfg.head_dim, cfg.d_model // cfg.num_heads) == (12, 8)
    assert_same_logits(cfg, hf.load_params(tmp_path, cfg), model)


@pytest.mark.parametrize("name", ["llama-llama3", "qwen2-untied-yarn"])
def test_the_older_layout_of_rope_keys_means_the_same(saved, name, tmp_path):
    _, directory = saved(name)
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    old = config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert hf.config_from_hf(old) == hf.load_config(directory)
    old["rope_scaling"]["type"] = rope.pop("rope_type")
    assert hf.config_from_hf(old) == hf.load_config(directory)


def test_padded_vocabulary_rows_get_no_mass_and_change_no_logit(saved):
    model, directory = saved("qwen3-wide-heads")
    cfg = ModelConfig(**vars(hf.load_config(directory)) | {"vocab_multiple": 64})
    assert cfg.padded_vocab_size == 128
    params = hf.load_params(directory, cfg)
    assert params.embed_VD.shape == (128, 48) and not np.any(params.embed_VD[101:])
    assert_same_logits(cfg, params, model)
    tokens, lengths = rows()
    logits = full_logits(params, cfg, jnp.asarray(tokens), jnp.asarray(lengths))
    assert float(jax.nn.softmax(logits)[..., 101:].max()) == 0.0


@pytest.mark.parametrize("name", ["qwen2", "qwen3-wide-heads", "llama-llama3"])
def test_greedy_decoding_equals_that_of_transformers_over_64_tokens(saved, name):
    model, directory = saved(name)
    cfg = hf.load_config(directory)
    tokens, lengths = rows()[0][:, :20], np.array([20, 7, 1])
    model.generation_config.eos_token_id = None
    expected = []
    for row, length in zip(tokens, lengths, strict=True):
        prompt = torch.tensor(row[None, :length])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                             max_new_tokens=64, pad_token_id=0)
        expected.append(out[0, length:].numpy())
    never = (cfg.padded_vocab_size,)
    sample = make_sampler(cfg, SamplerConfig(max_new_tokens=64, temperature=0.0), 1, never)
    rollout = sample(
        hf.load_params(directory, cfg), jnp.asarray(tokens), jnp.asarray(lengths), jnp.arange(3),
        jax.random.key(0),
    )
    assert len(np.unique(expected)) > 5, "a model that repeats one token compares nothing"
    np.testing.assert_array_equal(np.asarray(rollout.tokens_QGT)[:, 0], np.stack(expected))


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_loads_in_transformers_bit_for_bit_and_comes_back(saved, name, tmp_path):
    model, directory = saved(name)
    cfg = ModelConfig(**vars(hf.load_config(directory)) | {"vocab_multiple": 64})
    params = hf.load_params(directory, cfg)
    for out, source in ((tmp_path / "based", directory), (tmp_path / "bare", None)):
        hf.save_pretrained(params, cfg, out, source_dir=source, dtype=jnp.float32)
        again, info = transformers.AutoModelForCausalLM.from_pretrained(
            out, output_loading_info=True, attn_implementation="eager"
        )
        # A set or a dict by transformers' version; all of them empty.
        assert not any(info.values()), info
        theirs, ours = model.state_dict(), again.state_dict()
        assert theirs.keys() == ours.keys()
        for key in theirs:
            assert ours[key].dtype == torch.float32 and torch.equal(theirs[key], ours[key]), key
        tokens, lengths = rows()
        np.testing.assert_array_equal(
            reference_logits(again, tokens, lengths), reference_logits(model, tokens, lengths)
        )
        same = jax.tree.map(
            lambda a, b: bool((a == b).all()), params, hf.load_params(out, cfg)
        )
        assert jax.tree.all(same)


def test_a_model_that_started_here_computes_the_same_in_transformers(tmp_path):
    cfg = ModelConfig("llama", 101, 48, 80, 2, 6, 3, 8, rope_theta=777.0, norm_eps=1e-5,
                      tie_embeddings=False, init_scale=0.3, vocab_multiple=16)
    params = init_params(cfg, jax.random.key(1))
    hf.save_pretrained(params, cfg, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same_logits(cfg, params, model)


def test_shards_written_by_transformers_load_and_shards_written_here_load_there(tmp_path):
    model = build("llama-untied")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    cfg = hf.load_config(tmp_path / "theirs")
    params = hf.load_params(tmp_path / "theirs", cfg)
    assert_same_logits(cfg, params, model)
    hf.save_pretrained(params, cfg, tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(again[key], value), key


def test_bfloat16_files_load_exactly_and_are_exported_as_bfloat16_again(tmp_path):
    model = build("qwen2").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    cfg = hf.load_config(tmp_path / "theirs")
    params = hf.load_params(tmp_path / "theirs", cfg)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # Both compute in float32: what is compared is the loading, not bfloat16 arithmetic.
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="float32")
    assert_same_logits(cfg, params, wide)
    hf.save_pretrained(params, cfg, tmp_path / "ours", source_dir=tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
