"""The real command, killed in the middle and given again: nothing is lost, nothing differs."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import compiler
import jax
import numpy as np
import pytest
import runs

from gtalign_jax.config import load_run_config
from gtalign_jax.data.chat import load_tokenizer
from gtalign_jax.export import checkpoint_dir
from gtalign_jax.game.chain import BRIEF_INSTRUCTION, render
from gtalign_jax.model import load
from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh
from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer
from gtalign_jax.training.state import abstract_state, make_optimizer

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

SFT_STEPS, GRPO_STEPS = 60, 9
# A cold start that is learnt by heart, so that GRPO has completions to tell apart.
LEARN = {
    "stages": "('sft','grpo','evaluate')", "sft.steps": SFT_STEPS, "sft.learning_rate": 2e-2,
    "sft.batch_size": 16, "grpo.steps": GRPO_STEPS, "grpo.prompts_per_step": 8,
    "grpo.samples_per_prompt": 4, "grpo.warmup_updates": 4, "grpo.learning_rate": 3e-3,
    "rollout.max_new_tokens": 96, "checkpoint.every": 4, "evaluate.every_steps": 3,
    "evaluate.temperature": 1.0,
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "chains.jsonl"
    texts = [render("Yes.", runs.PAYOFF, "DQ_DA", "It is 3."),
             render("Yes. " * 9, runs.PAYOFF, "DQ_CQ", "Which one do you mean?")]
    with path.open("w") as file:
        for i in range(48):
            messages = [{"role": "system", "content": BRIEF_INSTRUCTION},
                        {"role": "user", "content": f"Mira buys {i} pears. How many?"}]
            row = {"messages": messages, "completion": texts[i % 2]}
            file.write(json.dumps(row) + "\n")
    return path


def command(workdir, examples, **overrides) -> list[str]:
    flat = runs.settings(workdir, **overrides)
    flat = {**flat, **LEARN, "sft.examples": str(examples), "sft.repriced": 0.0,
            **{key.replace("__", "."): value for key, value in overrides.items()}}
    flags = [f"--config.{key}={value}" for key, value in flat.items()]
    return [sys.executable, "-m", "gtalign_jax.main", "--config=configs/demo_cpu.py", *flags]


def start(command: list[str]) -> subprocess.Popen:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiler.flags()}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(command: list[str], timeout: float = 240) -> tuple[int, str]:
    process = start(command)
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out


def kill_at(command: list[str], workdir: Path, stage: str, step: int, timeout: float = 240) -> None:
    """kill -9 as soon as the metrics of `step` are on disk."""
    process = start(command)
    file = workdir / "metrics.jsonl"
    deadline = time.monotonic() + timeout
    try:
        while not (file.exists() and any(
            json.loads(line)["stage"] == stage and json.loads(line)["step"] >= step
            for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")
        )):
            if process.poll() is not None:
                pytest.fail(f"ended before {stage} {step}:\n{process.communicate()[0]}")
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    steps = [row["step"] for row in runs.metrics(workdir, stage)]
    assert steps[-1] < {"sft": SFT_STEPS, "grpo": GRPO_STEPS}[stage], "killed too late"


def final_state(workdir: Path):
    config = load_run_config(workdir)
    model = load.model_config(config.model, len(load_tokenizer(workdir / "tokenizer")))
    layout = Layout(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), TRAIN)
    optimizer = make_optimizer(config.grpo, GRPO_STEPS)
    wanted = {"state": abstract_state(model, optimizer, layout),
              "key": jax.eval_shape(lambda: jax.random.key(0))}
    checkpoints = Checkpointer(checkpoint_dir(workdir, "grpo"), CheckpointConfig(), None,
                               read_only=True)
    assert checkpoints.latest() == GRPO_STEPS
    saved, _ = checkpoints.restore(wanted)
    checkpoints.close()
    key = jax.random.key_data(saved["key"])
    return [np.asarray(x) for x in (*jax.tree.leaves(saved["state"]), key)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, examples) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    status, out = finish(command(workdir, examples))
    assert status == 0, out
    return workdir


@pytest.mark.long
def test_a_run_killed_in_both_stages_ends_bit_for_bit_as_an_uninterrupted_one(
    whole, examples, tmp_path
):
    again = command(tmp_path, examples)
    kill_at(again, tmp_path, "sft", 26)  # saved: 24 at the latest
    kill_at(again, tmp_path, "grpo", 6)  # the evaluation after step 6 may be half done
    # Step 4, unless a busy machine had not written it by then.
    saved = [p.name for p in Path(checkpoint_dir(tmp_path, "grpo")).iterdir() if p.name.isdigit()]
    status, out = finish(again)
    assert status == 0, out
    assert "sft: continuing after step 60" in out
    assert saved in ([], ["4"]) and ("grpo: continuing after step 4" in out) == bool(saved)

    grpo = runs.metrics(whole, "grpo")
    assert [row["step"] for row in grpo] == list(range(1, GRPO_STEPS + 1))
    assert max(row["grpo/adv_abs"] for row in grpo) > 0.1  # there was something to learn
    assert max(row["grpo/kl"] for row in grpo) > 1e-5  # and it was learnt
    for stage in ("sft", "grpo", "evaluate"):
        assert runs.repeatable(runs.metrics(tmp_path, stage)) == runs.repeatable(
            runs.metrics(whole, stage)
        ), stage
    assert runs.rows(tmp_path, "rollouts.jsonl") == runs.rows(whole, "rollouts.jsonl")
    for a, b in zip(final_state(tmp_path), final_state(whole), strict=True):
        assert a.tobytes() == b.tobytes()
    results = [json.loads((d / "results.json").read_text()) for d in (tmp_path, whole)]
    assert results[0] == results[1]


@pytest.mark.parametrize("overrides, named", [
    ({"model__d_ff": 64}, ["model.d_ff: saved 48, now 64"]),
    ({"data__seed": 5}, ["data.seed: saved 0, now 5", "identity.prompts"]),
])
def test_a_checkpoint_of_another_model_or_other_data_is_refused(
    whole, examples, overrides, named, tmp_path
):
    workdir = tmp_path / "copy"
    shutil.copytree(whole, workdir)
    kept = {name: (workdir / name).read_bytes()
            for name in ("config.json", "metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")}
    status, out = finish(command(workdir, examples, **overrides))
    assert status == 1, out
    assert "belongs to another run" in out and "checkpoint.force=True" in out
    for words in named:
        assert words in out
    assert "Traceback" not in out
    assert kept == {name: (workdir / name).read_bytes() for name in kept}


def test_a_changed_file_of_examples_under_the_same_name_is_other_data(whole, examples, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole, workdir)
    text = examples.read_text()
    try:
        examples.write_text(text.replace("It is 3.", "It is 4."))
        status, out = finish(command(workdir, examples))
    finally:
        examples.write_text(text)
    assert status == 1 and "identity.cold_start" in out, out
