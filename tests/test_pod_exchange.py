"""Host data between processes: everybody gets everybody's, and nothing piles up in the store."""

import io
import pickle

import numpy as np
import pods
import pytest

from gtalign_jax.pod import exchange
from gtalign_jax.pod.start import PodConfig


def test_with_one_process_an_exchange_gives_back_what_it_got():
    array = np.arange(3)
    assert exchange.all_gather(array, "a")[0] is array
    assert exchange.gather_to_first({"a": 1}) == [{"a": 1}]
    assert exchange.broadcast("text") == "text"
    assert (exchange.process_index(), exchange.process_count()) == (0, 1) and exchange.is_first()


class Hostile:
    def __reduce__(self):
        return print, ("called",)


@pytest.mark.parametrize("obj", [
    {"a": [1, 2.5, None, True, "ß", b"x", (1, {2})]},
    {"f": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True]), "s": np.float64(2)},
    np.array(["text", "longer text"]), np.array([{"an": "object"}], dtype=object), np.zeros((0, 4)),
    PodConfig(process_count=2),
])
def test_plain_data_arrays_and_our_dataclasses_come_back_as_they_were(obj):
    back = exchange._Plain(io.BytesIO(pickle.dumps(obj, protocol=5))).load()
    assert type(back) is type(obj)
    np.testing.assert_equal(back, obj)


def test_what_comes_over_the_network_cannot_call_anything(capsys):
    with pytest.raises(exchange.PodError, match="not builtins.print"):
        exchange._Plain(io.BytesIO(pickle.dumps(Hostile(), protocol=5))).load()
    assert capsys.readouterr().out == ""


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
