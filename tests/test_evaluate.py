"""Held-out prompts: each counted once, in batches of one size, with the training reward's code."""

import functools
import types

import jax
import numpy as np
import pytest

from gtalign_jax.evaluation import evaluate as evaluate_lib
from gtalign_jax.evaluation.evaluate import EvaluateConfig, evaluate
from gtalign_jax.rollout.sampler import Rollout
from gtalign_jax.training.assessing import Assessing

KEY = jax.random.key(0)


class Prompts:
    """Seven prompts; prompt i is the number i."""

    def __len__(self):
        return 7

    def take(self, chosen):
        return types.SimpleNamespace(prompts=tuple(chosen), index_Q=np.array(list(chosen)))


class Collector:
    """Samples of prompt i are i tokens long; batch n takes n decode steps."""

    def __init__(self, samples):
        self.samples, self.batches, self.assessed = samples, [], []

    def roll(self, params, batch, key):
        assert params == "params"
        np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(KEY))
        self.batches.append(batch.index_Q.tolist())
        Q, G = len(batch.prompts), self.samples
        index_QG = np.tile(batch.index_Q[:, None], (1, G))
        return Rollout(
            tokens_QGT=np.zeros((Q, G, 9), np.int32), logp_QGT=np.zeros((Q, G, 9)),
            lengths_QG=index_QG, stopped_QG=np.ones((Q, G), bool),
            slots=np.array(len(self.batches)),
        )

    def fetch(self, rollout):
        return np.arange(len(rollout.lengths_QG)), rollout

    def assess(self, batch, at_Q, rollout):
        np.testing.assert_array_equal(at_Q, range(len(batch.prompts)))
        self.assessed.append((batch.prompts, rollout))
        return types.SimpleNamespace(at_first=lambda: rollout)

    def assessing(self, batch):
        return Assessing(self.fetch, functools.partial(self.assess, batch), overlap=False)

    def finished(self, assessing):
        return assessing.result()


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(evaluate_lib, "summarise", lambda e: {"length": e.lengths_QG.mean()})
    monkeypatch.setattr(evaluate_lib, "log_rows", lambda e: e.lengths_QG.reshape(-1).tolist())

    def run(samples=1, **options):
        collector = Collector(samples)
        cfg = EvaluateConfig(samples=samples, **options)
        return (*evaluate("params", collector, Prompts(), cfg, KEY), collector)

    return run


def test_the_last_batch_is_filled_up_and_what_fills_it_is_counted_nowhere(run):
    """Mean length of 0 … 6 is 3; with the two repeats of prompt 6 it would be 3.67."""
    means, rows, collector = run(batch_size=3)
    assert [len(batch) for batch in collector.batches] == [3, 3, 3]
    assert collector.batches[:2] == [[0, 1, 2], [3, 4, 5]]
    assert set(collector.batches[2]) == {6}
    assert rows == [0, 1, 2, 3, 4, 5, 6]
    assert means["length"] == 3.0


def test_all_completions_are_scored_at_once_in_the_order_of_the_prompts(run):
    _, rows, collector = run(batch_size=3, samples=2)
    ((prompts, rollout),) = collector.assessed
    assert prompts == tuple(range(7))
    assert rollout.tokens_QGT.shape == (7, 2, 9)
    assert rows == [i for i in range(7) for _ in range(2)]
    assert rollout.slots == 1 + 2 + 3  # of all batches


@pytest.mark.parametrize("options, expected", [
    ({"batch_size": 3, "prompts": 4}, [0, 1, 3, 5]),
    ({"batch_size": 64}, list(range(7))),
    ({"batch_size": 7, "prompts": 100}, list(range(7))),
])
def test_the_config_says_how_many_prompts_evenly_spread(run, options, expected):
    """The first four of 7 would be those of the first held-out file alone."""
    _, rows, collector = run(**options)
    assert rows == expected
    assert all(len(batch) == options["batch_size"] for batch in collector.batches)


def test_the_same_policy_is_evaluated_on_the_same_prompts_every_time(run):
    assert run(batch_size=3)[2].batches == run(batch_size=3)[2].batches


@pytest.mark.parametrize("options, words", [
    ({"batch_size": 0}, ["evaluate.batch_size=0", ">= 1"]),
    ({"samples": 0}, ["evaluate.samples=0", ">= 1"]),
    ({"prompts": -1}, ["evaluate.prompts=-1", ">= 0"]),
    ({"temperature": -0.5}, ["evaluate.temperature=-0.5", ">= 0"]),
    ({"every_steps": -1}, ["evaluate.every_steps=-1", ">= 0"]),
])
def test_a_config_error_names_key_value_and_what_is_allowed(options, words):
    with pytest.raises(ValueError) as error:
        EvaluateConfig(**options)
    for word in words:
        assert word in str(error.value)
