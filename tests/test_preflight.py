"""What a run asks of its judge before anything is compiled."""

import jax.numpy as jnp
import pytest
import real
import runs

from gtalign_jax import judging
from gtalign_jax.model.sharding import ROLLOUT, Layout, MeshConfig, make_mesh
from gtalign_jax.reward import preflight, tasks
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import JudgeError, Judgement, read_verdict, scale_of

HTTP = {"judge__kind": "http", "judge__rules": False, "judge__model": "m",
        "judge__timeout_s": 5.0, "judge__retries": 0}
SOURCES = ("builtin-ambiguity", "builtin-writing")


def open_judge(config, sources):
    layout = Layout(make_mesh(MeshConfig()), ROLLOUT)
    return judging.open_judge(config, sources, layout, jnp.float32)


def cfg(**fields):
    return JudgeConfig(kind="http", base_url="http://a/v1,http://b/v1", model="m", **fields)


@pytest.mark.parametrize(("models", "reason"), [
    ({"a": ["m", "n"], "b": ["m"]}, None),
    ({"a": ["m"], "b": "APIConnectionError: gone"}, None),
    ({"a": "APIConnectionError: gone", "b": "no answer within 5 s"}, "nobody answers"),
    ({"a": ["other", "n"], "b": ["m"]}, "judge.model='m' is not at a; it has: other, n"),
    ({"a": [], "b": "HTTP 404: no such path"}, None),  # no list, but somebody
])
def test_a_wrong_address_or_model_is_found_in_the_lists_of_models(models, reason):
    problem = preflight.check_models(cfg(), models)
    assert problem is None if reason is None else reason in problem


def test_every_task_that_a_model_judges_has_a_golden_sample_that_fits_its_prompt():
    for task in tasks.TASKS.values():
        (request,) = preflight.golden([task], False)
        assert request.response and request.question and scale_of(request) == (task.scale,
                                                                               task.grades)


def test_the_judge_may_be_weak_but_must_be_understood(caplog):
    requests = preflight.golden([tasks.TASKS["medium"]], consistency=True)
    assert [request.kind for request in requests] == ["quality", "consistency"]
    good = [Judgement(4.0), Judgement(1.0)]
    assert preflight.check_golden(requests, good) is None and not caplog.text
    assert preflight.check_golden(requests, [Judgement(1.0, "meh"), good[1]]) is None
    assert "gives the golden sample of 'medium'" in caplog.text and "1 of 4" in caplog.text
    babble = read_verdict("lorem ipsum", *scale_of(requests[1]))
    problem = preflight.check_golden(requests, [good[0], babble])
    assert "'consistency' got no grade (unparsable" in problem and "lorem ipsum" in problem


def test_it_gives_up_sooner_than_a_run_would():
    patient = preflight.patience(cfg(timeout_s=300.0, retries=9))
    assert patient.timeout_s == 30 and patient.deadline_s == 60
    assert preflight.patience(cfg(timeout_s=1.0)).timeout_s == 1


def test_a_judge_that_answers_is_worked_with_and_its_golden_grades_are_asked_once(tmp_path):
    with real.serving() as server:
        config = runs.config(tmp_path, **HTTP, judge__base_url=server.url)
        judge = open_judge(config, SOURCES)
        assert len(server.asked) == 2  # one for each source
        requests = preflight.golden([tasks.TASKS[s] for s in SOURCES], False)
        assert all(j.score is not None and not j.stored for j in judge(requests))
        asked = len(server.asked)
        assert all(j.stored for j in open_judge(config, ())(requests))
        assert len(server.asked) == asked
    replay = runs.config(tmp_path, **HTTP, judge__base_url="http://127.0.0.1:9/v1",
                         judge__mode="replay")
    assert all(j.stored for j in open_judge(replay, SOURCES)(requests))


@pytest.mark.parametrize("preflight_on", [True, False])
def test_a_judge_that_is_not_there_ends_it_at_once_unless_it_is_not_to_be_tried(
    tmp_path, preflight_on
):
    config = runs.config(tmp_path, **HTTP, judge__base_url="http://127.0.0.1:9/v1",
                         judge__preflight=preflight_on)
    if preflight_on:
        with pytest.raises(JudgeError, match=r"judge.base_url: nobody answers \(http://127"):
            open_judge(config, SOURCES)
    else:
        assert callable(open_judge(config, SOURCES))


def test_a_judge_that_is_not_needed_is_not_asked(tmp_path):
    settings = HTTP | {"judge__rules": True, "judge__base_url": "http://127.0.0.1:9/v1"}
    assert callable(open_judge(runs.config(tmp_path, **settings), SOURCES))
