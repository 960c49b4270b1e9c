"""Who owns which rows of a batch, and rows brought back into its order."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtalign_jax.pod import share


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def held(*blocks):
    """A sharding whose devices hold (process, first row, end) of the leading axis."""
    table = {Device(i, process): (slice(*rows),) for i, (process, *rows) in enumerate(blocks)}
    return types.SimpleNamespace(devices_indices_map=lambda shape: table)


@pytest.mark.parametrize("blocks, expected", [
    ([(0, 0, 2), (0, 2, 4), (1, 4, 6), (1, 6, 8)], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    # A mesh may hand out the devices in another order than that of the processes.
    ([(1, 0, 2), (0, 2, 4), (1, 4, 6), (0, 6, 8)], [[2, 3, 6, 7], [0, 1, 4, 5]]),
    # Rows that lie in both belong to the first; the other one has nothing to do.
    ([(0, 0, 4), (1, 0, 4), (0, 4, 8), (1, 4, 8)], [[0, 1, 2, 3, 4, 5, 6, 7], []]),
    ([(1, 0, 8), (2, 0, 8), (0, 8, 16), (2, 8, 16)], [list(range(8, 16)), list(range(8)), []]),
    ([(0, None, None)], [[0, 1, 2]]),
])
def test_each_row_is_owned_by_the_first_process_that_holds_it(blocks, expected):
    count = sum(map(len, expected))
    owned = [share.own_rows(held(*blocks), count, p).tolist() for p in range(len(expected))]
    assert owned == expected


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("batch", "tensor"))


def test_placed_rows_come_back_as_they_were(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    tree = {"x": np.arange(24.0).reshape(8, 3), "y": np.arange(8), "count": np.array(7)}
    placed = share.place({k: v for k, v in tree.items() if v.ndim}, sharding)
    assert all(x.sharding == sharding for x in placed.values())
    rows, back = share.fetch(placed | {"count": jax.numpy.asarray(7)}, sharding)
    assert rows.tolist() == list(range(8))
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_a_global_array_is_resharded_and_host_rows_are_cut(mesh):
    by_two = NamedSharding(mesh, PartitionSpec("tensor"))
    by_four = NamedSharding(mesh, PartitionSpec("batch"))
    moved = share.place(share.place(np.arange(8), by_two), by_four)
    assert moved.sharding == by_four
    np.testing.assert_array_equal(moved, range(8))
    assert [len(shard.data) for shard in moved.addressable_shards] == [2] * 8


def test_rows_that_are_cut_along_another_axis_are_refused(mesh):
    x = share.place(np.zeros((8, 4)), NamedSharding(mesh, PartitionSpec("batch", "tensor")))
    with pytest.raises(ValueError, match="only rows may be cut"):
        share.fetch(x, NamedSharding(mesh, PartitionSpec("batch")))


@dataclasses.dataclass(frozen=True)
class Rows:
    text: tuple[str, ...]
    score: np.ndarray
    factors: dict[str, np.ndarray]
    notes: list
    samples: int = 2


def test_parts_are_joined_in_the_order_of_the_batch():
    """Three processes, one of them without rows: every kind of field is put in order."""
    def part(rows):
        rows = np.array(rows, int)
        return rows, Rows(tuple(f"row {i}" for i in rows), rows * 10.0, {"a": rows + 100},
                          [None if i % 2 else {"i": int(i)} for i in rows])

    whole = share.in_order([part([4, 1]), part([]), part([0, 3, 2])])
    assert whole.text == ("row 0", "row 1", "row 2", "row 3", "row 4")
    assert whole.score.tolist() == [0, 10, 20, 30, 40]
    assert whole.factors["a"].tolist() == [100, 101, 102, 103, 104]
    assert whole.notes == [{"i": 0}, None, {"i": 2}, None, {"i": 4}]
    assert whole.samples == 2


def test_with_one_process_all_rows_are_its_own_and_a_directory_is_made(tmp_path):
    mine = Rows(("a", "b"), np.arange(2.0), {}, [1, 2])
    for join in (share.everywhere, share.at_first):
        joined = join(mine, np.arange(2), "rows")
        assert joined.text == ("a", "b") and joined.notes == [1, 2]
    share.check_shared(tmp_path / "deep" / "run")
    assert (tmp_path / "deep" / "run").is_dir()
