"""Rows on the host's side: steered and plain ones side by side, and what may leave of each."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import writer

from gtalign_jax.data.chat import decode
from gtalign_jax.game import pricing
from gtalign_jax.game.steering import SteeringConfig
from gtalign_jax.rollout.sampler import SamplerConfig
from gtalign_jax.rollout.slots import SlotsConfig
from gtalign_jax.rollout.steering import NO_MATRIX, make_steered
from gtalign_jax.serving import batch as batch_module
from gtalign_jax.serving.batch import Ask, Batch
from gtalign_jax.training.compiles import compilations

T = writer.CONFIG.new_tokens
DEAR = SteeringConfig(pricing=pricing.read("per_token:output=200,input=1"), usage=writer.USAGE)
FREE = SteeringConfig(pricing=pricing.read("none"), usage=writer.USAGE)
MATRIX = dataclasses.replace(DEAR, mode="matrix")
ASKS = tuple(
    Ask(tuple(range(40 + i, 44 + 2 * i)), T, seed=seed, steering=steering)
    for i, (seed, steering) in enumerate(
        [(7, DEAR), (1, DEAR), (2, None), (3, FREE), (11, MATRIX), (6, DEAR), (6, None), (3, DEAR)]
    )
)


def serve(asks, batch=None):
    """(answer, pieces of text) of each; a request is admitted once a slot is free."""
    batch, waiting = batch or writer.batch(), list(enumerate(asks))
    rows, answers, pieces = {}, {}, {i: [] for i in range(len(asks))}
    while waiting or rows:
        if waiting and batch.busy < writer.CONFIG.slots:
            i, ask = waiting.pop(0)
            row = batch.reserve(ask)
            batch.prefill(row)
            rows[row] = i
        for progress in batch.run():
            pieces[rows[progress.row]].append(progress.text)
            if progress.answer is not None or progress.error is not None:
                answers[rows.pop(progress.row)] = progress.answer or progress.error
    assert batch.busy == 0
    return [(answers[i], [piece for piece in pieces[i] if piece]) for i in range(len(asks))]


@functools.cache
def steered():
    return make_steered(writer.player(), SamplerConfig(T), 1)


def expected(ask: Ask):
    """(tokens, which were forced, outcome): what the batched steering gives for the same key."""
    tokens_QS = np.zeros((1, 24), np.int32)
    tokens_QS[0, : len(ask.prompt_ids)] = ask.prompt_ids
    out = steered()(tokens_QS, np.array([len(ask.prompt_ids)]), np.array([0]),
                    jax.random.key(ask.seed), [ask.steering])
    length = int(out.rollout.lengths_QG[0, 0])
    forced = np.flatnonzero(out.forced_QGT[0, 0]).tolist()
    return out.rollout.tokens_QGT[0, 0, :length].tolist(), forced, out.outcomes[0]


@pytest.mark.long
def test_every_row_is_what_the_batched_steering_gives_it_and_nothing_is_compiled_for_it():
    batch = writer.batch()
    before = compilations()
    got = serve(ASKS, batch)
    assert compilations() == before
    reasons = set()
    for ask, (answer, pieces) in zip(ASKS, got, strict=True):
        tokens, forced, outcome = expected(ask)
        assert list(answer.ids) == tokens
        assert [i for a, b in answer.forced for i in range(a, b)] == forced
        assert answer.finish_reason == ("stop" if tokens[-1] in writer.player().stop_ids
                                        else "length")
        assert answer.prompt_tokens == len(ask.prompt_ids)
        assert "".join(pieces) == answer.text == decode(writer.player().tokenizer, tokens)
        if ask.steering is None:
            assert answer.outcome is None and not answer.forced
        else:
            assert (answer.outcome.steered, answer.outcome.reason) == (
                outcome.steered, outcome.reason)
            reasons.add(outcome.reason)
    assert None in reasons and len(reasons) > 1  # steered ones, and ones that could not be


def test_a_steered_text_begins_with_what_was_kept_and_forced():
    ask = next(ask for ask in ASKS if ask.steering == DEAR and expected(ask)[1])
    (answer, pieces), = serve([ask])
    (start, end), = answer.forced
    settled = decode(writer.player().tokenizer, answer.ids[:end])
    assert pieces[0].startswith(settled[:-1])
    assert settled.endswith("VQ_DA is best.</analyze><response>")
    plain = serve([dataclasses.replace(ask, steering=None)])[0][0]
    assert plain.ids[:start] == answer.ids[:start] and "VQ_CQ is best." in plain.text


def test_greedy_and_sampled_rows_share_a_batch_and_do_not_notice():
    asks = [Ask((50, 51, 52), 40, temperature=0.0), Ask((60, 61), 40, 0.8, 0.95, seed=9),
            Ask((70,), 40, 1.3, seed=10), Ask((50, 51, 52), 40, temperature=0.0, seed=11)]
    together = [answer for answer, _ in serve(asks)]
    alone = [serve([ask])[0][0] for ask in asks]
    assert together == alone
    assert together[0].ids == together[3].ids  # greedy: the seed means nothing
    assert len({answer.ids for answer in together}) == 3


def test_a_row_that_ends_before_its_matrix_says_so():
    (answer, pieces), = serve([dataclasses.replace(ASKS[0], max_tokens=3)])
    assert list(answer.ids) == expected(ASKS[0])[0][:3]
    assert answer.outcome.reason == NO_MATRIX and answer.finish_reason == "length"
    assert "".join(pieces) == answer.text


def test_a_row_without_room_for_its_edited_matrix_goes_on_as_it_was():
    ask = next(ask for ask in ASKS if ask.steering == DEAR and expected(ask)[1])
    plain = serve([dataclasses.replace(ask, steering=None)])[0][0]
    closed = next(n for n in range(len(plain.ids))
                  if decode(writer.player().tokenizer, plain.ids[:n]).endswith("</payoff>"))
    for limit in (closed, closed + 3):  # at its limit when it pauses, and a little below it
        (answer, _), = serve([dataclasses.replace(ask, max_tokens=limit)])
        assert answer.ids == plain.ids[:limit] and answer.finish_reason == "length"
        assert answer.outcome.reason.startswith("no room")


def test_what_one_row_does_to_the_host_is_its_own_affair(monkeypatch):
    def plan(tokenizer, ids, config, room):
        raise RecursionError("a matrix like no other")

    asks = [ASKS[0], ASKS[2]]
    monkeypatch.setattr(batch_module, "plan", plan)
    (error, pieces), (answer, _) = serve(asks)
    assert isinstance(error, RecursionError) and pieces == []
    assert list(answer.ids) == expected(ASKS[2])[0]


def test_a_dropped_row_leaves_its_slot_to_the_next():
    batch = writer.batch()
    rows = [batch.reserve(ask) for ask in ASKS[:3]]
    for row in rows:
        batch.prefill(row)
    batch.run()
    for row in rows:
        batch.drop(row)
    assert batch.busy == 0
    assert list(serve([ASKS[2]])[0][0].ids) == expected(ASKS[2])[0]


def test_who_leaves_when_he_may_go_on_does_not_let_the_next_one_go_on_unsteered():
    steered = next(ask for ask in ASKS if ask.steering == DEAR and expected(ask)[1])
    batch = writer.batch()
    row = batch.reserve(dataclasses.replace(steered, steering=FREE))
    batch.prefill(row)
    while not batch._rows[row].settled:  # it has paused, and would go on in the next run
        batch.run()
    batch.drop(row)
    (answer, _), = serve([steered], batch)
    assert answer.outcome.steered and list(answer.ids) == expected(steered)[0]


@pytest.mark.parametrize("ask, said", [
    (Ask((), 5), "0 tokens: allowed are 1 to"),
    (Ask((1,) * 99, 5), "99 tokens: allowed are 1 to 24"),
    (Ask((1,), 0), "max_tokens=0"),
    (Ask((1,), T + 1), f"max_tokens={T + 1}: allowed is 1 to {T}"),
    (Ask((1, 10**6), 5), "prompt_ids: allowed is 0 to"),
    (Ask((1,), 5, temperature=-1.0), "temperature=-1"),
    (Ask((1,), 5, top_p=0.0), "top_p=0"),
])
def test_a_request_that_does_not_fit_is_refused_by_name(ask, said):
    with pytest.raises(ValueError, match=said):
        writer.batch().check(ask)


def test_sizes_beyond_the_models_positions_are_refused():
    with pytest.raises(ValueError, match="prompt_tokens=4000 . new_tokens=512 is 4512: .* 4096"):
        Batch(writer.player(), SlotsConfig(prompt_tokens=4000))
