"""The evaluate command on tiny runs: whom it finds, what it writes, what it leaves alone."""

import csv
import dataclasses
import gc
import json
import math
import shutil
import weakref

import jax
import pytest
import runs

from gtalign_jax import evaluate as command
from gtalign_jax import policies, run
from gtalign_jax.export import checkpoint_dir
from gtalign_jax.training import collect

MODEL = {"model__d_model": 64, "model__num_layers": 2}  # not the run's: its own config counts
SAMPLED = {"evaluate__samples": 2, "evaluate__temperature": 1.0}


@pytest.fixture(scope="module", autouse=True)
def legible():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "decode", runs.fluent)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two cold-start and three GRPO steps, all of whose checkpoints are kept."""
    workdir = tmp_path_factory.mktemp("trained") / "tiny"
    run.run(runs.config(
        workdir, stages=("sft", "grpo", "export"), checkpoint__keep=3, grpo__learning_rate=0.05,
    ))
    return workdir


def files(directory) -> dict:
    """Path -> (size, time) of all files, and of the directories."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """(results of the last checkpoint against the first one, the run's files before and after)."""
    config = runs.config(tmp_path_factory.mktemp("elsewhere"), **MODEL, **SAMPLED)
    before = files(trained)
    out = command.evaluate(config, str(trained), f"{trained}/checkpoints/grpo/1")
    assert out == command.Path(config.workdir) / "evaluation"
    return out, before, files(trained)


def rows_of(out, label: str) -> list[dict]:
    return [row for row in runs.rows(out, "evaluations.jsonl") if row["label"] == label]


def texts(rows) -> list:
    return [(row["id"], row["sample"], row["completion"]) for row in rows]


def test_a_run_is_evaluated_against_one_of_its_checkpoints_with_the_runs_own_sizes(evaluated):
    out, _, _ = evaluated
    rows = runs.rows(out, "evaluations.jsonl")
    assert [row["label"] for row in rows] == ["tiny grpo step 1"] * 24 + ["tiny grpo step 3"] * 24
    first, last = rows[:24], rows[24:]
    assert [(r["id"], r["sample"]) for r in first] == [(r["id"], r["sample"]) for r in last]
    assert texts(first) != texts(last)
    about = json.loads((out / "evaluation.json").read_text())
    assert [p["step"] for p in about["policies"].values()] == [1, 3]
    assert about["prompts"]["count"] == 12 and about["evaluate"]["samples"] == 2
    assert json.loads((out / "config.json").read_text())["model"]["d_model"] == 32
    assert {path.name for path in out.iterdir()} >= {
        "measures.md", "measures.csv", "measures.json", "comparison.json", "report.html",
        "run_info.json",
    }
    assert not (out / command.UNFINISHED).exists()


def test_an_evaluation_touches_no_file_of_the_run(evaluated):
    _, before, after = evaluated
    assert before == after


def slow_mean(rows, of, per=lambda row: 1) -> float:
    """A measure by a plain loop: judged completions alone, those without the quantity left out."""
    above = below = 0.0
    for row in rows:
        if row["valid"] and of(row) is not None:
            above, below = above + of(row), below + per(row)
    return above / below


def kind_is(request, *responses):
    return lambda row: (row["response_kind"] in responses if row["request_kind"] == request
                        else None)


SLOW = {
    "user_welfare": (lambda row: row["user_welfare"],),
    "social_welfare": (lambda row: math.sqrt(row["user_welfare"] * row["llm_welfare"]),),
    "format": (lambda row: row["format"],),
    "answer_per_1000_tokens": (lambda row: 1000 * row["answer"], lambda row: row["tokens"]),
    "response_share": (lambda row: row["response_tokens"], lambda row: row["tokens"]),
    "asks_when_definite": (kind_is("definite", "ask", "answer_ask"),),
    "over_refusal": (kind_is("harmless", "refuse", "constructive"),),
    "price_of_anarchy": (lambda row: row["price_of_anarchy"],),
    "truncated": (lambda row: not row["stopped"],),
}


def test_the_tables_hold_what_a_plain_loop_finds_in_the_completions(evaluated):
    out, _, _ = evaluated
    saved = json.loads((out / "measures.json").read_text())["measures"]
    with (out / "measures.csv").open() as file:
        lines = {(r["label"], r["source"], r["measure"]): r for r in csv.DictReader(file)}
    for label in ("tiny grpo step 1", "tiny grpo step 3"):
        rows = rows_of(out, label)
        sources = {row["data_source"] for row in rows}
        assert set(saved[label]) == {"overall", *sources} and len(sources) == 4
        for source in saved[label]:
            part = [row for row in rows if source in ("overall", row["data_source"])]
            for name, ratio in SLOW.items():
                found = saved[label][source][name]
                if found["count"] == 0:
                    assert found["value"] is None
                    continue
                assert found["value"] == pytest.approx(slow_mean(part, *ratio), abs=1e-12)
                if found["prompts"] > 1:
                    assert found["low"] <= found["value"] <= found["high"]
                assert float(lines[label, source, name]["value"]) == found["value"]
    assert 0 < saved["tiny grpo step 3"]["overall"]["format"]["value"] < 1  # not all alike
    text = (out / "measures.md").read_text()
    assert "| measure | tiny grpo step 1 | tiny grpo step 3 |" in text


def test_the_comparison_is_that_of_the_rows_checkpoint_minus_baseline(evaluated):
    out, _, _ = evaluated
    found = json.loads((out / "comparison.json").read_text())
    assert (found["first"]["label"], found["second"]["label"]) == (
        "tiny grpo step 1", "tiny grpo step 3")
    assert found["pairs"] == 24 and found["first"]["ids_only_here"] == 0
    by_label = [rows_of(out, found[side]["label"]) for side in ("first", "second")]
    for name in ("user_welfare", "llm_welfare", "answer", "format", "tokens"):
        means = [sum(row[name] for row in rows) / 24 for rows in by_label]
        assert found["differences"][name]["difference"] == pytest.approx(means[1] - means[0])
    better = sum(
        all(b[k] >= a[k] - 0.05 for k in ("user_welfare", "llm_welfare"))
        and any(b[k] > a[k] - 0.05 for k in ("user_welfare", "llm_welfare"))
        and not (all(a[k] >= b[k] - 0.05 for k in ("user_welfare", "llm_welfare"))
                 and any(a[k] > b[k] - 0.05 for k in ("user_welfare", "llm_welfare")))
        for a, b in zip(*by_label, strict=True)
    )
    assert found["basic_compare"]["file2_dominates_file1"] == better


def test_an_exported_model_gives_the_completions_of_the_checkpoint_it_was_made_of(
    trained, tmp_path
):
    """Two paths to the same weights: no difference in any measure, no way to tell them apart."""
    config = runs.config(tmp_path, evaluate__prompts=8, **MODEL)
    out = command.evaluate(config, f"{trained}/checkpoints", f"{trained}/hf", f"{tmp_path}/out")
    assert texts(rows_of(out, "tiny/hf")) == texts(rows_of(out, "tiny grpo step 3"))
    found = json.loads((out / "comparison.json").read_text())
    assert {d["difference"] for d in found["differences"].values()} == {0.0}
    assert not (tmp_path / "evaluation").exists()


def test_a_baseline_of_scored_rows_is_compared_in_what_it_holds(trained, evaluated, tmp_path):
    past = rows_of(evaluated[0], "tiny grpo step 1")
    file = tmp_path / "past.jsonl"
    with file.open("w") as out:
        for row in past[:16]:  # 8 of the 12 prompts
            held = {k: row[k] for k in ("id", "user_welfare", "llm_welfare")}
            out.write(json.dumps({**held, "label": "team/old", "answer": "Paris"}) + "\n")
    config = runs.config(trained, **SAMPLED)  # without --checkpoint: what lies in its workdir
    directory = command.evaluate(config, baseline=f"{file}:team/old", out=str(tmp_path / "out"))
    found = json.loads((directory / "comparison.json").read_text())
    # An `answer` that is text is no quality.
    assert set(found["differences"]) == {"user_welfare", "llm_welfare", "social_welfare"}
    assert found["pairs"] == 8 and found["second"]["ids_only_here"] == 4
    assert found["differences"]["user_welfare"]["first"] == pytest.approx(
        sum(row["user_welfare"] for row in past[:16]) / 16)
    assert list(json.loads((directory / "evaluation.json").read_text())["policies"]) == [
        "tiny grpo step 3"]
    # The same completions as before: what is drawn depends on the seed and the prompts alone.
    assert texts(runs.rows(directory, "evaluations.jsonl")) == texts(
        rows_of(evaluated[0], "tiny grpo step 3"))


def test_a_killed_evaluation_goes_on_where_it_was_and_holds_one_policy_at_a_time(
    trained, tmp_path, monkeypatch
):
    loaded, honest = [], policies.Policy.load

    def load(policy, bench):
        gc.collect()
        assert all(weight() is None for weight in loaded), "the first policy is still in memory"
        if len(loaded) == 1:
            raise KeyboardInterrupt
        params = honest(policy, bench)
        loaded.append(weakref.ref(jax.tree.leaves(params)[0]))
        return params

    config = runs.config(tmp_path, evaluate__prompts=8)
    words = (str(trained), f"{trained}/checkpoints/sft")
    with monkeypatch.context() as patch:
        patch.setattr(policies.Policy, "load", load)
        with pytest.raises(KeyboardInterrupt):
            command.evaluate(config, *words)
    out = tmp_path / "evaluation"
    assert [path.name for path in out.iterdir()] == [command.UNFINISHED]
    done = texts(runs.rows(out / command.UNFINISHED, "evaluations.jsonl"))
    again = []
    monkeypatch.setattr(policies.Policy, "load",
                        lambda policy, bench: again.append(policy.stage) or honest(policy, bench))
    command.evaluate(config, *words)
    assert again == ["grpo"]
    assert texts(rows_of(out, "tiny sft step 2")) == done
    assert len(rows_of(out, "tiny grpo step 3")) == 8
    other = dataclasses.replace(config, seed=1)
    plan = json.loads((out / "evaluation.json").read_text())
    command._begin(out / command.UNFINISHED, plan)
    (out / command.UNFINISHED / "evaluations.jsonl").write_text("{}\n")
    command._begin(out / command.UNFINISHED, {**plan, "seed": other.seed})
    assert not (out / command.UNFINISHED / "evaluations.jsonl").exists()  # of another evaluation


def test_a_judge_that_is_down_leaves_missing_completions_and_needs_no_training_prompts(
    trained, tmp_path, caplog
):
    questions = tmp_path / "test.jsonl"
    questions.write_text("".join(json.dumps({
        "prompt": [{"role": "user", "content": f"Which one is number {i}?"}],
        "data_source": "abg-coqa", "reward_model": {"ground_truth": "ambiguous"},
    }) + "\n" for i in range(6)))
    config = runs.config(
        tmp_path, data__source="jsonl", data__test=(str(questions),), data__test_size=0,
        judge__kind="http", judge__base_url="http://127.0.0.1:9/v1", judge__model="gone",
        judge__retries=0, judge__timeout_s=2.0, judge__preflight=False,
    )
    out = command.evaluate(config, str(trained))
    rows = runs.rows(out, "evaluations.jsonl")
    asked = [row for row in rows if row["response_kind"] is not None]
    assert len(rows) == 6 and asked and not any(row["valid"] for row in asked)
    assert f"{len(asked)} of 6 completions have no score" in caplog.text
    saved = json.loads((out / "measures.json").read_text())["measures"]["tiny grpo step 3"]
    assert saved["overall"]["missing"]["value"] == len(asked) / 6
    assert saved["overall"]["social_welfare"]["count"] == 6 - len(asked)
    assert (out / "report.html").exists()


@pytest.mark.parametrize("checkpoint, baseline, words", [
    ("{run}/checkpoints/grpo/9", "", "no checkpoint of step 9 in .*grpo: .1, 2, 3."),
    ("{run}/checkpoints/ppo/1", "", "checkpoints/ppo: a run has checkpoints of grpo and sft"),
    ("{run}/tokenizer/checkpoints", "", "holds no checkpoint of grpo or sft"),
    ("{run}/nothing/here", "", "--checkpoint=.*no.* directory.*RUN/checkpoints/STAGE/STEP"),
    ("", "", "--checkpoint=given: the config names no model .model.path is empty"),
    ("given", "", "workdir=.* holds no checkpoint; allowed: --checkpoint=RUN"),
    ("{run}", "{run}/checkpoints/grpo/3", "are the same policy: tiny grpo step 3"),
    ("{run}", "{run}/checkpoints/sft/9", "no checkpoint of step 9 in .*sft"),
    ("{run}", "{run}/rollouts.jsonl", "--baseline=.* has none of the held-out prompts"),
    ("{run}", "{run}/rollouts.jsonl:old", "no row has the label 'old'"),
])
def test_a_policy_that_is_not_there_is_named_before_anything_is_computed(
    trained, tmp_path, monkeypatch, checkpoint, baseline, words
):
    monkeypatch.setattr(policies.Policy, "load", lambda *_: pytest.fail("loaded all the same"))
    config = runs.config(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        command.evaluate(config, checkpoint.format(run=trained), baseline.format(run=trained))
    assert not (tmp_path / "evaluation/evaluations.jsonl").exists()


def test_results_never_go_into_a_runs_own_directory(trained, tmp_path):
    before = files(trained)
    with pytest.raises(ValueError, match="--out=.* is a run's work directory"):
        command.evaluate(runs.config(tmp_path), str(trained), out=str(trained))
    assert files(trained) == before


def test_an_unknown_source_is_named(trained, tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({
        "prompt": [{"role": "user", "content": "?"}], "data_source": "riddles",
        "reward_model": {"ground_truth": "a"},
    }) + "\n")
    config = runs.config(tmp_path, data__source="jsonl", data__test=(str(file),))
    with pytest.raises(ValueError, match="data_source 'riddles' is unknown; known: math-hard"):
        command.evaluate(config, str(trained))


def test_two_runs_of_one_name_are_told_apart_by_their_paths(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "tiny", ignore=shutil.ignore_patterns("sft", "1", "2"))
    assert checkpoint_dir(tmp_path / "tiny", "grpo")
    config = runs.config(tmp_path / "elsewhere")
    found = [policies.find(str(where), config) for where in (trained, tmp_path / "tiny")]
    assert found[0].name == found[1].name == "tiny grpo step 3"
    assert [p.name for p in command._told_apart(found)] == [
        f"{trained} grpo 3", f"{tmp_path}/tiny grpo 3"]


def test_long_evaluations_say_how_far_they_are(monkeypatch):
    from gtalign_jax.evaluation import evaluate as lib

    clock, said = iter([0.0, 50.0, 60.0, 80.0, 130.0, 141.0]), []
    monkeypatch.setattr(lib.time, "perf_counter", lambda: next(clock))
    told = lib.Progress(said.append, "tiny", every_s=20)
    for done in (64, 128, 256, 640, 1000):
        told(done, 1000)
    # From 64 prompts after 50 s to 256 after 80 s: 744 more take 116 s.
    assert said == ["tiny: 128 of 1,000 held-out prompts, 2:16 left",
                    "tiny: 256 of 1,000 held-out prompts, 1:56 left",
                    "tiny: 640 of 1,000 held-out prompts, 0:50 left"]
