"""Prices move payoffs the way that prices do, and nothing that is no pricing is read as one."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gtalign_jax.game import pricing
from gtalign_jax.game.pricing import POLICIES, SENSITIVITY, Pricing, Usage, compose, read, reprice

USAGE = Usage(input=(100, 260, 100), output=(300, 340, 360))
LLM, USER = 0, 1
DOLLARS = st.floats(0, 1000)
COUNTS = st.integers(0, 5000)
PAYOFFS = st.lists(st.integers(-50, 50).map(lambda n: n / 10), min_size=12, max_size=12).map(
    lambda values: np.array(values).reshape(2, 3, 2)
)


def repriced(payoff_UAP, how, usage=USAGE, sensitivity=SENSITIVITY):
    return reprice(payoff_UAP, usage.array_AX, how.rates_XP, np.array(sensitivity))


def usages():
    three = st.tuples(COUNTS, COUNTS, COUNTS)
    return st.builds(Usage, three, three)


def test_money_is_added_cell_by_cell_as_a_slow_loop_adds_it():
    rng = np.random.default_rng(0)
    payoff_UAP, how = rng.normal(size=(2, 3, 2)), Pricing("x", ((1e-3, -2e-3), (3e-3, 0), (1, -2)))
    found = repriced(payoff_UAP, how, sensitivity=(7.0, 11.0))
    units = (USAGE.input, USAGE.output, USAGE.requests)
    for u, a, p in itertools.product(range(2), range(3), range(2)):
        dollars = sum(units[x][a] * how.rates[x][p] for x in range(3))
        expected = payoff_UAP[u, a, p] + dollars * (7.0, 11.0)[p]
        assert math.isclose(found[u, a, p], expected, rel_tol=1e-12)


def test_a_price_per_token_by_hand():
    # DA: 100 in, 300 out. User: 100 * 5e-6 + 300 * 30e-6 = $0.0095, 3.8 points of 400. LLM:
    # receives that less 100 * 1e-6 + 300 * 6e-6 = $0.0019, so $0.0076, 0.76 points of 100.
    got_P = repriced(np.zeros((2, 3, 2)), read("per_token:input=5,output=30"))[1, 0]
    np.testing.assert_allclose(got_P, [0.76, -3.8], rtol=1e-12)


def test_the_other_policies_by_hand():
    def dollars(value):
        return USAGE.array_AX @ read(value).rates_XP

    costs = "cost_input=2,cost_output=10"  # CQ: 260 * 2e-6 + 340 * 10e-6 = $0.00392; 2 requests
    np.testing.assert_allclose(dollars(f"subscription:{costs}")[1], [-0.00392, 0])
    np.testing.assert_allclose(dollars(f"per_request:price=0.05,{costs}")[1], [0.09608, -0.1])
    free = dollars(f"free:ads=0.003,nuisance=0.001,quota=0.01,{costs}")
    np.testing.assert_allclose(free[1], [0.00208, -0.022])
    own = {"policy": "given", "llm_output": -10, "user_request": -0.5, "user_input": 1}
    np.testing.assert_allclose(dollars(own)[1], [-0.0034, -0.99974])
    assert not dollars("none").any()


@given(PAYOFFS, usages(), DOLLARS, DOLLARS, DOLLARS)
def test_a_dearer_output_token_never_favours_the_longer_action(payoff, usage, base, more, inputs):
    cheap, dear = (
        repriced(payoff, read({"policy": "per_token", "input": inputs, "output": price}), usage)
        for price in (base, base + more)
    )
    for longer, shorter in itertools.permutations(range(3), 2):
        if usage.output[longer] < usage.output[shorter]:
            continue
        for u in range(2):
            before = cheap[u, longer, USER] - cheap[u, shorter, USER]
            after = dear[u, longer, USER] - dear[u, shorter, USER]
            slack = 1e-12 * np.abs(dear).max() + 1e-12
            assert after <= before + slack
            if usage.output[longer] > usage.output[shorter] and more > 1:
                assert after < before


@given(PAYOFFS, usages(), st.sampled_from(sorted(POLICIES)))
def test_zero_prices_change_nothing_bit_by_bit(payoff_UAP, usage, policy):
    free = POLICIES[policy](**dict.fromkeys(pricing.defaults(policy), 0))
    assert repriced(payoff_UAP, free, usage).tobytes() == payoff_UAP.tobytes()


def test_who_has_no_sensitivity_feels_no_price():
    payoff_UAP = np.arange(12.0).reshape(2, 3, 2)
    found = repriced(payoff_UAP, read("per_token"), sensitivity=(0.0, 400.0))
    assert (found[..., LLM] == payoff_UAP[..., LLM]).all()
    assert (found[..., USER] < payoff_UAP[..., USER]).all()


def test_with_equal_sensitivities_a_payment_cancels_in_the_sum():
    payoff_UAP = np.arange(12.0).reshape(2, 3, 2)
    paid = read("per_token:input=5,output=30,cost_input=0,cost_output=0")
    equal = repriced(payoff_UAP, paid, sensitivity=(100.0, 100.0))
    np.testing.assert_allclose(equal.sum(-1), payoff_UAP.sum(-1), rtol=1e-12)
    assert (repriced(payoff_UAP, paid).sum(-1) < payoff_UAP.sum(-1)).all()


@given(PAYOFFS, DOLLARS, DOLLARS)
def test_composed_policies_add_what_each_adds(payoff_UAP, output, ads):
    tokens = {"policy": "per_token", "output": output}
    adverts = {"policy": "free", "ads": ads}
    both = repriced(payoff_UAP, read([tokens, adverts, "none"])) - payoff_UAP
    apart = sum(repriced(payoff_UAP, read(one)) - payoff_UAP for one in (tokens, adverts))
    np.testing.assert_allclose(both, apart, rtol=1e-9, atol=1e-9)


def test_the_order_of_a_composition_does_not_matter_and_nothing_is_not_a_composition():
    one, two = read("subscription"), read("per_request")
    np.testing.assert_allclose(compose(one, two).rates_XP, compose(two, one).rates_XP)
    assert compose(one).rates == one.rates
    with pytest.raises(ValueError, match="one pricing or more"):
        compose()


def test_repricing_is_linear_in_the_rates():
    rng = np.random.default_rng(1)
    payoff_UAP, one, two = rng.normal(size=(2, 3, 2)), *rng.normal(size=(2, 3, 2))
    usage, feel = USAGE.array_AX, np.array(SENSITIVITY)
    mixed = reprice(payoff_UAP, usage, 3 * one - 2 * two, feel) - payoff_UAP
    apart = [reprice(payoff_UAP, usage, rates, feel) - payoff_UAP for rates in (one, two)]
    np.testing.assert_allclose(mixed, 3 * apart[0] - 2 * apart[1], rtol=1e-9)


def test_a_vmap_over_games_and_prices_equals_the_loop_and_is_traced_once():
    rng, traces = np.random.default_rng(2), []
    payoff_BUAP, rates_BXP = rng.normal(size=(7, 2, 3, 2)), rng.normal(size=(7, 3, 2)) / 1e3
    usage_AX, feel_P = jnp.asarray(USAGE.array_AX), jnp.asarray(SENSITIVITY)

    @jax.jit
    def batched(payoff_BUAP, rates_BXP):
        traces.append(None)
        return jax.vmap(reprice, (0, None, 0, None))(payoff_BUAP, usage_AX, rates_BXP, feel_P)

    for scale in (1.0, 2.0):
        found = batched(scale * payoff_BUAP, rates_BXP)
        for b in range(7):
            alone = reprice(
                scale * payoff_BUAP[b], USAGE.array_AX, rates_BXP[b], np.array(SENSITIVITY)
            )
            np.testing.assert_allclose(found[b], alone, rtol=2e-4, atol=2e-4)
    assert len(traces) == 1


def test_the_three_ways_to_write_a_pricing_read_the_same():
    same = [
        read(" per_token : output = 30, input=5 "),
        read({"policy": "per_token", "output": 30, "input": 5}),
        read(["per_token:output=30,input=5"]),
        POLICIES["per_token"](output=30, input=5),
    ]
    assert {how.rates for how in same} == {same[0].rates}
    assert same[0].name == "per_token(output=30, input=5)"
    assert read(["none", "free"]).name == "none + free"
    for text in ("free:ads=1e+1 + per_token:output=2", "free:ads=10+per_token:output=2.0"):
        assert read(text) == read(["free:ads=10", {"policy": "per_token", "output": 2}])
    assert read("per_token").rates == read("per_token:output=30,input=5").rates  # the defaults


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("barter", "policy 'barter' is unknown; allowed is one of subscription, per_token"),
        ("per_token:output=-3", "per_token.output is -3.0; allowed are numbers from 0 to 1e+06"),
        ("per_token:output=nan", "per_token.output is nan"),
        ("per_token:output=1e400", "per_token.output is inf"),
        ("per_token:output=much", "'output' is 'much', not a number"),
        ("per_token:output", "'output' is no key=number"),
        ("per_token:", "'' is no key=number"),
        ("per_token:output=1,output=2", "'output=2' stands twice"),
        ("per_token:price=3", "no key 'price'; it takes input, output, cost_input, cost_output"),
        ("none:price=3", "none has no key 'price'; it takes no key at all"),
        ("x" * 2000, "2000 characters"),
        ({"policy": "free", "ads": True}, "free.ads is True"),
        ({"policy": "free", "ads": "3"}, "free.ads is '3'"),
        ({"policy": "free", "ads": None}, "free.ads is None"),
        ({"policy": "free", "ads": 10**400}, "free.ads is an integer of 1329 bits"),
        ({"policy": "free", "ads": math.nan}, "free.ads is nan"),
        ({"policy": ["free"]}, "policy a list is unknown"),
        ({"price": 1}, 'no key "policy"'),
        ({"policy": "free", 3: 1}, "no key 3"),
        ({"policy": "given", "llm_output": -1e7}, "numbers from -1e+06 to 1e+06"),
        ([], "a sum of 0 pricings; allowed are 1 to 16"),
        (["none"] * 17, "a sum of 17 pricings"),
        (" + ".join(["none"] * 17), "a sum of 17 pricings"),
        ("none + ", "policy 'none +' is unknown"),
        ("none + barter", "policy 'barter' is unknown"),
        ([["none"]], "pricing is a list"),
        (None, "pricing is None"),
        (3, "pricing is 3"),
        (b"none", "pricing is a bytes"),
    ],
)
def test_what_is_no_pricing_is_refused_by_name_value_and_what_is_allowed(value, said):
    with pytest.raises(ValueError) as caught:
        read(value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.sampled_from([*POLICIES, "per_token:output=3", "free:ads=1,quota=2", "free + none"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["policy", "output", "ads", "price"]) | st.text(), inner),
    max_leaves=8,
)


@given(JSON)
@example(json.loads("[" * 900 + "]" * 900))
def test_every_json_value_is_a_pricing_or_a_value_error(value):
    try:
        found = read(value)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert np.isfinite(found.rates_XP).all()
    try:
        usage = pricing.read_usage(value)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert np.isfinite(usage.array_AX).all()


def test_a_usage_goes_to_json_and_back():
    stored = json.loads(json.dumps(dataclasses.asdict(USAGE)))
    assert pricing.read_usage(stored) == USAGE
    assert pricing.read_usage({"input": [1, 2, 3], "output": [4, 5, 6]}).requests == (1, 2, 1)
    np.testing.assert_array_equal(USAGE.array_AX, [[100, 300, 1], [260, 340, 2], [100, 360, 1]])
    for wrong, said in (
        ({"input": [1, 2, 3]}, '"output"'),
        ({"input": [1, 2], "output": [1, 2, 3]}, "usage.input must hold one number for each"),
        ({"input": [1, -2, 3], "output": [1, 2, 3]}, "usage.input.CQ is -2"),
        ({"input": "123", "output": [1, 2, 3]}, "usage.input.DA is '1'"),
        ({"input": [1, 2, 3], "output": [1, 2, 3], "words": [1, 2, 3]}, "no key 'words'"),
    ):
        with pytest.raises(ValueError) as caught:
            pricing.read_usage(wrong)
        assert said in str(caught.value)


def row(kind, tokens, response_tokens, words=4):
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "w " * words}]
    return {
        "response_kind": kind, "tokens": tokens, "response_tokens": response_tokens,
        "prompt": prompt,
    }


def test_usage_is_measured_and_a_question_counts_the_turn_that_follows():
    rows = [
        row("answer", 50, 10), row("answer", 70, 30), row("ask", 48, 6, words=8),
        row("answer_ask", 90, 40), row("refuse", 999, 999), row(None, 999, 0),
    ]
    # Prompts: 2 + 4, 2 + 4, 2 + 8, 2 + 4 words, 7 on average. CQ reads 7, then 7 + 6 + 6, and
    # writes 48, then an answer of 60. Half of the AQ read 7 + 40 + 6 more and write an answer more.
    assert pricing.measured(rows) == Usage((7, 26, 33.5), (60, 108, 120), (1, 2, 1.5))
    found = pricing.measured(rows, prompt_tokens=lambda row: 100, follow_up=0.0)
    assert found == Usage((100, 212, 100), (60, 108, 90), (1, 2, 1))


def test_what_nobody_played_is_derived_from_what_was():
    # An answer of 60 with 20 tokens of response; a question alone, then an answer with a question.
    answer = row("answer", 60, 20)
    assert pricing.measured([answer, row("ask", 48, 6)], follow_up=0.0).output == (60, 108, 66)
    found = pricing.measured([answer, row("answer_ask", 66, 26)], follow_up=0.0)
    assert found.output == (60, 40 + 6 + 60, 66)


@pytest.mark.parametrize(("rows", "said"), [
    ([], "'answer'"), ([row("answer", 1, 1)], "'ask' or 'answer_ask'"), ([row("ask", 1, 1)], "'an"),
])
def test_usage_that_nobody_measured_is_an_error(rows, said):
    with pytest.raises(ValueError, match=said):
        pricing.measured(rows)


@given(st.lists(st.floats(-2e9, 2e9) | st.just(math.nan), min_size=6, max_size=6))
def test_rates_are_finite_and_bounded(numbers):
    rates = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    assume(not all(abs(number) <= pricing.MAX_RATE for number in numbers))
    with pytest.raises(ValueError, match="rates are"):
        Pricing("x", rates)
