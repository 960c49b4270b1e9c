"""A small run from end to end: what it logs, saves, repeats and refuses."""

import dataclasses
import functools
import json
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from gtalign_jax import judging
from gtalign_jax import run as run_lib
from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh
from gtalign_jax.reward.factors import NAMES as FACTORS
from gtalign_jax.reward.judges import Judgement, make_judge
from gtalign_jax.training import collect, grpo, plots
from gtalign_jax.training import learner as learner_lib
from gtalign_jax.training.checkpoint import Checkpointer
from gtalign_jax.training.collect import Verdict
from gtalign_jax.training.grpo import GRPOConfig
from gtalign_jax.training.learner import Learner
from gtalign_jax.training.metrics import Mean

Q, G, T = 8, 2, 24
EVALUATED = {"evaluate__every_steps": 2, "evaluate__temperature": 1.0}
EVERY_STEP = (
    {f"reward/{name}" for name in (*FACTORS, "total", "missing", "parsed", "right_action")}
    | {f"welfare/{side}" for side in ("user", "llm")}
    | {f"game/{name}" for name in ("dilemma", "nash_count", "price_of_anarchy")}
    | {f"rollout/{name}" for name in ("length", "length_max", "truncated", "wasted_slots",
                                      "response_words", "logp_gap", "logp_gap_max")}
    | {f"grpo/{name}" for name in ("loss", "grad_norm", "learning_rate", "kl", "entropy", "ratio",
                                   "clip_fraction", "adv_abs", "groups_without_signal")}
    | {f"time/{name}" for name in ("rollout", "reward", "update", "log", "step")}
    | {"perf/tokens_per_s", "perf/compilations"}
)
LOGGED = {
    "stage", "step", "id", "data_source", "sample", "prompt", "question", "ground_truth",
    "completion", "tokens", "stopped", "logp", "valid", "reward", "user_welfare", "llm_welfare",
    "payoff", "chain_error", "right_action", "judge_score", "judge_reply", "judge_error", *FACTORS,
}


def flaky_judge(cfg, rules):
    """The judge of the run, down for every response that asks twice."""
    honest = make_judge(cfg, rules)

    def judge(requests):
        return [
            Judgement(None, "", "timed out") if request.response.count("?") == 2 else answer
            for request, answer in zip(requests, honest(requests), strict=True)
        ]

    return judge


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run: (work directory, results, the batches it trained on)."""
    workdir, batches = tmp_path_factory.mktemp("run"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "decode", runs.fluent)
        patch.setattr(judging, "make_judge", flaky_judge)
        scored = Learner.scored

        def spy(*args):
            batch = scored(*args)
            batches.append(jax.device_get(batch))
            return batch

        patch.setattr(Learner, "scored", spy)
        results = run_lib.run(runs.config(workdir, **EVALUATED))
    return types.SimpleNamespace(workdir=workdir, results=results, batches=batches)


def test_every_step_logs_every_promised_metric(whole):
    rows = runs.metrics(whole.workdir, "grpo")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert EVERY_STEP <= row.keys(), EVERY_STEP - row.keys()
        assert any(name.startswith("source/builtin-") for name in row)
        assert all(value is not None and np.isfinite(value) for name, value in row.items()
                   if name != "stage")


def test_the_cold_start_logs_loss_rate_and_speed(whole):
    rows = runs.metrics(whole.workdir, "sft")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert {"sft/loss", "sft/grad_norm", "sft/tokens", "sft/learning_rate", "time/update",
                "perf/tokens_per_s", "perf/compilations"} <= row.keys()
    assert 5 < rows[0]["sft/loss"] < 7  # about log(400) = 5.99: a model that knows nothing


def test_on_policy_numbers_are_those_of_a_policy_compared_with_itself(whole):
    first, *_, last = runs.metrics(whole.workdir, "grpo")
    assert first["grpo/ratio"] == 1 and first["grpo/clip_fraction"] == 0
    assert first["grpo/kl"] == pytest.approx(0, abs=1e-6)  # the reference is where GRPO starts
    assert last["grpo/kl"] > 1e-6
    assert first["rollout/logp_gap_max"] < 1e-4  # sampler and trainer agree, token by token
    assert 5 < first["grpo/entropy"] < np.log(400) + 0.01


def test_a_run_that_packs_its_completions_learns_as_one_that_pads_them(whole, tmp_path,
                                                                       monkeypatch):
    monkeypatch.setattr(collect, "decode", runs.fluent)
    monkeypatch.setattr(judging, "make_judge", flaky_judge)
    run_lib.run(runs.config(tmp_path, **EVALUATED, **{"grpo.pack": 2, "grpo.profile_step": 2}))
    padded, packed = (runs.metrics(workdir, "grpo") for workdir in (whole.workdir, tmp_path))
    for a, b in zip(padded, packed, strict=True):
        for name in ("grpo/loss", "grpo/grad_norm", "grpo/kl", "grpo/entropy", "rollout/logp_gap"):
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-5), name
        assert 0 <= b["grpo/padding"] < 1 and "grpo/padding" not in a
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert all(phase in traces[0].read_bytes() for phase in (b"rollout", b"reward", b"update"))


def test_a_step_has_its_phases_and_is_no_shorter_than_they_are(whole):
    names = {f"time/{name}" for name in ("rollout", "reward", "update", "log")}
    rest = []
    for row in runs.metrics(whole.workdir, "grpo"):
        assert {name for name in row if name.startswith("time/")} == names | {"time/step"}
        assert all(row[name] > 0 for name in names)
        rest.append(row["time/step"] - sum(row[name] for name in names))
        assert rest[-1] >= -0.001 * row["time/step"]
    # Apart from what follows some steps (a save, an evaluation) nothing goes uncounted.
    assert min(rest) < 0.5


def test_every_completion_is_in_the_rollout_log_once(whole):
    rows = runs.rows(whole.workdir, "rollouts.jsonl")
    assert len(rows) == 3 * Q * G
    assert len({(row["step"], row["id"], row["sample"]) for row in rows}) == 3 * Q * G
    for row in rows:
        assert LOGGED <= row.keys(), LOGGED - row.keys()
        assert 1 <= row["tokens"] <= T and row["stopped"] in (True, False)
        assert row["logp"] < 0
        assert {"role", "content"} <= row["prompt"][0].keys()
    by_step = [[row["reward"] for row in rows if row["step"] == s and row["valid"]]
               for s in (1, 2, 3)]
    logged = [row["reward/total"] for row in runs.metrics(whole.workdir, "grpo")]
    np.testing.assert_allclose([np.mean(step) for step in by_step], logged, rtol=1e-12)


def test_a_judge_that_fails_makes_rows_missing_and_no_zeros(whole):
    """Their advantage is 0, they are out of the loss and out of every mean; nobody calls it 0."""
    rows = runs.rows(whole.workdir, "rollouts.jsonl")
    missing = [row for row in rows if not row["valid"]]
    assert 0 < len(missing) < len(rows) / 2
    assert all(row["judge_error"] == "timed out" and row["judge_score"] is None for row in missing)
    for step, batch in enumerate(whole.batches, start=1):
        valid = np.array([row["valid"] for row in rows if row["step"] == step]).reshape(Q, G)
        reward = np.array([row["reward"] for row in rows if row["step"] == step]).reshape(Q, G)
        np.testing.assert_array_equal(batch.valid_QG, valid)
        assert (batch.adv_QG[~valid] == 0).all()
        alone = valid.sum(axis=1) < 2
        assert (batch.adv_QG[alone] == 0).all()
        # Two members: +1 and -1 (but for epsilon) for the better and the worse one.
        clear = ~alone & (np.abs(reward[:, 0] - reward[:, 1]) > 0.01)
        sign = np.sign(reward[clear] - reward[clear].mean(axis=1, keepdims=True))
        np.testing.assert_allclose(batch.adv_QG[clear], sign, atol=0.03)
        metrics = runs.metrics(whole.workdir, "grpo")[step - 1]
        assert metrics["reward/missing"] == pytest.approx((~valid).mean())
        no_signal = (batch.adv_QG == 0).all(axis=1).mean()
        assert metrics["grpo/groups_without_signal"] == pytest.approx(no_signal)
    assert sum((~b.valid_QG).sum() for b in whole.batches) == len(missing)


def test_held_out_prompts_are_the_same_before_between_and_after(whole):
    rows = runs.rows(whole.workdir, "evaluations.jsonl")
    labels = [plots.BEFORE, plots.COLD_START, "step 2", plots.AFTER]
    assert list(dict.fromkeys(row["label"] for row in rows)) == labels
    ids = {label: [row["id"] for row in rows if row["label"] == label] for label in labels}
    assert all(ids[label] == ids[plots.BEFORE] for label in labels)
    assert len(set(ids[plots.BEFORE])) == 12 == len(ids[plots.BEFORE])
    trained = {row["id"] for row in runs.rows(whole.workdir, "rollouts.jsonl")}
    assert not trained & set(ids[plots.BEFORE])
    assert list(whole.results) == list(plots.STAGES)
    assert [row["step"] for row in runs.metrics(whole.workdir, "evaluate")] == [2]


def test_curves_table_and_model_are_left_in_the_work_directory(whole):
    assert (whole.workdir / "welfare.png").stat().st_size > 10_000
    saved = json.loads((whole.workdir / "results.json").read_text())
    assert saved[plots.AFTER]["reward/total"] == whole.results[plots.AFTER]["reward/total"]
    assert (whole.workdir / "hf" / "config.json").exists()
    assert list((whole.workdir / "hf").glob("*.safetensors"))
    assert list((whole.workdir / "tensorboard" / "grpo").iterdir())


def test_the_same_command_again_repeats_no_step_and_no_row(whole, monkeypatch):
    monkeypatch.setattr(judging, "make_judge", flaky_judge)
    before = [(whole.workdir / name).read_text()
              for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")]
    results = run_lib.run(runs.config(whole.workdir, **EVALUATED))
    assert results == whole.results
    assert before == [(whole.workdir / name).read_text()
                      for name in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")]


class PulledPlug(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_rows_of_an_uninterrupted_one(
    whole, tmp_path, monkeypatch
):
    """Stopped after step 3 was written and before it was saved; the last save is of step 1."""
    monkeypatch.setattr(collect, "decode", runs.fluent)
    monkeypatch.setattr(judging, "make_judge", flaky_judge)
    config = runs.config(tmp_path, **EVALUATED)
    save = Checkpointer.save

    def failing(self, step, *args):
        if self.directory.endswith("grpo") and step == 2:
            return  # as if the save of step 2 had been cut off
        if self.directory.endswith("grpo") and step == 3:
            raise PulledPlug
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", failing)
        with pytest.raises(PulledPlug):
            run_lib.run(config)
    assert len(runs.metrics(tmp_path, "grpo")) == 3
    run_lib.run(config)
    for stage in ("sft", "grpo", "evaluate"):
        assert runs.repeatable(runs.metrics(tmp_path, stage)) == runs.repeatable(
            runs.metrics(whole.workdir, stage)
        ), stage
    assert runs.rows(tmp_path, "rollouts.jsonl") == runs.rows(whole.workdir, "rollouts.jsonl")


@pytest.mark.slow
def test_a_learning_rate_beyond_all_reason_ends_with_a_message(tmp_path):
    config = runs.config(tmp_path, stages=("sft",), sft__learning_rate=1e38, sft__steps=5)
    with pytest.raises(FloatingPointError, match="A lower learning_rate"):
        run_lib.run(config)


# ----------------------------------------------------------------------------- without a model


def learner(**options) -> Learner:
    cfg = GRPOConfig(**options)
    layout = Layout(make_mesh(MeshConfig()), TRAIN)
    advantages = functools.partial(grpo.advantages, std=cfg.std, epsilon=cfg.adv_epsilon)
    return Learner(cfg, layout, None, None, None, advantages, None)


def batch(learner, reward_B, valid_B, stopped_QG, sources):
    """The batch that `learner` makes of these scores, one prompt of each source per group."""
    Q, G = stopped_QG.shape
    rollout = types.SimpleNamespace(
        tokens_QGT=jnp.zeros((Q, G, 3), jnp.int32), lengths_QG=jnp.full((Q, G), 3),
        logp_QGT=jnp.zeros((Q, G, 3)),
    )
    prompts = types.SimpleNamespace(
        tokens_QS=np.zeros((Q, 2), np.int32), lengths_Q=np.ones(Q, np.int32),
        prompts=[types.SimpleNamespace(data_source=source) for source in sources], common=0,
    )
    verdict = Verdict(np.array(reward_B), np.array(valid_B), stopped_QG.reshape(-1),
                      np.asarray(rollout.lengths_QG).reshape(-1))
    made = dataclasses.replace(learner, logps=lambda params, batch: batch.sampler_logp_QGT).begin(
        State(0), None, prompts, rollout
    )
    return learner.scored(made, verdict, learner.signal(prompts, verdict))


REWARDS = [1.0, 0.0] * 8
JUDGED = [True] * 14 + [True, False]
STOPPED = np.ones((8, 2), bool)
STOPPED[0, 1] = False


def test_truncated_completions_are_masked_only_where_asked_and_still_count_in_their_group():
    made = (REWARDS, JUDGED, STOPPED, ["a"] * 8)
    plain, masked = batch(learner(), *made), batch(learner(mask_truncated=True), *made)
    expected = np.array(JUDGED).reshape(8, 2)
    np.testing.assert_array_equal(plain.valid_QG, expected)
    expected[0, 1] = False
    np.testing.assert_array_equal(masked.valid_QG, expected)
    # Left out of the group's mean, the truncated 0 would leave its neighbour without advantage.
    np.testing.assert_array_equal(masked.adv_QG, plain.adv_QG)
    assert masked.adv_QG[0, 0] == pytest.approx(1, abs=1e-3)


def test_a_normaliser_works_by_source_before_the_groups_are_formed():
    """min-max: rewards of 0 and 10 of one source become 0 and 1, those of the other stay."""
    rewards = [10.0, 0.0] * 4 + [1.0, 0.5] * 2 + [0.0, 0.5] * 2
    made = batch(learner(normalizer="minmax", std="none"), rewards, [True] * 16,
                 np.ones((8, 2), bool), ["a"] * 4 + ["b"] * 4)
    np.testing.assert_allclose(
        made.adv_QG, [[0.5, -0.5]] * 4 + [[0.25, -0.25]] * 2 + [[-0.25, 0.25]] * 2, atol=1e-6
    )


def test_metrics_of_several_updates_are_means_over_all_their_tokens():
    """(2 of 4) and (6 of 2): 8 / 6; a mean of means would be 1.75."""
    seen = [
        {"means": {"grpo/kl": Mean(jnp.asarray(2.0), jnp.asarray(4.0))},
         "maxima": {"gap": jnp.asarray(3.0)}},
        {"means": {"grpo/kl": Mean(jnp.asarray(6.0), jnp.asarray(2.0))},
         "maxima": {"gap": jnp.asarray(1.0)}},
    ]
    assert learner_lib.host_metrics(seen) == pytest.approx({"grpo/kl": 8 / 6, "gap": 3.0})


def test_a_mean_over_no_tokens_at_all_is_left_out():
    nothing, one = Mean(jnp.zeros(()), jnp.zeros(())), Mean(jnp.asarray(0.5), jnp.ones(()))
    seen = [{"means": {"grpo/entropy": nothing, "grpo/loss": one}, "maxima": {}}] * 2
    assert learner_lib.host_metrics(seen) == {"grpo/loss": 0.5}


class State(NamedTuple):
    updates: int
    params: None = None


def test_minibatches_and_epochs_update_on_every_prompt_of_the_step_once_per_epoch():
    seen = []

    def one_update(state, piece):
        seen.append(np.asarray(piece.adv_QG)[:, 0].tolist())
        metrics = {"means": {"grpo/loss": Mean(jnp.ones(()), jnp.ones(()))}, "maxima": {}}
        return State(state.updates + 1), metrics

    base = learner(minibatches=2, epochs=2, std="none")
    full = dataclasses.replace(
        base, one_update=one_update, logps=lambda params, batch: batch.sampler_logp_QGT
    )
    made = batch(base, REWARDS * 2, [True] * 32, np.ones((16, 2), bool), ["a"] * 16)
    made = made.replace(adv_QG=jnp.tile(jnp.arange(16.0)[:, None], (1, 2)))
    state, _ = full.update(State(0), None, made)
    assert state.updates == 4
    assert seen[0] == list(range(0, 16, 2)) and seen[1] == list(range(1, 16, 2))
    assert seen[2:] == seen[:2]
