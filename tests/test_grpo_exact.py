"""The GRPO update of a whole model: against a slow plain one, cut into pieces, and over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gtalign_jax.model import forward
from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh, param_shardings
from gtalign_jax.training import grpo
from gtalign_jax.training.grpo import Batch, GRPOConfig
from gtalign_jax.training.state import OptimizerConfig, make_optimizer, make_state

Q, G, S, T = 4, 4, 9, 7
BASE = GRPOConfig(beta=0.1, logit_chunk=3)


def make_batch(seed: int = 0, G: int = G) -> Batch:
    """Unequal prompts and completions, an empty one among them; two rows that were not judged."""
    rng = np.random.default_rng(seed)
    prompt_QS, lengths_Q, tokens_QGT = tiny.rows(Q, G, S, T, seed)
    lengths_QG = rng.integers(1, T + 1, (Q, G))
    lengths_QG[0, 0], lengths_QG[1, 0], lengths_QG[2] = 0, T, 1
    valid_QG = np.ones((Q, G), bool)
    valid_QG[1, 1] = valid_QG[3, 2] = False
    old = np.asarray(logps(tiny.params(), prompt_QS, lengths_Q, tokens_QGT))
    return Batch(
        prompt_QS=prompt_QS,
        prompt_lengths_Q=lengths_Q,
        tokens_QGT=tokens_QGT,
        lengths_QG=jnp.asarray(lengths_QG, jnp.int32),
        adv_QG=jnp.asarray(rng.normal(size=(Q, G)), jnp.float32) * valid_QG,
        valid_QG=jnp.asarray(valid_QG),
        sampler_logp_QGT=jnp.asarray(old, jnp.float32),
        # As if the policy had moved since: ratios between e^-0.5 and e^0.5, so some are clipped.
        old_logp_QGT=jnp.asarray(old + rng.uniform(-0.5, 0.5, old.shape), jnp.float32),
    )


def reference():
    return tiny.params(seed=1)


@functools.partial(jax.jit, static_argnames="width")
def _plain_logps(params, rows_BS, widths_B, starts_B, width):
    """log p of tokens starts … starts + width of whole rows, one plain forward for all rows."""
    logits = forward.full_logits(params, tiny.CFG, rows_BS, widths_B)
    logp = jax.nn.log_softmax(logits)[:, :-1]
    picked = jnp.take_along_axis(logp, rows_BS[:, 1:, None], axis=2)[..., 0]
    at_BT = starts_B[:, None] - 1 + jnp.arange(width)[None, :]
    return jnp.take_along_axis(picked, at_BT, axis=1)


def logps(params, prompt_QS, lengths_Q, tokens_QGT):
    """The same by row: the prompt copied in front of each of its completions."""
    Q, G, T = tokens_QGT.shape
    rows = np.zeros((Q * G, prompt_QS.shape[1] + T), np.int32)
    starts = np.repeat(np.asarray(lengths_Q), G)
    for b in range(Q * G):
        row = tiny.concatenated(prompt_QS, lengths_Q, tokens_QGT, *divmod(b, G))[0]
        rows[b, : len(row)] = row
    out = _plain_logps(params, jnp.asarray(rows), jnp.asarray(starts + T), jnp.asarray(starts), T)
    return out.reshape(Q, G, T)


def plain_loss_and_grads(b: Batch, cfg: GRPOConfig):
    loss = functools.partial(plain_loss, b=jax.device_get(b), cfg=cfg)
    return jax.jit(jax.value_and_grad(loss))(tiny.params())


def plain_loss(params, b: Batch, cfg: GRPOConfig):
    """The loss by its definition: a loop over rows and tokens, full rows, no shared anything."""
    logp = logps(params, b.prompt_QS, b.prompt_lengths_Q, b.tokens_QGT)
    ref = logps(reference(), b.prompt_QS, b.prompt_lengths_Q, b.tokens_QGT)
    rows = []
    for q in range(b.tokens_QGT.shape[0]):
        for g in range(b.tokens_QGT.shape[1]):
            n = int(b.lengths_QG[q, g])
            if not bool(b.valid_QG[q, g]) or n == 0:
                continue
            r = jnp.exp(logp[q, g, :n] - b.old_logp_QGT[q, g, :n])
            adv = b.adv_QG[q, g]
            surrogate = jnp.minimum(r * adv, jnp.clip(r, 0.8, 1.2) * adv)
            d = logp[q, g, :n] - ref[q, g, :n]
            rows.append(-surrogate + cfg.beta * (jnp.exp(-d) - 1 + d))
    match cfg.aggregation:
        case "token":
            return jnp.concatenate(rows).mean()
        case "sequence":
            return sum(row.mean() for row in rows) / len(rows)
        case "constant":
            return sum(row.sum() for row in rows) / (len(rows) * T)


@functools.cache
def whole(cfg: GRPOConfig):
    """The jitted `loss_and_grads`, shared by the tests."""
    return jax.jit(functools.partial(grpo.loss_and_grads, cfg=tiny.CFG, grpo=cfg))


def with_reference(b: Batch) -> Batch:
    ref = logps(reference(), b.prompt_QS, b.prompt_lengths_Q, b.tokens_QGT)
    return b.replace(ref_logp_QGT=ref)


def run(b: Batch, **options):
    cfg = GRPOConfig(**{"beta": BASE.beta, "logit_chunk": BASE.logit_chunk, **options})
    return jax.device_get(whole(cfg)(tiny.params(), with_reference(b)))


def assert_same_grads(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def size(grads) -> float:
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(grads))


def test_the_shared_prompt_update_is_that_of_concatenated_rows():
    b = make_batch()
    loss, grads, seen = run(b)
    expected, plain_grads = plain_loss_and_grads(b, BASE)
    assert 0.02 < float(seen["means"]["grpo/clip_fraction"].divide()) < 0.8
    assert float(seen["means"]["grpo/kl"].divide()) > 0.01
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert_same_grads(grads, plain_grads, atol=1e-5)
    assert size(grads) > 1e-2  # 1e-5 says something


@pytest.mark.parametrize("micro", [0, 1])
def test_a_prefix_that_all_prompts_share_goes_through_once_for_the_same_gradient(micro):
    """All of its tokens, and a part of them; the micro-batches' gradients meet in its keys."""
    b = make_batch()
    head_QP = jnp.broadcast_to(jnp.arange(20, 26)[None], (Q, 6))
    b = b.replace(prompt_QS=jnp.concatenate([head_QP, b.prompt_QS], axis=1),
                  prompt_lengths_Q=b.prompt_lengths_Q + 6)
    expected, plain_grads, _ = run(b)
    assert abs(float(expected) - float(run(make_batch())[0])) > 1e-4  # the prefix matters
    for common in (6, 4):
        loss, grads, _ = run(b.replace(common=common), micro_batch_prompts=micro)
        assert float(loss) == pytest.approx(float(expected), abs=1e-5)
        assert_same_grads(grads, plain_grads, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["sequence", "constant"])
def test_so_it_is_for_the_other_aggregations(aggregation):
    b = make_batch(1)
    loss, grads, _ = run(b, aggregation=aggregation)
    cfg = GRPOConfig(beta=BASE.beta, aggregation=aggregation)
    expected, plain_grads = plain_loss_and_grads(b, cfg)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert_same_grads(grads, plain_grads, atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing():
    b = make_batch()
    beyond_S = jnp.arange(S)[None, :] >= b.prompt_lengths_Q[:, None]
    beyond_T = jnp.arange(T)[None, None, :] >= b.lengths_QG[:, :, None]
    garbage = b.replace(
        prompt_QS=jnp.where(beyond_S, 33, b.prompt_QS),
        tokens_QGT=jnp.where(beyond_T, 44, b.tokens_QGT),
        sampler_logp_QGT=jnp.where(beyond_T, 1e9, b.sampler_logp_QGT),
        old_logp_QGT=jnp.where(beyond_T, -1e9, b.old_logp_QGT),
    )
    (loss, grads, seen), (other, other_grads, other_seen) = run(b), run(garbage)
    assert loss == other
    assert_same_grads(grads, other_grads, atol=1e-7)
    for name in seen["means"]:
        assert seen["means"][name].sum == pytest.approx(other_seen["means"][name].sum), name
    assert seen["maxima"] == other_seen["maxima"]


def drop_row(b: Batch, g: int) -> Batch:
    return b.replace(**{
        name: jnp.delete(getattr(b, name), g, axis=1)
        for name in ("tokens_QGT", "lengths_QG", "adv_QG", "valid_QG", "sampler_logp_QGT",
                     "old_logp_QGT")
    })


def test_missing_rows_leave_the_gradient_of_the_batch_without_them():
    """From the rewards on: the statistics of the group, the loss and its denominators."""
    reward_QG = np.random.default_rng(3).uniform(size=(Q, G)).astype(np.float32)
    reward_QG[:, 3] = np.nan
    valid_QG = np.ones((Q, G), bool)
    valid_QG[:, 3] = False
    b = make_batch()
    b = b.replace(adv_QG=grpo.advantages(jnp.asarray(reward_QG), jnp.asarray(valid_QG)),
                  valid_QG=jnp.asarray(valid_QG))
    without = drop_row(b, 3)
    without = without.replace(
        adv_QG=grpo.advantages(jnp.asarray(reward_QG[:, :3]), jnp.ones((Q, 3), bool))
    )
    (loss, grads, _), (other, other_grads, _) = run(b), run(without)
    assert float(loss) == pytest.approx(float(other), abs=1e-6)
    assert_same_grads(grads, other_grads, atol=1e-6)
    assert size(grads) > 1e-2


def test_a_group_of_which_nothing_was_judged_contributes_nothing():
    b = make_batch()
    b = b.replace(valid_QG=b.valid_QG.at[3].set(False), adv_QG=b.adv_QG.at[3].set(5.0))
    other = b.replace(
        prompt_QS=b.prompt_QS.at[3].set(17), tokens_QGT=b.tokens_QGT.at[3].set(23),
        lengths_QG=b.lengths_QG.at[3].set(T),
    )
    (loss, grads, _), (same, same_grads, _) = run(b), run(other)
    assert loss == same
    assert_same_grads(grads, same_grads, rtol=0, atol=0)


def test_a_batch_of_which_nothing_was_judged_has_a_zero_gradient_and_a_finite_loss():
    b = make_batch()
    loss, grads, seen = run(b.replace(valid_QG=jnp.zeros((Q, G), bool)))
    assert loss == 0 and size(grads) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(seen))


@pytest.mark.parametrize("aggregation", [
    "token", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sequence", "constant")),
])
@pytest.mark.parametrize("prompts", [
    1, pytest.param(2, marks=pytest.mark.slow)
])
def test_micro_batches_add_up_to_the_whole_under_unequal_token_counts(aggregation, prompts):
    """A mean of the pieces' means would differ: their token counts do."""
    b = make_batch()
    tokens_Q = (np.asarray(b.lengths_QG) * np.asarray(b.valid_QG)).sum(axis=1)
    assert len(set(tokens_Q.tolist())) > 2
    loss, grads, seen = run(b, aggregation=aggregation)
    cut_loss, cut_grads, cut_seen = run(
        b, aggregation=aggregation, micro_batch_prompts=prompts
    )
    assert float(loss) == pytest.approx(float(cut_loss), abs=1e-6)
    assert_same_grads(grads, cut_grads, atol=1e-6)
    for name, mean in seen["means"].items():
        assert float(mean.divide()) == pytest.approx(
            float(cut_seen["means"][name].divide()), abs=1e-5
        ), name
    assert seen["maxima"]["rollout/logp_gap_max"] == pytest.approx(
        cut_seen["maxima"]["rollout/logp_gap_max"], abs=1e-5
    )


def test_log_probabilities_in_micro_batches_stay_in_place():
    b = make_batch()
    expected = logps(tiny.params(), b.prompt_QS, b.prompt_lengths_Q, b.tokens_QGT)
    cfg = GRPOConfig(micro_batch_prompts=2)
    found = grpo.make_logps(tiny.CFG, cfg, layout=layout_of(**ONE))(tiny.params(), b)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def layout_of(**sizes) -> Layout:
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return Layout(make_mesh(MeshConfig(**sizes), devices), TRAIN)


ONE = dict(slice=1, data=1, fsdp=1, tensor=1)
EIGHT = dict(slice=1, data=2, fsdp=2, tensor=2)


@pytest.mark.slow
def test_eight_devices_make_the_update_of_one():
    b = make_batch()
    results = []
    for sizes in (ONE, EIGHT):
        layout = layout_of(**sizes)
        put = functools.partial(jax.device_put, device=param_shardings(tiny.CFG, layout))
        found = whole(BASE)(put(tiny.params()), grpo.place(with_reference(b), layout))
        results.append(jax.device_get(found))
    (loss, grads, seen), (other, other_grads, other_seen) = results
    assert float(loss) == pytest.approx(float(other), abs=1e-6)
    assert_same_grads(grads, other_grads, atol=1e-5)
    for name, mean in seen["means"].items():
        assert float(mean.count) == float(other_seen["means"][name].count)
        assert float(mean.divide()) == pytest.approx(
            float(other_seen["means"][name].divide()), abs=1e-5
        )


@pytest.mark.parametrize("sizes", [ONE, pytest.param(EIGHT, marks=pytest.mark.slow)])
def test_the_state_is_donated_stays_in_place_and_three_steps_compile_once(sizes):
    """Also over devices, where a state that came out laid out otherwise would compile again."""
    layout = layout_of(**sizes)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 3)
    cfg = GRPOConfig(reference=False, beta=0.0, logit_chunk=T)
    update = grpo.make_update(tiny.CFG, cfg, optimizer, layout=layout)
    put = functools.partial(jax.device_put, device=param_shardings(tiny.CFG, layout))
    params = put(tiny.params())
    state = make_state(params, tiny.CFG, optimizer, layout)
    losses = []
    for step in range(3):
        before = state
        places = jax.tree.map(lambda x: x.sharding, before)
        state, seen = update(state, grpo.place(make_batch(step), layout))
        losses.append(float(seen["means"]["grpo/loss"].sum))
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)
    assert update._cache_size() == 1
    assert int(state.updates) == 3
    assert np.isfinite(losses).all() and len(set(losses)) == 3


@pytest.mark.slow
def test_repeated_updates_on_one_batch_raise_what_had_advantage_and_lower_the_rest():
    """A sign error would do the opposite."""
    b = make_batch()
    b = b.replace(
        adv_QG=jnp.tile(jnp.asarray([[1.0, -1.0, 1.0, -1.0]]), (Q, 1)),
        valid_QG=jnp.ones((Q, G), bool), old_logp_QGT=None,
    )
    layout = layout_of(**ONE)
    cfg = GRPOConfig(reference=False, beta=0.0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3), 5)
    update = grpo.make_update(tiny.CFG, cfg, optimizer, layout=layout)
    state = make_state(tiny.params(), tiny.CFG, optimizer, layout)
    b = grpo.place(b, layout)

    def means(params):
        logp = np.asarray(logps(params, b.prompt_QS, b.prompt_lengths_Q, b.tokens_QGT))
        live = np.arange(T) < np.asarray(b.lengths_QG)[:, :, None]
        up = np.asarray(b.adv_QG)[:, :, None] > 0
        return logp[live & up].mean(), logp[live & ~up].mean()

    up, down = means(state.params)
    for _ in range(5):
        state, _ = update(state, b)
    up_after, down_after = means(state.params)
    assert up_after > up + 0.05 and down_after < down - 0.05
