"""What an ablation is made of: the same cold start under each reward, for several seeds.

    WORKDIR/seed0/cold_start      stages sft, evaluate
    WORKDIR/seed0/linear …        the cold start's weights, then grpo under that reward, evaluate
    WORKDIR/seed0/untagged        a cold start of its own (bare responses), then grpo, evaluate

A seed chooses initial weights, cold-start chains, batch order and what is sampled. The prompts,
those held out among them, are the same for all seeds: `run.data.seed` chooses them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gtalign_jax.config import Config

COLD_START = "cold_start"
REWARDS: dict[str, Mapping[str, Any]] = {  # name of a run -> what differs from `Ablation.run`
    "cobb_douglas": {"reward.welfare": "cobb_douglas"},
    "linear": {"reward.welfare": "linear"},
    "user": {"reward.welfare": "user"},
    "llm": {"reward.welfare": "llm"},
    "rawls": {"reward.welfare": "ces", "reward.rho": -math.inf},  # the smaller of both utilities
    "untagged": {
        "reward.welfare": "cobb_douglas", "reward.reasoning": "none", "data.reasoning": "none",
    },
}


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Which rewards and seeds; `run` holds what all runs have in common.

    `run.workdir`, `run.seed` and `run.stages` are set for each run and have no meaning here.
    """

    rewards: tuple[str, ...] = tuple(REWARDS)
    seeds: tuple[int, ...] = (0, 1, 2)
    workdir: str = "runs/ablation"
    run: Config = Config()

    def __post_init__(self) -> None:
        if "://" in self.workdir:
            raise ValueError(
                f"workdir={self.workdir}: runs share files there, which takes a directory that all "
                "processes see, no URL"
            )
        for key, values, allowed in (
            ("rewards", self.rewards, tuple(REWARDS)), ("seeds", self.seeds, None),
        ):
            known = allowed is None or set(values) <= set(allowed)
            if not values or not known or len(set(values)) < len(values):
                what = "integers" if allowed is None else f"some of {allowed}"
                raise ValueError(f"{key}={values}: expected {what}, at least one, each once")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of an ablation. `name`: a key of REWARDS, or COLD_START.

    `cold_start`: the work directory that its cold start comes from; None: it has its own.
    """

    name: str
    seed: int
    config: Config
    cold_start: str | None = None


def plan(ablation: Ablation) -> list[Run]:
    """All runs in their order: seed after seed, each cold start before those that need it."""
    runs = []
    for seed in ablation.seeds:
        folder = f"{ablation.workdir}/seed{seed}"
        shared = f"{folder}/{COLD_START}"
        common = {"seed": seed, "stages": ("sft", "grpo", "evaluate")}
        if any(_shares(name) for name in ablation.rewards):
            only = common | {"workdir": shared, "stages": ("sft", "evaluate")}
            runs.append(Run(COLD_START, seed, _changed(ablation.run, only)))
        for name in ablation.rewards:
            changes = {**common, **REWARDS[name], "workdir": f"{folder}/{name}"}
            config = _changed(ablation.run, changes)
            runs.append(Run(name, seed, config, shared if _shares(name) else None))
    return runs


def _shares(name: str) -> bool:
    """Whether a reward starts from the common cold start: unless it changes what that is of."""
    return not any(key.startswith(("data.", "sft.", "model.")) for key in REWARDS[name])


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with other values at dotted keys, set together so that they may depend on another"""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    whole = sections.pop("", {})
    parts = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(config, **whole, **parts)
