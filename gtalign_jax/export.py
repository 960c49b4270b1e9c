"""The command that takes a trained policy home as a Hugging Face directory.

    python -m gtalign_jax.export --workdir=runs/demo --out=DIR [--stage=grpo] [--step=N | --best]

Reads the config that the run saved and the weights of one checkpoint (not the optimizer's), and
writes safetensors, config.json, generation_config.json, tokenizer and chat template. It may run
beside the training, on a host without an accelerator: set JAX_PLATFORMS=cpu.

Beside them lies gtalign.json, what a policy is known by at inference: how it was taught to be asked
(`data.asking`) and what each action costs in tokens, measured on the run's last evaluation.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from gtalign_jax.config import CONFIG_FILE, Config, ConfigError, load_run_config
from gtalign_jax.data import asking
from gtalign_jax.data.chat import encode_chat, load_tokenizer, render_chat, stop_ids
from gtalign_jax.evaluation.evaluate import EVALUATIONS_FILE
from gtalign_jax.evaluation.measures import by_label
from gtalign_jax.game import pricing
from gtalign_jax.game.chain import KEYS, SYSTEM, render
from gtalign_jax.game.pricing import Usage
from gtalign_jax.model import hf, load
from gtalign_jax.model.safetensors_io import open_tensors, read_json
from gtalign_jax.model.sharding import Layout, param_shardings, placed
from gtalign_jax.model.spec import ModelConfig, Params, abstract_params, num_params
from gtalign_jax.pod import exchange
from gtalign_jax.pod.exchange import is_first
from gtalign_jax.training.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from gtalign_jax.training.files import explained
from gtalign_jax.training.metrics import METRICS_FILE, read_rows
from gtalign_jax.training.plots import AFTER, RESULTS_FILE, read_results
from gtalign_jax.workdir import Files, is_dir, local, to_write

log = logging.getLogger(__name__)

TRAINING_STAGES = ("grpo", "sft")  # the last one that has a checkpoint is exported
GENERATION_FILE = "generation_config.json"
PLAYER_FILE = "gtalign.json"
EVEN = {key: {"LLM": 1.5, "user": 20} for key in KEYS}  # any payoff: sample text for a tokenizer


def checkpoint_dir(workdir: str | Path, stage: str) -> str:
    """Where the checkpoints of a stage lie."""
    return f"{str(workdir).rstrip('/')}/checkpoints/{stage}"


def find_tokenizer(config: Config, workdir: str | Path) -> str:
    """The directory of a run's tokenizer: the model's own, or the one trained in the run."""
    source = config.model.tokenizer or config.model.path
    return load.resolve(source) if source else str(local(workdir) / "tokenizer")


def restore_policy(
    workdir: str | Path, config: Config, stage: str | None = None, step: int | None = None,
    layout: Layout | None = None,
) -> tuple[Params, ModelConfig, str]:
    """(weights, their sizes, "stage step N") of a checkpoint; by default the run's last one that
    is whole.

    They lie on one device, or as `layout` says.

    Raises FileNotFoundError where there is no such checkpoint, CheckpointError where it holds
    another model or is damaged.
    """
    stage, _ = find_checkpoint(workdir, stage, step)
    tokenizer = load_tokenizer(find_tokenizer(config, workdir))
    model = load.model_config(config.model, len(tokenizer))
    params = abstract_params(model)
    if layout is not None:
        params = placed(params, param_shardings(model, layout))
    with _reader(workdir, stage) as checkpoints:
        wanted = {"state": {"params": params}}
        if step is None:
            step, saved, _ = checkpoints.newest(wanted, partial=True)
        else:
            saved, _ = checkpoints.restore(wanted, step, partial=True)
    return saved["state"]["params"], model, f"{stage} step {step}"


def find_checkpoint(
    workdir: str | Path, stage: str | None = None, step: int | None = None
) -> tuple[str, int]:
    """(stage, step) of a checkpoint; by default the run's last one. No array is read from it.

    Raises FileNotFoundError where there is no such checkpoint, with the steps that there are.
    """
    stages = (stage,) if stage else TRAINING_STAGES
    for name in stages:
        directory = checkpoint_dir(workdir, name)
        if not exchange.broadcast(is_dir(directory), "checkpoint directory"):
            continue
        with _reader(workdir, name) as checkpoints:
            steps, newest = checkpoints.steps(), checkpoints.check()
        if not steps:  # killed before its first save: the stage before counts
            continue
        if step is not None and step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {directory}: {steps}")
        return name, step or newest or steps[-1]
    raise FileNotFoundError(f"{workdir} holds no checkpoint of {' or '.join(stages)}")


def best_step(workdir: str | Path, directory: Path, config: Config) -> int:
    """The step of GRPO whose checkpoint was best on held-out prompts; `directory`: its files'.

    Raises ValueError where no checkpoint that is there was evaluated.
    """
    metric, file = config.checkpoint.best_metric, directory / METRICS_FILE
    rows = read_rows(file) if file.exists() else []
    scores = {row["step"]: row.get(metric) for row in rows if row["stage"] == "evaluate"}
    scores[config.grpo.steps] = read_results(directory).get(AFTER, {}).get(metric)
    find_checkpoint(workdir, "grpo")
    with _reader(workdir, "grpo") as checkpoints:
        steps = checkpoints.steps()
    known = [(scores[step], step) for step in steps if scores.get(step) is not None]
    if not known:
        raise ValueError(
            f"--best: no checkpoint in {checkpoint_dir(workdir, 'grpo')} (steps {steps}) has a "
            f"{metric!r} on held-out prompts; allowed: --step=N, or a run with "
            "evaluate.every_steps >= 1 and checkpoint.keep_best >= 1"
        )
    return max(known)[1]


def _reader(workdir: str | Path, stage: str) -> contextlib.closing[Checkpointer]:
    directory = checkpoint_dir(workdir, stage)
    return contextlib.closing(Checkpointer(directory, CheckpointConfig(), None, read_only=True))


def write(
    params: Params, model: ModelConfig, config: Config, tokenizer_dir: str, out: str | Path,
    usage: Usage | None = None,
) -> None:
    """Writes the Hugging Face directory `out` and reads back what transformers will look at.

    `usage`: what the policy's actions were measured to cost, if they were.

    On a pod every process calls this, for its part of the weights; process 0 writes.
    Raises ValueError where the result would not load.
    """
    source = load.resolve(config.model.path) if config.model.path else None
    hf.save_pretrained(params, model, out, source_dir=source, tokenizer_dir=tokenizer_dir)
    if not is_first():
        return
    _write_generation_config(Path(out) / GENERATION_FILE, load_tokenizer(tokenizer_dir))
    about = {"instruction": asking.instruction_of(config.data),
             "usage": None if usage is None else dataclasses.asdict(usage)}
    (Path(out) / PLAYER_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    verify(out, model, tokenizer_dir)


def measure_usage(directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> Usage | None:
    """What each action cost in the last evaluation in `directory`, a run's.

    None where there is none, or where it lacks an action that could be counted.
    """
    file = Path(directory) / EVALUATIONS_FILE
    groups = by_label(read_rows(file, label=str)) if file.exists() else {}
    if not groups:
        return None
    label, rows = list(groups.items())[-1]
    try:
        return pricing.measured(rows, lambda row: len(encode_chat(tokenizer, row["prompt"])))
    except (ValueError, KeyError) as error:  # KeyError: rows of before these fields were written
        log.warning("%s, %r: what actions cost is not known: %s", file, label, error)
        return None


def read_about(directory: str | Path) -> tuple[str, Usage | None]:
    """(instruction, usage) of an exported directory; "" and None of one that we did not write.

    Raises ValueError where its gtalign.json is none.
    """
    file = Path(directory) / PLAYER_FILE
    if not file.is_file():
        return "", None
    about = read_json(file)
    instruction, usage = about.get("instruction"), about.get("usage")
    try:
        asking.check_instruction(instruction)
        return instruction, None if usage is None else pricing.read_usage(usage)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _write_generation_config(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes generation stop wherever sampling stopped in training; what else it says stays."""
    known = read_json(file) if file.exists() else {}
    stops = list(stop_ids(tokenizer, known))
    listed = known.get("eos_token_id")
    if sorted([listed] if isinstance(listed, int) else listed or []) == stops:
        return
    settings = {"pad_token_id": tokenizer.pad_token_id} | known | {"eos_token_id": stops}
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def verify(out: str | Path, model: ModelConfig, tokenizer_dir: str) -> None:
    """Raises ValueError unless transformers knows the config of `out`, its tokenizer there gives
    the token ids that the model was trained on, and its files hold all weights of `model`."""
    known = AutoConfig.from_pretrained(out, trust_remote_code=False)
    tokenizer, trained_on = load_tokenizer(out), load_tokenizer(tokenizer_dir)
    chain = render("Is 7 < 12?", EVEN, "Both DQ_DA and VQ_CQ.", "It's 7, so: yes!\n\nMore?")
    for text in (render_chat(trained_on, [{"role": "user", "content": SYSTEM}]), chain):
        ids, expected = (t(text, add_special_tokens=False).input_ids
                         for t in (tokenizer, trained_on))
        if ids != expected:
            # transformers replaces the pre-tokenizer of some families, whatever the file says.
            raise ValueError(
                f"{out}: beside a {known.model_type} config, transformers reads this tokenizer as "
                f"{type(tokenizer).__name__}, and its token ids differ from those the model was "
                "trained on"
            )
    if len(trained_on) > known.vocab_size:
        raise ValueError(
            f"{out}: {len(trained_on)} tokens, but the model's vocabulary is {known.vocab_size}"
        )
    with open_tensors(Path(out)) as files:
        shapes = [file.get_slice(name).get_shape() for name, file in files.items()]
    stored = sum(math.prod(shape) for shape in shapes)
    if stored != num_params(model):
        raise ValueError(f"{out} holds {stored:,} weights, the model has {num_params(model):,}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gtalign_jax.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the run's work directory")
    parser.add_argument("--out", required=True, help="the Hugging Face directory to write")
    parser.add_argument("--stage", choices=TRAINING_STAGES, help="default: the run's last one")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="default: the newest checkpoint")
    which.add_argument("--best", action="store_true",
                       help="the one with the highest checkpoint.best_metric on held-out prompts")
    args = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns that a reader only reads
    try:
        files = Files(args.workdir)
        for name in (CONFIG_FILE, "tokenizer", EVALUATIONS_FILE, METRICS_FILE, RESULTS_FILE):
            files.pull(name)
        config = load_run_config(files.directory)
        stage, step = args.stage, args.step
        if args.best:
            stage, step = "grpo", best_step(args.workdir, files.directory, config)
        params, model, what = restore_policy(args.workdir, config, stage, step)
        tokenizer_dir = find_tokenizer(config, args.workdir)
        usage = measure_usage(files.directory, load_tokenizer(tokenizer_dir))
        with to_write(args.out) as out:
            write(params, model, config, tokenizer_dir, out, usage)
    except (FileNotFoundError, ConfigError, CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {explained(error)}", file=sys.stderr)
        return 1
    print(
        f"exported {what} ({num_params(model):,} parameters) to {args.out}; load it with "
        f"transformers.AutoModelForCausalLM.from_pretrained({str(args.out)!r})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
