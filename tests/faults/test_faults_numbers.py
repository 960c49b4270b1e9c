"""Numbers that are not finite, planted where they can arise: the weights stay, the run goes on."""

import dataclasses
import functools
import json
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pods
import pytest
import runs
import test_grpo_exact as exact
import test_packing as packing
import test_sft as cold
import test_trainer
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtalign_jax import run as run_lib
from gtalign_jax.aot.topology import describe
from gtalign_jax.export import checkpoint_dir
from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh
from gtalign_jax.training import collect, grpo, guard, packed, sft
from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer
from gtalign_jax.training.grpo import GRPOConfig
from gtalign_jax.training.guard import QUIET, WINDOW, Guard, GuardConfig, check_state
from gtalign_jax.training.learner import Learner, host_metrics
from gtalign_jax.training.state import (
    OptimizerConfig,
    make_optimizer,
    make_state,
    new_state,
    update_if_finite,
)

NAN, INF = float("nan"), float("inf")
GRPO = GRPOConfig(beta=0.1, logit_chunk=3, pack=3)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.1), 4)
EXAMPLES = sft.SFTConfig()


@functools.cache
def layout() -> Layout:
    return Layout(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1]), TRAIN)


@functools.cache
def update(kind: str):
    """The trainer's own program for padded or packed batches, or for examples."""
    if kind == "sft":
        return sft.make_update(tiny.CFG, EXAMPLES, OPTIMIZER, layout=layout())
    make = packed.make_update if kind == "packed" else grpo.make_update
    return make(tiny.CFG, GRPO, OPTIMIZER, layout=layout())


@functools.cache
def whole_batch():
    return exact.with_reference(exact.make_batch())


def batch_of(kind: str, change=lambda batch: batch):
    """A batch that `change` was made to, in the form that the update takes."""
    if kind == "sft":
        return jax.device_put(cold.make_batch(), layout().sharding("prompts"))
    batch = change(whole_batch())
    if kind == "packed":
        return packing.packed_of(batch, GRPO)[0]
    return grpo.place(batch, layout())


def fresh_state(change=lambda params: params):
    return make_state(change(tiny.params()), tiny.CFG, OPTIMIZER, layout())


def spoil(name: str, value: float, at=(0, 1, 0)):
    """Plants `value` in an array of the batch; row (0, 1) is judged and has tokens."""
    def change(batch):
        old = getattr(batch, name)
        return batch.replace(**{name: old.at[at[:old.ndim]].set(value)})

    return change


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


PLACES = {  # where: (what says so, how it gets there)
    "sampler": ("sampler_logp", spoil("sampler_logp_QGT", NAN)),
    "sampler inf": ("sampler_logp", spoil("sampler_logp_QGT", -INF)),
    "old": ("old_logp", spoil("old_logp_QGT", NAN)),
    "old inf": ("old_logp", spoil("old_logp_QGT", INF)),
    "reference": ("ref_logp", spoil("ref_logp_QGT", NAN)),
    "reference inf": ("ref_logp", spoil("ref_logp_QGT", -INF)),
    "reward": ("loss", spoil("adv_QG", NAN)),
    "reward inf": ("loss", spoil("adv_QG", INF)),
}


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("place", PLACES)
def test_an_update_with_a_number_that_is_not_finite_never_happened(kind, place):
    """The next update is that of a run without it; all is one program."""
    named, change = PLACES[place]
    state, other = fresh_state(), fresh_state()
    state, _ = update(kind)(state, batch_of(kind))
    other, _ = update(kind)(other, batch_of(kind))
    before = bits(state)
    state, seen = update(kind)(state, batch_of(kind, change))
    assert bits(state) == before and int(state.updates) == 1
    metrics = host_metrics([seen])
    assert metrics["grpo/skipped"] == 1 and metrics[f"nonfinite/{named}"] == 1
    state, seen = update(kind)(state, batch_of(kind))
    other, _ = update(kind)(other, batch_of(kind))
    assert bits(state) == bits(other) != before and int(state.updates) == 2
    metrics = host_metrics([seen])
    assert metrics["grpo/skipped"] == 0 and not any(x.startswith("nonfinite/") for x in metrics)
    assert update(kind)._cache_size() == 1


@pytest.mark.parametrize("kind", ["padded", "packed", "sft"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_spoilt_weights_are_not_spoilt_further(kind, value):
    def spoilt(params):
        return params.replace(final_norm_D=params.final_norm_D.at[3].set(value))

    state = fresh_state(spoilt)
    before = bits(state)
    state, seen = update(kind)(state, batch_of(kind))
    assert bits(state) == before
    stage = "sft" if kind == "sft" else "grpo"
    metrics = host_metrics([seen])
    assert metrics[f"{stage}/skipped"] == 1
    assert not np.isfinite(metrics[f"{stage}/loss"])
    assert ("no finite logp of the policy" in guard._listed(metrics)) == (stage == "grpo")
    state = fresh_state()
    state, seen = update(kind)(state, batch_of(kind))
    assert host_metrics([seen])[f"{stage}/skipped"] == 0 and int(state.updates) == 1


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_gradient_that_overflows_under_a_finite_loss_is_skipped(stage, monkeypatch):
    def overflowing(params, batch, **options):
        grads = jax.tree.map(jnp.zeros_like, params)
        grads = grads.replace(final_norm_D=grads.final_norm_D + jnp.float32(3e38) * 10)
        seen = {"means": {}, "maxima": {}}
        return (jnp.ones(()), grads) + ((seen,) if stage == "grpo" else ())

    monkeypatch.setattr(sft, "loss_and_grads", overflowing)
    made = (sft.make_update(tiny.CFG, EXAMPLES, OPTIMIZER, layout=layout()) if stage == "sft" else
            grpo.make_update(tiny.CFG, GRPO, OPTIMIZER, layout=layout(), grads_of=overflowing))
    state = fresh_state()
    before = bits(state)
    state, seen = made(state, batch_of("sft" if stage == "sft" else "padded"))
    assert bits(state) == before
    metrics = host_metrics([seen])
    assert metrics["nonfinite/gradient"] == 1 and "nonfinite/loss" not in metrics


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_what_stands_where_no_token_is_or_nothing_was_judged_skips_nothing(kind):
    """Row (0, 0) has no tokens; of (3, 2), which was not judged, only the sampler's is off."""
    def change(batch):
        for name in ("sampler_logp_QGT", "old_logp_QGT"):
            batch = spoil(name, NAN, (0, 0))(batch)
        return spoil("sampler_logp_QGT", NAN, (3, 2))(batch)

    state, seen = update(kind)(fresh_state(), batch_of(kind, change))
    other, _ = update(kind)(fresh_state(), batch_of(kind))
    assert host_metrics([seen])["grpo/skipped"] == 0 and bits(state) == bits(other)


@pytest.mark.parametrize("std", ["group", "none"])
@pytest.mark.parametrize("rewards", [[NAN, 1.0, 2.0], [INF, 1.0, 2.0], [INF, INF, INF],
                                     [-INF, 0.0, INF], [NAN, NAN, NAN]])
def test_a_reward_that_is_not_finite_is_no_signal_of_none(std, rewards):
    """Compared, a NaN would look like a group of equal rewards: no advantage, and no word."""
    both = np.array([rewards, [1.0, 0.0, 0.5]], np.float32)
    adv_QG = np.asarray(grpo.advantages(both, np.ones((2, 3), bool), std=std))
    assert not np.isfinite(adv_QG[0]).any() and np.isfinite(adv_QG[1]).all()
    unjudged = np.array([[False, False, False], [True] * 3])
    adv_QG = np.asarray(grpo.advantages(both, unjudged, std=std))
    assert (adv_QG[0] == 0).all() and np.isfinite(adv_QG).all()


def test_a_step_says_that_a_reward_was_not_finite():
    learner = dataclasses.replace(test_trainer.learner(), rates=np.zeros(1))
    prompts = types.SimpleNamespace(prompts=[types.SimpleNamespace(data_source="a")] * 2)
    for reward, named in ((NAN, 1.0), (0.5, None)):
        verdict = collect.Verdict(np.array([reward, 1.0, 0.0, 1.0]), np.ones(4, bool),
                                  np.ones(4, bool), np.ones(4, int))
        facts = learner.facts(learner.signal(prompts, verdict), 0, (), verdict)
        assert facts.get("nonfinite/reward") == named


def test_a_skipped_update_is_in_no_mean_of_its_step():
    state, seen = fresh_state(), []
    for change in (lambda b: b, spoil("old_logp_QGT", NAN)):
        state, metrics = update("padded")(state, batch_of("padded", change))
        seen.append(metrics)
    alone, both = host_metrics(seen[:1]), host_metrics(seen)
    assert both.pop("grpo/skipped") == 0.5 and both.pop("nonfinite/old_logp") == 1
    for name in [name for name in both if name.startswith("nonfinite/")]:
        del both[name]  # what follows from it
    del alone["grpo/skipped"]
    assert both == alone and np.isfinite(list(both.values())).all()


def test_on_a_tpu_the_choice_needs_no_memory():
    """All of the state is donated, nothing stands beside it; a branch holds its leaves twice."""
    mesh = Mesh(describe("v5e-1").devices, ("all",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        jax.eval_shape(lambda: new_state({"w": jnp.ones((1024, 1024))}, OPTIMIZER)),
    )

    def decaying(state):
        loss, grads = jax.value_and_grad(lambda params: (params["w"]**2).mean())(state.params)
        seen = {"means": {}, "maxima": {}}
        return update_if_finite(state, loss, grads, OPTIMIZER, "sft", seen)

    memory = jax.jit(decaying, donate_argnums=0).lower(state).compile().memory_analysis()
    leaf = 4 * 1024**2
    assert memory.alias_size_in_bytes >= 3 * leaf
    assert memory.temp_size_in_bytes < leaf / 8


def test_a_state_that_is_not_finite_is_not_saved():
    check_state("grpo", 7, fresh_state())

    def spoilt(params):
        return params.replace(final_norm_D=params.final_norm_D.at[0].set(INF))

    with pytest.raises(FloatingPointError, match="weights of grpo are not all finite after step 7"):
        check_state("grpo", 7, fresh_state(spoilt))
    state = fresh_state()
    state = state.replace(opt_state=jax.tree.map(lambda x: x * NAN, state.opt_state))
    with pytest.raises(FloatingPointError, match="^the optimizer's moments of sft"):
        check_state("sft", 7, state)


# ----------------------------------------------------------------------------- the guard


def rows_of(values, metric="grpo/kl", **others):
    return [{"step": i + 1, metric: value, **others} for i, value in enumerate(values)]


def told(values, metric="grpo/kl", stage="grpo", **keys):
    """(the alarm at each step, (step, warning) of those that warned)."""
    watching = Guard(stage, GuardConfig(**keys), "nonfinite")
    alarms, warnings = [], []
    for row in rows_of(values, metric):
        found, said = watching._add(row["step"], row)
        alarms += found.values()
        warnings += [(row["step"], words) for words in said]
    return alarms, warnings


def test_a_figure_above_its_threshold_is_told_once_for_each_episode():
    values = [0.1] * 5 + [1.5, 0.2, 1.2] + [0.1] * QUIET + [2.0, 2.0]
    alarms, warnings = told(values, spike=0.0)
    assert alarms == [float(value > 1) for value in values]
    assert [step for step, _ in warnings] == [6, 9 + QUIET]
    assert "grpo/kl is 1.5, above guard.kl=1" in warnings[0][1]
    assert told(values, kl=0.0, spike=0.0) == ([0.0] * len(values), [])


def test_a_figure_far_above_its_median_is_a_spike_only_once_there_is_one_and_it_matters():
    calm = [0.3, 0.35, 0.3, 0.28] * 5
    alarms, warnings = told([*calm, 2.9, 3.4, 0.3], metric="sft/grad_norm", stage="sft")
    assert alarms == [0.0] * (WINDOW + 1) + [1.0, 0.0]
    ((step, words),) = warnings
    assert step == WINDOW + 2 and "sft/grad_norm is 3.4, above guard.spike=10 times 0.3" in words
    assert told([*calm[1:], 50.0], metric="grpo/grad_norm")[1] == [], "of 19 steps nothing is known"
    small = [value / 100 for value in calm]
    assert told([*small, 0.9], metric="grpo/grad_norm")[1] == [], "less than 1 is no harm"
    assert told([*calm, 50.0], metric="grpo/grad_norm", spike=0.0)[1] == []
    assert len(told([*calm, 50.0], metric="grpo/grad_norm", grad_norm=20.0, spike=0.0)[1]) == 1


def test_the_ordinary_course_of_a_run_raises_no_alarm():
    """As recorded of a cold start from random weights, and of GRPO after it with a large rate: the
    KL begins at nothing."""
    norms = [8.5, 9.5, 7.6, 6.1, 5.5, 4.7, 4.0, 3.1, 2.8, 2.5, 2.2, 1.8, 2.2, 2.0, 1.7, 1.4, 2.6,
             1.8, 1.4, 1.9, 1.3, 1.2, 1.4, 1.6, 1.0, 0.9, 1.1, 1.8, 1.1, 0.9, 1.0, 0.8, 0.7, 0.8]
    kl = [0.0, 0.0, 0.0015, 0.0072, 0.024, 0.041, 0.096, 0.084, 0.134, 0.143, 0.144, 0.129]
    kl += [0.15 + 0.01 * i for i in range(40)]
    gaps = [0.012, 0.015, 0.011, 0.02] * 12
    for metric, values in (("sft/grad_norm", norms), ("grpo/kl", kl), ("rollout/logp_gap", gaps),
                           ("rollout/logp_gap_max", [60 * gap for gap in gaps])):
        alarms, warnings = told(values, metric, stage=metric.partition("/")[0])
        assert warnings == [] and set(alarms) == {0.0}, metric


def test_a_resumed_run_raises_the_alarms_and_counts_the_skips_of_one_that_did_not_stop():
    rng = np.random.default_rng(0)
    kl = np.where(rng.random(150) < 0.1, 30.0, 1.0) * rng.uniform(0.02, 0.06, 150)
    rows = [{"step": i + 1, "grpo/kl": None if i % 20 == 3 else float(x),
             "grpo/skipped": float(i % 20 in (3, 4))} for i, x in enumerate(kl)]
    whole = Guard("grpo", GuardConfig(), "")
    expected = [whole._add(row["step"], row) for row in rows]
    assert sum(len(warnings) for _, warnings in expected) > 20

    class Written:
        def rows(self, stage):
            return [dict(row, stage=stage) for row in rows[:done]]

    for done in (0, 1, 44, 97, 149):
        again = Guard.resumed("grpo", GuardConfig(), "", Written())
        assert [again._add(row["step"], row) for row in rows[done:]] == expected[done:], done


def test_steps_in_a_row_that_skip_end_the_run_and_others_do_not():
    watching = Guard("grpo", GuardConfig(max_skips=2), "runs/x/nonfinite")
    for step, skipped in enumerate((1.0, 0.0, 0.25), 1):
        row = {"grpo/skipped": skipped, "nonfinite/sampler_logp": skipped}
        watching.watch(step, row)
        assert watching.lost == ""
    watching.watch(4, {"grpo/skipped": 1.0, "nonfinite/loss": 1.0, "nonfinite/ref_logp": 1.0})
    assert "guard.max_skips=2 steps in a row had an update that was skipped" in watching.lost
    assert "no finite logp of the reference and no finite loss" in watching.lost
    assert "runs/x/nonfinite" in watching.lost and "learning_rate" in watching.lost


@pytest.mark.parametrize("key, value, allowed", [
    ("max_skips", 0, ">= 1"), ("kl", -1.0, ">= 0"), ("spike", NAN, ">= 0"),
])
def test_a_threshold_that_means_nothing_is_refused(key, value, allowed):
    with pytest.raises(ValueError, match=rf"guard\.{key}={value}: must be {allowed}"):
        GuardConfig(**{key: value})


# ----------------------------------------------------------------------------- whole runs


@pytest.fixture
def fluent(monkeypatch):
    monkeypatch.setattr(collect, "decode", runs.fluent)


def plant(monkeypatch, steps, how):
    """In these steps `how(batch)` is what is learnt from."""
    begin, calls = Learner.begin, []

    def planted(self, *args):
        calls.append(1)
        batch = begin(self, *args)
        return how(batch) if len(calls) in steps else batch

    monkeypatch.setattr(Learner, "begin", planted)


@functools.cache
def planting(sharding):
    return jax.jit(lambda logp_QGT: logp_QGT.at[0, 1].set(NAN), out_shardings=sharding)


def wild_sampler(batch):
    logp = batch.sampler_logp_QGT
    return batch.replace(sampler_logp_QGT=planting(logp.sharding)(logp))


@pytest.mark.slow
def test_a_run_skips_dumps_goes_on_and_ends_only_after_three_in_a_row(
    tmp_path, monkeypatch, fluent, caplog
):
    """Skipped: step 2, and from step 4 on. The run ends at 6. Its checkpoint is of step 5, and
    resumed it counts those two before, if the next is skipped again; if not, it goes on."""
    config = runs.config(tmp_path, stages=("grpo",), grpo__steps=9, checkpoint__every=5)
    save, saves = Checkpointer.save, []

    def looking(self, step, tree, *args):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree["state"]))
        saves.append((step, int(tree["state"].updates)))
        save(self, step, tree, *args)

    monkeypatch.setattr(Checkpointer, "save", looking)
    with monkeypatch.context() as patch:
        plant(patch, {2, 4, 5, 6}, wild_sampler)
        with pytest.raises(FloatingPointError, match="^step 6 of grpo: guard.max_skips=3 steps"):
            run_lib.run(config)
    rows = runs.metrics(tmp_path, "grpo")
    assert [row["grpo/skipped"] for row in rows] == [0, 1, 0, 1, 1, 1]
    assert [row.get("nonfinite/sampler_logp", 0) for row in rows] == [0, 1, 0, 1, 1, 1]
    assert rows[1]["rollout/logp_gap"] is None and rows[1]["grpo/loss"] is not None
    assert all(rows[2][name] is not None for name in rows[2])
    # None for skipping, not even for the first time, when this test's own planting was compiled.
    assert len({row["perf/compilations"] for row in rows[1:5]}) == 1
    assert {path.name for path in (tmp_path / "nonfinite").iterdir()} == {
        "grpo-2", "grpo-4", "grpo-5", "grpo-6"}
    assert "an update of step 2 was skipped" in caplog.text
    check_dump(tmp_path / "nonfinite/grpo-2", runs.rows(tmp_path, "rollouts.jsonl")[16:32])
    assert saves == [(5, 2)]

    with monkeypatch.context() as patch:
        plant(patch, {1}, wild_sampler)
        with pytest.raises(FloatingPointError, match="^step 6 of grpo"):
            run_lib.run(config)
    run_lib.run(config)
    assert [row["grpo/skipped"] for row in runs.metrics(tmp_path, "grpo")] == [
        0, 1, 0, 1, 1, 0, 0, 0, 0]
    assert saves == [(5, 2), (9, 6)]


def check_dump(directory: Path, logged: list[dict]) -> None:
    with np.load(directory / "arrays.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    facts = json.loads((directory / "facts.json").read_text())
    assert facts["arrays"].keys() == found.keys() >= {
        "tokens_QGT", "lengths_QG", "adv_QG", "reward_B", "sampler_logp_QGT", "ref_logp_QGT"}
    assert facts["not finite"] == ["logp of the sampler"] and "numpy.load" in facts["to load"]
    assert np.isnan(found["sampler_logp_QGT"][0, 1]).all()
    assert np.isfinite(found["sampler_logp_QGT"][1:]).all()
    rows = runs.rows(directory, "rows.jsonl")
    for row, expected in zip(rows, logged, strict=True):
        assert row.items() <= expected.items()
    np.testing.assert_allclose(found["reward_B"], [row["reward"] for row in rows])
    assert found["lengths_QG"].reshape(-1).tolist() == [row["tokens"] for row in rows]


@pytest.mark.slow
def test_a_cold_start_dumps_what_it_skipped(tmp_path, monkeypatch):
    make = sft.make_update

    def once(*args, **options):
        update, calls = make(*args, **options), []

        def planted(state, batch):
            calls.append(1)
            state, seen = update(state, batch)
            if len(calls) in (2, 3):
                seen["means"]["sft/skipped"] = seen["means"]["sft/skipped"].replace(sum=1.0)
                seen["maxima"]["nonfinite/loss"] = 1.0
            return state, seen

        return planted

    monkeypatch.setattr(sft, "make_update", once)
    run_lib.run(runs.config(tmp_path, stages=("sft",), sft__steps=4, guard__max_skips=3))
    rows = runs.metrics(tmp_path, "sft")
    assert [row["sft/skipped"] for row in rows] == [0, 1, 1, 0]
    assert [row["alarm/grad_norm"] for row in rows] == [0, 0, 0, 0]
    dump = tmp_path / "nonfinite/sft-3"
    arrays = np.load(dump / "arrays.npz", allow_pickle=False)
    texts = runs.rows(dump, "rows.jsonl")
    assert len(texts) == len(arrays["tokens_BT"]) == 8
    assert all("<payoff>" in row["completion"] and row["prompt"] for row in texts)


@pytest.mark.slow
def test_weights_that_an_update_blew_up_are_not_saved(tmp_path, monkeypatch):
    """A finite gradient, and a step that takes the weights beyond what float32 can hold."""
    monkeypatch.setattr(sft, "make_update", blowing_up(sft.make_update, at=2))
    config = runs.config(tmp_path, stages=("sft",), sft__steps=4)
    with pytest.raises(FloatingPointError, match="the weights of sft are not all finite after st"):
        run_lib.run(config)
    saved = Checkpointer(checkpoint_dir(tmp_path, "sft"), CheckpointConfig(), None, read_only=True)
    assert saved.steps() == [1]
    saved.close()


def blowing_up(make, at: int):
    def made(*args, **options):
        update, calls = make(*args, **options), []

        def planted(state, batch):
            calls.append(1)
            state, seen = update(state, batch)
            if len(calls) == at:
                norm = state.params.final_norm_D
                params = state.params.replace(final_norm_D=norm * jnp.float32(INF))
                state = state.replace(params=params)
            return state, seen

        return planted

    return made


PAIR = """
import sys
sys.path[:0] = ["tests", "tests/faults"]
import jax, runs
import pod_child
from gtalign_jax import run
from gtalign_jax.pod.start import PodConfig, start
from gtalign_jax.training import collect, stage
from gtalign_jax.training.guard import Guard, GuardConfig
from gtalign_jax.training.learner import Learner

start(PodConfig())

class Written:
    def rows(self, stage):  # as MetricsWriter: only process 0 has any
        return [{"step": 1, "grpo/skipped": 1.0}] * 3 if jax.process_index() == 0 else []

resumed = Guard.resumed("grpo", GuardConfig(), "", Written())
print("resumed as lost:", bool(resumed.lost), flush=True)
begin, check, calls = Learner.begin, stage._check_finite, []

def wild(self, *args):
    batch = begin(self, *args)
    calls.append(1)
    if len(calls) == 2:
        return batch
    logp = batch.sampler_logp_QGT  # row 6 of 8 is process 1's
    plant = jax.jit(lambda x: x.at[6, 1].set(float("nan")), out_shardings=logp.sharding)
    return batch.replace(sampler_logp_QGT=plant(logp))

def telling(name, step, guard):
    print("after", step, "skips", guard._skips, flush=True)
    check(name, step, guard)

Learner.begin, stage._check_finite, collect.decode = wild, telling, pod_child.legible
run.run(runs.config(sys.argv[1], stages=("grpo",), grpo__steps=6, grpo__reference=False,
                    grpo__beta=0.0, guard__max_skips=2))
"""


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_skip_and_end_together_and_each_dumps_its_own_rows(tmp_path):
    script = PAIR.replace("sys.argv[1]", repr(str(tmp_path)))
    children = pods.ended(pods.spawn(script, 2), 400)
    for child in children:
        assert "resumed as lost: True" in child.text, child.text[-3000:]
        assert re.findall(r"after (\d) skips (\d)", child.text) == [
            ("1", "1"), ("2", "0"), ("3", "1"), ("4", "2")], child.text[-3000:]
        assert child.status != 0 and "step 4 of grpo: guard.max_skips=2 steps" in child.text
    dump = tmp_path / "nonfinite/grpo-3"
    own, other = (np.load(dump / name) for name in ("arrays.npz", "arrays.1.npz"))
    assert own["tokens_QGT"].shape == other["tokens_QGT"].shape == (4, 2, 24)
    assert np.isfinite(own["sampler_logp_QGT"]).all()
    assert np.isnan(other["sampler_logp_QGT"][2, 1]).all()
    ids = [[row["id"] for row in runs.rows(dump, name)] for name in ("rows.jsonl", "rows.1.jsonl")]
    logged = [row["id"] for row in runs.rows(tmp_path, "rollouts.jsonl") if row["step"] == 3]
    assert ids[0] + ids[1] == logged and len(ids[1]) == 8
    assert json.loads((dump / "facts.1.json").read_text())["process"] == 1
