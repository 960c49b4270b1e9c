"""From tokens to scored text, and what is logged about it."""

import dataclasses
import types

import numpy as np
import pytest
import runs

from gtalign_jax.data.prompt import Prompt
from gtalign_jax.game.chain import render
from gtalign_jax.pod import share
from gtalign_jax.reward.judges import JudgeError, Judgement
from gtalign_jax.reward.scoring import RewardConfig
from gtalign_jax.rollout.sampler import Rollout
from gtalign_jax.training import collect
from gtalign_jax.training.collect import Collector, log_rows, summarise

PROMPTS = [
    Prompt("a", "builtin-ambiguity", ({"role": "user", "content": "What sound does it make?"},),
           "ambiguous", "What sound does it make?", {"kind": "ambiguous"}),
    Prompt("b", "math-hard", ({"role": "user", "content": "1 + 1?"},), "2", "1 + 1?"),
]
GOOD = render("Vague.", runs.PAYOFF, "VQ_CQ", "Which animal do you mean?")
RIGHT = render("Clear.", runs.PAYOFF, "DQ_DA", "It is $2$.")
TEXTS = {(1, 2): GOOD, (3,): "no chain", (4, 5, 6): RIGHT, (7, 0): RIGHT.replace("$2$", "$3$")}


@pytest.fixture
def experience(monkeypatch):
    """Two prompts x two samples; rows of 2, 1, 3 and 2 tokens, the last one down at the judge.

    A response of n words has n - 2 tokens when it is written anew.
    """
    monkeypatch.setattr(collect, "encode_completion", lambda tokenizer, text: text.split()[2:])
    monkeypatch.setattr(collect, "decode", lambda tokenizer, ids: TEXTS[tuple(map(int, ids))])

    def judge(requests):
        return [Judgement(None, "", "503") if "3" in r.response else Judgement(1.0, "fine")
                for r in requests]

    collector = Collector(sample=None, tokenizer=None, judge=judge,
                          reward=RewardConfig(math="judge"), layout=None, filters=None)
    rollout = Rollout(
        tokens_QGT=np.array([[[1, 2, 9], [3, 9, 9]], [[4, 5, 6], [7, 0, 9]]]),
        logp_QGT=np.array([[[-1.0, -2, 0], [-4.0, 0, 0]], [[-1.0, -1, -1], [-2.0, -3, 0]]]),
        lengths_QG=np.array([[2, 1], [3, 2]]),
        stopped_QG=np.array([[True, True], [False, True]]),
        slots=np.array(12),
    )
    return collector.assess(types.SimpleNamespace(prompts=tuple(PROMPTS)), np.arange(2), rollout)


def test_a_process_without_rows_of_its_own_adds_nothing_to_the_whole(experience, monkeypatch):
    """Where an axis that cuts no batch crosses processes, only one of them owns the prompts."""
    def judge(requests):
        assert not requests  # there is nothing to ask about
        return []

    collector = Collector(None, None, judge, RewardConfig(math="judge"), None, None)
    nothing = Rollout(np.zeros((0, 2, 3), int), np.zeros((0, 2, 3)), np.zeros((0, 2), int),
                      np.zeros((0, 2), bool), np.array(12))
    batch = types.SimpleNamespace(prompts=tuple(PROMPTS))
    empty = collector.assess(batch, np.arange(0), nothing)
    whole = share.in_order([(part.rows_B, part) for part in (experience, empty)])
    assert log_rows(whole) == log_rows(experience)
    assert summarise(whole) == summarise(experience)


def test_texts_are_the_tokens_up_to_each_length_in_the_order_of_prompts(experience):
    """The last row ends with token 0, which is no padding: its length says so."""
    assert experience.texts == (GOOD, "no chain", RIGHT, RIGHT.replace("$2$", "$3$"))
    assert [p.id for p in experience.prompts] == ["a", "a", "b", "b"]


def test_a_response_is_right_where_it_is_of_a_kind_that_its_prompt_calls_for(experience):
    """A question is right where the request is ambiguous, an answer where it is definite."""
    assert experience.right_B == (True, False, True, True)


def test_means_run_over_the_judged_rows_alone(experience):
    out = summarise(experience)
    reward = experience.scores.reward_B
    assert experience.scores.valid_B.tolist() == [True, True, True, False]
    assert reward[0] > 0.3 and reward[1] == 0 and reward[2] > 0.3
    assert out["reward/total"] == pytest.approx((reward[0] + 0 + reward[2]) / 3)
    assert out["reward/missing"] == 0.25
    assert out["reward/format"] == pytest.approx(2 / 3)
    assert out["reward/parsed"] == pytest.approx(2 / 3)
    assert out["source/builtin-ambiguity"] == pytest.approx(reward[0] / 2)
    assert out["source/math-hard"] == pytest.approx(reward[2])  # not half of it
    assert out["reward/right_action"] == pytest.approx(2 / 3)  # judged rows, as the reward


def test_completions_without_a_score_are_mentioned_with_a_reason(experience, caplog):
    collect._mention_missing(experience.scores)
    assert "1 of 4 completions have no score" in caplog.text and "503" in caplog.text
    caplog.clear()
    experience.scores.valid_B[:] = True
    collect._mention_missing(experience.scores)
    assert not caplog.messages


def test_lengths_truncation_and_waste_are_those_counted_by_hand(experience):
    out = summarise(experience)
    assert out["rollout/length"] == 2.0 and out["rollout/length_max"] == 3
    assert out["rollout/truncated"] == 0.25
    assert out["rollout/wasted_slots"] == pytest.approx(1 - 8 / 12)  # 3 iterations x 4 rows
    assert out["rollout/response_words"] == pytest.approx((5 + 3) / 2)
    # "Which animal do you mean?" would be 3 tokens, but its whole completion has 2; none; 1.
    assert out["rollout/response_tokens"] == pytest.approx((2 + 0 + 1) / 3)


def test_the_kinds_of_response_are_shares_of_the_judged_rows(experience):
    out = summarise(experience)
    shares = {name: value for name, value in out.items() if name.startswith("action/")}
    assert shares == pytest.approx({
        "action/ask": 1 / 3, "action/answer": 1 / 3, "action/answer_ask": 0, "action/refuse": 0,
        "action/constructive": 0, "action/none": 0,
    })  # the row without a chain makes no move at all


def test_a_mean_over_nothing_is_left_out_and_never_nan(experience):
    experience.scores.valid_B[:] = False
    out = summarise(experience)
    assert out["reward/missing"] == 1.0
    assert "reward/total" not in out and "welfare/user" not in out
    assert all(np.isfinite(value) for value in out.values())


def test_an_undefined_price_of_anarchy_takes_no_other_with_it(experience):
    """A matrix without a pure equilibrium has none; the mean is over the others that count."""
    experience.scores.game["price_of_anarchy"][:] = [1.5, np.nan, np.nan, 9.0]
    assert summarise(experience)["game/price_of_anarchy"] == 1.5  # the last row was not judged


def test_the_log_says_why_a_judge_of_consistency_left_a_row_out(experience):
    said = [Judgement(None, "", "no answer"), None, Judgement(0.5, "Half of it."), None]
    scores = dataclasses.replace(experience.scores, consistency_judgements=said)
    rows = log_rows(dataclasses.replace(experience, scores=scores))
    assert [row["consistency_error"] for row in rows] == ["no answer", None, None, None]
    assert [row["consistency_reply"] for row in rows] == ["", None, "Half of it.", None]


def test_the_log_has_a_row_for_each_completion_with_the_judges_words(experience):
    rows = log_rows(experience)
    assert [(row["id"], row["sample"]) for row in rows] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [row["tokens"] for row in rows] == [2, 1, 3, 2]
    assert [row["logp"] for row in rows] == [-3.0, -4.0, -3.0, -5.0]
    assert [row["stopped"] for row in rows] == [True, True, False, True]
    assert rows[0]["judge_score"] == 1.0 and rows[0]["judge_reply"] == "fine"
    assert rows[0]["payoff"] == runs.PAYOFF and rows[0]["chain_error"] is None
    assert rows[1]["payoff"] is None and rows[1]["chain_error"]
    assert rows[1]["judge_score"] is None and rows[1]["judge_error"] is None  # nobody was asked
    assert rows[3]["valid"] is False and rows[3]["judge_error"] == "503"
    assert [(row["reasoning_tokens"], row["response_tokens"]) for row in rows[:3]] == [
        (0, 2), (1, 0), (2, 1)
    ]
    assert [row["response_words"] for row in rows[:3]] == [5, 0, 3]
    assert [row["request_kind"] for row in rows] == ["ambiguous"] * 2 + ["definite"] * 2
    assert [row["response_kind"] for row in rows] == ["ask", None, "answer", "answer"]
    # The last cell of runs.PAYOFF is best for both players: the whole Pareto set, and played.
    assert rows[0]["pareto_set"] == ["DQ_AQ"] and rows[0]["recommended"] == "DQ_AQ"
    assert rows[0]["dilemma"] == 0 and rows[0]["price_of_anarchy"] == 1
    game = ("pareto_set", "recommended", "dilemma", "nash_count", "price_of_anarchy")
    assert [rows[1][name] for name in game] == [None] * 5
    assert rows[2]["completion"] == RIGHT and rows[2]["prompt"][0]["content"] == "1 + 1?"


def verdict_of(*problems):
    """Of (source, problem) for each row."""
    nothing = np.zeros(len(problems))
    sources, told = zip(*problems, strict=True)
    return collect.Verdict(nothing, nothing, nothing, nothing, None, told, sources)


def test_a_source_whose_judge_is_down_is_not_made_up_for_by_another():
    algebra, dead = [("math-hard", "")] * 60, [("medium", "connection: refused")] * 40
    with pytest.raises(JudgeError, match="40 of 40 completions of medium .*; 40 of them by conn"):
        verdict_of(*algebra, *dead).check(0.5)
    with pytest.raises(JudgeError, match="40 of 60 completions could not"):
        verdict_of(*algebra[:20], *dead).check(0.5)
    verdict_of(*algebra, *dead[:7]).check(0.5)  # too few to be a sign
    verdict_of(*algebra, *dead[:20], *[("medium", "")] * 20, ("medium", None)).check(0.5)
