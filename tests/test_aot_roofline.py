"""Operations and bytes by formula, against numbers by hand, a slow count and XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from gtalign_jax.aot import roofline
from gtalign_jax.aot.hlo import Collective
from gtalign_jax.aot.roofline import Work
from gtalign_jax.aot.topology import describe
from gtalign_jax.model import forward
from gtalign_jax.model.spec import ModelConfig, abstract_params, num_params

TINY = ModelConfig("qwen2", vocab_size=9, d_model=4, d_ff=8, num_layers=3, num_heads=2,
                   num_kv_heads=1, head_dim=2, vocab_multiple=5)
# Per layer: q and o 2 · 4·2·2, k and v 2 · 4·1·2, three of the feed-forward 3 · 4·8.
W = 3 * (32 + 16 + 96)
V_D = 10 * 4  # the padded vocabulary
PAIR = 4 * 3 * 2 * 2  # operations per query and key that it sees: 4 L N H


def seen(Q: int, G: int, S: int, T: int) -> int:
    """Pairs of a query and a key that it may see, one by one."""
    pairs = 0
    for _ in range(Q):
        for query in range(S):
            pairs += sum(1 for key in range(S) if key <= query)
        for _ in range(G):
            for query in range(T):
                pairs += S + sum(1 for key in range(T) if key <= query)
    return pairs


def test_the_weights_are_those_of_the_matrix_products():
    assert roofline.block_weights(TINY) == W
    assert roofline.head_weights(TINY) == V_D
    assert roofline.cache_bytes(TINY) == 2 * 3 * 1 * 2 * 2


@pytest.mark.parametrize("Q, G, S, T", [(1, 2, 3, 2), (2, 4, 5, 7), (3, 1, 0, 6)])
def test_a_forward_pass_runs_each_prompt_once_for_all_of_its_completions(Q, G, S, T):
    work = roofline.forward_work(TINY, Q, G, S, T)
    tokens = Q * S + Q * G * T  # not Q · G · (S + T)
    assert work.flops == 2 * W * tokens + 2 * V_D * Q * G * T + PAIR * seen(Q, G, S, T)
    assert work.useful_flops == work.flops
    assert work.weight_bytes == 2 * (W + V_D)


def test_prefill_has_no_logits_and_writes_the_cache():
    work = roofline.prefill_work(TINY, 2, 5)
    assert work.flops == 2 * W * 10 + PAIR * 2 * 15
    # Per token and layer, two bytes each: 4 D + (2 (N + 2 K) + 2 N) H + 4 F; then the cache.
    assert work.hbm_bytes == 10 * 3 * 2 * (16 + (8 + 4) * 2 + 32) + 10 * 24
    assert work.weight_bytes == 2 * W


def test_decode_reads_all_weights_and_each_prompts_cache_once_per_step():
    Q, G, S, T = 2, 3, 5, 4
    work = roofline.decode_work(TINY, Q, G, S, T)
    pairs = seen(Q, G, S, T) - seen(Q, 0, S, 0)  # the prompts are prefilled already
    assert work.flops == 2 * (W + V_D) * Q * G * T + PAIR * pairs
    assert work.weight_bytes == T * 2 * (W + V_D)
    caches = 24 * (Q * S + Q * G * T)  # not Q · G · S: a group shares its prompt
    logits, activations = 4 * 4 * Q * G * 10, Q * G * 3 * 2 * (16 + 24 + 32)
    assert work.hbm_bytes == T * (caches + logits + activations)


@pytest.mark.parametrize("remat, products, attention", [
    ("none", 0, 0), ("full", 1, 1), ("dots", 0, 1), ("attention", 1, 0),
])
def test_an_update_is_three_forward_passes_and_what_remat_repeats(remat, products, attention):
    shape = (2, 4, 5, 7)
    work = roofline.update_work(TINY, *shape, remat=remat)
    once = roofline.forward_work(TINY, *shape)
    assert work.useful_flops == 3 * once.flops
    repeated = 2 * V_D * 56 + products * 2 * W * 66 + attention * PAIR * seen(*shape)
    assert work.flops == 3 * once.flops + repeated + 12 * num_params(TINY)
    passes = 4 if products or attention else 3
    assert work.weight_bytes == passes * once.weight_bytes


def test_more_micro_batches_read_the_weights_more_often_and_compute_no_more():
    one, four = (roofline.update_work(TINY, 8, 2, 3, 4, micro_batches=n) for n in (1, 4))
    assert four.flops == one.flops and four.weight_bytes == 4 * one.weight_bytes
    assert four.hbm_bytes - one.hbm_bytes == 3 * 3 * 4 * num_params(TINY)  # three more sums


def test_every_remat_policy_of_the_model_has_a_cost_and_others_are_refused():
    assert set(roofline.REPEATED) == set(forward.REMAT_POLICIES)
    with pytest.raises(ValueError, match="remat='some'"):
        roofline.update_work(TINY, 1, 1, 1, 1, remat="some")


def test_adam_and_reshard_move_master_weights():
    params = num_params(TINY)
    assert roofline.optimizer_work(TINY).hbm_bytes == (16 + 12) * params
    reshard = roofline.reshard_work(TINY)
    assert (reshard.flops, reshard.hbm_bytes, reshard.weight_bytes) == (0, 4 * params, 2 * params)


def test_xla_counts_as_many_operations_as_the_formula():
    # One layer, as XLA counts a loop's body once; few tokens, as it counts masked pairs too.
    cfg = ModelConfig("qwen2", vocab_size=512, d_model=256, d_ff=512, num_layers=1, num_heads=4,
                      num_kv_heads=2, head_dim=64)
    B, T = 4, 16
    params = abstract_params(cfg)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)

    def run(params, tokens_BT, lengths_B):
        return forward.full_logits(params, cfg, tokens_BT, lengths_B).sum()

    expected = roofline.forward_work(cfg, B, 1, 0, T).flops
    counted = jax.jit(run).lower(params, *tokens).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(expected, rel=0.08)
    counted = jax.jit(jax.grad(run)).lower(params, *tokens).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(3 * expected, rel=0.12)


def collective(bytes_: float, group: int = 4, count: int = 1, **flags) -> Collective:
    given = {"in_loop": False, "over_dcn": False, "blocking": False} | flags
    return Collective("all-gather", bytes_, "", count, group, **given, name="", op_name="")


def test_the_time_is_the_busiest_resources_plus_the_collectives_that_all_wait_for():
    topology = describe("v4-8")  # 4 chips of 275 Tflop/s and 1.2 TB/s, reached over 2 links of 50
    work = Work(flops=4 * 275e12, useful_flops=2 * 275e12, hbm_bytes=4 * 0.6e12,
                weight_bytes=2 * 0.3e12)

    def times(*found, **options):
        return roofline.seconds(work, found, topology, tensor=2, **options)

    bare = times()
    assert (bare.compute, bare.hbm, bare.total, bare.bound) == (1.0, 0.5 + 0.25, 1.0, "compute")
    beside = times(collective(20e9, count=10))
    assert (beside.ici, beside.total, beside.bound) == (2.0, 2.0, "ici")
    waiting = times(collective(20e9), collective(10e9, blocking=True))
    assert (waiting.ici, waiting.total) == pytest.approx((0.3, 1.1))
    inside = times(collective(1e9, in_loop=True), iterations=30)
    assert inside.ici == pytest.approx(0.3) and inside.total == pytest.approx(1.3)
    across = times(collective(6.25e9 * 3, over_dcn=True), collective(1e9))
    assert (across.dcn, across.total, across.bound) == (3.0, 3.0, "dcn")


def test_half_the_peak_in_useful_operations_is_half_the_utilisation():
    topology = describe("v4-8")
    assert roofline.mfu(2 * 275e12, 1.0, topology) == 0.5


def test_the_same_work_per_chip_takes_as_long_on_more_chips_but_for_the_links():
    cfg = ModelConfig("qwen2", vocab_size=151_936, d_model=2048, d_ff=11_008, num_layers=36,
                      num_heads=16, num_kv_heads=2, head_dim=128)

    def total(name: str) -> float:
        topology = describe(name)
        work = roofline.update_work(cfg, topology.chips, 8, 1024, 512, remat="full")
        return roofline.seconds(work, [], topology, tensor=1).total

    # Only the optimizer's share of a chip shrinks.
    assert 1.0 <= total("v5p-16") / total("v5p-1024") < 1.05


def test_work_adds_up_and_multiplies():
    assert Work(1, 2, 3, 4) + Work(10, 20, 30, 40) * 2 == Work(21, 42, 63, 84)
    assert Work(0, 0, 800, 60).hbm_bytes_per_chip(chips=8, tensor=4) == 100 + 15
