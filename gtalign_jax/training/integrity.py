"""Whether what a checkpoint gives back is what was put in.

    sums(x) = (Σ_i h(x_i + a i),  Σ_i h(x_i + b i))   mod 2^32

x_i are the bits of element i as an unsigned integer, h stirs 32 bits one to one. Integer sums are
exact in any order, so they are the same on any number of devices; one changed element always
changes both, and whatever else happens to an array leaves them as they were once in 2^64. (Without
h, a change of every sign would cancel out.) They are taken on the devices: one read of the state,
nothing gathered.

Storage can fail in two ways, which must not be mixed up: what it holds is damaged (an older
checkpoint is the way on), or it cannot be asked just now (then nothing may be concluded).
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

_ODD = (0x9E3779B1, 0x85EBCA77)  # a and b
_GONE = (2, 20, 21)  # no such file, not a directory, is a directory: of what the disk holds
_UNABLE = re.compile(  # what TensorStore says of storage that cannot be asked
    r"PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED"
    r"|CANCELLED|INTERNAL"
)


def records(tree: Any) -> dict[str, dict[str, Any]]:
    """{dotted name: {"shape", "dtype", "sums"}} of a tree of arrays, as JSON would hold it."""
    groups: dict[Any, dict[str, jax.Array]] = {}
    for name, x in named_leaves(tree).items():
        groups.setdefault(_everywhere(x), {})[name] = x
    found = {}
    for sharding, group in groups.items():
        table = np.asarray(_summing(sharding)(list(group.values())))
        for (name, x), pair in zip(group.items(), table.tolist(), strict=True):
            found[name] = {"shape": list(x.shape), "dtype": str(x.dtype), "sums": pair}
    return found


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaf by dotted name, the same for a saved tree (dicts) and a live one (dataclasses)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves
    }


def _everywhere(x: Any) -> Any:
    """Where the sums of `x` go, so that every process can read them; arrays are summed together
    that lie on the same devices."""
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding if isinstance(sharding, SingleDeviceSharding) else None


@functools.cache
def _summing(sharding: Any) -> Any:
    return jax.jit(
        lambda arrays: jnp.stack([_sums(x) for x in arrays]), out_shardings=sharding
    )


def _sums(x: jax.Array) -> jax.Array:
    """uint32 [2]: the sums of the module's docstring."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)  # of 64 bits jax makes two elements
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * width}").astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place + steps * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.stack([jnp.sum(_stirred(bits + place * jnp.uint32(odd))) for odd in _ODD])


def _stirred(x: jax.Array) -> jax.Array:
    """Each of its 32 bits depends on all of those of `x` (the end of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def seal(run: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-like data with a digest of itself."""
    plain = json.loads(json.dumps(dict(run)))
    return {**plain, "digest": _digest(plain)}


def unseal(text: str) -> dict[str, Any]:
    """What `seal` was given, from JSON. Raises ValueError where it is something else.

    Checkpoints of before there was a digest have none.
    """
    run = json.loads(text)
    if not isinstance(run, dict) or not isinstance(run.get("fingerprint"), dict):
        raise ValueError("it holds no fingerprint")
    digest = run.pop("digest", None)
    if digest not in (None, _digest(run)):
        raise ValueError("its content and its digest differ")
    return run


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def is_damage(error: BaseException) -> bool:
    """Whether an error of reading says that what was read is damaged, and not that storage denies
    it, does not answer, or that this machine lacks memory."""
    chain = list(_chain(error))
    for link in chain:
        number = _number(link)
        if number is not None and number not in _GONE:
            return False
        if isinstance(link, MemoryError | RuntimeError | TimeoutError) or _UNABLE.search(str(link)):
            return False
    known = (ValueError, LookupError, TypeError, AttributeError, EOFError, OSError)
    return isinstance(chain[-1], known)


def reason(error: BaseException) -> str:
    """What the first cause of an error says, in one short line."""
    first = list(_chain(error))[-1]
    lines = str(first).partition(" [tensorstore_spec=")[0].strip().splitlines() or [""]
    said = f"{type(first).__name__}: {lines[0][:300]}"
    number = _number(first)  # what TensorStore says of it comes late in a long line
    return said if number is None else f"{os.strerror(number)} ({said})"


def _number(error: BaseException) -> int | None:
    """Of the operating system's error, where it is one, as Python or TensorStore tells it."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from. (Contexts may go round in circles: the error of a
    save is met a second time while the first is on its way out.)"""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__
