"""The table of faults in docs/reliability.md, and those of its rows that have no home elsewhere."""

import re
import shutil
import socket
from pathlib import Path

import pytest
import runs

from gtalign_jax import run as run_lib
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.reward.judges import JudgeError
from gtalign_jax.training import collect
from gtalign_jax.training.checkpoint import CheckpointError

TESTS = Path(__file__).resolve().parent.parent


def test_each_row_names_a_test_that_there_is():
    text = (TESTS.parent / "docs/reliability.md").read_text(encoding="utf-8")
    _, _, table = text.partition("## The fault table")
    rows = [line for line in table.partition("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        file, name = re.search(r"`(\S+\.py)::(\w+)`", row).groups()
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), row


@pytest.mark.slow
def test_another_tokenizer_under_the_same_path_is_refused(tmp_path):
    tokenizer = tmp_path / "tokenizer-of-mine"
    config = runs.config(tmp_path / "run", stages=("sft",), sft__steps=1, sft__repriced=0.0,
                         data__max_prompt_tokens=500, sft__max_completion_tokens=900,
                         model__max_position=2048, model__tokenizer=str(tokenizer))
    train_tokenizer(["one two three " * 9], 300, tokenizer)
    run_lib.run(config)
    shutil.rmtree(tokenizer)
    train_tokenizer(["four five sixes " * 9], 300, tokenizer)
    with pytest.raises(CheckpointError, match=r"\n  identity.tokenizer: saved '\w+', now '"):
        run_lib.run(config)


@pytest.mark.slow
def test_a_judge_that_is_down_ends_the_run_with_its_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "decode", runs.fluent)
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        config = runs.config(
            tmp_path, stages=("grpo",), judge__kind="http", judge__rules=False, judge__retries=0,
            judge__model="judge-1", judge__preflight=False,
            judge__base_url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1",
        )
        with pytest.raises(JudgeError) as down:
            run_lib.run(config)
    said = str(down.value)
    assert re.match(r"\d+ of \d+ completions could not be judged, more than judge.max_missing=0.5 "
                    r"allows; \d+ of them by connection: ", said), said
