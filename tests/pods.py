"""Starts real processes of one pod on loopback and collects how each ended, for the tests."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import compiler

ROOT = Path(__file__).resolve().parent.parent
PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


@dataclass(frozen=True)
class Ended:
    """One process: exit status (negative: signal) and all it wrote."""

    status: int
    text: str


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def spawn(script: str, count: int, indices=None, port: int | None = None) -> list[subprocess.Popen]:
    """Processes `indices` (default: all) of a pod of `count`, each running the text `script`."""
    port = port or free_port()
    children = []
    for index in range(count) if indices is None else indices:
        environ = {
            **os.environ, "PYTHONPATH": PATH, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiler.flags(),
            "GTALIGN_COORDINATOR": f"127.0.0.1:{port}", "GTALIGN_PROCESS_COUNT": str(count),
            "GTALIGN_PROCESS_INDEX": str(index),
        }
        children.append(subprocess.Popen(
            [sys.executable, "-u", "-c", script], env=environ, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))
    return children


def ended(children: list[subprocess.Popen], within: float = 60.0) -> list[Ended]:
    """Waits for all; one that does not end is killed and fails the test."""
    end = time.monotonic() + within
    try:
        texts = [
            child.communicate(timeout=max(end - time.monotonic(), 0.1))[0] for child in children
        ]
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
    return [Ended(child.returncode, text) for child, text in zip(children, texts, strict=True)]


def wait_until_stopped(child: subprocess.Popen, within: float = 30.0) -> None:
    """Returns once the process lies in SIGSTOP."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        state = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T":
            return
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    raise AssertionError("the process never stopped itself")
