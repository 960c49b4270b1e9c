"""A whole ablation, as small as it goes: stopped in the middle, given again, and its failures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compiler
import jax
import pytest
import runs

from gtalign_jax import ablate
from gtalign_jax.ablate import NOTE_FILE, kept_programs, whole
from gtalign_jax.run import run as run_one
from gtalign_jax.training import collect
from gtalign_jax.training import stage as stage_lib
from gtalign_jax.training.plots import AFTER, COLD_START
from gtalign_jax.variants import Ablation, plan

ROOT = Path(__file__).resolve().parent.parent


class Stopped(BaseException):
    """Stands for a kill: nothing of the program's own catches it."""


def small(workdir, rewards=("linear", "untagged"), seeds=(0,), **overrides) -> Ablation:
    common = runs.config(workdir, evaluate__temperature=1.0, **overrides)
    return Ablation(rewards=rewards, seeds=seeds, workdir=str(workdir), run=common)


def rows(workdir, label):
    return [row for row in runs.rows(workdir, "evaluations.jsonl") if row["label"] == label]


def stand_in(log, failing=()):
    """In place of `run.run`: an evaluation of two prompts, or a failure."""
    def run(config):
        name = "/".join(Path(config.workdir).parts[-2:])
        log.append(name)
        Path(config.workdir).mkdir(parents=True, exist_ok=True)
        if name in failing:
            raise FloatingPointError(f"grpo/loss is nan in {name}")
        labels = [COLD_START, AFTER] if "grpo" in config.stages else [COLD_START]
        with (Path(config.workdir) / "evaluations.jsonl").open("w") as file:
            for label in labels:
                for i in range(2):
                    file.write(json.dumps(evaluated(label, i, config.seed)) + "\n")
    return run


def evaluated(label, i, seed):
    return {
        "label": label, "id": f"p{i}", "sample": 0, "question": "?", "data_source": "math-hard",
        "valid": True, "stopped": True, "user_welfare": 0.5 + 0.1 * i, "llm_welfare": 0.5,
        "q_llm": 1.0, "verbosity": 0.1 * seed, "answer": 1.0, "format": 1.0, "right_action": True,
        "consistency": 1.0, "matrix_quality": 1.0, "payoff": None, "tokens": 9,
        "reasoning_tokens": 4, "response_tokens": 5, "response_words": 3, "judge_score": 1.0,
        "request_kind": "definite", "response_kind": "answer", "dilemma": None,
        "price_of_anarchy": None,
    }  # fmt: skip


def test_a_run_that_diverges_is_noted_the_others_go_on_and_what_is_done_is_not_done_again(
    tmp_path, monkeypatch, capsys
):
    log, ablation = [], small(tmp_path, ("linear", "user"), seeds=(0, 1))
    monkeypatch.setattr(ablate, "run_one", stand_in(log, failing=("seed0/user",)))
    for attempt in range(2):
        with pytest.raises(SystemExit) as ended:
            whole(ablation)
        assert ended.value.code == 1
        assert log == ["seed0/cold_start", "seed0/linear", "seed0/user", "seed1/cold_start",
                       "seed1/linear", "seed1/user"], attempt
        out, err = capsys.readouterr()
        assert "seed0/user: grpo/loss is nan in seed0/user" in err
        assert f"{tmp_path}/seed0/user has no numbers: grpo/loss is nan" in out
        assert "seed0/user | grpo/loss is nan" in (tmp_path / "ablation.md").read_text()
    assert "run 6 of 6: seed 1, user: finished before" in out
    # The seed that is there is compared; with other settings all is done again.
    found = json.loads((tmp_path / "ablation.json").read_text())
    assert list(found["outcomes"]["user"]["social_welfare"]["by_seed"]) == ["1"]
    with pytest.raises(SystemExit):
        whole(small(tmp_path, ("linear", "user"), seeds=(0, 1), grpo__learning_rate=2e-3))
    assert len(log) == 12


def test_without_its_cold_start_a_run_fails_and_without_any_run_nothing_is_compared(
    tmp_path, monkeypatch, capsys
):
    log = []
    monkeypatch.setattr(ablate, "run_one", stand_in(log, failing=("seed0/cold_start",)))
    with pytest.raises(SystemExit) as ended:
        whole(small(tmp_path, ("linear",)))
    assert ended.value.code == 1 and log == ["seed0/cold_start"]
    out, err = capsys.readouterr()
    assert "seed0/linear: its cold start failed" in err and "nothing to compare" in out


def test_a_finished_run_stays_finished_when_settings_that_did_not_exist_have_their_default(
    tmp_path, monkeypatch
):
    log, ablation = [], small(tmp_path, ("untagged",))
    monkeypatch.setattr(ablate, "run_one", stand_in(log))
    whole(ablation)
    file = tmp_path / "seed0/untagged" / NOTE_FILE
    note = json.loads(file.read_text())
    assert note["config"].pop("evaluate.every_steps") == 0
    file.write_text(json.dumps(note))
    whole(ablation)
    assert len(log) == 1
    note["config"].pop("grpo.beta")  # 0.01 here, which is not the default
    file.write_text(json.dumps(note))
    whole(ablation)
    assert len(log) == 2


def test_mistakes_of_any_run_are_found_before_the_first(tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr(ablate, "run_one", stand_in(log))
    with pytest.raises(ValueError, match=r"^run\.grpo\.prompts_per_step=12 must be a multiple"):
        ablate.ablate(small(tmp_path, grpo__prompts_per_step=12))
    assert not log


def test_kept_programs_leave_no_setting_behind(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(KeyError), kept_programs(str(tmp_path)):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        raise KeyError
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
def test_an_ablation_stopped_in_a_run_goes_on_there_and_equals_a_run_of_its_own(
    tmp_path, monkeypatch, capsys
):
    """The stop is in GRPO, of a run that was given its cold start. It ends like one that trained
    all of it at a stretch, with kept programs where the first one compiled its own."""
    monkeypatch.setattr(collect, "decode", runs.fluent)
    ablation = small(tmp_path / "ablation", ("user",))
    check = stage_lib._check_finite

    def stop(stage, step, guard):
        check(stage, step, guard)
        if (stage, step) == ("grpo", 2):
            raise Stopped

    monkeypatch.setattr(stage_lib, "_check_finite", stop)
    with pytest.raises(Stopped):
        whole(ablation)
    monkeypatch.setattr(stage_lib, "_check_finite", check)
    capsys.readouterr()
    whole(ablation)
    out = capsys.readouterr().out
    assert "run 1 of 2: seed 0, cold_start: finished before" in out
    assert "grpo: continuing after step 1" in out and "sft 1/2" not in out
    assert list((tmp_path / "ablation/compiled").iterdir())
    cold, user = (run.config for run in plan(ablation))
    began = [row["completion"] for row in rows(user.workdir, COLD_START)]
    assert began == [row["completion"] for row in rows(cold.workdir, COLD_START)]
    alone = runs.config(tmp_path / "alone", evaluate__temperature=1.0, seed=user.seed,
                        stages=user.stages, reward__welfare="user")
    with kept_programs(f"{ablation.workdir}/compiled"):
        run_one(alone)
    assert rows(alone.workdir, AFTER) == rows(user.workdir, AFTER)
    for stage, workdir in (("sft", cold.workdir), ("grpo", user.workdir)):
        assert runs.repeatable(runs.metrics(alone.workdir, stage)) == runs.repeatable(
            runs.metrics(workdir, stage))
    for name in ("md", "csv", "json"):
        assert (tmp_path / f"ablation/ablation.{name}").exists()
    assert (tmp_path / "ablation/ablation_plane.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_names_a_mistake_in_one_line():
    command = [sys.executable, "-m", "gtalign_jax.ablate", "--config=configs/ablation_cpu.py",
               "--config.run.grpo.samples_per_prompt=1"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": compiler.flags()},
                          text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: run.grpo.samples_per_prompt=1: must be >= 2")
    assert done.stderr.count("\n") == 1
