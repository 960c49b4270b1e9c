"""Everybody meets at process 0 before the runtime starts: who is there, and with what versions.

One TCP connection per process, to the port that the runtime will serve a moment later, so one open
port is enough. A process sends one line of JSON (index, count, host, what must be the same) and
process 0 answers all at once, when all have come or when it is clear that the run cannot start:

    {"go": true}    or    {"error": "process 2 of 4 did not arrive within 300 s; …"}

so every process ends with the same cause. It knows neither jax nor configs.
"""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax.pod.exchange import PodError

_PROTOCOL = "gtalign roll call 1"
_GREETING_S = 5.0  # who connects and does not say who it is in this time is no process of ours
_RETRY_S = 0.2
_MAX_LINE = 1 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def hold(
    host: str, port: int, count: int, index: int, same: Mapping[str, str], start_s: float
) -> None:
    """Returns when all `count` processes have come and agree on `same`.

    Raises PodError in every process that came, with one cause: who is missing, which index came
    twice, what differs; a port that is taken; an address where no process 0 answers.
    """
    mine = {
        "protocol": _PROTOCOL, "index": index, "count": count, "host": socket.gethostname(),
        "pid": os.getpid(), "same": dict(same),
    }
    if index == 0:
        _call(host, port, mine, start_s)
    else:
        _answer(host, port, mine, start_s)


def differences(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per key of `same` that is not the same everywhere: the values and who has them.

    `entries`: one per process, with "index", "host" and "same".
    """
    keys = sorted({key for entry in entries for key in entry["same"]})
    lines = []
    for key in keys:
        owners: dict[str, list[Mapping[str, Any]]] = {}
        for entry in entries:
            owners.setdefault(entry["same"].get(key, "nothing"), []).append(entry)
        if len(owners) > 1:
            lines.append(
                f"  {key}: " + "; ".join(
                    f"{value} in {names(who)}" for value, who in owners.items()
                )
            )
    return lines


def names(entries: Sequence[Mapping[str, Any]]) -> str:
    """ "process 0 (host a), 1 (host b)"; the list of a large pod is cut."""
    shown = [f"{entry['index']} (host {entry['host']})" for entry in entries[:16]]
    if len(entries) > 16:
        shown.append(f"{len(entries) - 16} more")
    return f"process{'es' * (len(entries) > 1)} {', '.join(shown)}"


# Process 0


def _call(host: str, port: int, mine: Mapping[str, Any], start_s: float) -> None:
    deadline = time.monotonic() + start_s
    arrived: dict[int, tuple[Mapping[str, Any], socket.socket | None]] = {0: (mine, None)}
    try:
        with _listen(host, port) as server:
            while len(arrived) < mine["count"]:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    connection = server.accept()[0]
                except TimeoutError:
                    raise PodError(_missing(arrived, mine["count"], start_s)) from None
                _greet(connection, arrived, mine["count"])
            _check(arrived)
    except PodError as error:
        _reply(arrived, {"error": str(error)})
        raise
    # The port is free again before anybody is told to go on: the runtime serves it from here.
    _reply(arrived, {"go": True})


def _listen(host: str, port: int) -> socket.socket:
    """A socket on all interfaces, or on loopback only where that is the address."""
    try:
        if host in LOOPBACK:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise PodError(
            f"process 0 cannot serve port {port} of {host}: {error.strerror}. Is an earlier run "
            "still alive there? End it, or set another port in pod.coordinator or "
            "GTALIGN_COORDINATOR, the same for all processes"
        ) from error


def _greet(connection: socket.socket, arrived: dict, count: int) -> None:
    """Notes who has come. What does not speak the protocol (a port scanner) is hung up on."""
    connection.settimeout(_GREETING_S)
    try:
        entry = json.loads(_read_line(connection))
        ours = isinstance(entry, dict) and entry.get("protocol") == _PROTOCOL
    except (OSError, ValueError):
        ours = False
    if not ours:
        connection.close()
        return
    index, before = entry["index"], arrived.get(entry["index"])
    # Who died while waiting may come again.
    twice = before is not None and (before[1] is None or not _gone(before[1]))
    if not twice:
        if before is not None:
            before[1].close()
        arrived[index] = (entry, connection)
    problem = None
    if entry["count"] != count:
        problem = (
            f"process 0 expects {count} processes, but {names([entry])} expects {entry['count']}: "
            "pod.process_count must be the same everywhere"
        )
    elif twice:
        other = before[0]
        problem = (
            f"two processes came as number {index} of {count}: pid {other['pid']} on host "
            f"{other['host']} and pid {entry['pid']} on host {entry['host']}; each needs its own "
            "pod.process_index or GTALIGN_PROCESS_INDEX"
        )
    if problem:
        _reply({index: (entry, connection)}, {"error": problem})
        raise PodError(problem)


def _check(arrived: Mapping[int, tuple[Mapping[str, Any], socket.socket | None]]) -> None:
    left = [entry for entry, link in arrived.values() if link is not None and _gone(link)]
    if left:
        raise PodError(f"{names(left)} came and left again while the others were starting")
    entries = [arrived[index][0] for index in sorted(arrived)]
    lines = differences(entries)
    if lines:
        raise PodError("the processes of this run are not the same:\n" + "\n".join(lines))


def _missing(arrived: Mapping[int, Any], count: int, start_s: float) -> str:
    absent = [str(index) for index in range(count) if index not in arrived]
    shown = ", ".join(absent[:32]) + (f" and {len(absent) - 32} more" if len(absent) > 32 else "")
    came = names([arrived[index][0] for index in sorted(arrived)])
    return (
        f"process{'es' * (len(absent) > 1)} {shown} of {count} did not arrive within {start_s:g} s "
        f"(pod.start_s); there: {came}. Look at the logs of the missing"
    )


def _reply(arrived: Mapping[int, Any], message: Mapping[str, Any]) -> None:
    line = json.dumps(message).encode() + b"\n"
    for _, connection in arrived.values():
        if connection is not None:
            try:
                connection.sendall(line)
            except OSError:  # it has left; it is not the one who needs the cause
                pass
            connection.close()


def _gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_GREETING_S)


# Every other process


def _answer(host: str, port: int, mine: Mapping[str, Any], start_s: float) -> None:
    deadline = time.monotonic() + start_s
    reason = "nothing was tried"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=_GREETING_S) as connection:
                connection.sendall(json.dumps(mine).encode() + b"\n")
                # Process 0 listened before we came, so it decides within its own start_s.
                connection.settimeout(start_s + _GREETING_S)
                verdict = _verdict(connection, start_s)
        except OSError as error:
            reason = str(error.strerror or error)
        else:
            if verdict is None:
                reason = "something answers, but no process 0 that is starting"
            elif "error" in verdict:
                raise PodError(verdict["error"])
            else:
                return
        time.sleep(_RETRY_S)
    raise PodError(
        f"process {mine['index']} (host {mine['host']}) cannot reach process 0 at {host}:{port} "
        f"within {start_s:g} s: {reason}. Is process 0 running, does the firewall open the port, "
        "is an earlier run still alive there?"
    )


def _verdict(connection: socket.socket, start_s: float) -> dict[str, Any] | None:
    """Process 0's answer; None where what answers is something else, such as an earlier run."""
    try:
        line = _read_line(connection)
    except TimeoutError:
        raise PodError(
            f"process 0 took the connection but did not answer within {start_s:g} s: it hangs or "
            "was stopped"
        ) from None
    try:
        verdict = json.loads(line)
    except ValueError:
        return None
    return verdict if isinstance(verdict, dict) and verdict.keys() & {"go", "error"} else None


def _read_line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        piece = connection.recv(65536)
        if not piece:
            raise ConnectionResetError("the connection was closed before an answer came")
        data += piece
        if len(data) > _MAX_LINE:
            raise ValueError("no line of the roll call is so long")
    return data
