"""Paired differences: permutations against enumeration, intervals against scipy, Holm by hand."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.evaluation import paired

SIX = [(0.10, 0.35), (0.50, 0.45), (0.20, 0.60), (0.70, 0.72), (0.30, 0.41), (0.90, 0.83)]


def rows(values, **fields):
    return [{"id": f"p{i}", "user_welfare": value, **fields} for i, value in enumerate(values)]


def one(first, second, **kwargs):
    """The difference of one measure, user_welfare."""
    return paired.differences(first, second, ("user_welfare",), **kwargs)["user_welfare"]


def of_pairs(pairs, **kwargs):
    return one(rows([a for a, _ in pairs]), rows([b for _, b in pairs]), **kwargs)


def test_six_pairs_have_the_p_value_of_all_their_sixty_four_swaps():
    differences = [b - a for a, b in SIX]
    seen = abs(sum(differences))
    swaps = itertools.product((1, -1), repeat=6)
    extreme = sum(
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= seen - 1e-12
        for signs in swaps
    )
    got = of_pairs(SIX)
    assert got.p == pytest.approx(extreme / 64, abs=1e-12)
    assert 0.05 < got.p < 0.5
    # Unpaired, the same numbers would say far less: forgetting the pairs is the likely bug.
    unpaired = scipy.stats.permutation_test(
        tuple(np.array(SIX).T), lambda x, y, axis: y.mean(axis=axis) - x.mean(axis=axis),
        vectorized=True, n_resamples=np.inf,
    ).pvalue  # fmt: skip
    assert unpaired > 1.5 * got.p
    assert got.first == pytest.approx(0.45) and got.second == pytest.approx(0.56)
    assert got.difference == pytest.approx(0.11) and got.pairs == 6


def test_the_interval_is_that_of_scipys_bootstrap():
    rng = np.random.default_rng(3)
    first = rng.uniform(size=60)
    second = first + rng.normal(0.1, 0.2, size=60)
    got = one(rows(first.tolist()), rows(second.tolist()), resamples=20_000)
    assert got.low < got.difference < got.high
    for low, high, values in (
        (got.low, got.high, second - first),
        (got.first_low, got.first_high, first),
        (got.second_low, got.second_high, second),
    ):
        expected = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=20_000, method="percentile", rng=1
        ).confidence_interval
        assert (low, high) == pytest.approx(tuple(expected), abs=0.004)
    # An interval of independent sides would be twice as wide: the pairs must stay together.
    apart = math.hypot(got.first_high - got.first_low, got.second_high - got.second_low)
    assert got.high - got.low < 0.7 * apart


def test_resampling_keeps_the_mix_of_sources():
    # Within a source nothing varies: every stratified resample has the same mean. Without strata
    # the share of the second source would vary, and the interval with it.
    first = rows([0.0] * 10, data_source="a")
    second = [{**row, "user_welfare": float(i >= 7)} for i, row in enumerate(first)]
    loose = one(first, second)
    for side in (first, second):
        for row in side[7:]:
            row["data_source"] = "b"
    tight = one(first, second)
    assert (tight.low, tight.high) == pytest.approx((0.3, 0.3))
    assert loose.high - loose.low > 0.3


def test_a_source_of_one_prompt_resamples_to_itself():
    first = rows([0.1, 0.2, 0.3], data_source="a") + [
        {"id": "single", "user_welfare": 0.0, "data_source": "b"}
    ]
    second = [{**row, "user_welfare": row["user_welfare"] + 0.5} for row in first]
    got = one(first, second)
    assert (got.low, got.high) == pytest.approx((0.5, 0.5))
    assert got.pairs == 4


def test_several_samples_of_an_id_are_one_observation():
    first, second = [], []
    for i, (a, b) in enumerate(SIX):
        for sample, shift in enumerate((-0.05, 0.0, 0.05)):
            first.append({"id": i, "sample": sample, "user_welfare": a + shift})
            second.append({"id": i, "sample": sample, "user_welfare": b + shift})
    got, plain = one(first, second), of_pairs(SIX)
    assert got.pairs == 6
    # Eighteen pairs taken as independent would give a p-value near 0.004.
    assert got.p == plain.p
    assert (got.low, got.high) == pytest.approx((plain.low, plain.high))


def test_without_samples_repeated_ids_are_averaged_and_counted():
    first = rows([0.2, 0.4]) + rows([0.4])
    matching = paired.match(first, rows([0.5, 0.5]), ("user_welfare",))
    assert matching.by == ("id",) and matching.averaged == 1
    assert matching.first_MB[0] == pytest.approx([0.3, 0.4])


def test_samples_are_matched_with_their_like():
    first = [{"id": "a", "sample": s, "user_welfare": s / 10} for s in (0, 1, 2)]
    second = [{"id": "a", "sample": s, "user_welfare": s} for s in (2, 1)]
    matching = paired.match(first, second, ("user_welfare",))
    assert matching.by == ("id", "sample") and matching.samples_unmatched == 1
    assert matching.first_MB.tolist() == [[0.1, 0.2]]
    assert matching.second_MB.tolist() == [[1.0, 2.0]]


def test_missing_rows_take_their_pair_with_them_and_are_counted():
    first, second = rows([0.1, 0.2, 0.3, 0.4]), rows([0.2, 0.4, 0.6, None])
    first[1]["valid"] = False
    matching = paired.match(first, second, ("user_welfare",))
    assert (matching.missing_first, matching.missing_second) == (1, 1)
    got = paired.assess(matching)["user_welfare"]
    assert got.pairs == 2
    assert got.difference == pytest.approx(0.2)  # (0.1 + 0.3) / 2; a failure as 0 would give 0.1
    assert got.first == pytest.approx(0.2) and got.second == pytest.approx(0.4)


def test_measures_have_their_own_pairs():
    first = [{"id": i, "user_welfare": a, "reward": a} for i, (a, _) in enumerate(SIX)]
    second = [{"id": i, "user_welfare": b, "reward": b} for i, (_, b) in enumerate(SIX)]
    second[2]["reward"] = None
    got = paired.differences(first, second, ("user_welfare", "reward"))
    left = [pair for i, pair in enumerate(SIX) if i != 2]
    alone = of_pairs(left)
    assert got["reward"].pairs == 5 and got["user_welfare"].pairs == 6
    assert got["reward"].p == pytest.approx(alone.p, abs=1e-12)
    assert (got["reward"].low, got["reward"].high) == (alone.low, alone.high)


def test_ids_of_one_side_only_are_named():
    matching = paired.match(rows([0.1, 0.2, 0.3]), rows([0.1]) + [{"id": 7, "user_welfare": 1.0}],
                            ("user_welfare",))
    assert matching.only_first == ("p1", "p2") and matching.only_second == ("7",)
    assert matching.ids == ("p0",)


def test_one_pair_has_a_difference_but_neither_interval_nor_p():
    got = of_pairs(SIX[:1])
    assert got.difference == pytest.approx(0.25) and got.pairs == 1
    unknown = (got.low, got.high, got.p, got.p_adjusted, got.first_low, got.second_high)
    assert all(math.isnan(x) for x in unknown)


def test_equal_sides_differ_by_nothing_with_p_one():
    got = of_pairs([(a, a) for a, _ in SIX])
    assert (got.difference, got.low, got.high, got.p) == (0.0, 0.0, 0.0, 1.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=7))
def test_exchanging_the_sides_turns_the_sign_alone(pairs):
    there = of_pairs(pairs, resamples=50)
    back = of_pairs([(b, a) for a, b in pairs], resamples=50)
    assert back.difference == pytest.approx(-there.difference)
    assert back.p == pytest.approx(there.p)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))


def test_the_same_seed_gives_the_same_numbers():
    assert of_pairs(SIX, seed=5) == of_pairs(SIX, seed=5)
    assert of_pairs(SIX, seed=5) != of_pairs(SIX, seed=6)


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04: times 4, 3, 2, 1 = .04 .06 .06 .04, and never falling: the last is .06
    assert paired.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert paired.holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    got = paired.holm([0.02, math.nan, 0.03])  # two tests: a NaN is none
    assert got[[0, 2]] == pytest.approx([0.04, 0.04]) and math.isnan(got[1])
    assert len(paired.holm([])) == 0


def test_the_differences_carry_holms_adjustment_over_the_measures():
    def side(at):
        return [
            {"id": i, "user_welfare": pair[at], "llm_welfare": pair[at] * (i % 2)}
            for i, pair in enumerate(SIX)
        ]

    got = paired.differences(side(0), side(1), ("user_welfare", "llm_welfare"))
    low, high = sorted(got.values(), key=lambda d: d.p)
    assert low.p < high.p
    assert low.p_adjusted == pytest.approx(min(1, 2 * low.p))
    assert high.p_adjusted == pytest.approx(max(high.p, low.p_adjusted))


def test_sources_are_assessed_apart_and_adjusted_together():
    first = [{"id": i, "user_welfare": a, "data_source": "xy"[i % 2]}
             for i, (a, _) in enumerate(SIX)]  # fmt: skip
    second = [{"id": i, "user_welfare": b} for i, (_, b) in enumerate(SIX)]
    got = paired.assess_by_source(paired.match(first, second, ("user_welfare",)))
    assert list(got) == ["x", "y"]
    x, y = got["x"]["user_welfare"], got["y"]["user_welfare"]
    assert x.difference == pytest.approx((0.25 + 0.40 + 0.11) / 3) and x.pairs == 3
    assert y.difference == pytest.approx((-0.05 + 0.02 - 0.07) / 3)
    assert x.p == pytest.approx(0.25)  # three differences of one sign: 2 of 8 swaps
    assert x.p_adjusted == pytest.approx(0.5)
    assert paired.assess_by_source(paired.match(second, second, ("user_welfare",))) == {}


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ([{"user_welfare": 0.1}], rows([0.1]), "first side has no `id`"),
        (rows([0.1]), [{"id": "q", "user_welfare": 0.1}], "no id is in both.*'p0'.*'q'"),
        (rows([0.1]), [], "no id is in both.*no rows"),
        (rows([0.1], sample=0), rows([0.1], sample=1), r"no \(id, sample\) is in both"),
        (rows([0.1], sample=0) * 2, rows([0.1], sample=0), "'p0', sample 0 stands twice.*first"),
        (rows([math.inf]), rows([0.1]), "'p0': user_welfare=inf"),
        (rows([10**400]), rows([0.1]), "user_welfare=1000"),
        (rows(["high"]), rows([0.1]), "user_welfare='high'"),
        (rows([0.1], data_source="a"), rows([0.1], data_source="b"), "several data sources.*a, b"),
        (rows([None]), rows([0.1]), "'user_welfare': no pair"),
    ],
)
def test_what_cannot_be_matched_is_named(first, second, names):
    with pytest.raises(ValueError, match=names):
        one(first, second)


def test_resamples_must_be_positive():
    with pytest.raises(ValueError, match="resamples=0"):
        of_pairs(SIX, resamples=0)
