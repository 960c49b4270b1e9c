"""Shrinking batches and the common prefix: the same tokens as without, for fewer positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gtalign_jax.model import attend_cached
from gtalign_jax.model.sharding import ROLLOUT, Layout, MeshConfig, make_mesh, param_shardings
from gtalign_jax.rollout.compaction import batch_sizes
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler

KEY = jax.random.key(3)
STOPS = (3, 11, 17, 21)  # with 50 tokens a row ends after about a dozen
Q, G, T = 8, 6, 24


def prompts(common: int = 0):
    """8 prompts of 1 to 9 tokens after `common` equal ones."""
    tokens_QS, lengths_Q, _ = tiny.rows(Q=Q)
    head = jnp.broadcast_to(jnp.arange(5, 5 + common)[None], (Q, common))
    return jnp.concatenate([head, tokens_QS], axis=1), lengths_Q + common


@functools.cache
def sample(shrink: float, common: int = 0, head: int = 0, devices: int = 1, T: int = T,
           stop_ids: tuple[int, ...] = STOPS, smallest: int = 1):
    layout, params, put = None, tiny.params(), lambda x: x
    if devices == 8:
        layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), ROLLOUT)
        params = jax.device_put(params, param_shardings(tiny.CFG, layout))
        put = lambda x: jax.device_put(x, layout.sharding("prompts"))  # noqa: E731
    config = SamplerConfig(max_new_tokens=T, shrink=shrink, smallest=smallest)
    run = make_sampler(tiny.CFG, config, G, stop_ids, layout, common)
    rows = (*prompts(head), jnp.arange(Q))
    return jax.device_get(run(params, *map(put, rows), KEY))


def assert_same(a, b) -> None:
    np.testing.assert_array_equal(a.tokens_QGT, b.tokens_QGT)
    np.testing.assert_array_equal(a.lengths_QG, b.lengths_QG)
    np.testing.assert_array_equal(a.stopped_QG, b.stopped_QG)
    np.testing.assert_allclose(a.logp_QGT, b.logp_QGT, atol=1e-5)


def by_hand(lengths: np.ndarray, sizes: tuple[int, ...]) -> int:
    """Positions computed when a batch goes over to the next size as soon as its rows fit."""
    slots = 0
    for t in range(int(lengths.max())):
        live = int((lengths > t).sum())
        slots += min(size for size in sizes if size >= live)
    return slots


@pytest.mark.parametrize("shrink", [0.5, 0.8])
@pytest.mark.long
def test_a_shrinking_batch_draws_the_same_tokens_in_fewer_positions(shrink):
    plain, small = sample(0.0), sample(shrink)
    assert_same(small, plain)
    assert len(set(plain.lengths_QG.ravel().tolist())) > 8  # rows end at many different times
    assert plain.slots == plain.lengths_QG.max() * Q * G
    assert small.slots == by_hand(small.lengths_QG, batch_sizes(Q * G, shrink, 1))
    assert small.slots < 0.7 * plain.slots


def test_every_device_shrinks_its_own_share_of_the_rows():
    """4 shards of 12 rows, that all go on until the fullest of them fits."""
    eight = sample(0.5, devices=8)
    assert_same(eight, sample(0.0))
    shards, slots = eight.lengths_QG.reshape(4, -1), 0
    for t in range(int(shards.max())):
        live = int((shards > t).sum(axis=1).max())
        slots += 4 * min(size for size in batch_sizes(12, 0.5, 1) if size >= live)
    assert eight.slots == slots


@pytest.mark.parametrize("devices", [1, 8])
def test_rows_that_fill_several_blocks_of_their_caches_are_those_of_one_block(devices, monkeypatch):
    """Beyond 128 positions caches are read in blocks: arrays of their own where layers are
    unrolled, parts of one where they are not."""
    small = sample(0.5, T=150, stop_ids=(3,), devices=devices, smallest=6)
    monkeypatch.setattr(attend_cached, "SMALLEST_BLOCK", 256)
    plain = sample.__wrapped__(0.0, T=150, stop_ids=(3,))
    assert plain.lengths_QG.max() == 150 and plain.lengths_QG.min() < 20
    assert_same(small, plain)


def test_a_cache_of_many_blocks_is_one_array_read_in_parts(monkeypatch):
    monkeypatch.setattr(attend_cached, "SMALLEST_BLOCK", 4)
    assert attend_cached.own_pieces(T) == 1 and attend_cached.own_block(T) == 4
    assert_same(sample.__wrapped__(0.5, smallest=12), sample(0.0))


def test_all_rows_at_the_limit_never_shrink():
    run = sample(0.5, stop_ids=(60,))
    assert (run.lengths_QG == T).all() and not run.stopped_QG.any()
    assert run.slots == Q * G * T


@pytest.mark.parametrize("devices", [1, 8])
def test_a_prefix_that_all_prompts_share_is_computed_once_for_the_same_tokens(devices):
    plain = sample(0.0, head=7)
    assert_same(sample(0.5, common=7, head=7, devices=devices), plain)
    assert (plain.tokens_QGT != sample(0.0).tokens_QGT).any()  # the prefix is attended to
    assert_same(sample(0.0, common=3, head=7), plain)  # a part of it will do


def test_the_prefix_is_neither_computed_nor_stored_for_each_prompt():
    config = SamplerConfig(max_new_tokens=4)
    sizes = {}
    for common in (0, 64):
        run = make_sampler(tiny.CFG, config, G, STOPS, common=common)
        args = (tiny.params(), *prompts(64))
        cache, _ = jax.eval_shape(run.prefill, *args)
        sizes[common] = sum(x.size for x in jax.tree.leaves(cache))
        cost = run.prefill.lower(*args).compile().cost_analysis()["flops"]
        sizes[common, "flops"] = cost
    assert sizes[64] < sizes[0] / 3
    assert sizes[64, "flops"] < sizes[0, "flops"] / 2


@pytest.mark.parametrize("rows, ratio, smallest, sizes", [
    (64, 0.5, 4, (64, 32, 16, 8, 4)),
    (64, 0.67, 4, (64, 43, 29, 20, 14, 10, 7, 5, 4)),
    (10, 0.5, 3, (10, 5, 3)),
    (3, 0.5, 4, (3,)),
    (2, 0.9, 1, (2,)),  # 2 x 0.9 rounded up is 2: no smaller one
    (64, 0.0, 1, (64,)),
])
def test_batch_sizes(rows, ratio, smallest, sizes):
    assert batch_sizes(rows, ratio, smallest) == sizes


@pytest.mark.parametrize("key, value", [("shrink", 1.0), ("shrink", -0.1), ("smallest", 0)])
def test_a_setting_without_meaning_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"{key}={value}"):
        SamplerConfig(**{key: value})
