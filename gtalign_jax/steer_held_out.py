"""Held-out prompts answered at several prices: what was chosen, said and paid for in tokens.

The prompts are those of the run's own config, its judge and reward too. An exported model does not
carry them along: of one that was taught the built-in tasks, theirs are taken. Files written: rows
(steering.jsonl), tables (steering.md, .csv, .json) and a figure (steering.png).
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from gtalign_jax import policies, steered
from gtalign_jax.config import Config, load_run_config
from gtalign_jax.data import asking, builtin
from gtalign_jax.data.batches import PromptSet
from gtalign_jax.data.sources import load_prompts
from gtalign_jax.evaluation import prices, prices_tables
from gtalign_jax.evaluation.evaluate import Progress
from gtalign_jax.evaluation.measures import Row
from gtalign_jax.game.steering import SteeringConfig
from gtalign_jax.report.figures_prices import prices_figure
from gtalign_jax.reward.judges import make_judge
from gtalign_jax.reward.rules import RULES
from gtalign_jax.rollout.player import Player
from gtalign_jax.rollout.sampler import SamplerConfig
from gtalign_jax.training.collect import Collector, log_rows
from gtalign_jax.training.files import write_whole
from gtalign_jax.training.metrics import jsonable
from gtalign_jax.workdir import local

NAME = "steering"


def carry_out(console: Console, what: str, player: Player, configs: Sequence[SteeringConfig],
              sampler: SamplerConfig, *, count: int, samples: int, seed: int, swept: int,
              out: Path | None, batch_size: int) -> dict[str, Any]:
    """Answers, assesses, shows and writes; returns what steering.json holds.

    Args:
      what: the model as the command line names it. count: prompts at most, evenly spread.
      swept: how many of the last configs are a sweep.

    Raises ValueError where no held-out prompts belong to the model.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file; allowed: a directory")
    run = _settings(what, player, count)
    prompts = PromptSet(load_prompts(run.data, "test"), player.tokenizer,
                        run.data.max_prompt_tokens)
    count = min(count, len(prompts))
    ids = {prompts.prompts[i * len(prompts) // count].id for i in range(count)}
    prompts = prompts.among(ids)
    progress = Progress(lambda text: console.print(Text(text)), player.name)
    played = steered.play(
        player, prompts, configs, sampler, samples=samples, seed=seed, batch_size=batch_size,
        told=progress,
    )
    rows = {config.pricing.name: _rows(run, player, prompts, sampler, one)
            for config, one in zip(configs, played, strict=True)}
    study = prices.study(rows, configs[0].usage, swept, seed)
    found = jsonable({
        "model": player.name, "prompts": len(prompts), "samples": samples, "seed": seed,
        "temperature": sampler.temperature, "settings": replace(configs[0], pricing=None),
        "rates": {config.pricing.name: config.pricing.rates for config in configs},
        **vars(study),
    })
    _show(console, player, len(prompts), study)
    if out is not None:
        _save(out, rows, study, found)
        console.print(Text(f"written: {out}/{NAME}.md, .csv, .json, .jsonl, .png"))
    return found


def _settings(what: str, player: Player, count: int) -> Config:
    """The config whose held-out prompts, judge and reward count."""
    policy = policies.find(what, Config(), "--model")
    if policy.run:
        run = load_run_config(local(policy.run))
        taught = asking.instruction_of(run.data)
        if player.instruction != taught:
            raise ValueError(f"--instruction={player.instruction}: held-out prompts of a run come "
                             f"as they were asked in it; allowed with --held_out is {taught!r}")
    elif player.instruction == asking.BRIEF:
        run = Config()
    else:
        raise ValueError(
            f"--held_out={count}: no held-out prompts are known for --model={what}; allowed: a "
            "run's work directory or checkpoint, or an export of a run on the built-in tasks"
        )
    if run.data.source == "builtin":
        size = max(count, run.data.test_size or builtin.DEFAULT_SIZES["test"])
        run = replace(run, data=replace(run.data, test_size=size))
    return run


def _rows(run: Config, player: Player, prompts: PromptSet, sampler: SamplerConfig,
          played: steered.SteeredRollout) -> list[Row]:
    """One row for each completion, scored by the training reward's own code."""
    collector = Collector(
        sample=None, tokenizer=player.tokenizer, judge=make_judge(run.judge, RULES),
        reward=run.reward, layout=player.layout, filters=sampler.filters,
    )  # fmt: skip
    every = np.arange(len(prompts))
    rows = log_rows(collector.assess(prompts.take(every), every, played.rollout))
    forced_B = played.forced_QGT.sum(axis=2).reshape(-1).tolist()
    return [prices.priced_row(row, outcome, forced)
            for row, outcome, forced in zip(rows, played.outcomes, forced_B, strict=True)]


def _show(console: Console, player: Player, count: int, study: prices.Study) -> None:
    console.print(Text(f"{player.name}: {count:,} held-out prompts"))
    for title, (head, *body) in prices_tables.tables(study).items():
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD,
                      padding=(0, 1, 0, 0), pad_edge=False)
        for i, name in enumerate(head):
            table.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
        for row in body:
            table.add_row(*map(Text, row))
        wide = console.options.update(max_width=1000)  # nothing of it is ever cut off
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
        console.print(table)


def _save(out: Path, rows: dict[str, list[Row]], study: prices.Study,
          found: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(jsonable({"pricing": name, **row}), ensure_ascii=False)
             for name, part in rows.items() for row in part)
    for suffix, text in (
        ("jsonl", "".join(f"{line}\n" for line in lines)),
        ("md", prices_tables.markdown(study)),
        ("csv", prices_tables.csv_text(study)),
        ("json", json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"),
    ):
        write_whole(out / f"{NAME}.{suffix}", text)
    picture = prices_figure(study)
    (out / f"{NAME}.png").write_bytes(picture.png)
