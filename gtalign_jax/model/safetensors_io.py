"""A directory of safetensors files: read with its index checked, written one tensor at a time.

A file is an 8-byte length, a JSON header (name -> dtype, shape, byte range), then the bytes. All
sizes are known before the first value, so that a writer needs one tensor in memory, not a shard.
This module knows no model; what a tensor means is in `hf.py`.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a file, evenly spread, for `digest`
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODES = {name: code for code, name in DTYPES.items()}
MAX_JSON_BYTES = 64 << 20  # a hundred thousand tensors in an index are a tenth of that
MAX_JSON_DEPTH = 64


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to be written: its name, shape, and the function that brings its values."""

    name: str
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]


def few(names: Sequence[str]) -> str:
    """The first six names, for an error message."""
    shown = ", ".join(sorted(names)[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. A key given twice is an error, not the last value.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read, is no JSON object in UTF-8, repeats a key, or is too large or
        too deep; names the file.
    """
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, n in collections.Counter(key for key, _ in pairs).items() if n > 1]
        if twice:
            raise ValueError(f"duplicate key {few(twice)}")
        return dict(pairs)

    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
        _check_depth(value)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # a JSONDecodeError is a ValueError
        raise ValueError(f"{path}: not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for node in level if isinstance(node, dict | list)
                 for inner in (node.values() if isinstance(node, dict) else node)]
    if level:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")


def _shards(path: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """(weight files, tensor -> file by the index). One file needs no index."""
    if (path / SINGLE).is_file():
        return [SINGLE], None
    if not (path / INDEX).is_file():
        found = sorted(p.name for p in path.iterdir())
        raise ValueError(f"{path}: neither {SINGLE} nor {INDEX}; the directory has {found}")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX}: no weight_map")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name == Path(name).name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path / INDEX}: {tensor} is said to be in {name!r}; "
                "allowed: a .safetensors file of the same directory"
            )
        if not (path / name).is_file():
            raise ValueError(f"{path / INDEX}: the file {name} (of {tensor}) does not exist")
    return sorted(set(weight_map.values())), weight_map


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[dict[str, Any]]:
    """Tensor name -> the open file that holds it; nothing is read yet.

    Raises:
      ValueError: a tensor stored twice, or an index that does not agree with the files.
    """
    files, weight_map = _shards(path)
    with contextlib.ExitStack() as stack:
        where: dict[str, Any] = {}
        held: dict[str, str] = {}
        for name in files:
            try:
                handle = stack.enter_context(safe_open(path / name, framework="np"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path / name} is not a safetensors file, or not all of one: {error}; fetch "
                    "it again"
                ) from error
            for tensor in handle.keys():
                if tensor in where:
                    raise ValueError(
                        f"{path}: duplicate tensor {tensor}, in {held[tensor]} and in {name}"
                    )
                where[tensor], held[tensor] = handle, name
        wrong = [] if weight_map is None else [
            tensor for tensor in weight_map.keys() | held.keys()
            if weight_map.get(tensor) != held.get(tensor)
        ]
        if wrong:
            raise ValueError(f"{path / INDEX} and the files disagree about {few(wrong)}")
        yield where


def digest(path: Path) -> str:
    """A short name for the weights in a directory: of the names and sizes of its files, their
    headers and a sample of their bytes. Training changes nearly all bytes, so few are enough.

    Raises ValueError where there are no such files.
    """
    names, weight_map = _shards(path)
    found = hashlib.sha256(json.dumps(weight_map, sort_keys=True).encode())
    for name in names:
        with (path / name).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            found.update(f"{name} {size} ".encode())
            file.seek(0)
            header = file.read(8)
            found.update(header + file.read(min(int.from_bytes(header, "little"), size)))
            for i in range(_SAMPLES):
                file.seek(i * size // _SAMPLES)
                found.update(file.read(_SAMPLE_BYTES))
    return found.hexdigest()[:16]


def plan_shards(tensors: Sequence[Planned], dtype: str, max_bytes: int) -> list[list[Planned]]:
    """Consecutive groups of at most `max_bytes` each (a larger tensor is a group of its own)."""
    shards: list[list[Planned]] = [[]]
    used = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * jnp.dtype(dtype).itemsize
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def write_shard(path: Path, tensors: Sequence[Planned], dtype: str) -> None:
    """Writes one file, fetching each tensor just before its bytes are written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + math.prod(tensor.shape) * jnp.dtype(dtype).itemsize
        header[tensor.name] = {
            "dtype": CODES[dtype], "shape": list(tensor.shape), "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            value = np.ascontiguousarray(tensor.fetch(), jnp.dtype(dtype))
            if value.shape != tensor.shape:
                raise ValueError(f"tensor {tensor.name}: {value.shape}, planned {tensor.shape}")
            file.write(value.reshape(-1).view(np.uint8).data)


def write_shards(directory: Path, tensors: Sequence[Planned], dtype: str, max_bytes: int) -> None:
    """One file, or numbered shards with an index where one would exceed `max_bytes`."""
    shards = plan_shards(tensors, dtype, max_bytes)
    if len(shards) == 1:
        write_shard(directory / SINGLE, shards[0], dtype)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_shard(directory / name, shard, dtype)
    total = sum(math.prod(t.shape) for t in tensors) * jnp.dtype(dtype).itemsize
    weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
