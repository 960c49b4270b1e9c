"""Optimizer and state: which learning rate each update gets, what is clipped and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh, param_shardings
from gtalign_jax.training.grpo import GRPOConfig
from gtalign_jax.training.learner import make_reshard
from gtalign_jax.training.sft import SFTConfig
from gtalign_jax.training.state import (
    OptimizerConfig,
    abstract_state,
    apply_gradients,
    discard,
    make_optimizer,
    make_state,
    named_key,
    new_state,
    schedule,
)


def rates(cfg: OptimizerConfig, total: int) -> list[float]:
    """The size of each update that is really made: Adam's step on a constant gradient is 1."""
    optimizer = make_optimizer(cfg, total)
    params = {"w": jnp.zeros((2, 2))}
    state = new_state(params, optimizer)
    seen = []
    for _ in range(total):
        after = apply_gradients(state, {"w": jnp.full((2, 2), 0.1)}, optimizer)
        seen.append(float((state.params["w"] - after.params["w"])[0, 0]))
        state = after
    assert int(state.updates) == total
    return seen


@pytest.mark.parametrize("options, total, expected", [
    ({}, 4, [1, 1, 1, 1]),
    ({"warmup_updates": 2}, 4, [0, 0.5, 1, 1]),
    ({"warmup_updates": 2, "decay": "linear"}, 6, [0, 0.5, 1, 0.75, 0.5, 0.25]),
    ({"warmup_updates": 1, "decay": "linear", "final_fraction": 0.5}, 5,
     [0, 1, 0.875, 0.75, 0.625]),
    # (1 + cos(pi n / 4)) / 2
    ({"decay": "cosine"}, 4, [1, 0.8535534, 0.5, 0.1464466]),
    ({"warmup_updates": 4}, 2, [0, 0.25]),  # a warm-up longer than the training
])
def test_each_update_runs_at_its_learning_rate(options, total, expected):
    cfg = OptimizerConfig(learning_rate=1e-2, **options)
    np.testing.assert_allclose(rates(cfg, total), 1e-2 * np.array(expected), rtol=1e-3, atol=1e-7)
    planned = [float(schedule(cfg, total)(n)) for n in range(total)]
    np.testing.assert_allclose(planned, 1e-2 * np.array(expected), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("epochs, minibatches", [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_the_schedule_of_grpo_counts_epochs_times_minibatches(epochs, minibatches):
    """Counted in rollout steps, a decay over 5 steps of 6 updates would end after the first."""
    cfg = GRPOConfig(steps=5, epochs=epochs, minibatches=minibatches, decay="linear",
                     learning_rate=1.0, warmup_updates=2)
    total = cfg.steps * cfg.updates_per_step
    assert total == 5 * epochs * minibatches
    rate = schedule(cfg, total)
    assert float(rate(0)) == 0.0 and float(rate(2)) == 1.0
    assert float(rate(total - 1)) == pytest.approx(1 / (total - 2))
    assert float(rate(total)) == 0.0


def test_gradients_are_clipped_by_their_norm_over_all_weights():
    """Norm 5 from two weights of 3 and 4; clipping each alone would leave the ratio 1 : 1."""
    cfg = OptimizerConfig(clip_norm=1.0)
    params = {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1))}
    clipped = {}

    def spy(updates, state, params=None):
        clipped.update(updates)
        return updates, state

    clip = optax.chain(optax.clip_by_global_norm(cfg.clip_norm),
                       optax.GradientTransformation(lambda _: (), spy))
    grads = {"a": jnp.full((1, 1), 3.0), "b": jnp.full((1, 1), 4.0)}
    clip.update(grads, clip.init(params), params)
    assert float(clipped["a"][0, 0]) == pytest.approx(0.6)
    # The same through the real chain: its second moment is that of the clipped gradient.
    optimizer = make_optimizer(cfg, 1)
    after = apply_gradients(new_state(params, optimizer), grads, optimizer)
    nu = optax.tree.get(after.opt_state, "nu")
    assert float(nu["a"][0, 0]) == pytest.approx(0.6**2 * (1 - cfg.b2), rel=1e-5)
    assert float(nu["b"][0, 0]) == pytest.approx(0.8**2 * (1 - cfg.b2), rel=1e-5)


def test_weight_decay_shrinks_matrices_and_spares_norms_and_biases():
    cfg = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(cfg, 1)
    params = jax.tree.map(jnp.ones_like, tiny.params())
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(lambda p, g: apply_gradients(new_state(p, optimizer), g, optimizer).params)
    after = update(params, zeros)
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="."): float(leaf.ravel()[0])
        for path, leaf in jax.tree_util.tree_flatten_with_path(after)[0]
    }
    spared = {name for name, value in decayed.items() if value == 1.0}
    assert spared == {
        "final_norm_D", "layers.attn_norm_LD", "layers.mlp_norm_LD", "layers.q_norm_LH",
        "layers.k_norm_LH", "layers.q_bias_LNH", "layers.k_bias_LKH", "layers.v_bias_LKH",
    }
    assert all(decayed[name] == pytest.approx(0.95) for name in decayed.keys() - spared)


@pytest.mark.parametrize("cls", [OptimizerConfig, GRPOConfig, SFTConfig])
@pytest.mark.parametrize("options, words", [
    ({"decay": "exponential"}, ["decay='exponential'", "constant", "linear", "cosine"]),
    ({"learning_rate": 0.0}, ["learning_rate=0.0", "> 0"]),
    ({"clip_norm": -1.0}, ["clip_norm=-1.0", "> 0"]),
    ({"warmup_updates": -1}, ["warmup_updates=-1", ">= 0"]),
])
def test_a_config_error_names_key_value_and_what_is_allowed(cls, options, words):
    with pytest.raises(ValueError) as error:
        cls(**options)
    for word in words:
        assert word in str(error.value)


def test_moments_lie_where_their_weights_lie_and_the_abstract_state_says_so():
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), TRAIN)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    params = jax.device_put(tiny.params(), param_shardings(tiny.CFG, layout))
    state = make_state(params, tiny.CFG, optimizer, layout)
    adam = state.opt_state[1][0]
    for moments in (adam.mu, adam.nu):
        for moment, weight in zip(jax.tree.leaves(moments), jax.tree.leaves(params), strict=True):
            assert moment.sharding.is_equivalent_to(weight.sharding, weight.ndim)
    assert state.params.embed_VD.addressable_shards[0].data.shape == (56, 32 // 4)
    abstract = abstract_state(tiny.CFG, optimizer, layout)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for expected, real in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (expected.shape, expected.dtype) == (real.shape, real.dtype)
        assert real.sharding.is_equivalent_to(expected.sharding, real.ndim)


def test_a_new_state_takes_the_policy_over_while_the_reference_lives_on():
    """Two copies of the float32 weights would cost a seventh of what training holds."""
    layout = Layout(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), TRAIN)
    params = jax.device_put(tiny.params(), param_shardings(tiny.CFG, layout))
    reference = make_reshard(tiny.CFG, layout, jnp.float32)(params)
    state = make_state(params, tiny.CFG, make_optimizer(OptimizerConfig(), 1), layout)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    assert state.params.embed_VD.is_deleted()
    np.testing.assert_array_equal(reference.embed_VD, tiny.params().embed_VD)
    discard(reference)
    assert all(x.is_deleted() for x in jax.tree.leaves(reference))


def test_keys_differ_by_name_and_by_step_and_repeat():
    key = jax.random.key(0)
    data = lambda name, step: tuple(jax.random.key_data(named_key(key, name, step)).tolist())  # noqa: E731
    assert data("rollout", 3) == data("rollout", 3)
    seen = {data(name, step) for name in ("rollout", "evaluate") for step in range(50)}
    assert len(seen) == 100
