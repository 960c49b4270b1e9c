"""Hugging Face directories: the name table, loading with its refusals, saving. No torch here."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gtalign_jax.model import hf, safetensors_io
from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh
from gtalign_jax.model.spec import ModelConfig, RopeScaling, abstract_params, param_specs

SMALL = ModelConfig("qwen2", 11, 8, 12, 2, 4, 2, 4, qkv_bias=True, vocab_multiple=16)
QWEN3 = ModelConfig("qwen3", 11, 8, 12, 2, 4, 2, 6, qk_norm=True, tie_embeddings=False)
LLAMA = ModelConfig("llama", 11, 8, 12, 2, 4, 1, 2, rope_scaling=RopeScaling("llama3", 8.0, 32))


def random_params(cfg: ModelConfig):
    """Every weight random: norms and biases as well, padded rows zero."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        value = rng.normal(size=x.shape).astype(x.dtype)
        if path[-1].name in ("embed_VD", "head_VD"):
            value[cfg.vocab_size :] = 0
        return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(lambda x, y: x.shape == y.shape and bool((x == y).all()), a, b)
    )


@pytest.fixture
def exported(tmp_path):
    """(directory of a small qwen2 model, its parameters)."""
    params = random_params(SMALL)
    return hf.save_pretrained(params, SMALL, tmp_path / "model"), params


def edit(directory, change) -> None:
    """Rewrites the tensors of a one-file model by `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# ---- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [SMALL, QWEN3, LLAMA], ids=lambda cfg: cfg.family)
def test_every_weight_has_one_line_and_every_tensor_is_used_once(cfg, tmp_path, monkeypatch):
    assert len({w.field for w in hf.TABLE}) == len({w.name for w in hf.TABLE}) == len(hf.TABLE)
    params = random_params(cfg)
    hf.save_pretrained(params, cfg, tmp_path / "out")
    read = []
    original = hf.Weight.from_hf
    monkeypatch.setattr(
        hf.Weight, "from_hf", lambda w, x, c: read.append(w.field) or original(w, x, c)
    )
    assert equal(hf.load_params(tmp_path / "out", cfg), params)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len(read) == len(stored)
    counts = {w.field: cfg.num_layers if w.per_layer else 1 for w in hf.TABLE if w.field in read}
    assert {field: read.count(field) for field in read} == counts


def test_a_projection_is_transposed_and_its_heads_are_flattened_head_by_head(exported):
    directory, params = exported
    stored = load_file(directory / "model.safetensors")
    q = np.asarray(params.layers.q_LDNH)
    o = np.asarray(params.layers.o_LNHD)
    for layer in range(2):
        theirs = stored[f"model.layers.{layer}.self_attn.q_proj.weight"]
        bias = stored[f"model.layers.{layer}.self_attn.q_proj.bias"]
        out = stored[f"model.layers.{layer}.self_attn.o_proj.weight"]
        for n in range(4):
            for h in range(4):
                np.testing.assert_array_equal(theirs[n * 4 + h], q[layer, :, n, h])
                assert bias[n * 4 + h] == params.layers.q_bias_LNH[layer, n, h]
                np.testing.assert_array_equal(out[:, n * 4 + h], o[layer, n, h])
        gate = stored[f"model.layers.{layer}.mlp.gate_proj.weight"]
        np.testing.assert_array_equal(gate, np.asarray(params.layers.gate_LDF[layer]).T)


def test_padded_rows_are_cut_and_a_tied_head_is_not_written(exported):
    directory, params = exported
    stored = load_file(directory / "model.safetensors")
    assert params.embed_VD.shape == (16, 8)
    assert stored["model.embed_tokens.weight"].shape == (11, 8)
    assert "lm_head.weight" not in stored
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 11


# ---- loading ------------------------------------------------------------------------------------


def test_weights_are_created_on_their_shardings_with_the_same_values(exported):
    directory, params = exported
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = Layout(mesh, TRAIN)
    loaded = hf.load_params(directory, SMALL, layout)
    specs = param_specs(SMALL)
    for x, spec in zip(jax.tree.leaves(loaded), jax.tree.leaves(specs), strict=True):
        assert x.sharding == layout.sharding(*spec.axes)
    assert loaded.layers.q_LDNH.addressable_shards[0].data.shape == (2, 2, 4, 4)
    assert equal(loaded, params)
    # A model that is spread over devices is exported as if it were not.
    hf.save_pretrained(loaded, SMALL, directory.parent / "again")
    one, two = (load_file(d / "model.safetensors") for d in (directory, directory.parent / "again"))
    assert one.keys() == two.keys() and all((one[k] == two[k]).all() for k in one)


def test_weights_may_be_loaded_in_another_dtype(exported):
    directory, params = exported
    loaded = hf.load_params(directory, SMALL, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
    assert equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_round_trip_exactly(exported, tmp_path, dtype):
    _, params = exported
    first = hf.save_pretrained(params, SMALL, tmp_path / "first", dtype=dtype)
    loaded = hf.load_params(first, SMALL)
    assert jax.tree.leaves(loaded)[0].dtype == jnp.float32
    # No dtype given: that of the source's config.json.
    second = hf.save_pretrained(loaded, SMALL, tmp_path / "second", source_dir=first)
    one, two = (load_file(d / "model.safetensors") for d in (first, second))
    for name in one:
        assert one[name].dtype == two[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(one[name], two[name])


def test_a_missing_tensor_is_named(exported):
    directory, _ = exported
    edit(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        hf.load_params(directory, SMALL)


def test_an_unexpected_tensor_is_named(exported):
    directory, _ = exported
    edit(directory, lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": np.zeros(8)}))
    with pytest.raises(ValueError, match=r"unexpected tensor .*\.0\.self_attn\.o_proj\.bias"):
        hf.load_params(directory, SMALL)


def test_a_layer_too_many_is_unexpected(exported):
    directory, _ = exported
    shallow = dataclasses.replace(SMALL, num_layers=1)
    with pytest.raises(ValueError, match=r"unexpected tensor model\.layers\.1.* and 6 more"):
        hf.load_params(directory, shallow)


def test_a_wrong_shape_and_a_wrong_dtype_are_named(exported):
    directory, _ = exported
    edit(directory, lambda t: t.update({"model.norm.weight": np.zeros(9, np.float32)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(9,\).*\(8,\)"):
        hf.load_params(directory, SMALL)
    edit(directory, lambda t: t.update({"model.norm.weight": np.zeros(8, np.int8)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has dtype I8; allowed:.*BF16"):
        hf.load_params(directory, SMALL)


def test_a_stored_copy_of_a_tied_head_is_accepted_and_a_different_head_is_not(exported):
    directory, params = exported
    edit(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert equal(hf.load_params(directory, SMALL), params)
    edit(directory, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight differs.*tie_word_embeddings=false"):
        hf.load_params(directory, SMALL)


def test_stored_rotary_frequencies_of_old_files_are_not_weights(exported):
    directory, params = exported
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(directory, lambda t: t.update({name: np.zeros(2, np.float32)}))
    assert equal(hf.load_params(directory, SMALL), params)


def test_a_file_that_is_no_safetensors_file_is_named(exported):
    directory, _ = exported
    (directory / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="model.safetensors is not a safetensors file"):
        hf.load_params(directory, SMALL)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor .*the directory has"):
        hf.load_params(directory, SMALL)


# ---- shards -------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """(directory of the small model in several files, its parameters, the parsed index)."""
    params = random_params(SMALL)
    out = hf.save_pretrained(params, SMALL, tmp_path / "model", max_shard_bytes=1500)
    return out, params, json.loads((out / "model.safetensors.index.json").read_text())


def test_above_the_limit_there_are_numbered_shards_with_an_index(sharded):
    directory, params, index = sharded
    files = sorted(p.name for p in directory.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in
                     range(1, len(files) + 1)]
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    stored = {name: load_file(directory / name) for name in files}
    sizes = {name: sum(x.nbytes for x in tensors.values()) for name, tensors in stored.items()}
    assert all(size <= 1500 or len(stored[name]) == 1 for name, size in sizes.items())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(tensor in stored[name] for tensor, name in index["weight_map"].items())
    assert equal(hf.load_params(directory, SMALL), params)


@pytest.mark.parametrize("name", [
    "../secret.safetensors", "/etc/secret.safetensors", "sub/a.safetensors", "..", 7,
    "a\\b.safetensors", "model.bin",
])
def test_an_index_may_only_name_files_of_its_own_directory(sharded, name):
    directory, _, index = sharded
    index["weight_map"]["model.norm.weight"] = name
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is said to be in .*same directory"):
        hf.load_params(directory, SMALL)


def test_a_tensor_in_two_shards_is_an_error_naming_it(sharded):
    directory, _, index = sharded
    last = index["weight_map"]["model.norm.weight"]
    tensors = load_file(directory / last)
    tensors["model.embed_tokens.weight"] = np.zeros((11, 8), np.float32)
    save_file(tensors, directory / last)
    with pytest.raises(ValueError, match=r"duplicate tensor model\.embed_tokens\.weight"):
        hf.load_params(directory, SMALL)


def test_a_key_given_twice_in_the_index_is_an_error_naming_it(sharded):
    directory, _, _ = sharded
    file = directory / "model.safetensors.index.json"
    entry = '"model.norm.weight": "model-00001-of-00002.safetensors",'
    file.write_text(file.read_text().replace('"weight_map": {', '"weight_map": {' + entry))
    with pytest.raises(ValueError, match=r"duplicate key model\.norm\.weight"):
        hf.load_params(directory, SMALL)


def test_an_index_that_disagrees_with_its_files_is_an_error_naming_the_tensor(sharded):
    directory, _, index = sharded
    file = directory / "model.safetensors.index.json"
    changed = json.loads(json.dumps(index))
    del changed["weight_map"]["model.embed_tokens.weight"]  # its file holds others too
    file.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"disagree about model\.embed_tokens\.weight"):
        hf.load_params(directory, SMALL)
    index["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00009-of-00009\.safetensors .*does not exist"):
        hf.load_params(directory, SMALL)


def test_only_one_tensor_at_a_time_is_on_the_host_while_a_shard_is_written(tmp_path):
    alive, most = set(), 0

    def fetch(i: int) -> np.ndarray:
        nonlocal most
        x = np.full((5,), i, np.float32)

        class Tracked(np.ndarray):
            def __del__(self):
                alive.discard(i)

        x = x.view(Tracked)
        alive.add(i)
        most = max(most, len(alive))
        return x

    tensors = [safetensors_io.Planned(f"t{i}", (5,), lambda i=i: fetch(i)) for i in range(6)]
    safetensors_io.write_shards(tmp_path, tensors, "float32", 10**9)
    assert most <= 2  # the one being written, and the next one before the name is rebound
    stored = load_file(tmp_path / "model.safetensors")
    assert all((stored[f"t{i}"] == i).all() for i in range(6))


# ---- saving -------------------------------------------------------------------------------------


def test_tokenizer_template_and_generation_config_are_carried_along_unchanged(exported, tmp_path):
    directory, params = exported
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "notes.txt"):
        (directory / name).write_text(f"source {name}")
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer.json").write_text("other tokenizer.json")
    out = hf.save_pretrained(params, SMALL, tmp_path / "a", source_dir=directory)
    assert (out / "tokenizer.json").read_text() == "source tokenizer.json"
    assert (out / "chat_template.jinja").read_text() == "source chat_template.jinja"
    assert not (out / "notes.txt").exists()
    out = hf.save_pretrained(params, SMALL, tmp_path / "b", directory, tokenizer_dir=other)
    assert (out / "tokenizer.json").read_text() == "other tokenizer.json"
    assert not (out / "chat_template.jinja").exists(), "a template of another tokenizer"
    assert (out / "generation_config.json").read_text() == "source generation_config.json"


def test_an_export_that_fails_half_way_changes_nothing(exported, tmp_path, monkeypatch):
    directory, params = exported
    before = (directory / "model.safetensors").read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(hf, "_copy_text_files", fail)
    for out in (tmp_path / "new", directory):
        with pytest.raises(OSError, match="No space"):
            hf.save_pretrained(jax.tree.map(lambda x: x + 1, params), SMALL, out)
    assert not (tmp_path / "new").exists()
    assert (directory / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    hf.save_pretrained(params, SMALL, tmp_path / "new")
    assert not list(tmp_path.glob(".*.partial/tokenizer.json"))
    assert equal(hf.load_params(tmp_path / "new", SMALL), params)


def test_an_earlier_export_is_replaced_and_nothing_else_is(exported, tmp_path):
    directory, params = exported
    doubled = jax.tree.map(lambda x: 2 * x, params)
    hf.save_pretrained(doubled, SMALL, directory, max_shard_bytes=1500)
    assert equal(hf.load_params(directory, SMALL), doubled), "no file of the older export is left"
    with pytest.raises(ValueError, match="is where the model or its tokenizer comes from"):
        hf.save_pretrained(params, SMALL, directory, source_dir=directory)
    foreign = tmp_path / "foreign"
    shutil.copytree(directory, foreign)
    config = json.loads((foreign / "config.json").read_text())
    del config["exported_by"]
    (foreign / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not an export of this program"):
        hf.save_pretrained(params, SMALL, foreign)


def test_parameters_of_another_kind_of_model_and_integer_dtypes_are_refused(exported, tmp_path):
    _, params = exported
    with pytest.raises(ValueError, match="do not match.*head_VD"):
        hf.save_pretrained(params, dataclasses.replace(SMALL, tie_embeddings=False), tmp_path / "x")
    with pytest.raises(ValueError, match="dtype='int8'.*float32.*bfloat16"):
        hf.save_pretrained(params, SMALL, tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists()
