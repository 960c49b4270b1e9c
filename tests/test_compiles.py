"""Nothing is compiled after warm-up, whatever the lengths of prompts and completions (R19)."""

import jax
import jax.numpy as jnp
import pytest
import runs

from benchmarks import long_run
from gtalign_jax import bench
from gtalign_jax import run as run_lib
from gtalign_jax.training import collect
from gtalign_jax.training.compiles import compilations
from gtalign_jax.training.metrics import MetricsWriter


def test_a_compilation_is_counted_and_a_second_call_is_none():
    @jax.jit
    def fresh(x):
        return jnp.cos(x) * 3 + 1

    fresh(jnp.ones(7))
    before = compilations()
    fresh(jnp.ones(7))
    assert compilations() == before
    fresh(jnp.ones(8))
    assert compilations() > before


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {},
    {"grpo__prompts_per_step": 16, "grpo__minibatches": 2, "grpo__epochs": 2,
     "grpo__normalizer": "zscore", "grpo__truncated_is": 2.0, "reward__consistency": "solver"},
])
def test_twenty_steps_of_varying_lengths_recompile_nothing_after_warm_up(
    options, tmp_path, monkeypatch
):
    """Evaluations in between included, whose batches have another size and a ragged end. Nor do
    threads and open files pile up: the least of some steps, since a save is under way at others.

    Warm-up ends with the first save: over several devices it cuts replicated arrays into shares.
    """
    monkeypatch.setattr(collect, "decode", runs.fluent)
    held, write = [], MetricsWriter.write
    monkeypatch.setattr(MetricsWriter, "write", lambda *args: (write(*args),
                                                               held.append(long_run.held())))
    # Many ends of text, so that completions differ in length from row to row and step to step.
    monkeypatch.setattr(bench, "find_stop_ids", lambda *_: tuple(range(100, 140)))
    run_lib.run(runs.config(
        tmp_path, stages=("grpo", "evaluate"), grpo__steps=20, evaluate__every_steps=6,
        **options,
    ))
    rows = runs.metrics(tmp_path, "grpo")
    assert len({row["rollout/length"] for row in rows}) > 15
    assert len({row["reward/missing"] for row in rows} | {row["reward/parsed"] for row in rows}) > 2
    counts = [row["perf/compilations"] for row in rows]
    assert counts[1:] == [counts[1]] * 19, counts
    for name in ("threads", "files"):
        found = [sample[name] for sample in held]
        assert min(found[-8:]) <= min(found[1:9]) + 2, (name, found)
