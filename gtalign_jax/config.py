"""One frozen `Config`, made of each part's own dataclass; checked before anything is compiled.

    config file -> ConfigDict -> command-line overrides -> freeze -> check -> Config

A run saves what it resolved to (`config.json`) and what it ran with (`run_info.json`: versions,
devices, git revision, command line), secrets redacted. Below `main` nobody sees a ConfigDict.
"""

import dataclasses
import json
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from absl import flags
from ml_collections import config_flags

from gtalign_jax.data.sources import DataConfig
from gtalign_jax.evaluation.evaluate import EvaluateConfig
from gtalign_jax.freeze import ConfigError, check_overrides, freeze, to_dict
from gtalign_jax.model.load import ModelSource
from gtalign_jax.model.safetensors_io import read_json
from gtalign_jax.model.sharding import BATCH_AXES, MeshConfig, batch_shards, is_flash
from gtalign_jax.pod.start import PodConfig
from gtalign_jax.provenance import git_revision, versions
from gtalign_jax.redact import redact, redact_text
from gtalign_jax.reward.factors import NAMES as FACTORS
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.normalizers import NORMALIZERS
from gtalign_jax.reward.scoring import RewardConfig
from gtalign_jax.reward.tasks import component_names
from gtalign_jax.rollout.sampler import SamplerConfig
from gtalign_jax.training.checkpoint import CheckpointConfig, flatten
from gtalign_jax.training.files import write_whole
from gtalign_jax.training.grpo import GRPOConfig
from gtalign_jax.training.guard import GuardConfig
from gtalign_jax.training.micro import piece_count
from gtalign_jax.training.sft import SFTConfig
from gtalign_jax.training.trackers import TrackConfig

T = TypeVar("T")
STAGES = ("sft", "grpo", "evaluate", "export")
CONFIG_FILE, RUN_INFO_FILE = "config.json", "run_info.json"
WITH_PASSWORD = ("judge.base_url", "track.mlflow")  # addresses; files have them without


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Sections belong to the modules that read them."""

    seed: int = 0
    workdir: str = "runs/run"
    stages: tuple[str, ...] = STAGES
    model: ModelSource = ModelSource()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    grpo: GRPOConfig = GRPOConfig()
    rollout: SamplerConfig = SamplerConfig()
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    pod: PodConfig = PodConfig()
    track: TrackConfig = TrackConfig()
    guard: GuardConfig = GuardConfig()

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or len(set(self.stages)) < len(self.stages):
            raise ValueError(
                f"stages={self.stages}: expected some of {STAGES}, each once; on a command line: "
                "--config.stages=\"('sft','grpo')\""
            )
        if list(self.stages) != sorted(self.stages, key=STAGES.index):
            raise ValueError(f"stages={self.stages}: they run in the order {STAGES}")
        for key, value in flatten(to_dict(self)).items():
            if key not in WITH_PASSWORD and redact(value, key) != value:  # not repeated
                raise ValueError(f"{key} holds a password or a key, which would be written to logs "
                                 "and checkpoints; allowed: one that the environment holds")


# Keys that change how fast or where a run computes, not what; a checkpoint may outlive them.
_CIRCUMSTANCES = re.compile(
    r"workdir|stages|(mesh|checkpoint|evaluate|pod|track|guard)\..*"
    r"|model\.attention|rollout\.(micro_batch_prompts|shrink|smallest)"
    r"|(sft|grpo)\.(micro_batch\w*|pack\w*|logit_chunk|remat|log_every|profile_step)"
    r"|judge\.(base_url|api_key_env|concurrency|timeout_s|retries|deadline_s|max_missing|mode)"
    r"|judge\.(store|preflight|requests_per_minute|tokens_per_minute|batch_size)"
    r"|data\.(test|test_size)"
)


# Younger than many a checkpoint, which was made with these values.
_YOUNGER = {
    "data.reasoning": "tagged", "reward.reasoning": "tagged", "sft.repriced": 0.0,
    "reward.tasks": [], "judge.top_p": 1.0, "judge.thinking": "default", "judge.rules": True,
    "judge.reasoning_effort": "", "judge.extra_body": "", "judge.prompt_tokens": 4096,
    "grpo.ahead": 0, "grpo.filter_on": "",
}


def define_flag(example: str = "configs/demo_cpu.py") -> flags.FlagHolder:
    """`--config=FILE[:argument]` and `--config.section.key=value`."""
    return config_flags.DEFINE_config_file(
        "config", None, f"Config file, as in --config={example}", lock_config=True
    )


def parse_flags(argv: Sequence[str], cls: type = Config) -> list[str]:
    """For `absl.app.run(main, flags_parser=…)`: an override of a key unknown to the dataclass
    `cls`, a value that is none, a word that belongs to no flag and what a config file raises end
    with one line and status 2."""
    try:
        check_overrides(cls, argv[1:])
        left = flags.FLAGS(list(argv))
        if not left[1:]:
            return left
        problem = f"{' '.join(left[1:])}: belongs to no flag; allowed: --flag=value (--helpshort)"
    except ConfigError as error:
        problem = str(error)
    except flags.Error as error:
        problem = _flag_problem(str(error))
    except Exception as error:  # of the config file: it is Python, and may raise anything
        files = [arg for arg in argv if re.match("--?config=", arg)]
        text = " ".join(str(error).split())
        problem = (f"{' '.join(files)}: {type(error).__name__}: {text}; needed: a Python file "
                   "with get_config(), as those in configs/")
    print(f"error: {redact_text(problem)}", file=sys.stderr)
    sys.exit(2)


def _flag_problem(text: str) -> str:
    """What a flag's error says; where ml_collections adds a trace to it, without the trace."""
    first, _, trace = text.partition("\n")
    if "Traceback" not in trace:
        return text
    flag = re.match(r"flag (\S+):", first)
    reason = trace.strip().splitlines()[-1].partition("Error: ")[2]
    return f"{flag[1]}: {reason}" if flag and reason else text


def from_flag(holder: flags.FlagHolder, cls: type[T] = Config) -> T:
    """The frozen config that the command line names, a `cls`. Raises ConfigError."""
    if holder.value is None:
        example = flags.FLAGS[holder.name].help.rpartition(", as in ")[2]
        raise ConfigError(f"--config=FILE is required, for example {example}")
    try:
        if not hasattr(holder.value, "items"):
            kind = type(holder.value).__name__
            raise ConfigError(f"--config: get_config() returned a {kind}; allowed: a ConfigDict")
        return freeze(cls, holder.value)
    except OSError as error:  # ml_collections keeps a file that it could not read until now
        raise ConfigError(f"--config: {str(error).strip().splitlines()[-1].strip()}") from error


def check(config: Config, device_count: int, slices: int = 1, device: str = "cpu") -> None:
    """Batch sizes and mesh against each other and the devices of all TPU slices together.

    `device` is their kind, as jax names platforms.

    Raises ConfigError with one line per mistake: key, value, what is allowed.
    """
    try:
        shards = batch_shards(config.mesh, device_count, slices)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    problems = []
    if config.data.reasoning != config.reward.reasoning:
        problems.append(
            f"data.reasoning={config.data.reasoning!r}, reward.reasoning="
            f"{config.reward.reasoning!r}: what is asked for and what is rewarded must be the same"
        )
    if "grpo" in config.stages:
        components = component_names(config.reward.tasks)
        problems += (_grpo_problems(config.grpo, shards, components)
                     or _rollout_problems(config, shards))
        if config.grpo.pack and is_flash(config.model.attention, device):
            problems.append(
                f"grpo.pack={config.grpo.pack}, model.attention={config.model.attention!r}: the "
                "kernel knows no packed rows; set model.attention='dense', or grpo.pack=0"
            )
    if "sft" in config.stages:
        problems += _too_small("sft", config.sft, ("steps", "logit_chunk"))
        if config.sft.repriced and config.data.reasoning == "none":
            problems.append(
                f"sft.repriced={config.sft.repriced}, data.reasoning='none': without blocks there "
                "is no matrix that prices could edit; allowed is sft.repriced=0"
            )
        problems += _cut_problems(
            "sft", ("batch_size", config.sft.batch_size),
            ("micro_batch_size", config.sft.micro_batch_size), shards,
        )
    if config.checkpoint.keep_best and "grpo" in config.stages and not (
            config.evaluate.every_steps and "evaluate" in config.stages):
        problems.append(
            f"checkpoint.keep_best={config.checkpoint.keep_best}, evaluate.every_steps="
            f"{config.evaluate.every_steps}, stages={config.stages}: what is best is known of "
            "steps that are evaluated; set evaluate.every_steps >= 1 and the stage 'evaluate'"
        )
    if "evaluate" in config.stages:
        problems += _cut_problems(
            "evaluate", ("batch_size", config.evaluate.batch_size), ("", 0), shards
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _too_small(section: str, part: GRPOConfig | SFTConfig, keys: Sequence[str]) -> list[str]:
    return [
        f"{section}.{key}={getattr(part, key)}: must be >= 1"
        for key in keys if getattr(part, key) < 1
    ]


def _grpo_problems(grpo: GRPOConfig, shards: int, components: Sequence[str]) -> list[str]:
    problems = _too_small(
        "grpo", grpo, ("steps", "prompts_per_step", "minibatches", "epochs", "logit_chunk")
    )
    if grpo.normalizer not in NORMALIZERS:
        problems.append(
            f"grpo.normalizer={grpo.normalizer!r}: expected one of {tuple(NORMALIZERS)}"
        )
    named = FACTORS + tuple(components)
    if grpo.filter_on and grpo.filter_on not in named:
        problems.append(f"grpo.filter_on={grpo.filter_on!r}: expected '' (off) or one of {named}")
    if grpo.samples_per_prompt < 2:
        problems.append(
            f"grpo.samples_per_prompt={grpo.samples_per_prompt}: must be >= 2, a completion is "
            "compared with the others of its group"
        )
    if problems:
        return problems
    if grpo.prompts_per_step % grpo.minibatches:
        return [
            f"grpo.minibatches={grpo.minibatches} does not divide grpo.prompts_per_step="
            f"{grpo.prompts_per_step}: it may be one of {_divisors(grpo.prompts_per_step)}"
        ]
    prompts = grpo.prompts_per_step // grpo.minibatches
    key = "prompts_per_step" if grpo.minibatches == 1 else "prompts_per_step/minibatches"
    return _cut_problems(
        "grpo", (key, prompts), ("micro_batch_prompts", grpo.micro_batch_prompts), shards
    )


def _rollout_problems(config: Config, shards: int) -> list[str]:
    whole = ("grpo.prompts_per_step", config.grpo.prompts_per_step)
    piece = ("rollout.micro_batch_prompts", config.rollout.micro_batch_prompts)
    return _piece_problems(whole, piece, shards)


def _cut_problems(
    section: str, whole: tuple[str, int], piece: tuple[str, int], shards: int
) -> list[str]:
    """A batch must cut evenly over the mesh's batch axes, and into micro-batches that do so too."""
    (key, size), (piece_key, piece_size) = whole, piece
    if size < 1 or size % shards:
        near = sorted({max(size // shards, 1) * shards, (max(size, 0) // shards + 1) * shards})
        return [
            f"{section}.{key}={size} must be a multiple of {shards}, the mesh's "
            f"{' x '.join(BATCH_AXES)} shards: for example {' or '.join(map(str, near))}"
        ]
    named = (f"{section}.{piece_key}", piece_size)
    return _piece_problems((f"{section}.{key}", size), named, shards)


def _piece_problems(whole: tuple[str, int], piece: tuple[str, int], shards: int) -> list[str]:
    """A micro-batch, counted per shard, must divide a shard's part of the batch, or cover it."""
    (key, size), (piece_key, piece_size) = whole, piece
    part = size // shards
    if piece_size == 0 or piece_size >= part or (piece_size > 0 and part % piece_size == 0):
        return []
    return [
        f"{piece_key}={piece_size} does not divide {part}, each of {shards} shards' part of "
        f"{key}={size}: it may be one of {_divisors(part)}, or 0 for all at once"
    ]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def batch_table(config: Config, shards: int) -> str:
    """What the batch settings amount to over `shards` parts of a batch, as text."""
    grpo, sft, rollout = config.grpo, config.sft, config.rollout
    rows: list[tuple[str, str, str]] = []
    if "sft" in config.stages:
        pieces = piece_count(sft.batch_size, sft.micro_batch_size, shards)
        rows += [
            ("SFT", "rows per update", f"{sft.batch_size:,}"),
            ("", "micro-batches per update", f"{pieces:,} of {sft.batch_size // pieces:,} rows"),
            ("", "updates", f"{sft.steps:,}"),
        ]
    if "grpo" in config.stages:
        Q, G, T = grpo.prompts_per_step, grpo.samples_per_prompt, rollout.max_new_tokens
        mini = Q // grpo.minibatches
        micro = mini // piece_count(mini, grpo.micro_batch_prompts, shards)
        rows += [
            ("GRPO", "prompts per step", f"{Q:,}"),
            ("", "completions per step", f"{Q:,} x {G} = {Q * G:,}"),
            ("", "completion tokens per step", f"at most {Q * G:,} x {T:,} = {Q * G * T:,}"),
            ("", "prompt tokens per step", f"at most {Q:,} x {config.data.max_prompt_tokens:,} = "
                 f"{Q * config.data.max_prompt_tokens:,}"),
            ("", "updates per step", f"{grpo.epochs} x {grpo.minibatches} (epochs x minibatches) = "
                 f"{grpo.updates_per_step:,}"),
            ("", "micro-batches per update",
             f"{mini // micro:,} of {micro:,} prompts = {micro * G:,} completions"),
            ("", "updates", f"{grpo.steps:,} steps x {grpo.updates_per_step:,} = "
                 f"{grpo.steps * grpo.updates_per_step:,}"),
        ]
    width = max((len(name) for _, name, _ in rows), default=0)
    return "\n".join(f"{stage:<6}{name:<{width}}  {value}" for stage, name, value in rows)


def fingerprint(config: Config, **identity: Any) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that continues it.

    All settings but circumstances (work directory, mesh, micro-batches, judge address …);
    `identity` adds what the config only points at: the model's sizes, a hash of the tokenizer or of
    the prompts. The number of steps belongs to it only where the learning rate depends on it.
    """
    flat = flatten(to_dict(config))
    flat = {key: value for key, value in flat.items() if not _CIRCUMSTANCES.fullmatch(key)}
    for key, value in _YOUNGER.items():
        if flat.get(key) == value:
            del flat[key]
    for section in ("sft", "grpo"):
        if flat[f"{section}.decay"] == "constant":
            del flat[f"{section}.steps"]
    return {**flat, **identity}


def resolved_json(config: Config) -> str:
    """The whole config as JSON, secrets redacted; `load_run_config` reads it back.

    It is the same text in every process of a pod: which of them this one is, is left out.
    """
    pod = dataclasses.replace(config.pod, process_index=PodConfig.process_index)
    whole = to_dict(dataclasses.replace(config, pod=pod))
    return json.dumps(redact(whole), indent=2) + "\n"


def load_run_config(workdir: str | Path) -> Config:
    """The config that `workdir` was run with. Raises FileNotFoundError, ConfigError."""
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {workdir} is not a run's work directory")
    values = read_json(path)
    try:
        return freeze(Config, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def save_run_info(workdir: str | Path, config: Config) -> None:
    """Writes config.json and run_info.json (versions, devices, git revision, command line)."""
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    info = {
        "command": [redact_text(arg) for arg in sys.argv],
        "git": git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": {
            "count": jax.device_count(),
            "kind": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
        },
        "packages": versions(),
    }
    write_whole(workdir / CONFIG_FILE, resolved_json(config))
    write_whole(workdir / RUN_INFO_FILE, json.dumps(info, indent=2) + "\n")
