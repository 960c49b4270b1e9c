"""Weight files and config.json, damaged or hostile: refused by file and key, before they count."""

import json
import shutil
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gtalign_jax.model import hf
from gtalign_jax.model.hf_config import config_from_hf
from gtalign_jax.model.safetensors_io import INDEX, SINGLE
from gtalign_jax.model.spec import ModelConfig, init_params

NORM = "model.norm.weight"
CFG = ModelConfig("llama", 11, 8, 12, 2, 4, 1, 2)


@pytest.fixture
def model(tmp_path):
    """(directory of a small model in one file, the same in shards)."""
    params = init_params(CFG, jax.random.key(0))
    whole = hf.save_pretrained(params, CFG, tmp_path / "whole")
    return whole, hf.save_pretrained(params, CFG, tmp_path / "shards", max_shard_bytes=600)


def refusal(directory) -> str:
    """The one line with which the model of a directory is refused."""
    with pytest.raises(ValueError) as caught:
        hf.load_params(directory, hf.load_config(directory))
    text = str(caught.value)
    assert "\n" not in text and str(directory) in text
    return text


def header(data: bytes, **change) -> bytes:
    """A safetensors file whose header says something else about the last norm."""
    (length,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + length])
    head[NORM] |= change
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize("damage", [
    lambda data: data[:-5], lambda data: data[:20], lambda data: b"", lambda data: data + b"xx",
    lambda data: struct.pack("<Q", 2**62) + data[8:], lambda data: struct.pack("<Q", 9) + data[8:],
    lambda data: b"<html>not found</html>", lambda data: b"\x80\x04.",
    lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    lambda data: header(data, dtype="F16"), lambda data: header(data, dtype="X9"),
    lambda data: header(data, shape=[-8]), lambda data: header(data, data_offsets=[0, 32]),
])
def test_a_file_that_is_not_all_of_a_safetensors_file_is_named(damage, model):
    whole, _ = model
    (whole / SINGLE).write_bytes(damage((whole / SINGLE).read_bytes()))
    assert f"{whole / SINGLE} is not a safetensors file, or not all of one" in refusal(whole)


def change(directory, **tensors) -> None:
    file = directory / SINGLE
    save_file(load_file(file) | tensors, file)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, bool, np.uint8, ml_dtypes.float8_e4m3fn])
def test_weights_of_no_float_format_are_refused(dtype, model):
    whole, _ = model
    change(whole, **{NORM: np.ones(8, dtype)})
    assert f"tensor {NORM} has dtype " in refusal(whole)


@pytest.mark.parametrize("value,dtype", [
    (np.nan, np.float32), (np.inf, np.float16), (-np.inf, ml_dtypes.bfloat16), (1e300, np.float64),
])
@pytest.mark.parametrize("name", [NORM, "model.layers.1.input_layernorm.weight"])
def test_a_weight_that_is_not_finite_is_refused_by_its_tensors_name(value, dtype, name, model):
    whole, _ = model
    change(whole, **{name: np.array([1, 2, value, 4, 5, 6, 7, 8], dtype)})
    assert f"{whole}: tensor {name} holds NaN, infinity or numbers too large" in refusal(whole)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_finite_weights_of_any_float_format_are_loaded(dtype, model):
    whole, _ = model
    change(whole, **{NORM: np.arange(8).astype(dtype)})
    params = hf.load_params(whole, hf.load_config(whole))
    assert params.final_norm_D.dtype == jnp.float32
    np.testing.assert_array_equal(params.final_norm_D, np.arange(8))


@pytest.mark.parametrize("name", [
    "../../etc/passwd", "/etc/passwd", "..", "x/../y.safetensors", "..\\x.safetensors", None, 5, [],
    "config.json", "a\x00.safetensors", "absent.safetensors", "../shards/" + SINGLE,
])
def test_an_index_that_names_another_place_is_refused(name, model):
    _, shards = model
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"][NORM] = name
    (shards / INDEX).write_text(json.dumps(index))
    assert INDEX in refusal(shards) and NORM in refusal(shards)


@pytest.mark.parametrize("how", ["gone", "cyclic", "directory"])
def test_a_shard_that_is_not_there_is_named_and_one_that_is_a_link_is_read(how, model, tmp_path):
    _, shards = model
    shard = shards / "model-00001-of-00011.safetensors"
    shutil.move(shard, tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")  # as the hub's cache has it
    hf.load_params(shards, hf.load_config(shards))
    shard.unlink()
    if how == "cyclic":
        shard.symlink_to(shard)
    if how == "directory":
        shard.mkdir()
    assert f"the file {shard.name} (of " in refusal(shards)


# ---- config.json ---------------------------------------------------------------------------------

NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
           "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim",
           "initializer_range", "rope_theta")
VALUES = (-1, 1.5, "4", "", [], {}, [1], True, 10**13, 10**400, float("nan"), float("inf"))
SCALINGS = ("x", [1], 5, True, {"rope_type": ["x"]}, *({"rope_type": "yarn"} | more for more in (
    {"factor": "x"}, {"factor": -1}, {"factor": 2, "mscale": "q", "mscale_all_dim": 1},
    {"factor": 2, "original_max_position_embeddings": "x"}, {"factor": 2, "beta_fast": [1]},
    {"factor": 2, "truncate": 1}, {"factor": 2, "attention_factor": {}},
)), {"rope_type": "llama3", "factor": [], "low_freq_factor": 1, "high_freq_factor": 1})
ODD = [(key, value) for key in NUMBERS for value in VALUES]
ODD += [("rope_scaling", value) for value in SCALINGS]
ODD += [(key, value) for key in ("layer_types", "architectures", "tie_word_embeddings")
        for value in (5, "x", {"a": 1}, [[]], 1.5)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_config_that_lies_is_refused_key_by_key(family, model):
    config = json.loads((model[0] / "config.json").read_text())
    config |= {"model_type": family, "architectures": None}
    config_from_hf(config)
    accepted = []
    for key, value in ODD:
        try:
            config_from_hf(config | {key: value})
            accepted.append((key, value))
        except ValueError as error:
            said = str(error)
            inside = value if key == "rope_scaling" and isinstance(value, dict) else ()
            assert said.startswith("config.json: ") and len(said) < 500
            assert any(name in said for name in (key, *inside)), (key, value, said)
    # Numbers of their kind, and what stands for "not there".
    assert [pair for pair in accepted if pair[0] not in ("rms_norm_eps", "initializer_range")] == [
        ("rope_theta", 1.5), ("rope_theta", ""), ("rope_theta", []), ("rope_theta", {}),
        ("rope_theta", 10**13),
    ]
    assert {value for key, value in accepted if key in ("rms_norm_eps", "initializer_range")} == {
        1.5, 10**13,
    }


def test_layers_without_number_are_refused_before_they_are_named(model):
    whole, _ = model
    config = json.loads((whole / "config.json").read_text()) | {"num_hidden_layers": 2**31 - 1}
    (whole / "config.json").write_text(json.dumps(config))
    assert "config.json says num_hidden_layers=2147483647, but there are 20" in refusal(whole)
