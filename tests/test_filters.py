"""Top-k and top-p without sorting, against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gtalign_jax.rollout import filters
from gtalign_jax.rollout.draws import draw
from gtalign_jax.rollout.filters import Filters


def kept(logits, **options):
    out = filters.apply(jnp.asarray(logits, jnp.float32), Filters(**options))
    return np.asarray(out) > filters.NEG / 2


def nucleus_by_sorting(logits, top_p):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[order]), top_p * (1 - 1e-6))) + 1
    mask = np.zeros(len(p), bool)
    mask[order[:size]] = True
    return mask


def test_top_k_keeps_the_k_largest():
    rng = np.random.default_rng(0)
    for k in (1, 2, 7, 50):
        logits = rng.normal(size=(20, 50)) * 3
        mask = kept(logits, top_k=k)
        for row, got in zip(logits, mask, strict=True):
            expected = np.zeros(50, bool)
            expected[np.argsort(-row)[:k]] = True
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p):
    logits = np.random.default_rng(1).normal(size=(40, 60)) * 2
    for row, got in zip(logits, kept(logits, top_p=top_p), strict=True):
        np.testing.assert_array_equal(got, nucleus_by_sorting(row, top_p))


def test_ties_at_the_threshold_are_all_kept():
    assert kept([[3.0, 1.0, 1.0, 0.0]], top_k=2).tolist() == [[True, True, True, False]]


def test_top_p_works_on_what_top_k_left():
    # Of 0.5, 0.3, 0.2 top-k 2 leaves 0.625 and 0.375: 0.6 of that needs the first alone.
    logits = np.log([[0.5, 0.3, 0.2]])
    assert kept(logits, top_k=2, top_p=0.6).tolist() == [[True, False, False]]
    assert kept(logits, top_p=0.6).tolist() == [[True, True, False]]


def test_a_token_that_was_sampled_is_never_dropped():
    logits = jnp.asarray([[5.0, 0.0, -5.0]])
    out = filters.apply(logits, Filters(top_k=1), keep_ids=jnp.asarray([2]))
    assert (np.asarray(out) > filters.NEG / 2).tolist() == [[True, False, True]]


def test_temperature_divides_and_zero_leaves_the_logits():
    logits = jnp.asarray([[2.0, 4.0]])
    np.testing.assert_allclose(filters.apply(logits, Filters(temperature=0.5)), [[4.0, 8.0]])
    np.testing.assert_allclose(filters.apply(logits, Filters(temperature=0.0)), [[2.0, 4.0]])


@pytest.mark.parametrize("temperature", [1e-8, 2e-38, 1e-45])
def test_next_to_no_temperature_draws_the_likeliest_token(temperature):
    logits = jnp.asarray([[3.0, -20.0, 20.0, 5.0]])
    rows = filters.apply_rows(logits, jnp.full(1, temperature), jnp.full(1, 0.9))
    for cold in (filters.apply(logits, Filters(temperature)), rows):
        assert np.isfinite(cold).all()
        assert draw(jnp.exp(cold - cold.max()), jnp.full(1, 0.99)).tolist() == [2]


def test_the_gradient_flows_through_kept_tokens_only():
    def logp(logits):
        return jax.nn.log_softmax(filters.apply(logits, Filters(top_k=2)))[0]

    gradient = jax.grad(logp)(jnp.asarray([2.0, 1.0, -1.0]))
    p = np.exp(2) / (np.exp(2) + np.exp(1))
    np.testing.assert_allclose(gradient, [1 - p, -(1 - p), 0], atol=1e-6)


@pytest.mark.parametrize("options, key", [
    ({"temperature": -1.0}, "temperature"), ({"top_k": -1}, "top_k"), ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
])
def test_impossible_settings_are_named(options, key):
    with pytest.raises(ValueError, match=key):
        Filters(**options)


def test_rows_with_settings_of_their_own_are_filtered_as_if_each_were_alone():
    logits_BV = jnp.asarray(np.random.default_rng(2).normal(size=(5, 40)) * 3, jnp.float32)
    settings = [(1.0, 1.0), (0.7, 0.8), (0.0, 0.5), (1.3, 0.3), (2.0, 1.0)]
    temperature_B, top_p_B = (jnp.asarray(column) for column in zip(*settings, strict=True))
    got_BV = filters.apply_rows(logits_BV, temperature_B, top_p_B)
    for logits_V, got_V, (temperature, top_p) in zip(logits_BV, got_BV, settings, strict=True):
        alone_V = filters.apply(logits_V, Filters(temperature=temperature, top_p=top_p))
        np.testing.assert_allclose(got_V, alone_V, rtol=1e-6)
    assert int((got_BV[1] > filters.NEG).sum()) < 40  # the nucleus was cut
