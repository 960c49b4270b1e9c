"""Sampling one step ahead of the updates, and judging beside both."""

import pytest
import runs

from gtalign_jax import judging
from gtalign_jax import run as run_lib
from gtalign_jax.reward.judges import JudgeError, make_judge, missing
from gtalign_jax.training import collect, trainer
from gtalign_jax.training.checkpoint import Checkpointer
from gtalign_jax.training.grpo import GRPOConfig

SETTINGS = {"stages": ("sft", "grpo"), "grpo__truncated_is": 2.0, "grpo__steps": 4}


@pytest.fixture(autouse=True)
def fluent(monkeypatch):
    monkeypatch.setattr(collect, "decode", runs.fluent)


def run(workdir, **settings):
    run_lib.run(runs.config(workdir, **SETTINGS | settings))
    return (runs.repeatable(runs.metrics(workdir, "grpo")), runs.rows(workdir, "rollouts.jsonl"))


def test_with_a_policy_that_stands_still_it_equals_the_ordinary_run(tmp_path):
    ordinary, ahead = (run(tmp_path / str(n), grpo__ahead=n, grpo__learning_rate=1e-30)
                       for n in (0, 1))
    assert ahead == ordinary
    assert len(ahead[1]) == 4 * 8 * 2


def test_completions_are_one_update_old_and_weighted(tmp_path):
    ordinary, ahead = (run(tmp_path / str(n), grpo__ahead=n) for n in (0, 1))
    assert ahead[1][:16] == ordinary[1][:16]  # both begin with the policy of the cold start
    gaps = [row["rollout/logp_gap_max"] for row in ahead[0]]
    assert gaps[0] < 1e-4 < min(gaps[1:])
    assert all(row["rollout/logp_gap_max"] < 1e-4 for row in ordinary[0])


class PulledPlug(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_completions_that_were_waiting(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", grpo__ahead=1)
    save = Checkpointer.save

    def failing(self, step, *args):
        save(self, step, *args)
        if self.directory.endswith("grpo") and step == 2:
            self.wait()
            raise PulledPlug

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", failing)
        with pytest.raises(PulledPlug):
            run(tmp_path / "cut", grpo__ahead=1)
    sampled = []
    sample = trainer._Sampling._sample
    monkeypatch.setattr(
        trainer._Sampling, "_sample",
        lambda self, params, step: sampled.append(step) or sample(self, params, step),
    )
    assert run(tmp_path / "cut", grpo__ahead=1) == whole
    assert sampled == [3, 4]  # step 2's came with the checkpoint


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_is_prolonged_is_the_longer_run(tmp_path):
    whole = run(tmp_path / "whole", grpo__ahead=1)
    run(tmp_path / "cut", grpo__ahead=1, grpo__steps=2)
    assert run(tmp_path / "cut", grpo__ahead=1) == whole


@pytest.mark.parametrize(("settings", "reason"), [
    ({"ahead": 2, "truncated_is": 2.0}, "grpo.ahead=2: expected 0 or 1"),
    ({"ahead": 1}, "grpo.truncated_is=0: completions of the policy before an update need weights"),
])
def test_what_makes_no_sense_ahead_is_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        GRPOConfig(**settings)


def broken(share):
    """A judge that fails on that share of the requests."""
    def make(cfg, rules):
        honest = make_judge(cfg, rules)

        def judge(requests):
            return [missing("timeout", "no answer within 1 s") if i < share * len(requests) else j
                    for i, j in enumerate(honest(requests))]
        return judge
    return make


def test_a_judge_that_mostly_fails_ends_the_run_with_the_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "make_judge", broken(0.75))
    with pytest.raises(JudgeError) as ended:
        run(tmp_path)
    assert "judge.max_missing=0.5" in str(ended.value)
    assert "timeout: no answer within 1 s" in str(ended.value)
    assert not runs.metrics(tmp_path, "grpo")


def test_one_that_fails_now_and_then_is_counted_by_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "make_judge", broken(0.25))
    rows, logged = run(tmp_path, grpo__steps=1)
    failed = [row for row in logged if row["judge_cause"] is not None]
    judged = [row for row in logged if row["judge_reply"] is not None]
    assert failed and all(row["judge_score"] is None and not row["valid"] for row in failed)
    assert rows[0]["judge/missing_timeout"] == rows[0]["judge/missing"]
    assert rows[0]["judge/missing"] == pytest.approx(len(failed) / len(judged))
