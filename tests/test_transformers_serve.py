"""A real server that none of us wrote, as the judge: its nonsense is missing, never a score."""

import collections
import contextlib
import importlib.util
import os

import foreign
import jax.numpy as jnp
import pytest
import runs
from judging import request

from gtalign_jax import judging
from gtalign_jax.model.sharding import ROLLOUT, Layout, MeshConfig, make_mesh
from gtalign_jax.reward.http_judge import HttpJudge
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import JudgeError, JudgeRequest

pytestmark = [pytest.mark.slow, pytest.mark.hf]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if importlib.util.find_spec("accelerate") is None and not os.environ.get("CI"):
        pytest.skip("transformers serve needs accelerate (requirements-test.txt)")
    with foreign.serving(tmp_path_factory.mktemp("foreign")) as running:
        yield running


def client(server, **fields):
    usual = {"base_url": server.url, "model": server.model, "timeout_s": 120.0, "retries": 1,
             "concurrency": 4, "max_tokens": 8, "temperature": 1.0}
    return contextlib.closing(HttpJudge(JudgeConfig(kind="http", **(usual | fields))))


def test_its_nonsense_is_missing_by_cause(server):
    wanted = [
        *[request(f"an answer, number {i}") for i in range(8)],
        request("a safer way", "wildguard", ground_truth="harmful"),
        request("Once upon a time", "medium"),
        JudgeRequest("consistency", "medium", "q", "t", "r", "I take DQ_CQ", ("DQ_CQ",)),
    ]
    with client(server) as ask:
        found = ask(wanted)
    assert [j.score for j in found] == [None] * len(wanted)
    causes = collections.Counter(j.cause for j in found)
    assert set(causes) <= {"unparsable", "truncated"} and causes["unparsable"], causes
    assert {j.attempts for j in found} == {2}, "each was asked again"
    assert any(j.reply for j in found), "it did say something"
    assert "judge.max_tokens=8" in "".join(j.error for j in found if j.cause == "truncated")


def test_it_lists_its_model(server):
    with client(server) as ask:
        assert ask.models() == {server.url: [server.model]}


def test_a_reply_that_is_cut_at_its_first_token_is_truncated(server):
    with client(server, max_tokens=1, retries=0) as ask:
        assert [j.cause for j in ask([request("x")])] == ["truncated"]


def test_a_model_that_it_does_not_have_is_missing(server):
    with client(server, model="tests/nobody", retries=0) as ask:
        (found,) = ask([request("x")])
    assert found.score is None and found.cause in ("rejected", "server")
    assert "HTTP" in found.error


def test_what_it_does_not_know_it_refuses_and_that_is_not_asked_again(server):
    with client(server, extra_body='{"cache_prompt": true}') as ask:  # a field of llama.cpp's
        (found,) = ask([request("x")])
    assert (found.score, found.cause, found.attempts) == (None, "rejected", 1)
    assert "HTTP 422" in found.error


def test_the_pre_flight_of_a_run_says_that_it_is_no_judge(server, tmp_path):
    config = runs.config(tmp_path, judge__kind="http", judge__rules=False, judge__max_tokens=8,
                         judge__base_url=server.url, judge__model=server.model)
    layout = Layout(make_mesh(MeshConfig()), ROLLOUT)
    with pytest.raises(JudgeError, match="golden sample of 'builtin-writing' got no grade"):
        judging.open_judge(config, ("builtin-writing",), layout, jnp.float32)
