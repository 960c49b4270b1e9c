"""The client of a judge's servers: rates, numbers and times, and which server is asked."""

import asyncio
import signal
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judging import SERVER_FAULTS, Plan, asking, most_within, request, serving

from gtalign_jax.reward import endpoints, http_judge, limits


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(http_judge, "_backoff_s", lambda attempt: 0.01)


def crowd(count, text="x"):
    return [request(f"{text} {i}") for i in range(count)]


def until(condition):
    """Waits for what another thread does."""
    over = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < over, "it never came true"
        time.sleep(0.01)


def test_replies_come_back_in_order():
    grades = [float(i * 7 % 2) for i in range(40)]
    wanted = [request(f"say {i}: <verdict>{g:g}</verdict>") for i, g in enumerate(grades)]
    with serving() as server, asking(server) as ask:
        told = {}
        found = ask(wanted, told.__setitem__)
    assert [j.score for j in found] == grades
    assert all(f"{i}: " in j.reply for i, j in enumerate(found))
    assert told == dict(enumerate(found))
    assert set(server.counts().values()) == {1} and {j.attempts for j in found} == {1}


def test_calls_from_several_threads_share_the_bound_of_concurrency():
    with serving(latency_s=0.03) as server, asking(server, concurrency=5) as ask:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(ask, [crowd(12, f"caller {n}") for n in range(4)]))
    assert {j.score for judgements in found for j in judgements} == {1.0}
    assert 2 <= max(asked.running for asked in server.asked) <= 5
    assert len({asked.connection for asked in server.asked}) <= 5, "connections are used again"


def test_requests_a_minute_are_never_exceeded_by_retries_either(monkeypatch, quick):
    monkeypatch.setattr(limits, "WINDOW_S", 1.5)
    plan = Plan(0.3, faults=("server", "close", "no_verdict"))
    with serving(behave=plan) as server:
        with asking(server, requests_per_minute=10, concurrency=32) as ask:
            ask(crowd(20))
    assert len(server.asked) > 20, "the plan made no request fail"
    # At the server a window is shorter by what a request took on its way.
    assert 9 <= most_within(1.0, [asked.at for asked in server.asked]) <= 10


def test_tokens_a_minute_are_never_exceeded(monkeypatch):
    monkeypatch.setattr(limits, "WINDOW_S", 1.5)
    with serving(usage=900) as server:  # a request is guessed at 1,419 tokens
        with asking(server, tokens_per_minute=5000, concurrency=32) as ask:
            ask(crowd(11))
    times = [asked.at for asked in server.asked]
    assert most_within(1.0, times, [900.0] * 11) <= 5000
    # As the server counts fewer than were guessed, more fit in than guesses would allow.
    assert max(times) - min(times) < 5 * 1.5


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    async def sleep(self, seconds):
        self.now += seconds + 1e-9  # or rounding may keep it where it was


requests_of_tokens = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 60), st.sampled_from([0.0, 0.1, 1.0, 7.3, 30.0])),
    min_size=1, max_size=40,
)


@given(requests_of_tokens, st.integers(0, 5), st.integers(0, 50))
def test_no_window_holds_more_than_its_limits_and_nobody_waits_in_vain(sent, requests, tokens):
    clock = Clock()
    told = []  # (when it was sent, tokens that the server counted)

    async def all_of_them():
        limit = limits.Limits(requests, tokens, clock=lambda: clock.now)
        for guess, used, later_s in sent:
            before = clock.now
            ticket = await limit.take(guess)
            used = min(used, guess)
            if clock.now > before + 1e-6:  # a moment earlier it would not have fitted
                begin = clock.now - 1e-3 - limits.WINDOW_S
                held = [count for at, count in told if begin < at]
                assert (requests and len(held) + 1 > requests) or (
                    tokens and sum(held) + min(guess, tokens) > tokens)
            limit.settle(ticket, used)
            told.append((clock.now, used))
            clock.now += later_s

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits.asyncio, "sleep", clock.sleep)
        patch.setattr(limits, "START_GAP_S", 0.0)
        asyncio.run(all_of_them())
    window_s = limits.WINDOW_S - 1e-6
    assert not requests or most_within(window_s, [at for at, _ in told]) <= requests
    counted = [float(min(count, tokens)) for _, count in told]
    assert not tokens or most_within(window_s, [at for at, _ in told], counted) <= tokens


@pytest.mark.parametrize(("fault", "least_s"), [("rate_limit", 0.95), ("rate_limit_date", 0.9)])
def test_a_server_is_left_alone_until_it_wants_to_be_asked_again(fault, least_s, quick):
    """As a date it has whole seconds, so that two may be little more than one."""
    seconds = {"rate_limit": "1", "rate_limit_date": "2"}[fault]
    with serving(retry_after=seconds) as server, asking(server, concurrency=2) as ask:
        found = ask([request(f"{fault} once"), *crowd(6)])
    assert {j.score for j in found} == {1.0}
    asked = server.asked
    refused = next(a for a in asked if a.fault)
    later = [a.at - refused.at for a in asked if a.at > refused.at and a.connection >= 0]
    at_once = [gap for gap in later if gap < least_s]
    assert len(at_once) <= 1, "one was under way already; all others had to wait"
    assert len(later) >= 6


def test_where_one_server_wants_to_be_left_alone_another_is_asked(quick):
    def refuses(asked):
        return "rate_limit"

    with serving(behave=refuses, retry_after="3600") as tired, serving() as fresh:
        with asking(tired, fresh) as ask:
            assert {j.score for j in ask(crowd(30))} == {1.0}
            assert {j.score for j in ask(crowd(10, "later"))} == {1.0}
    assert len(tired.asked) <= 8, "only what was under way at the first refusal"


def test_back_off_doubles_has_a_limit_and_is_not_the_same_for_all():
    for attempt, longest in ((0, 0.5), (1, 1.0), (4, 8.0), (6, 30.0), (50, 30.0)):
        waits = [http_judge._backoff_s(attempt) for _ in range(200)]
        assert all(longest / 2 <= wait <= longest for wait in waits)
        assert len(set(waits)) > 190


def test_a_retry_waits_for_the_back_off(monkeypatch):
    waited = []
    monkeypatch.setattr(http_judge, "_backoff_s", lambda i: waited.append(i) or 0.2 * (i + 1))
    with serving() as server, asking(server) as ask:
        (found,) = ask([request("server twice")])
    first, second, third = (asked.at for asked in server.asked)
    assert (found.score, found.attempts, waited) == (1.0, 3, [0, 1])
    assert second - first >= 0.2 and third - second >= 0.4


def test_time_in_our_own_queue_is_no_part_of_the_time_out(monkeypatch):
    # Forty calls of 20 ms through one slot take 0.8 s, more than the limit of one attempt.
    with serving(latency_s=0.02) as server:
        with asking(server, concurrency=1, timeout_s=0.6, retries=0) as ask:
            assert {j.score for j in ask(crowd(40))} == {1.0}
    monkeypatch.setattr(limits, "WINDOW_S", 1.0)
    with serving() as server:
        with asking(server, requests_per_minute=4, timeout_s=0.9, retries=0) as ask:
            assert {j.score for j in ask(crowd(12))} == {1.0}


def test_what_is_late_for_the_step_is_missing_and_the_call_returns_in_time():
    began = time.monotonic()
    with serving() as server:
        with asking(server, deadline_s=1.0, timeout_s=40.0, concurrency=4) as ask:
            wanted = [request("good"), *[request(f"hang {i}") for i in range(8)]]
            found = ask(wanted)
            assert time.monotonic() - began < 20.0
            assert found[0].score == 1.0
            assert {j.cause for j in found[1:]} == {"deadline"}
            assert "judge.deadline_s=1" in found[1].error
            assert asyncio.all_tasks(ask._loop) == set(), "nothing goes on in the background"
            assert [endpoint.in_flight for endpoint in ask._endpoints] == [0]
            # All slots are free again.
            assert {j.score for j in ask(crowd(8))} == {1.0}


def test_what_is_late_says_what_kept_it():
    with serving() as server, asking(server, deadline_s=1.0) as ask:
        server.settings.retry_after = "3600"
        (found,) = ask([request("rate_limit")])
    assert found.cause == "deadline" and "HTTP 429" in found.error
    assert found.attempts == 1 == len(server.asked)


def test_work_is_shared_among_servers():
    with serving(latency_s=0.02) as one, serving(latency_s=0.02) as other:
        with asking(one, other) as ask:
            assert {j.score for j in ask(crowd(40))} == {1.0}
    assert min(len(one.asked), len(other.asked)) >= 10
    assert len(one.asked) + len(other.asked) == 40


@pytest.mark.parametrize("fault", ["server", "not_found", "401", "html", "rate_limit_0", "close"])
def test_a_server_that_fails_quickly_does_not_draw_the_requests_to_itself(fault, quick):
    broken = {"behave": lambda asked: "429" if fault == "rate_limit_0" else fault}
    with serving(**broken) as bad, serving(latency_s=0.01) as good:
        with asking(bad, good) as ask:
            assert {j.score for j in ask(crowd(60))} == {1.0}
    assert len(bad.asked) <= 3 + 8, "three failures in a row, and what was under way by then"


def test_failover_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(http_judge, "_backoff_s", lambda attempt: pytest.fail("it waited"))
    with serving(behave=lambda asked: "server") as bad, serving() as good:
        with asking(bad, good) as ask:
            found = ask(crowd(20))
    assert {j.score for j in found} == {1.0} and max(j.attempts for j in found) == 2


def test_when_every_server_fails_there_is_a_pause_between_the_rounds(monkeypatch):
    waited = []
    monkeypatch.setattr(http_judge, "_backoff_s", lambda attempt: waited.append(attempt) or 0.01)
    with serving(behave=lambda asked: "server") as one, serving(behave=lambda a: "server") as two:
        with asking(one, two, retries=4) as ask:
            (found,) = ask([request("x")])
    assert found.cause == "server" and found.attempts == 5
    assert (len(one.asked), len(two.asked)) in ((3, 2), (2, 3))
    assert waited == [1, 3]


def test_a_server_that_dies_is_left_out_and_comes_back(monkeypatch, quick):
    monkeypatch.setattr(endpoints, "SUSPECT_S", 0.2)
    with serving(latency_s=0.01) as good, serving(latency_s=0.01) as mortal:
        with asking(good, mortal) as ask:
            ask(crowd(16))
            assert mortal.asked
            mortal.stop()
            for i in range(3):
                assert {j.score for j in ask(crowd(16, f"without {i}"))} == {1.0}
            with serving(port=mortal.port) as reborn:
                until(lambda: ask(crowd(8, f"again {time.monotonic()}")) and reborn.asked)
                before = len(reborn.asked)
                assert {j.score for j in ask(crowd(30, "both"))} == {1.0}
                assert len(reborn.asked) - before >= 5, "it takes its share again"


def test_a_server_that_is_soon_to_be_asked_again_is_better_than_a_dead_one(monkeypatch, quick):
    monkeypatch.setattr(endpoints, "SUSPECT_S", 30.0)
    with serving(latency_s=0.05) as good, serving() as dead, asking(good, dead) as ask:
        dead.stop()
        assert {j.score for j in ask(crowd(12))} == {1.0}
        (found,) = ask([request("rate_limit once")])
    refused, answered = good.asked[-2:]
    assert (found.score, found.attempts) == (1.0, 2), "no attempt is thrown away"
    assert answered.at - refused.at >= 0.95


def test_one_attempt_at_a_time_finds_out_whether_a_hanging_server_works_again(monkeypatch, quick):
    monkeypatch.setattr(endpoints, "SUSPECT_S", 0.05)
    monkeypatch.setattr(endpoints, "MAX_SUSPECT_S", 0.05)
    with serving(behave=lambda asked: "hang") as bad, serving(latency_s=0.02) as good:
        with asking(bad, good, timeout_s=0.5, concurrency=8) as ask:
            assert {j.score for j in ask(crowd(16))} == {1.0}
            before = len(bad.asked)
            time.sleep(0.1)
            assert {j.score for j in ask(crowd(100, "more"))} == {1.0}
    assert 1 <= len(bad.asked) - before <= 4, "not half of what is asked"


def test_several_servers_are_tried_each_before_one_is_missing(quick):
    """The first refuses what the second would not (a shorter context, say)."""
    with serving(behave=lambda asked: "400") as small, serving() as large:
        with asking(small, large) as ask:
            assert {j.score for j in ask(crowd(10))} == {1.0}
    with serving(behave=lambda a: "400") as small, serving(behave=lambda a: "400") as other:
        with asking(small, other) as ask:
            (found,) = ask([request("x")])
    assert (found.cause, found.attempts) == ("rejected", 2)


def test_it_can_be_called_inside_an_event_loop_and_with_nothing():
    async def notebook():
        return ask([request("x")])

    with serving() as server, asking(server) as ask:
        assert asyncio.run(notebook())[0].score == 1.0
        assert ask([]) == []


def test_the_thread_is_no_reason_to_go_on_and_ends_with_close():
    with serving() as server, asking(server) as ask:
        ask([request("x")])
        (thread,) = [t for t in threading.enumerate() if t.name == "judge"]
        assert thread.daemon
        ask.close()
        assert not thread.is_alive()
        assert ask([request("y")])[0].score == 1.0, "it starts again when it is asked"


def test_closing_ends_a_call_that_waits():
    with serving() as server, asking(server, timeout_s=60.0) as ask:
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(ask, [request("hang")])
            until(lambda: server.asked)
            ask.close()
            with pytest.raises(CancelledError):
                waiting.result(timeout=20)


def test_ctrl_c_ends_the_wait_and_what_was_under_way():
    main = threading.main_thread().ident
    with serving() as server, asking(server, timeout_s=60.0) as ask:
        ask([request("x")])

        def press():
            until(lambda: len(server.asked) > 1)
            signal.pthread_kill(main, signal.SIGINT)

        pressing = threading.Thread(target=press)
        pressing.start()
        with pytest.raises(KeyboardInterrupt):
            ask([request("hang")])
        pressing.join()
        until(lambda: not asyncio.all_tasks(ask._loop))
        assert ask([request("y")])[0].score == 1.0


def test_what_cannot_be_told_ends_the_call_at_once():
    def told(i, judgement):
        raise OSError("the disk is full")

    with serving(latency_s=0.05) as server, asking(server, concurrency=1) as ask:
        with pytest.raises(OSError, match="disk is full"):
            ask(crowd(50), told)
        assert len(server.asked) < 10


def test_a_third_of_failures_costs_time_and_no_judgement_is_wrong(quick):
    """Faulty answers hold a verdict of 1, good ones of 0."""
    plan = Plan(0.3, seed=1)
    with serving(behave=plan, grade=lambda asked: "0", retry_after="0") as server:
        with asking(server, concurrency=32, retries=6, timeout_s=1.0) as ask:
            found = ask(crowd(200))
            endpoint = ask._endpoints[0]
    assert {j.score for j in found} == {0.0, None}, "404s stay"
    assert {j.cause for j in found} == {None, "rejected"}
    assert {a.fault for a in server.asked} >= set(SERVER_FAULTS), "each was tried"
    assert max(asked.running for asked in server.asked) <= 32 + plan_hangs(server)
    assert endpoint.in_flight == 0


def plan_hangs(server):
    """Requests that the client had given up, while the server went on."""
    return sum(asked.fault in ("hang", "drip") for asked in server.asked)
