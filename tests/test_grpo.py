"""The GRPO loss on numbers worked out by hand; its model-sized exactness is in test_grpo_exact."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.training import grpo
from gtalign_jax.training.grpo import Batch, GRPOConfig

NO_KL = {"reference": False, "beta": 0.0}


def batch(old_QGT, lengths_QG, adv_QG, valid_QG=None, sampler_QGT=None, on_policy=False) -> Batch:
    old_QGT = jnp.asarray(old_QGT, jnp.float32)
    Q, G, T = old_QGT.shape
    valid_QG = np.ones((Q, G), bool) if valid_QG is None else valid_QG
    return Batch(
        prompt_QS=jnp.zeros((Q, 1), jnp.int32),
        prompt_lengths_Q=jnp.ones(Q, jnp.int32),
        tokens_QGT=jnp.zeros((Q, G, T), jnp.int32),
        lengths_QG=jnp.asarray(lengths_QG, jnp.int32),
        adv_QG=jnp.asarray(adv_QG, jnp.float32),
        valid_QG=jnp.asarray(valid_QG),
        sampler_logp_QGT=old_QGT if sampler_QGT is None else jnp.asarray(sampler_QGT, jnp.float32),
        old_logp_QGT=None if on_policy else old_QGT,
    )


@pytest.fixture
def loss_of(monkeypatch):
    """(loss, d loss / d logp, metrics) of given log-probabilities: they stand in for a model."""
    monkeypatch.setattr(
        grpo, "completion_logps", lambda logp, *_, **__: (logp, jnp.zeros_like(logp))
    )

    def run(logp_QGT, b: Batch, ref_QGT=None, **options):
        cfg = GRPOConfig(**({**NO_KL, **options} if ref_QGT is None else options))
        logp_QGT = jnp.asarray(logp_QGT, jnp.float32)
        if ref_QGT is not None:
            b = b.replace(ref_logp_QGT=jnp.asarray(ref_QGT, jnp.float32))
        return jax.device_get(grpo.loss_and_grads(logp_QGT, b, cfg=None, grpo=cfg))

    return run


def log(*ratios):
    return np.log(np.asarray([[ratios]], np.float32))


# ----------------------------------------------------------------------------- aggregation


# Rows of 3 and 1 tokens, ratios (1.1, 0.9, 1.5 | 1.5), advantages +1 and -1, clipped to 0.8 … 1.2.
# Losses per token: -1.1, -0.9, -1.2 (clipped) and +1.5 (a minimum: not clipped).
#   token     (-3.2 + 1.5) / 4        a mean over rows of 3 would give -0.2833, of means 0.2167
#   sequence  (-3.2 / 3 + 1.5) / 2
#   constant  (-3.2 + 1.5) / (2 * 3)  T = 3 for both rows
@pytest.mark.parametrize("aggregation, expected", [
    ("token", -0.425), ("sequence", 0.2166667), ("constant", -0.2833333),
])
def test_each_aggregation_of_a_two_by_three_batch_is_the_one_by_hand(
    loss_of, aggregation, expected
):
    ratios = np.array([[[1.1, 0.9, 1.5], [1.5, 7.0, 7.0]]])
    b = batch(np.zeros((1, 2, 3)), [[3, 1]], [[1.0, -1.0]])
    loss, grads, seen = loss_of(np.log(ratios), b, aggregation=aggregation)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert (grads[0, 1, 1:] == 0).all()  # padding
    assert float(seen["means"]["grpo/clip_fraction"].divide()) == pytest.approx(1 / 4)
    assert float(seen["means"]["grpo/ratio"].divide()) == pytest.approx(5.0 / 4)


@pytest.mark.parametrize("aggregation, expected", [
    # Row 1 is not judged: 3 tokens and 1 row are left.
    ("token", -3.2 / 3), ("sequence", -3.2 / 3), ("constant", -3.2 / 3),
])
def test_a_row_that_was_not_judged_counts_in_no_denominator(loss_of, aggregation, expected):
    ratios = np.array([[[1.1, 0.9, 1.5], [1.5, 7.0, 7.0]]])
    b = batch(np.zeros((1, 2, 3)), [[3, 1]], [[1.0, -1.0]], valid_QG=np.array([[True, False]]))
    loss, grads, _ = loss_of(np.log(ratios), b, aggregation=aggregation)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert (grads[0, 1] == 0).all()


def test_a_row_without_tokens_counts_in_no_denominator():
    weights = grpo.token_weights(jnp.asarray([[0, 2]]), jnp.ones((1, 2), bool), 4, "sequence")
    np.testing.assert_array_equal(weights, [[[0, 0, 0, 0], [0.5, 0.5, 0, 0]]])


# ----------------------------------------------------------------------------- clipping


# Gradient of the loss in logp: -r A where the surrogate is not clipped, 0 where it is.
@pytest.mark.parametrize("ratio, adv, loss, grad", [
    (1.5, 1.0, -1.2, 0.0),
    (1.5, -1.0, 1.5, 1.5),
    (0.5, 1.0, -0.5, -0.5),
    (0.5, -1.0, 0.8, 0.0),
    (1.1, 2.0, -2.2, -2.2),
    (0.9, -2.0, 1.8, 1.8),
])
def test_clipping_holds_only_the_side_that_would_go_too_far(loss_of, ratio, adv, loss, grad):
    b = batch(np.full((1, 1, 1), -2.0), [[1]], [[adv]])
    found, grads, _ = loss_of(-2.0 + log(ratio), b)
    assert found == pytest.approx(loss, rel=1e-5)
    assert grads[0, 0, 0] == pytest.approx(grad, rel=1e-5)


def test_the_upper_clip_may_be_wider_than_the_lower(loss_of):
    b = batch(np.zeros((1, 1, 1)), [[1]], [[1.0]])
    assert loss_of(log(1.25), b, clip_high=0.28)[0] == pytest.approx(-1.25, rel=1e-5)
    assert loss_of(log(1.5), b, clip_high=0.28)[0] == pytest.approx(-1.28, rel=1e-5)
    down = batch(np.zeros((1, 1, 1)), [[1]], [[-1.0]])
    assert loss_of(log(0.5), down, clip_high=0.28)[0] == pytest.approx(0.8, rel=1e-5)


def test_on_policy_the_ratio_is_one_and_its_gradient_is_the_advantage(loss_of):
    b = batch(np.full((1, 1, 2), -1.5), [[2]], [[0.7]], on_policy=True)
    loss, grads, seen = loss_of(np.full((1, 1, 2), -1.5), b)
    assert loss == pytest.approx(-0.7)
    np.testing.assert_allclose(grads, np.full((1, 1, 2), -0.35), rtol=1e-6)
    assert float(seen["means"]["grpo/clip_fraction"].divide()) == 0


# ----------------------------------------------------------------------------- ratios


def test_the_sequence_ratio_is_the_geometric_mean_of_the_token_ratios(loss_of):
    """Log ratios 0.3 and -0.1 (the third is padding): e^0.1; with padding it would be e^1.4."""
    b = batch(np.zeros((1, 1, 3)), [[2]], [[1.0]])
    loss, grads, _ = loss_of([[[0.3, -0.1, 4.0]]], b, ratio="sequence", aggregation="sequence")
    assert loss == pytest.approx(-math.exp(0.1), rel=1e-5)
    # d/d logp_t of -exp(mean log ratio) = -exp(mean) / 2
    np.testing.assert_allclose(grads, [[[-math.exp(0.1) / 2] * 2 + [0.0]]], rtol=1e-5)


def test_the_sequence_ratio_is_clipped_as_a_whole(loss_of):
    b = batch(np.zeros((1, 1, 2)), [[2]], [[1.0]])
    loss, grads, _ = loss_of([[[0.7, 0.0]]], b, ratio="sequence")  # e^0.35 = 1.42
    assert loss == pytest.approx(-1.2, rel=1e-5)
    assert (grads == 0).all()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_extreme_log_probabilities_leave_loss_and_gradient_finite(loss_of, ratio, kl):
    logp = np.array([[[-2000.0, 0.0], [0.0, -2000.0]]])
    b = batch(logp[:, ::-1], [[2, 2]], [[1.0, -1.0]])
    loss, grads, _ = loss_of(logp, b, ref_QGT=logp[:, ::-1], ratio=ratio, kl=kl, beta=0.1)
    assert np.isfinite(loss) and np.isfinite(grads).all()


def test_truncated_importance_sampling_weighs_by_trainer_over_sampler_up_to_its_cap(loss_of):
    """Trainer/sampler = 4 and 1/4 with a cap of 2: weights 2 and 1/4, no gradient through them."""
    trainer = np.log([[[0.4, 0.1]]])
    sampler = np.log([[[0.1, 0.4]]])
    b = batch(trainer, [[2]], [[1.0]], sampler_QGT=sampler, on_policy=True)
    loss, grads, seen = loss_of(trainer, b, truncated_is=2.0)
    assert loss == pytest.approx(-(2 + 0.25) / 2, rel=1e-5)
    np.testing.assert_allclose(grads, [[[-1.0, -0.125]]], rtol=1e-5)
    assert float(seen["means"]["rollout/logp_gap"].divide()) == pytest.approx(math.log(4), rel=1e-5)
    assert seen["maxima"]["rollout/logp_gap_max"] == pytest.approx(math.log(4), rel=1e-5)
    assert loss_of(trainer, b)[0] == pytest.approx(-1.0)  # off: the gap is only reported


# ----------------------------------------------------------------------------- KL


@pytest.mark.parametrize("kind, expected", [
    ("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5),
])
def test_kl_estimators_at_a_difference_of_one_half(kind, expected):
    value = grpo.kl_estimate(jnp.asarray(-1.0), jnp.asarray(-1.5), kind, 10.0)
    assert float(value) == pytest.approx(expected, rel=1e-5)


P, REFERENCE = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
D = np.log(P / REFERENCE)
KL = (P * D).sum()


# In expectation over the policy p = softmax(theta), with d = log p - log q:
#   k1  value KL,         gradient E[grad log p] = 0
#   k2  value E[d^2] / 2, gradient E[d grad log p] = p (d - KL), which is grad KL(p || q)
#   k3  value KL,         gradient E[(1 - q / p) grad log p] = p - q, which is grad KL(q || p)
@pytest.mark.parametrize("kind, value, gradient", [
    ("k1", KL, np.zeros(3)),
    ("k2", (P * D**2).sum() / 2, P * (D - KL)),
    ("k3", KL, P - REFERENCE),
])
def test_kl_estimators_on_a_categorical_have_their_closed_form(kind, value, gradient):
    def expected(theta):
        logp = jax.nn.log_softmax(theta)
        weights = jax.lax.stop_gradient(jnp.exp(logp))  # the samples: not differentiated
        return (weights * grpo.kl_estimate(logp, jnp.log(REFERENCE), kind, 10.0)).sum()

    found, grads = jax.value_and_grad(expected)(jnp.log(P))
    assert float(found) == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(grads, gradient, atol=1e-6)


def test_the_kl_term_is_weighed_by_beta_and_aggregated_like_the_loss(loss_of):
    """d = 1 and 0 on two rows of 1 and 2 tokens: k2 = 1/2, 0, 0; token mean 1/6, beta 0.3."""
    logp = np.array([[[-1.0, 0.0], [-1.0, -1.0]]])
    ref = np.array([[[-2.0, 9.0], [-1.0, -1.0]]])
    b = batch(logp, [[1, 2]], [[0.0, 0.0]], on_policy=True)
    loss, _, seen = loss_of(logp, b, ref_QGT=ref, kl="k2", beta=0.3)
    assert loss == pytest.approx(0.3 / 6, rel=1e-5)
    assert float(seen["means"]["grpo/kl"].divide()) == pytest.approx(1 / 6, rel=1e-5)
    loss, _, _ = loss_of(logp, b, ref_QGT=ref, kl="k2", beta=0.3, aggregation="sequence")
    assert loss == pytest.approx(0.3 / 4, rel=1e-5)


# ----------------------------------------------------------------------------- advantages


def test_advantages_are_centred_and_divided_by_the_population_std():
    """Mean 1/4, std sqrt(3)/4 with ddof 0; ddof 1 would give 0.5 and advantages of 1.5, -0.5."""
    adv = grpo.advantages(jnp.asarray([[1.0, 0, 0, 0]]), jnp.ones((1, 4), bool), epsilon=1e-4)
    std = math.sqrt(3) / 4 + 1e-4
    np.testing.assert_allclose(adv, [[0.75 / std] + [-0.25 / std] * 3], rtol=1e-6)


def test_without_std_advantages_are_only_centred():
    adv = grpo.advantages(jnp.asarray([[1.0, 0.0, 0.5]]), jnp.ones((1, 3), bool), std="none")
    np.testing.assert_allclose(adv, [[0.5, -0.5, 0.0]], rtol=1e-6)


# The middle between two neighbours in float32: float64 just below and above it rounds apart.
MIDDLE = (float(np.float32(0.3)) + float(np.nextafter(np.float32(0.3), np.float32(1)))) / 2


@pytest.mark.parametrize("std", ["group", "none"])
@pytest.mark.parametrize("rewards", [
    [0.1] * 7,  # the mean of seven float32 tenths is no tenth
    [0.1 + 0.2, 0.3, 0.3],  # differ in float64, in the reward's last bit
    [0.05, 0.05 + 1e-17, 0.05],
    [np.nextafter(MIDDLE, 0), np.nextafter(MIDDLE, 1)],  # and so in float32
    [1e6 + 0.1] * 5,
    [0.0] * 4,
])
def test_equal_rewards_give_exactly_zero(std, rewards):
    """Rounding in the mean divided by a std of rounding errors would be advantages of size 1."""
    adv = grpo.advantages(
        jnp.asarray([rewards], jnp.float32), jnp.ones((1, len(rewards)), bool), std=std,
        epsilon=0.0,
    )
    assert (np.asarray(adv) == 0).all()


def test_rewards_two_steps_of_float32_apart_are_different():
    low = np.float32(0.3)
    high = np.nextafter(np.nextafter(low, np.float32(1)), np.float32(1))
    adv = grpo.advantages(jnp.asarray([[low, high]]), jnp.ones((1, 2), bool), epsilon=0.0)
    np.testing.assert_allclose(adv, [[-1, 1]], atol=0.5)


def test_missing_members_are_out_of_mean_and_std():
    """Judged: 1 and 0, so mean 0.5 and std 0.5. With the missing one as 0 the mean were 1/3."""
    for missing in (0.0, 7.0, np.nan, np.inf):
        adv = grpo.advantages(
            jnp.asarray([[1.0, missing, 0.0]]), jnp.asarray([[True, False, True]]), epsilon=1e-4
        )
        np.testing.assert_allclose(adv, [[0.5 / 0.5001, 0.0, -0.5 / 0.5001]], rtol=1e-6)


@pytest.mark.parametrize("judged", [[False, False, False], [False, True, False]])
def test_a_group_with_less_than_two_judged_members_has_no_advantage(judged):
    adv = grpo.advantages(jnp.asarray([[1.0, 0.2, np.nan]]), jnp.asarray([judged]))
    np.testing.assert_array_equal(adv, [[0.0, 0.0, 0.0]])


_reward = st.floats(-2, 2, width=16)


@given(st.lists(st.tuples(_reward, st.booleans()), min_size=3, max_size=3 * 3).filter(
    lambda rows: len(rows) % 3 == 0
))
def test_advantages_are_those_of_a_slow_loop_over_groups(rows):
    reward = np.array([r for r, _ in rows], np.float32).reshape(-1, 3)
    valid = np.array([v for _, v in rows]).reshape(-1, 3)
    expected = np.zeros(reward.shape)
    for q in range(len(reward)):
        judged = [float(r) for r, v in zip(reward[q], valid[q], strict=True) if v]
        if len(set(judged)) < 2:
            continue
        mean = sum(judged) / len(judged)
        std = math.sqrt(sum((r - mean) ** 2 for r in judged) / len(judged))
        for g in range(3):
            if valid[q, g]:
                expected[q, g] = (reward[q, g] - mean) / (std + 1e-4)
    found = grpo.advantages(jnp.asarray(reward), jnp.asarray(valid))
    np.testing.assert_allclose(found, expected, atol=2e-3)


# ----------------------------------------------------------------------------- nothing judged


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_a_batch_of_which_nothing_was_judged_has_zero_loss_and_gradient(loss_of, aggregation):
    b = batch(np.zeros((2, 2, 3)), [[3, 1], [2, 3]], np.zeros((2, 2)),
              valid_QG=np.zeros((2, 2), bool))
    logp = np.full((2, 2, 3), -0.5)
    loss, grads, seen = loss_of(logp, b, ref_QGT=2 * logp, aggregation=aggregation, beta=1.0)
    assert loss == 0 and (grads == 0).all()
    for mean in seen["means"].values():
        assert float(mean.divide()) == 0


# ----------------------------------------------------------------------------- config


@pytest.mark.parametrize("options, words", [
    ({"beta": 0.0}, ["grpo.reference=True", "grpo.beta=0", "grpo.reference=False"]),
    ({"reference": False}, ["grpo.beta=0.001", "grpo.reference=False", "grpo.beta=0"]),
    ({"beta": -1.0}, ["grpo.beta=-1.0", ">= 0"]),
    ({"clip_high": -0.2}, ["grpo.clip_high=-0.2", ">= 0"]),
    ({"truncated_is": 2.0, "old_logp": "sampler"},
     ["grpo.truncated_is=2.0", "grpo.old_logp='trainer'", "grpo.truncated_is=0"]),
    ({"std": "batch"}, ["grpo.std='batch'", "group", "none"]),
    ({"ratio": "tokens"}, ["grpo.ratio='tokens'", "token", "sequence"]),
    ({"kl": "k4"}, ["grpo.kl='k4'", "k1", "k2", "k3"]),
    ({"aggregation": "mean"}, ["grpo.aggregation='mean'", "token", "sequence", "constant"]),
    ({"old_logp": "both"}, ["grpo.old_logp='both'", "trainer", "sampler"]),
])
def test_a_config_error_names_key_value_and_what_is_allowed(options, words):
    with pytest.raises(ValueError) as error:
        GRPOConfig(**options)
    for word in words:
        assert word in str(error.value)


def test_old_log_probabilities_are_computed_only_where_they_can_differ():
    assert not GRPOConfig().needs_old_logp
    assert GRPOConfig(epochs=2).needs_old_logp and GRPOConfig(minibatches=2).needs_old_logp
    assert not GRPOConfig(epochs=2, old_logp="sampler").needs_old_logp
    assert GRPOConfig(epochs=2, minibatches=3).updates_per_step == 6
