"""The engine's queue, deadlines and ends, over a batch that plays from a script; and a real one."""

import asyncio
import dataclasses
import threading
import types

import pytest
import writer

from gtalign_jax.serving import engine as engine_module
from gtalign_jax.serving.batch import Answer, Ask, Progress
from gtalign_jax.serving.engine import Delta, Engine, EngineConfig, EngineError, Overloaded

CONFIG = EngineConfig(slots=2, queue=3, deadline_s=60.0, admissions=1)
PATIENCE_S = 60.0  # a test that waits longer has found something that hangs


class FakeBatch:
    """As serving.batch.Batch: a request takes `max_tokens` runs, each of which writes its seed.

    `gate` holds the next run up; `fault` is raised by it; `broken` are seeds that fail.
    """

    def __init__(self, player, config):
        self.slots, self.rows, self.order = config.slots, {}, []
        self.gate, self.inside = threading.Event(), threading.Event()
        self.fault, self.broken, self.generated_tokens, self.forced_tokens = None, set(), 0, 0
        self.gate.set()

    @property
    def busy(self):
        return len(self.rows)

    def warm_up(self):
        return 3

    def check(self, ask):
        if ask.max_tokens > 100:
            raise ValueError("max_tokens=101")

    def reserve(self, ask):
        row = min(set(range(self.slots)) - set(self.rows))
        self.rows[row] = [ask, 0]
        return row

    def prefill(self, row):
        self.order.append((self.rows[row][0].seed, self.busy))

    def drop(self, row):
        del self.rows[row]

    def run(self):
        self.inside.set()
        assert self.gate.wait(PATIENCE_S)
        if self.fault is not None:
            raise self.fault
        return [self._step(row) for row in list(self.rows)]

    def _step(self, row):
        ask, _ = self.rows[row]
        self.rows[row][1] += 1
        self.generated_tokens += 1
        if ask.seed in self.broken:
            del self.rows[row]
            return Progress(row, error=KeyError("broken"))
        if self.rows[row][1] < ask.max_tokens:
            return Progress(row, str(ask.seed))
        del self.rows[row]
        text = str(ask.seed) * ask.max_tokens
        return Progress(row, str(ask.seed), Answer(text, (1,), (), "stop", 1, None))


@pytest.fixture
def fake(monkeypatch):
    """Makes an engine that runs, over a FakeBatch: (engine, batch)."""
    made = []

    def make(**changes):
        engine = Engine(None, dataclasses.replace(CONFIG, **changes))
        made.append(engine)
        engine.start()
        return engine, engine._batch

    monkeypatch.setattr(engine_module, "Batch", FakeBatch)
    yield make
    for engine in made:
        engine._batch.gate.set()
        asyncio.run(engine.stop(0))


def ask(seed: int, runs: int = 2) -> Ask:
    return Ask((1,), runs, seed=seed)


async def result(ticket):
    """All of a ticket's events: the text of its deltas and the answer."""
    text, answer = "", None
    async for event in ticket:
        if isinstance(event, Delta):
            text += event.text
        else:
            assert answer is None
            answer = event
    assert answer.text == text
    return answer


def play(scenario) -> None:
    async def limited():
        async with asyncio.timeout(PATIENCE_S):
            await scenario

    asyncio.run(limited())


async def held(batch) -> None:
    """Until the device thread stands at the closed gate."""
    batch.inside.clear()
    assert await asyncio.to_thread(batch.inside.wait, PATIENCE_S)


def test_first_come_first_served_and_one_admission_between_two_runs(fake):
    engine, batch = fake(queue=50)

    async def scenario():
        batch.gate.clear()
        first = engine.submit(ask(0, 9))
        await held(batch)
        tickets = [first, *(engine.submit(ask(i, 1 + i % 3)) for i in range(1, 10))]
        batch.gate.set()
        answers = await asyncio.gather(*map(result, tickets))
        assert [answer.text[0] for answer in answers] == list("0123456789")

    play(scenario())
    assert [seed for seed, _ in batch.order] == list(range(10))
    assert max(busy for _, busy in batch.order) == 2
    state = engine.state()
    assert (state["finished"], state["busy"], state["queued"]) == (10, 0, 0)
    assert state["prompt_tokens"] == 10 and state["programs"] == 3


def test_many_admissions_between_two_runs_are_spread_so_that_decoding_goes_on(fake):
    engine, batch = fake(slots=6, queue=50, admissions=2)

    async def scenario():
        batch.gate.clear()
        first = engine.submit(ask(0, 30))
        await held(batch)
        others = [engine.submit(ask(i, 30)) for i in range(1, 6)]
        runs = []
        real, batch.run = batch.run, lambda: (runs.append(batch.busy), real())[1]
        batch.gate.set()
        await asyncio.gather(*map(result, [first, *others]))
        assert runs[:3] == [3, 5, 6]

    play(scenario())


def test_a_full_queue_refuses_and_says_when_to_come_back(fake):
    engine, batch = fake()

    async def scenario():
        batch.gate.clear()
        tickets = [engine.submit(ask(0))]
        await held(batch)
        tickets += [engine.submit(ask(i)) for i in (1, 2, 3)]
        with pytest.raises(Overloaded) as refused:
            engine.submit(ask(4))
        assert 1 <= refused.value.retry_after_s <= CONFIG.deadline_s
        assert engine.state()["queued"] == 3 and engine.state()["refused"] == 1
        batch.gate.set()
        await asyncio.gather(*map(result, tickets))
        assert (await result(engine.submit(ask(5)))).text == "55"

    play(scenario())


def test_the_time_to_come_back_is_that_in_which_half_of_the_queue_is_served(fake):
    """However long nobody asked before."""
    engine, _ = fake(queue=40)
    engine._took.extend([40.0, 60.0, 50.0, 50.0])  # two slots: one is free every 25 s
    engine._waiting.extend([object()] * 4)
    assert engine._retry_after() == 50.0
    engine._waiting.extend([object()] * 30)
    assert engine._retry_after() == CONFIG.deadline_s
    engine._waiting.clear()


def test_how_long_requests_took_counts_from_the_slot_on(fake, monkeypatch):
    engine, batch = fake(slots=1)
    clock = [1000.0]
    monkeypatch.setattr(engine_module, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    async def scenario():
        batch.gate.clear()
        tickets = [engine.submit(ask(0, 1)), engine.submit(ask(1, 1))]
        await held(batch)
        clock[0] += 7  # the second one waits
        batch.gate.set()
        await asyncio.gather(*map(result, tickets))

    play(scenario())
    assert list(engine._took) == [7.0, 0.0]


def test_who_gives_up_frees_the_slot_and_a_place_in_the_queue(fake):
    engine, batch = fake()

    async def scenario():
        batch.gate.clear()
        running = engine.submit(ask(0, 100))
        await held(batch)
        queued = [engine.submit(ask(i)) for i in (1, 2, 3)]
        queued[1].cancel()
        queued[1].cancel()
        assert engine.state()["queued"] == 2
        running.cancel()
        batch.gate.set()
        assert (await result(queued[0])).text == "11"
        assert (await result(queued[2])).text == "33"

    play(scenario())
    state = engine.state()
    assert (state["cancelled"], state["finished"], state["busy"]) == (2, 2, 0)
    assert batch.rows == {} and 2 not in [seed for seed, _ in batch.order]


def test_who_is_late_is_told_so_in_a_slot_and_in_the_queue(fake):
    engine, batch = fake(deadline_s=0.05)

    async def scenario():
        batch.gate.clear()
        tickets = [engine.submit(ask(0, 100))]
        await held(batch)
        tickets += [engine.submit(ask(i, 100)) for i in (1, 2, 3)]
        await asyncio.sleep(0.1)
        batch.gate.set()
        results = await asyncio.gather(*map(result, tickets), return_exceptions=True)
        assert [type(r) for r in results] == [TimeoutError] * 4
        assert "0.05 s" in str(results[0])

    play(scenario())
    state = engine.state()
    assert (state["late"], state["busy"], state["queued"]) == (4, 0, 0)
    assert state["healthy"] and batch.rows == {}


def test_whoever_waits_is_told_even_when_the_device_is_stuck(fake, monkeypatch):
    monkeypatch.setattr(engine_module, "LATE_S", 0.05)
    engine, batch = fake(deadline_s=0.05)

    async def scenario():
        batch.gate.clear()
        with pytest.raises(TimeoutError, match="by the deadline"):
            await result(engine.submit(ask(0)))

    play(scenario())


def test_a_request_that_fails_fails_alone(fake):
    engine, batch = fake()
    batch.broken.add(1)

    async def scenario():
        good, bad = engine.submit(ask(0, 5)), engine.submit(ask(1))
        with pytest.raises(EngineError, match="KeyError: 'broken'"):
            await result(bad)
        assert (await result(good)).text == "00000"

    play(scenario())
    assert engine.state()["failed"] == 1 and engine.state()["healthy"]


def test_a_device_that_fails_fails_everybody_at_once_and_is_not_healthy(fake):
    engine, batch = fake()

    async def scenario():
        batch.gate.clear()
        tickets = [engine.submit(ask(0, 5))]
        await held(batch)
        tickets += [engine.submit(ask(i)) for i in (1, 2)]
        batch.fault = RuntimeError("out of memory")
        batch.gate.set()
        results = await asyncio.gather(*map(result, tickets), return_exceptions=True)
        assert [type(r) for r in results] == [EngineError] * 3
        assert "out of memory" in str(results[2])
        with pytest.raises(EngineError, match="out of memory"):
            engine.submit(ask(4))

    play(scenario())
    state = engine.state()
    assert (state["phase"], state["healthy"], state["busy"]) == ("failed", False, 0)
    assert "out of memory" in state["error"]


def test_a_start_that_fails_says_why(monkeypatch):
    class Broken(FakeBatch):
        def warm_up(self):
            raise RuntimeError("does not fit")

    monkeypatch.setattr(engine_module, "Batch", Broken)
    engine = Engine(None, CONFIG)
    with pytest.raises(EngineError, match="does not fit"):
        engine.start()
    assert engine.state()["phase"] == "failed"


def test_stopping_finishes_what_is_there_and_refuses_what_comes(fake):
    engine, batch = fake()

    async def scenario():
        batch.gate.clear()
        tickets = [engine.submit(ask(0))]
        await held(batch)
        tickets += [engine.submit(ask(i)) for i in (1, 2, 3)]
        stopping = asyncio.create_task(engine.stop(PATIENCE_S))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="stopping"):
            engine.submit(ask(4))
        batch.gate.set()
        answers = await asyncio.gather(*map(result, tickets))
        assert [answer.text for answer in answers] == ["00", "11", "22", "33"]
        await stopping

    play(scenario())
    assert engine.state()["phase"] == "stopped"


def test_stopping_without_grace_fails_what_is_there(fake):
    engine, batch = fake()

    async def scenario():
        batch.gate.clear()
        tickets = [engine.submit(ask(0, 100))]
        await held(batch)
        tickets += [engine.submit(ask(i)) for i in (1, 2)]
        stopping = asyncio.create_task(engine.stop(0))
        await asyncio.sleep(0.01)
        batch.gate.set()
        results = await asyncio.gather(*map(result, tickets), return_exceptions=True)
        assert [type(r) for r in results] == [EngineError] * 3
        await stopping

    play(scenario())


def test_who_has_left_with_its_event_loop_holds_nobody_up(fake):
    engine, batch = fake()
    batch.gate.clear()

    async def leave():
        engine.submit(ask(0, 100))

    play(leave())
    batch.gate.set()

    async def scenario():
        assert (await result(engine.submit(ask(1)))).text == "11"

    play(scenario())


def test_a_request_that_does_not_fit_is_refused_before_it_queues(fake):
    engine, _ = fake()

    async def scenario():
        with pytest.raises(ValueError, match="max_tokens=101"):
            engine.submit(ask(0, 101))

    play(scenario())
    assert engine.state()["queued"] == 0


def test_a_size_of_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match="deadline_s=0"):
        EngineConfig(deadline_s=0)


def test_a_real_engine_gives_each_what_it_would_get_alone(monkeypatch):
    monkeypatch.setattr(engine_module, "Batch", lambda player, config: writer.batch())
    engine = Engine(writer.player(), EngineConfig(slots=3, prompt_tokens=24, new_tokens=128))
    asks = [Ask((40 + i, 50), 20 + i, (0.0, 1.0, 0.8)[i % 3], seed=i) for i in range(7)]

    async def scenario():
        together = await asyncio.gather(*(result(engine.submit(ask)) for ask in asks))
        alone = [await result(engine.submit(ask)) for ask in asks]
        assert together == alone
        assert len({answer.text for answer in together}) > 3
        await engine.stop(PATIENCE_S)

    engine.start()
    play(scenario())
    assert engine.state()["finished"] == 14 and engine.state()["generated_tokens"] > 0
