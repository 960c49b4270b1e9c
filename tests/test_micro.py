"""Cutting a batch into pieces: nothing lost, sums exact, maxima over all pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.training.micro import accumulate, cut, uncut

BATCH = {"x": jnp.arange(12.0).reshape(6, 2), "n": jnp.asarray([3, 1, 4, 1, 5, 9])}


def test_pieces_are_strided_so_that_every_device_keeps_a_share_of_each():
    """Rows 0 … 5 in two pieces: 0, 2, 4 and 1, 3, 5; in blocks a device would hold one piece."""
    pieces = cut(BATCH, 2)
    np.testing.assert_array_equal(pieces["n"], [[3, 4, 5], [1, 1, 9]])
    assert pieces["x"].shape == (2, 3, 2)


@pytest.mark.parametrize("pieces", [1, 2, 3, 6])
def test_uncut_undoes_cut(pieces):
    for a, b in zip(jax.tree.leaves(uncut(cut(BATCH, pieces))), jax.tree.leaves(BATCH),
                    strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("pieces", [1, 2, 3, 6])
def test_sums_are_added_and_maxima_are_the_largest_of_any_piece(pieces):
    def fn(part):
        return {"sum": part["x"].sum(), "rows": part["n"].size * jnp.ones(())}, {
            "max": (-1.0 * part["n"]).max()
        }

    sums, maxima = jax.jit(lambda b: accumulate(fn, b, pieces))(BATCH)
    assert sums["sum"] == 66
    assert sums["rows"] == 6
    assert maxima["max"] == -1  # a start of 0 instead of -inf would be 0


def test_a_function_is_traced_a_fixed_number_of_times_whatever_the_number_of_pieces():
    def traces(pieces):
        count = []

        def fn(part):
            count.append(1)
            return part["x"].sum(), {}

        jax.jit(lambda b: accumulate(fn, b, pieces))(BATCH)
        return len(count)

    assert traces(2) == traces(3) == traces(6) <= 2  # its shapes, and the loop's body
