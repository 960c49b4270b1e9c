"""The main job on real input: `main` with the paper's config, scaled down, on the four sources.

Nothing is mocked. A Hugging Face directory goes in; real prompts of ~1,000 tokens are answered;
math-verify and a judge on loopback that speaks the OpenAI protocol score; the run is killed and
continued; transformers reads what comes out. Only the size is small. The weights are random, so a
cold start first teaches one chain by heart: without it no completion would be readable, and no
judge would ever be asked.

The same by hand, with MODEL a small Hugging Face directory (chat template included), CHAINS a JSONL
file of {"messages", "completion"} and a judge that serves at URL:

    export GTALIGN_DATA=../shared/data GTALIGN_JUDGE_URL=URL GTALIGN_JUDGE_MODEL=NAME
    python -m gtalign_jax.main --config=configs/tpu_v4.py:all --config.workdir=runs/real \\
        --config.stages="('sft','grpo','evaluate','export')" --config.sft.examples=CHAINS \\
        --config.model.path=MODEL --config.model.compute_dtype=float32 \\
        --config.data.train_size=24 --config.data.test_size=16 \\
        --config.data.max_prompt_tokens=1200 --config.sft.steps=80 --config.sft.batch_size=4 \\
        --config.sft.micro_batch_size=0 --config.sft.learning_rate=1e-2 \\
        --config.sft.decay=cosine --config.sft.warmup_updates=5 \\
        --config.grpo.steps=3 --config.grpo.prompts_per_step=4 --config.grpo.samples_per_prompt=4 \\
        --config.grpo.micro_batch_prompts=2 --config.grpo.learning_rate=1e-4 \\
        --config.rollout.max_new_tokens=160 --config.rollout.micro_batch_prompts=0 \\
        --config.evaluate.batch_size=8 --config.checkpoint.every=1 --config.mesh.tensor=1

The published data have no medium/train.parquet: the test adds `--config.data.train=…` with the
test prompts of that source in its place.
"""

import json
import math
import signal
import subprocess
import time
from pathlib import Path

import pytest
import real
from real import GRADES, SOURCES, TRAIN, JudgeServer, files, make_inputs, rows

from gtalign_jax.game import chain as chain_lib
from gtalign_jax.reward import math_equal
from gtalign_jax.reward.factors import NAMES as FACTORS
from gtalign_jax.training import plots


@pytest.fixture
def judge():
    with real.serving() as server:
        yield server


SETTINGS = {
    "stages": "('sft','grpo','evaluate','export')",
    "model.compute_dtype": "float32",
    "data.train_size": 24, "data.test_size": 16, "data.max_prompt_tokens": 1200,
    "sft.steps": 80, "sft.batch_size": 4, "sft.micro_batch_size": 0,
    "sft.learning_rate": 1e-2, "sft.decay": "cosine", "sft.warmup_updates": 5,
    "grpo.steps": 3, "grpo.prompts_per_step": 4, "grpo.samples_per_prompt": 4,
    "grpo.micro_batch_prompts": 2, "grpo.learning_rate": 1e-4,
    "rollout.max_new_tokens": 160, "rollout.micro_batch_prompts": 0,
    "evaluate.batch_size": 8, "checkpoint.every": 1, "mesh.tensor": 1,
}  # fmt: skip


def start(folder: Path, data: Path, judge: JudgeServer, log: Path) -> subprocess.Popen:
    settings = SETTINGS | {
        "workdir": folder / "run",
        "model.path": folder / "model",
        "sft.examples": folder / "chains.jsonl",
        "data.train": files(data, TRAIN),
    }
    flags = {f"config.{key}": value for key, value in settings.items()}
    return real.start("gtalign_jax.main", "configs/tpu_v4.py:all", flags, data, judge, log)


def steps_of(run: Path, stage: str) -> list[int]:
    return [row["step"] for row in rows(run / "metrics.jsonl") if row["stage"] == stage]


def kill_in_grpo(process: subprocess.Popen, run: Path, log: Path) -> None:
    """SIGKILL as soon as the first GRPO step is saved."""
    deadline = time.monotonic() + 400
    while not (run / "checkpoints" / "grpo" / "1").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert 3 not in steps_of(run, "grpo"), "killed too late to prove anything"


def check_metrics(run: Path) -> None:
    assert steps_of(run, "sft") == list(range(1, 81))
    assert steps_of(run, "grpo") == [1, 2, 3]
    steps = [row for row in rows(run / "metrics.jsonl") if row["stage"] == "grpo"]
    for row in steps:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row
        assert {f"reward/{name}" for name in FACTORS} <= set(row)
        assert row["reward/missing"] == 0
    assert any(row["grpo/grad_norm"] > 0 and row["reward/total"] > 0 for row in steps)
    assert any(row["grpo/groups_without_signal"] < 1 for row in steps)


def check_scores(run: Path, judge: JudgeServer) -> None:
    """Every completion is logged with its factors, and scored by whom its source says."""
    trained, held_out = rows(run / "rollouts.jsonl"), rows(run / "evaluations.jsonl")
    assert len(trained) == 3 * 4 * 4
    final = [row for row in held_out if row["label"] == plots.AFTER]
    assert len(final) == 16
    assert {row["data_source"] for row in trained} == SOURCES
    assert {row["data_source"] for row in final} == SOURCES
    scored = [row for row in (*trained, *held_out) if row["judge_score"] is not None]
    for row in scored:
        assert set(FACTORS) <= set(row) and row["valid"] and row["reward"] > 0
        asked = any(row["question"] in text and f"{chain_lib.parse(row['completion']).response}"
                    in text for text in judge.asked)
        if row["data_source"] == "math-hard":
            assert not asked and "<verdict>" not in row["judge_reply"]
            boxed = math_equal.last_boxed(row["completion"])
            if boxed and row["ground_truth"].isdecimal():
                assert row["judge_score"] == float(boxed == row["ground_truth"])
        else:
            assert asked and f"<verdict>{row['judge_score']:g}</verdict>" in row["judge_reply"]
    assert {row["data_source"] for row in scored} == SOURCES
    offered = {text.rpartition("Possible grades: ")[2].rstrip(".") for text in judge.asked}
    assert offered == set(GRADES)
    results = json.loads((run / "results.json").read_text())
    assert list(results) == [plots.BEFORE, plots.COLD_START, plots.AFTER]
    assert {f"source/{name}" for name in SOURCES} <= set(results[plots.AFTER])
    assert results[plots.BEFORE]["reward/total"] == 0 < results[plots.AFTER]["reward/total"]


def check_export(run: Path) -> None:
    """transformers continues a held-out prompt with the very completion that the run logged."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = next(row for row in rows(run / "evaluations.jsonl")
               if row["label"] == plots.AFTER and row["judge_score"] is not None)
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    model = AutoModelForCausalLM.from_pretrained(run / "hf", dtype="float32").eval()
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=160, do_sample=False)
    text = tokenizer.decode(out[0, prompt.input_ids.shape[1]:], skip_special_tokens=True)
    assert text == row["completion"]


@pytest.mark.slow
@pytest.mark.hf
def test_the_papers_config_runs_on_the_four_real_sources_and_survives_a_kill(
    tmp_path, shared_dir, judge
):
    data, run = shared_dir / "data", tmp_path / "run"
    make_inputs(tmp_path, data)
    killed = start(tmp_path, data, judge, tmp_path / "killed.log")
    try:
        kill_in_grpo(killed, run, tmp_path / "killed.log")
    finally:
        killed.kill()
        killed.wait()
    again = start(tmp_path, data, judge, tmp_path / "again.log")
    try:
        assert again.wait(400) == 0, (tmp_path / "again.log").read_text()
    finally:
        again.kill()
        again.wait()
    said = (tmp_path / "again.log").read_text()
    assert "sft: continuing after step 80" in said and "grpo: continuing after step" in said
    assert "HTTP Request" not in said  # a line for each would bury the steps
    check_metrics(run)
    check_scores(run, judge)
    check_export(run)
