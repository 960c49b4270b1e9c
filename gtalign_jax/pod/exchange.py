"""Host data from every process to every process: text, scores, metrics; no device arrays.

It travels through the key-value store of JAX's coordination service, which process 0 serves:

    gather_to_first   every process but 0 stores its object; process 0 reads all and deletes them
    broadcast         process 0 stores one object; the others read it
    all_gather        gather_to_first, then broadcast of the list

so process 0 answers a number of requests that grows with the processes, not with their square, and
what it holds stays flat: contributions are deleted once read, a broadcast is deleted at the next
`broadcast` or `all_gather` that follows an `all_gather`, when everybody has certainly read it.

These calls are collective: every process makes the same ones in the same order, from one thread.
Each carries its name, so that processes which are out of step say so instead of mixing data up.
Nothing here touches an accelerator, and with one process nothing is stored at all.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed

from gtalign_jax.pod import plain

TIMEOUT_S = 7 * 86400.0  # a last resort: the watch (watch.py) knows the phases' deadlines
PART_BYTES = 2 << 20  # gRPC refuses messages of more than 4 MiB unless both ends were told not to
_SLICE_S = 1.0  # a wait returns to Python so often, or no signal handler would ever run
_ROOT = "gtalign/exchange"

_calls = itertools.count()
_stale: list[str] = []  # broadcasts of process 0 that may still be read
_read: list[str] = []  # broadcasts of process 0 that everybody has read


class PodError(RuntimeError):
    """The processes of a run cannot work together; the message names which and why."""


def store() -> Any:
    """The client of the coordination service's key-value store; None with one process.

    JAX has no public name for it; orbax, too, takes it from here. This is the only place of ours
    that does, so a JAX release that moves it breaks one line.
    """
    return distributed.global_state.client


def process_index() -> int:
    """This process' place among all of them. Unlike jax.process_index(), starts no backend."""
    return distributed.global_state.process_id


def process_count() -> int:
    """How many processes the run has. Unlike jax.process_count(), starts no backend."""
    return distributed.global_state.num_processes


def is_first() -> bool:
    """Whether this process writes logs and files."""
    return process_index() == 0


def gather_to_first(obj: Any, name: str = "", timeout_s: float = TIMEOUT_S) -> list[Any] | None:
    """Every process' `obj` in process order, in process 0; None elsewhere.

    `obj`: plain Python data, numpy arrays and dataclasses of this package, no jax arrays.
    Raises PodError where a process did not come within `timeout_s`, naming it.
    """
    if process_count() == 1:
        return [obj]
    call = _Call("gather_to_first", name, timeout_s)
    gathered = _gather(obj, call)
    _forget_contributions(call)
    return gathered


def broadcast(obj: Any, name: str = "", timeout_s: float = TIMEOUT_S) -> Any:
    """Process 0's `obj`, in every process; what the others pass is ignored. Raises PodError."""
    if process_count() == 1:
        return obj
    return _spread(obj, _Call("broadcast", name, timeout_s))


def all_gather(obj: Any, name: str = "", timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Every process' `obj` in process order, in every process. Raises PodError."""
    if process_count() == 1:
        return [obj]
    call = _Call("all_gather", name, timeout_s)
    gathered = _gather(obj, call)
    if is_first():
        # Whoever has come to this call has left all earlier ones.
        _read.extend(_stale)
        _stale.clear()
    everything = _spread(gathered, call)
    _forget_contributions(call)
    return everything


class _Call:
    """One collective call: where its keys lie, and when it must be done."""

    def __init__(self, kind: str, name: str, timeout_s: float) -> None:
        self.kind = kind
        self.title = f"{kind} {name!r}" if name else kind
        self.directory = f"{_ROOT}/{next(_calls)}"
        self.timeout_s = timeout_s
        self.end = time.monotonic() + timeout_s

    def put(self, place: str, obj: Any) -> None:
        """Stores `obj` in parts; the head comes last, so whoever sees it finds all of it."""
        data = _as_pod_error(plain.pack, obj)
        parts = [data[i : i + PART_BYTES] for i in range(0, len(data), PART_BYTES)]
        for number, part in enumerate(parts):
            store().key_value_set_bytes(f"{self.directory}/{place}/{number}", part)
        store().key_value_set(f"{self.directory}/{place}/head", f"{len(parts)} {self.title}")

    def get(self, place: str) -> Any:
        """What some process has put at `place`; waits for it until the deadline."""
        count, _, title = self._wait(f"{place}/head").decode().partition(" ")
        if title != self.title:
            raise PodError(
                f"process {process_index()} is at {self.title}, but {_owner(place)} is at {title}: "
                "all processes must make the same exchanges in the same order"
            )
        data = b"".join(self._wait(f"{place}/{number}") for number in range(int(count)))
        return _as_pod_error(plain.unpack, data)

    def _wait(self, key: str) -> bytes:
        while True:
            left = self.end - time.monotonic()
            try:
                return store().blocking_key_value_get_bytes(
                    f"{self.directory}/{key}", max(1, int(1000 * min(left, _SLICE_S)))
                )
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise PodError(f"{self.title}: process 0 does not answer: {error}") from error
            if left <= 0:
                raise PodError(self._missing())

    def _missing(self) -> str:
        contributors = () if self.kind == "broadcast" else range(1, process_count())
        absent = [index for index in contributors if not self._has(f"{index}/head")] or [0]
        return (
            f"{self.title}: process {process_index()} waited {self.timeout_s:g} s for "
            f"process{'es' * (len(absent) > 1)} {', '.join(map(str, absent))} of {process_count()}"
        )

    def _has(self, key: str) -> bool:
        try:
            store().blocking_key_value_get(f"{self.directory}/{key}", 50)
        except jax.errors.JaxRuntimeError:
            return False
        return True


def _as_pod_error(code: Callable[[Any], Any], what: Any) -> Any:
    try:
        return code(what)
    except ValueError as error:
        raise PodError(str(error)) from error


def _owner(place: str) -> str:
    return f"process {0 if place == 'all' else place}"


def _gather(obj: Any, call: _Call) -> list[Any] | None:
    if not is_first():
        call.put(str(process_index()), obj)
        return None
    gathered = [obj]
    for index in range(1, process_count()):
        gathered.append(call.get(str(index)))
    return gathered


def _forget_contributions(call: _Call) -> None:
    if is_first():
        for index in range(1, process_count()):
            store().key_value_delete(f"{call.directory}/{index}/")


def _spread(obj: Any, call: _Call) -> Any:
    if not is_first():
        return call.get("all")
    call.put("all", obj)
    for directory in _read:
        store().key_value_delete(directory)
    _read.clear()
    _stale.append(f"{call.directory}/")
    return obj
