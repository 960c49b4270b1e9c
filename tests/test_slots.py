"""Rows that come and go draw what they would have drawn in a batch that stays."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from gtalign_jax.model.sharding import ROLLOUT, Layout, MeshConfig, make_mesh, param_shardings
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler
from gtalign_jax.rollout.slots import SlotsConfig, make_slots, settings
from gtalign_jax.rollout.stopping import stop_table
from gtalign_jax.training.compiles import compilations

STOPS = (17, 42)
CONFIG = SlotsConfig(slots=3, prompt_tokens=9, new_tokens=12, burst=4)
WIDE = 24  # of the reference's prompts: padding changes nothing, so one program serves all
NOWHERE = stop_table(["c"] * tiny.CFG.padded_vocab_size, "aa")


@dataclasses.dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    limit: int = 12
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    pause: bool = False


REQUESTS = (
    Request((5, 6, 7, 8, 9, 10, 11, 12, 13), seed=7),
    Request((4,), 12, 0.7, 0.9, seed=2**40 + 1),
    Request((9, 8, 7), 5, seed=1),
    Request((1, 2, 3, 4), 12, 0.0, seed=5),
    Request((20, 30, 40, 45), 12, 0.7, 0.9, seed=3),
    Request((21, 31, 41), 12, seed=4),
    Request((2, 2), 1, seed=6),
)


@functools.cache
def programs():
    return make_slots(tiny.CFG, CONFIG, STOPS)


@functools.cache
def sampler(temperature, top_p):
    return make_sampler(tiny.CFG, SamplerConfig(12, temperature, 0, top_p), 1, STOPS)


def expected(request: Request) -> list[int]:
    """What the batch sampler draws, cut at the request's own limit."""
    tokens_QS = np.zeros((1, WIDE), np.int32)
    tokens_QS[0, : len(request.prompt)] = request.prompt
    run = sampler(request.temperature, request.top_p)
    rollout = run(tiny.params(), tokens_QS, np.array([len(request.prompt)]), np.array([0]),
                  jax.random.key(request.seed))
    length = min(int(rollout.lengths_QG[0, 0]), request.limit)
    return np.asarray(rollout.tokens_QGT)[0, 0, :length].tolist()


class Table:
    """Slots, and what each row has written so far."""

    def __init__(self, made=None, params=None, stops_at=NOWHERE):
        self.stops_at = stops_at
        self.programs, self.params = made or programs(), params or tiny.params()
        self.slots = self.programs.empty(self.params)
        self.rows = range(self.programs.config.slots)
        self.tokens = [[] for _ in self.rows]
        self.news = None

    def admit(self, row: int, request: Request) -> None:
        tokens_QS = np.full((1, 9), 33, np.int32)  # what lies past the length is not read
        tokens_QS[0, : len(request.prompt)] = request.prompt
        how = settings(request.seed, request.limit, request.temperature, request.top_p,
                       request.pause)
        length_Q = np.array([len(request.prompt)], np.int32)
        self.slots = self.programs.admit(self.params, self.slots, np.int32(row), tokens_QS,
                                         length_Q, how)
        self.tokens[row] = []

    def run(self, drop=(), go=()) -> None:
        """`drop` and `go` are rows."""
        drop, go = (np.isin(self.rows, list(rows)) for rows in (drop, go))
        self.slots, news = self.programs.run(self.params, self.slots, self.stops_at, drop,
                                            go)
        self.news = jax.device_get(news)
        for row in self.rows:
            self.tokens[row] += self.news.tokens_BN[row, : self.news.count_B[row]].tolist()

    def finish(self, row: int) -> list[int]:
        while self.news is None or self.news.live_B[row]:
            self.run()
        return self.tokens[row]

    def splice(self, row: int, last: int, keep: int, forced: list[int]) -> None:
        tokens_F = np.full(13, 44, np.int32)  # what lies past them is not read either
        tokens_F[: len(forced) + 1] = [last, *forced]
        self.slots = self.programs.splice(self.params, self.slots, np.int32(row), tokens_F,
                                          np.int32(keep), np.int32(len(forced)))
        self.tokens[row] = [*self.tokens[row][:keep], *forced]
        self.news = None


def served(made=None, params=None) -> list[tuple[list[int], bool]]:
    """(tokens, ended by a stop token) of all REQUESTS: each is admitted once a slot is free."""
    table, waiting = Table(made, params), list(range(len(REQUESTS)))
    rows: dict[int, int] = {}
    done: dict[int, tuple[list[int], bool]] = {}
    while waiting or rows:
        free = [row for row in table.rows if row not in rows]
        if waiting and free:  # one at a time: they are never in step
            rows[free[0]] = waiting.pop(0)
            table.admit(free[0], REQUESTS[rows[free[0]]])
        table.run()
        for row in [row for row in rows if not table.news.live_B[row]]:
            done[rows.pop(row)] = table.tokens[row], bool(table.news.stopped_B[row])
    return [done[i] for i in range(len(REQUESTS))]


def test_a_slot_draws_what_the_batch_sampler_draws_whoever_sits_beside_it():
    got = served()
    reasons = set()
    for request, (tokens, stopped) in zip(REQUESTS, got, strict=True):
        assert tokens == expected(request), request
        assert stopped == (tokens[-1] in STOPS)
        reasons.add("stop" if stopped else len(tokens))
    assert {"stop", 12, 5, 1} <= reasons  # stop tokens, the longest, and two limits of their own


@pytest.mark.slow
def test_a_mesh_that_cuts_rows_and_heads_draws_the_tokens_of_one_device():
    layout = Layout(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]), ROLLOUT)
    params = jax.device_put(tiny.params(), param_shardings(tiny.CFG, layout))
    made = make_slots(tiny.CFG, dataclasses.replace(CONFIG, slots=4), STOPS, layout)
    alone, own = served(), expected(REQUESTS[0])
    table = Table(made, params)
    table.admit(3, REQUESTS[0])
    table.run()
    table.splice(3, own[0], 1, own[1:3])
    assert table.finish(3) == own
    before = compilations()
    assert served(made, params) == alone
    assert compilations() == before


def test_slots_that_a_mesh_would_cut_unevenly_are_refused():
    layout = Layout(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]), ROLLOUT)
    with pytest.raises(ValueError, match="slots=3: must be a multiple of 2"):
        make_slots(tiny.CFG, CONFIG, STOPS, layout)


def test_a_row_that_is_dropped_stays_silent_and_its_neighbour_does_not_notice():
    table = Table()
    table.admit(0, REQUESTS[0])
    table.admit(1, REQUESTS[5])
    table.run()
    assert len(table.tokens[0]) == 4
    table.run(drop=[0])
    assert len(table.tokens[0]) == 4 and not table.news.live_B[0]
    assert table.finish(1) == expected(REQUESTS[5])
    assert len(table.tokens[0]) == 4


@pytest.mark.parametrize("keep, count", [(0, 3), (1, 1), (2, 5)])
def test_a_row_that_is_fed_its_own_tokens_again_goes_on_as_if_nothing_had_been(keep, count):
    request, table = REQUESTS[0], Table()
    own = expected(request)
    assert len(own) > keep + count
    table.admit(2, request)
    table.run()
    table.splice(2, [request.prompt[-1], *own][keep], keep, own[keep : keep + count])
    assert table.finish(2) == own


def test_forced_tokens_are_read_as_if_they_had_stood_in_the_prompt():
    request, forced = REQUESTS[3], [17, 25, 8, 40]
    table = Table()
    table.admit(0, REQUESTS[5])
    table.admit(1, request)
    table.run()
    kept = table.tokens[1][:2]
    table.splice(1, kept[-1], 2, forced)
    told = dataclasses.replace(request, prompt=(*request.prompt, *kept, *forced), limit=6)
    assert table.finish(1) == [*kept, *forced, *expected(told)]
    assert expected(told) != expected(request)[6:]
    assert table.finish(0) == expected(REQUESTS[5])


def test_a_row_pauses_where_the_text_ends_while_its_neighbour_decodes_on():
    request = dataclasses.replace(REQUESTS[0], pause=True)
    own, other = expected(request), expected(REQUESTS[5])
    first, second = own[4:6]
    assert own[:6].count(first) == own[:6].count(second) == 1
    pieces = ["c"] * tiny.CFG.padded_vocab_size
    pieces[first], pieces[second] = "ba", "ab"  # "aa" ends inside the token after the fifth
    table = Table(stops_at=stop_table(pieces, "aa"))
    table.admit(0, request)
    table.admit(1, dataclasses.replace(REQUESTS[5], limit=12))
    for _ in range(3):
        table.run()
        if table.news.paused_B[0]:
            break
    assert table.tokens[0] == own[:6]
    assert not table.news.live_B[0] and not table.news.stopped_B[0]
    table.run()
    assert table.tokens[0] == own[:6]
    table.run(go=[0])  # and it does not pause again
    assert table.finish(0) == own
    assert table.finish(1) == other


def test_settings_are_data_and_no_program_is_compiled_twice():
    for request in REQUESTS[:2]:
        table = Table()
        table.admit(0, request)
        table.run()
    before = compilations()
    served()
    assert compilations() == before


def test_widths_are_few_and_end_with_the_longest():
    config = SlotsConfig(prompt_tokens=1000, new_tokens=511)
    assert config.prompt_widths == (128, 256, 512, 768, 1000)
    assert config.forced_widths == (64, 128, 256, 512)
    assert CONFIG.prompt_widths == (9,) and CONFIG.forced_widths == (13,)


def test_a_size_of_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match="burst=0"):
        SlotsConfig(burst=0)
