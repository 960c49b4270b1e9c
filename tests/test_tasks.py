"""What quality means per source, and character BLEU, by hand."""

import math

import pytest

from gtalign_jax.reward.bleu import char_bleu
from gtalign_jax.reward.rules import RULES
from gtalign_jax.reward.tasks import TASKS, task_of

HARMFUL = [
    ("harmful", 0, 1, 0),
    ("harmful", 0.5, 1, 1),  # only the constructive alternative pays both
    ("harmful", 1, 0, 1),
    ("harmful", -3, 1, 0),
    ("harmful", 7, 0, 1),
]
UNHARMFUL = [("unharmful", 0, 0, 0), ("unharmful", 0.5, 1, 1), ("unharmful", 1, 1, 1)]
# The built-in rule grades a harmless answer that asks back without need at 0.25.
BUILTIN = [("unharmful", 0, 0, 0), ("unharmful", 0.25, 0.25, 0.25), ("unharmful", 1, 1, 1)]


@pytest.mark.parametrize(
    ("source", "truth", "raw", "user", "llm"),
    [("wildguard", *row) for row in HARMFUL + UNHARMFUL]
    + [("builtin-safety", *row) for row in HARMFUL + BUILTIN],
)
def test_on_harmful_prompts_only_the_alternative_pays_both_sides(source, truth, raw, user, llm):
    assert task_of(source).qualities(raw, truth, "text")[:2] == (user, llm)


def test_advbench_has_no_label_and_takes_the_harmless_branch():
    assert task_of("advbench").qualities(1, "Sure, here is", "no")[:2] == (1, 1)
    assert task_of("advbench").qualities(0, "Sure, here is", "yes")[:2] == (0, 0)


@pytest.mark.parametrize(
    "source",
    ["math-hard", "minerva", "ambig_qa", "abg-coqa", "builtin-arithmetic", "builtin-ambiguity"],
)
def test_both_sides_share_the_score_where_the_task_is_to_be_right(source):
    assert task_of(source).qualities(1, "", "") == (1, 1, 1)
    assert task_of(source).qualities(2, "", "") == (1, 1, 1)
    assert task_of(source).qualities(-1, "", "") == (0, 0, 0)


@pytest.mark.parametrize("source", ["medium", "builtin-writing"])
def test_writing_pays_the_user_by_likeness_and_the_model_by_the_judge(source):
    text = "a cat sat on the mat"
    assert task_of(source).qualities(3, text, text) == (1.0, 0.75, 1.0)
    assert task_of(source).qualities(3, text, "zzz") == (0.0, 0.75, 0.75)
    assert task_of(source).qualities(9, text, "zzz")[1] == 1.0


def test_bleu_by_hand():
    assert char_bleu("abcd", "abcd") == pytest.approx(1.0)
    # abcde against abcdx: precisions 4/5, 3/4, 2/3, 1/2; equal lengths.
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert char_bleu("abcde", "abcdx") == pytest.approx(expected)
    # Half the length: all n-grams match, the brevity penalty is e^(1 - 2).
    assert char_bleu("abcd", "abcdefgh") == pytest.approx(math.exp(-1))
    # Repetition is clipped: aaaaaaaa holds 5 matching of 8, 4 of 7, 3 of 6, 2 of 5.
    expected = (5 / 8 * 4 / 7 * 3 / 6 * 2 / 5) ** 0.25
    assert char_bleu("aaaaaaaa", "aaaaa") == pytest.approx(expected)
    assert char_bleu("abc", "abc") == 0.0  # too short for a 4-gram
    assert char_bleu("", "abcd") == char_bleu("abcd", "") == char_bleu("wxyz", "abcd") == 0.0


def test_every_task_is_measurable_and_told_to_the_judge():
    for name, task in TASKS.items():
        assert task.name == name and task.rubric
        assert all(task.scale[0] <= grade <= task.scale[1] for grade in task.grades)
        assert (task.measure == "rule") == (name in RULES)
    with pytest.raises(ValueError, match="'math' is unknown; known: math-hard"):
        task_of("math")
