"""A run: the stages named in the config, in order, each picking up where it was left.

    open_session   config -> devices, tokenizer, prompts, judge, writers: all that can be wrong with
                   the input is found here, before any compilation
    run            policy = load; evaluate; policy = sft; evaluate; policy = grpo; evaluate; export
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from gtalign_jax import export
from gtalign_jax.config import Config, batch_table, check, fingerprint, save_run_info
from gtalign_jax.data import coldstart
from gtalign_jax.data.batches import PromptSet
from gtalign_jax.data.chat import encode_chats, encode_completion, load_tokenizer
from gtalign_jax.data.chat import stop_ids as find_stop_ids
from gtalign_jax.data.prompt import Prompt
from gtalign_jax.data.sources import load_prompts
from gtalign_jax.data.tokenizer import chain_corpus, train_tokenizer
from gtalign_jax.evaluation.evaluate import evaluate
from gtalign_jax.model import load
from gtalign_jax.model.sharding import ROLLOUT, TRAIN, Layout, check_model_fits, make_mesh
from gtalign_jax.model.spec import ModelConfig, Params, num_params
from gtalign_jax.reward.judges import Judge, make_judge
from gtalign_jax.reward.rules import RULES
from gtalign_jax.reward.tasks import task_of
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler
from gtalign_jax.training import plots
from gtalign_jax.training.checkpoint import Checkpointer
from gtalign_jax.training.collect import Collector
from gtalign_jax.training.metrics import Console, MetricsWriter, RolloutLog, read_rows, step_line
from gtalign_jax.training.sft import ExampleSet
from gtalign_jax.training.state import (
    OptimizerConfig,
    TrainState,
    abstract_state,
    make_optimizer,
    make_state,
    named_key,
)
from gtalign_jax.training.trainer import Stage, make_reshard, train_grpo, train_sft

log = logging.getLogger(__name__)

TOKENIZER_CORPUS = 2000  # training prompts, with a chain each, that a new tokenizer is learnt from
SFT_KEYS = ("seed", "model.", "data.", "sft.", "identity")  # what a cold start depends on


@dataclasses.dataclass(frozen=True)
class Session:
    """What every stage of a run shares."""

    config: Config
    model: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    tokenizer_dir: str
    stop_ids: tuple[int, ...]
    train: PromptSet
    test: PromptSet | None
    judge: Judge
    train_layout: Layout
    rollout_layout: Layout
    dtype: Any
    metrics: MetricsWriter
    console: Console
    fingerprint: dict[str, Any]

    def checkpoints(self, stage: str, read_only: bool = False) -> Checkpointer:
        prints = self.fingerprint
        if stage == "sft":
            prints = {k: v for k, v in prints.items() if k.startswith(SFT_KEYS)}
        directory = export.checkpoint_dir(self.config.workdir, stage)
        return Checkpointer(directory, self.config.checkpoint, prints, read_only=read_only)

    def stage(self, name: str, steps: int, checkpoints: Checkpointer, log_every: int = 1) -> Stage:
        return Stage(name, steps, self.config.seed, checkpoints, self.config.checkpoint,
                     self.metrics, self.console, log_every)

    @functools.cached_property
    def evaluation(self) -> tuple[Collector, Any]:
        """(collector, reshard) for held-out prompts; made once, so that each compiles once."""
        cfg = self.config.evaluate
        sampler = dataclasses.replace(
            self.config.rollout, temperature=cfg.temperature, top_k=0, top_p=1.0
        )
        reshard = make_reshard(self.model, self.rollout_layout, self.dtype)
        return self.collector(sampler, cfg.samples), reshard

    def collector(self, sampler: SamplerConfig, samples: int,
                  micro_batch_prompts: int = 0) -> Collector:
        return Collector(
            sample=make_sampler(self.model, sampler, samples, self.stop_ids, self.rollout_layout),
            tokenizer=self.tokenizer,
            judge=self.judge,
            reward=self.config.reward,
            layout=self.rollout_layout,
            filters=sampler.filters,
            micro_batch_prompts=micro_batch_prompts,
        )


def open_session(config: Config) -> Session:
    """Everything before the first step. Raises ValueError and the like with a text for the user."""
    console = Console()
    check(config, jax.device_count())
    if jax.default_backend() != "cpu":  # a CPU's programs are quick to compile, and not portable
        jax.config.update("jax_compilation_cache_dir", f"{config.workdir}/compiled")
    mesh = make_mesh(config.mesh)
    prompts = load_prompts(config.data, "train")
    held_out = load_prompts(config.data, "test") if "evaluate" in config.stages else []
    for source in sorted({prompt.data_source for prompt in (*prompts, *held_out)}):
        task_of(source)
    tokenizer, tokenizer_dir = _tokenizer(config, prompts)
    model = load.model_config(config.model, len(tokenizer))
    check_model_fits(model, mesh)
    limit = config.data.max_prompt_tokens
    session = Session(
        config=config,
        model=model,
        tokenizer=tokenizer,
        tokenizer_dir=tokenizer_dir,
        stop_ids=find_stop_ids(tokenizer, load.generation_config(config.model)),
        train=PromptSet(prompts, tokenizer, limit),
        test=PromptSet(held_out, tokenizer, limit) if held_out else None,
        judge=make_judge(config.judge, RULES),
        train_layout=Layout(mesh, TRAIN, config.model.attention),
        rollout_layout=Layout(mesh, ROLLOUT, config.model.attention),
        dtype=jnp.dtype(config.model.compute_dtype),
        metrics=MetricsWriter(config.workdir),
        console=console,
        fingerprint=fingerprint(config, identity=_identity(config, model, tokenizer, prompts)),
    )
    _claim(session)
    _greet(session)
    return session


def _claim(session: Session) -> None:
    """Signs the work directory with this run's config, unless another run's checkpoints lie there.

    Raises CheckpointError. Refused before anything is computed or overwritten.
    """
    config = session.config
    for stage in export.TRAINING_STAGES:
        if stage in config.stages and Path(export.checkpoint_dir(config.workdir, stage)).is_dir():
            # Only to read: a writer sweeps up after a killed save in the background, and two such
            # sweeps, this one and the stage's own, end each other.
            with contextlib.closing(session.checkpoints(stage, read_only=True)) as checkpoints:
                checkpoints.check()
    save_run_info(config.workdir, config)


def _greet(session: Session) -> None:
    """What a run is about to do, in a few lines."""
    devices = jax.devices()
    held_out = f", {len(session.test)} held out" if session.test else ""
    session.console.say(
        f"{len(devices)} {devices[0].device_kind} device(s), mesh "
        f"{dict(session.train_layout.mesh.shape)}\n"
        f"{session.model.family} with {num_params(session.model) / 1e6:.2f}M parameters, "
        f"vocabulary {session.model.vocab_size:,}\n"
        f"{len(session.train):,} training prompts{held_out}; "
        f"{session.train.dropped} too long\n{batch_table(session.config)}\n"
    )


def _tokenizer(config: Config, prompts: list[Prompt]) -> tuple[PreTrainedTokenizerBase, str]:
    """The model's own tokenizer; for a model that starts from nothing, one trained here, once."""
    directory = export.find_tokenizer(config, config.workdir)
    is_own = config.model.tokenizer or config.model.path
    if not is_own and not (Path(directory) / "tokenizer.json").exists():
        some = prompts[:TOKENIZER_CORPUS]
        has_chains = config.data.source == "builtin" or config.sft.examples != "builtin"
        pairs = _examples(config, some) if has_chains else [(p, p.ground_truth) for p in some]
        train_tokenizer(
            chain_corpus(pairs), config.model.vocab_size, directory,
            # Beside a Qwen2 config transformers cuts words its own way, and JSON keys with them.
            chain_pieces=config.model.family != "qwen2",
        )
    return load_tokenizer(directory), directory


def _examples(config: Config, prompts: list[Prompt]) -> list[coldstart.Example]:
    if config.sft.examples == "builtin":
        return coldstart.cold_start_examples(prompts, config.seed)
    return coldstart.load_examples(config.sft.examples)


def _identity(config: Config, model: ModelConfig, tokenizer: PreTrainedTokenizerBase,
              prompts: list[Prompt]) -> dict[str, Any]:
    """What the config only points at: a changed file under the same name is another run."""
    digest = lambda data: hashlib.sha256(data).hexdigest()[:16]  # noqa: E731
    text = lambda x: json.dumps(x, sort_keys=True).encode()  # noqa: E731
    cold_start = config.sft.examples if "sft" in config.stages else None
    if cold_start not in ("builtin", None):
        cold_start = digest(Path(cold_start).read_bytes())
    return {
        "cold_start": cold_start,
        "model": dataclasses.asdict(model),
        "tokenizer": digest(text([tokenizer.get_vocab(), tokenizer.chat_template])),
        "prompts": digest(text([
            [p.id, p.data_source, p.messages, p.question, p.ground_truth] for p in prompts
        ])),
    }


def load_policy(session: Session) -> Params:
    """The weights that the run starts from, cut over the mesh by the training rules."""
    config = session.config
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return load.load_model(config.model, session.model, session.train_layout, key)


def _example_set(session: Session) -> ExampleSet:
    """Cold-start pairs as tokens; the completion ends with EOS, and the loss covers that too."""
    config, limit = session.config, session.config.sft.max_completion_tokens
    pairs = _examples(config, list(session.train.prompts))
    prompts = encode_chats(session.tokenizer, [prompt.messages for prompt, _ in pairs])
    eos = session.tokenizer.eos_token_id
    if eos is None:
        raise ValueError(f"the tokenizer {session.tokenizer_dir!r} has no EOS token to end a chain")
    completions = [[*encode_completion(session.tokenizer, text), eos] for _, text in pairs]
    kept = [
        (prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)
        if len(prompt) <= config.data.max_prompt_tokens and len(completion) <= limit
    ]
    if not kept:
        raise ValueError(
            f"sft.max_completion_tokens={limit} and data.max_prompt_tokens="
            f"{config.data.max_prompt_tokens} leave none of {len(pairs)} cold-start examples; the "
            f"shortest completion has {min(map(len, completions), default=0)} tokens"
        )
    if len(kept) < len(pairs):
        log.warning("dropped %d of %d cold-start examples: too long", len(pairs) - len(kept),
                    len(pairs))
    widths = [-(-max(map(len, rows)) // 16) * 16 for rows in zip(*kept, strict=True)]
    return ExampleSet([p for p, _ in kept], [c for _, c in kept], *widths)


def run_sft(session: Session, policy: Params | None, checkpoints: Checkpointer) -> TrainState:
    """The cold start, from `policy` or from its last checkpoint."""
    cfg = session.config.sft
    fresh, abstract = _states(session, policy, cfg, cfg.steps)
    return train_sft(
        session.stage("sft", cfg.steps, checkpoints, cfg.log_every), fresh, abstract,
        _example_set(session), model=session.model, cfg=cfg, layout=session.train_layout,
        dtype=session.dtype,
    )


def run_grpo(session: Session, policy: Params, checkpoints: Checkpointer) -> TrainState:
    """GRPO from `policy`, which is also the reference, or from its last checkpoint."""
    config, cfg = session.config, session.config.grpo
    fresh, abstract = _states(session, policy, cfg, cfg.steps * cfg.updates_per_step)
    reference = None
    if cfg.reference:  # only ever computed with: half the memory where that is in bfloat16
        reference = make_reshard(session.model, session.train_layout, session.dtype)(policy)
    every = config.evaluate.every_steps if session.test else 0
    session.metrics.truncate("evaluate", checkpoints.latest() or 0)

    def after(step: int, state: TrainState) -> None:
        if every and step % every == 0 and step < cfg.steps:
            means = evaluate_policy(session, state.params, f"step {step}")
            session.metrics.write("evaluate", step, means)

    with contextlib.closing(RolloutLog(config.workdir)) as rollouts:
        return train_grpo(
            session.stage("grpo", cfg.steps, checkpoints), fresh, abstract,
            reference, session.train,
            session.collector(config.rollout, cfg.samples_per_prompt,
                              config.rollout.micro_batch_prompts),
            model=session.model, cfg=cfg, layout=session.train_layout, dtype=session.dtype,
            rollouts=rollouts, after=after,
        )


def _states(session: Session, policy: Params | None, cfg: OptimizerConfig, updates: int):
    """(how to make the first state, the abstract state to restore into)."""
    optimizer = make_optimizer(cfg, updates)
    arguments = (session.model, optimizer, session.train_layout)
    return functools.partial(make_state, policy, *arguments), abstract_state(*arguments)


def evaluate_policy(session: Session, params: Params, label: str) -> dict[str, float]:
    """Means over the held-out prompts; the completions go to evaluations.jsonl."""
    began = time.perf_counter()
    config, (collect, reshard) = session.config, session.evaluation
    key = named_key(jax.random.key(config.seed), "evaluate", 0)
    results, rows = evaluate(reshard(params), collect, session.test, config.evaluate, key)
    _save_evaluation(Path(config.workdir) / "evaluations.jsonl", label, rows)
    session.console.say(
        f"{label}: {len(rows)} held-out completions in {time.perf_counter() - began:.1f}s | "
        f"{step_line(results)}"
    )
    return results


def _save_evaluation(path: Path, label: str, rows: list[dict[str, Any]]) -> None:
    """In place of what `label` has there: a resumed or prolonged run evaluates some anew."""
    kept = [row for row in read_rows(path) if row["label"] != label] if path.exists() else []
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n"
                        for row in (*kept, *({"label": label, **row} for row in rows)))
    partial.replace(path)


def run(config: Config) -> dict[str, dict[str, float]]:
    """The whole run. Returns the held-out means by stage, also saved as results.json.

    Raises ValueError (ConfigError among them), FileNotFoundError, CheckpointError, and
    FloatingPointError where the training diverges.
    """
    session = open_session(config)
    with contextlib.closing(session.metrics):
        results = _past_results(session)
        return _finish(session, _train(session, results), results)


def _past_results(session: Session) -> dict[str, dict[str, float]]:
    """What was evaluated before, unless that was another model or other held-out prompts.

    What training depends on is not asked here: its results stand beside checkpoints that are.
    """
    workdir, prints = Path(session.config.workdir), session.fingerprint
    about = {k: v for k, v in prints.items() if k.startswith(("seed", "model", "reward", "judge"))}
    held_out = [[p.id, p.question] for p in (session.test.prompts if session.test else ())]
    identity = {k: prints["identity"][k] for k in ("model", "tokenizer")}
    text = json.dumps([about, identity, dataclasses.asdict(session.config.evaluate), held_out],
                      sort_keys=True, default=str)
    digest, mark = hashlib.sha256(text.encode()).hexdigest(), workdir / "results.digest"
    if session.test is not None and (not mark.exists() or mark.read_text() != digest):
        (workdir / plots.RESULTS_FILE).unlink(missing_ok=True)
        mark.write_text(digest)
    return plots.read_results(workdir)


def _train(session: Session, results: dict[str, dict[str, float]]) -> Params | None:
    """The training stages, each between two evaluations; None where there is no such stage."""
    config, policy = session.config, None

    def report(label: str, params: Params) -> None:
        if session.test is not None and label not in results:
            results[label] = evaluate_policy(session, params, label)
            plots.save_results(config.workdir, results)

    for name, stage, steps, before, after in (
        ("sft", run_sft, config.sft.steps, plots.BEFORE, plots.COLD_START),
        ("grpo", run_grpo, config.grpo.steps,
         plots.COLD_START if "sft" in config.stages else plots.BEFORE, plots.AFTER),
    ):
        if name not in config.stages:
            continue
        with contextlib.closing(session.checkpoints(name)) as checkpoints:
            if checkpoints.latest() != steps:
                results.pop(after, None)  # of fewer steps, when a finished run is prolonged
            if policy is None and not (checkpoints.steps() and name == "sft" and before in results):
                policy = load_policy(session)
            if before not in results:
                report(before, policy)
            policy = stage(session, policy, checkpoints).params
        report(after, policy)
    return policy


def _finish(session: Session, policy: Params | None,
            results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Curves, export and the closing table."""
    config, label = session.config, "as given"
    if policy is None:  # no training stage: the last policy trained here, else the model as given
        try:
            policy, _, label = export.restore_policy(
                config.workdir, config, layout=session.train_layout
            )
        except FileNotFoundError:
            policy = load_policy(session)
        if session.test is not None:
            results[label] = evaluate_policy(session, policy, label)
    if "grpo" in config.stages:
        session.console.say(f"curves: {plots.welfare_curves(config.workdir)}")
    if "export" in config.stages:
        out = f"{config.workdir}/hf"
        export.write(policy, session.model, config, session.tokenizer_dir, out)
        session.console.say(f"exported: {out}")
    if results:
        session.console.say(plots.save_results(config.workdir, results))
    return results
