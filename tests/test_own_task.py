"""A task of the user's own, by import path: the page's example, its components, its failures."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import runs

from gtalign_jax import score as score_command
from gtalign_jax.config import ConfigError, check, fingerprint
from gtalign_jax.data.prompt import Prompt
from gtalign_jax.game.chain import KEYS, render
from gtalign_jax.reward import tasks
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import make_judge
from gtalign_jax.reward.rules import RULES
from gtalign_jax.reward.scoring import RewardConfig, score

PAGE = Path(__file__).resolve().parent.parent / "docs" / "judges.md"
MATRIX = {key: {"LLM": 1, "user": 2} for key in KEYS}
HAIKU = "an old silent pond\na frog jumps into the pond\nsplash! silence again"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of that name and source to where Python finds it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)
    tasks.imported.cache_clear()


def scored(responses, paths, source="haiku", judge=None):
    prompts = [Prompt(str(i), source, (), "", "a poem?") for i in range(len(responses))]
    texts = [render("t", MATRIX, "DQ_DA", response) for response in responses]
    judge = judge or make_judge(JudgeConfig(kind="rule"), RULES)
    return score(prompts, texts, judge, RewardConfig(tasks=paths))


def test_the_example_of_the_page_scores_and_logs_its_components(module):
    (example,) = re.findall(r"```python\n(# my_tasks.*?)```", PAGE.read_text(), re.S)
    module("my_tasks", example)
    found = scored([HAIKU, "one line", "word " * 20], ("my_tasks:HAIKU",))
    assert found.valid_B.all()
    assert found.factors["q_user"].tolist() == [1.0, 0.5, 0.0]
    assert found.components["three_lines"].tolist() == [1, 0, 0]
    assert found.components["brief"].tolist() == [1, 1, 0]
    assert found.reward_B[0] > found.reward_B[1] > found.reward_B[2]


BROKEN = """
from gtalign_jax.reward.tasks import Measured, Qualities, Task
def rule(request):
    return {"raise": lambda: 1 / 0, "nan": lambda: float("nan"), "other": lambda:
            Measured(1.0, {"undeclared": 1.0})}.get(request.response, lambda: 1.0)()
def qualities(score, truth, response):
    if response == "bad quality":
        raise KeyError("mine")
    return Qualities(score, score, 2.0 if response == "too good" else score)
TASK = Task("mine", "rule", (0.0, 1.0), (), "", qualities, rule=rule)
NOT_A_TASK = 3
"""


def test_a_task_that_fails_makes_its_own_row_missing_and_no_other(module):
    module("broken", BROKEN)
    responses = ["fine", "raise", "nan", "other", "bad quality", "too good"]
    found = scored(responses, ("broken:TASK",), "mine")
    assert found.valid_B.tolist() == [True] + [False] * 5
    assert [j.cause for j in found.judgements] == [None] + ["task_error"] * 5
    for judgement, word in zip(found.judgements[1:],
                               ("ZeroDivisionError", "finite", "undeclared", "mine", "[0, 1]"),
                               strict=True):
        assert word in judgement.error
    assert found.reward_B[0] > 0 and np.isfinite(found.reward_B).all()


@pytest.mark.parametrize(("path", "reason"), [
    ("broken", "expected 'module:NAME'"),
    ("broken:NOT_A_TASK", "is no task"),
    ("broken:ABSENT", "cannot be imported"),
    ("no_such_module:TASK", "cannot be imported"),
    (":TASK", "cannot be imported"),
])
def test_an_import_path_that_names_no_task_is_refused_in_the_config(path, reason, module):
    module("broken", BROKEN)
    with pytest.raises(ValueError, match="reward.tasks") as refused:
        RewardConfig(tasks=(path,))
    assert reason in str(refused.value) and path in str(refused.value)


@pytest.mark.parametrize(("fields", "reason"), [
    ({"scale": (1.0, 0.0)}, "scale"),
    ({"scale": (0.0, float("inf"))}, "scale"),
    ({"grades": (0.0, 3.0)}, r"grades \[3.0\]"),
    ({"measure": "oracle"}, "measure='oracle'"),
    ({"components": ("a",)}, "without a rule"),
])
def test_a_task_that_could_not_be_measured_is_refused(fields, reason):
    task = {"name": "x", "measure": "judge", "scale": (0.0, 1.0), "grades": (), "rubric": "r",
            "to_qualities": lambda s, t, r: tasks.Qualities(s, s, s)} | fields
    with pytest.raises(ValueError, match=reason):
        tasks.Task(**task)


def test_a_source_of_an_own_task_is_known_and_one_of_nobody_is_refused_by_name(module):
    module("broken", BROKEN)
    assert tasks.task_of("mine", ("broken:TASK",)).name == "mine"
    with pytest.raises(ValueError, match="'theirs' is unknown; known: mine, math-hard"):
        tasks.task_of("theirs", ("broken:TASK",))


def test_a_run_without_own_tasks_keeps_the_fingerprint_of_older_checkpoints(tmp_path):


    prints = fingerprint(runs.config(tmp_path))
    assert not {"reward.tasks", "judge.top_p", "judge.thinking", "grpo.ahead"} & prints.keys()
    changed = fingerprint(runs.config(tmp_path, judge__top_p=0.5))
    assert changed["judge.top_p"] == 0.5


def test_the_score_command_takes_it_too(module, tmp_path):
    (example,) = re.findall(r"```python\n(# my_tasks.*?)```", PAGE.read_text(), re.S)
    module("my_tasks", example)
    row = {"data_source": "haiku", "ground_truth": "",
           "completion": render("t", MATRIX, "DQ_DA", HAIKU)}
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    words = [f"--input={rows}", f"--out={out}"]
    assert score_command.main(words) == 1  # nobody knows the source
    assert score_command.main([*words, "--task=my_tasks:HAIKU"]) == 0
    assert json.loads(out.read_text())["q_user"] == 1.0


def test_groups_may_be_filtered_on_a_component_that_a_task_declares(module, tmp_path):
    (example,) = re.findall(r"```python\n(# my_tasks.*?)```", PAGE.read_text(), re.S)
    module("my_tasks", example)
    own = {"reward__tasks": ("my_tasks:HAIKU",)}
    check(runs.config(tmp_path, grpo__filter_on="brief", **own), 1)
    with pytest.raises(ConfigError, match="filter_on='long': expected .*'three_lines', 'brief'"):
        check(runs.config(tmp_path, grpo__filter_on="long", **own), 1)
