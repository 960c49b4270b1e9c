"""What all stages of a run share, and everything that can be wrong before the first step.

    open_session   what bench.py opens, and what a run has besides: training prompts, writers,
                   checkpoints

Mistakes in the input are found here, before any compilation. Training prompts are read only where
something is trained.

On a pod every process opens a session of its own. What is read from the work directory is decided
by process 0, which alone writes there (checkpoints aside); what must agree between processes is
compared.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from gtalign_jax import export
from gtalign_jax.bench import Bench, check_config, check_sources, keep_programs, open_bench
from gtalign_jax.config import (
    Config,
    ConfigError,
    batch_table,
    fingerprint,
    resolved_json,
    save_run_info,
)
from gtalign_jax.data import coldstart
from gtalign_jax.data.batches import PromptSet
from gtalign_jax.data.chat import decode
from gtalign_jax.data.prompt import Prompt
from gtalign_jax.data.sources import load_prompts
from gtalign_jax.data.tokenizer import chain_corpus, train_tokenizer
from gtalign_jax.model import load, safetensors_io
from gtalign_jax.model.spec import ModelConfig, num_params
from gtalign_jax.pod import exchange, share
from gtalign_jax.pod.exchange import is_first
from gtalign_jax.pod.notice import Preempted
from gtalign_jax.pod.start import check_same
from gtalign_jax.pod.watch import Watch
from gtalign_jax.training.checkpoint import Checkpointer
from gtalign_jax.training.claim import TakenError
from gtalign_jax.training.dumps import Dumps
from gtalign_jax.training.metrics import MetricsWriter
from gtalign_jax.training.stage import Stage
from gtalign_jax.training.trackers import open_trackers
from gtalign_jax.workdir import Files, TransferError, is_dir, is_remote

log = logging.getLogger(__name__)

TOKENIZER_CORPUS = 2000  # training prompts, with a chain each, that a new tokenizer is learnt from
SFT_KEYS = ("seed", "model.", "data.", "sft.", "identity")  # what a cold start depends on


@dataclasses.dataclass(frozen=True)
class Session(Bench):
    """What every stage of a run shares. `train` is None where no stage trains."""

    train: PromptSet | None
    metrics: MetricsWriter
    files: Files
    fingerprint: dict[str, Any]

    @contextlib.contextmanager
    def checkpoints(self, stage: str, read_only: bool = False) -> Iterator[Checkpointer]:
        """The checkpoints of a stage; on leaving, the save in flight is finished."""
        prints = self.fingerprint
        if stage == "sft":
            prints = {k: v for k, v in prints.items() if k.startswith(SFT_KEYS)}
        directory = export.checkpoint_dir(self.config.workdir, stage)
        cfg = self.config.checkpoint
        if stage != "grpo":  # nothing else is evaluated on its way
            cfg = dataclasses.replace(cfg, keep_best=0)
        opened = Checkpointer(
            directory, cfg, prints, read_only=read_only,
            scores=lambda: self.metrics.values("evaluate", cfg.best_metric),
        )
        try:
            yield opened
        except BaseException as error:
            # Among several, closing waits for peers that may not come; the watch ends them all.
            together = isinstance(error, Preempted) and error.together
            if together or exchange.process_count() == 1:
                opened.close()
            raise
        opened.close()

    def push(self) -> None:
        """Sends the run's files to where the work directory is, if that is not here."""
        if is_first():
            with self.watch.phase("push"):
                self.metrics.flush()
                self.files.push()

    @contextlib.contextmanager
    def pushed(self) -> Iterator[None]:
        """Pushes at the end, also at that of a run that fails: its logs tell why."""
        try:
            yield
        except BaseException as error:
            # Storage was asked often enough then, or the files are another run's.
            if not isinstance(error, TransferError | TakenError):
                try:
                    self.push()
                except TransferError as other:
                    log.warning("%s", other)
            raise
        self.push()

    def stage(self, name: str, steps: int, checkpoints: Checkpointer, log_every: int = 1) -> Stage:
        trace, evaluated_every = (0, ""), 0
        if name == "grpo":
            if self.config.checkpoint.keep_best:
                evaluated_every = self.config.evaluate.every_steps
            trace = (self.config.grpo.profile_step, f"{self.files.directory}/profile")
        return Stage(name, steps, self.config.seed, checkpoints, self.config.checkpoint,
                     self.metrics, self.console, self.watch, self.config.guard,
                     Dumps(self.files.directory / "nonfinite",
                           functools.partial(decode, self.tokenizer)),
                     self.push, log_every, evaluated_every, trace)


@contextlib.contextmanager
def opened(config: Config, watch: Watch) -> Iterator[Session]:
    """A session that has its work directory for itself, and sends its files there at the end.

    Raises TakenError where another run has it, and what `open_session` does.
    """
    check_config(config)
    files = Files(config.workdir)
    with contextlib.ExitStack() as held:
        problem = None
        if is_first():
            try:
                held.enter_context(files.claimed())
            except TakenError as error:
                problem = str(error)
        problem = exchange.broadcast(problem, "claim on the work directory")
        if problem is not None:
            raise TakenError(problem)
        session = open_session(config, watch, files)
        with session.pushed(), contextlib.closing(session.metrics):
            yield session


def open_session(config: Config, watch: Watch, files: Files) -> Session:
    """Everything before the first step. Raises ValueError and the like with a text for the user."""
    _bring(files, config)
    keep_programs(f"{config.workdir}/compiled")
    trains = any(stage in config.stages for stage in export.TRAINING_STAGES)
    prompts = training_prompts(config) if trains else []
    sources = [prompt.data_source for prompt in prompts]
    with watch.phase("tokenizer"):
        tokenizer_dir = _tokenizer(config, prompts, files)
    bench = open_bench(config, watch, tokenizer_dir, sources)
    train = PromptSet(prompts, bench.tokenizer, config.data.max_prompt_tokens) if trains else None
    identity = _identity(config, bench.model, bench.tokenizer, prompts)
    session = Session(
        **vars(bench),
        train=train,
        metrics=MetricsWriter(files.directory, enabled=is_first()),
        files=files,
        fingerprint=fingerprint(config, identity=identity),
    )
    try:
        _claim(session)
    except BaseException:
        session.metrics.close()
        raise
    _greet(session)
    return session


def training_prompts(config: Config) -> list[Prompt]:
    """The prompts that `data.train` names. Raises ConfigError where it names none."""
    data = config.data
    if data.source != "builtin" and not data.train:
        raise ConfigError(
            f"data.train is empty, so nothing can be trained: the prompts of data.test={data.test} "
            f"are for evaluation only; allowed: stages={config.stages} without sft and grpo, or "
            "training files in data.train"
        )
    prompts = load_prompts(data, "train")
    check_sources(config, prompts)
    return prompts


def _bring(files: Files, config: Config) -> None:
    """Makes process 0's copy of a remote work directory; a local one every process must see."""
    if not is_remote(config.workdir):
        share.check_shared(config.workdir)
    elif is_first():
        files.pull()


def _claim(session: Session) -> None:
    """Signs the work directory with this run's config, unless another run's checkpoints lie there.

    Raises CheckpointError. Refused before anything is computed or overwritten.
    """
    config = session.config
    identity = session.fingerprint["identity"]
    held_out = session.test.prompts if session.test else ()
    others = {"held-out prompts": _digest([[p.id, p.question, p.ground_truth] for p in held_out]),
              "stop ids": session.stop_ids}
    check_same("what the run is made of", {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in (identity | others).items()
    })
    begun = [
        stage for stage in export.TRAINING_STAGES
        if stage in config.stages and is_dir(export.checkpoint_dir(config.workdir, stage))
    ]
    for stage in exchange.broadcast(begun, "stages begun"):
        # Only to read: a writer sweeps up after a killed save in the background, and two such
        # sweeps, this one and the stage's own, end each other.
        with session.checkpoints(stage, read_only=True) as checkpoints:
            checkpoints.check()
    if is_first():
        settings = {k: v for k, v in session.fingerprint.items() if k != "identity"}
        session.metrics.follow(open_trackers(
            config.track, session.files.directory, name=Path(config.workdir).name,
            config_json=resolved_json(config), settings=settings,
        ))
        save_run_info(session.files.directory, config)
        session.push()


def _greet(session: Session) -> None:
    """What a run is about to do, in a few lines."""
    devices, shards = jax.devices(), session.train_layout.axis_size("prompts")
    prompts = [f"{len(session.train):,} training prompts"] if session.train else []
    prompts += [f"{len(session.test):,} held-out prompts"] if session.test else []
    several = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    session.console.say(
        f"{len(devices)} {devices[0].device_kind} device(s){several}, mesh "
        f"{dict(session.train_layout.mesh.shape)}\n"
        f"{session.model.family} with {num_params(session.model) / 1e6:.2f}M parameters, "
        f"vocabulary {session.model.vocab_size:,}\n"
        f"{', '.join(prompts) or 'no prompts'}\n{batch_table(session.config, shards)}\n"
    )


def _tokenizer(config: Config, prompts: list[Prompt], files: Files) -> str:
    """Where the model's own tokenizer lies; for a model from nothing, one trained here, once."""
    directory = export.find_tokenizer(config, config.workdir)
    is_own = config.model.tokenizer or config.model.path
    if is_first() and not is_own and not (Path(directory) / "tokenizer.json").exists():
        some = (prompts or training_prompts(config))[:TOKENIZER_CORPUS]
        has_chains = config.data.source == "builtin" or config.sft.examples != "builtin"
        pairs = examples(config, some) if has_chains else [(p, p.ground_truth) for p in some]
        train_tokenizer(
            chain_corpus(pairs), config.model.vocab_size, directory,
            # Beside a Qwen2 config transformers cuts words its own way, and JSON keys with them.
            chain_pieces=config.model.family != "qwen2",
        )
        files.push()
    exchange.broadcast(None, "tokenizer")  # it is there now
    if not is_first():
        files.pull("tokenizer")
    return directory


def examples(config: Config, prompts: list[Prompt]) -> list[coldstart.Example]:
    """Cold-start pairs for `prompts`, or those of the file that the config names."""
    if config.sft.examples == "builtin":
        return coldstart.cold_start_examples(prompts, config.seed, config.data.reasoning)
    return coldstart.load_examples(config.sft.examples, config.data.reasoning)


def _identity(config: Config, model: ModelConfig, tokenizer: PreTrainedTokenizerBase,
              prompts: list[Prompt]) -> dict[str, Any]:
    """What the config only points at: a changed file under the same name is another run."""
    cold_start = config.sft.examples if "sft" in config.stages else None
    if cold_start not in ("builtin", None):
        cold_start = hashlib.sha256(Path(cold_start).read_bytes()).hexdigest()[:16]
    weights = {}
    if config.model.path:
        weights["weights"] = safetensors_io.digest(Path(load.resolve(config.model.path)))
    return {
        **weights,
        "cold_start": cold_start,
        "model": dataclasses.asdict(model),
        "tokenizer": _digest([tokenizer.get_vocab(), tokenizer.chat_template]),
        "prompts": _digest([
            [p.id, p.data_source, p.messages, p.question, p.ground_truth] for p in prompts
        ]),
    }


def _digest(value: Any) -> str:
    """A short name for what JSON says of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
