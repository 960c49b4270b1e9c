"""What it takes to let a policy answer prompts, and to score its answers.

    open_bench     config, tokenizer -> devices, model, held-out prompts, judge

Shared by runs (session.py) and by commands that only evaluate. Mistakes in the input are found
here, before any compilation.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from gtalign_jax.config import Config, check
from gtalign_jax.data.batches import PromptSet
from gtalign_jax.data.chat import load_tokenizer
from gtalign_jax.data.chat import stop_ids as find_stop_ids
from gtalign_jax.data.prompt import Prompt
from gtalign_jax.data.sources import load_prompts
from gtalign_jax.evaluation.evaluate import EVALUATIONS_FILE, Progress, evaluate, save_rows
from gtalign_jax.judging import open_judge
from gtalign_jax.model import load
from gtalign_jax.model.sharding import (
    ROLLOUT,
    TRAIN,
    Layout,
    check_model_fits,
    make_mesh,
    slice_count,
)
from gtalign_jax.model.spec import ModelConfig, Params
from gtalign_jax.pod.exchange import is_first
from gtalign_jax.pod.watch import Watch
from gtalign_jax.reward.judges import Judge
from gtalign_jax.reward.tasks import task_of
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler
from gtalign_jax.training.collect import Collector
from gtalign_jax.training.learner import make_reshard
from gtalign_jax.training.metrics import Console, step_line
from gtalign_jax.training.state import named_key


@dataclasses.dataclass(frozen=True)
class Bench:
    """What it takes to let a policy answer prompts and to score it. Writes what a judge said."""

    config: Config
    model: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    tokenizer_dir: str
    stop_ids: tuple[int, ...]
    test: PromptSet | None
    judge: Judge
    train_layout: Layout
    rollout_layout: Layout
    dtype: Any
    console: Console
    watch: Watch

    @functools.cached_property
    def evaluation(self) -> tuple[Collector, Any]:
        """(collector, reshard) for held-out prompts; made once, so that each compiles once."""
        cfg = self.config.evaluate
        sampler = dataclasses.replace(
            self.config.rollout, temperature=cfg.temperature, top_k=0, top_p=1.0
        )
        reshard = make_reshard(self.model, self.rollout_layout, self.dtype)
        return self.collector(sampler, cfg.samples, self.test), reshard

    def examine(self, params: Params, label: str, directory: Path) -> dict[str, float]:
        """Means over the held-out prompts; the completions go to `directory`/evaluations.jsonl.

        `params` are laid out for rollout, in the dtype to compute in (what `reshard` makes).
        """
        began, (collect, _) = time.perf_counter(), self.evaluation
        key = named_key(jax.random.key(self.config.seed), "evaluate", 0)
        progress = Progress(self.console.say, label)

        def told(done: int, count: int) -> None:
            progress(done, count)
            with self.watch.phase("evaluate"):
                pass  # the deadline is that of a batch

        with self.watch.phase("evaluate"):
            means, rows = evaluate(params, collect, self.test, self.config.evaluate, key, told)
            if is_first():
                save_rows(directory / EVALUATIONS_FILE, label, rows)
        self.console.say(
            f"{label}: {len(rows)} held-out completions in {time.perf_counter() - began:.1f}s | "
            f"{step_line(means)}"
        )
        return means

    def collector(self, sampler: SamplerConfig, samples: int, prompts: PromptSet,
                  micro_batch_prompts: int = 0) -> Collector:
        """What samples and scores batches of `prompts`."""
        sample = make_sampler(self.model, sampler, samples, self.stop_ids, self.rollout_layout,
                              prompts.common)
        return Collector(
            sample=dataclasses.replace(sample, pause=self.watch.notice.check),
            tokenizer=self.tokenizer,
            judge=self.judge,
            reward=self.config.reward,
            layout=self.rollout_layout,
            filters=sampler.filters,
            micro_batch_prompts=micro_batch_prompts,
            overlap=self.config.judge.kind != "jax",
            max_missing=self.config.judge.max_missing,
            max_new_tokens=sampler.max_new_tokens,
            notice=self.watch.notice,
        )


def open_bench(config: Config, watch: Watch, tokenizer_dir: str,
               sources: Sequence[str] = (), judge: Judge | None = None) -> Bench:
    """Everything before the first answer; held-out prompts if the stages say "evaluate".

    `sources`: of prompts that the judge hears of besides the held-out ones. `judge`: an open one.
    Raises ValueError and the like with a text for the user.
    """
    mesh = make_mesh(config.mesh)
    held_out = load_prompts(config.data, "test") if "evaluate" in config.stages else []
    check_sources(config, held_out)
    tokenizer = load_tokenizer(tokenizer_dir)
    model = load.model_config(config.model, len(tokenizer))
    check_model_fits(model, mesh)
    rollout_layout = Layout(mesh, ROLLOUT, config.model.attention)
    dtype = jnp.dtype(config.model.compute_dtype)
    sources = [*sources, *(prompt.data_source for prompt in held_out)]
    return Bench(
        config=config,
        model=model,
        tokenizer=tokenizer,
        tokenizer_dir=tokenizer_dir,
        stop_ids=find_stop_ids(tokenizer, load.generation_config(config.model)),
        test=PromptSet(held_out, tokenizer, config.data.max_prompt_tokens) if held_out else None,
        judge=judge or open_judge(config, sources, rollout_layout, dtype),
        train_layout=Layout(mesh, TRAIN, config.model.attention),
        rollout_layout=rollout_layout,
        dtype=dtype,
        console=Console(enabled=is_first()),
        watch=watch,
    )


def check_config(config: Config) -> None:
    """Raises ConfigError where the settings do not fit each other or the devices."""
    devices = jax.devices()
    check(config, len(devices), slice_count(devices), devices[0].platform)


def keep_programs(directory: str) -> None:
    """Compiled programs go to `directory`, and come from there the next time."""
    # A CPU's programs are quick to compile, and not portable. Whoever has set a cache keeps it.
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", directory)


def check_sources(config: Config, prompts: list[Prompt]) -> None:
    for source in sorted({prompt.data_source for prompt in prompts}):
        task_of(source, config.reward.tasks)
