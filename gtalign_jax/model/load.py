"""Where a run's model comes from: random weights of given sizes, or a Hugging Face directory.

    resolve(path)                     -> a local directory (local, hub name, or gs:// …)
    model_config(source, vocab_size)  -> ModelConfig
    model_sizes(source)               -> ModelConfig, without weights or tokenizer: for planning
    load_model(source, cfg, layout)   -> float32 Params, created where they belong

Only JSON, safetensors and tokenizer files are ever fetched: no code, no pickles.
"""

import dataclasses
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import jax
import jax.numpy as jnp

from gtalign_jax.model import known
from gtalign_jax.model.hf import load_config, load_params
from gtalign_jax.model.hf_config import config_from_hf, config_to_hf
from gtalign_jax.model.safetensors_io import read_json
from gtalign_jax.model.sharding import ATTENTION, Layout, check_model_fits, param_shardings
from gtalign_jax.model.spec import ModelConfig, Params, init_params

ALLOWED = (
    "a local directory, a Hugging Face hub name (org/name or org/name@revision), "
    "or a URL such as gs://bucket/directory"
)
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """What model a run starts from.

    With a `path` the sizes come from its config.json and the fields from `family` to `init_scale`
    are not read. With an empty path they describe a model that starts from random weights.
    `tokenizer`: a path of the same kinds, where it is not the model's own. `vocab_size`: of the
    tokenizer trained in the run, where there is neither. `compute_dtype`: of the forward and
    backward pass; master weights are float32. `attention`: "flash", "dense", or "auto", flash on
    TPUs. `seed` varies the random weights alone.
    """

    path: str = ""
    tokenizer: str = ""
    vocab_size: int = 1024
    family: str = "qwen2"
    d_model: int = 256
    d_ff: int = 704
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    tie_embeddings: bool = True
    max_position: int = 4096
    init_scale: float = 0.02
    vocab_multiple: int = 1
    compute_dtype: str = "bfloat16"
    attention: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"model.compute_dtype={self.compute_dtype!r}: expected one of {COMPUTE_DTYPES}"
            )
        if self.attention not in ATTENTION:
            raise ValueError(f"model.attention={self.attention!r}: expected one of {ATTENTION}")
        for field in ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads",
                      "head_dim", "max_position", "vocab_multiple"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field}={getattr(self, field)}: must be >= 1")


def resolve(path: str, key: str = "model.path") -> str:
    """A local directory with the files of `path`, downloaded and cached where it is remote.

    Raises:
      ValueError: nothing there, or no access; names `key`, the value and what is allowed.
    """
    wrong = f"{key}={path!r}"
    match _kind(path, wrong):
        case "url":
            return _fetch_url(path, wrong)
        case "hub":
            return _fetch_hub(path, wrong)
    return str(Path(path).expanduser())


def _kind(path: str, wrong: str) -> str:
    """"url", "directory" or "hub"; nothing is fetched. Raises ValueError for anything else."""
    if "://" in path:
        return "url"
    local = Path(path).expanduser()
    if local.is_dir():
        return "directory"
    if local.exists():
        raise ValueError(f"{wrong} is a file; allowed: {ALLOWED}")
    if path.startswith(("/", ".", "~")) or not HUB_NAME.fullmatch(path):
        raise ValueError(f"{wrong}: there is no such directory; allowed: {ALLOWED}")
    return "hub"


def _hub_error(wrong: str, error: Exception) -> ValueError:
    return ValueError(
        f"{wrong}: neither a local directory nor a hub repository that can be read now "
        f"({type(error).__name__}: {str(error).splitlines()[0]}); allowed: {ALLOWED}"
    )


@functools.cache
def _fetch_hub(name: str, wrong: str) -> str:
    """The snapshot of a hub repository, in the hub's own cache; top-level files only."""
    repository, _, revision = name.partition("@")
    try:
        return huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(PATTERNS),
            ignore_patterns=["*/*"],
        )
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        raise _hub_error(wrong, error) from error


def cache_dir() -> Path:
    """Where copies of remote directories are kept: `$GTALIGN_CACHE`, else in `~/.cache`."""
    return Path(os.environ.get("GTALIGN_CACHE", "~/.cache/gtalign_jax")).expanduser() / "models"


@functools.cache
def _fetch_url(url: str, wrong: str) -> str:
    """A local copy of a remote directory, named by the content's fingerprint."""
    try:
        fs, root = fsspec.core.url_to_fs(url)
        files = {
            Path(info["name"]).name: info["name"] for info in fs.ls(root, detail=True)
            if info["type"] == "file"
            and any(fnmatch(Path(info["name"]).name, pattern) for pattern in PATTERNS)
        }
        if not files:
            raise ValueError("the directory has no JSON or safetensors files")
        state = sorted((name, fs.ukey(remote)) for name, remote in files.items())
        digest = hashlib.sha256(repr((url, state)).encode()).hexdigest()[:20]
        target = cache_dir() / digest
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".partial-"))
            try:
                for name, remote in files.items():
                    fs.get_file(remote, str(partial / name))
                _publish(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, ValueError, ImportError) as error:
        raise _url_error(wrong, error) from error
    return str(target)


def _url_error(wrong: str, error: Exception) -> ValueError:
    # fsspec's ImportError names the package to install (gs:// needs gcsfs).
    return ValueError(f"{wrong}: {type(error).__name__}: {error}; allowed: {ALLOWED}")


def _publish(partial: Path, target: Path) -> None:
    """Renames the finished copy; another process of this host may have been first."""
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def model_config(source: ModelSource, vocab_size: int) -> ModelConfig:
    """The sizes of the model; `vocab_size` is the number of tokens of its tokenizer.

    Raises:
      ValueError: no model at model.path, an unsupported one, a vocabulary too small for the
        tokenizer, or sizes that could not be exported.
    """
    if not source.path:
        sizes = {
            field.name: getattr(source, field.name)
            for field in dataclasses.fields(ModelConfig)
            if field.name not in ("vocab_size", "rope_scaling")
        }
        cfg = ModelConfig(vocab_size=vocab_size, **sizes)
        config_to_hf(cfg)  # a model that nobody could take home is refused before it is trained
        return cfg
    cfg = _config_of_directory(source, resolve(source.path))
    if vocab_size > cfg.vocab_size:
        raise ValueError(
            f"model.path={source.path!r}: the tokenizer has {vocab_size} tokens, the model "
            f"{cfg.vocab_size}; allowed: a tokenizer with at most {cfg.vocab_size} "
            f"(model.tokenizer={source.tokenizer!r})"
        )
    return dataclasses.replace(cfg, vocab_multiple=source.vocab_multiple)


def _config_of_directory(source: ModelSource, directory: str) -> ModelConfig:
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"model.path={source.path!r} has no config.json; allowed: {ALLOWED}")
    return load_config(directory)


def model_sizes(source: ModelSource) -> ModelConfig:
    """The sizes of the model that `source` names, at most its config.json fetched.

    What `model_config` says once the model is there. A well-known hub name is looked up in
    `known`. Without a path, `model.vocab_size` stands for the number of the tokenizer's tokens.

    Raises:
      ValueError: as `resolve` and `model_config`.
    """
    if not source.path:
        return model_config(source, source.vocab_size)
    path, wrong = source.path, f"model.path={source.path!r}"
    match _kind(path, wrong):
        case "url":
            cfg = _config_of_url(path, wrong)
        case "hub":
            published = known.config(path)
            cfg = _config_of_hub(path, wrong) if published is None else config_from_hf(published)
        case _:
            cfg = _config_of_directory(source, str(Path(path).expanduser()))
    return dataclasses.replace(cfg, vocab_multiple=source.vocab_multiple)


def _config_of_hub(name: str, wrong: str) -> ModelConfig:
    repository, _, revision = name.partition("@")
    try:
        file = huggingface_hub.hf_hub_download(
            repository, "config.json", revision=revision or None
        )
    except (OSError, ValueError) as error:
        raise _hub_error(wrong, error) from error
    return load_config(Path(file).parent)


def _config_of_url(url: str, wrong: str) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        try:
            fs, root = fsspec.core.url_to_fs(url)
            fs.get_file(f"{root.rstrip('/')}/config.json", str(Path(folder) / "config.json"))
        except (OSError, ValueError, ImportError) as error:
            raise _url_error(wrong, error) from error
        return load_config(folder)


def generation_config(source: ModelSource) -> dict[str, Any] | None:
    """The content of the model's generation_config.json, None where there is none."""
    if not source.path:
        return None
    file = Path(resolve(source.path)) / "generation_config.json"
    return read_json(file) if file.is_file() else None


def load_model(source: ModelSource, cfg: ModelConfig, layout: Layout | None,
               key: jax.Array) -> Params:
    """Float32 master weights of `cfg`, each created on its sharding, none whole on one device.

    Raises:
      ValueError: files that do not hold this model, or a mesh that does not divide it.
    """
    if layout is not None:
        check_model_fits(cfg, layout.mesh)
    if source.path:
        return load_params(resolve(source.path), cfg, layout, jnp.float32)
    return make_init(cfg, layout)(cfg, jax.random.fold_in(key, source.seed))


def make_init(cfg: ModelConfig, layout: Layout | None) -> Callable[..., Params]:
    """The jitted `init_params(cfg, key)`, its weights laid out by rule."""
    shardings = None if layout is None else param_shardings(cfg, layout)
    return jax.jit(init_params, static_argnums=0, out_shardings=shardings)
