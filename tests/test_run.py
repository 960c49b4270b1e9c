"""A run's own book-keeping; whole runs are in test_trainer and test_resume."""

import dataclasses
import json

from gtalign_jax import run
from gtalign_jax.config import Config
from gtalign_jax.data import builtin
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.model.load import model_config


def test_a_policy_evaluated_anew_replaces_its_rows_and_no_others(tmp_path):
    """A kill after the completions were written and before results.json repeats an evaluation."""
    path = tmp_path / "evaluations.jsonl"
    for label, text in (("after cold start", "a"), ("step 3", "b"), ("after cold start", "c")):
        run._save_evaluation(path, label, [{"completion": text}, {"completion": text}])
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
        run._identity(config, model, tokenizer, [dataclasses.replace(prompts[0], **changes)])[
            "prompts"]
        for changes in ({}, {"messages": ({"role": "user", "content": "?"},)},
                        {"data_source": "math-hard"})
    }
    assert len(digests) == 3
