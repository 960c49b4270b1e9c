"""Start-up: who am I, is everybody there, are we the same; and a named cause where not."""

import concurrent.futures
import json
import socket
import threading
import time

import jax
import pods
import pytest
from jax._src.clusters import cloud_tpu_cluster

from gtalign_jax.pod import rollcall, start
from gtalign_jax.pod.exchange import PodError
from gtalign_jax.pod.start import Place, PodConfig, find_place, parse_address

HOST = "127.0.0.1"
SAME = {"jax": "1.2.3"}


def call_roll(members, *, start_s=5.0, port=None, then=None):
    """Holds a roll call of (index, count, same), each in a thread; -> their errors or None."""
    port = port or pods.free_port()

    def one(member):
        index, count, same = member
        try:
            rollcall.hold(HOST, port, count, index, same, start_s)
        except PodError as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(max(len(members), 1)) as pool:
        results = [pool.submit(one, member) for member in members]
        if then is not None:
            then(port)
        return [result.result(timeout=20) for result in results]


def test_all_who_come_and_agree_may_go_on_in_whatever_order_they_come():
    assert call_roll([(2, 3, SAME), (0, 3, SAME), (1, 3, SAME)]) == [None, None, None]


def test_a_missing_process_is_named_to_all_who_came_before_the_deadline():
    began = time.monotonic()
    errors = call_roll([(0, 4, SAME), (2, 4, SAME)], start_s=0.8)
    assert time.monotonic() - began < 5
    assert errors[0] == errors[1]
    assert "processes 1, 3 of 4 did not arrive within 0.8 s" in errors[0]
    assert f"there: processes 0 (host {socket.gethostname()}), 2" in errors[0]


def test_without_process_zero_the_address_is_named_and_what_to_look_at():
    port, host = pods.free_port(), socket.gethostname()
    [error] = call_roll([(1, 2, SAME)], start_s=0.5, port=port)
    assert f"process 1 (host {host}) cannot reach process 0 at {HOST}:{port}" in error
    assert "within 0.5 s: Connection refused" in error and "firewall" in error


def test_two_processes_with_one_index_end_all_with_both_pids():
    errors = call_roll([(0, 3, SAME), (1, 3, SAME), (1, 3, SAME)])
    assert errors[0] == errors[1] == errors[2]
    assert "two processes came as number 1 of 3: pid" in errors[0]
    errors = call_roll([(0, 2, SAME)], then=lambda port: introduce(port, index=0).close())
    assert "two processes came as number 0 of 2" in errors[0]


def introduce(port, **changes):
    """Comes by hand and leaves without waiting for the answer."""
    entry = {"protocol": "gtalign roll call 1", "index": 1, "count": 2, "host": "h", "pid": 1,
             "same": SAME, **changes}
    connection = connect(port)
    connection.sendall(json.dumps(entry).encode() + b"\n")
    return connection


def connect(port):
    end = time.monotonic() + 5
    while True:
        try:
            return socket.create_connection((HOST, port), timeout=5)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_different_versions_end_all_with_the_table_of_who_has_what():
    others = {"jax": "1.2.4", "numpy": "2"}
    errors = call_roll([(0, 3, SAME), (1, 3, others), (2, 3, SAME)])
    zero, one, two = (f"{index} (host {socket.gethostname()})" for index in range(3))
    assert errors == [
        "the processes of this run are not the same:\n"
        f"  jax: 1.2.3 in processes {zero}, {two}; 1.2.4 in process {one}\n"
        f"  numpy: nothing in processes {zero}, {two}; 2 in process {one}"
    ] * 3


def test_different_process_counts_end_both():
    errors = call_roll([(0, 2, SAME), (1, 3, SAME)])
    assert errors[0] == errors[1] and "expects 2 processes, but process 1" in errors[0]


def test_a_process_that_died_while_waiting_may_come_again_and_strangers_are_ignored():
    def others(port):
        connect(port).close()  # a port scanner
        with connect(port) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n[1]\n")
        introduce(port, index=2, count=3).close()  # dies
        time.sleep(0.2)
        with introduce(port, index=2, count=3) as again, introduce(port, count=3) as one:
            assert again.recv(100) == one.recv(100) == b'{"go": true}\n'

    assert call_roll([(0, 3, SAME)], then=others) == [None]


def test_nobody_starts_without_a_process_that_died_while_waiting():
    def others(port):
        introduce(port, index=2, count=3).close()
        time.sleep(0.3)
        with introduce(port, index=1, count=3) as waiting:
            waiting.recv(1)

    [error] = call_roll([(0, 3, SAME)], then=others)
    assert error == "process 2 (host h) came and left again while the others were starting"


def test_a_taken_port_is_named_with_what_to_set():
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        [error] = call_roll([(0, 2, SAME)], port=port)
    assert f"process 0 cannot serve port {port} of {HOST}: Address already in use" in error
    assert "GTALIGN_COORDINATOR" in error


def test_a_process_zero_that_takes_the_call_and_stays_silent_is_named(monkeypatch):
    monkeypatch.setattr(rollcall, "_GREETING_S", 0.2)
    with socket.create_server((HOST, 0)) as silent:
        keep = []
        thread = threading.Thread(target=lambda: keep.append(silent.accept()[0]))
        thread.start()
        [error] = call_roll([(1, 2, SAME)], start_s=0.5, port=silent.getsockname()[1])
        thread.join()
        keep[0].close()
    assert "process 0 took the connection but did not answer within 0.5 s" in error


def test_an_address_has_a_host_and_a_port():
    assert parse_address("10.0.0.2:8476") == ("10.0.0.2", 8476)
    assert parse_address("[::1]:1") == ("::1", 1)
    for wrong in ("10.0.0.2", "host:", ":80", "host:http", "host:0", "host:65536", "host:-1"):
        with pytest.raises(ValueError, match="expected HOST:PORT"):
            parse_address(wrong)


def test_the_place_comes_from_the_config_and_else_from_the_environment():
    environ = {"GTALIGN_COORDINATOR": "b:2", "GTALIGN_PROCESS_COUNT": "5",
               "GTALIGN_PROCESS_INDEX": "0"}
    assert find_place(PodConfig(), environ) == Place("b", 2, 5, 0)
    cfg = PodConfig(coordinator="a:1", process_index=3)
    assert find_place(cfg, environ) == Place("a", 1, 5, 3)


def test_with_nothing_configured_there_is_one_process_and_no_network():
    assert find_place(PodConfig(), {}) is None
    start.start(PodConfig(process_count=1, device_count=jax.device_count()))
    assert jax.process_count() == 1


@pytest.mark.parametrize(("cfg", "environ", "message"), [
    ({"coordinator": "a:1"}, {}, "given without process_count and process_index"),
    ({"process_index": 0, "process_count": 2}, {}, "given without coordinator: set pod.coord"),
    ({"process_count": 2}, {}, "this is no TPU VM: set pod.coordinator and"),
    ({"coordinator": "a:1", "process_count": 2, "process_index": 2}, {}, "it is 0 to 1"),
    ({}, {"GTALIGN_PROCESS_INDEX": "one"}, "GTALIGN_PROCESS_INDEX='one': expected a whole"),
])
def test_incomplete_or_wrong_settings_say_what_to_set(cfg, environ, message):
    with pytest.raises(ValueError, match=message):
        find_place(PodConfig(**cfg), environ)


@pytest.mark.parametrize("change", [
    {"start_s": 0}, {"update_s": -1.0}, {"silence_s": 9.0, "heartbeat_s": 5.0},
    {"process_count": -1}, {"process_index": -2}, {"start_s": float("nan")},
])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=f"pod.{next(iter(change))}"):
        PodConfig(**change)


def test_a_multislice_tpu_says_itself_where_each_process_is(monkeypatch):
    monkeypatch.setattr(start, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    platforms = jax.config.jax_platforms
    for key, value in {
        "TPU_WORKER_HOSTNAMES": "w0,w1,w2", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    }.items():
        monkeypatch.setenv(key, value)
    assert find_place(PodConfig(), {}) is None  # JAX_PLATFORMS=cpu: the user wants one CPU process
    try:
        jax.config.update("jax_platforms", "tpu,cpu")
        # Second worker of the second slice of three workers each; 8482 is JAX's port on TPUs.
        assert find_place(PodConfig(), {}) == Place("localhost", 8482, 6, 4)
        with pytest.raises(PodError, match="process_count=4, but the TPU's metadata names 6"):
            find_place(PodConfig(process_count=4), {})
    finally:
        jax.config.update("jax_platforms", platforms)


CHILD = """
from gtalign_jax.pod.start import PodConfig, PodError, check_same, process_index, start
try:
    start(PodConfig(start_s={start_s}, device_count={devices}), {{"config": "digest"}})
    import jax
    print("joined", jax.process_index(), jax.process_count(), jax.device_count())
    check_same("toy", {{"a": "1", "b": str(process_index())}})
except PodError as error:
    raise SystemExit(f"error: {{error}}")
"""


@pytest.mark.slow
def test_real_processes_join_and_a_later_difference_ends_both():
    results = pods.ended(pods.spawn(CHILD.format(start_s=60, devices=2), 2))
    for index, result in enumerate(results):
        assert f"joined {index} 2 2" in result.text
        assert "toy is not the same in all processes:\n  b: 0 in process 0" in result.text
        assert "a: 1" not in result.text
        assert result.status == 1


@pytest.mark.slow
def test_a_wrong_number_of_devices_ends_every_process_with_the_count_of_each():
    for result in pods.ended(pods.spawn(CHILD.format(start_s=60, devices=8), 2)):
        assert "expected 8 devices (pod.device_count), found 2:\n  process 0 (host" in result.text
        assert result.status == 1 and "joined" not in result.text


def test_one_of_two_ends_by_itself_with_the_missing_one_named():
    [result] = pods.ended(pods.spawn(CHILD.format(start_s=1, devices=0), 2, indices=[0]))
    assert "error: process 1 of 2 did not arrive within 1 s" in result.text
    assert "Traceback" not in result.text and result.status == 1
