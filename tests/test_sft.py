"""The cold start: its loss is on completions alone and exact under micro-batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gtalign_jax.model import forward
from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh, param_shardings
from gtalign_jax.training import sft
from gtalign_jax.training.sft import ExampleSet, SFTBatch, SFTConfig
from gtalign_jax.training.state import OptimizerConfig, make_optimizer, make_state

B, S, T = 4, 9, 7


def make_batch(seed: int = 0) -> SFTBatch:
    prompts, prompt_lengths, tokens = tiny.rows(B, 1, S, T, seed)
    return SFTBatch(prompts, prompt_lengths, tokens[:, 0], jnp.asarray([7, 1, 3, 6], jnp.int32))


@functools.cache
def whole(**options):
    cfg = SFTConfig(**options)
    return jax.jit(functools.partial(sft.loss_and_grads, cfg=tiny.CFG, sft=cfg))


@jax.jit
def plain(params, row_BS, width_B):
    """(logits, hidden states) of whole rows."""
    hidden = forward.full_hidden(params, tiny.CFG, row_BS, width_B)
    return forward.logits(forward.head_of(params), tiny.CFG, hidden), hidden


def plain_rows(params, b: SFTBatch):
    """For each row (logits, hidden states, ids) of its completion tokens, by the plain forward."""
    for i in range(B):
        start, n = int(b.prompt_lengths_B[i]), int(b.lengths_B[i])
        row = np.concatenate([b.prompt_BS[i, :start], b.tokens_BT[i]])
        padded = jnp.asarray(np.pad(row, (0, S + T - len(row))))[None]
        out = plain(params, padded, jnp.asarray([len(row)]))
        logits, hidden = (np.asarray(x[0, start - 1 : start - 1 + n]) for x in out)
        yield logits, hidden, row[start : start + n]


def softmax(logits):
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def test_the_loss_is_the_mean_over_all_completion_tokens():
    """17 tokens; a mean of the rows' means would differ."""
    b, params = make_batch(), tiny.params()
    rows = [
        -np.log(softmax(logits)[np.arange(len(ids)), ids])
        for logits, _, ids in plain_rows(params, b)
    ]
    expected = np.concatenate(rows).mean()
    assert abs(expected - np.mean([row.mean() for row in rows])) > 1e-2
    loss, _ = whole()(params, b)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_given_tokens_are_read_and_bear_no_loss():
    """Row 0 without its tokens 2 to 4, row 3 without the first two: 17 - 5 tokens."""
    spans, params = ((2, 5), (0, 0), (0, 0), (0, 2)), tiny.params()
    b = make_batch()
    rows = [
        np.delete(-np.log(softmax(logits)[np.arange(len(ids)), ids]), slice(*span))
        for (logits, _, ids), span in zip(plain_rows(params, b), spans, strict=True)
    ]
    expected = np.concatenate(rows)
    assert len(expected) == 12
    loss, _ = whole()(params, b.replace(given_B2=jnp.asarray(spans)))
    assert float(loss) == pytest.approx(expected.mean(), abs=1e-5)
    none, _ = whole()(params, b.replace(given_B2=jnp.zeros((B, 2), int)))
    assert float(none) == pytest.approx(float(whole()(params, b)[0]), abs=1e-7)


def test_a_flat_model_loses_the_logarithm_of_the_vocabulary_per_token():
    flat = tiny.params().replace(head_VD=None)
    flat = flat.replace(embed_VD=jnp.zeros_like(flat.embed_VD))
    loss, _ = whole()(flat, make_batch())
    assert float(loss) == pytest.approx(np.log(50), abs=1e-5)


def test_what_stands_in_the_padding_changes_nothing():
    b = make_batch()
    other = b.replace(
        prompt_BS=jnp.where(jnp.arange(S)[None] >= b.prompt_lengths_B[:, None], 33, b.prompt_BS),
        tokens_BT=jnp.where(jnp.arange(T)[None] >= b.lengths_B[:, None], 44, b.tokens_BT),
    )
    (loss, grads), (same, same_grads) = whole()(tiny.params(), b), whole()(tiny.params(), other)
    assert float(loss) == float(same)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(same_grads), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-7)


def test_predicting_the_prompt_is_not_trained():
    """With an untied head, the loss on a prompt token would pull up that token's row of the head.

    Token 40 is in every prompt (before its last place) and in no completion: what the head's row
    gets is its share of the softmax alone, which pushes down; a loss on the prompt would pull up.
    """
    b = make_batch()
    b = b.replace(
        prompt_BS=jnp.where(b.prompt_BS == 40, 1, b.prompt_BS).at[:, 1].set(40),
        prompt_lengths_B=jnp.full(B, S, jnp.int32),
        tokens_BT=jnp.where(b.tokens_BT == 40, 2, b.tokens_BT),
    )
    params = tiny.params()
    params = params.replace(head_VD=params.embed_VD)
    head_grads = whole()(params, b)[1].head_VD
    expected, tokens = 0.0, 0
    for logits, hidden, _ in plain_rows(params, b):
        expected += (softmax(logits)[:, 40, None] * hidden).sum(axis=0)
        tokens += len(hidden)
    expected = expected / tokens
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(head_grads[40], expected, atol=1e-5)


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_micro_batches_add_up_to_the_whole_under_unequal_token_counts(rows):
    b, params = make_batch(), tiny.params()
    loss, grads = whole()(params, b)
    cut_loss, cut_grads = whole(micro_batch_size=rows)(params, b)
    assert float(loss) == pytest.approx(float(cut_loss), abs=1e-6)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(cut_grads), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("sizes", [
    dict(data=1, fsdp=1, tensor=1),
    pytest.param(dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
])
def test_three_steps_compile_once_donate_their_state_and_learn(sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    layout = Layout(make_mesh(MeshConfig(**sizes), devices), TRAIN)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 3)
    params = jax.device_put(tiny.params(), param_shardings(tiny.CFG, layout))
    state = make_state(params, tiny.CFG, optimizer, layout)
    update = sft.make_update(tiny.CFG, SFTConfig(), optimizer, layout=layout)
    losses = []
    for lengths in ([7, 1, 3, 6], [1, 1, 1, 1], [7, 1, 3, 6]):
        b = make_batch().replace(lengths_B=jnp.asarray(lengths, jnp.int32))
        before = state
        state, seen = update(state, jax.device_put(b, layout.sharding("prompts")))
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        losses.append(float(seen["means"]["sft/loss"].sum))
        assert float(seen["means"]["sft/tokens"].sum) == sum(lengths)
    assert update._cache_size() == 1
    assert losses[2] < losses[0] - 0.1


def example_set(n: int = 10) -> ExampleSet:
    return ExampleSet([[i, i + 1] for i in range(n)], [[20 + i] * (1 + i % 3) for i in range(n)],
                      prompt_width=4, completion_width=5)


def test_a_step_gives_the_same_batch_whenever_it_is_asked_for():
    left, right = example_set(), example_set()
    for step in (7, 0, 7, 12345):
        a, b = left.batch(step, batch_size=4, seed=3), right.batch(step, batch_size=4, seed=3)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)
    assert (left.batch(0, batch_size=4, seed=3).prompt_BS
            != left.batch(0, batch_size=4, seed=4).prompt_BS).any()


def test_every_epoch_shows_every_example_once_with_its_own_completion():
    seen = []
    for step in range(5):  # 5 * 4 = 20 = two epochs of ten
        b = example_set().batch(step, batch_size=4, seed=0)
        assert b.prompt_BS.shape == (4, 4) and b.tokens_BT.shape == (4, 5)
        for i in range(4):
            example = int(b.prompt_BS[i, 0])
            assert b.prompt_lengths_B[i] == 2 and b.prompt_BS[i, 1] == example + 1
            n = b.lengths_B[i]
            assert n == 1 + example % 3
            assert b.tokens_BT[i, :n].tolist() == [20 + example] * n
            seen.append(example)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
