"""`grpo.filter_on`: groups in which a named factor is equal are as if they had no score."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_collect
import test_grpo_exact as exact
import tiny

from gtalign_jax.config import Config, ConfigError, check, fingerprint
from gtalign_jax.reward.factors import NAMES
from gtalign_jax.training import grpo
from gtalign_jax.training import packed as packed_lib
from gtalign_jax.training.collect import Verdict
from gtalign_jax.training.grpo import GRPOConfig
from gtalign_jax.training.learner import Learner, without_spread
from gtalign_jax.training.state import make_optimizer, make_state

experience = test_collect.experience  # two prompts x two samples, the last one missing

Q, G = exact.Q, exact.G
NAN = np.nan
# Of `exact.make_batch`, rows (1, 1) and (3, 2) were not judged: what stands there means nothing.
ANSWER_QG = np.array([
    [0.5, 0.5, 0.5, np.nextafter(0.5, 1)],  # differs in the last bit of float64
    [1.0, 0.0, 1.0, 1.0],  # but for the missing row, equal
    [0.0, 0.0, 1.0, 0.0],
    [0.25, 0.25, NAN, 0.25],
])
FILTERED = [False, True, False, True]


def verdict_of(b, answer_QG=ANSWER_QG) -> Verdict:
    """No two rewards are equal, in no group: their shape differs."""
    reward_QG = np.random.default_rng(5).uniform(size=answer_QG.shape)
    return Verdict(
        reward_QG.reshape(-1), np.asarray(b.valid_QG).reshape(-1),
        np.ones(answer_QG.size, bool), np.asarray(b.lengths_QG).reshape(-1),
        answer_QG.reshape(-1),
    )


def learner(**options) -> Learner:
    cfg = GRPOConfig(**{"beta": 0.1, "logit_chunk": 3, **options})
    advantages = functools.partial(grpo.advantages, std=cfg.std, epsilon=cfg.adv_epsilon)
    return Learner(cfg, exact.layout_of(**exact.ONE), None, None, None, advantages, np.zeros(9))


def signal(learner: Learner, verdict: Verdict) -> np.ndarray:
    prompt = types.SimpleNamespace(data_source="a")
    prompts = types.SimpleNamespace(prompts=[prompt] * (len(verdict.reward_B) // G))
    return learner.signal(prompts, verdict)


def loss_and_grads(learner: Learner, b, verdict: Verdict):
    adv_QG = signal(learner, verdict)
    b = learner.scored(b, verdict, adv_QG)
    (plan,) = learner.plans(verdict, adv_QG, exact.T) or [None]
    if plan is None:
        return jax.device_get(exact.whole(learner.cfg)(tiny.params(), b))
    packed = packed_lib.pack(b, plan.placed, jnp.asarray(plan.pieces), learner.cfg)
    fn = functools.partial(packed_lib.loss_and_grads, cfg=tiny.CFG, grpo=learner.cfg)
    return jax.device_get(jax.jit(fn)(tiny.params(), packed))


def without(b, verdict: Verdict, groups):
    """The batch and its scores as if these groups had never been sampled."""
    rows = np.flatnonzero(np.repeat(groups, G))
    fewer = jax.tree.map(lambda x: jnp.delete(x, np.flatnonzero(groups), axis=0), b)
    return fewer, Verdict(**{
        field.name: np.delete(getattr(verdict, field.name), rows)
        for field in dataclasses.fields(Verdict) if field.name not in ("problem_B", "sources_B")
    })


@pytest.mark.parametrize("options", [
    {}, {"pack": 2}, {"normalizer": "zscore", "std": "none"},
    pytest.param({"aggregation": "sequence"}, marks=pytest.mark.slow),
    pytest.param({"aggregation": "constant", "pack": 2}, marks=pytest.mark.slow),
], ids=str)
def test_filtered_groups_leave_the_gradient_of_the_batch_without_them(options):
    """With the KL term, whose tokens would count: equal advantages of 0 would not be enough."""
    b = exact.with_reference(exact.make_batch())
    verdict = verdict_of(b)
    loss, grads, seen = loss_and_grads(learner(filter_on="answer", **options), b, verdict)
    fewer = without(b, verdict, FILTERED)
    expected, other_grads, other_seen = loss_and_grads(learner(**options), *fewer)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    exact.assert_same_grads(grads, other_grads, atol=1e-6)
    for name, mean in other_seen["means"].items():
        assert float(seen["means"][name].count) == float(mean.count), name
    unfiltered, all_grads, _ = loss_and_grads(learner(**options), b, verdict)
    assert abs(float(unfiltered) - float(loss)) > 1e-3
    assert exact.size(jax.tree.map(np.subtract, all_grads, grads)) > 1e-3


def test_equality_is_exact_and_asked_of_judged_completions_alone():
    valid_QG = np.asarray(exact.make_batch().valid_QG)
    assert without_spread(ANSWER_QG, valid_QG).tolist() == FILTERED
    # A judged row without a value says nothing either way.
    assert without_spread(ANSWER_QG, np.ones((Q, G), bool)).tolist() == [False, False, False, True]


def test_a_single_judged_completion_has_no_spread_and_a_group_of_none_is_not_filtered():
    judged = np.array([[True, False], [False, False]])
    assert without_spread(np.array([[0.3, 0.4], [0.5, 0.5]]), judged).tolist() == [True, False]


def test_without_a_name_nothing_is_filtered_and_nothing_counted():
    verdict = dataclasses.replace(verdict_of(exact.make_batch()), filter_B=None)
    plain = learner()
    adv_QG = signal(plain, verdict)
    assert (adv_QG != 0).any(axis=1).all()
    assert "grpo/groups_filtered" not in plain.facts(adv_QG, 0)


def test_filtered_groups_are_counted_and_among_those_without_signal():
    verdict = verdict_of(exact.make_batch())
    filtering = learner(filter_on="answer")
    adv_QG = signal(filtering, verdict)
    assert (adv_QG == 0).all(axis=1).tolist() == FILTERED
    facts = filtering.facts(adv_QG, 0, (), verdict)
    assert facts["grpo/groups_filtered"] == facts["grpo/groups_without_signal"] == 0.5


def test_filtered_groups_are_not_packed():
    b = exact.make_batch()
    verdict, packing = verdict_of(b), learner(filter_on="answer", pack=2)
    (plan,) = packing.plans(verdict, signal(packing, verdict), exact.T)
    bins_QG = plan.plan.bin_XR.reshape(Q, G)
    assert (bins_QG == -1).all(axis=1).tolist() == FILTERED  # although there is a KL term


def test_a_verdict_without_the_factor_is_refused():
    """Otherwise the run would go on unfiltered, and say nothing."""
    verdict = dataclasses.replace(verdict_of(exact.make_batch()), filter_B=None)
    with pytest.raises(ValueError, match=r"grpo.filter_on='answer', but the verdict holds no"):
        signal(learner(filter_on="answer"), verdict)


@pytest.mark.slow
@pytest.mark.parametrize("pack", [0, 2])
def test_another_number_of_filtered_groups_compiles_nothing_anew(pack):
    cfg = GRPOConfig(filter_on="answer", pack=pack, reference=False, beta=0.0, logit_chunk=3)
    layout = exact.layout_of(**exact.ONE)
    made = Learner.make(tiny.CFG, cfg, layout, layout, filters=grpo.UNFILTERED,
                        dtype=jnp.float32, steps=3)
    state = make_state(tiny.params(), tiny.CFG, make_optimizer(cfg, 3), layout)
    answers = (ANSWER_QG, np.arange(Q * G).reshape(Q, G) / 16.0, np.ones((Q, G)))
    shares = []
    for step, answer_QG in enumerate(answers):
        b = grpo.place(exact.make_batch().replace(old_logp_QGT=None), layout)
        verdict = verdict_of(b, answer_QG)
        adv_QG = signal(made, verdict)
        plans = made.plans(verdict, adv_QG, exact.T)
        state, (seen,) = made.update(state, None, made.scored(b, verdict, adv_QG), plans)
        assert np.isfinite(float(seen["means"]["grpo/grad_norm"].sum))
        shares.append(made.facts(adv_QG, step, plans, verdict)["grpo/groups_filtered"])
    assert shares == [0.5, 0.0, 1.0]
    assert float(seen["means"]["grpo/grad_norm"].sum) == 0  # of the last one: nothing was left
    assert made.one_update._cache_size() == made.advantages._cache_size() == 1


def test_the_verdict_of_an_experience_holds_the_factor_that_is_asked_for(experience):
    assert experience.verdict().filter_B is None
    np.testing.assert_array_equal(
        experience.verdict("answer").filter_B, experience.scores.factors["answer"]
    )


# ----------------------------------------------------------------------------- config


def configured(**options) -> Config:
    return Config(stages=("grpo",), grpo=GRPOConfig(**options))


@pytest.mark.parametrize("name", ["", *NAMES])
def test_every_factor_may_be_named(name):
    check(configured(filter_on=name), 8)


def test_an_unknown_factor_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match="grpo.filter_on='reward': expected .*'answer'") as error:
        check(configured(filter_on="reward"), 8)
    assert all(repr(name) in str(error.value) for name in NAMES)


def test_checkpoints_older_than_the_key_are_continued_where_it_is_off():
    assert "grpo.filter_on" not in fingerprint(configured())
    assert fingerprint(configured(filter_on="answer"))["grpo.filter_on"] == "answer"
