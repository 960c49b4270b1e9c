"""Batches: a pure function of seed, step and process; nothing lost, nothing silently cut."""

import numpy as np
import pytest

from gtalign_jax.data import builtin, chat, tokenizer
from gtalign_jax.data.batches import PromptSet


@pytest.fixture(scope="module")
def words():
    prompts = builtin.generate("train", 500, seed=0)
    texts = [m["content"] for p in prompts for m in p.messages]
    return tokenizer.train_tokenizer(texts, 600)


@pytest.fixture(scope="module")
def prompts():
    return builtin.generate("train", 10, seed=0)


@pytest.fixture(scope="module")
def prompt_set(prompts, words):
    return PromptSet(prompts, words, max_prompt_tokens=100)


def _ids(batch):
    return [p.id for p in batch.prompts]


def test_rows_are_the_encoded_prompts_padded_right_to_one_width(prompt_set, words):
    batch = prompt_set.batch(0, batch_size=4, seed=0)
    assert batch.tokens_QS.shape == (4, prompt_set.pad_to)
    assert batch.tokens_QS.dtype == batch.lengths_Q.dtype == batch.index_Q.dtype == np.int32
    for row, prompt in enumerate(batch.prompts):
        ids = chat.encode_chat(words, prompt.messages)
        assert batch.lengths_Q[row] == len(ids)
        assert batch.tokens_QS[row, : len(ids)].tolist() == ids
        assert not batch.tokens_QS[row, len(ids) :].any()


def test_the_width_is_the_longest_prompt_rounded_up_to_sixteen(prompt_set):
    longest = max(map(len, prompt_set.token_lists))
    assert prompt_set.pad_to % 16 == 0
    assert longest <= prompt_set.pad_to < longest + 16


def test_a_step_gives_the_same_batch_whenever_it_is_asked_for(prompt_set, prompts, words):
    fresh = PromptSet(prompts, words, 100)
    for step in (7, 0, 7, 123456):
        left = prompt_set.batch(step, batch_size=4, seed=3)
        right = fresh.batch(step, batch_size=4, seed=3)
        assert _ids(left) == _ids(right)
        np.testing.assert_array_equal(left.tokens_QS, right.tokens_QS)


def test_every_epoch_shows_every_prompt_once_though_batches_straddle_epochs(prompt_set, prompts):
    stream = []
    for step in range(15):  # 15 * 4 = 60 = six epochs of ten
        batch = prompt_set.batch(step, batch_size=4, seed=0)
        assert batch.index_Q.tolist() == list(range(4 * step, 4 * step + 4))
        stream += _ids(batch)
    epochs = [stream[i : i + 10] for i in range(0, 60, 10)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(p.id for p in prompts)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_another_seed_gives_another_order(prompt_set):
    orders = {tuple(_ids(prompt_set.batch(0, batch_size=10, seed=s))) for s in range(4)}
    assert len(orders) == 4


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_together_hold_the_very_batch_of_one(prompt_set, processes):
    whole = prompt_set.batch(5, batch_size=8, seed=1)
    shares = [
        prompt_set.batch(5, batch_size=8, seed=1, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    assert [i for share in shares for i in _ids(share)] == _ids(whole)
    for name in ("tokens_QS", "lengths_Q", "index_Q"):
        joined = np.concatenate([getattr(share, name) for share in shares])
        np.testing.assert_array_equal(joined, getattr(whole, name))


def test_a_batch_larger_than_the_set_repeats_prompts_under_new_indices(prompt_set):
    batch = prompt_set.batch(0, batch_size=25, seed=0)
    assert len(set(_ids(batch))) == 10
    assert len(set(batch.index_Q.tolist())) == 25


def test_a_batch_that_processes_cannot_share_is_an_error(prompt_set):
    for size in (6, 0, -4):
        with pytest.raises(ValueError, match="positive multiple of 4"):
            prompt_set.batch(0, batch_size=size, seed=0, process_count=4)


def test_overlong_prompts_are_dropped_counted_and_reported(prompts, words, caplog):
    lengths = sorted(len(chat.encode_chat(words, p.messages)) for p in prompts)
    limit = lengths[4]
    kept = PromptSet(prompts, words, limit)
    expected = [p.id for p in prompts if len(chat.encode_chat(words, p.messages)) <= limit]
    assert [p.id for p in kept.prompts] == expected
    assert kept.dropped == 10 - len(kept) == sum(n > limit for n in lengths)
    assert f"dropped {kept.dropped} of 10 prompts" in caplog.text


def test_a_limit_that_leaves_no_prompt_is_an_error_naming_the_shortest(prompts, words):
    shortest = min(len(chat.encode_chat(words, p.messages)) for p in prompts)
    with pytest.raises(ValueError, match=f"the shortest has {shortest} tokens"):
        PromptSet(prompts, words, 3)


def test_take_gives_chosen_prompts_in_their_order(prompt_set):
    batch = prompt_set.take([3, 1, 3])
    assert _ids(batch) == [prompt_set.prompts[i].id for i in (3, 1, 3)]
    assert batch.index_Q.tolist() == [3, 1, 3]
    assert prompt_set.take([3, 1], [8, 9]).index_Q.tolist() == [8, 9]
