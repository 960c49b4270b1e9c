"""Which rows of a batch are whose: batches cut over all devices, host work cut over all processes.

A global array lies on the devices of every process. Each block of its rows is *owned* by one
process, which reads it, scores it and speaks for it:

    place       rows of the host     -> global array; each process sends its own devices their part
    fetch       global array         -> the rows that this process owns, without any transfer
    everywhere  rows of each process -> all rows, in the order of the batch, in every process
    at_first    the same, in process 0 alone

With one process these are a copy to the devices, a copy from them, and nothing.
"""

import contextlib
import dataclasses
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from gtalign_jax.pod import exchange
from gtalign_jax.pod.exchange import PodError


def place(tree: Any, sharding: Sharding) -> Any:
    """Numpy arrays that every process holds whole, as global arrays; global arrays are resharded.

    Nothing travels between processes for a numpy array: each copies the part of its own devices.
    """
    def one(x: Any) -> jax.Array:
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def own_rows(sharding: Sharding, count: int, process: int | None = None) -> np.ndarray:
    """Which of `count` rows the process owns (default: this one), ascending.

    Each row is owned by exactly one: of the processes whose devices hold it, the first.
    """
    process = exchange.process_index() if process is None else process
    owner = np.full(count, np.iinfo(np.int32).max)
    for device, (rows,) in sharding.devices_indices_map((count,)).items():
        owner[rows] = np.minimum(owner[rows], device.process_index)
    return np.flatnonzero(owner == process)


def fetch(tree: Any, sharding: Sharding) -> tuple[np.ndarray, Any]:
    """(positions of the own rows, those rows of every array on the host, in the same order).

    `sharding`: how the rows, the leading axis of all arrays, are cut; the other axes are whole. A
    scalar, which every process has, comes back as it is.
    """
    count = next(x.shape[0] for x in jax.tree.leaves(tree) if x.ndim)
    rows = own_rows(sharding, count)
    return rows, jax.tree.map(lambda x: _rows_of(x, rows) if x.ndim else np.asarray(x), tree)


def _rows_of(x: jax.Array | np.ndarray, rows: np.ndarray) -> np.ndarray:
    if not isinstance(x, jax.Array):
        return x[rows]
    out, found = np.empty((len(rows), *x.shape[1:]), x.dtype), np.zeros(len(rows), bool)
    for shard in x.addressable_shards:
        if shard.data.shape[1:] != x.shape[1:]:
            raise ValueError(f"only rows may be cut, but {x.sharding} cuts more of {x.shape}")
        held = np.arange(x.shape[0])[shard.index[0]]
        mine = np.isin(rows, held) & ~found
        if mine.any():
            out[mine] = np.asarray(shard.data)[rows[mine] - held[0]]
            found |= mine
    if not found.all():
        raise ValueError(f"rows {rows[~found]} of {x.sharding} lie on no device of this process")
    return out


def everywhere(mine: Any, rows: np.ndarray, name: str) -> Any:
    """All rows, of own `rows` from every process; a collective. See `in_order` for `mine`."""
    return in_order(exchange.all_gather((rows, mine), name))


def at_first(mine: Any, rows: np.ndarray, name: str) -> Any | None:
    """As `everywhere`, but in process 0 alone; None elsewhere."""
    parts = exchange.gather_to_first((rows, mine), name)
    return None if parts is None else in_order(parts)


def in_order(parts: Sequence[tuple[np.ndarray, Any]]) -> Any:
    """Joins (positions, rows of these positions) into all rows by ascending position.

    Rows are trees of dicts and dataclasses, whose leaves are arrays, lists or tuples with one entry
    per row, or else a value that is the same in all parts.
    """
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    return _joined([tree for _, tree in parts], order)


def _joined(parts: Sequence[Any], order: np.ndarray) -> Any:
    first = parts[0]
    if dataclasses.is_dataclass(first):
        return dataclasses.replace(first, **{
            field.name: _joined([getattr(part, field.name) for part in parts], order)
            for field in dataclasses.fields(first)
        })
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts], order) for key in first}
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)[order]
    if isinstance(first, list | tuple):
        flat = [entry for part in parts for entry in part]
        return type(first)(flat[i] for i in order)
    return first


def check_shared(directory: str | Path) -> None:
    """Creates the local `directory`; raises PodError in every process unless all see the same one.

    Process 0 puts a file there, which the others must find.
    """
    if exchange.process_count() == 1:
        Path(directory).mkdir(parents=True, exist_ok=True)
        return
    with contextlib.ExitStack() as stack:
        name = None
        if exchange.is_first():
            Path(directory).mkdir(parents=True, exist_ok=True)
            file = tempfile.NamedTemporaryFile(dir=directory, prefix=".seen-by-all-")
            name = Path(stack.enter_context(file).name).name
        name = exchange.broadcast(name, "shared directory")
        seen = (Path(directory) / name).exists()
        answers = exchange.all_gather((socket.gethostname(), seen), "shared directory")
    blind = [f"{i} (host {host})" for i, (host, seen) in enumerate(answers) if not seen]
    if blind:
        raise PodError(
            f"process {', '.join(blind)} does not see what process 0 writes to {directory}: the "
            "work directory must be shared by all hosts (NFS, or a mounted bucket), because every "
            "process reads and writes its part of each checkpoint there"
        )
