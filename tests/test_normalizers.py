"""Per-source normalisers against the reference numbers and small sums by hand."""

import json
import math

import numpy as np
import pytest

from gtalign_jax.reward.normalizers import NORMALIZERS, normalize

SOURCES = ["a", "a", "a", "b"]


@pytest.mark.parametrize("kind", [kind for kind in NORMALIZERS if kind != "none"])
def test_every_normalizer_reproduces_the_reference(kind, shared_dir):
    cases = json.loads((shared_dir / "welfare_cases.json").read_text())["normalizers"]
    for case in cases:
        scores = np.array(case["scores"])
        # The reference kept its statistics in float32 while the scores stayed float64. Between two
        # rewards that differ by 4e-5 its distribution function shows that rounding (1e-4 in cdf).
        population = scores.astype(np.float32)
        got = normalize(kind, scores, case["sources"], population_B=population)
        np.testing.assert_allclose(got, case["expected"][kind], rtol=0, atol=1e-5)
        exact = normalize(kind, scores, case["sources"])
        np.testing.assert_allclose(exact, case["expected"][kind], rtol=0, atol=1e-4)


def test_small_sums_by_hand():
    reward = np.array([0.0, 0.5, 1.0, 0.25])
    std_a = math.sqrt(1 / 6)
    zscore = normalize("zscore", reward, SOURCES)
    np.testing.assert_allclose(zscore, [-0.5 / std_a, 0, 0.5 / std_a, 0], atol=1e-5)
    np.testing.assert_allclose(normalize("minmax", reward, SOURCES), [0, 0.5, 1, 0])
    np.testing.assert_allclose(normalize("cdf", reward, SOURCES), [-2 / 3, 0, 2 / 3, 0], atol=1e-12)
    halves = [math.tanh(-0.25), 0, math.tanh(0.25), 0]
    np.testing.assert_allclose(normalize("selfadapt", reward, SOURCES), halves, atol=1e-12)
    own = 3 / 53
    mean = own * 0.5 + (1 - own) * 0.4375
    std = math.sqrt(own / 6 + (1 - own) * reward.var())
    np.testing.assert_allclose(normalize("james", reward, SOURCES)[0], -mean / std, atol=1e-4)


def test_equal_rewards_and_ties_get_equal_values():
    equal = np.full(4, 0.3)
    for kind in ("zscore", "minmax", "robustz", "cdf", "decentralize", "selfadapt", "james"):
        np.testing.assert_allclose(normalize(kind, equal, ["a"] * 4), 0.0, atol=1e-9)
    tied = normalize("cdf", np.array([0.1, 0.5, 0.5, 0.9]), ["a"] * 4)
    np.testing.assert_allclose(tied, [-0.75, 0, 0, 0.75], atol=1e-12)


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_equal_rewards_of_a_source_stay_equal_to_the_last_bit(kind):
    """Wherever they stand: what differed by rounding would be a signal to its group."""
    reward = np.random.default_rng(0).uniform(size=61)
    reward[1::3] = 0.1 + 0.2
    got = normalize(kind, reward, ["a"] * 61)
    assert len(set(got[1::3].tolist())) == 1


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_missing_rewards_change_nothing_and_come_out_as_zero(kind):
    reward = np.array([0.2, 0.9, 0.4, 0.7, 0.1])
    sources = ["a", "a", "a", "b", "b"]
    without = normalize(kind, reward, sources)
    valid = np.array([True, True, True, True, True, False, False])
    filled = np.concatenate([reward, [1e6, np.nan]])
    got = normalize(kind, filled, [*sources, "a", "c"], valid)
    np.testing.assert_allclose(got[:5], without)
    np.testing.assert_array_equal(got[5:], 0.0)
    none_valid = normalize(kind, reward, sources, np.zeros(5, bool))
    np.testing.assert_array_equal(none_valid, 0.0)


def test_unknown_kinds_and_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="normalizer='zscores' is unknown; allowed: none, zscore"):
        normalize("zscores", np.zeros(2), ["a", "a"])
    with pytest.raises(ValueError, match="rows differ"):
        normalize("zscore", np.zeros(2), ["a"])
