"""What a report chooses, compares, counts and calls better."""

from pathlib import Path

import pytest
from report_directories import CONFIG, completion, unjudged

from gtalign_jax.report import examples, load, numbers, page_tables, words


def test_a_cold_start_that_another_run_had_is_no_step_still_to_come():
    rows = [{"stage": "grpo", "step": 45}]
    config = {"stages": ["sft", "grpo"], "sft": {"steps": 900}, "grpo": {"steps": 45}}
    data = load.RunData(Path(), config, None, rows, (), {}, None)
    assert numbers.progress(data) == {"grpo": {"done": 45, "of": 45}}
    waiting = load.RunData(Path(), config, None, [], (), {}, None)
    assert numbers.progress(waiting)["sft"] == {"done": 0, "of": 900}


def test_a_bare_response_is_shown_as_what_it_is_and_a_broken_chain_as_it_was_written():
    row = completion("p", "a", "definite", (.5, .5, "answer"), completion="Just this.",
                     payoff=None, pareto_set=None, recommended=None)
    shown = examples.shown(row)
    assert [(name, cut.head) for name, cut in shown["blocks"]] == [("response", "Just this.")]
    assert shown["matrix"] is None and shown["error"] is None
    broken = examples.shown(row | {"chain_error": "no <payoff> block"})
    assert broken["blocks"] == [] and broken["completion"].head == "Just this."


def test_a_long_text_is_cut_in_three_and_a_short_one_is_not():
    text = "".join(chr(97 + i % 26) for i in range(12_345))
    cut = examples.Cut.of(text)
    assert cut.head + cut.rest == text[:10_000] and len(cut.head) == 700
    assert cut.left_out == 2_345
    assert examples.Cut.of(text[:800]) == examples.Cut(text[:800], "", 0)


def test_examples_are_the_extremes_and_no_completion_stands_twice():
    before = [completion(f"p{i}", "a", "definite", (u, u, "answer"))
              for i, u in enumerate((.2, .9, .5, .5, .3))]
    after = [completion(f"p{i}", "a", "definite", (u, u, "answer"))
             for i, u in enumerate((.8, .1, .7, .4, .35))]
    chosen = examples.choose(before, after, each=1)
    assert [(e.why, e.after["id"]) for e in chosen] == [
        ("Best after", "p0"), ("Worst after", "p1"), ("Most improved", "p2"),
        ("Most worsened", "p3"),
    ]
    assert [e.change for e in chosen] == pytest.approx([.6, -.8, .2, -.1])


def test_examples_come_from_several_sources_where_there_are_several():
    after = [completion(f"p{i}", source, "definite", (u, u, "answer"))
             for i, (source, u) in enumerate((("a", .9), ("a", .8), ("b", .5), ("b", .4)))]
    best = [e.after["id"] for e in examples.choose([], after) if e.why == "Best after"]
    assert best == ["p0", "p2"]


def test_completions_that_nobody_judged_are_no_examples():
    row = unjudged(completion("p", "a", "definite", (.5, .5, "answer")))
    assert examples.choose([row], [row]) == []


@pytest.mark.parametrize(("labels", "expected"), [
    ([], (None, None)),
    (["alone"], (None, "alone")),
    (["before cold start", "after cold start"], ("before cold start", "after cold start")),
    (["before cold start", "after cold start", "step 5", "after GRPO"],
     ("after cold start", "after GRPO")),
    (["after cold start", "step 5", "step 10"], ("after cold start", "step 10")),
    (["before cold start", "step 5"], ("before cold start", "step 5")),
    (["before cold start", "after GRPO"], ("before cold start", "after GRPO")),
    (["base", "mine grpo step 45"], ("base", "mine grpo step 45")),
    (["step 5", "step 10"], (None, "step 10")),
])
def test_what_is_compared_follows_from_the_labels(labels, expected):
    assert numbers.compared(labels) == expected


def test_only_so_many_labels_stand_side_by_side_and_those_compared_are_among_them():
    labels = [f"policy {i}" for i in range(9)]
    assert numbers.shown_labels(labels) == [
        "policy 0", "policy 1", "policy 2", "policy 7", "policy 8"]
    assert numbers.shown_labels(["after cold start", "step 1", "step 2", "after GRPO"]) == [
        "after cold start", "after GRPO"]


def test_a_loss_beyond_chance_is_called_one():
    measure = page_tables.BY_NAME["format"]
    d = {"difference": -0.2, "low": -0.3, "high": -0.1, "p_adjusted": 0.01}
    cell = page_tables.difference(measure, d)
    assert (cell.text, cell.below, cell.mark) == (
        "−20.0 pt", "[−30.0 pt, −10.0 pt], p = 0.010", "▼ worse")
    assert words.direction(page_tables.BY_NAME["harm"], d) == "better"
    assert words.direction(page_tables.BY_NAME["tokens"], d) == "changed"
    assert words.direction(measure, d | {"p_adjusted": 0.06}) == ""
    assert words.direction(measure, d | {"p_adjusted": None}) == ""


def test_judgements_of_rules_and_algebra_are_no_calls_of_a_server():
    asked = completion("p", "medium", "definite", (.5, .5, "answer"))
    rows = [
        asked,
        asked | {"judge_reply": "rule"},
        asked | {"judge_score": None, "judge_reply": None},  # no response: nobody was asked
        asked | {"consistency_reply": "I agree"},
        asked | {"consistency_reply": "solver"},
        asked | {"data_source": "math-hard"},
        unjudged(asked),
    ]
    rows = [row | {"replies": load.replies(row)} for row in rows]
    assert numbers.judge_calls(rows, CONFIG) == 1 + 0 + 0 + 2 + 1 + 0 + 1
    by_judge = {**CONFIG, "reward": {"math": "judge"}}
    assert numbers.judge_calls(rows, by_judge) == 6
    assert numbers.judge_calls(rows, {**CONFIG, "judge": {"kind": "rule"}}) == 0
    assert numbers.judge_calls(rows, None) is None
