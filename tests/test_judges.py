"""Judges: the verdict's grammar, the rules, and what a config may say."""

import re
import time

import pytest
from judging import asking, config, request, serving

from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judgement, JudgeRequest, make_judge, read_verdict
from gtalign_jax.reward.rules import RULES

UNIT, HALVES = (0.0, 1.0), (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("<verdict>1</verdict>", 1.0),
        ("thinking... <verdict> 0.5 </verdict>\n", 0.5),
        ("<verdict>0</verdict> no, wait: <verdict>1</verdict>", 1.0),
        ("<verdict>1</verdict> and then <verdict>maybe</verdict>", 1.0),
        ("<verdict>.5</verdict>", 0.5),
        ("<verdict>1.</verdict>", 1.0),
        ("<verdict>0.7</verdict>", None),
        ("<verdict>2</verdict>", None),
        ("<verdict>-1</verdict>", None),
        ("<verdict>1</verdict> <verdict>5</verdict>", None),
        ("<verdict>1/1</verdict>", None),
        ("<verdict>NaN</verdict>", None),
        ("verdict: 1", None),
        ("<think>0? <verdict>0</verdict></think><verdict>1</verdict>", 1.0),
        ("0? <verdict>0</verdict></think><verdict>1</verdict>", 1.0),
        ("<think><verdict>1</verdict></think>", None),
        (" <think><verdict>1</verdict>", None),
        ("", None),
        ("<verdict>" * 100_000, None),
        ("<verdict>" + " " * 500_000, None),
    ],
)
def test_the_last_well_formed_verdict_counts_if_it_is_on_the_scale(reply, score):
    started = time.process_time()
    found = read_verdict(reply, UNIT, HALVES)
    assert found.score == score and (found.error is None) == (score is not None)
    assert found.reply == reply
    assert time.process_time() - started < 0.5


def test_a_scale_without_fixed_grades_takes_every_number_on_it():
    assert read_verdict("<verdict>2.5</verdict>", (0.0, 4.0), ()).score == 2.5
    found = read_verdict("<verdict>4.5</verdict>", (0.0, 4.0), ())
    assert found.score is None and "off the scale (0 to 4)" in found.error


def test_the_rule_judge_knows_the_builtin_tasks_and_says_what_it_does_not_know():
    judge = make_judge(JudgeConfig(kind="rule"), {"builtin-x": lambda r: float(len(r.response))})
    right, unknown = judge([request("ab", "builtin-x"), request("ab")])
    assert right == Judgement(2.0, "rule")
    assert unknown.score is None and "no rule judges 'ambig_qa'" in unknown.error


def test_without_a_judge_model_the_solver_judges_consistency():
    judge = make_judge(JudgeConfig(kind="rule"), RULES)
    asked = JudgeRequest("consistency", "ambig_qa", "", "", "r", "So DQ_CQ.", ("DQ_CQ",))
    assert judge([asked]) == [Judgement(1.0, "solver")]


def test_no_judge_means_every_score_is_missing():
    judge = make_judge(JudgeConfig(kind="none"), RULES)
    assert [j.score for j in judge([request(), request(source="builtin-arithmetic")])] == [None] * 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kind": "openai"}, "judge.kind='openai'; allowed: rule, http, jax, none"),
        ({"kind": "http", "model": "m"}, "judge.base_url is empty"),
        ({"kind": "http", "base_url": "u"}, "judge.model is empty"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
    ],
)
def test_a_judge_that_cannot_work_is_refused_at_once(fields, reason):
    with pytest.raises(ValueError, match=reason):
        JudgeConfig(**fields)


def test_sources_with_a_rule_do_not_cost_a_call():
    with serving() as server, asking(server) as ask:
        judge = make_judge(config(server), RULES, ask)
        ruled, asked = judge([request("12", "builtin-arithmetic"), request("x")])
    assert ruled.reply == "rule" and asked.score == 1.0
    assert server.counts() == {"x": 1}


@pytest.mark.parametrize(("fields", "reason"), [
    ({"base_url": "user:pw123456@host/v1"}, "judge.base_url must be http"),
    ({"base_url": "http://host/v1?key=abc"}, "judge.base_url has a query"),
    ({"store": "gs://bucket/x"}, "judge.store='gs://bucket/x': allowed is a local directory"),
    ({"temperature": float("nan")}, "judge.temperature=nan must be >= 0"),
    ({"extra_body": "[1]"}, "is no JSON object"),
    ({"extra_body": '{"chat_template_kwargs": 3}'}, "chat_template_kwargs must be an object"),
])
def test_an_address_a_store_or_a_number_that_cannot_be_meant_is_refused(fields, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        JudgeConfig(**{"kind": "http", "base_url": "http://h/v1", "model": "m"} | fields)
    assert "pw123456" not in str(refused.value) and "abc" not in str(refused.value)


def test_grades_are_compared_as_they_are_shown():
    thirds = (0.0, 1 / 3, 1.0)
    assert read_verdict("<verdict>0.333333</verdict>", UNIT, thirds).score == 1 / 3
    assert read_verdict("<verdict>0.34</verdict>", UNIT, thirds).cause == "off_scale"


def test_a_verdict_in_thoughts_that_never_end_does_not_count():
    found = read_verdict("Okay. <think>maybe <verdict>1</verdict>", UNIT, UNIT)
    assert found.score is None and found.cause == "truncated"
    assert read_verdict("<think>0?</think><verdict>1</verdict>", UNIT, UNIT).score == 1.0
