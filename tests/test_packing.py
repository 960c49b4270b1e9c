"""Packed completions: where they lie, and that loss and gradient are those of the padded batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_grpo_exact as exact
import tiny

from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh, param_shardings
from gtalign_jax.training import packed as packed_lib
from gtalign_jax.training.grpo import GRPOConfig
from gtalign_jax.training.packing import Packing, lay_out, make_plan, take

Q, G, T = exact.Q, exact.G, exact.T


def packed_of(b, cfg, *, groups=3, shards=1):
    lengths_QG = np.asarray(b.lengths_QG)
    counts_QG = np.asarray(b.valid_QG) & ((np.asarray(b.adv_QG) != 0) | (cfg.beta > 0))
    plan = make_plan(lengths_QG, counts_QG, T, groups, shards)
    pieces = jnp.asarray(-(-plan.bins // cfg.pack_rows))
    return packed_lib.pack(b, lay_out(plan, lengths_QG, T, cfg.pack_rows), pieces, cfg), plan


def run(b, *, groups=3, **options):
    cfg = GRPOConfig(**{"beta": 0.1, "logit_chunk": 3, "pack": groups, **options})
    packed, _ = packed_of(b, cfg, groups=groups)
    fn = jax.jit(functools.partial(packed_lib.loss_and_grads, cfg=tiny.CFG, grpo=cfg))
    return jax.device_get(fn(tiny.params(), packed))


def same(found, expected) -> None:
    (loss, grads, seen), (plain_loss, plain_grads, plain_seen) = found, expected
    assert float(loss) == pytest.approx(float(plain_loss), abs=1e-5)
    exact.assert_same_grads(grads, plain_grads, atol=1e-5, rtol=1e-5)
    for name, mean in plain_seen["means"].items():
        assert float(seen["means"][name].divide()) == pytest.approx(
            float(mean.divide()), abs=1e-4), name


@pytest.mark.parametrize("groups, rows", [(1, 1), (3, 1), (4, 3)])
def test_the_packed_update_is_the_padded_one(groups, rows):
    b = exact.with_reference(exact.make_batch())
    same(run(b, groups=groups, pack_rows=rows), exact.run(exact.make_batch()))


@pytest.mark.parametrize("options", [
    {"ratio": "sequence"}, {"aggregation": "sequence"}, {"aggregation": "constant"},
    pytest.param({"truncated_is": 1.5}, marks=pytest.mark.slow),
])
def test_so_it_is_for_other_losses(options):
    b = exact.with_reference(exact.make_batch())
    same(run(b, **options), exact.run(exact.make_batch(), **options))


def test_a_common_prefix_goes_through_once_here_too():
    b = exact.make_batch()
    head_QP = jnp.broadcast_to(jnp.arange(20, 26)[None], (Q, 6))
    b = b.replace(prompt_QS=jnp.concatenate([head_QP, b.prompt_QS], axis=1),
                  prompt_lengths_Q=b.prompt_lengths_Q + 6)
    same(run(exact.with_reference(b).replace(common=5)), exact.run(b))


def test_groups_without_signal_are_not_computed_and_change_no_gradient():
    """Without a KL term a group of equal rewards has no gradient (R40)."""
    b = exact.make_batch()
    b = b.replace(adv_QG=b.adv_QG.at[1].set(0.0).at[2, 1:].set(0.0), ref_logp_QGT=None)
    cfg = GRPOConfig(beta=0.0, reference=False, logit_chunk=3, pack=2)
    packed, plan = packed_of(b, cfg, groups=2)
    _, everything = packed_of(b, GRPOConfig(beta=0.1, pack=2), groups=2)
    assert (plan.bin_XR.reshape(Q, G)[1] == -1).all()
    assert (plan.bin_XR.reshape(Q, G)[2] >= 0).tolist() == [True, False, False, False]
    assert plan.bins < everything.bins
    found = jax.jit(functools.partial(packed_lib.loss_and_grads, cfg=tiny.CFG, grpo=cfg))(
        tiny.params(), packed)
    plain = jax.jit(functools.partial(exact.grpo.loss_and_grads, cfg=tiny.CFG, grpo=cfg))(
        tiny.params(), b)
    assert float(found[0]) == pytest.approx(float(plain[0]), abs=1e-6)
    exact.assert_same_grads(found[1], plain[1], atol=1e-6)


def test_a_batch_without_any_signal_has_a_zero_gradient():
    b = exact.make_batch()
    b = b.replace(adv_QG=jnp.zeros_like(b.adv_QG))
    cfg = GRPOConfig(beta=0.0, reference=False, pack=2)
    packed, plan = packed_of(b, cfg)
    assert plan.bins == 0
    loss, grads, _ = packed_lib.loss_and_grads(tiny.params(), packed, cfg=tiny.CFG, grpo=cfg)
    assert float(loss) == 0
    assert exact.size(grads) == 0


def test_the_number_of_bins_in_use_compiles_nothing_anew():
    cfg = GRPOConfig(beta=0.1, logit_chunk=3, pack=2)
    fn = jax.jit(functools.partial(packed_lib.loss_and_grads, cfg=tiny.CFG, grpo=cfg))
    bins = set()
    for seed in range(3):
        packed, plan = packed_of(exact.with_reference(exact.make_batch(seed)), cfg, groups=2)
        bins.add(plan.bins)
        fn(tiny.params(), packed)
    assert len(bins) > 1 and fn._cache_size() == 1


@pytest.mark.slow
def test_eight_devices_pack_their_own_rows_for_the_same_gradient():
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), TRAIN)
    b = exact.with_reference(exact.make_batch())
    cfg = GRPOConfig(beta=0.1, logit_chunk=3, pack=1)
    packed, _ = packed_of(b, cfg, groups=1, shards=4)
    params = jax.device_put(tiny.params(), param_shardings(tiny.CFG, layout))
    place = lambda x: jax.device_put(x, layout.sharding("prompts") if x.ndim else  # noqa: E731
                                     layout.sharding())
    fn = jax.jit(functools.partial(packed_lib.loss_and_grads, cfg=tiny.CFG, grpo=cfg,
                                   layout=layout))
    same(jax.device_get(fn(params, jax.tree.map(place, packed))), exact.run(exact.make_batch()))


def test_a_plan_lays_every_row_that_counts_once_and_side_by_side():
    rng = np.random.default_rng(0)
    lengths_QG = rng.integers(0, 33, (12, 4))
    counts_QG = rng.random((12, 4)) < 0.8
    plan = make_plan(lengths_QG, counts_QG, 32, 2, 3)
    placed = lay_out(plan, lengths_QG, 32, 3)
    ids_QGT = 1 + np.arange(12 * 4 * 32).reshape(12, 4, 32)
    found = np.asarray(take(jnp.asarray(ids_QGT), placed))
    wanted = {int(i) for q, g in np.ndindex(12, 4) if counts_QG[q, g]
              for i in ids_QGT[q, g, : lengths_QG[q, g]]}
    assert sorted(found[found > 0].tolist()) == sorted(wanted)
    for x, n in np.ndindex(*placed.row_XNW.shape[:2]):
        rows = placed.row_XNW[x, n]
        real = rows < 16
        assert len(set(rows[real] // 4)) <= 2
        assert real.tolist() == sorted(real.tolist(), reverse=True)  # nothing between completions
        slots = placed.slot_XNW[x, n][real]
        np.testing.assert_array_equal(placed.groups_XNm[x, n][slots], rows[real] // 4)


def test_long_tailed_lengths_are_packed_with_less_than_ten_percent_padding():
    """Median 200, 99th percentile 1,500, limit 2,048; padded, 86 % of the positions are padding."""
    rng = np.random.default_rng(0)
    spread = np.log(1500 / 200) / 2.3263
    lengths = np.clip(np.ceil(200 * np.exp(spread * rng.standard_normal((64, 8)))), 1, 2048)
    lengths_QG = lengths.astype(np.int32)
    plan = make_plan(lengths_QG, np.ones_like(lengths_QG, bool), 2048, 4, 1)
    assert lengths_QG.mean() / 2048 < 0.16
    assert Packing(plan, lengths_QG, 2048, 1).fill > 0.9
