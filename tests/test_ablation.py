"""Which differences between rewards are more than luck: by hand, by slow loops, on made-up runs."""

import csv
import json
import math
import zlib

import numpy as np
import pytest

from gtalign_jax.evaluation import ablation_tables, pareto
from gtalign_jax.evaluation.ablation import Comparison, bare_social_welfare
from gtalign_jax.reward.factors import LLMWeights

WEIGHTS = LLMWeights()
PROMPTS, SAMPLES = 24, 2


def row(id_, sample, **changes):
    return {
        "id": id_, "sample": sample, "question": f"{id_}?", "data_source": "builtin-arithmetic",
        "valid": True, "stopped": True, "user_welfare": 0.8, "llm_welfare": 0.5, "q_llm": 1.0,
        "verbosity": 0.1, "answer": 1.0, "format": 1.0, "right_action": True, "consistency": 1.0,
        "matrix_quality": 1.0, "payoff": {}, "tokens": 60, "reasoning_tokens": 40,
        "response_tokens": 20, "response_words": 12, "request_kind": "definite",
        "response_kind": "answer", "judge_score": 1.0, "dilemma": 0.0, "price_of_anarchy": 1.0,
    } | changes  # fmt: skip


def made_up(mean, seeds=(0, 1, 2), spread=0.05, sources=("builtin-arithmetic",)):
    """{seed: rows} whose user welfare scatters around `mean`, or `mean[seed]`."""
    out = {}
    for seed in seeds:
        rng = np.random.default_rng([7, seed])
        level = mean[seed] if isinstance(mean, dict) else mean
        out[seed] = [
            row(f"p{i:02d}", g, user_welfare=float(level + spread * rng.standard_normal()),
                data_source=sources[i % len(sources)])
            for i in range(PROMPTS) for g in range(SAMPLES)
        ]
    return out


def test_social_welfare_without_tags_is_rescaled_by_hand():
    of = bare_social_welfare(WEIGHTS).of
    # L0 = (0.4 * 0.5 + 0.2 * 0.1) / 0.6, whatever format and matrix are
    wanted = math.sqrt(0.8 * (0.4 * 0.5 + 0.2 * 0.1) / 0.6)
    for tags in (0.0, 1.0):
        assert of(row("a", 0, q_llm=0.5, format=tags, matrix_quality=tags)) == pytest.approx(wanted)
    assert of(row("a", 0, user_welfare=0.0)) == 0.0


def test_values_are_of_all_seeds_together_and_of_each():
    rows = {0: [row("a", 0, tokens=10, answer=1.0), row("b", 0, tokens=30, answer=0.5)],
            4: [row("a", 0, tokens=20, answer=0.0), row("b", 0, tokens=40, answer=0.5)]}
    found = Comparison({"x": rows}, WEIGHTS, resamples=20).outcomes("x")
    assert found["answer"].value == pytest.approx(0.5)
    assert found["answer"].by_seed == pytest.approx({0: 0.75, 4: 0.25})
    ratio = found["answer_per_1000_tokens"]
    assert ratio.value == pytest.approx(1000 * 2.0 / 100)  # a ratio of sums, over seeds too
    assert ratio.by_seed == pytest.approx({0: 1000 * 1.5 / 40, 4: 1000 * 0.5 / 60})
    assert math.isnan(found["harm"].value) and math.isnan(found["harm"].low)


def test_the_interval_is_that_of_a_slow_loop_over_seeds_and_prompts():
    sources = ("builtin-arithmetic", "builtin-writing")
    rows, Z = made_up({0: 0.5, 1: 0.6, 2: 0.8}, sources=sources), 400
    found = Comparison({"x": rows}, WEIGHTS, seed=3, resamples=Z).outcomes("x")["user_welfare"]
    seeds_ZS = np.random.default_rng([3, 3]).multinomial(3, np.full(3, 1 / 3), size=Z)
    half = PROMPTS // 2
    weights = {
        s: np.random.default_rng([3, zlib.crc32(s.encode())]).multinomial(
            half, np.full(half, 1 / half), size=Z)
        for s in sources
    }
    means = []
    for z in range(Z):
        total = count = 0.0
        for seed in range(3):
            for i in range(PROMPTS):
                times = seeds_ZS[z, seed] * weights[sources[i % 2]][z, i // 2]
                for r in rows[seed]:
                    if r["id"] == f"p{i:02d}":
                        total += times * r["user_welfare"]
                        count += times
        means.append(total / count)
    assert (found.low, found.high) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=1e-12)
    # Seeds that disagree make it wide: prompts alone would give 2 * 1.96 * 0.05 / sqrt(24 * 6).
    assert found.high - found.low > 0.15


def test_a_difference_is_shown_where_interval_test_and_all_seeds_agree():
    policies = {
        "base": made_up(0.5), "better": made_up(0.7), "same": made_up(0.5),
        "torn": made_up({0: 0.8, 1: 0.8, 2: 0.45}),
    }
    found = Comparison(policies, WEIGHTS).contrasts("base", ["better", "same", "torn"])
    better, same, torn = (found[n]["user_welfare"] for n in ("better", "same", "torn"))
    assert better.shown and better.difference == pytest.approx(0.2) and better.p < 0.05
    assert better.low == pytest.approx(0.2) and better.high == pytest.approx(0.2)  # same draws
    assert not same.shown and same.p == 1.0 and same.low == same.high == 0.0
    assert torn.difference > 0.15 and torn.p < 0.05 and not torn.shown  # one seed says otherwise
    assert torn.by_seed[2] == pytest.approx(-0.05)
    assert math.isnan(found["better"]["response_words"].p)  # not one of those that are tested


def test_policies_are_compared_on_the_seeds_that_both_have():
    policies = {"base": made_up({0: 0.5, 1: 0.9}, seeds=(0, 1)), "late": made_up(0.6, seeds=(0, 2)),
                "other": made_up(0.6, seeds=(5,))}
    found = Comparison(policies, WEIGHTS, resamples=50).contrasts("base", ["late", "other"])
    assert set(found) == {"late"}
    assert found["late"]["user_welfare"].by_seed == pytest.approx({0: 0.1})
    assert found["late"]["user_welfare"].first == pytest.approx(0.5, abs=0.03)


def test_pareto_measures_pair_completions_of_the_same_prompt_seed_and_sample():
    first, second = made_up(0.5), made_up(0.6)
    second[1] = second[1][::-1]  # the order of rows means nothing
    failed = first[2][5]
    failed.update(valid=False, user_welfare=0.0)
    found = Comparison({"a": first, "b": second}, WEIGHTS).pareto("a", "b", eps=0.05)
    pairs = [(one, other) for s in range(3) for one in first[s] for other in second[s]
             if (one["id"], one["sample"]) == (other["id"], other["sample"]) and one["valid"]]
    assert len(pairs) == 3 * PROMPTS * SAMPLES - 1
    wanted = pareto.compare(*(
        np.array([[r["user_welfare"], r["llm_welfare"]] for r in side])
        for side in zip(*pairs, strict=True)), 0.05)
    assert found["basic_compare"] == wanted["basic_compare"]
    assert found["hypervolume_exact"] == pytest.approx(wanted["hypervolume_exact"])


def test_runs_that_answered_other_prompts_are_refused():
    other = made_up(0.5)
    other[1][0]["question"] = "another"
    with pytest.raises(ValueError, match="b, seed 1: 48 completions, and not of the same prompts"):
        Comparison({"a": made_up(0.5), "b": other}, WEIGHTS)


def test_prompts_that_a_run_left_out_as_too_long_are_left_out_of_all():
    fewer = made_up(0.7)
    lost = fewer[1][0]["id"]
    fewer[1] = [row for row in fewer[1] if row["id"] != lost]
    first = made_up(0.5)
    comparison = Comparison({"a": first, "b": fewer}, WEIGHTS, resamples=100)
    assert comparison.left_out == 1
    kept = {s: [row for row in rows if row["id"] != lost] for s, rows in first.items()}
    alone = Comparison({"a": kept}, WEIGHTS, resamples=100)
    assert repr(comparison.outcomes("a")) == repr(alone.outcomes("a"))
    with pytest.raises(ValueError, match="no held-out prompt in common"):
        Comparison({"a": first, "b": {0: [{**first[0][0], "id": "elsewhere"}]}}, WEIGHTS)


def test_a_policy_that_no_judge_answered_about_ends_no_comparison():
    silent = {s: [row | {"valid": False} for row in rows] for s, rows in made_up(0.5).items()}
    policies = {"cobb_douglas": made_up(0.6), "linear": silent}
    found = ablation_tables.find(Comparison(policies, WEIGHTS, resamples=50), {})
    assert found.pareto == {} and not found.contrasts["linear"]["social_welfare"].shown
    assert math.isnan(found.contrasts["linear"]["social_welfare"].p)
    assert "linear" in ablation_tables.markdown(found)


def test_without_the_reference_no_question_about_it_is_answered():
    policies = {"linear": made_up(0.6), "rawls": made_up(0.5), "untagged": made_up(0.7)}
    said = ablation_tables.words(
        ablation_tables.find(Comparison(policies, WEIGHTS, resamples=50), {}))
    assert len(said) == 1 and said[0].startswith("The highest social welfare")


@pytest.fixture(scope="module")
def found():
    formless = {s: [r | {"format": 0.2, "llm_welfare": 0.3} for r in rows]
                for s, rows in made_up(0.6).items()}
    policies = {"cold_start": made_up(0.3), "cobb_douglas": made_up(0.6), "linear": made_up(0.6),
                "user": formless, "untagged": made_up(0.65)}
    return ablation_tables.find(Comparison(policies, WEIGHTS, resamples=400), {"w/llm": "diverged"})


def test_words_say_shown_only_of_what_is(found):
    said = dict(line.split(": ", 1) for line in ablation_tables.words(found)[1:-1])
    gain = said["What training adds to the cold start"]  # sqrt(0.6 * 0.5) - sqrt(0.3 * 0.5)
    assert "**shown: higher**" in gain and "a difference of +0.16" in gain
    assert gain.index("for Cobb-Douglas") < gain.index("for cold start")
    assert "**a difference is not shown**" in said["Product or mean of both welfares"]
    form = said["What a user-only reward does to the format"]
    assert "20.0% for user only U and 100.0%" in form and "-80.0 pt" in form
    assert form.endswith("**shown: lower**.")
    assert "a difference is not shown" in ablation_tables.words(found)[0]  # of the best two
    assert ablation_tables.words(found)[-1] == "w/llm has no numbers: diverged"
    assert not [line for line in said if "LLM-only" in line]  # that reward was not run


def test_files_hold_every_policy_and_what_is_missing_is_empty(found, tmp_path):
    ablation_tables.save(tmp_path, found)
    text = (tmp_path / "ablation.md").read_text()
    for name in found.outcomes:
        assert f"| {ablation_tables.label(name)} |" in text
    assert "24 held-out prompts, 48 completions, with 3 training seeds (0, 1, 2)" in text
    assert "| w/llm | diverged |" in text
    whole = json.loads((tmp_path / "ablation.json").read_text())
    assert whole["outcomes"]["user"]["harm"]["value"] is None  # nobody asked for harm
    assert whole["contrasts"]["user"]["format"]["shown"] is True
    with (tmp_path / "ablation.csv").open(newline="") as file:
        lines = {tuple(line.values())[:4]: line for line in csv.DictReader(file)}
    assert float(lines["user", "cobb_douglas", "format", "all"]["value"]) == pytest.approx(-0.8)
    assert lines["user", "cobb_douglas", "format", "all"]["shown"] == "1"
    assert float(lines["linear", "", "format", "2"]["value"]) == 1.0
    assert lines["user", "", "harm", "all"]["value"] == ""
    assert len(lines) == (5 + 4) * len(found.measures) * 4  # all seeds, and each of three
