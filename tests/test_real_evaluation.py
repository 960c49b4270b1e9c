"""The evaluate command on all seven published sources: every table, and the report.

Nothing is mocked: a cold start trains a tiny model (real.py), a judge on loopback grades, and both
commands run as a user starts them. Only the size is small.
"""

import csv
import json
import math

import pytest
import real

from gtalign_jax.reward.tasks import TASKS

OUT_OF_DOMAIN = ("minerva_math/test", "abg_coqa/test", "advbench/test")
SOURCES = {*real.SOURCES, "minerva", "abg-coqa", "advbench"}
PROMPTS = 42  # spread evenly over the 600 that are drawn of 3,048
STEPS = 130  # whatever the seed, the chain is then known by heart: 80 leave that to luck
TAUGHT = f"run sft step {STEPS}"
TRAIN = {
    "stages": "('sft',)", "model.compute_dtype": "float32", "data.train_size": 24,
    "data.max_prompt_tokens": 1600, "sft.steps": STEPS, "sft.batch_size": 2,
    "sft.micro_batch_size": 0, "sft.learning_rate": 7e-3, "sft.decay": "cosine",
    "sft.warmup_updates": 5, "mesh.tensor": 1, "checkpoint.every": STEPS,
}  # fmt: skip
EVALUATE = {
    "model.compute_dtype": "float32", "data.max_prompt_tokens": 1600, "data.test_size": 600,
    "mesh.tensor": 1, "rollout.max_new_tokens": 136, "evaluate.prompts": PROMPTS,
    "evaluate.batch_size": 14,
}  # fmt: skip


def carried_out(module, config, settings, words, folder, data, judge) -> str:
    """What the command printed; it must have succeeded."""
    log = folder / f"{module}.log"
    flags = {f"config.{key}": value for key, value in settings.items()} | words
    process = real.start(module, config, flags, data, judge, log)
    try:
        assert process.wait(900) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    return log.read_text()


def check_tables(out, rows) -> None:
    """Each of the seven sources is in every table, with numbers that its completions give."""
    saved = json.loads((out / "measures.json").read_text())["measures"][TAUGHT]
    assert set(saved) == SOURCES | {"overall"}
    markdown = (out / "measures.md").read_text()
    with (out / "measures.csv").open(newline="") as file:
        lines = {(r["source"], r["measure"]): r for r in csv.DictReader(file)
                 if r["label"] == TAUGHT}
    for source in SOURCES:
        part = [row for row in rows if row["data_source"] == source]
        welfare = [math.sqrt(row["user_welfare"] * row["llm_welfare"]) for row in part]
        found = saved[source]["social_welfare"]
        assert len(part) == found["count"] >= 3
        assert found["value"] == pytest.approx(sum(welfare) / len(welfare), abs=1e-12)
        assert 0 <= found["low"] <= found["value"] <= found["high"] < 1, source
        formed = [row["format"] for row in part]
        assert saved[source]["format"]["value"] == pytest.approx(sum(formed) / len(formed))
        assert found["value"] > 0 and saved[source]["format"]["value"] > 0, source
        assert saved[source]["missing"]["value"] == 0
        assert float(lines[source, "social_welfare"]["value"]) == found["value"]
        assert f"| {source} | {TAUGHT} |" in markdown
    overall = saved["overall"]["social_welfare"]
    assert 0 < overall["low"] < overall["value"] < overall["high"] < 1
    asked = {row["request_kind"] for row in rows}
    assert asked == {"definite", "ambiguous", "harmful", "harmless"}
    for measure in ("asks_when_ambiguous", "asks_when_definite", "harm", "over_refusal"):
        assert saved["overall"][measure]["count"] > 0


def check_scores(rows, judge) -> None:
    """Every readable completion was scored by whom its source says."""
    scored = [row for row in rows if row["judge_score"] is not None]
    assert {row["data_source"] for row in scored} == SOURCES
    for row in scored:
        by_rule = TASKS[row["data_source"]].measure == "math"
        assert ("<verdict>" in row["judge_reply"]) != by_rule
        assert any(row["question"] in text for text in judge.asked) != by_rule


@pytest.mark.slow
@pytest.mark.hf
@pytest.mark.long
def test_seven_real_sources_make_every_table_and_the_report(tmp_path, shared_dir):
    data, run, out = shared_dir / "data", tmp_path / "run", tmp_path / "out"
    # One chain for all, taught on prompts of every source: what a model this small learns by heart
    # does not reach prompts of another length or form.
    told = {source: ("Which one do you mean?",) for source in sorted(SOURCES)}
    real.make_inputs(tmp_path, data, more=OUT_OF_DOMAIN, told=told)
    with real.serving() as judge:
        carried_out("gtalign_jax.main", "configs/tpu_v4.py:all", TRAIN | {
            "workdir": run, "model.path": tmp_path / "model",
            "sft.examples": tmp_path / "chains.jsonl", "data.train": real.files(data, real.TRAIN),
        }, {}, tmp_path, data, judge)
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        said = carried_out("gtalign_jax.evaluate", "configs/tpu_v4.py:ood", EVALUATE | {
            "workdir": tmp_path / "other", "model.path": tmp_path / "model",
            "data.test": real.files(data, (*real.TEST, *OUT_OF_DOMAIN)),
        }, {"checkpoint": run, "baseline": "given", "out": out}, tmp_path, data, judge)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert not (tmp_path / "other").exists()
    rows = real.rows(out / "evaluations.jsonl")
    given, taught = rows[:PROMPTS], rows[PROMPTS:]
    assert {row["label"] for row in taught} == {TAUGHT}
    assert not any(row["valid"] and row["reward"] for row in given)  # random weights
    check_tables(out, taught)
    check_scores(taught, judge)
    found = json.loads((out / "comparison.json").read_text())
    assert found["differences"]["social_welfare"]["difference"] > 0
    assert found["basic_compare"]["file2_dominates_file1"] > 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(source in page for source in SOURCES) and TAUGHT in page
    assert f"report: {out}/report.html" in said and "social welfare" in said
    assert list((out / "tables").glob("*.csv")) and list((out / "figures").glob("*.png"))
