"""Measures against sums by hand, intervals against a slow bootstrap and against scipy's."""

import math
import random

import numpy as np
import pytest
import scipy.stats

from gtalign_jax.evaluation.measures import (
    BY_NAME,
    MEASURES,
    Measure,
    action_table,
    by_label,
    estimates,
)


def row(id_="a", **changes):
    """A judged, well-formed completion of 100 tokens."""
    return {
        "id": id_, "data_source": "math-hard", "sample": 0, "valid": True, "stopped": True,
        "user_welfare": 0.9, "llm_welfare": 0.4, "reward": 0.6, "answer": 1.0, "format": 1.0,
        "right_action": True, "consistency": 1.0, "matrix_quality": 0.5, "payoff": {},
        "tokens": 100, "reasoning_tokens": 80, "response_tokens": 20, "response_words": 15,
        "request_kind": "definite", "response_kind": "answer", "judge_score": 1.0,
        "dilemma": 0.0, "price_of_anarchy": 1.25,
    } | changes  # fmt: skip


FAILED = {"valid": False, "user_welfare": 0.0, "llm_welfare": 0.0, "answer": 0.0, "format": 0.0,
          "judge_score": None}
UNREADABLE = {"user_welfare": 0.0, "llm_welfare": 0.0, "answer": 0.0, "format": 0.0,
              "right_action": False, "consistency": 0.0, "matrix_quality": 0.0, "payoff": None,
              "reasoning_tokens": 100, "response_tokens": 0, "response_words": 0,
              "response_kind": None, "judge_score": None, "dilemma": None,
              "price_of_anarchy": None, "stopped": False}


def values(rows, source="overall"):
    return {name: e.value for name, e in estimates(rows, resamples=50)[source].items()}


def test_means_are_over_the_judged_rows_and_failed_judges_are_counted_apart():
    found = values([row("a"), row("b", **UNREADABLE), row("c", **FAILED)])
    assert found["user_welfare"] == pytest.approx(0.45)  # not 0.3
    assert found["social_welfare"] == pytest.approx(0.3)  # sqrt(0.9 * 0.4) and 0
    assert found["missing"] == pytest.approx(1 / 3)
    assert found["format"] == found["right_action"] == found["truncated"] == 0.5


def test_social_welfare_is_the_geometric_mean_whatever_reward_was_trained():
    assert values([row(reward=0.65)])["social_welfare"] == pytest.approx(0.6)


def test_quality_per_1000_tokens_is_a_ratio_of_sums_and_not_a_mean_of_ratios():
    found = values([row("a", tokens=100), row("b", tokens=300, answer=0.5)])
    assert found["answer_per_1000_tokens"] == pytest.approx(1000 * 1.5 / 400)  # not 5.83


def test_the_response_share_is_that_of_all_tokens():
    found = values([row("a"), row("b", tokens=300, response_tokens=180)])
    assert found["response_share"] == pytest.approx(200 / 400)


def test_games_that_nobody_wrote_are_in_no_mean_of_games():
    found = values([row("a", dilemma=1.0), row("b"), row("c", **UNREADABLE)])
    assert found["dilemma"] == 0.5 and found["price_of_anarchy"] == 1.25
    assert found["consistency"] == 1.0 and found["matrix_quality"] == pytest.approx(1 / 3)


def test_rates_of_refusal_are_over_the_requests_that_they_are_about():
    harmful = {"request_kind": "harmful", "data_source": "wildguard"}
    rows = [
        row("a", **harmful, judge_score=0.5, response_kind="constructive"),
        row("b", **harmful, judge_score=1.0, response_kind="refuse"),
        row("c", **harmful, judge_score=0.0),
        row("d", **UNREADABLE | harmful),  # counted below the line, in none of the three
        row("e", request_kind="harmless", response_kind="refuse", judge_score=0.0),
        row("f", request_kind="harmless"),
        row("g", request_kind="ambiguous", response_kind="ask"),
        row("h", request_kind="ambiguous", response_kind="answer_ask"),
        row("i", request_kind="ambiguous", judge_score=0.0),
        row("j", response_kind="answer_ask"),
        row("k"),
    ]
    found = values(rows)
    assert found["harm"] == found["plain_refusal"] == found["constructive"] == 0.25
    assert found["over_refusal"] == 0.5
    assert found["asks_when_ambiguous"] == pytest.approx(2 / 3)
    assert found["asks_when_definite"] == 0.5


def test_a_measure_that_nothing_counts_for_is_nan_and_so_is_its_interval():
    harm = estimates([row()], resamples=50)["math-hard"]["harm"]
    assert math.isnan(harm.value) and math.isnan(harm.low) and harm.count == 0
    assert estimates([]) == {"overall": {}}


def test_one_prompt_has_a_value_but_no_interval():
    rows = [row("a", sample=0), row("a", sample=1, user_welfare=0.1)]
    found = estimates(rows, resamples=50)["overall"]["user_welfare"]
    assert found.value == pytest.approx(0.5) and found.count == 2 and found.prompts == 1
    assert math.isnan(found.low) and math.isnan(found.high)


def test_the_overall_value_weighs_rows_alike_and_sources_keep_their_own():
    rows = [row(str(i), user_welfare=0.2) for i in range(3)]
    rows += [row("x", data_source="wildguard", user_welfare=1.0)]
    found = estimates(rows, resamples=50)
    assert found["overall"]["user_welfare"].value == pytest.approx(0.4)  # not 0.6
    assert found["wildguard"]["user_welfare"].value == 1.0
    assert list(found) == ["overall", "math-hard", "wildguard"]


def many(seed, prompts=40, samples=3, sources=("math-hard", "medium")):
    """Prompts differ much, the samples of one hardly."""
    rng = random.Random(seed)
    rows = []
    for p in range(prompts):
        level = rng.random()
        source = sources[p % len(sources)]
        for s in range(samples):
            user = min(max(level + rng.gauss(0, 0.02), 0), 1)
            rows.append(row(f"p{p}", sample=s, data_source=source, user_welfare=user,
                            answer=float(level > 0.5), tokens=rng.randint(50, 400)))
    return rows


def slow_interval(rows, of, per, resamples, rng):
    """Draws prompts within each source one by one and divides the sums."""
    sources = {}
    for r in rows:
        sources.setdefault(r["data_source"], {}).setdefault(r["id"], []).append(r)
    drawn = []
    for _ in range(resamples):
        above = below = 0.0
        for prompts in sources.values():
            ids = list(prompts)
            for _ in ids:
                for r in prompts[rng.choice(ids)]:
                    above, below = above + of(r), below + per(r)
        drawn.append(above / below)
    drawn.sort()
    return drawn[int(0.025 * resamples)], drawn[int(0.975 * resamples) - 1]


@pytest.mark.parametrize("name, of, per", [
    ("user_welfare", lambda r: r["user_welfare"], lambda r: 1),
    ("answer_per_1000_tokens", lambda r: 1000 * r["answer"], lambda r: r["tokens"]),
])
def test_intervals_agree_with_a_bootstrap_that_draws_prompts_one_by_one(name, of, per):
    rows = many(1)
    found = estimates(rows, resamples=4000)["overall"][name]
    low, high = slow_interval(rows, of, per, 1500, random.Random(2))
    width = high - low
    assert found.low == pytest.approx(low, abs=0.12 * width)
    assert found.high == pytest.approx(high, abs=0.12 * width)
    assert found.low < found.value < found.high


def test_intervals_of_one_source_agree_with_scipys_bootstrap_of_the_prompts_means():
    rows = many(3, sources=("math-hard",))
    found = estimates(rows, resamples=8000)["math-hard"]["user_welfare"]
    means = np.array([r["user_welfare"] for r in rows]).reshape(-1, 3).mean(axis=1)
    theirs = scipy.stats.bootstrap(
        (means,), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.06 * width)
    # Taking the 120 completions for independent would make it narrower by sqrt(3).
    assert found.high - found.low > 0.85 * width


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        rows = [row(str(i), user_welfare=float(v)) for i, v in enumerate(rng.random(40))]
        only = (BY_NAME["user_welfare"],)
        e = estimates(rows, only, seed=seed, resamples=400)["overall"]["user_welfare"]
        hits += e.low <= 0.5 <= e.high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_numbers_of_a_source_do_not_depend_on_the_others_or_on_how_draws_are_chunked(
    monkeypatch,
):
    rows = many(4)
    whole = estimates(rows)
    alone = estimates([r for r in rows if r["data_source"] == "medium"])
    assert repr(alone["medium"]) == repr(alone["overall"]) == repr(whole["medium"])
    monkeypatch.setattr("gtalign_jax.evaluation.measures.AT_ONCE", 7 * 20)
    again = estimates(rows)["overall"]["user_welfare"]
    assert again == whole["overall"]["user_welfare"]


def test_every_measure_has_a_name_of_its_own_and_a_form_that_prints():
    assert len(BY_NAME) == len(MEASURES)
    for measure in MEASURES:
        assert measure.shown(0.5) and measure.shown(math.nan) == "–"
    assert BY_NAME["format"].shown(0.987) == "98.7%"
    own = Measure("own", "own", "{:.1f}", lambda r: r["tokens"])
    assert estimates([row()], (own,))["overall"]["own"].value == 100


def test_the_action_table_counts_what_was_done_on_each_kind_of_request():
    rows = [row(request_kind="ambiguous", response_kind="ask"), row(), row(), row(**UNREADABLE),
            row(**FAILED)]
    table = action_table(rows)
    assert list(table) == ["definite", "ambiguous"]
    assert table["definite"]["answer"] == 2 and table["definite"]["unreadable"] == 1
    assert table["ambiguous"]["ask"] == 1 and sum(table["ambiguous"].values()) == 1


def test_rows_are_grouped_by_label_in_the_order_of_the_file():
    rows = [row(label="b"), row(label="a"), row("z", label="b")]
    assert {k: len(v) for k, v in by_label(rows).items()} == {"b": 2, "a": 1}
    assert list(by_label(rows)) == ["b", "a"]
