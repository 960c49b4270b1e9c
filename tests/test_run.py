"""A run's own book-keeping; whole runs are in test_trainer and test_resume."""

import dataclasses
import json
import os
import signal
import types

import jax
import numpy as np
import pytest
import runs
from tracked import as_tracked, mlflow_run, wandb_rows

from gtalign_jax import run, session
from gtalign_jax.config import Config
from gtalign_jax.data import builtin
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.evaluation.evaluate import save_rows
from gtalign_jax.export import restore_policy
from gtalign_jax.model.hf import load_config, load_params
from gtalign_jax.model.load import model_config
from gtalign_jax.pod.notice import Preempted
from gtalign_jax.training import collect, plots
from gtalign_jax.training import stage as stage_lib


def test_a_policy_evaluated_anew_replaces_its_rows_and_no_others(tmp_path):
    """A kill after the completions were written and before results.json repeats an evaluation."""
    path = tmp_path / "evaluations.jsonl"
    for label, text in (("after cold start", "a"), ("step 3", "b"), ("after cold start", "c")):
        save_rows(path, label, [{"completion": text}, {"completion": text}])
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["label"], row["completion"]) for row in found] == [
        ("step 3", "b"), ("step 3", "b"), ("after cold start", "c"), ("after cold start", "c"),
    ]


def test_prompts_that_read_otherwise_are_other_data():
    """The same question under another instruction, or as another task, is another run."""
    tokenizer, prompts = train_tokenizer([], 300), builtin.generate("train", 5, seed=0)
    config = Config()
    model = model_config(config.model, 300)
    digests = {
        session._identity(config, model, tokenizer, [dataclasses.replace(prompts[0], **changes)])[
            "prompts"]
        for changes in ({}, {"messages": ({"role": "user", "content": "?"},)},
                        {"data_source": "math-hard"})
    }
    assert len(digests) == 3


def test_a_finished_run_is_evaluated_and_exported_again_from_its_last_checkpoint(tmp_path):
    """Without a training stage the trained policy counts, not the weights the run started from."""
    run.run(runs.config(tmp_path, stages=("sft", "evaluate"), sft__steps=2))
    past = json.loads((tmp_path / "results.json").read_text())
    results = run.run(runs.config(tmp_path, stages=("evaluate", "export")))
    assert results["sft step 2"] == past["after cold start"]
    assert past["before cold start"] == results["before cold start"]  # nothing lost
    measured = json.loads((tmp_path / "measures.json").read_text())["measures"]
    assert list(measured) == ["before cold start", "after cold start", "sft step 2"]
    assert "after cold start" in (tmp_path / "report.html").read_text()
    exported = load_params(tmp_path / "hf", load_config(tmp_path / "hf"))
    trained, _, _ = restore_policy(tmp_path, runs.config(tmp_path))
    for a, b in zip(jax.tree.leaves(exported), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_report_that_cannot_be_drawn_is_told_of_and_the_run_stays_complete(
    tmp_path, monkeypatch, caplog
):
    lines = []
    session = types.SimpleNamespace(
        files=types.SimpleNamespace(directory=tmp_path),
        console=types.SimpleNamespace(say=lines.append),
    )
    run._report(session)  # nothing to report on is no fault
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"no report: {tmp_path} holds no" in caplog.text

    def write(directory):
        raise ZeroDivisionError("a figure without width")

    monkeypatch.setattr(run.report, "write", write)
    run._report(session)
    assert "ZeroDivisionError: a figure without width" in caplog.text
    assert f"python -m gtalign_jax.report {tmp_path} makes it" in caplog.text and not lines


def test_a_corrected_ground_truth_makes_old_results_void(tmp_path):
    """Curves, too, must not go on from numbers that meant something else."""
    forgotten = []
    prompt = builtin.generate("test", 1, seed=0)[0]

    def past(prompt):
        return run._past_results(types.SimpleNamespace(
            files=types.SimpleNamespace(directory=tmp_path), push=lambda: None,
            fingerprint={"identity": {"model": 1, "tokenizer": 2}},
            test=types.SimpleNamespace(prompts=[prompt]),
            config=Config(),
            metrics=types.SimpleNamespace(truncate=lambda *about: forgotten.append(about)),
        ))

    past(prompt)
    (tmp_path / "results.json").write_text('{"after GRPO": {}}')
    forgotten.clear()
    assert past(prompt) == {"after GRPO": {}} and not forgotten
    assert past(dataclasses.replace(prompt, ground_truth="corrected")) == {}
    assert forgotten == [("evaluate", 0)]


def test_results_of_other_held_out_prompts_are_not_taken_for_these(tmp_path):
    run.run(runs.config(tmp_path, stages=("evaluate",)))
    fewer = run.run(runs.config(tmp_path, stages=("evaluate",), evaluate__prompts=5))
    assert len(runs.rows(tmp_path, "evaluations.jsonl")) == 5
    assert len(runs.rows(tmp_path, "evaluations.jsonl.old")) == 12  # void, but not lost
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"after GRPO": {"reward/total": 0.9}, **fewer}))
    again = run.run(runs.config(tmp_path, stages=("evaluate",), evaluate__prompts=6))
    assert set(again) == {"as given"}


@pytest.mark.slow
@pytest.mark.long
def test_an_evaluation_owed_when_the_run_was_told_to_end_is_made_once(tmp_path, monkeypatch):
    """Every second step is evaluated once, though it has four updates of two micro-batches each;
    also the one that SIGTERM saved. Trackers see one run all the while."""
    monkeypatch.setattr(collect, "decode", runs.fluent)
    labels, evaluate_policy, check = [], run.evaluate_policy, stage_lib._check_finite

    def counted(session, params, label):
        labels.append(label)
        return evaluate_policy(session, params, label)

    def told(stage, step, guard):
        check(stage, step, guard)
        if step == 2 and len(labels) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def config(name):
        return runs.config(
            tmp_path / name, stages=("grpo", "evaluate"), evaluate__every_steps=2,
            evaluate__temperature=1.0, checkpoint__every=5, grpo__steps=3,
            grpo__prompts_per_step=32, grpo__minibatches=2, grpo__epochs=2,
            grpo__micro_batch_prompts=1, grpo__beta=0.0,
            grpo__reference=False, grpo__old_logp="sampler", rollout__max_new_tokens=8,
            track__wandb="offline", track__mlflow=str(tmp_path / "mlflow"),
        )

    monkeypatch.setattr(run, "evaluate_policy", counted)
    whole = run.run(config("whole"))
    expected = [plots.BEFORE, "step 2", plots.AFTER]
    assert labels == expected
    labels.clear()
    monkeypatch.setattr(stage_lib, "_check_finite", told)
    with pytest.raises(Preempted, match="saved up to step 2"):
        run.run(config("told"))
    assert labels == [plots.BEFORE] and runs.metrics(tmp_path / "told", "evaluate") == []
    assert run.run(config("told")) == whole
    assert labels == expected

    for stage in ("grpo", "evaluate"):
        rows = runs.metrics(tmp_path / "told", stage)
        assert runs.repeatable(rows) == runs.repeatable(runs.metrics(tmp_path / "whole", stage))
    assert [row["step"] for row in rows] == [2]
    assert runs.rows(tmp_path / "told", "evaluations.jsonl") == runs.rows(
        tmp_path / "whole", "evaluations.jsonl")

    rows = runs.rows(tmp_path / "told", "metrics.jsonl")
    seen = wandb_rows(tmp_path / "told")
    assert len(seen) == len(rows) == 4
    for row, there in zip(rows, seen, strict=True):
        assert as_tracked(row).items() <= there.items()
    _, found = mlflow_run(tmp_path / "mlflow", "told")
    assert as_tracked(rows[-1]).items() <= found.data.metrics.items()
    assert found.data.metrics["results/after GRPO/reward/total"] == whole["after GRPO"][
        "reward/total"]
    assert found.info.status == "FINISHED" and found.data.params["model.d_model"] == "32"
