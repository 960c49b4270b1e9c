"""The welfare family: values by hand, its limits, and its order."""

import math

import jax
import numpy as np
import pytest

from gtalign_jax.game.welfare import AGGREGATIONS, aggregate

USER, LLM = np.array([0.25, 0.9, 0.0, 0.5]), np.array([1.0, 0.4, 0.7, 0.5])


@pytest.mark.parametrize(
    ("kind", "rho", "expected"),
    [
        ("cobb_douglas", 0.0, [0.5, 0.6, 0.0, 0.5]),
        ("linear", 0.0, [0.625, 0.65, 0.35, 0.5]),
        ("user", 0.0, [0.25, 0.9, 0.0, 0.5]),
        ("llm", 0.0, [1.0, 0.4, 0.7, 0.5]),
        ("ces", 0.0, [0.5, 0.6, 0.0, 0.5]),
        ("ces", 1.0, [0.625, 0.65, 0.35, 0.5]),
        ("ces", -1.0, [0.4, 0.72 / 1.3, 0.0, 0.5]),  # harmonic mean
        ("ces", 0.5, [0.5625, ((0.9**0.5 + 0.4**0.5) / 2) ** 2, 0.175, 0.5]),
        ("ces", -math.inf, [0.25, 0.4, 0.0, 0.5]),
        ("ces", math.inf, [1.0, 0.9, 0.7, 0.5]),
    ],
)
def test_values_by_hand(kind, rho, expected):
    np.testing.assert_allclose(aggregate(USER, LLM, kind, rho), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("rho", [1e-9, -1e-9, 1e-3, -1e-3])
def test_ces_near_zero_is_cobb_douglas_in_float32(rho):
    # The textbook formula gives 1.0 or nan here: u**rho rounds to 1 and 1 / rho blows that up.
    user, llm = np.float32(0.04), np.float32(0.81)
    assert abs(float(aggregate(user, llm, "ces", rho)) - 0.18) < 2e-3 * max(1, abs(rho) * 1e3)
    if abs(rho) < 1e-6:
        assert abs(float(aggregate(user, llm, "ces", rho)) - 0.18) < 1e-6


@pytest.mark.parametrize("rho", [-300.0, -40.0, -2.5, -0.3, 0.3, 2.5, 40.0, 300.0])
def test_ces_equals_the_textbook_formula(rho):
    rng = np.random.default_rng(1)
    user, llm = rng.uniform(0.01, 1, (2, 50))
    expected = [
        math.exp(
            (np.logaddexp(rho * math.log(u), rho * math.log(x)) - math.log(2)) / rho
        )
        for u, x in zip(user, llm, strict=True)
    ]  # fmt: skip
    with jax.enable_x64(True):
        np.testing.assert_allclose(aggregate(user, llm, "ces", rho), expected, rtol=1e-9)


def test_a_larger_exponent_never_lowers_welfare():
    exponents = [-math.inf, -50, -3, -1, -0.1, 0, 0.1, 1, 3, 50, math.inf]
    with jax.enable_x64(True):
        values = [np.asarray(aggregate(USER, LLM, "ces", rho)) for rho in exponents]
    for lower, higher in zip(values, values[1:], strict=False):
        assert (higher >= lower - 1e-12).all()


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("rho", [-2.0, 0.0, 2.0])
def test_nothing_for_both_is_zero_and_never_nan(kind, rho):
    assert float(aggregate(np.float32(0), np.float32(0), kind, rho)) == 0.0


def test_an_unknown_kind_names_the_choices():
    with pytest.raises(ValueError, match="welfare='nash' is unknown; allowed: cobb_douglas"):
        aggregate(USER, LLM, "nash")
