"""Steered generation: what is forced, what is sampled after it, and what stays as it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import writer

from gtalign_jax.data.chat import decode
from gtalign_jax.game import pricing
from gtalign_jax.game.steering import SteeringConfig, steer
from gtalign_jax.model import forward
from gtalign_jax.model.sharding import ROLLOUT, Layout, MeshConfig, make_mesh, param_shardings
from gtalign_jax.rollout.draws import choose, row_keys, uniform
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler
from gtalign_jax.rollout.steering import NO_MATRIX, NOT_ASKED, make_steered

Q, G, T = 4, 4, 256
SAMPLER = SamplerConfig(max_new_tokens=T)
KEY = jax.random.key(11)
LETTERS = writer.player().tokenizer("abcdefghijklmn", add_special_tokens=False).input_ids
PROMPTS = jnp.asarray(np.random.default_rng(0).choice(LETTERS, (Q, 9)), jnp.int32)
LENGTHS = jnp.asarray([9, 4, 1, 7], jnp.int32)
INDEX = jnp.arange(Q)
NONE = SteeringConfig(pricing.read("none"), writer.USAGE)
DEAR = SteeringConfig(pricing.read("per_token:output=100,input=25"), writer.USAGE)


@functools.cache
def steered_sampler():
    return make_steered(writer.player(), SAMPLER, G)


@functools.cache
def steered(config):
    return steered_sampler()(PROMPTS, LENGTHS, INDEX, KEY, config)


@functools.cache
def plain():
    player = writer.player()
    run = make_sampler(player.model, SAMPLER, G, player.stop_ids)
    return jax.device_get(run(player.params, PROMPTS, LENGTHS, INDEX, KEY))


def rows(rollout):
    """(row number, its token ids), prompt-major."""
    for q, g in np.ndindex(Q, G):
        yield q * G + g, rollout.tokens_QGT[q, g, : rollout.lengths_QG[q, g]].tolist()


def test_without_a_change_of_prices_the_tokens_are_those_of_the_plain_sampler():
    found, expected = steered(NONE), plain()
    np.testing.assert_array_equal(found.rollout.tokens_QGT, expected.tokens_QGT)
    np.testing.assert_array_equal(found.rollout.lengths_QG, expected.lengths_QG)
    np.testing.assert_array_equal(found.rollout.stopped_QG, expected.stopped_QG)
    np.testing.assert_allclose(found.rollout.logp_QGT, expected.logp_QGT, atol=1e-5)
    assert not found.forced_QGT.any()
    assert sum(outcome.result is not None for outcome in found.outcomes) >= 4


@pytest.mark.parametrize("mode", ["action", "matrix"])
def test_a_steered_row_is_what_was_sampled_then_what_was_forced_then_sampled_again(mode):
    config = dataclasses.replace(DEAR, mode=mode)
    found, tokenizer = steered(config), writer.player().tokenizer
    texts = {b: decode(tokenizer, ids) for b, ids in rows(plain())}
    steered_rows = 0
    for b, ids in rows(found.rollout):
        forced = found.forced_QGT.reshape(Q * G, T)[b]
        outcome = found.outcomes[b]
        if not outcome.steered:
            assert ids == dict(rows(plain()))[b] and not forced.any() and outcome.reason
            continue
        steered_rows += 1
        upto = texts[b][: texts[b].index("</payoff>") + len("</payoff>")]
        expected = steer(upto, config)
        head = upto[: upto.index("<payoff>") + len("<payoff>")]
        start, count = np.flatnonzero(forced)[0], forced.sum()
        assert forced[start : start + count].all()  # one stretch
        assert decode(tokenizer, ids[:start]) == head
        assert decode(tokenizer, ids[start : start + count]) == expected.forced
        assert outcome.result.after.key == "VQ_DA"
        after = decode(tokenizer, ids[start + count :])
        assert after.startswith("<analyze>") == (mode == "matrix")
        assert after.endswith("</response>") and found.rollout.stopped_QG.reshape(-1)[b]
        assert (found.rollout.logp_QGT.reshape(Q * G, T)[b][forced] == 0).all()
    assert 4 <= steered_rows < Q * G


@pytest.mark.parametrize("config", [DEAR, dataclasses.replace(DEAR, mode="matrix")],
                         ids=["action", "matrix"])
def test_every_sampled_token_is_what_the_whole_sequence_so_far_would_draw(config):
    """Replayed without any cache: a position, a mask or a stale entry that is off draws others."""
    found, player = steered(config), writer.player()
    keys_QG = row_keys(KEY, INDEX, G)
    checked = 0
    for b, ids in rows(found.rollout):
        q, g = divmod(b, G)
        n, length = int(LENGTHS[q]), len(ids)
        whole = jnp.asarray([np.concatenate([PROMPTS[q, :n], ids, np.zeros(T - length)])], int)
        logits_TV = full(player.params, whole, jnp.asarray([n + length]))[0]
        for t in range(length):
            if found.forced_QGT[q, g, t]:
                continue
            draw = uniform(keys_QG[q : q + 1, g : g + 1], jnp.asarray(t))
            token, logp = choose(logits_TV[None, None, n - 1 + t], SAMPLER.filters, draw)
            assert int(token[0, 0]) == ids[t], (b, t)
            np.testing.assert_allclose(found.rollout.logp_QGT[q, g, t], logp[0, 0], atol=1e-4)
            checked += 1
    assert checked > 100


@functools.partial(jax.jit)
def full(params, tokens_BT, lengths_B):
    return forward.full_logits(params, writer.player().model, tokens_BT, lengths_B)


def test_prices_differ_from_prompt_to_prompt_and_none_means_unsteered():
    """One prompt under one index three times: equal up to the matrix, then each by its price."""
    run, tokenizer = steered_sampler(), writer.player().tokenizer
    same = lambda x: jnp.stack([x[2]] * Q)  # noqa: E731
    configs = [None, NONE, DEAR, dataclasses.replace(DEAR, mode="matrix")]
    found = run(same(PROMPTS), same(LENGTHS), same(INDEX), KEY, configs)
    one = run(PROMPTS, LENGTHS, INDEX, KEY, DEAR)
    texts = {b: decode(tokenizer, ids) for b, ids in rows(found.rollout)}
    for g in range(G):
        unsteered, none, dear, matrix = (texts[q * G + g] for q in range(Q))
        assert unsteered == none
        head = unsteered[: unsteered.index("<payoff>")]
        assert dear.startswith(head) and matrix.startswith(head)
        assert found.outcomes[g].reason == NOT_ASKED
        assert dear == decode(tokenizer, dict(rows(one.rollout))[2 * G + g])  # whoever is beside it
        readable = one.outcomes[2 * G + g].result is not None
        assert len({none, dear, matrix}) == (3 if readable else 1)
    assert any(outcome.steered for outcome in found.outcomes)


def test_no_prompt_is_prefilled_twice_and_no_program_compiled_again():
    run, calls = steered_sampler(), []

    def counting(name):
        program = getattr(run, name)

        def call(*args):
            calls.append(name)
            return program(*args)

        return call

    names = ("prefill", "until", "extend", "finish")
    counted = dataclasses.replace(run, **{name: counting(name) for name in names})
    sizes = lambda: [getattr(run, name)._cache_size() for name in names]  # noqa: E731
    # Forced tokens are padded to few widths; each is compiled once.
    def twice():
        for mode in ("action", "matrix"):
            config = dataclasses.replace(DEAR, mode=mode)
            counted(PROMPTS, LENGTHS, INDEX, KEY, config)

    twice()
    before = sizes()
    twice()
    assert calls == [*names] * 4
    assert sizes() == before and before[:2] == [1, 1]


def test_an_unsteered_batch_feeds_no_forced_tokens():
    calls = []
    run = dataclasses.replace(steered_sampler(), extend=lambda *args: calls.append(args))
    run(PROMPTS, LENGTHS, INDEX, KEY, NONE)
    assert calls == []


def test_a_row_that_is_cut_before_its_matrix_is_reported():
    short = make_steered(writer.player(), SamplerConfig(max_new_tokens=4), 1)
    found = short(PROMPTS, LENGTHS, INDEX, KEY, DEAR)
    assert {outcome.reason for outcome in found.outcomes} == {NO_MATRIX}
    assert (found.rollout.lengths_QG == 4).all() and not found.rollout.stopped_QG.any()


@pytest.mark.slow
def test_steering_on_eight_devices_gives_the_tokens_of_one():
    player = writer.player()
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=4, tensor=1)), ROLLOUT)
    params = jax.device_put(player.params, param_shardings(player.model, layout))
    run = make_steered(dataclasses.replace(player, params=params, layout=layout), SAMPLER, G)
    twice = lambda x: jnp.concatenate([x, x])  # noqa: E731
    place = lambda x: jax.device_put(x, layout.sharding("prompts"))  # noqa: E731
    found = run(*(place(twice(x)) for x in (PROMPTS, LENGTHS, INDEX)), KEY, DEAR)
    np.testing.assert_array_equal(found.rollout.tokens_QGT[:Q], steered(DEAR).rollout.tokens_QGT)
    np.testing.assert_array_equal(found.forced_QGT[Q:], steered(DEAR).forced_QGT)
