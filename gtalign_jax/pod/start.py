"""Makes many processes one run, or says in one line why that cannot be.

    config, environment or TPU metadata  ->  who am I, where is process 0, how many are we
    roll call over TCP (rollcall.py)     ->  everybody is there, once, with the same versions
    jax.distributed.initialize           ->  one runtime
    device check                         ->  as many processes and devices as were promised

The roll call comes first because JAX's own start-up ends a process with a fatal log and no cause
when a peer is missing. On a TPU VM nothing needs to be configured. On a laptop nothing is
configured, and then there is one process and no network at all.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster, GkeTpuCluster

from gtalign_jax.pod import ending, exchange, rollcall
from gtalign_jax.pod.exchange import PodError, process_index

VARIABLES = {  # field of PodConfig -> environment variable that fills it where it was left alone
    "coordinator": "GTALIGN_COORDINATOR",
    "process_count": "GTALIGN_PROCESS_COUNT",
    "process_index": "GTALIGN_PROCESS_INDEX",
}
PACKAGES = ("jax", "jaxlib", "libtpu", "numpy")


@dataclasses.dataclass(frozen=True)
class PodConfig:
    """Where the processes meet, how many there must be, and how long anything may take (seconds).

    `rollout_s` … are the deadlines of the phases that `watch.Watch.phase` names; a phase without a
    field of its own has `other_s`. They are generous because a phase's first call compiles.
    """

    coordinator: str = ""  # host:port of process 0; "": TPU metadata, or one process
    process_count: int = 0  # expected number of processes; 0: whatever there is
    process_index: int = -1  # of this process; -1: from the TPU metadata
    device_count: int = 0  # expected over all processes; 0: not checked
    start_s: float = 300.0  # everybody must have arrived by then
    heartbeat_s: float = 5.0  # a process shows itself so often
    silence_s: float = 60.0  # who has not for so long is lost
    rollout_s: float = 3600.0
    reward_s: float = 3600.0
    update_s: float = 3600.0
    save_s: float = 1800.0
    evaluate_s: float = 7200.0
    other_s: float = 3600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_s") and not value > 0:
                raise ValueError(f"pod.{field.name}={value}: expected seconds > 0")
        if self.silence_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"pod.silence_s={self.silence_s:g}: expected at least twice pod.heartbeat_s="
                f"{self.heartbeat_s:g}, or one late beat ends the run"
            )
        if self.process_count < 0 or self.device_count < 0 or self.process_index < -1:
            raise ValueError(
                f"pod.process_count={self.process_count}, pod.device_count={self.device_count}, "
                f"pod.process_index={self.process_index}: expected >= 0 (index: >= -1)"
            )


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among all: process 0's address, number of processes, own index."""

    host: str
    port: int
    count: int
    index: int


def start(cfg: PodConfig, same: Mapping[str, str] | None = None) -> None:
    """Joins this process with all others; call it before anything else touches jax's devices.

    `same`: what must not differ between processes besides the versions, for example a digest of
    the config. Raises PodError (a named cause, after at most about twice `start_s`) and ValueError
    (a setting).
    """
    place = find_place(cfg)
    if place is not None and place.count > 1:
        mine = {**versions(), **(same or {})}
        rollcall.hold(place.host, place.port, place.count, place.index, mine, cfg.start_s)
        with _deadline(cfg, place):
            _initialize(place, cfg)
            _check_counts(cfg)
    else:
        _check_counts(cfg)


def check_same(name: str, mapping: Mapping[str, str]) -> None:
    """Raises PodError with the table of who has what unless `mapping` is the same everywhere."""
    mine = {"index": process_index(), "host": socket.gethostname(), "same": dict(mapping)}
    lines = rollcall.differences(exchange.all_gather(mine, f"check_same {name}"))
    if lines:
        raise PodError(f"{name} is not the same in all processes:\n" + "\n".join(lines))


def versions() -> dict[str, str]:
    """What must not differ between processes: Python, the numeric packages, our own source."""
    found = {"python": platform.python_version()}
    found |= {package: installed(package) or "none" for package in PACKAGES}
    return {**found, "gtalign_jax": _source_digest()}


def installed(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_digest() -> str:
    """A digest of the package's files: unlike a git revision, it sees uncommitted changes."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode())
        digest.update(file.read_bytes())
    return f"source {digest.hexdigest()[:12]}"


def find_place(cfg: PodConfig, environ: Mapping[str, str] = os.environ) -> Place | None:
    """From the config, else our environment variables, else TPU metadata; None: one process.

    Raises ValueError where settings are malformed or incomplete.
    """
    given = _given(cfg, environ)
    address, count, index = given["coordinator"], given["process_count"], given["process_index"]
    if not address and index < 0:
        return _from_metadata(cfg, count)
    missing = [
        key for key, absent in
        (("coordinator", not address), ("process_count", count < 1), ("process_index", index < 0))
        if absent
    ]
    if missing:
        known = {key: value for key, value in given.items() if key not in missing}
        raise ValueError(
            f"pod: {_pairs(known)} given without {' and '.join(missing)}: set "
            + " and ".join(f"pod.{key} or {VARIABLES[key]}" for key in missing)
            + ", or none of the three on a TPU VM and with one process"
        )
    if index >= count:
        raise ValueError(
            f"pod.process_index={index}: with pod.process_count={count} it is 0 to {count - 1}"
        )
    return Place(*parse_address(address), count, index)


def parse_address(address: str) -> tuple[str, int]:
    """("10.0.0.2", 8476) of "10.0.0.2:8476"; IPv6 in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host.strip("[]") or not port.isascii() or not port.isdecimal() or (
        not 0 < int(port) < 65536
    ):
        raise ValueError(
            f"pod.coordinator={address!r}: expected HOST:PORT of process 0, as in 10.0.0.2:8476"
        )
    return host.strip("[]"), int(port)


def _given(cfg: PodConfig, environ: Mapping[str, str]) -> dict[str, Any]:
    """The three settings, those left at their default filled from the environment."""
    given = {key: getattr(cfg, key) for key in VARIABLES}
    for field in dataclasses.fields(PodConfig):
        text = environ.get(VARIABLES.get(field.name, ""), "")
        if text and given[field.name] == field.default:
            try:
                given[field.name] = type(field.default)(text)
            except ValueError:
                raise ValueError(
                    f"{VARIABLES[field.name]}={text!r}: expected a whole number"
                ) from None
    return given


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _from_metadata(cfg: PodConfig, count: int) -> Place | None:
    """What a TPU VM says about itself, several slices included; None elsewhere."""
    # An explicit JAX_PLATFORMS=cpu on a TPU VM means one CPU process, not the pod.
    if not running_in_cloud_tpu_vm or "tpu" not in (jax.config.jax_platforms or "tpu"):
        if count > 1:
            raise ValueError(
                f"pod.process_count={count}, but this is no TPU VM: set pod.coordinator and "
                f"pod.process_index too, or {VARIABLES['coordinator']} and "
                f"{VARIABLES['process_index']}"
            )
        return None
    try:
        for cluster in (GkeTpuCluster, GceTpuCluster):
            if cluster.is_env_present():
                found = cluster.get_process_count()
                address = cluster.get_coordinator_address(int(cfg.start_s), None)
                place = Place(*parse_address(address), found, cluster.get_process_id())
                break
        else:
            return None
    except (OSError, RuntimeError) as error:
        raise PodError(f"this is a TPU VM, but its metadata cannot be read: {error}") from error
    if count not in (0, found):
        raise PodError(f"pod.process_count={count}, but the TPU's metadata names {found} workers")
    return place


def _initialize(place: Place, cfg: PodConfig) -> None:
    host = f"[{place.host}]" if ":" in place.host else place.host
    address = f"{host}:{place.port}"
    # Without it a CPU client knows no collectives between processes; other backends ignore it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # This service would catch SIGTERM, and a process that was told to end would go on silently.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        place.count,
        place.index,
        initialization_timeout=max(1, int(cfg.start_s)),
        # The watch speaks first: its message has a name, a phase and stacks, JAX's has none.
        heartbeat_timeout_seconds=int(3 * cfg.silence_s) + 60,
        shutdown_timeout_seconds=max(1, int(cfg.silence_s)),
        coordinator_bind_address=address if place.host in rollcall.LOOPBACK else None,
    )


@contextlib.contextmanager
def _deadline(cfg: PodConfig, place: Place) -> Iterator[None]:
    """Ends this process when the runtime does not start in time; it may hang in native code."""
    timer = threading.Timer(cfg.start_s, ending.end, (
        f"process {place.index} (host {socket.gethostname()}): all {place.count} processes had "
        f"come, but the runtime did not start within {cfg.start_s:g} s (pod.start_s)",
    ))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_counts(cfg: PodConfig) -> None:
    """The runtime's processes and devices against what was promised; the same in every process."""
    entries = exchange.all_gather({
        "index": process_index(), "host": socket.gethostname(),
        "runtime_index": jax.process_index(), "devices": jax.local_device_count(),
    }, "device counts")
    total = sum(entry["devices"] for entry in entries)
    table = "".join(
        f"\n  process {entry['index']} (host {entry['host']}): {entry['devices']} devices"
        for entry in entries
    )
    if cfg.process_count not in (0, len(entries)):
        raise PodError(
            f"expected {cfg.process_count} processes (pod.process_count), found {len(entries)}:"
            f"{table}"
        )
    if cfg.device_count not in (0, total):
        raise PodError(
            f"expected {cfg.device_count} devices (pod.device_count), found {total}:{table}"
        )
    if jax.process_count() != len(entries) or jax.device_count() != total:
        raise PodError(
            f"{len(entries)} processes with {total} devices came, but the runtime joined "
            f"{jax.process_count()} with {jax.device_count()}:{table}"
        )
    moved = [entry for entry in entries if entry["index"] != entry["runtime_index"]]
    if moved:
        raise PodError(
            "the accelerators number the processes differently from pod.process_index; leave it "
            "to the TPU's metadata: " + ", ".join(
                f"{entry['index']} is {entry['runtime_index']}" for entry in moved
            )
        )
