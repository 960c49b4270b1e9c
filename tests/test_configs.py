"""The config files: what they say, what they take, and what a mistake with them looks like."""

import dataclasses
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from runs import config_of

from gtalign_jax.aot.chips import CHIPS
from gtalign_jax.config import Config, batch_table, check, define_flag, from_flag, parse_flags
from gtalign_jax.data.sources import load_prompts
from gtalign_jax.freeze import ConfigError, freeze
from gtalign_jax.model.load import model_sizes, resolve
from gtalign_jax.model.sharding import check_model_fits, mesh_shape
from gtalign_jax.model.spec import num_params
from gtalign_jax.paper import FITS, MODELS, OUT_OF_DOMAIN
from gtalign_jax.reward.rules import request_kind
from gtalign_jax.session import training_prompts
from gtalign_jax.variants import Ablation

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("GTALIGN_DATA", "GTALIGN_JUDGE_URL", "GTALIGN_JUDGE_MODEL")
SOURCES = ("math-hard", "medium", "ambig_qa", "wildguard")
CHOICES = [(machine, size) for machine, fits in FITS.items() for size in fits]
# How ml_collections imports config files.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method:DeprecationWarning")

@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command_line(monkeypatch, capsys):
    """Reads a command line as `main` does: (config or None, what went to stderr)."""
    def forget_flags():
        for name in [name for name in flags.FLAGS if name.split(".")[0] == "config"]:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()

    def read(*arguments: str, cls: type = Config) -> tuple[Any, str]:
        forget_flags()
        argv = ["main.py", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks for its overrides there
        flag = define_flag()
        try:
            parse_flags(argv, cls)
            config = from_flag(flag, cls)
            check(config.run if cls is Ablation else config, device_count=4)
        except ConfigError as error:  # main prints it
            return None, f"error: {error}"
        except SystemExit as end:
            assert end.code == 2
            return None, capsys.readouterr().err.strip()
        return config, ""

    monkeypatch.chdir(ROOT)
    yield read
    forget_flags()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_file_loads_and_shows_its_command(path):
    is_ablation = path.stem.startswith("ablation")
    config = config_of(path.stem, cls=Ablation).run if is_ablation else config_of(path.stem)
    assert batch_table(config, 1)
    assert f"--config=configs/{path.name}" in path.read_text(encoding="utf-8")


def test_the_demo_runs_on_any_number_of_devices_up_to_its_batch():
    for devices in (1, 2, 8, 16):
        check(config_of("demo_cpu"), devices)
    with pytest.raises(ConfigError) as refused:
        check(config_of("demo_cpu"), 32)
    grpo, sft = str(refused.value).splitlines()
    assert grpo.startswith("grpo.prompts_per_step=16 must be a multiple of 32")
    assert sft.startswith("sft.batch_size=16 must be a multiple of 32")


@pytest.mark.parametrize("machine, size", CHOICES)
def test_every_size_is_cut_evenly_over_the_slice_it_is_meant_for(machine, size):
    fit, config = FITS[machine][size], config_of(f"tpu_{machine}", size)
    config = dataclasses.replace(config, stages=("sft", *config.stages))
    check(config, fit.chips)
    model = model_sizes(config.model)
    shape = mesh_shape(config.mesh, fit.chips)
    check_model_fits(model, types.SimpleNamespace(devices=np.empty(shape)))
    assert shape == (1, 1, fit.chips // fit.tensor, fit.tensor)
    G = config.grpo.samples_per_prompt
    assert config.grpo.micro_batch_prompts == fit.update_prompts
    assert config.sft.micro_batch_size == fit.update_prompts * G
    assert config.rollout.micro_batch_prompts == fit.rollout_prompts


@pytest.mark.parametrize("machine, size", CHOICES)
def test_what_must_lie_on_a_chip_at_the_same_time_leaves_room_on_it(machine, size):
    """By formula, without what the compiler adds: not that it fits, but that it could."""
    fit, config = FITS[machine][size], config_of(f"tpu_{machine}", size)
    model = model_sizes(config.model)
    weights = num_params(model)
    state, tokens = 14 * weights / fit.chips, 2048 + 8 * 4096  # moments and reference too
    cache = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim * tokens / fit.tensor
    per_group = min(fit.rollout_prompts, 64 * fit.tensor / fit.chips)
    rollout = state + 2 * weights / fit.tensor + per_group * cache
    update = state + 4 * weights / fit.chips
    assert max(rollout, update) < 0.95 * CHIPS[machine].hbm_bytes


@pytest.mark.parametrize("machine", FITS)
def test_the_docstring_of_a_tpu_config_lists_its_sizes_and_slices(machine):
    text = (ROOT / "configs" / f"tpu_{machine}.py").read_text(encoding="utf-8")
    rows = re.findall(r"^ +([\d.]+b) +(v\w+-\d+) +(\d+) +(\d+)", text, re.M)
    assert rows == [
        (size, fit.slice, str(fit.chips), str(fit.tensor)) for size, fit in FITS[machine].items()
    ]


@pytest.mark.parametrize("machine", FITS)
def test_slices_have_the_chips_that_their_names_say(machine):
    for fit in FITS[machine].values():
        kind, _, number = fit.slice.partition("-")  # v4 and v5p count TensorCores, two on a chip
        assert kind == machine
        assert fit.chips == int(number) // (2 if machine in ("v4", "v5p") else 1)


def test_sizes_differ_in_their_layout_alone():
    def science(size):
        config = config_of("tpu_v5p", f"{size},math-hard")
        return dataclasses.replace(
            config, workdir="", model=dataclasses.replace(config.model, path=""),
            mesh=config_of("demo_cpu").mesh,
            rollout=dataclasses.replace(config.rollout, micro_batch_prompts=0),
            grpo=dataclasses.replace(config.grpo, micro_batch_prompts=0, remat="full"),
            sft=dataclasses.replace(config.sft, micro_batch_size=0, remat="full"),
        )

    assert [config_of("tpu_v5p", size).model.path for size in MODELS] == list(MODELS.values())
    for size in MODELS:
        assert science(size) == science("3b")


def test_words_may_stand_in_any_order_and_name_the_work_directory():
    c = config_of("tpu_v4", "7b,math-hard")
    assert c == config_of("tpu_v4", "math-hard,7b")
    assert (c.model.path, c.judge.kind) == ("Qwen/Qwen2.5-7B-Instruct", "none")
    assert c.workdir == "runs/tpu_v4-7b-math-hard"
    assert config_of("tpu_v4", "3b") == config_of("tpu_v4", "all") == config_of("tpu_v4")
    assert config_of("tpu_v4").workdir == "runs/tpu_v4-all"
    assert config_of("tpu_v5p", "72b").workdir == "runs/tpu_v5p-72b-all"


def test_tpu_v4_has_the_numbers_of_the_paper():
    c = config_of("tpu_v4", "all")
    assert c.model.path == "Qwen/Qwen2.5-3B-Instruct"
    assert c.model.compute_dtype == "bfloat16" and c.grpo.remat == "full"
    assert (c.grpo.learning_rate, c.grpo.beta, c.grpo.steps) == (1e-6, 0.001, 150)
    assert c.grpo.prompts_per_step * c.grpo.samples_per_prompt == 512
    assert (c.rollout.temperature, c.rollout.top_k, c.rollout.top_p) == (1.0, 0, 1.0)
    assert (c.data.max_prompt_tokens, c.rollout.max_new_tokens) == (2048, 4096)
    assert c.grpo.decay == "constant" and c.grpo.weight_decay == 0.0
    assert c.reward.welfare == "cobb_douglas" and c.reward.consistency == "none"
    assert c.stages == ("grpo", "evaluate", "export")


def test_the_batch_table_of_tpu_v4_states_the_papers_batch():
    lines = re.sub(" +", " ", batch_table(config_of("tpu_v4"), 2)).splitlines()
    assert lines == [
        "GRPO prompts per step 64",
        " completions per step 64 x 8 = 512",
        " completion tokens per step at most 512 x 4,096 = 2,097,152",
        " prompt tokens per step at most 64 x 2,048 = 131,072",
        " updates per step 1 x 1 (epochs x minibatches) = 1",
        " micro-batches per update 32 of 2 prompts = 16 completions",
        " updates 150 steps x 1 = 150",
    ]


@pytest.mark.parametrize("source", SOURCES)
def test_the_argument_picks_one_source_of_the_folder(source, monkeypatch):
    monkeypatch.setenv("GTALIGN_DATA", "gs://bucket/some/data/")
    c = config_of("tpu_v4", source)
    assert c.data.source == "parquet"
    assert c.data.train == (f"gs://bucket/some/data/{source}/train.parquet",)
    assert c.data.test == (f"gs://bucket/some/data/{source}/test.parquet",)
    assert source in c.workdir


def test_all_trains_where_there_are_training_prompts_and_evaluates_on_the_four():
    c = config_of("tpu_v4", "all")
    assert c == config_of("tpu_v4")
    assert set(c.data.train) == {f"data/{s}/train.parquet" for s in SOURCES if s != "medium"}
    assert set(c.data.test) == {f"data/{s}/test.parquet" for s in SOURCES}


@pytest.mark.parametrize("word, folders, judge", [
    ("minerva", ["minerva_math"], "none"), ("abg-coqa", ["abg_coqa"], "http"),
    ("advbench", ["advbench"], "http"), ("ood", ["minerva_math", "abg_coqa", "advbench"], "http"),
])
def test_what_is_out_of_domain_is_evaluated_and_never_trained_on(word, folders, judge):
    c = config_of("tpu_v5e", f"7b,{word}")
    assert c.stages == ("evaluate",) and c.data.train == ()
    assert c.data.test == tuple(f"data/{folder}/test.parquet" for folder in folders)
    assert c.judge.kind == judge and c.workdir == f"runs/tpu_v5e-7b-{word}"
    with pytest.raises(ConfigError, match="data.train is empty.*for evaluation only"):
        training_prompts(dataclasses.replace(c, stages=("grpo",)))


def test_only_mathematics_does_without_a_judge(monkeypatch):
    assert config_of("tpu_v4", "math-hard").judge.kind == "none"
    monkeypatch.setenv("GTALIGN_JUDGE_URL", "http://judge:1/v1")
    monkeypatch.setenv("GTALIGN_JUDGE_MODEL", "grader")
    for source in ("medium", "ambig_qa", "wildguard", "all"):
        judge = config_of("tpu_v4", source).judge
        assert (judge.kind, judge.base_url, judge.model) == ("http", "http://judge:1/v1", "grader")


@pytest.mark.parametrize("name, words, message", [
    ("tpu_v4", "mathhard", r"'mathhard'; allowed on v4: a size \(0.5b, .*72b\) .*wildguard.*, all"),
    ("tpu_v4", "3b,13b", "unknown word '13b'"),
    ("tpu_v5e", "72b", r"'72b'; allowed on v5e: a size \(0.5b, 3b, 7b, 32b\)"),
    ("tpu_v4", "3b,all,7b", "two words for the size: '3b' and '7b'"),
])
def test_an_unknown_word_lists_the_known_ones(name, words, message):
    with pytest.raises(ValueError, match=message):
        config_of(name, words)


def test_training_prompts_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="no file matches 'data/medium/train.parquet'"):
        load_prompts(config_of("tpu_v4", "medium").data, "train")


def test_the_model_may_be_a_hub_name_or_a_directory(tmp_path):
    assert resolve(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ValueError, match="model.path=.*gs://bucket/directory"):
        resolve("/no/such/model")


def test_every_source_of_the_folder_is_read_as_it_is_published(shared_dir, monkeypatch):
    monkeypatch.setenv("GTALIGN_DATA", str(shared_dir / "data"))
    data = config_of("tpu_v4", "all").data
    for split, sources in (("train", set(SOURCES) - {"medium"}), ("test", set(SOURCES))):
        assert {prompt.data_source for prompt in load_prompts(data, split)} == sources
    prompts = load_prompts(config_of("tpu_v4", "ood").data, "test")
    assert {prompt.data_source for prompt in prompts} == set(OUT_OF_DOMAIN)
    kinds = Counter(request_kind(p.data_source, p.ground_truth) for p in prompts)
    assert kinds == {"definite": 272 + 932, "ambiguous": 123, "harmful": 520}


def test_a_mesh_that_does_not_match_the_devices_is_refused_before_any_compilation(command_line):
    _, said = command_line("--config=configs/tpu_v4.py:all", "--config.mesh.fsdp=3")
    assert said.startswith("error: mesh (slice=1, data=1, fsdp=3, tensor=2) does not fit 4 devices")


def test_the_command_line_overrides_single_values_and_tuples(command_line):
    config, said = command_line(
        "--config=configs/tpu_v4.py:math-hard", "--config.grpo.learning_rate=2e-6",
        "--config.data.train=('a.parquet',)", "--config.data.test=('b.parquet','c.parquet')",
        "--config.stages=('sft','grpo')", "--config.sft.micro_batch_size=8",
    )
    assert not said
    assert config.grpo.learning_rate == 2e-6 and config.sft.micro_batch_size == 8
    assert config.data.train == ("a.parquet",)
    assert config.data.test == ("b.parquet", "c.parquet")
    assert config.stages == ("sft", "grpo")
    assert config.workdir == "runs/tpu_v4-math-hard"


@pytest.mark.parametrize("arguments,message", [
    (["--config=configs/tpu_v4.py:wild"],
     "--config=configs/tpu_v4.py:wild: unknown word 'wild'; allowed on v4: a size (0.5b, 3b, "),
    (["--config=configs/demo_cpu.py:wild"], "--config=configs/demo_cpu.py:wild: get_config() "),
    (["--config=configs/tpu_v5.py"], "--config: [Errno 2] No such file"),
    ([], "--config=FILE is required"),
    (["--config=configs/tpu_v4.py", "--config.grpo.learningrate=1"],
     "--config.grpo.learningrate: unknown key 'grpo.learningrate'; did you mean "
     "'grpo.learning_rate'?"),
    (["--config=configs/tpu_v4.py", "--config.gropo.steps=1"], "did you mean 'grpo'?"),
    (["--config=configs/tpu_v4.py", "runs/mine", "--config.seed=1"], "runs/mine: belongs to no"),
    (["--config=configs/tpu_v4.py", "--config.grpo.steps=many"], "--config.grpo.steps=many"),
    (["--config=configs/tpu_v4.py", "--config.grpo.kl=k4"], "grpo.kl='k4': expected one of"),
    (["--config=configs/tpu_v4.py", "--config.stages=sft,grpo"],
     """on a command line: --config.stages="('sft','grpo')\""""),
])
def test_a_mistake_on_the_command_line_is_one_line_that_names_it(arguments, message, command_line):
    config, said = command_line(*arguments)
    assert config is None and message in said
    assert said.startswith("error: ") and len(said.splitlines()) == 1


def test_a_config_error_is_what_an_unknown_key_in_a_file_raises():
    with pytest.raises(ConfigError, match="unknown key 'grpo.stepz'; did you mean 'grpo.steps'"):
        freeze(Config, {"grpo": {"stepz": 3}})


def test_an_ablation_is_overridden_as_strictly_as_a_run(command_line):
    file = "--config=configs/ablation_cpu.py"
    ablation, error = command_line(
        file, "--config.seeds=(0,1)", "--config.rewards=('user','rawls')",
        "--config.run.grpo.steps=3", cls=Ablation,
    )
    assert not error and ablation.seeds == (0, 1) and ablation.rewards == ("user", "rawls")
    assert ablation.run.grpo.steps == 3 and ablation.run.sft.steps == 900  # the demo's
    for argument, said in (
        ("--config.run.grpo.stepz=3", "did you mean 'run.grpo.steps'?"),
        ("--config.grpo.steps=3", "unknown key 'grpo'; did you mean 'run.grpo'?"),
        ("--config.rewards=('nash',)", "rewards=('nash',): expected some of ('cobb_douglas',"),
        ("--config.seeds=(1,1)", "seeds=(1, 1): expected integers, at least one, each once"),
        ("--config.workdir=gs://b/x", "workdir=gs://b/x: runs share files there"),
    ):
        _, error = command_line(file, argument, cls=Ablation)
        assert said in error, error
