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
"""

import dataclasses
import re
from typing import Any

from gtalign_jax import export, run
from gtalign_jax.config import Config, load_run_config
from gtalign_jax.model import load
from gtalign_jax.model.load import ModelSource
from gtalign_jax.model.spec import Params
from gtalign_jax.pod import exchange
from gtalign_jax.session import Bench
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
