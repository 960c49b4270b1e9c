"""The reward-hacking panel: figures counted by hand, and warnings about what lasts."""

import re
import types

import numpy as np
import pytest
import runs
import test_collect

from gtalign_jax.freeze import to_config_dict
from gtalign_jax.game.chain import KEYS, parse, render
from gtalign_jax.training.collect import log_rows
from gtalign_jax.training.metrics import MetricsWriter
from gtalign_jax.training.panel import HALF, KINDS, SUSTAINED, Suspicions, panel

experience = test_collect.experience  # two prompts x two samples, the last one missing

OTHER = {key: {"LLM": 1, "user": i} for i, key in enumerate(KEYS)}
QUESTION = "please tell me the height of the tower in feet"


def made(responses, samples, *, question=QUESTION, matrices=None, **given):
    """An experience of these responses (None: no chain), of which all are judged unless `given`."""
    B = len(responses)
    matrices = matrices or [runs.PAYOFF] * B
    chains = [parse("no chain" if text is None else render("Hm.", matrix, "DQ_DA.", text))
              for text, matrix in zip(responses, matrices, strict=True)]
    scores = types.SimpleNamespace(
        chains=chains, valid_B=np.array(given.get("valid", [True] * B)),
        parsed_B=np.array([chain.payoff is not None for chain in chains]),
        payoff_BUAP=np.array([np.zeros((2, 3, 2)) if chain.payoff_UAP is None else chain.payoff_UAP
                              for chain in chains]),
        reward_B=np.array(given.get("reward", [0.5] * B)),
        factors={"answer": np.array(given.get("answer", [0.5] * B))},
    )
    return types.SimpleNamespace(
        scores=scores, rows_B=np.arange(B), samples=samples,
        prompts=[types.SimpleNamespace(question=question)] * B,
        lengths_B=np.array(given.get("lengths", [100] * B)),
    )


def figure(name, *args, **kwargs):
    return panel(made(*args, **kwargs)).get(f"hacking/{name}")


# ----------------------------------------------------------------------------- texts


def test_repeated_ngrams_are_those_that_stood_in_the_response_before():
    """a b c d | b c d a | c d a b | d a b c | a b c d: one of five. Shares, not counts: with the
    second response, of which nothing is repeated, (1/5 + 0) / 2."""
    assert figure("repeated_ngrams", ["a b c d a b c d"], 1) == pytest.approx(1 / 5)
    both = ["a B c D  A b\nC d", " ".join(map(str, range(30)))]
    assert figure("repeated_ngrams", both, 2) == pytest.approx(1 / 10)
    assert figure("repeated_ngrams", ["same " * 40], 1) == pytest.approx(36 / 37)


def test_responses_too_short_for_an_ngram_are_in_no_mean():
    """Counted as nothing repeated, they would hide what the others do."""
    assert figure("repeated_ngrams", ["a b c d a b c d", "a a a", None], 3) == pytest.approx(1 / 5)
    assert figure("repeated_ngrams", ["a a a", None], 2) is None


def test_a_copied_prompt_is_the_users_question_and_not_the_instruction():
    """Of the 6 distinct 4-grams of the response, 3 are in the question."""
    copied = "The height of the tower is unknown to me"
    assert figure("copied_prompt", [copied], 1) == pytest.approx(2 / 6)
    assert figure("copied_prompt", [QUESTION.upper()], 1) == 1
    assert figure("copied_prompt", [QUESTION * 3], 1) < 1  # "feetplease" stands in no question
    assert figure("copied_prompt", ["Treat this turn as a game"], 1) == 0
    assert figure("copied_prompt", [QUESTION], 1, question="too short here") is None


def test_duplicates_are_counted_within_their_group():
    """Group one: x x y. Group two: x z, no chain. The x of group two has no twin in it."""
    found = figure("duplicate_responses", ["x", "x", "y", "x", "z", None], 3)
    assert found == pytest.approx(2 / 5)


# ----------------------------------------------------------------------------- matrices


def test_the_most_frequent_matrix_is_a_share_of_the_readable_ones():
    matrices = [runs.PAYOFF, OTHER, runs.PAYOFF, runs.PAYOFF, OTHER]
    out = panel(made(["x", "x", "x", None, "x"], 5, matrices=matrices))
    assert out["hacking/same_matrix"] == pytest.approx(2 / 4)
    assert out["hacking/distinct_matrices"] == pytest.approx(2 / 4)


def test_zero_and_minus_zero_are_one_payoff():
    signed = {**OTHER, KEYS[0]: {"LLM": 1, "user": -0.0}}
    assert figure("same_matrix", ["x", "x"], 2, matrices=[OTHER, signed]) == 1


def test_without_matrices_there_is_no_share_of_them():
    assert figure("same_matrix", [None, None], 2) is None
    assert figure("distinct_matrices", [None, None], 2) is None


# ----------------------------------------------------------------------------- lengths and scores


def test_length_is_correlated_within_groups_not_between_them():
    """In each group the longer is the better; over the batch long prompts have low rewards."""
    found = panel(made(["x"] * 4, 2, lengths=[10, 20, 100, 110], reward=[0.8, 0.9, 0.1, 0.2],
                       answer=[1.0, 0.0, 1.0, 0.0]))
    assert found["hacking/length_reward"] == pytest.approx(1)
    assert found["hacking/length_answer"] == pytest.approx(-1)


def test_a_correlation_with_what_does_not_vary_is_left_out():
    """Also where a mean of equal values is rounded: 0.1 three times is not 3 x 0.1 / 3."""
    tenths = [0.1, 0.1, 0.1, 0.7, 0.7, 0.7]
    assert figure("length_reward", ["x"] * 6, 3, reward=tenths, lengths=[1, 2, 3, 4, 5, 6]) is None
    assert figure("length_reward", ["x"] * 2, 2, reward=[0.1, 0.2], lengths=[7, 7]) is None


def test_deciles_of_length_hold_the_mean_q_of_a_tenth_each():
    lengths = np.arange(20)[::-1] + 5
    out = panel(made(["x"] * 20, 4, lengths=lengths, answer=np.arange(20) / 20))
    found = [out[f"hacking/q_by_length_{i}"] for i in range(10)]
    np.testing.assert_allclose(found, [(18.5 - 2 * i) / 20 for i in range(10)])


def test_completions_of_one_length_share_the_decile_of_their_middle():
    """Cut at the limit, 6 of 10 are as long as can be: ranks 4 … 9, the middle is in decile 7."""
    lengths, answer = [1, 2, 3, 4] + [99] * 6, [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
    out = panel(made(["x"] * 10, 2, lengths=lengths, answer=answer))
    there = {name[-1]: value for name, value in out.items() if "q_by_length" in name}
    assert there == {"0": 0, "1": 0, "2": 0, "3": 0, "7": 0.5}


@pytest.mark.parametrize("count, deciles", [(1, "5"), (2, "27"), (5, "13579")])
def test_fewer_completions_than_deciles_lie_evenly_and_leave_the_others_out(count, deciles):
    out = panel(made(["x"] * count, 1, lengths=np.arange(count)))
    assert "".join(name[-1] for name in out if "q_by_length" in name) == deciles


def test_a_missing_judgement_is_in_no_score_but_its_text_is_there():
    """As the longest of its group and with a reward of 0 it would turn the sign."""
    given = {"lengths": [10, 20, 90], "reward": [0.4, 0.6, 0.0], "answer": [0.4, 0.6, 0.0]}
    out = panel(made(["x", "x", "a b c d a b c d"], 3, valid=[True, True, False], **given))
    assert out["hacking/length_reward"] == pytest.approx(1)
    assert {name[-1]: out[name] for name in out if "q_by" in name} == {"2": 0.4, "7": 0.6}
    assert out["hacking/repeated_ngrams"] == pytest.approx(1 / 5)


def test_a_batch_of_which_nothing_was_judged_has_no_scores_and_no_nan():
    out = panel(made(["x", None], 2, valid=[False, False]))
    assert out.keys() == {"hacking/duplicate_responses", "hacking/same_matrix",
                          "hacking/distinct_matrices"}
    assert np.isfinite(list(out.values())).all()


def test_the_panel_reads_what_the_collector_makes(experience):
    out = panel(experience)
    assert out["hacking/same_matrix"] == 1 and out["hacking/duplicate_responses"] == 0
    assert out["hacking/copied_prompt"] == 0 and "hacking/length_reward" in out


# ----------------------------------------------------------------------------- suspicions


def said(rows) -> list[tuple[int, str]]:
    watch = Suspicions()
    return [(step, text) for step, row in enumerate(rows, start=1) for text in watch.add(step, row)]


LEVELS = {
    "hacking/repeated_ngrams": (0.19, 0.31, "repeat themselves"),
    "hacking/copied_prompt": (0.49, 0.61, "copy the question"),
    "hacking/same_matrix": (0.89, 0.97, "matrices are one"),
    "grpo/groups_without_signal": (0.94, 1.0, "almost no group"),
}


@pytest.mark.parametrize("metric", LEVELS)
def test_what_lasts_is_said_once_with_figure_threshold_and_steps(metric):
    low, high, words = LEVELS[metric]
    rows = [{metric: low}] * 3 + [{metric: high}] * 20
    (step, text), = said(rows)
    assert step == 3 + SUSTAINED
    assert words in text and f"{metric} is {high:.2f}" in text
    assert f"at each of the steps 4 to {step}" in text and "rollouts.jsonl" in text


@pytest.mark.parametrize("metric", LEVELS)
@pytest.mark.parametrize("gap", ["low", "nan", "null", "absent"])
def test_one_step_without_it_begins_anew(metric, gap):
    low, high, _ = LEVELS[metric]
    other = {"low": {metric: low}, "nan": {metric: float("nan")}, "null": {metric: None},
             "absent": {}}[gap]
    spell = [{metric: high}] * (SUSTAINED - 1)
    assert said([*spell, other, *spell, other, *spell]) == []


def trend(steps=40, noise=0.0, seed=0, **slopes):
    """Rows whose metrics change by so much per step, from 0.5 (length: from 100)."""
    rng = np.random.default_rng(seed)
    names = {"length": "rollout/length", "answer": "reward/answer", "reward": "reward/total"}
    start = {"length": 100.0, "answer": 0.5, "reward": 0.5}
    return [
        {name: start[key] + slopes.get(key, 0.0) * i
               + noise * rng.normal() * (100 if key == "length" else 1)
         for key, name in names.items()}
        for i in range(steps)
    ]


def test_length_that_grows_while_q_does_not_is_suspicious():
    """From 100 tokens by 3 a step: at first ten steps make more than a fifth, later less."""
    (step, text), = said(trend(length=3.0))
    assert step == 2 * HALF + SUSTAINED - 1
    assert "rollout/length went from 126 to 156 tokens" in text  # means of steps 5-14 and 15-24
    assert "reward/answer from 0.5 to 0.5" in text and "reward.reading_words" in text
    assert said(trend(length=3.0, answer=0.005)) == []  # it pays
    assert said(trend(length=-3.0)) == [] and said(trend(length=1.0)) == []


def test_a_reward_that_rises_while_q_falls_is_suspicious():
    (step, text), = said(trend(reward=0.005, answer=-0.005))
    assert step == 2 * HALF + SUSTAINED - 1
    assert "reward/total went from 0.542 to 0.593" in text
    assert "reward/answer from 0.458 to 0.408" in text and "grpo.filter_on='answer'" in text
    for honest in ({"reward": 0.005, "answer": 0.005}, {"reward": -0.005, "answer": -0.005},
                   {"reward": 0.005}, {"reward": 0.0005, "answer": -0.0005}):
        assert said(trend(**honest)) == []


@pytest.mark.parametrize("seed", range(20))
def test_noise_without_a_trend_is_not_suspicious(seed):
    """Of steps of few prompts: Q and reward jump by 0.1, length by a tenth of itself."""
    assert said(trend(steps=200, noise=0.1, seed=seed)) == []


def test_steps_of_which_nothing_is_known_are_passed_over():
    rows = trend(length=3.0)
    holes = [{} if i % 5 == 2 else row for i, row in enumerate(rows)]
    assert len(said(holes)) == 1
    assert said([{} if i % 3 else row for i, row in enumerate(rows)]) == []  # too few to say


@pytest.mark.parametrize("stopped", [2, 6, 12, 24, 30])
def test_a_run_that_resumes_warns_as_one_that_never_stopped(stopped, tmp_path):
    """From what it wrote: a step that had nothing to count is null in the file."""
    rows = [{**row, "hacking/repeated_ngrams": 0.3 if i > 3 else float("nan")}
            for i, row in enumerate(trend(length=3.0))]
    writer = MetricsWriter(tmp_path)
    for step, row in enumerate(rows[:stopped], start=1):
        writer.write("grpo", step, row)
        writer.write("evaluate", step, {"hacking/repeated_ngrams": 0.0})
    again = Suspicions(writer.rows("grpo"))
    writer.close()
    late = [(step, text) for step, row in enumerate(rows[stopped:], start=stopped + 1)
            for text in again.add(step, row)]
    assert late == [entry for entry in said(rows) if entry[0] > stopped]


def test_all_that_the_warnings_point_at_exists(experience):
    """Fields of rollouts.jsonl in backticks, keys of the config by section and name."""
    config = to_config_dict(runs.Config()).to_dict()
    fields = log_rows(experience)[0]
    for kind in KINDS:
        named = re.findall(r"`(\w+)`", kind.advice)
        assert named and fields.keys() >= set(named), kind.name
        keys = re.findall(r"\b(?:grpo|reward|rollout|judge)\.[a-z_.]*[a-z]", kind.advice)
        assert keys, kind.name
        for key in keys:
            at = config
            for part in key.split("."):
                assert part in at, key
                at = at[part]
