"""What a command line may call a policy, and how its weights are found.

    runs/demo                        a run: its last checkpoint (also gs://…)
    runs/demo/checkpoints/grpo/45    one of its checkpoints; without the number the stage's last one
    Qwen/Qwen2.5-3B-Instruct         a Hugging Face hub name or directory
    given                            the model of --config as it is, before any training
    (nothing)                        the last checkpoint in --config's workdir, else as "given"

A run's sizes and tokenizer come from the config.json that it saved, and so does whether it was
taught to reason in blocks (`reasoning`). All else, prompts, judge, reward and evaluation, comes
from --config, and so do `compute_dtype` and `attention`, which say how to compute. Runs are only
read.

`load_player` makes one ready to answer at inference; no --config is needed for that.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gtalign_jax import export, run
from gtalign_jax.bench import Bench
from gtalign_jax.config import Config, load_run_config
from gtalign_jax.data import asking
from gtalign_jax.data.chat import load_tokenizer
from gtalign_jax.data.chat import stop_ids as find_stop_ids
from gtalign_jax.evaluation.evaluate import EVALUATIONS_FILE
from gtalign_jax.game.pricing import Usage
from gtalign_jax.model import load
from gtalign_jax.model.hf import load_params
from gtalign_jax.model.load import ModelSource
from gtalign_jax.model.sharding import ROLLOUT, Layout, MeshConfig, make_mesh, slice_count
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.pod import exchange
from gtalign_jax.rollout.player import Player
from gtalign_jax.training.learner import make_reshard
from gtalign_jax.training.logp import cast
from gtalign_jax.workdir import Files, is_dir

GIVEN = "given"
_CHECKPOINT = re.compile(r"(?P<run>.+)/checkpoints(/(?P<stage>\w+)(/(?P<step>\d+))?)?")


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy that was found, not loaded.

    Attributes:
      name: what tables call it. config: --config around this policy's model.
      run, stage, step: of a checkpoint; "" and 0 of a Hugging Face model.
    """

    name: str
    config: Config
    tokenizer_dir: str
    run: str = ""
    stage: str = ""
    step: int = 0

    def load(self, bench: Bench) -> Params:
        """Its float32 weights, laid out by the training rules."""
        if not self.run:
            return run.load_policy(bench)
        return export.restore_policy(
            self.run, self.config, self.stage, self.step, bench.train_layout
        )[0]

    def described(self) -> dict[str, Any]:
        """Which one it is, for files."""
        if not self.run:
            return {"model": self.config.model.path}
        return {"run": self.run, "stage": self.stage, "step": self.step}


def find(what: str, config: Config, key: str = "--checkpoint") -> Policy:
    """The policy that `what` names. On a pod all processes call this.

    Raises ValueError or FileNotFoundError for one that is not there.
    """
    what = what.rstrip("/")
    if not what:
        here = _is_there(f"{config.workdir}/checkpoints")
        return find(config.workdir if here else GIVEN, config, key)
    if what == GIVEN:
        if not config.model.path:
            raise ValueError(
                f"{key}={GIVEN}: the config names no model (model.path is empty), its weights are "
                f"random before training, and workdir={config.workdir!r} holds no checkpoint; "
                f"allowed: {key}=RUN, a run's work directory, or a Hugging Face model"
            )
        return Policy(
            _short(config.model.path), config, export.find_tokenizer(config, config.workdir)
        )
    match = _CHECKPOINT.fullmatch(what)
    if match is not None:
        step = match["step"] and int(match["step"])
        return _of_run(match["run"], match["stage"], step, config, key)
    if _is_there(f"{what}/checkpoints"):
        return _of_run(what, None, None, config, key)
    return _of_hub(what, config, key)


def _is_there(directory: str) -> bool:
    return exchange.broadcast(is_dir(directory), "directory of a policy")


def _of_run(directory: str, stage: str | None, step: int | None, config: Config,
            key: str) -> Policy:
    if stage is not None and stage not in export.TRAINING_STAGES:
        raise ValueError(
            f"{key}={directory}/checkpoints/{stage}: a run has checkpoints of "
            f"{' and '.join(export.TRAINING_STAGES)}"
        )
    stage, step = export.find_checkpoint(directory, stage, step)
    files = Files(directory)
    for name in ("config.json", "tokenizer"):
        files.pull(name)
    trained = load_run_config(files.directory)
    mine = dataclasses.replace(
        config,
        model=_computed_as(trained.model, config.model),
        data=dataclasses.replace(config.data, reasoning=trained.data.reasoning),
        reward=dataclasses.replace(config.reward, reasoning=trained.reward.reasoning),
    )
    name = f"{directory.rsplit('/', 1)[-1]} {stage} step {step}"
    return Policy(name, mine, export.find_tokenizer(trained, directory), directory, stage, step)


def _of_hub(what: str, config: Config, key: str) -> Policy:
    try:
        directory = load.resolve(what, key)
    except ValueError as error:
        raise ValueError(
            f"{error}, a run's work directory, or RUN/checkpoints/STAGE/STEP"
        ) from error
    model = _computed_as(ModelSource(path=what), config.model)
    return Policy(_short(what), dataclasses.replace(config, model=model), directory)


def _computed_as(model: ModelSource, like: ModelSource) -> ModelSource:
    return dataclasses.replace(
        model, compute_dtype=like.compute_dtype, attention=like.attention,
    )


def _short(path: str) -> str:
    """"Qwen/Qwen2.5-3B-Instruct", "demo/hf": the last two parts."""
    return "/".join(path.rstrip("/").split("/")[-2:])


def load_player(what: str, *, instruction: str = "", dtype: str = "",
                devices: Sequence[Any] | None = None, key: str = "--model") -> Player:
    """The policy that `what` names (see above), ready to answer.

    Args:
      instruction: how to ask it, of `asking.INSTRUCTIONS`; "": as it was taught, which a run and
        an export know, else our whole instruction.
      dtype: to compute in, of `load.COMPUTE_DTYPES`; "": float32 on CPUs, bfloat16 elsewhere.
      devices: to lie on, all of them by default.
      key: the flag that `what` comes from, for messages.

    Raises:
      ValueError, FileNotFoundError: nothing there, or a value that is not allowed.
      CheckpointError: a checkpoint that holds another model than its config says.
    """
    if not what:
        raise ValueError(f"{key} is empty; allowed: a run's work directory, RUN/checkpoints/STAGE/"
                         "STEP, or a Hugging Face directory or hub name")
    if instruction:
        asking.check_instruction(instruction)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    source = ModelSource(compute_dtype=dtype)  # refuses a dtype that it does not know
    policy = find(what, dataclasses.replace(Config(), model=source), key)
    tokenizer = load_tokenizer(policy.tokenizer_dir)
    model = load.model_config(policy.config.model, len(tokenizer))
    layout = _layout(model, policy.config.model.attention, devices)
    if policy.run:
        taught, usage = _known_of_run(policy, tokenizer)
    else:
        taught, usage = export.read_about(policy.tokenizer_dir)
    return Player(
        name=policy.name,
        model=model,
        params=_weights(policy, model, layout, jnp.dtype(dtype)),
        tokenizer=tokenizer,
        stop_ids=find_stop_ids(tokenizer, load.generation_config(policy.config.model)),
        layout=layout,
        instruction=instruction or taught or asking.OURS,
        usage=usage,
    )


def _layout(model: ModelConfig, attention: str, devices: Sequence[Any] | None) -> Layout | None:
    """Weights over as many devices as divide them, prompts over the rest; None on the one device
    on which everything lies anyway."""
    devices = list(jax.devices() if devices is None else devices)
    if devices == jax.devices()[:1]:
        return None
    per_slice = len(devices) // slice_count(devices)
    cut = (model.num_heads, model.num_kv_heads, model.d_ff, model.padded_vocab_size)
    # Each answer then waits for a part of the weights to be read, not for all of them.
    tensor = max(n for n in range(1, per_slice + 1)
                 if not per_slice % n and not any(size % n for size in cut))
    return Layout(make_mesh(MeshConfig(tensor=tensor), devices), ROLLOUT, attention)


def _weights(policy: Policy, model: ModelConfig, layout: Layout | None, dtype: Any) -> Params:
    """In `dtype`, laid out for rollout."""
    if not policy.run:
        return load_params(load.resolve(policy.config.model.path), model, layout, dtype)
    params, *_ = export.restore_policy(
        policy.run, policy.config, policy.stage, policy.step, layout
    )
    if layout is None:
        return cast(params, dtype)
    return make_reshard(model, layout, dtype)(params)


def _known_of_run(policy: Policy, tokenizer: Any) -> tuple[str, Usage | None]:
    """(instruction, usage): `find` has brought its config; its evaluations may be elsewhere."""
    files = Files(policy.run)
    files.pull(EVALUATIONS_FILE)
    trained = load_run_config(files.directory)
    usage = export.measure_usage(files.directory, tokenizer)
    return asking.instruction_of(trained.data), usage
