"""The solver against a slow oracle in plain Python, and against games solved by hand."""

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.game import payoff as game

CELLS = list(itertools.product(range(2), range(3)))
LLM, USER = 0, 1


def oracle(g):
    """Pareto set, equilibria, recommended cell, dilemma, price of anarchy, by definition."""
    tol = 1e-9

    def dominated(cell):
        return any(
            all(g[o][p] >= g[cell][p] - tol for p in (LLM, USER))
            and any(g[o][p] > g[cell][p] + tol for p in (LLM, USER))
            for o in CELLS
        )

    pareto = [c for c in CELLS if not dominated(c)]
    nash = [
        (u, a)
        for u, a in CELLS
        if all(g[u, b][LLM] <= g[u, a][LLM] + tol for b in range(3))
        and all(g[v, a][USER] <= g[u, a][USER] + tol for v in range(2))
    ]
    best = list(pareto)
    for value in (lambda c: g[c][LLM] + g[c][USER], lambda c: g[c][USER], lambda c: g[c][LLM]):
        top = max(map(value, best))
        best = [c for c in best if value(c) >= top - tol]
    worst = min((g[c].sum() for c in nash), default=-1.0)
    poa = max(g[c].sum() for c in CELLS) / worst if worst > 0 else math.nan
    return pareto, nash, CELLS.index(best[0]), bool(nash) and not set(nash) & set(pareto), poa


def check(payoff_UAP):
    """Compares `solve` in float64 with the oracle."""
    with jax.enable_x64(True):
        found = jax.device_get(jax.jit(game.solve)(payoff_UAP))
    pareto, nash, best, dilemma, poa = oracle(payoff_UAP)
    assert [c for c in CELLS if found.pareto_UA[c]] == pareto
    assert [c for c in CELLS if found.nash_UA[c]] == nash
    assert found.recommended == best
    assert bool(found.dilemma) == dilemma
    assert found.nash_count == len(nash)
    np.testing.assert_allclose(found.price_of_anarchy, poa, rtol=1e-12)


def games(numbers):
    return st.lists(numbers, min_size=12, max_size=12).map(
        lambda values: np.array(values, np.float64).reshape(2, 3, 2)
    )


@settings(max_examples=300, deadline=None)
@given(games(st.integers(-2, 2)) | games(st.integers(-50, 50).map(lambda n: n / 10)))
def test_the_solver_equals_the_oracle_on_ties_negatives_and_decimals(payoff_UAP):
    check(payoff_UAP)


@settings(max_examples=100, deadline=None)
@given(games(st.floats(-5, 5).map(lambda x: round(x, 7))))  # no tie is decided by 1e-9 itself
def test_the_solver_equals_the_oracle_on_any_reals(payoff_UAP):
    check(payoff_UAP)


def test_an_all_equal_game_keeps_every_cell():
    with jax.enable_x64(True):
        found = jax.device_get(game.solve(np.full((2, 3, 2), -1.5)))
    assert found.pareto_UA.all() and found.nash_UA.all() and found.recommended == 0
    assert not found.dilemma and math.isnan(found.price_of_anarchy)


def test_ties_of_the_sum_go_to_the_user_although_decimals_round():
    # 0.1 + 0.2 > 0.3 in binary; as decimals the sums tie, and the user gets 0.3 in the second.
    payoff_UAP = np.full((2, 3, 2), -5.0)
    payoff_UAP[0, 1] = [0.1, 0.2]
    payoff_UAP[1, 2] = [0.0, 0.3]
    for x64 in (False, True):
        with jax.enable_x64(x64):
            assert game.recommended(jax.numpy.asarray(payoff_UAP)) == 5


def test_a_prisoners_dilemma_is_one():
    # Only DA and CQ matter (AQ is bad for both); defecting is (DQ, CQ).
    payoff_UAP = np.full((2, 3, 2), -9.0)
    payoff_UAP[0, 0], payoff_UAP[0, 1] = [3, 3], [5, 0]
    payoff_UAP[1, 0], payoff_UAP[1, 1] = [0, 5], [1, 1]
    check(payoff_UAP)
    assert bool(game.is_prisoners_dilemma(payoff_UAP))
    assert [c for c in CELLS if game.nash_mask(payoff_UAP)[c]] == [(1, 1)]
    assert float(game.price_of_anarchy(payoff_UAP)) == 3.0  # (3 + 3) / (1 + 1)
    assert np.asarray(game.best_llm(payoff_UAP)).tolist() == [[0, 1, 0], [0, 1, 0]]
    assert np.asarray(game.best_user(payoff_UAP)).tolist() == [[0, 0, 1], [1, 1, 1]]
    assert int(game.recommended(payoff_UAP)) == 0
    payoff_UAP[1, 1] = [4, 4]  # now the equilibrium is the best cell of all
    assert not bool(game.is_prisoners_dilemma(payoff_UAP))


def test_matching_pennies_has_no_pure_equilibrium():
    payoff_UAP = np.full((2, 3, 2), -9.0)
    payoff_UAP[0, 0], payoff_UAP[0, 1] = [1, -1], [-1, 1]
    payoff_UAP[1, 0], payoff_UAP[1, 1] = [-1, 1], [1, -1]
    check(payoff_UAP)
    assert not np.asarray(game.nash_mask(payoff_UAP)).any()
    assert not bool(game.is_prisoners_dilemma(payoff_UAP))


def test_a_batch_is_a_vmap_traced_once():
    traces = []

    @jax.jit
    def solve(payoff_BUAP):
        traces.append(1)
        return jax.vmap(game.solve)(payoff_BUAP)

    rng = np.random.default_rng(0)
    for _ in range(3):
        payoff_BUAP = rng.integers(-3, 4, (16, 2, 3, 2)).astype(np.float32)
        found = solve(payoff_BUAP)
        for row in range(16):
            assert int(found.recommended[row]) == oracle(payoff_BUAP[row])[2]
    assert len(traces) == 1


@pytest.mark.parametrize("scale", [1e-200, 1e300])
def test_extreme_payoffs_keep_a_pareto_set(scale):
    payoff_UAP = np.arange(12).reshape(2, 3, 2) * scale
    with jax.enable_x64(True):
        found = jax.device_get(game.solve(payoff_UAP))
    assert found.pareto_UA[1, 2]
