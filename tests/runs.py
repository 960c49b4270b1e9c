"""Whole runs, as small as they go: one layer of width 32, the built-in tasks, a few steps."""

import importlib.util
import json
import zlib
from pathlib import Path

from gtalign_jax.config import Config
from gtalign_jax.freeze import freeze, to_config_dict
from gtalign_jax.game.chain import KEYS, render

SETTINGS = {
    "model.family": "qwen3", "model.vocab_size": 400, "model.d_model": 32, "model.d_ff": 48,
    "model.num_layers": 1, "model.num_heads": 4, "model.num_kv_heads": 2, "model.head_dim": 8,
    "model.qkv_bias": False, "model.qk_norm": True, "model.max_position": 512,
    "model.compute_dtype": "float32",
    "data.source": "builtin", "data.train_size": 60, "data.test_size": 12,
    "data.max_prompt_tokens": 96,
    "sft.steps": 2, "sft.batch_size": 8, "sft.learning_rate": 1e-3,
    "sft.max_completion_tokens": 400,
    "grpo.steps": 3, "grpo.prompts_per_step": 8, "grpo.samples_per_prompt": 2,
    "grpo.learning_rate": 1e-3, "grpo.beta": 0.01, "rollout.max_new_tokens": 24,
    "rollout.shrink": 0.5, "rollout.smallest": 4,
    "checkpoint.every": 1, "evaluate.batch_size": 8,
}


def settings(workdir, **overrides) -> dict:
    """Flat settings; overrides are written `grpo__steps=3`."""
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    return {**SETTINGS, "workdir": str(workdir), **changed}


def config(workdir, **overrides) -> Config:
    values = to_config_dict(Config())
    for key, value in settings(workdir, **overrides).items():
        section, _, name = key.rpartition(".")
        if section:
            values[section][name] = value
        else:
            values[name] = value
    return freeze(Config, values)


def config_of(name: str, words: str = "", cls: type = Config):
    """The frozen `cls` of `configs/NAME.py[:words]`; unknown keys do not survive `freeze`."""
    path = Path(__file__).resolve().parent.parent / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return freeze(cls, module.get_config(*([words] if words else [])))


def metrics(workdir, stage: str) -> list[dict]:
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == stage]


def rows(workdir, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / name).read_text().splitlines()]


def repeatable(rows: list[dict]) -> list[dict]:
    """Rows without what a clock or a count of this process's compilations has measured."""
    clocks = ("time/", "perf/", "judge/seconds")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]


PAYOFF = {key: {"LLM": i, "user": 2 * i + 1} for i, key in enumerate(KEYS)}


def fluent(tokenizer, ids) -> str:
    """Stands in for `decode`: a well-formed chain whose length depends on what was sampled, since
    a model of a few steps writes nothing that can be read."""
    del tokenizer
    dice = zlib.crc32(str([int(i) for i in ids]).encode())
    if dice % 10 == 0:
        return "no chain at all"
    return render("Clear. " * (1 + dice % 7), PAYOFF, "DQ_AQ", "Which one? " * (1 + dice % 3))
