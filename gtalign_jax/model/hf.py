"""Hugging Face safetensors directories in and out, one tensor at a time.

    load_params(dir, cfg, layout)       -> Params, each weight placed on its sharding
    save_pretrained(params, cfg, dir)   -> a directory that transformers loads

One table, `TABLE`, relates every weight of ours to its Hugging Face name and dimensions; loading
and saving read it in opposite directions. A linear layer is stored there as [out, in], heads and
head size flattened; ours are [in, heads, head] and stacked over layers. Values are copied, never
computed with: a round trip in one dtype is exact.

Nothing here reads text or knows a tokenizer; its files are copied as they are.
"""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gtalign_jax.model.hf_config import config_from_hf, config_to_hf
from gtalign_jax.model.safetensors_io import (
    DTYPES,
    Planned,
    few,
    open_tensors,
    read_json,
    write_shards,
)
from gtalign_jax.model.sharding import Layout
from gtalign_jax.model.spec import ModelConfig, Params, is_spec, param_specs

# Files that make up a tokenizer; carried along unchanged.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)
GENERATION = "generation_config.json"
MARK, PROGRAM = "exported_by", "gtalign_jax"  # in config.json: this directory is ours


@dataclasses.dataclass(frozen=True)
class Weight:
    """One line of the table: our field, its name there, and the dimensions there.

    `theirs` groups our dimension letters: "NH D" is a matrix [N*H, D]. Our own order is the suffix
    of the field; a leading L means that the file has one tensor for each layer.
    """

    field: str
    name: str
    theirs: str

    @property
    def ours(self) -> str:
        return self.field.rsplit("_", 1)[1].removeprefix("L")

    @property
    def per_layer(self) -> bool:
        return self.field.startswith("layers.")

    def names(self, cfg: ModelConfig) -> list[str]:
        layers = range(cfg.num_layers) if self.per_layer else range(1)
        return [self.name.format(layer=layer) for layer in layers]

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """The shape of one tensor in the file."""
        sizes = _sizes(cfg)
        return tuple(math.prod(sizes[d] for d in group) for group in self.theirs.split())

    def from_hf(self, x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        letters, sizes = self.theirs.replace(" ", ""), _sizes(cfg)
        x = x.reshape([sizes[d] for d in letters])
        return x.transpose([letters.index(d) for d in self.ours])

    def to_hf(self, x: np.ndarray, cfg: ModelConfig) -> np.ndarray:
        letters = self.theirs.replace(" ", "")
        return x.transpose([self.ours.index(d) for d in letters]).reshape(self.shape(cfg))


_ATTENTION = "model.layers.{layer}.self_attn."
EMBED = "model.embed_tokens.weight"
_MLP = "model.layers.{layer}.mlp."
TABLE = (
    Weight("embed_VD", EMBED, "V D"),
    Weight("layers.attn_norm_LD", "model.layers.{layer}.input_layernorm.weight", "D"),
    Weight("layers.q_LDNH", _ATTENTION + "q_proj.weight", "NH D"),
    Weight("layers.k_LDKH", _ATTENTION + "k_proj.weight", "KH D"),
    Weight("layers.v_LDKH", _ATTENTION + "v_proj.weight", "KH D"),
    Weight("layers.o_LNHD", _ATTENTION + "o_proj.weight", "D NH"),
    Weight("layers.q_bias_LNH", _ATTENTION + "q_proj.bias", "NH"),
    Weight("layers.k_bias_LKH", _ATTENTION + "k_proj.bias", "KH"),
    Weight("layers.v_bias_LKH", _ATTENTION + "v_proj.bias", "KH"),
    Weight("layers.q_norm_LH", _ATTENTION + "q_norm.weight", "H"),
    Weight("layers.k_norm_LH", _ATTENTION + "k_norm.weight", "H"),
    Weight("layers.mlp_norm_LD", "model.layers.{layer}.post_attention_layernorm.weight", "D"),
    Weight("layers.gate_LDF", _MLP + "gate_proj.weight", "F D"),
    Weight("layers.up_LDF", _MLP + "up_proj.weight", "F D"),
    Weight("layers.down_LFD", _MLP + "down_proj.weight", "D F"),
    Weight("final_norm_D", "model.norm.weight", "D"),
    Weight("head_VD", "lm_head.weight", "V D"),
)


def _sizes(cfg: ModelConfig) -> dict[str, int]:
    return {"V": cfg.vocab_size, "D": cfg.d_model, "F": cfg.d_ff, "N": cfg.num_heads,
            "K": cfg.num_kv_heads, "H": cfg.head_dim}


def _field(path: Any) -> str:
    return ".".join(key.name for key in path)


def _present(cfg: ModelConfig) -> list[Weight]:
    """The lines of the table that a model of this kind has."""
    specs = jax.tree_util.tree_flatten_with_path(param_specs(cfg), is_leaf=is_spec)[0]
    fields = {_field(path) for path, _ in specs}
    unknown = fields - {weight.field for weight in TABLE}
    if unknown:
        raise ValueError(f"weights without a Hugging Face name: {sorted(unknown)}")
    return [weight for weight in TABLE if weight.field in fields]


# ---- in -----------------------------------------------------------------------------------------


def load_config(path: str | Path) -> ModelConfig:
    """The `ModelConfig` of a local Hugging Face directory; ValueError where unsupported."""
    file = Path(path) / "config.json"
    content = read_json(file)
    try:
        return config_from_hf(content)
    except ValueError as error:
        raise ValueError(f"{file.parent}: {error}") from error


def _check_tensors(path: Path, files: Mapping[str, Any], cfg: ModelConfig) -> None:
    """Every expected tensor is there with its shape and a float dtype, and nothing else is."""
    if cfg.num_layers > len(files):  # before as many names are made
        raise ValueError(f"{path}: config.json says num_hidden_layers={cfg.num_layers}, but there "
                         f"are {len(files)} tensors in all")
    expected = {n: w for w in _present(cfg) for n in w.names(cfg)}
    # Old Llama files store the rotary frequencies: derived from config.json, never read.
    found = {n for n in files if not n.endswith(".rotary_emb.inv_freq")}
    missing = expected.keys() - found
    if missing:
        raise ValueError(f"{path}: missing tensor {few(list(missing))}")
    extra = found - expected.keys()
    if cfg.tie_embeddings and "lm_head.weight" in extra:
        pair = [files[name].get_tensor(name) for name in (EMBED, "lm_head.weight")]
        if pair[0].dtype != pair[1].dtype or not np.array_equal(*pair):
            raise ValueError(
                f"{path}: config.json ties the head to the embedding, but lm_head.weight differs "
                f"from {EMBED}; allowed: tie_word_embeddings=false, or equal"
            )
        extra.remove("lm_head.weight")
    if extra:
        raise ValueError(f"{path}: unexpected tensor {few(list(extra))}")
    for name, weight in expected.items():
        header = files[name].get_slice(name)
        if tuple(header.get_shape()) != weight.shape(cfg):
            raise ValueError(
                f"{path}: tensor {name} has shape {tuple(header.get_shape())}, but config.json "
                f"says {weight.shape(cfg)}"
            )
        if header.get_dtype() not in DTYPES:
            raise ValueError(
                f"{path}: tensor {name} has dtype {header.get_dtype()}; allowed: {list(DTYPES)}"
            )


def _check_finite(path: Path, name: str, x: np.ndarray) -> None:
    """A damaged file is told from a training that diverges: here, by the tensor's name."""
    with np.errstate(over="ignore"):  # of float64, what is too large for float32 is infinite there
        narrow = x.astype(np.float32) if x.dtype == np.float64 else x
    if not np.isfinite(narrow).all():
        raise ValueError(f"{path}: tensor {name} holds NaN, infinity or numbers too large for "
                         "float32; allowed: finite weights (fetch the file again)")


def _stack(path: Path, files: Mapping[str, Any], weight: Weight, shape: tuple[int, ...],
           cfg: ModelConfig) -> np.ndarray:
    """One stacked weight on the host, in the dtype of the files; padded rows are zero."""
    names = weight.names(cfg)
    kinds = {DTYPES[files[name].get_slice(name).get_dtype()] for name in names}
    out = np.zeros(shape, jnp.dtype(kinds.pop()) if len(kinds) == 1 else np.float32)
    for layer, name in enumerate(names):
        x = weight.from_hf(files[name].get_tensor(name), cfg)
        _check_finite(path, name, x)
        if weight.per_layer:
            out[layer] = x
        else:
            out[: x.shape[0]] = x
    return out


def load_params(path: str | Path, cfg: ModelConfig, layout: Layout | None = None,
                dtype: Any = jnp.float32) -> Params:
    """The weights of a local Hugging Face directory, cast to `dtype`.

    The host holds about one stacked weight at a time. With a layout every weight is created on
    its sharding; each process reads the files and keeps the part of its own devices.

    Raises:
      ValueError: a missing, unexpected, duplicate, wrongly shaped or not finite tensor, or a bad
        index.
    """
    path = Path(path)
    lines = {weight.field: weight for weight in _present(cfg)}
    with open_tensors(path) as files:
        _check_tensors(path, files, cfg)

        def place(key_path: Any, spec: Any) -> jax.Array:
            host = _stack(path, files, lines[_field(key_path)], spec.shape, cfg)
            if layout is None:
                return jnp.asarray(host.astype(dtype))
            sharding = layout.sharding(*spec.axes)
            return jax.make_array_from_callback(
                spec.shape, sharding, lambda index: host[index].astype(dtype)
            )

        return jax.tree_util.tree_map_with_path(place, param_specs(cfg), is_leaf=is_spec)


# ---- out ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="dtype")
def _layer(stacked: jax.Array, layer: jax.Array, dtype: str) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False).astype(dtype)


def _to_host(x: jax.Array) -> np.ndarray:
    """The whole array, wherever its parts are; a collective when other processes hold some."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _planned(params: Params, cfg: ModelConfig, dtype: str) -> list[Planned]:
    """Every tensor of the exported model, in the order of the layers."""
    leaves = {_field(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    lines = _present(cfg)
    if leaves.keys() != {weight.field for weight in lines}:
        differ = leaves.keys() ^ {weight.field for weight in lines}
        raise ValueError(f"the parameters do not match the model config: {few(list(differ))}")

    def fetch(weight: Weight, layer: int) -> np.ndarray:
        x = leaves[weight.field]
        if weight.per_layer:
            host = _to_host(_layer(x, np.int32(layer), dtype))
        else:
            host = _to_host(x.astype(dtype))
        if "V" in weight.ours:
            host = host[: cfg.vocab_size]  # padded rows exist only on our side
        return weight.to_hf(host, cfg)

    def plan(weights: Iterable[Weight], layer: int) -> list[Planned]:
        return [
            Planned(w.name.format(layer=layer), w.shape(cfg), functools.partial(fetch, w, layer))
            for w in weights
        ]

    blocks = [weight for weight in lines if weight.per_layer]
    rest = [weight for weight in lines if not weight.per_layer]
    out = plan(rest[:1], 0)
    for layer in range(cfg.num_layers):
        out += plan(blocks, layer)
    return out + plan(rest[1:], 0)


def _copy_text_files(out: Path, source: Path | None, tokenizer: Path | None) -> None:
    """Tokenizer, chat template and generation_config, byte for byte."""
    for name in TOKENIZER_FILES:
        folder = tokenizer or source
        if folder is not None and (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    for folder in (source, tokenizer):
        if folder is not None and (folder / GENERATION).is_file():
            shutil.copyfile(folder / GENERATION, out / GENERATION)
            return


def save_pretrained(
    params: Params,
    cfg: ModelConfig,
    out_dir: str | Path,
    source_dir: str | Path | None = None,
    tokenizer_dir: str | Path | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes a directory that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Written beside its place and renamed when complete. Padded vocabulary rows are cut, a tied
    head is not written. In a multi-process run all processes must call this; the first writes.

    Args:
      source_dir: the directory the weights came from: its config.json is the base of the new one,
        and its generation_config.json and tokenizer files are copied.
      tokenizer_dir: where the tokenizer files are, if not in `source_dir`.
      dtype: of the tensors; None: the dtype named in the source's config.json, else float32.
    Raises:
      ValueError: `out_dir` holds anything but an earlier export; the family cannot express `cfg`;
        or a dtype that is not a float format.
    """
    out = Path(out_dir)
    source = None if source_dir is None else Path(source_dir)
    tokenizer = None if tokenizer_dir is None else Path(tokenizer_dir)
    base = None if source is None else read_json(source / "config.json")
    config = config_to_hf(cfg, base) | {MARK: PROGRAM}
    name = _dtype_name(dtype or config.get("dtype") or config.get("torch_dtype") or "float32")
    config["dtype" if "dtype" in config else "torch_dtype"] = name
    _check_target(out, {source, tokenizer})
    tensors = _planned(params, cfg, name)
    if jax.process_index() == 0:
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_shards(partial, tensors, name, max_shard_bytes)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _copy_text_files(partial, source, tokenizer)
        _replace(partial, out)
    else:
        for tensor in tensors:
            tensor.fetch()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_pretrained")
    return out


def _dtype_name(dtype: Any) -> str:
    allowed = ("float32", "bfloat16", "float16")
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in allowed:
        raise ValueError(f"export dtype={name!r}: allowed: {allowed}")
    return name


def _check_target(out: Path, sources: set[Path | None]) -> None:
    """Only an empty place or an earlier export, marked as such, is ever replaced."""
    if any(folder is not None and folder.resolve() == out.resolve() for folder in sources):
        raise ValueError(f"{out} is where the model or its tokenizer comes from: choose another")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").is_file() or read_json(out / "config.json").get(MARK) != PROGRAM:
        raise ValueError(f"{out} exists and is not an export of this program: choose another")


def _replace(partial: Path, out: Path) -> None:
    """Puts the finished directory in its place; an older one is removed only after that."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
