"""The three shapes of the forward pass against the plain one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gtalign_jax.model import decode, forward
from gtalign_jax.model.sharding import TRAIN, Layout, MeshConfig, make_mesh
from gtalign_jax.training.logp import completion_logps


def plain_logits(params, prompts_QS, lengths_Q, tokens_QGT, q, g):
    row = tiny.concatenated(prompts_QS, lengths_Q, tokens_QGT, q, g)
    full = forward.full_logits(params, tiny.CFG, jnp.asarray(row), jnp.asarray([row.shape[1]]))
    return full[0, int(lengths_Q[q]) - 1 : -1]


def test_shared_prompt_forward_equals_every_concatenated_row():
    params = tiny.params()
    prompts_QS, lengths_Q, tokens_QGT = tiny.rows()
    logp, _ = completion_logps(params, tiny.CFG, prompts_QS, lengths_Q, tokens_QGT, logit_chunk=3)
    for q in range(3):
        for g in range(4):
            expected = jax.nn.log_softmax(
                plain_logits(params, prompts_QS, lengths_Q, tokens_QGT, q, g)
            )
            expected = np.take_along_axis(expected, np.asarray(tokens_QGT[q, g])[:, None], 1)[:, 0]
            np.testing.assert_allclose(logp[q, g], expected, atol=1e-5)


def test_cached_decode_equals_the_full_forward_token_by_token():
    params = tiny.params()
    prompts_QS, lengths_Q, tokens_QGT = tiny.rows()
    Q, G, T = tokens_QGT.shape
    last_Q, stream_Q = forward.split_prompt(prompts_QS, lengths_Q)
    cache = decode.prefill(params, tiny.CFG, prompts_QS, stream_Q)
    k, v = decode.own_caches(tiny.CFG, Q, G, T, jnp.float32)
    model = decode.ready(params, tiny.CFG, cache, v)
    token_QG = jnp.broadcast_to(last_Q[:, None], (Q, G))
    step = jax.jit(decode.decode_step, static_argnums=1)
    for t in range(T):
        hidden, k, v = step(model, tiny.CFG, cache, k, v, token_QG, t)
        logits_QGV = forward.logits(forward.head_of(params), tiny.CFG, hidden)
        for q in range(Q):
            expected = plain_logits(params, prompts_QS, lengths_Q, tokens_QGT, q, 1)[t]
            np.testing.assert_allclose(logits_QGV[q, 1, :50], expected[:50], atol=1e-5)
        token_QG = tokens_QGT[:, :, t]


def test_rows_out_of_step_are_extended_as_if_each_were_alone():
    """Every row feeds pieces of its own lengths; caches start as garbage, so that no row may look
    past what it wrote, and a row that feeds nothing must keep what it has."""
    params = tiny.params()
    prompts_QS, lengths_Q, tokens_QGT = tiny.rows()
    Q, G, T = tokens_QGT.shape
    last_Q, stream_Q = forward.split_prompt(prompts_QS, lengths_Q)
    cache = decode.prefill(params, tiny.CFG, prompts_QS, stream_Q)
    k, v = jax.tree.map(lambda x: jnp.full_like(x, 1e3),
                        decode.own_caches(tiny.CFG, Q, G, T, jnp.float32))
    model = decode.ready(params, tiny.CFG, cache, v)
    last_QG1 = jnp.broadcast_to(last_Q[:, None, None], (Q, G, 1))
    fed_QGT = np.asarray(jnp.concatenate([last_QG1, tokens_QGT], axis=-1))[:, :, :T]
    step = jax.jit(decode.extend, static_argnums=1)
    rng, at_QG, checked = np.random.default_rng(1), np.zeros((Q, G), int), 0
    while (at_QG < T).any():
        F = 4
        count_QG = np.minimum(rng.integers(0, F + 1, (Q, G)), T - at_QG)
        tokens = np.full((Q, G, F), 13)
        for q, g in np.ndindex(Q, G):
            n, t = count_QG[q, g], at_QG[q, g]
            tokens[q, g, :n] = fed_QGT[q, g, t : t + n]
        hidden, k, v = step(model, tiny.CFG, cache, k, v, tokens, at_QG, count_QG)
        logits = forward.logits(forward.head_of(params), tiny.CFG, hidden)
        for q, g in np.ndindex(Q, G):
            n, t = count_QG[q, g], at_QG[q, g]
            expected = plain_logits(params, prompts_QS, lengths_Q, tokens_QGT, q, g)[t : t + n]
            np.testing.assert_allclose(logits[q, g, :n, :50], expected[:, :50], atol=1e-5)
            checked += n
        at_QG += count_QG
    assert checked == Q * G * T


@pytest.mark.parametrize("at", [0, 5, 11])
def test_no_logit_depends_on_a_later_token(at):
    params = tiny.params()
    tokens = jnp.arange(12)[None] % 50
    x = params.embed_VD[tokens]

    def logit(x):
        # The embedding is looked up outside, so that a gradient to each position exists.
        table = params.embed_VD.at[tokens[0]].set(x[0])
        full = forward.full_hidden(params.replace(embed_VD=table), tiny.CFG, tokens,
                                   jnp.asarray([12]))
        return full[0, at].sum()

    reach = np.abs(jax.grad(logit)(x)[0]).sum(axis=-1)
    assert (reach[: at + 1] > 0).all()
    assert (reach[at + 1 :] == 0).all()


def test_extra_padding_changes_no_log_probability():
    params = tiny.params()
    prompts_QS, lengths_Q, tokens_QGT = tiny.rows()
    wide_QS = jnp.pad(prompts_QS, ((0, 0), (0, 6)), constant_values=7)
    wide_QGT = jnp.pad(tokens_QGT, ((0, 0), (0, 0), (0, 5)), constant_values=7)
    narrow, _ = completion_logps(params, tiny.CFG, prompts_QS, lengths_Q, tokens_QGT)
    wide, _ = completion_logps(params, tiny.CFG, wide_QS, lengths_Q, wide_QGT)
    np.testing.assert_allclose(wide[:, :, :7], narrow, atol=1e-5)


def test_what_stands_in_the_padding_changes_nothing():
    params = tiny.params()
    prompts_QS, lengths_Q, tokens_QGT = tiny.rows()
    beyond = jnp.arange(9)[None, :] >= lengths_Q[:, None]
    other_QS = jnp.where(beyond, 33, prompts_QS)
    a, _ = completion_logps(params, tiny.CFG, prompts_QS, lengths_Q, tokens_QGT)
    b, _ = completion_logps(params, tiny.CFG, other_QS, lengths_Q, tokens_QGT)
    np.testing.assert_array_equal(a, b)


def test_head_in_chunks_equals_the_head_at_once_with_gradients():
    prompts_QS, lengths_Q, tokens_QGT = tiny.rows()

    def total(params, chunk, remat):
        logp, _ = completion_logps(params, tiny.CFG, prompts_QS, lengths_Q, tokens_QGT,
                                   logit_chunk=chunk, remat=remat)
        return logp.mean()

    whole = jax.grad(total)(tiny.params(), 100, "none")
    for chunk, remat in ((1, "none"), (3, "full")):
        pieces = jax.grad(total)(tiny.params(), chunk, remat)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_entropy_is_that_of_the_softmax():
    params = tiny.params()
    prompts_QS, lengths_Q, tokens_QGT = tiny.rows()
    _, entropy = completion_logps(params, tiny.CFG, prompts_QS, lengths_Q, tokens_QGT)
    logits = plain_logits(params, prompts_QS, lengths_Q, tokens_QGT, 1, 2)[:, :50]
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy[1, 2], -(p * np.log(p)).sum(-1), rtol=1e-4)


def test_no_array_of_the_update_has_both_time_and_vocabulary():
    """The head's largest array is one chunk: `logit_chunk` positions, not T (R20)."""
    prompts_QS, lengths_Q, tokens_QGT = tiny.rows(T=64)
    V, T, chunk = tiny.CFG.padded_vocab_size, 64, 8

    def loss(params):
        logp, _ = completion_logps(params, tiny.CFG, prompts_QS, lengths_Q, tokens_QGT,
                                   logit_chunk=chunk)
        return logp.sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(tiny.params()))
    rows = 3 * 4
    assert f"[{rows * chunk},{V}]" in text
    widths = [int(np.prod([int(n) for n in shape.split(",")])) for shape in
              re.findall(rf"\[([\d,]+),{V}\]", text)]
    assert max(widths) == rows * chunk < rows * T


@pytest.mark.parametrize("devices", [1, 8])
def test_the_gradient_of_an_embedding_in_bfloat16_adds_up_in_float32(devices):
    """4,096 times 1/4 is 1,024; summed in bfloat16 it would stop at 64, where 1/4 is lost."""
    where = None
    if devices == 8:
        where = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), TRAIN)
    table_VD = jnp.zeros((5, 8), jnp.bfloat16)
    params = tiny.params().replace(embed_VD=table_VD)
    tokens_QW = jnp.full((4, 1024), 3)

    def total(table_VD):
        x_QWD = forward._embed(params.replace(embed_VD=table_VD), tokens_QW, where)
        return x_QWD.astype(jnp.float32).sum() / 4

    grad_VD = jax.jit(jax.grad(total))(table_VD)
    np.testing.assert_array_equal(grad_VD[3].astype(jnp.float32), 1024.0)
    np.testing.assert_array_equal(grad_VD[:3].astype(jnp.float32), 0.0)
