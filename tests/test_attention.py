"""Flash attention (the kernel, interpreted) against dense; its mask against a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gtalign_jax.model import attention
from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh
from gtalign_jax.training.logp import completion_logps

K, R, H = 2, 2, 16


def layout(kind: str, **sizes) -> Layout:
    sizes = {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1, **sizes}
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return Layout(make_mesh(MeshConfig(**sizes), devices), TRAIN, kind)


def loop_mask(S: int, G: int, T: int, width: int) -> np.ndarray:
    """Who sees whom, one pair at a time."""
    mask = np.zeros((width, width), bool)
    for q in range(width):
        for k in range(q + 1):
            in_prompt = k < S
            same_row = q >= S and k >= S and min((q - S) // max(T, 1), G) == min(
                (k - S) // max(T, 1), G)
            mask[q, k] = in_prompt or same_row
    return mask


STRUCTURES = [(5, 3, 4, 20), (8, 2, 8, 24), (7, 0, 0, 9), (1, 1, 3, 4)]


@pytest.mark.parametrize("S, G, T, width", STRUCTURES)
def test_the_mask_is_that_of_a_prompt_shared_by_rows_in_blocks_of_any_size(S, G, T, width):
    expected = loop_mask(S, G, T, width)
    mask = attention.SharedPromptMask(S, G, T, width)
    np.testing.assert_array_equal(mask[:, :], expected)
    for size in (1, 3, 4, 8):
        for row in range(0, width, size):
            for column in range(0, width, size):
                at = (slice(row, row + size), slice(column, column + size))
                np.testing.assert_array_equal(mask[at], expected[at], err_msg=f"{at}")


def test_masks_of_other_structure_are_other_masks():
    """The kernel's set-up is cached by the mask: a false match would mask a model wrongly."""
    masks = [attention.SharedPromptMask(*key) for key in
             ((8, 2, 4, 16), (8, 2, 4, 16), (8, 4, 2, 16), (4, 2, 4, 16), (8, 2, 4, 32))]
    assert masks[0] == masks[1] and hash(masks[0]) == hash(masks[1])
    assert all(masks[0] != other for other in masks[2:])


def group(S: int, G: int, T: int, Q: int = 2, seed: int = 0):
    """Queries, keys, values of padded groups, prompt lengths, and a cotangent of real positions."""
    W = attention.padded_width(S + G * T, layout("flash"))
    keys = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(keys[0], (Q, W, K, R, H)) / H**0.5
    k, v = (jax.random.normal(key, (Q, W, K, H)) for key in keys[1:3])
    lengths_Q = jnp.asarray([S, max(S - 3, 1)] * (Q // 2), jnp.int32)
    out = jax.random.normal(keys[3], q.shape)
    real_QS = jnp.arange(S)[None, :] < lengths_Q[:, None]
    real = jnp.concatenate([real_QS, jnp.ones((Q, G * T), bool)], axis=1)
    real = jnp.pad(real, ((0, 0), (0, W - S - G * T)))
    return (q, k, v), lengths_Q, jnp.where(real[:, :, None, None, None], out, 0.0), W


@pytest.mark.parametrize("S, G, T", [(40, 3, 30), pytest.param(130, 2, 100, marks=pytest.mark.slow),
                                     (50, 0, 0)])
def test_flash_attention_is_dense_attention_with_its_gradients(S, G, T):
    """Prompts shorter than their width, a width that is no multiple of a block, two key heads."""
    (q, k, v), lengths_Q, cotangent, W = group(S, G, T)
    assert W % attention.LANES == 0 and W > S + G * T

    def run(kind: str, width: int):
        attend = attention.group_attention(S, G, T, 0, lengths_Q, layout(kind))
        total = lambda *qkv: (attend(*qkv) * cotangent[:, :width]).sum()  # noqa: E731
        args = [x[:, :width] for x in (q, k, v)]
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*args)

    value, grads = run("flash", W)
    expected, expected_grads = run("dense", S + G * T)
    assert float(value) == pytest.approx(float(expected), abs=2e-4)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours[:, : S + G * T], theirs, atol=2e-5)
        np.testing.assert_array_equal(ours[:, S + G * T :], 0.0)


@pytest.mark.slow
def test_the_update_with_the_kernel_on_eight_devices_is_the_dense_one_on_one():
    """Through the model, cut over prompts and heads: shard_map, padding, and sequence sharding."""
    prompts_QS, lengths_Q, tokens_QGT = tiny.rows()
    double = lambda x: jnp.concatenate([x, x[::-1]])[:4]  # noqa: E731
    prompts_QS, lengths_Q, tokens_QGT = map(double, (prompts_QS, lengths_Q, tokens_QGT))

    def total(params, where: Layout | None):
        logp, _ = completion_logps(
            params, tiny.CFG, prompts_QS, lengths_Q, tokens_QGT, remat="attention", layout=where
        )
        return logp.mean()

    both = [
        jax.jit(jax.value_and_grad(functools.partial(total, where=where)))(tiny.params())
        for where in (None, layout("flash", fsdp=2, data=2, tensor=2))
    ]
    (dense, dense_grads), (flash, flash_grads) = both
    assert float(dense) == pytest.approx(float(flash), abs=1e-5)
    for a, b in zip(jax.tree.leaves(dense_grads), jax.tree.leaves(flash_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_flash_is_chosen_by_name_and_only_tpus_choose_it_by_themselves():
    assert layout("flash").flash and not layout("auto").flash and not layout("dense").flash
    assert attention.padded_width(300, layout("dense")) == 300
    assert attention.padded_width(300, layout("flash")) == 384
    assert attention.padded_width(34_000, layout("flash")) == 34_304  # 67 blocks of 512
