"""The command that answers "is it better, for whom, and what did it cost":

    python -m gtalign_jax.evaluate --config=FILE[:words] [--config.key=value …]
        [--checkpoint=WHAT] [--baseline=WHAT] [--out=DIRECTORY]

A policy answers the held-out prompts of the config (`data.test`), greedily or with `samples` at a
temperature (`--config.evaluate.samples=4 --config.evaluate.temperature=1.0`), and is scored by the
training reward's own code. WHAT is a run's work directory, one of its checkpoints
(RUN/checkpoints/grpo/45), a Hugging Face directory or hub name, or "given" (policies.py says what
of a run's own config counts). Without --checkpoint it is the last checkpoint in the config's
workdir, else the config's model as it is.

--baseline answers the same prompts, one policy in memory at a time. It may also be a JSONL file of
scored completions (evaluations.jsonl, or rows with `id`, `user_welfare`, `llm_welfare`; where a
file has several labels, FILE.jsonl:LABEL), of which only what it holds is compared.

In DIRECTORY (by default `workdir`/evaluation, also gs://…) all of this appears at the end at once:

    evaluations.jsonl       every completion with its factors; `label` says whose
    measures.{md,csv,json}  the tables: overall, by source, by kind of request, with intervals
    comparison.json         checkpoint against baseline: paired differences and Pareto measures
    report.html             and figures/, tables/, report.json
    evaluation.json         what was evaluated; config.json, run_info.json

Until then completions lie in DIRECTORY/unfinished, what a judge said in DIRECTORY/judgements, and
the same command goes on with what is not there yet. A completion whose judge failed is missing:
counted, warned of, and in no mean.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console

from gtalign_jax import compare, memory, policies, report
from gtalign_jax.bench import Bench, check_config, keep_programs, open_bench
from gtalign_jax.command import carry_out
from gtalign_jax.config import Config, define_flag, fingerprint, parse_flags, save_run_info
from gtalign_jax.evaluation import paired, pareto, scored, tables
from gtalign_jax.evaluation.evaluate import EVALUATIONS_FILE
from gtalign_jax.evaluation.measures import by_label
from gtalign_jax.evaluation.scored import Scored
from gtalign_jax.pod import exchange
from gtalign_jax.pod.exchange import is_first
from gtalign_jax.pod.watch import Watch
from gtalign_jax.policies import Policy
from gtalign_jax.report.load import COMPARISON_FILE
from gtalign_jax.training.files import write_whole
from gtalign_jax.training.metrics import METRICS_FILE, read_rows
from gtalign_jax.workdir import Files, is_dir, local

log = logging.getLogger(__name__)

UNFINISHED = "unfinished"
NO_DEADLINE_S = 7 * 86_400.0
PLAN_FILE = "evaluation.json"
COMPARED = (  # fields of a row that are tested for a difference, where both sides have them
    *compare.MEASURES, "answer", "format", "right_action", "matrix_quality", "tokens",
    "reasoning_tokens", "response_tokens",
)  # fmt: skip


def evaluate(config: Config, checkpoint: str = "", baseline: str = "", out: str = "") -> Path:
    """Everything of the module's docstring; returns the local directory of the results.

    Raises ValueError (ConfigError among them), FileNotFoundError and CheckpointError before
    anything is computed.
    """
    config = dataclasses.replace(config, stages=("evaluate",))
    check_config(config)
    out = (out or f"{config.workdir}/evaluation").rstrip("/")
    store = config.judge.store or f"{local(out)}/judgements"
    # All completions are judged at once: how long that may take, the watch knows (pod.evaluate_s).
    # Finite, since it is written to config.json, where JSON knows no infinity.
    judge = dataclasses.replace(config.judge, store=store, deadline_s=NO_DEADLINE_S)
    config = dataclasses.replace(config, judge=judge)
    with Watch(config.pod) as watch, memory.explained(watch):
        is_file = baseline.endswith(".jsonl") or ".jsonl:" in baseline
        side = _read_baseline(baseline) if is_file and is_first() else None
        found = [policies.find(checkpoint, config)]
        if baseline and not is_file:
            found.insert(0, policies.find(baseline, config, "--baseline"))
        found = _told_apart(found)
        files = _open(out)
        keep_programs(f"{out}/compiled")
        benches: list[Bench] = []
        for p in found:  # one judge for both: it may lie on the devices
            judge = benches[0].judge if benches else None
            benches.append(open_bench(p.config, watch, p.tokenizer_dir, judge=judge))
        benches = _same_prompts(benches)
        folder = files.directory / UNFINISHED
        plan = _plan(found, benches[-1])
        if is_first():
            _check_common(side, benches[-1])
            _begin(folder, plan)
        for policy, bench in zip(found, benches, strict=True):
            _answer(policy, bench, folder)
            _push(files)
        if is_first():
            _finish(files.directory, found, side, benches[-1])
        _push(files)
    return files.directory


def _read_baseline(what: str) -> Scored:
    """The rows of FILE.jsonl or FILE.jsonl:LABEL."""
    name, _, label = what.partition(".jsonl:")
    path = Path(name if name.endswith(".jsonl") else f"{name}.jsonl")
    try:
        side = scored.read(path, label or None)
    except (ValueError, OSError) as error:
        raise ValueError(f"--baseline={what}: {error} (here: FILE.jsonl:LABEL)") from error
    for line in side.bad[: compare.SHOWN]:
        log.warning("--baseline: %s", line)
    return side


def _told_apart(found: list[Policy]) -> list[Policy]:
    """Names by which tables can tell them apart. Raises ValueError where there is one policy."""
    if len(found) == 1 or found[0].name != found[1].name:
        return found
    if found[0].described() == found[1].described():
        raise ValueError(f"--checkpoint and --baseline are the same policy: {found[0].name}")
    return [
        dataclasses.replace(p, name=" ".join(str(v) for v in p.described().values()))
        for p in found
    ]


def _open(out: str) -> Files:
    """The directory of the results. Raises ValueError for one that training writes to."""
    files = Files(out)
    if is_first():
        files.pull()
    trained = is_dir(f"{out}/checkpoints") or (files.directory / METRICS_FILE).exists()
    if exchange.broadcast(trained, "kind of directory"):
        raise ValueError(f"--out={out} is a run's work directory; allowed: a directory of its own")
    return files


def _push(files: Files) -> None:
    """Process 0 alone: another host may hold old copies of the same files."""
    if is_first():
        files.push()


def _same_prompts(benches: list[Bench]) -> list[Bench]:
    """The benches with the prompts that none of them dropped as too long for its tokenizer."""
    common = set.intersection(*({p.id for p in bench.test.prompts} for bench in benches))
    if not common:
        raise ValueError("checkpoint and baseline have no prompt in common: all are too long")
    return [dataclasses.replace(bench, test=bench.test.among(common)) for bench in benches]


def _check_common(side: Scored | None, bench: Bench) -> None:
    """Raises ValueError where nothing could be compared after all the work."""
    if side is None:
        return
    ids = {str(row["id"]) for row in side.rows}
    asked = [prompt.id for prompt in bench.test.prompts]
    if not ids & set(asked):
        raise ValueError(
            f"--baseline={side.name} has none of the held-out prompts: its ids are like "
            f"{side.rows[0]['id']!r}, theirs like {asked[0]!r}"
        )
    paired.match(side.rows, side.rows, _fields(side))


def _fields(side: Scored) -> list[str]:
    """Those of `COMPARED` that a file of completions has as numbers."""
    values = {name: [row.get(name) for row in side.rows] for name in COMPARED}
    return [
        name for name, column in values.items()
        if any(v is not None for v in column)
        and all(v is None or isinstance(v, int | float) for v in column)
    ]


def _plan(found: list[Policy], bench: Bench) -> dict[str, Any]:
    """What is evaluated, and by which settings."""
    config, prompts = bench.config, bench.test.prompts
    asked = [[p.id, [dict(m) for m in p.messages], p.question, p.ground_truth] for p in prompts]
    text = json.dumps(asked)
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in ("evaluate", "reward")}
    settings["judge"] = {  # neither its address nor its limits
        key.removeprefix("judge."): value for key, value in fingerprint(config).items()
        if key.startswith("judge.")
    }
    return {
        "policies": {policy.name: policy.described() for policy in found},
        "prompts": {"count": len(prompts), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.seed,
        **settings,
    }


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Keeps what a killed command of the same plan has done, and nothing else."""
    file, text = folder / PLAN_FILE, json.dumps(plan, indent=2) + "\n"
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_whole(file, text)


def _answer(policy: Policy, bench: Bench, folder: Path) -> None:
    """All prompts, unless they are answered already. The weights are gone on return."""
    path = folder / EVALUATIONS_FILE
    done = is_first() and path.exists() and policy.name in by_label(read_rows(path, label=str))
    if exchange.broadcast(done, "answered"):
        bench.console.say(f"{policy.name}: answered before")
        return
    cfg, count = bench.config.evaluate, len(bench.test)
    bench.console.say(
        f"{policy.name}: {min(cfg.prompts or count, count):,} of {count:,} held-out prompts, "
        f"{cfg.samples} completion(s) of each at temperature {cfg.temperature:g}"
    )
    _, reshard = bench.evaluation
    bench.examine(reshard(policy.load(bench)), policy.name, folder)


def _finish(directory: Path, found: list[Policy], side: Scored | None, bench: Bench) -> None:
    """Tables and comparison; then all files take their places, and the report is drawn."""
    folder, config = directory / UNFINISHED, bench.config
    path, say = folder / EVALUATIONS_FILE, bench.console.say
    measured = tables.save(folder, by_label(read_rows(path, label=str)), config.seed)
    say(f"\n{tables.console(measured)}\n")
    save_run_info(folder, dataclasses.replace(config, workdir=str(directory)))
    if len(found) > 1:
        side = scored.read(path, found[0].name)
    if side is not None:
        try:
            new = scored.read(path, found[-1].name)
            _compare(side, new, folder / COMPARISON_FILE, config.seed)
        except ValueError as error:  # no judge answered: nothing else is lost by that
            log.warning("checkpoint and baseline were not compared: %s", error)
    (directory / COMPARISON_FILE).unlink(missing_ok=True)  # an earlier evaluation's
    # The plan last: without it a command that goes on would not know whose answers these are.
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == PLAN_FILE, file.name)):
        os.replace(file, directory / file.name)
    folder.rmdir()
    say(f"tables: {directory}/measures.md")
    say(f"report: {report.write(directory)}")


def _compare(first: Scored, second: Scored, file: Path, seed: int) -> None:
    """Second against first, on the console and in `file`."""
    held = [name for name in _fields(first) if name in _fields(second)]
    settings = argparse.Namespace(
        eps=pareto.EPS, rho=compare.RHO, measures=",".join(held), seed=seed,
        resamples=paired.RESAMPLES,
    )
    found = compare.compare(first, second, settings)
    compare.save(file, found)
    in_short = {**found, "by_source": {}}  # the file has them, and the report
    compare.show(Console(highlight=False), in_short, first, second)


def main(argv: list[str], config: flags.FlagHolder, words: list[flags.FlagHolder]) -> None:
    del argv
    values = [word.value for word in words]
    carry_out(config, lambda config: evaluate(config, *values), *values)


def define_flags() -> tuple[flags.FlagHolder, list[flags.FlagHolder]]:
    """--config, and --checkpoint, --baseline, --out."""
    return define_flag(), [
        flags.DEFINE_string("checkpoint", "", "run, checkpoint, Hugging Face model, or 'given'"),
        flags.DEFINE_string("baseline", "", "the same, or a JSONL of scored completions"),
        flags.DEFINE_string("out", "", "where results go; default: workdir/evaluation"),
    ]


if __name__ == "__main__":
    _FLAGS = define_flags()
    app.run(lambda argv: main(argv, *_FLAGS), flags_parser=parse_flags)
