"""The reward of a batch: a row by hand, who is asked, what is missing, and what is compiled."""

import math

import numpy as np
import pytest

from gtalign_jax.data.prompt import Prompt
from gtalign_jax.game.chain import KEYS, render
from gtalign_jax.reward import scoring
from gtalign_jax.reward.factors import (
    LLMWeights,
    consistency_by_solver,
    length_window,
    matrix_quality,
)
from gtalign_jax.reward.judges import Judgement
from gtalign_jax.reward.scoring import RewardConfig, score

# (LLM, user) by key: VQ_DA dominates none but VQ_AQ; the Pareto set is {DQ_DA, DQ_CQ}.
CELLS = {
    "VQ_DA": (1, 1), "VQ_CQ": (0, 2), "VQ_AQ": (1, 0), "DQ_DA": (3, 2), "DQ_CQ": (2, 4),
    "DQ_AQ": (1, 1.05),
}  # fmt: skip
MATRIX = {key: {"LLM": a, "user": b} for key, (a, b) in CELLS.items()}
TEXT = render("a b", MATRIX, "Take DQ_CQ.", "one two three")


def prompt(source="ambig_qa", truth="singleAnswer###x"):
    return Prompt("p", source, (), truth, "what?")


class Recorder:
    """A judge that notes what it is asked and answers from a function of the request."""

    def __init__(self, answer=lambda request: Judgement(1.0)):
        self.asked, self.calls, self.answer = [], 0, answer

    def __call__(self, requests):
        self.calls += 1
        self.asked += requests
        return [self.answer(request) for request in requests]


@pytest.mark.parametrize("options", [{}, {"welfare": "ces", "rho": 0.3}, {"welfare": "linear"}],
                         ids=str)
def test_equal_factors_give_rewards_that_are_equal_to_the_last_bit(options):
    """Wherever in a batch they stand, and among whom: otherwise rounding would be a signal."""
    other = render("c " * 30, MATRIX, "Take DQ_AQ.", "four")
    texts = [other if b % 3 == 1 else TEXT for b in range(61)]
    found = score([prompt()] * 61, texts, Recorder(), RewardConfig(**options))
    same = [b for b, text in enumerate(texts) if text == TEXT]
    assert len(set(found.reward_B[same].tolist())) == 1
    assert len(set(found.reward_B.tolist())) == 2


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def window(n, low, high):
    return sigmoid(0.005 * (n - low)) * sigmoid(0.005 * (high - n))


def test_a_row_by_hand():
    found = score([prompt()], [TEXT], Recorder(), RewardConfig())
    prefix, words = len(TEXT[: TEXT.index("<response>")]), len(TEXT.split())
    # Different: all but VQ_DA (5). Clearly: VQ_CQ, VQ_AQ, DQ_DA (1/3), DQ_CQ (1/2), not DQ_AQ
    # (0.05 / 1.05): 4. Together 9 of 12.
    user = 1e-4 + 0.5 + 0.2 * window(3, 20, 500) + 0.3 * math.exp(-prefix / 500)
    llm = 1e-4 + 0.4 + 0.2 + 0.2 * 9 / 12 + 0.2 * window(words, 500, 1000)
    assert found.user_welfare_B[0] == pytest.approx(user, abs=1e-12)
    assert found.llm_welfare_B[0] == pytest.approx(llm, abs=1e-12)
    assert found.reward_B[0] == pytest.approx(math.sqrt(user * llm), abs=1e-12)
    assert found.factors["matrix_quality"][0] == 0.75
    assert found.valid_B[0] and found.parsed_B[0]
    assert found.pareto == [("DQ_DA", "DQ_CQ")]
    assert found.game["recommended"][0] == KEYS.index("DQ_CQ")
    assert found.game["nash_count"][0] == 1  # DQ_DA: best for the LLM in DQ, for the user in DA
    assert found.game["dilemma"][0] == 0 and found.game["price_of_anarchy"][0] == 6 / 5
    assert found.payoff_BUAP[0, 1, 1].tolist() == [2, 4]


@pytest.mark.parametrize("kind", ["solver", "judge"])
def test_consistency_moves_weight_from_quality_and_verbosity(kind):
    judge = Recorder(lambda r: Judgement(0.5 if r.kind == "consistency" else 1.0))
    found = score([prompt()], [TEXT], judge, RewardConfig(consistency=kind))
    level = 0.5 if kind == "judge" else 1.0
    verbosity = window(len(TEXT.split()), 500, 1000)
    llm = 1e-4 + 0.35 + 0.2 + 0.2 * 0.75 + 0.2 * level + 0.05 * verbosity
    assert found.llm_welfare_B[0] == pytest.approx(llm, abs=1e-12)
    assert found.factors["consistency"][0] == level
    kinds = ["quality", "consistency"] if kind == "judge" else ["quality"]
    assert [r.kind for r in judge.asked] == kinds and judge.calls == 1
    assert judge.asked[-1].pareto == ("DQ_DA", "DQ_CQ")
    assert judge.asked[-1].analyze == "Take DQ_CQ."


def test_nobody_is_asked_about_what_earns_nothing():
    texts = [
        TEXT, "plain text", TEXT.replace("</response>", ""), TEXT.replace("VQ_DA", "VQ_XX"),
        TEXT.replace("<analyze>Take DQ_CQ.</analyze>", ""),
    ]  # fmt: skip
    judge = Recorder()
    found = score([prompt()] * 5, texts, judge, RewardConfig())
    assert len(judge.asked) == 2
    np.testing.assert_array_equal(found.reward_B > 0, [True, False, False, False, True])
    assert found.valid_B.all()
    np.testing.assert_array_equal(found.parsed_B, [True, False, True, False, True])
    assert found.judgements[1] is None and found.judgements[4] is not None
    for values in (found.user_welfare_B, found.llm_welfare_B, *found.factors.values()):
        assert (values[1:4] == 0).all()
    assert np.isnan(found.game["dilemma"][[1, 3]]).all()
    judge = Recorder()
    found = score([prompt()] * 5, texts, judge, RewardConfig(consistency="solver"))
    assert len(judge.asked) == 1 and found.reward_B[4] == 0 and found.valid_B[4]


@pytest.mark.parametrize("failing", ["quality", "consistency"])
def test_a_failed_judge_makes_the_row_missing_and_not_zero(failing):
    judge = Recorder(
        lambda r: Judgement(None, "", "down") if r.kind == failing else Judgement(1.0)
    )
    found = score([prompt(), prompt()], [TEXT, "x"], judge, RewardConfig(consistency="judge"))
    np.testing.assert_array_equal(found.valid_B, [False, True])
    assert all(np.isfinite(value).all() for value in found.factors.values())


def test_given_scores_are_not_asked_for_and_are_clipped():
    judge = Recorder()
    found = score(
        [prompt(), prompt("math-hard", "3"), prompt("medium", "abcdefgh")],
        [TEXT] * 3, judge, RewardConfig(), given=[{"quality": 7}, {"quality": 0}, {"quality": 3}],
    )  # fmt: skip
    assert not judge.asked
    np.testing.assert_array_equal(found.factors["q_llm"], [1.0, 0.0, 0.75])
    assert found.judgements[0] == Judgement(7.0, "given")


@pytest.mark.slow
def test_mathematics_is_settled_by_algebra_or_by_the_judge_as_configured():
    right = render("t", MATRIX, "Take DQ_CQ.", "It is \\boxed{6/2}")
    rows = [prompt("math-hard", "3"), prompt("minerva", "4"), prompt("ambig_qa")]
    judge = Recorder(lambda r: Judgement(0.0))
    found = score(rows, [right] * 3, judge, RewardConfig())
    np.testing.assert_array_equal(found.factors["q_user"], [1.0, 0.0, 0.0])
    assert [r.data_source for r in judge.asked] == ["ambig_qa"]
    judge = Recorder()
    found = score(rows, [right] * 3, judge, RewardConfig(math="judge"))
    np.testing.assert_array_equal(found.factors["q_user"], [1.0, 1.0, 1.0])
    assert len(judge.asked) == 3


def test_padding_changes_nothing_and_sizes_share_a_compilation():
    texts = [TEXT, "x", TEXT.replace("one", "one one"), TEXT.replace("3", "2"), TEXT]
    cfg = RewardConfig(slope=0.0051)  # a config of its own, so that its cache starts empty
    alone = [score([prompt()], [text], Recorder(), cfg).reward_B[0] for text in texts]
    before = scoring._reward._cache_size()
    for count in (5, 6, 7, 8):
        rows = (texts * 2)[:count]
        found = score([prompt()] * count, rows, Recorder(), cfg)
        np.testing.assert_array_equal(found.reward_B, (alone * 2)[:count])
        assert found.reward_B.shape == (count,) and found.payoff_BUAP.shape == (count, 2, 3, 2)
    assert scoring._reward._cache_size() == before + 1


def test_an_empty_batch_is_a_batch():
    found = score([], [], Recorder(), RewardConfig())
    assert found.reward_B.shape == (0,) and found.chains == []


def test_extreme_matrices_give_finite_rewards():
    huge = render("t", {key: {"LLM": 1e308, "user": -1e308} for key in KEYS}, "a", "r")
    tiny = render("t", {key: {"LLM": 1e-300, "user": 0} for key in KEYS}, "a", "r")
    found = score([prompt()] * 2, [huge, tiny], Recorder(), RewardConfig())
    assert np.isfinite(found.reward_B).all() and (found.reward_B > 0).all()
    np.testing.assert_array_equal(found.factors["matrix_quality"], [1.0, 0.5])


def test_the_ten_percent_mark_is_met_in_float64():
    # |0.9 - 1| = 0.09999999999999998 is no clear difference; in float32 it is 0.100000024.
    text = render("t", {key: {"LLM": 1.0, "user": 0.9} for key in KEYS}, "a", "r")
    found = score([prompt()], [text], Recorder(), RewardConfig())
    assert found.factors["matrix_quality"][0] == 0.5


def test_factors_are_plain_functions_of_arrays():
    np.testing.assert_allclose(
        length_window(np.array([0.0, 20.0, 250.0]), 20, 500, 0.005),
        [window(0, 20, 500), window(20, 20, 500), window(250, 20, 500)], rtol=1e-6,
    )  # fmt: skip
    assert float(matrix_quality(np.zeros((2, 3, 2)))) == 0.0


@pytest.mark.parametrize(
    ("analyze", "level"),
    [
        ("DQ_CQ is best", 1.0),
        ("Best: CQ", 1.0),
        ("I will ask a clarifying question.", 1.0),
        ("DQ_CQ looks good, yet I choose VQ_AQ", 0.5),
        ("VQ_CQ", 0.0),  # this cell is dominated, though its action is not
        ("AQ", 0.0),
        ("an answer and a follow-up question", 0.0),
        ("nothing named; SQUARE, AQUA", 0.0),
        ("", 0.0),
        ("VQ_DA or AQ? No: a direct answer", 1.0),
    ],
)
def test_the_solver_judges_the_last_choice_that_is_named(analyze, level):
    assert consistency_by_solver(analyze, ("DQ_DA", "DQ_CQ")) == level


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"welfare": "nash"}, "reward.welfare='nash'; allowed: cobb_douglas, linear"),
        ({"consistency": "yes"}, "reward.consistency='yes'; allowed: none, solver, judge"),
        ({"math": "sympy"}, "reward.math='sympy'"),
        ({"rho": math.nan}, "reward.rho is NaN"),
        ({"latency_chars": 0.0}, "must be positive"),
        ({"reasoning": "tags"}, "reward.reasoning='tags'; allowed: tagged, none"),
        ({"reasoning": "none", "consistency": "solver"},
         "reward.consistency='solver' with reward.reasoning='none'"),
    ],
)
def test_configs_without_a_meaning_are_refused(fields, reason):
    with pytest.raises(ValueError, match=reason):
        RewardConfig(**fields)


def test_weights_are_config():
    cfg = RewardConfig(welfare="llm", llm=LLMWeights(1.0, 0.0, 0.0, 0.0, 0.0), floor=0.0)
    assert score([prompt()], [TEXT], Recorder(), cfg).reward_B[0] == 1.0


def test_rows_that_do_not_match_and_unknown_sources_are_refused():
    with pytest.raises(ValueError, match="1 prompts, 2 texts"):
        score([prompt()], [TEXT] * 2, Recorder(), RewardConfig())
    with pytest.raises(ValueError, match="'nope' is unknown"):
        score([prompt("nope")], [TEXT], Recorder(), RewardConfig())


def test_without_blocks_the_whole_completion_is_the_response_and_tags_earn_nothing():
    judge, cfg = Recorder(), RewardConfig(reasoning="none")
    found = score([prompt()] * 3, ["\n one two three ", " \n", TEXT], judge, cfg)
    assert [request.response for request in judge.asked] == ["one two three", TEXT]
    user = 1e-4 + 0.5 + 0.2 * window(3, 20, 500) + 0.3  # nothing to wait for: exp(0)
    llm = 1e-4 + 0.4 + 0.2 * window(3, 500, 1000)  # no format, no matrix, the same weights
    assert found.user_welfare_B[0] == pytest.approx(user, abs=1e-12)
    assert found.llm_welfare_B[0] == pytest.approx(llm, abs=1e-12)
    assert found.reward_B[0] == pytest.approx(math.sqrt(user * llm), abs=1e-12)
    assert found.reward_B[1] == found.user_welfare_B[1] == found.llm_welfare_B[1] == 0.0
    for name in ("format", "matrix_quality", "consistency"):
        assert found.factors[name].tolist() == [0.0] * 3
    assert found.valid_B.all() and not found.parsed_B.any() and found.pareto == [()] * 3
    assert np.isnan(found.game["recommended"]).all()
