"""Host data as bytes and back, by msgpack: what comes over the network chooses nothing that runs.

    pack     None, bool, int, float, str, bytes, list, tuple, set, dict, numpy arrays and scalars,
             dataclasses of this package  ->  bytes
    unpack   bytes -> the same, of the same types

What msgpack has no form for is an extension: a code, and bytes that are packed in turn. A dataclass
is written as module, name and fields. It is filled field by field, so that not even its own checks
run; and it is written once where it stands in several places, as a prompt does beside each of its
completions.
"""

import dataclasses
import sys
from typing import Any

import msgpack
import numpy as np

_SEQUENCES = {tuple: 1, set: 2, frozenset: 3}
_LARGE_INT, _ARRAY, _OBJECT_ARRAY, _SCALAR, _DATACLASS, _AGAIN = range(4, 10)
_ARRAY_KINDS = "biufcSU"  # what an array's dtype may be, besides object
_ALLOWED = "plain data, numpy arrays and dataclasses of gtalign_jax"
_UNREADABLE = (  # what a piece of the wrong kind in the wrong place comes to
    msgpack.UnpackException, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError
)  # fmt: skip


def pack(obj: Any) -> bytes:
    """Raises ValueError for anything but the types of the module's docstring, which it names."""
    try:
        return _Packer().pack(obj)
    except RecursionError as error:
        raise ValueError("nested too deep for an exchange") from error


def unpack(data: bytes) -> Any:
    """What `pack` was given. Raises ValueError for bytes that it does not make."""
    try:
        return _Unpacker().unpack(data)
    except _UNREADABLE as error:
        raise ValueError(f"an exchange that cannot be read: {error!r:.200}") from error


class _Packer:
    def __init__(self) -> None:
        self._places: dict[int, int] = {}  # id of a dataclass -> how many were written before it

    def pack(self, obj: Any) -> bytes:
        # strict_types: a tuple is no list, and a named tuple or an enum is not what it derives from
        return msgpack.packb(
            obj, default=self._extension, strict_types=True, unicode_errors="surrogatepass"
        )

    def _extension(self, obj: Any) -> msgpack.ExtType:
        kind = type(obj)
        if kind in _SEQUENCES:
            return self._ext(_SEQUENCES[kind], list(obj))
        if kind is int:  # beyond 64 bits
            return self._ext(_LARGE_INT, hex(obj))
        if kind is np.ndarray and obj.dtype.kind == "O":
            return self._ext(_OBJECT_ARRAY, [obj.shape, obj.ravel().tolist()])
        if kind is np.ndarray and obj.dtype.kind in _ARRAY_KINDS:
            return self._ext(_ARRAY, [obj.dtype.str, obj.shape, obj.tobytes()])
        if isinstance(obj, np.generic) and obj.dtype.kind in _ARRAY_KINDS:
            return self._ext(_SCALAR, np.asarray(obj))
        if id(obj) in self._places:
            return self._ext(_AGAIN, self._places[id(obj)])
        values = [getattr(obj, field.name) for field in _fields(kind.__module__, kind.__name__)]
        written = self._ext(_DATACLASS, [kind.__module__, kind.__name__, values])
        self._places[id(obj)] = len(self._places)
        return written

    def _ext(self, code: int, content: Any) -> msgpack.ExtType:
        return msgpack.ExtType(code, self.pack(content))


class _Unpacker:
    def __init__(self) -> None:
        self._read: list[Any] = []  # dataclasses, in the order in which they were written

    def unpack(self, data: bytes) -> Any:
        return msgpack.unpackb(
            data, ext_hook=self._extended, strict_map_key=False, unicode_errors="surrogatepass"
        )

    def _extended(self, code: int, data: bytes) -> Any:
        content = self.unpack(data)
        for kind, known in _SEQUENCES.items():
            if code == known:
                return kind(content)
        if code == _LARGE_INT:
            return int(content, 16)
        if code == _OBJECT_ARRAY:
            shape, items = content
            array = np.empty(len(items), object)
            array[:] = items
            return array.reshape(shape)
        if code == _ARRAY:
            dtype, shape, values = np.dtype(content[0]), *content[1:]
            if dtype.kind not in _ARRAY_KINDS:
                raise ValueError(f"an exchange carries no arrays of {dtype}")
            return np.frombuffer(values, dtype).reshape(shape).copy()  # may be written to
        if code == _SCALAR:
            return content[()]
        if code == _AGAIN:
            return self._read[content]
        if code != _DATACLASS:
            raise ValueError(f"an exchange knows no extension {code}")
        self._read.append(_filled(*content))
        return self._read[-1]


def _fields(module: str, name: str) -> tuple[dataclasses.Field, ...]:
    """Those of a dataclass of this package. Raises ValueError for any other type."""
    found = getattr(sys.modules.get(module), name, None)
    ours = module.startswith("gtalign_jax.") and isinstance(found, type)
    if not ours or not dataclasses.is_dataclass(found):
        raise ValueError(f"an exchange carries {_ALLOWED}, not {module}.{name}")
    return dataclasses.fields(found)


def _filled(module: str, name: str, values: list[Any]) -> Any:
    fields = _fields(module, name)
    made = object.__new__(getattr(sys.modules[module], name))
    for field, value in zip(fields, values, strict=True):
        object.__setattr__(made, field.name, value)
    return made
