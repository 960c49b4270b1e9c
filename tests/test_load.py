"""Where a run's model comes from."""

import dataclasses
import json
import shutil
from pathlib import Path

import fsspec
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.model import hf, load
from gtalign_jax.model.load import ModelSource
from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh
from gtalign_jax.model.spec import init_params

SOURCE = ModelSource(d_model=32, d_ff=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                     vocab_multiple=16, max_position=64)
ALLOWED = "a local directory, a Hugging Face hub name .* or a URL"


@pytest.fixture
def model_dir(tmp_path):
    cfg = load.model_config(dataclasses.replace(SOURCE, vocab_multiple=1), 50)
    return hf.save_pretrained(init_params(cfg, jax.random.key(7)), cfg, tmp_path / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty download cache, and no answers remembered from other tests."""
    monkeypatch.setenv("GTALIGN_CACHE", str(tmp_path / "cache"))
    load._fetch_url.cache_clear()
    load._fetch_hub.cache_clear()
    return tmp_path / "cache" / "models"


def test_a_local_directory_is_itself(model_dir):
    assert load.resolve(str(model_dir)) == str(model_dir)


@pytest.mark.parametrize("path", ["/no/such/directory", "./nowhere", "~/nowhere", "a/b/c", "a b"])
def test_a_path_that_is_not_there_is_named_with_its_key_and_what_is_allowed(path):
    with pytest.raises(ValueError, match=f"model.path='{path}'.*no such directory.*{ALLOWED}"):
        load.resolve(path)


def test_a_file_is_not_a_model(model_dir):
    with pytest.raises(ValueError, match="model.tokenizer=.*is a file"):
        load.resolve(str(model_dir / "config.json"), "model.tokenizer")


def test_a_hub_name_fetches_only_data_files_of_the_top_level(cache, monkeypatch, model_dir):
    asked = []

    def snapshot(repository, **options):
        asked.append((repository, options))
        return str(model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load.resolve("Qwen/Qwen2.5-3B-Instruct") == str(model_dir)
    assert load.resolve("Qwen/Qwen2.5-3B-Instruct") == str(model_dir)
    load.resolve("org/name@refs/pr/1")
    (repository, options), (other, pinned) = asked  # the second time nobody was asked
    assert (repository, options["revision"]) == ("Qwen/Qwen2.5-3B-Instruct", None)
    assert (other, pinned["revision"]) == ("org/name", "refs/pr/1")
    keep = [
        name for name in huggingface_hub.utils.filter_repo_objects(
            ["config.json", "model.safetensors", "merges.txt", "tokenizer.model", "modeling.py",
             "pytorch_model.bin", "original/params.json", "chat_template.jinja"],
            allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"],
        )
    ]
    assert keep == ["config.json", "model.safetensors", "merges.txt", "tokenizer.model",
                    "chat_template.jinja"]


def test_a_hub_name_that_cannot_be_read_is_an_error_naming_it(cache):
    # The tests run with HF_HUB_OFFLINE=1: nothing is cached under this name, nothing is asked.
    with pytest.raises(ValueError, match=f"model.path='no-org/no-model'.*{ALLOWED}"):
        load.resolve("no-org/no-model")


def test_a_remote_directory_is_copied_once_and_again_when_it_changed(cache, model_dir):
    remote = fsspec.filesystem("memory")
    for file in model_dir.iterdir():
        remote.pipe_file(f"/bucket/model/{file.name}", file.read_bytes())
    remote.pipe_file("/bucket/model/modeling.py", b"raise SystemExit")
    remote.pipe_file("/bucket/model/nested/config.json", b"{}")
    first = Path(load.resolve("memory://bucket/model"))
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in model_dir.iterdir())
    assert (first / "config.json").read_bytes() == (model_dir / "config.json").read_bytes()
    load._fetch_url.cache_clear()  # another process, later
    assert load.resolve("memory://bucket/model") == str(first)
    remote.pipe_file("/bucket/model/config.json", b"{}")
    load._fetch_url.cache_clear()
    second = Path(load.resolve("memory://bucket/model"))
    assert second != first and (second / "config.json").read_bytes() == b"{}"
    assert sorted(cache.iterdir()) == sorted([first, second]), "no partial copies are left"


def test_a_remote_directory_that_is_missing_or_empty_is_named(cache):
    with pytest.raises(ValueError, match=f"model.path='memory://nowhere/x'.*{ALLOWED}"):
        load.resolve("memory://nowhere/x")
    with pytest.raises(ValueError, match="model.path='nosuch://bucket/x'.*nosuch"):
        load.resolve("nosuch://bucket/x")


def test_sizes_of_a_new_model_come_from_the_source_and_its_tokenizer():
    cfg = load.model_config(SOURCE, 50)
    assert (cfg.vocab_size, cfg.padded_vocab_size, cfg.d_model, cfg.head_dim) == (50, 64, 32, 8)
    assert cfg.qkv_bias and cfg.rope_scaling is None


def test_a_new_model_that_could_not_be_exported_is_refused_before_training():
    with pytest.raises(ValueError, match="model.qkv_bias=True: the llama family.*False"):
        load.model_config(dataclasses.replace(SOURCE, family="llama"), 50)
    load.model_config(dataclasses.replace(SOURCE, family="llama", qkv_bias=False), 50)


@pytest.mark.parametrize("change, message", [
    ({"compute_dtype": "float16"}, "model.compute_dtype='float16'.*bfloat16"),
    ({"num_layers": 0}, "model.num_layers=0.*>= 1"),
])
def test_a_source_with_an_impossible_value_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SOURCE, **change)


def test_sizes_of_a_given_model_come_from_its_files(model_dir):
    source = ModelSource(path=str(model_dir), vocab_multiple=32)
    cfg = load.model_config(source, 48)
    assert (cfg.vocab_size, cfg.padded_vocab_size, cfg.d_model) == (50, 64, 32)
    with pytest.raises(ValueError, match="tokenizer has 51 tokens, the model 50"):
        load.model_config(source, 51)


def test_a_directory_without_a_config_is_named(tmp_path):
    for sizes in (lambda source: load.model_config(source, 10), load.model_sizes):
        with pytest.raises(ValueError, match="model.path=.*has no config.json"):
            sizes(ModelSource(path=str(tmp_path)))


def test_sizes_for_planning_are_those_of_the_run(model_dir):
    source = ModelSource(path=str(model_dir), vocab_multiple=32)
    assert load.model_sizes(source) == load.model_config(source, 48)
    new = dataclasses.replace(SOURCE, vocab_size=50)
    assert load.model_sizes(new) == load.model_config(new, 50)


def test_sizes_of_a_published_model_are_known_without_asking_the_hub(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", pytest.fail)
    cfg = load.model_sizes(ModelSource(path="Qwen/Qwen2.5-3B-Instruct", vocab_multiple=1000))
    assert (cfg.d_model, cfg.num_layers, cfg.num_kv_heads, cfg.head_dim) == (2048, 36, 2, 128)
    assert (cfg.vocab_size, cfg.padded_vocab_size) == (151_936, 152_000)


def test_a_local_directory_goes_before_the_published_model_of_that_name(
    model_dir, tmp_path, monkeypatch
):
    shutil.copytree(model_dir, tmp_path / "Qwen" / "Qwen3-8B")
    monkeypatch.chdir(tmp_path)
    assert load.model_sizes(ModelSource(path="Qwen/Qwen3-8B")).d_model == 32


def test_sizes_of_another_hub_model_need_its_config_alone(cache, monkeypatch, model_dir):
    asked = []

    def download(*arguments, **options):
        asked.append((*arguments, options["revision"]))
        return str(model_dir / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    for name in ("org/name", "Qwen/Qwen3-8B@main"):  # a pinned revision is nobody's to guess
        assert load.model_sizes(ModelSource(path=name)).d_model == 32
    assert asked == [
        ("org/name", "config.json", None), ("Qwen/Qwen3-8B", "config.json", "main"),
    ]


def test_sizes_of_a_remote_directory_need_its_config_alone(cache, model_dir):
    remote = fsspec.filesystem("memory")
    remote.pipe_file("/sizes/config.json", (model_dir / "config.json").read_bytes())
    remote.pipe_file("/sizes/model.safetensors", b"not read")
    for url in ("memory://sizes", "memory://sizes/"):
        assert load.model_sizes(ModelSource(path=url)) == hf.load_config(model_dir)
    assert not cache.exists()


@pytest.mark.parametrize("path, said", [
    ("no-org/no-model", "hub repository that can be read now"),
    ("memory://sizes/nowhere", "FileNotFoundError"),
    ("nosuch://bucket/x", "nosuch"),
    ("/no/such/directory", "there is no such directory"),
])
def test_sizes_that_cannot_be_read_are_an_error_naming_the_path(path, said, cache):
    with pytest.raises(ValueError, match=f"model.path='{path}'.*{said}.*{ALLOWED}"):
        load.model_sizes(ModelSource(path=path))


def test_generation_config_is_read_where_there_is_one(model_dir):
    assert load.generation_config(SOURCE) is None
    source = ModelSource(path=str(model_dir))
    assert load.generation_config(source) is None
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert load.generation_config(source) == {"eos_token_id": [3, 4]}


def test_random_weights_are_created_sharded_and_do_not_depend_on_the_mesh():
    cfg, key = load.model_config(SOURCE, 50), jax.random.key(0)
    alone = load.load_model(SOURCE, cfg, None, key)
    layout = Layout(make_mesh(MeshConfig(fsdp=4, tensor=2)), TRAIN)
    spread = load.load_model(SOURCE, cfg, layout, key)
    assert spread.layers.up_LDF.sharding == layout.sharding("layers", "embed", "mlp")
    assert spread.layers.up_LDF.addressable_shards[0].data.shape == (2, 4, 48)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)
    other = load.load_model(dataclasses.replace(SOURCE, seed=1), cfg, None, key)
    assert not np.array_equal(alone.embed_VD, other.embed_VD)


def test_given_weights_are_float32_masters_on_their_shardings(model_dir, tmp_path):
    half = hf.save_pretrained(
        hf.load_params(model_dir, hf.load_config(model_dir)), hf.load_config(model_dir),
        tmp_path / "half", dtype="bfloat16",
    )
    source = ModelSource(path=str(half), vocab_multiple=16)
    cfg = load.model_config(source, 50)
    layout = Layout(make_mesh(MeshConfig(fsdp=4, tensor=2)), TRAIN)
    params = load.load_model(source, cfg, layout, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert params.embed_VD.sharding == layout.sharding("vocab", "embed")
    wide = hf.load_params(model_dir, cfg)
    np.testing.assert_array_equal(params.layers.q_LDNH, wide.layers.q_LDNH.astype(jnp.bfloat16))


def test_a_mesh_that_does_not_divide_the_model_is_refused_before_reading(model_dir):
    source = ModelSource(path=str(model_dir))
    cfg = load.model_config(source, 50)
    shutil.rmtree(model_dir)
    layout = Layout(make_mesh(MeshConfig(fsdp=2, tensor=4)), TRAIN)
    with pytest.raises(ValueError, match="mesh.tensor=4 .*num_kv_heads=2"):
        load.load_model(source, cfg, layout, jax.random.key(0))
