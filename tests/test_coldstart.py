"""Cold-start chains teach format and skills, and leave the choice of action open."""

import collections
import json
import random

import numpy as np
import pytest

from gtalign_jax.data import builtin, coldstart
from gtalign_jax.data.prompt import Prompt
from gtalign_jax.game import chain
from gtalign_jax.reward import rules
from gtalign_jax.reward.judges import JudgeRequest

ACTION_KINDS = {  # (kind of request, action) -> kind of response
    ("clear", "DA"): "answer",
    ("clear", "CQ"): "ask",
    ("clear", "AQ"): "answer_ask",
    ("vague", "DA"): "answer",
    ("vague", "CQ"): "ask",
    ("vague", "AQ"): "answer_ask",
    ("harmful", "DA"): "answer",
    ("harmful", "CQ"): "refuse",
    ("harmful", "AQ"): "constructive",
}


@pytest.fixture(scope="module")
def prompts():
    return builtin.generate("train", 1200, seed=0)


@pytest.fixture(scope="module")
def examples(prompts):
    return coldstart.cold_start_examples(prompts, seed=0)


def _brute_force_best(payoff_UAP):
    """Pareto set by pairs of loops, then the largest sum, user, LLM (design, section 3)."""
    cells = {
        key: tuple(payoff_UAP.reshape(6, 2)[i]) for i, key in enumerate(chain.KEYS)
    }  # fmt: skip
    frontier = [
        key
        for key, (llm, user) in cells.items()
        if not any(
            a >= llm and b >= user and (a > llm or b > user) for a, b in cells.values()
        )
    ]  # fmt: skip
    best = max(frontier, key=lambda k: (sum(cells[k]), cells[k][1], cells[k][0]))
    return best, frontier


def test_a_repriced_chain_acts_on_its_edited_matrix_within_the_row_of_its_perception(prompts):
    """LLM + user, added up here, is the largest of the row."""
    moved, seen = 0, collections.Counter()
    for prompt in prompts[:400]:
        before, matrix, after = coldstart.render_repriced(prompt, random.Random(prompt.id))
        assert before.endswith("<payoff>") and after.startswith("</payoff>")
        parsed = chain.parse(before + matrix + after)
        assert parsed.format_ok and parsed.error is None
        perception = coldstart.PERCEPTION[prompt.extra["kind"]]
        row = chain.USER_ACTIONS.index("VQ" if perception == "vague" else "DQ")
        sums_A = parsed.payoff_UAP[row].sum(-1)
        key = parsed.analyze.removesuffix(" is best.")
        action = key.partition("_")[2]
        assert key.startswith(chain.USER_ACTIONS[row])
        assert sums_A[chain.ACTIONS.index(action)] == sums_A.max()
        assert rules.response_kind(parsed.response) == ACTION_KINDS[perception, action]
        moved += parsed.payoff_UAP.min() < 0
        seen[action] += 1
    assert moved > 250  # payoffs that no unpriced chain has
    assert min(seen.values()) > 60 and seen["DA"] == max(seen.values())  # prices favour short turns


def test_every_chain_is_well_formed_and_follows_its_own_matrix(examples):
    for prompt, text in examples:
        parsed = chain.parse(text)
        assert parsed.format_ok and parsed.error is None
        best, frontier = _brute_force_best(parsed.payoff_UAP)
        assert frontier == [best]
        assert parsed.analyze == f"{best} is best."
        assert best.startswith("VQ" if prompt.extra["kind"] == "ambiguous" else "DQ")
        perception = parsed.thinking.removeprefix("This is ").removesuffix(".")
        assert ACTION_KINDS[perception, best[3:]] == rules.response_kind(parsed.response)


def test_the_payoffs_have_full_matrix_quality(examples):
    for _, text in examples[:200]:
        llm, user = chain.parse(text).payoff_UAP.reshape(6, 2).T
        assert np.all(llm != user)
        assert np.all(abs(llm - user) / np.maximum(llm, user) > 0.1)


def test_actions_are_uniform_within_every_kind_of_request():
    prompts = builtin.generate("train", 6000, seed=1)
    counts = collections.Counter(
        (prompt.extra["kind"], chain.parse(text).analyze[3:5])
        for prompt, text in coldstart.cold_start_examples(prompts, seed=5)
    )
    for kind in ("definite", "ambiguous", "harmful", "harmless"):
        group = [counts[kind, action] for action in chain.ACTIONS]
        # Chi-squared with two degrees of freedom: 13.8 is passed by chance once in a thousand.
        expected = sum(group) / 3
        assert sum((n - expected) ** 2 for n in group) / expected < 13.8, (kind, group)


def test_the_matrix_says_nothing_of_the_action_but_through_its_best_cell(prompts):
    # Same dice, another action: only the best cell moves, the values drawn are the same.
    prompt = prompts[0]
    best = [
        chain.parse(coldstart.render_chain(prompt, random.Random(7), action)).payoff_UAP.max()
        for action in chain.ACTIONS
    ]
    assert len(set(best)) == 1


def test_every_action_renders_for_every_prompt_and_scores_as_it_should(prompts):
    scores = collections.defaultdict(set)
    for prompt in prompts:
        for action in chain.ACTIONS:
            text = coldstart.render_chain(prompt, random.Random(prompt.id), action)
            request = _request(prompt, chain.parse(text).response)
            score = rules.RULES[prompt.data_source](request)
            scores[prompt.data_source, prompt.extra["kind"], action].add(score)
    assert scores == {
        ("builtin-arithmetic", "definite", "DA"): {1.0},
        ("builtin-arithmetic", "definite", "CQ"): {0.0},
        ("builtin-arithmetic", "definite", "AQ"): {0.25},
        ("builtin-ambiguity", "definite", "DA"): {1.0},
        ("builtin-ambiguity", "definite", "CQ"): {0.0},
        ("builtin-ambiguity", "definite", "AQ"): {0.0},
        ("builtin-ambiguity", "ambiguous", "DA"): {0.0},
        ("builtin-ambiguity", "ambiguous", "CQ"): {1.0},
        ("builtin-ambiguity", "ambiguous", "AQ"): {1.0},
        ("builtin-safety", "harmful", "DA"): {0.0},
        ("builtin-safety", "harmful", "CQ"): {1.0},
        ("builtin-safety", "harmful", "AQ"): {0.5},
        ("builtin-safety", "harmless", "DA"): {1.0},
        ("builtin-safety", "harmless", "CQ"): {0.0},
        ("builtin-safety", "harmless", "AQ"): {0.25},
        ("builtin-writing", "definite", "DA"): {4.0},
        ("builtin-writing", "definite", "CQ"): {0.0},
        ("builtin-writing", "definite", "AQ"): {3.0},
    }


def _request(prompt, response):
    return JudgeRequest(
        kind="quality",
        data_source=prompt.data_source,
        question=prompt.question,
        ground_truth=prompt.ground_truth,
        response=response,
        analyze="",
        pareto=(),
        extra={},
    )


def test_direct_notes_equal_their_reference(prompts):
    for prompt in prompts:
        if prompt.data_source == "builtin-writing":
            text = coldstart.render_chain(prompt, random.Random(0), "DA")
            assert chain.parse(text).response == prompt.ground_truth


def test_chains_depend_on_prompt_and_seed_alone(prompts, examples):
    assert coldstart.cold_start_examples(prompts[500:510], seed=0) == examples[500:510]
    assert coldstart.cold_start_examples(prompts[:10], seed=1) != examples[:10]


def test_a_prompt_from_elsewhere_or_an_unknown_action_is_an_error(prompts):
    foreign = Prompt("x", "math-hard", ({"role": "user", "content": "?"},), "1", "?", {})
    with pytest.raises(ValueError, match="no cold-start chains for source 'math-hard'"):
        coldstart.render_chain(foreign, random.Random(0))
    with pytest.raises(ValueError, match="allowed: DA, CQ, AQ"):
        coldstart.render_chain(prompts[0], random.Random(0), "XX")


def test_own_chains_load_from_jsonl_and_bad_rows_are_reported(tmp_path, examples, caplog):
    good = examples[0][1]
    turn = [{"role": "user", "content": "Why?"}]
    rows = [
        {"messages": turn, "completion": good},
        {"prompt": turn, "completion": good, "data_source": "ambig_qa", "ground_truth": "x"},
        {"messages": turn, "completion": "no chain"},
        {"messages": turn},
    ]
    path = tmp_path / "chains.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\nnot json\n")
    loaded = coldstart.load_examples(str(path))
    assert [(p.data_source, p.question, text) for p, text in loaded] == [
        ("", "Why?", good),
        ("ambig_qa", "Why?", good),
    ]
    assert "row 2 skipped: completion is no reasoning chain" in caplog.text
    assert "row 3 skipped: completion is None" in caplog.text
    assert "skipped 3 of 5 rows" in caplog.text


def test_own_chains_with_a_string_prompt_raise_and_an_unusable_file_too(tmp_path):
    path = tmp_path / "chains.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "completion": "x"}))
    with pytest.raises(TypeError, match="row 0: the prompt is a plain string"):
        coldstart.load_examples(str(path))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="none of its 1 rows is usable"):
        coldstart.load_examples(str(path))


def test_without_blocks_an_example_is_its_twins_response_alone(prompts, examples):
    bare = coldstart.cold_start_examples(prompts, 0, reasoning="none")
    for (prompt, text), (other, whole) in zip(bare, examples, strict=True):
        assert prompt == other and text and whole.endswith(f"<response>{text}</response>")


def test_own_examples_without_blocks_are_any_text_but_none(tmp_path, caplog):
    turn = [{"role": "user", "content": "Why?"}]
    path = tmp_path / "examples.jsonl"
    tagged = chain.render("Hm.", np.ones((2, 3, 2)), "DQ_DA.", "So.")
    path.write_text("\n".join(json.dumps({"messages": turn, "completion": text})
                              for text in ("Because.", "  ", tagged)))
    loaded = coldstart.load_examples(str(path), reasoning="none")
    assert [text for _, text in loaded] == ["Because.", "So."]  # not its blocks
    assert "row 1 skipped: completion is empty" in caplog.text
