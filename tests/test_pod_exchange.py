"""Host data between processes: everybody gets everybody's, and nothing piles up in the store."""

import collections
import contextlib
import dataclasses
import datetime
import http
import math
import pathlib
import re
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import msgpack
import numpy as np
import pods
import pytest

from gtalign_jax.data.prompt import Prompt
from gtalign_jax.pod import exchange, plain
from gtalign_jax.pod.start import PodConfig


def test_with_one_process_an_exchange_gives_back_what_it_got():
    array = np.arange(3)
    assert exchange.all_gather(array, "a")[0] is array
    assert exchange.gather_to_first({"a": 1}) == [{"a": 1}]
    assert exchange.broadcast("text") == "text"
    assert (exchange.process_index(), exchange.process_count()) == (0, 1) and exchange.is_first()


@dataclasses.dataclass(frozen=True)
class Foreign:
    x: int = 1


class Point(NamedTuple):
    x: int = 1


@pytest.mark.parametrize("obj", [
    {"a": [1, 2.5, None, True, "ß\ud800", b"x\x00", (1, {2}, frozenset("a"), ()), {}]},
    {1: "int", (1, "a"): "tuple", None: 0, 2.5: 1, False: 2, b"k": 3},
    [2**63 - 1, 2**64, -(10**40), math.inf, -math.inf, math.nan, -0.0],
    {"f": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True]), "s": np.float64(2)},
    [np.bool_(True), np.int8(-3), np.str_("text"), np.float32(0.1), np.array(7)],
    np.array(["text", "longer text"]), np.array([{"an": "object"}], dtype=object), np.zeros((0, 4)),
    np.array([[(1, 2)], [None]], dtype=object)[:, :1], np.arange(12).reshape(3, 4).T,
    PodConfig(process_count=2),
])
def test_plain_data_arrays_and_our_dataclasses_come_back_as_they_were(obj):
    back = plain.unpack(plain.pack(obj))
    assert types_of(back) == types_of(obj)
    np.testing.assert_equal(back, obj)


def types_of(tree):
    """The types of all nodes: to numpy's comparison a tuple is a list, and True is 1."""
    if isinstance(tree, dict):
        return [(type(key), types_of(value)) for key, value in tree.items()]
    if isinstance(tree, np.ndarray):
        return type(tree), tree.dtype, tree.shape, types_of(tree.ravel().tolist())
    inside = [types_of(item) for item in tree] if isinstance(tree, list | tuple) else []
    return type(tree), inside


def test_what_came_may_be_written_to_and_one_dataclass_in_many_places_is_sent_once():
    prompt = Prompt("p", "s", ({"role": "user", "content": "x" * 1000},), "t", "q", {"kind": "a"})
    rows = {"prompts": (prompt,) * 8, "other": [Prompt("o", "s", (), "t", "q"), prompt]}
    data = plain.pack({"rows": rows, "array": np.zeros(3)})
    assert len(data) < 2000
    back = plain.unpack(data)
    assert back["rows"] == rows and back["rows"]["prompts"][0] is back["rows"]["other"][1]
    back["array"][0] = 1


@pytest.mark.parametrize("obj", [
    object(), Foreign(), Point(), print, PodConfig, 1j, datetime.date(2020, 1, 1), range(3),
    pathlib.Path("a"), collections.OrderedDict(a=1), http.HTTPStatus.OK, np.zeros(2, "M8[s]"),
    np.zeros(2, "i4,f8"),
], ids=lambda obj: type(obj).__name__)
def test_what_is_not_plain_is_refused_by_name_before_it_is_sent(obj):
    with pytest.raises(ValueError, match=f"not {re.escape(type(obj).__module__)}"):
        plain.pack([obj])


def test_depth_without_end_is_a_plain_error():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError):
        plain.pack(deep)
    with pytest.raises(ValueError):
        plain.unpack(b"\x91" * 100_000)


def dataclass(*content) -> bytes:
    packed = msgpack.packb(content)
    return msgpack.packb(msgpack.ExtType(plain._DATACLASS, packed))


@pytest.mark.parametrize("data", [
    dataclass("builtins", "print", ["called"]), dataclass("os", "system", ["echo called"]),
    dataclass("gtalign_jax.pod.start", "start", [1]), dataclass("gtalign_jax.pod.start", "os", []),
    dataclass("gtalign_jax.pod.start", "PodConfig", [1]), dataclass("gtalign_jax.nowhere", "A", []),
    dataclass("gtalign_jax.pod.start", "Path", []), dataclass([], {}, 1), dataclass(),
])
def test_what_comes_over_the_network_cannot_call_anything(data, capfd):
    with pytest.raises(ValueError):
        plain.unpack(data)
    assert "called" not in capfd.readouterr().out


PIECES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary() | st.sampled_from(("<f8", "|O", "gtalign_jax.pod.start", "PodConfig")),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text() | st.integers(-9, 9), inner, max_size=3)
    | st.builds(lambda code, x: msgpack.ExtType(
        code, msgpack.packb(x, unicode_errors="surrogatepass")), st.integers(0, 12), inner),
)


@hypothesis.given(data=st.binary() | PIECES.map(
    lambda x: msgpack.packb(x, unicode_errors="surrogatepass")))
@hypothesis.settings(max_examples=200)
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(ValueError):
        plain.unpack(data)


CHILD = """
import time
import numpy as np
from gtalign_jax.pod import exchange
from gtalign_jax.pod.exchange import PodError, all_gather, broadcast, gather_to_first
from gtalign_jax.pod.start import PodConfig, start

start(PodConfig(start_s=60))
me = exchange.process_index()

def stored():
    entries = exchange.store().key_value_dir_get_bytes("gtalign/exchange/")
    return sum(len(value) for _, value in entries)

for round in range(40):
    rows = all_gather({"me": me, "array": np.full(100_000, me * round, np.int32)}, "rows")
    assert [row["me"] for row in rows] == [0, 1, 2]
    assert [int(row["array"].sum()) for row in rows] == [0, 100_000 * round, 200_000 * round]
    first = gather_to_first(me * round, "first")
    assert first == ([0, round, 2 * round] if me == 0 else None)
    assert broadcast(("from", me, round)) == ("from", 0, round)
assert all_gather(None) == [None] * 3
# Over 40 rounds 48 MB went through. What stays is the last list, at most: not one row.
if me == 0:
    assert stored() < 1000, stored()

large = [bytes([me, part]) * (3 << 20) for part in range(2)]  # 12 MiB, cut into parts
assert all_gather(large) == [[bytes([i, p]) * (3 << 20) for p in range(2)] for i in range(3)]

try:
    gather_to_first(me, "metrics" if me == 1 else "rewards")
except PodError as error:
    print("crossed:", error)

began = time.monotonic()
try:
    if me == 1:
        time.sleep(3)
    else:
        all_gather(me, "late", timeout_s=1.5)
except PodError as error:
    assert time.monotonic() - began < 4
    print("late:", error)
print("done")
"""


@pytest.mark.slow
def test_three_processes_swap_data_and_a_missing_or_crossed_one_is_named():
    results = pods.ended(pods.spawn(CHILD, 3))
    assert [result.status for result in results] == [0, 0, 0], results
    assert all("done" in result.text for result in results)
    crossed = "crossed: process 0 is at gather_to_first 'rewards', but process 1 is at gather_to_"
    assert crossed in results[0].text and "crossed" not in results[1].text + results[2].text
    for index in (0, 2):
        late = f"late: all_gather 'late': process {index} waited 1.5 s for process 1 of 3"
        assert late in results[index].text
