"""A run's own book-keeping; whole runs are in test_trainer and test_resume."""

import dataclasses
import json

import jax
import numpy as np
import runs

from gtalign_jax import run, session
from gtalign_jax.config import Config
from gtalign_jax.data import builtin
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.evaluation.evaluate import save_rows
from gtalign_jax.export import restore_policy
from gtalign_jax.model.hf import load_config, load_params
from gtalign_jax.model.load import model_config


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
    exported = load_params(tmp_path / "hf", load_config(tmp_path / "hf"))
    trained, _, _ = restore_policy(tmp_path, runs.config(tmp_path))
    for a, b in zip(jax.tree.leaves(exported), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_results_of_other_held_out_prompts_are_not_taken_for_these(tmp_path):
    run.run(runs.config(tmp_path, stages=("evaluate",)))
    fewer = run.run(runs.config(tmp_path, stages=("evaluate",), evaluate__prompts=5))
    assert len(runs.rows(tmp_path, "evaluations.jsonl")) == 5
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"after GRPO": {"reward/total": 0.9}, **fewer}))
    again = run.run(runs.config(tmp_path, stages=("evaluate",), evaluate__prompts=6))
    assert set(again) == {"as given"}
