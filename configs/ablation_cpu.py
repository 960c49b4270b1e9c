"""The demo's cold start, without its repriced chains, under six rewards and three seeds.

    python -m gtalign_jax.ablate --config=configs/ablation_cpu.py

Settings of all runs stand under `run`, as in --config.run.grpo.steps=30; `rewards` and `seeds` say
which runs there are, as in --config.seeds="(0,1)". The same command goes on where it was stopped.

21 runs, about an hour on two cores. Expect social welfare of 0.55 after the cold start and about
0.75 after GRPO under each reward on both sides (docs/results.md).
"""

import runpy
from pathlib import Path

from gtalign_jax.freeze import to_config_dict
from gtalign_jax.variants import Ablation

DEMO = Path(__file__).with_name("demo_cpu.py")


def get_config():
    c = to_config_dict(Ablation())
    c.rewards = ("cobb_douglas", "linear", "user", "llm", "rawls", "untagged")
    c.seeds = (0, 1, 2)
    c.workdir = "runs/ablation"
    c.run = runpy.run_path(str(DEMO))["get_config"]()
    # Prices change nothing here: no chains for them, so that every example tells of the game alone.
    c.run.sft.repriced = 0.0
    c.run.sft.max_completion_tokens = 80
    return c
