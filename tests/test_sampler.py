"""The sampling loop: what it draws, when it stops, and what it reports."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gtalign_jax.model import forward
from gtalign_jax.model.sharding import ROLLOUT, Layout, MeshConfig, make_mesh, param_shardings
from gtalign_jax.rollout.draws import choose
from gtalign_jax.rollout.filters import Filters
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler
from gtalign_jax.training.logp import completion_logps

Q, G, T = 3, 4, 12
KEY = jax.random.key(5)


def sample(stop_ids=(49,), G=G, params=None, prompts=None, index_Q=None, key=KEY, **options):
    config = SamplerConfig(**{"max_new_tokens": T, **options})
    prompts_QS, lengths_Q = prompts if prompts is not None else tiny.rows()[:2]
    index_Q = jnp.arange(prompts_QS.shape[0]) if index_Q is None else index_Q
    run = sampler(config, G, stop_ids)
    return jax.device_get(run(params or tiny.params(), prompts_QS, lengths_Q, index_Q, key))


@functools.cache
def sampler(config, G, stop_ids):
    return make_sampler(tiny.CFG, config, G, stop_ids)




def test_reported_log_probabilities_equal_a_training_graph_replay():
    prompts_QS, lengths_Q, _ = tiny.rows()
    rollout = sample()
    replay, _ = completion_logps(
        tiny.params(), tiny.CFG, prompts_QS, lengths_Q, jnp.asarray(rollout.tokens_QGT)
    )
    live = np.arange(T) < rollout.lengths_QG[:, :, None]
    assert live.sum() > 60
    np.testing.assert_allclose(rollout.logp_QGT[live], np.asarray(replay)[live], atol=1e-5)
    assert (rollout.logp_QGT[~live] == 0).all()


@pytest.mark.parametrize("options", [
    {"top_k": 3}, {"top_p": 0.6}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
])
def test_truncated_log_probabilities_are_those_of_the_truncated_distribution(options):
    prompts_QS, lengths_Q, _ = tiny.rows()
    rollout = sample(**options)
    replay, _ = completion_logps(
        tiny.params(), tiny.CFG, prompts_QS, lengths_Q, jnp.asarray(rollout.tokens_QGT),
        filters=Filters(**{"temperature": 1.0, **options}),
    )
    live = np.arange(T) < rollout.lengths_QG[:, :, None]
    np.testing.assert_allclose(rollout.logp_QGT[live], np.asarray(replay)[live], atol=1e-5)


def test_a_stop_token_is_kept_counted_and_ends_its_row():
    rollout = sample(stop_ids=(3, 11, 17, 21, 30, 42))
    seen_end = 0
    for q in range(Q):
        for g in range(G):
            n = rollout.lengths_QG[q, g]
            row = rollout.tokens_QGT[q, g, :n]
            stops = np.isin(row, (3, 11, 17, 21, 30, 42))
            assert not stops[:-1].any()
            assert rollout.stopped_QG[q, g] == stops[-1]
            assert rollout.stopped_QG[q, g] or n == T
            assert (rollout.tokens_QGT[q, g, n:] == 0).all()
            seen_end += stops[-1]
    assert seen_end > 3


def test_a_stop_token_in_first_place_is_a_completion_of_length_one():
    stop = int(np.argmax(np.abs(np.asarray(tiny.params().embed_VD)).sum(1)))
    everything = tuple(range(50))
    rollout = sample(stop_ids=everything)
    assert (rollout.lengths_QG == 1).all()
    assert rollout.stopped_QG.all()
    assert rollout.slots == rollout.lengths_QG.size  # one each: all rows done early: the loop ends
    assert stop < 50


def test_token_zero_as_stop_token_is_no_padding():
    """pad = EOS = 0: a length of 1 says that the 0 in first place was sampled."""
    zero = tiny.params()
    hidden_lover = zero.replace(head_VD=jnp.zeros_like(zero.embed_VD))  # all tokens equally likely
    rollout = sample(stop_ids=(0,), params=hidden_lover, G=64)
    assert rollout.stopped_QG.any()
    for tokens, n, stopped in zip(
        rollout.tokens_QGT.reshape(-1, T), rollout.lengths_QG.reshape(-1),
        rollout.stopped_QG.reshape(-1), strict=True,
    ):
        assert (tokens[: n - 1] != 0).all()
        assert stopped == (tokens[n - 1] == 0)


def test_the_same_key_draws_the_same_tokens_and_another_key_others():
    np.testing.assert_array_equal(sample().tokens_QGT, sample().tokens_QGT)
    assert (sample().tokens_QGT != sample(key=jax.random.key(6)).tokens_QGT).any()


def test_samples_of_a_group_differ_in_their_first_token():
    """One key for all samples of a group would make G copies of one completion."""
    flat = tiny.params().replace(head_VD=jnp.zeros_like(tiny.params().embed_VD))
    rollout = sample(params=flat, G=32)
    for q in range(Q):
        # 32 uniform draws from 50 tokens: fewer than 10 distinct has probability < 1e-9.
        assert len(set(rollout.tokens_QGT[q, :, 0].tolist())) >= 10


def test_temperature_zero_is_the_argmax_and_ignores_the_key():
    a, b = sample(temperature=0.0), sample(temperature=0.0, key=jax.random.key(99))
    np.testing.assert_array_equal(a.tokens_QGT, b.tokens_QGT)
    np.testing.assert_array_equal(a.tokens_QGT[:, 0], a.tokens_QGT[:, 1])


def test_a_prompt_draws_the_same_tokens_alone_as_in_a_batch():
    """Randomness is keyed by the prompt's index, not by its place: any split is the same."""
    prompts_QS, lengths_Q, _ = tiny.rows()
    together = sample()
    for q in range(Q):
        alone = sample(prompts=(prompts_QS[q : q + 1], lengths_Q[q : q + 1]),
                       index_Q=jnp.asarray([q]))
        np.testing.assert_array_equal(alone.tokens_QGT[0], together.tokens_QGT[q])


def test_sample_g_draws_the_same_tokens_whatever_the_group_size():
    np.testing.assert_array_equal(sample(G=6).tokens_QGT[:, :4], sample(G=4).tokens_QGT)


def test_extra_padding_of_the_prompts_changes_no_token():
    prompts_QS, lengths_Q, _ = tiny.rows()
    wide = jnp.pad(prompts_QS, ((0, 0), (0, 7)), constant_values=13)
    np.testing.assert_array_equal(sample(prompts=(wide, lengths_Q)).tokens_QGT,
                                  sample().tokens_QGT)


def test_eight_devices_draw_the_tokens_of_one():
    prompts_QS, lengths_Q, _ = tiny.rows(Q=8)
    index_Q = jnp.arange(8)
    one = sample(prompts=(prompts_QS, lengths_Q), index_Q=index_Q)
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), ROLLOUT)
    run = make_sampler(tiny.CFG, SamplerConfig(max_new_tokens=T), G, (49,), layout)
    params = jax.device_put(tiny.params(), param_shardings(tiny.CFG, layout))
    put = lambda x: jax.device_put(x, layout.sharding("prompts"))  # noqa: E731
    eight = jax.device_get(run(params, put(prompts_QS), put(lengths_Q), put(index_Q), KEY))
    np.testing.assert_array_equal(eight.tokens_QGT, one.tokens_QGT)
    np.testing.assert_allclose(eight.logp_QGT, one.logp_QGT, atol=1e-5)


def test_sampled_frequencies_follow_the_softmax():
    params = tiny.params()
    prompts_QS, lengths_Q, _ = tiny.rows(Q=1)
    rollout = sample(params=params, prompts=(prompts_QS, lengths_Q), G=4000, max_new_tokens=1)
    counts = np.bincount(rollout.tokens_QGT[0, :, 0], minlength=50)

    p = jax.nn.softmax(forward.full_logits(params, tiny.CFG, prompts_QS, lengths_Q))
    p = np.asarray(p[0, int(lengths_Q[0]) - 1, :50], np.float64)
    # Pearson's statistic has 49 degrees of freedom: above 100 with probability 2e-5.
    big = p * 4000 > 1
    assert ((counts[big] - 4000 * p[big]) ** 2 / (4000 * p[big])).sum() < 100


def test_padding_ids_of_the_vocabulary_are_never_drawn():
    flat = tiny.params().replace(head_VD=jnp.zeros_like(tiny.params().embed_VD))
    assert tiny.CFG.padded_vocab_size == 56
    assert sample(params=flat, G=64).tokens_QGT.max() < 50


def test_the_compiled_sampler_has_no_host_callback():
    run = make_sampler(tiny.CFG, SamplerConfig(max_new_tokens=T), G, (49,))
    prompts_QS, lengths_Q, _ = tiny.rows()
    cache, last_Q = jax.eval_shape(run.prefill, tiny.params(), prompts_QS, lengths_Q)
    lowered = run.first.lower(tiny.params(), cache, last_Q, jnp.arange(Q), KEY, until=0)
    text = lowered.compile().as_text()
    assert "while" in text
    targets = re.findall(r'custom_call_target="([^"]*)"', text)
    assert not [target for target in targets if "callback" in target]
    assert not re.search(r" (outfeed|infeed|send|recv)\(", text)


def test_without_a_stop_token_making_a_sampler_is_an_error():
    with pytest.raises(ValueError, match="stop_ids is empty"):
        make_sampler(tiny.CFG, SamplerConfig(max_new_tokens=4), 2, ())


def test_a_token_without_mass_is_never_drawn_wherever_the_uniform_number_falls():
    """A parallel sum rises by rounding where nothing is added: a draw there had log p = -1e30."""
    logits_V = np.where(np.arange(1000) % 20 == 3, np.linspace(-4, 4, 1000), forward.NEG)
    logits_V[990:] = forward.NEG  # padding of a vocabulary
    mass_V = np.asarray(jax.jit(jnp.cumsum)(jnp.exp(jnp.asarray(logits_V - 4, jnp.float32))))
    edges = (mass_V / mass_V[-1]).astype(np.float32)
    ulps = np.float32(2.0**-24) * np.arange(-3, 4, dtype=np.float32)
    uniform = np.clip(edges[:, None] + ulps[None, :], 0, 1 - 2.0**-23).reshape(1, -1)
    logits_QGV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (1, uniform.size, 1000))
    token_QG, logp_QG = choose(logits_QGV, Filters(), jnp.asarray(uniform, jnp.float32))
    assert (logits_V[np.asarray(token_QG)] > forward.NEG).all()
    assert logp_QG.min() > -20
    assert len(np.unique(token_QG)) == (logits_V > forward.NEG).sum()
