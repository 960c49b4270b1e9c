"""A run: the stages named in the config, in order, each picking up where it was left.

    with opened(config) as session
    policy = load; evaluate; policy = sft; evaluate; policy = grpo; evaluate; export

Every process of a pod runs all of this; files are written by process 0.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import random

import jax

from gtalign_jax import export, memory, report
from gtalign_jax.bench import Bench
from gtalign_jax.config import Config, ConfigError
from gtalign_jax.data import coldstart
from gtalign_jax.data.chat import encode_chats, encode_completion
from gtalign_jax.evaluation import tables
from gtalign_jax.evaluation.evaluate import EVALUATIONS_FILE
from gtalign_jax.evaluation.measures import by_label
from gtalign_jax.model import load
from gtalign_jax.model.spec import Params
from gtalign_jax.pod import exchange
from gtalign_jax.pod.exchange import is_first
from gtalign_jax.pod.watch import Watch
from gtalign_jax.session import Session, examples, opened
from gtalign_jax.training import plots
from gtalign_jax.training.checkpoint import Checkpointer
from gtalign_jax.training.files import write_whole
from gtalign_jax.training.learner import make_reshard
from gtalign_jax.training.metrics import RolloutLog, read_rows
from gtalign_jax.training.sft import ExampleSet
from gtalign_jax.training.state import (
    OptimizerConfig,
    TrainState,
    abstract_state,
    discard,
    make_optimizer,
    make_state,
)
from gtalign_jax.training.trainer import train_grpo, train_sft
from gtalign_jax.workdir import to_write

log = logging.getLogger(__name__)


def load_policy(bench: Bench) -> Params:
    """The weights that the run starts from, cut over the mesh by the training rules."""
    config = bench.config
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    with bench.watch.phase("load"):
        return load.load_model(config.model, bench.model, bench.train_layout, key)


def _example_set(session: Session) -> ExampleSet:
    """Cold-start pairs as tokens; the completion ends with EOS, and the loss covers that too."""
    config, limit = session.config, session.config.sft.max_completion_tokens
    pairs = examples(config, list(session.train.prompts))
    prompts = encode_chats(session.tokenizer, [prompt.messages for prompt, _ in pairs])
    eos = session.tokenizer.eos_token_id
    if eos is None:
        raise ValueError(f"the tokenizer {session.tokenizer_dir!r} has no EOS token to end a chain")
    completions = [[*encode_completion(session.tokenizer, text), eos] for _, text in pairs]
    given = [(0, 0)] * len(pairs)
    for i, (prompt, _) in enumerate(pairs):
        rng = random.Random(f"repriced/{config.seed}/{prompt.id}")
        if rng.random() < config.sft.repriced:
            before, matrix, after = (encode_completion(session.tokenizer, part)
                                     for part in coldstart.render_repriced(prompt, rng))
            whole = [*before, *matrix, *after, eos]
            if len(whole) <= limit:  # large numbers are long; the chain as it was is not
                completions[i], given[i] = whole, (len(before), len(before) + len(matrix))
    kept = [
        row for row in zip(prompts, completions, given, strict=True)
        if len(row[0]) <= config.data.max_prompt_tokens and len(row[1]) <= limit
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
    prompts, completions, given = zip(*kept, strict=True)
    widths = [-(-max(map(len, rows)) // 16) * 16 for rows in (prompts, completions)]
    return ExampleSet(prompts, completions, *widths, given if config.sft.repriced else None)


def run_sft(session: Session, policy: Params | None, checkpoints: Checkpointer) -> TrainState:
    """The cold start, from `policy`, which it takes over, or from its last checkpoint."""
    cfg = session.config.sft
    fresh, abstract = _states(session, policy, cfg, cfg.steps, checkpoints)
    return train_sft(
        session.stage("sft", cfg.steps, checkpoints, cfg.log_every), fresh, abstract,
        _example_set(session), model=session.model, cfg=cfg, layout=session.train_layout,
        dtype=session.dtype,
    )


def run_grpo(session: Session, policy: Params, checkpoints: Checkpointer) -> TrainState:
    """GRPO from `policy`, which it takes over, or from its last checkpoint.

    `policy` is also the reference, of which a copy is kept.
    """
    config, cfg = session.config, session.config.grpo
    reference = None
    if cfg.reference:  # only ever computed with: half the memory where that is in bfloat16
        reference = make_reshard(session.model, session.train_layout, session.dtype)(policy)
    updates = cfg.steps * cfg.updates_per_step
    fresh, abstract = _states(session, policy, cfg, updates, checkpoints)
    every = config.evaluate.every_steps if session.test else 0

    def after(step: int, state: TrainState) -> None:
        if not every or step % every or step >= cfg.steps:
            return
        evaluated = exchange.broadcast(session.metrics.steps("evaluate"), "steps evaluated")
        if step not in evaluated:
            means = evaluate_policy(session, state.params, f"step {step}")
            session.metrics.write("evaluate", step, means)
            session.push()  # the save of this step came before: it would not be evaluated again

    with contextlib.closing(RolloutLog(session.files.directory, enabled=is_first())) as rollouts:
        return train_grpo(
            session.stage("grpo", cfg.steps, checkpoints), fresh, abstract,
            reference, session.train,
            session.collector(config.rollout, cfg.samples_per_prompt, session.train,
                              config.rollout.micro_batch_prompts),
            model=session.model, cfg=cfg, layout=session.train_layout, dtype=session.dtype,
            rollouts=rollouts, after=after,
        )


def _states(session: Session, policy: Params | None, cfg: OptimizerConfig, updates: int,
            checkpoints: Checkpointer):
    """(how to make the first state, the abstract state to restore into)."""
    if policy is not None and checkpoints.latest() is not None:
        discard(policy)  # the state will come from the checkpoint
    optimizer = make_optimizer(cfg, updates)
    arguments = (session.model, optimizer, session.train_layout)
    return functools.partial(make_state, policy, *arguments), abstract_state(*arguments)


def evaluate_policy(session: Session, params: Params, label: str) -> dict[str, float]:
    """Means over the held-out prompts; the completions go to evaluations.jsonl."""
    _, reshard = session.evaluation
    means = session.examine(reshard(params), label, session.files.directory)
    cfg = session.config.checkpoint
    if cfg.keep_best and cfg.best_metric not in means:
        raise ConfigError(f"checkpoint.best_metric={cfg.best_metric!r}: no mean of an evaluation; "
                          f"allowed: {', '.join(sorted(means))}")
    return means


def run(config: Config) -> dict[str, dict[str, float]]:
    """The whole run. Returns the held-out means by stage, also saved as results.json.

    Raises ValueError (ConfigError among them), FileNotFoundError, CheckpointError, and
    FloatingPointError where the training diverges, and Preempted where it was told to end.
    """
    with Watch(config.pod) as watch, memory.explained(watch):
        with opened(config, watch) as session:
            past = _past_results(session) if is_first() else None
            results = exchange.broadcast(past, "past results")
            results = _finish(session, _train(session, results), results)
            session.metrics.finish(results)
            return results


def _past_results(session: Session) -> dict[str, dict[str, float]]:
    """What was evaluated before, unless that was another model or other held-out prompts.

    What training depends on is not asked here: its results stand beside checkpoints that are.
    """
    workdir, prints = session.files.directory, session.fingerprint
    about = {k: v for k, v in prints.items() if k.startswith(("seed", "model", "reward", "judge"))}
    held_out = [[p.id, p.messages, p.question, p.ground_truth]
                for p in (session.test.prompts if session.test else ())]
    identity = {k: prints["identity"][k] for k in ("model", "tokenizer")}
    limit = session.config.rollout.max_new_tokens
    text = json.dumps([about, identity, dataclasses.asdict(session.config.evaluate), limit,
                       held_out], sort_keys=True, default=str)
    digest, mark = hashlib.sha256(text.encode()).hexdigest(), workdir / "results.digest"
    if session.test is not None and (not mark.exists() or mark.read_bytes() != digest.encode()):
        (workdir / plots.RESULTS_FILE).unlink(missing_ok=True)
        if (workdir / EVALUATIONS_FILE).exists():  # somebody may still want to read them
            (workdir / EVALUATIONS_FILE).replace(workdir / f"{EVALUATIONS_FILE}.old")
        session.metrics.truncate("evaluate", 0)
        write_whole(mark, digest)
        session.push()
    return plots.read_results(workdir)


def _train(session: Session, results: dict[str, dict[str, float]]) -> Params | None:
    """The training stages, each between two evaluations; None where there is no such stage."""
    config, policy = session.config, None

    def measure(label: str, params: Params) -> None:
        if session.test is not None and label not in results:
            results[label] = evaluate_policy(session, params, label)
            _save_results(session, results)
            session.push()

    for name, stage, steps, before, after in (
        ("sft", run_sft, config.sft.steps, plots.BEFORE, plots.COLD_START),
        ("grpo", run_grpo, config.grpo.steps,
         plots.COLD_START if "sft" in config.stages else plots.BEFORE, plots.AFTER),
    ):
        if name not in config.stages:
            continue
        with session.checkpoints(name) as checkpoints:
            if checkpoints.latest() != steps:
                results.pop(after, None)  # of fewer steps, when a finished run is prolonged
            begun = checkpoints.steps()
            if policy is None and not (begun and name == "sft" and before in results):
                policy = load_policy(session)
            if before not in results:
                measure(before, policy)
            policy = stage(session, policy, checkpoints).params
        measure(after, policy)
    return policy


def _finish(session: Session, policy: Params | None,
            results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Curves, export and the closing table."""
    config, label = session.config, "as given"
    if policy is None:  # no training stage: the last policy trained here, else the model as given
        try:
            with session.watch.phase("restore"):
                policy, _, label = export.restore_policy(
                    config.workdir, config, layout=session.train_layout
                )
        except FileNotFoundError:
            policy = load_policy(session)
        if session.test is not None:
            results[label] = evaluate_policy(session, policy, label)
    if "grpo" in config.stages and is_first():
        curves = plots.welfare_curves(session.files.directory)
        session.console.say(f"curves: {config.workdir}/{curves.name}")
    if "export" in config.stages:
        hf = f"{config.workdir}/hf"
        with session.watch.phase("export"), to_write(hf) as out:
            # Process 0 writes, and knows what was evaluated.
            usage = export.measure_usage(session.files.directory, session.tokenizer)
            export.write(policy, session.model, config, session.tokenizer_dir, out, usage)
        session.console.say(f"exported: {hf}")
    if results:
        session.console.say(_save_results(session, results))
    if is_first():
        with session.watch.phase("report"):
            _report(session)
    return results


def _report(session: Session) -> None:
    """The report, and the tables with intervals. A finished run is not lost where one fails."""
    directory = session.files.directory

    def draw() -> None:
        session.console.say(f"report: {report.write(directory)}")

    def tabulate() -> None:
        if (directory / EVALUATIONS_FILE).exists():
            rows = read_rows(directory / EVALUATIONS_FILE)
            tables.save(directory, by_label(rows), session.config.seed)

    for write in (draw, tabulate):
        try:
            write()
        except report.ReportError as error:
            log.warning("no report: %s", error)
        except Exception:
            log.exception("the run is complete, but not its tables and its report; once mended, "
                          "python -m gtalign_jax.report %s makes it", directory)


def _save_results(session: Session, results: dict[str, dict[str, float]]) -> str:
    """Saves what was evaluated so far; returns it as a table. Only process 0 does so."""
    return plots.save_results(session.files.directory, results) if is_first() else ""
