"""Which runs an ablation is made of: what they share, and what sets them apart."""

import math

import pytest

from gtalign_jax.config import Config, fingerprint
from gtalign_jax.freeze import to_dict
from gtalign_jax.session import SFT_KEYS
from gtalign_jax.training.checkpoint import flatten
from gtalign_jax.variants import REWARDS, Ablation, plan


def test_cold_starts_come_before_what_is_built_on_them_and_the_untagged_run_has_its_own():
    runs = plan(Ablation(seeds=(3, 5), workdir="w"))
    assert len(runs) == 2 * 7
    assert [run.name for run in runs[:7]] == [
        "cold_start", "cobb_douglas", "linear", "user", "llm", "rawls", "untagged",
    ]
    assert [run.cold_start for run in runs[:7]] == [None, *["w/seed3/cold_start"] * 5, None]
    assert [run.config.seed for run in runs] == [3] * 7 + [5] * 7
    assert runs[0].config.stages == ("sft", "evaluate")
    assert runs[8].config.stages == runs[6].config.stages == ("sft", "grpo", "evaluate")
    assert len({run.config.workdir for run in runs}) == 14
    assert runs[9].config.workdir == "w/seed5/linear"


def test_runs_differ_by_their_reward_alone():
    first, *others = (flatten(to_dict(run.config)) for run in plan(Ablation(seeds=(0,)))[1:])
    differing = [{k: v for k, v in other.items() if first[k] != v} for other in others]
    for changes in differing:
        del changes["workdir"]
    assert differing == [
        {"reward.welfare": "linear"}, {"reward.welfare": "user"}, {"reward.welfare": "llm"},
        {"reward.welfare": "ces", "reward.rho": -math.inf},
        {"reward.reasoning": "none", "data.reasoning": "none"},
    ]


def test_a_shared_cold_start_is_the_one_that_each_reward_would_have_made():
    """By what its checkpoint is recognised by; held-out prompts do not depend on the seed."""
    runs = plan(Ablation(seeds=(0, 1)))
    prints = [
        {k: v for k, v in fingerprint(run.config).items() if k.startswith(SFT_KEYS)}
        for run in runs
    ]
    assert all(prints[i] == prints[0] for i in range(6)) and prints[6] != prints[0]
    assert prints[7] == prints[0] | {"seed": 1}
    assert len({(run.config.data.seed, run.config.data.test_size) for run in runs}) == 1


def test_without_a_reward_that_shares_it_there_is_no_common_cold_start():
    assert [run.name for run in plan(Ablation(rewards=("untagged",), seeds=(0,)))] == ["untagged"]


def test_what_all_runs_have_in_common_reaches_each_of_them():
    common = Config(model=Config().model, seed=99)
    runs = plan(Ablation(rewards=("user",), seeds=(7,), run=common))
    assert all(run.config.seed == 7 and run.config.model == common.model for run in runs)


@pytest.mark.parametrize("changes,message", [
    ({"rewards": ("user", "usr")}, r"rewards=.*'usr'.*: expected some of .*'llm'"),
    ({"rewards": ()}, "rewards=.*at least one"),
    ({"rewards": ("user", "user")}, "each once"),
    ({"seeds": ()}, "seeds=.*integers, at least one"),
    ({"workdir": "gs://bucket/x"}, "workdir=gs://bucket/x: .* no URL"),
])
def test_what_cannot_be_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Ablation(**changes)


def test_every_reward_is_one_that_the_reward_knows():
    for name in REWARDS:
        assert plan(Ablation(rewards=(name,), seeds=(0,)))[-1].name == name
