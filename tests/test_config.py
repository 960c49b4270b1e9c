"""The aggregate config: command line, checks, saved run information, secrets."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gtalign_jax import config as config_lib
from gtalign_jax.config import Config, batch_table, check, fingerprint
from gtalign_jax.freeze import ConfigError, freeze, to_config_dict, to_dict
from gtalign_jax.model.sharding import MeshConfig
from gtalign_jax.redact import redact, redact_text
from gtalign_jax.training.micro import piece_count

ROOT = Path(__file__).resolve().parent.parent


def configured(**overrides) -> Config:
    """The default config with `section__key=value` changes."""
    values = to_config_dict(Config())
    for path, value in overrides.items():
        section, _, key = path.rpartition("__")
        (values[section] if section else values)[key] = value
    return freeze(Config, values)


def test_the_default_config_survives_the_door_and_json():
    assert freeze(Config, to_config_dict(Config())) == Config()
    assert freeze(Config, json.loads(config_lib.resolved_json(Config()))) == Config()


@pytest.mark.parametrize("stages,message", [
    (("sft", "gpro"), "expected some of"),
    (("sft", "sft"), "each once"),
    (("grpo", "sft"), "they run in the order"),
])
def test_stages_are_known_ordered_and_unique(stages, message):
    with pytest.raises(ConfigError, match=message):
        configured(stages=stages)


@pytest.mark.parametrize("changes,message", [
    ({"mesh__fsdp": 3}, r"does not fit 8 devices"),
    ({"grpo__samples_per_prompt": 1}, r"grpo.samples_per_prompt=1: must be >= 2"),
    ({"grpo__steps": 0}, r"grpo.steps=0: must be >= 1"),
    ({"grpo__prompts_per_step": 12},
     r"grpo.prompts_per_step=12 must be a multiple of 8, .* for example 8 or 16"),
    ({"grpo__prompts_per_step": 64, "grpo__minibatches": 3},
     r"grpo.minibatches=3 does not divide grpo.prompts_per_step=64: .*\[1, 2, 4, 8, 16, 32, 64\]"),
    ({"grpo__prompts_per_step": 64, "grpo__minibatches": 16},
     r"grpo.prompts_per_step/minibatches=4 must be a multiple of 8"),
    ({"grpo__prompts_per_step": 64, "grpo__micro_batch_prompts": 3},
     r"grpo.micro_batch_prompts=3 does not divide 8, .*: it may be one of \[1, 2, 4, 8\], or 0"),
    ({"grpo__prompts_per_step": 64, "rollout__micro_batch_prompts": -1},
     r"rollout.micro_batch_prompts=-1 .* grpo.prompts_per_step=64: .*\[1, 2, 4, 8\]"),
    ({"sft__batch_size": 20}, r"sft.batch_size=20 must be a multiple of 8, .* 16 or 24"),
    ({"sft__batch_size": 32, "sft__micro_batch_size": 3},
     r"sft.micro_batch_size=3 does not divide 4, .*\[1, 2, 4\]"),
    ({"sft__logit_chunk": 0}, r"sft.logit_chunk=0: must be >= 1"),
    ({"sft__repriced": 1.5}, r"sft.repriced=1.5: must be a share"),
    ({"sft__repriced": 0.5, "sft__examples": "x.jsonl"}, r"only built-in chains .* allowed .*: 0"),
    ({"sft__repriced": 0.5, "data__reasoning": "none", "reward__reasoning": "none"},
     r"sft.repriced=0.5, data.reasoning='none': .* allowed is sft.repriced=0"),
    ({"evaluate__batch_size": 12}, r"evaluate.batch_size=12 must be a multiple of 8, .* 8 or 16"),
    ({"grpo__normalizer": "z-score"}, r"grpo.normalizer='z-score': expected one of .*'zscore'"),
])
def test_impossible_batches_and_meshes_are_errors_that_list_what_is_possible(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(configured(**changes), device_count=8)


@pytest.mark.parametrize("attention,device,refused", [
    ("flash", "cpu", True), ("auto", "tpu", True), ("auto", "gpu", False), ("dense", "tpu", False),
])
def test_packed_rows_are_refused_where_attention_is_the_kernel(attention, device, refused):
    config = configured(grpo__prompts_per_step=64, grpo__pack=4, model__attention=attention)
    message = rf"grpo.pack=4, model.attention='{attention}': .*set model.attention='dense'"
    with pytest.raises(ConfigError, match=message) if refused else contextlib.nullcontext():
        check(config, 8, device=device)


@pytest.mark.parametrize("changes,message", [
    ({"rollout__max_new_tokens": 0}, r"rollout: max_new_tokens=0: must be >= 1"),
    ({"rollout__temperature": -1.0}, r"rollout: temperature=-1.0: must be >= 0"),
    ({"rollout__top_p": 2.0}, r"rollout: top_p=2.0: must be in \(0, 1\]"),
])
def test_sampling_without_a_meaning_is_refused_before_the_cold_start(changes, message):
    with pytest.raises(ConfigError, match=message):
        configured(**changes)


def test_a_section_that_no_stage_uses_is_not_checked():
    with pytest.raises(ConfigError):
        check(configured(sft__batch_size=20), 8)
    check(configured(sft__batch_size=20, stages=("grpo",)), 8)


@pytest.mark.parametrize("Q,mini,micro,mesh", [
    (64, 1, 0, MeshConfig()), (64, 2, 4, MeshConfig(fsdp=4, tensor=2)), (6, 3, 2, MeshConfig(
        fsdp=2, tensor=4)), (64, 1, 100, MeshConfig()),
])
def test_a_batch_that_check_accepts_cuts_evenly(Q, mini, micro, mesh):
    base = configured(grpo__prompts_per_step=Q, grpo__minibatches=mini,
                      grpo__micro_batch_prompts=micro, stages=("grpo",))
    check(dataclasses.replace(base, mesh=mesh), 8)
    shards = 8 // mesh.tensor
    pieces = piece_count(Q // mini, micro, shards)
    assert (Q // mini) % (pieces * shards) == 0
    assert pieces == {0: 1, 4: 2, 2: 1, 100: 1}[micro]


def test_the_batch_table_is_the_arithmetic_of_the_settings():
    text = batch_table(configured(
        grpo__prompts_per_step=64, grpo__samples_per_prompt=8, grpo__minibatches=2,
        grpo__epochs=1, grpo__micro_batch_prompts=8, grpo__steps=150,
        rollout__max_new_tokens=4096, data__max_prompt_tokens=2048,
        sft__batch_size=32, sft__micro_batch_size=4, sft__steps=100,
    ), shards=2)
    for line in (
        "completions per step        64 x 8 = 512",
        "completion tokens per step  at most 512 x 4,096 = 2,097,152",
        "prompt tokens per step      at most 64 x 2,048 = 131,072",
        "updates per step            1 x 2 (epochs x minibatches) = 2",
        "micro-batches per update    2 of 16 prompts = 128 completions",
        "updates                     150 steps x 2 = 300",
        "micro-batches per update    4 of 8 rows",
    ):
        assert line in text, text


def test_the_fingerprint_holds_what_changes_the_result_and_no_circumstances():
    base = configured()
    same = configured(workdir="elsewhere", grpo__micro_batch_prompts=8, grpo__remat="full",
                      mesh__fsdp=1, checkpoint__keep=7, judge__base_url="http://other:1/v1",
                      grpo__steps=9)
    assert fingerprint(same, tokenizer="abc") == fingerprint(base, tokenizer="abc")
    for change in ({"seed": 1}, {"grpo__beta": 0.5}, {"data__max_prompt_tokens": 7},
                   {"reward__rho": 0.5}, {"rollout__temperature": 0.7}):
        assert fingerprint(configured(**change)) != fingerprint(base), change
    assert fingerprint(base, tokenizer="abc") != fingerprint(base, tokenizer="abd")


def test_only_a_run_without_blocks_has_reasoning_in_its_fingerprint():
    """Checkpoints older than the choice are still continued."""
    assert not [key for key in fingerprint(Config()) if key.endswith("reasoning")]
    bare = fingerprint(configured(data__reasoning="none", reward__reasoning="none"))
    assert bare["data.reasoning"] == bare["reward.reasoning"] == "none"


def test_what_is_asked_for_must_be_what_is_rewarded():
    check(configured(data__reasoning="none", reward__reasoning="none"), 8)
    with pytest.raises(ConfigError, match="data.reasoning='none', reward.reasoning='tagged'"):
        check(configured(data__reasoning="none"), 8)


def test_the_number_of_steps_counts_where_the_learning_rate_depends_on_it():
    ten, twenty = (configured(grpo__decay="cosine", grpo__steps=n) for n in (10, 20))
    assert fingerprint(ten) != fingerprint(twenty)


@pytest.mark.parametrize("key,value,shown", [
    ("api_key", "abc", "<redacted>"),
    ("hf_token", "abc", "<redacted>"),
    ("api_key_env", "JUDGE_KEY", "JUDGE_KEY"),
    ("api_key_env", "sk-proj-0123456789", "<redacted>"),
    ("max_tokens", 12, 12),
    ("tokenizer", "dir/tok", "dir/tok"),
    ("base_url", "https://me:pw@host/v1", "https://<redacted>@host/v1"),
    ("base_url", "https://host/v1?api_key=abc&x=1", "https://host/v1?api_key=<redacted>&x=1"),
])
def test_secrets_are_redacted_and_nothing_else_is(key, value, shown):
    assert redact({"judge": [{key: value}]}) == {"judge": [{key: shown}]}


def test_a_secret_on_the_command_line_is_redacted():
    assert redact_text("--config.judge.api_key=abc") == "--config.judge.api_key=<redacted>"
    assert redact_text("--config.grpo.steps=3") == "--config.grpo.steps=3"


def test_a_work_directory_holds_the_resolved_config_versions_and_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", "--config.judge.base_url=http://a:planted@b/v1"])
    config = configured(judge__base_url="http://user:planted@host/v1", grpo__steps=7)
    config_lib.save_run_info(tmp_path, config)
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "planted" not in written
    info = json.loads((tmp_path / "run_info.json").read_text())
    assert info["packages"]["jax"] and info["python"].startswith("3.")
    assert info["devices"] == {"count": 8, "kind": "cpu", "processes": 1}
    assert info["git"] is None or len(info["git"].removesuffix("+dirty")) == 40
    loaded = config_lib.load_run_config(tmp_path)
    assert to_dict(loaded)["grpo"] == to_dict(config)["grpo"]


def test_a_directory_that_is_no_work_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run's work directory"):
        config_lib.load_run_config(tmp_path)


PROGRAM = """
import sys
from absl import app
from gtalign_jax import config
FLAG = config.define_flag()
def main(_):
    print(config.from_flag(FLAG).grpo.learning_rate, config.from_flag(FLAG).data.train)
try:
    app.run(main, flags_parser=config.parse_flags)
except config.ConfigError as error:
    sys.exit(f"error: {error}")
"""
CONFIG_FILE = """
from gtalign_jax.config import Config
from gtalign_jax.freeze import to_config_dict
def get_config(source="none"):
    config = to_config_dict(Config())
    config.data.train = (source,)
    return config
"""


@pytest.mark.slow
def test_the_command_line_overrides_picks_a_source_and_refuses_unknown_keys(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG_FILE)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT,
                              capture_output=True, text=True, timeout=120)

    file = f"--config={tmp_path / 'c.py'}:math-hard"
    good = run(file, "--config.grpo.learning_rate=1e-6")
    assert good.stdout.strip() == "1e-06 ('math-hard',)", good.stderr
    bad = run(file, "--config.grpo.learning_rat=1e-6")
    assert bad.returncode == 2 and "Traceback" not in bad.stderr
    assert "did you mean 'grpo.learning_rate'? (keys of 'grpo': adv_epsilon, " in bad.stderr
    none = run()
    assert none.returncode == 1 and "--config=FILE is required" in none.stderr
