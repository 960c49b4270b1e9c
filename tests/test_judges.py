"""Judges: the verdict's grammar, rules, and a language model over HTTP that misbehaves."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gtalign_jax.reward import http_judge
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judgement, JudgeRequest, make_judge, read_verdict
from gtalign_jax.reward.rules import RULES

UNIT, HALVES = (0.0, 1.0), (0.0, 0.5, 1.0)


def request(response="r", source="ambig_qa", **fields):
    return JudgeRequest("quality", source, "the question", "singleAnswer###truth", response,
                        **fields)  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("<verdict>1</verdict>", 1.0),
        ("thinking... <verdict> 0.5 </verdict>\n", 0.5),
        ("<verdict>0</verdict> no, wait: <verdict>1</verdict>", 1.0),
        ("<verdict>1</verdict> and then <verdict>maybe</verdict>", 1.0),
        ("<verdict>.5</verdict>", 0.5),
        ("<verdict>1.</verdict>", 1.0),
        ("<verdict>0.7</verdict>", None),
        ("<verdict>2</verdict>", None),
        ("<verdict>-1</verdict>", None),
        ("<verdict>1</verdict> <verdict>5</verdict>", None),
        ("<verdict>1/1</verdict>", None),
        ("<verdict>NaN</verdict>", None),
        ("verdict: 1", None),
        ("", None),
        ("<verdict>" * 100_000, None),
        ("<verdict>" + " " * 500_000, None),
    ],
)
def test_the_last_well_formed_verdict_counts_if_it_is_on_the_scale(reply, score):
    started = time.process_time()
    found = read_verdict(reply, UNIT, HALVES)
    assert found.score == score and (found.error is None) == (score is not None)
    assert found.reply == reply
    assert time.process_time() - started < 0.5


def test_a_scale_without_fixed_grades_takes_every_number_on_it():
    assert read_verdict("<verdict>2.5</verdict>", (0.0, 4.0), ()).score == 2.5
    found = read_verdict("<verdict>4.5</verdict>", (0.0, 4.0), ())
    assert found.score is None and "off the scale (0 to 4)" in found.error


def test_the_rule_judge_knows_the_builtin_tasks_and_says_what_it_does_not_know():
    judge = make_judge(JudgeConfig(kind="rule"), {"builtin-x": lambda r: float(len(r.response))})
    right, unknown = judge([request("ab", "builtin-x"), request("ab")])
    assert right == Judgement(2.0, "rule")
    assert unknown.score is None and "no rule judges 'ambig_qa'" in unknown.error


def test_without_a_judge_model_the_solver_judges_consistency():
    judge = make_judge(JudgeConfig(kind="rule"), RULES)
    asked = JudgeRequest("consistency", "ambig_qa", "", "", "r", "So DQ_CQ.", ("DQ_CQ",))
    assert judge([asked]) == [Judgement(1.0, "solver")]


def test_no_judge_means_every_score_is_missing():
    judge = make_judge(JudgeConfig(kind="none"), RULES)
    assert [j.score for j in judge([request(), request(source="builtin-arithmetic")])] == [None] * 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kind": "openai"}, "judge.kind='openai'; allowed: rule, http, none"),
        ({"kind": "http", "model": "m"}, "judge.base_url is empty"),
        ({"kind": "http", "base_url": "u"}, "judge.model is empty"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
    ],
)
def test_a_judge_that_cannot_work_is_refused_at_once(fields, reason):
    with pytest.raises(ValueError, match=reason):
        JudgeConfig(**fields)


class Server(ThreadingHTTPServer):
    """Speaks the OpenAI protocol; the text of the graded response says how to misbehave."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        self.lock = threading.Lock()
        self.seen, self.running, self.most, self.headers, self.bodies = {}, 0, 0, [], []
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request, client_address):
        """Clients that gave up are part of the test."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Silence."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        shown = body["messages"][-1]["content"]
        order = shown.partition("<response>\n")[2].partition("\n</response>")[0]
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.headers.append(self.headers["authorization"])
            count = server.seen[order] = server.seen.get(order, 0) + 1
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            self.misbehave(order, count)
        finally:
            with server.lock:
                server.running -= 1

    def misbehave(self, order, count):
        if order.startswith("say "):
            time.sleep(0.02)
            return self.reply(200, chat(order[4:]))
        if order.startswith("fail twice ") and count <= 2:
            return self.reply(int(order.split()[-1]), {"error": {"message": "later"}})
        if order.startswith("always "):
            return self.reply(int(order.split()[-1]), {"error": {"message": "not so"}})
        if order == "hang once" and count == 1:
            time.sleep(1.5)
            return None
        if order == "hang":
            time.sleep(1.5)
            return None
        if order == "drip":  # a byte now and then keeps a per-read time-out from firing
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            for _ in range(12):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            return None
        if order == "close":
            self.close_connection = True
            return None
        if order == "not json":
            return self.reply(200, None, b"<html>proxy error</html>", "text/html")
        if order == "broken json":
            return self.reply(200, None, b'{"choices": [', "application/json")
        if order == "no choices":
            return self.reply(200, {"id": "x", "object": "chat.completion", "choices": []})
        if order == "null text":
            return self.reply(200, chat(None))
        return self.reply(200, chat("fine <verdict>1</verdict>"))

    def reply(self, status, body, raw=None, kind="application/json"):
        data = json.dumps(body).encode() if raw is None else raw
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def chat(text):
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        ],
    }  # fmt: skip


@pytest.fixture
def server():
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(http_judge, "_backoff_s", lambda attempt: 0.01 * 2**attempt)


def http(server, **fields):
    settings = {"concurrency": 8, "timeout_s": 0.5, "retries": 3} | fields
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return make_judge(JudgeConfig(kind="http", base_url=url, model="judge-1", **settings), RULES)


def test_replies_come_back_in_order_with_bounded_concurrency(server):
    grades = [(i * 7) % 2 for i in range(60)]
    asked = [request(f"say {i}: <verdict>{g}</verdict>") for i, g in enumerate(grades)]
    found = http(server, concurrency=5, timeout_s=20.0)(asked)
    assert [j.score for j in found] == grades
    assert all(f"{i}: " in j.reply for i, j in enumerate(found))
    assert 2 <= server.most <= 5
    assert set(server.seen.values()) == {1}


def test_the_judge_sees_rubric_question_reference_and_response(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    http(server, api_key_env="MY_KEY", max_tokens=77, temperature=0.25)([request("an answer")])
    (body,) = server.bodies
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge-1", 77, 0.25)
    text = body["messages"][-1]["content"]
    for part in ("Several meanings", "the question", "singleAnswer###truth", "an answer", "0, 1."):
        assert part in text
    assert server.headers == ["Bearer secret"]


def test_consistency_shows_the_analysis_and_the_pareto_set():
    asked = JudgeRequest("consistency", "medium", "q", "t", "r", "I take DQ_CQ", ("DQ_CQ", "VQ_DA"))
    text = http_judge.messages(asked)[-1]["content"]
    assert "I take DQ_CQ" in text and "DQ_CQ, VQ_DA" in text and "0, 0.5, 1." in text


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_failures_that_pass_are_repeated(status, server, quick):
    (found,) = http(server)([request(f"fail twice {status}")])
    assert found.score == 1.0 and server.seen == {f"fail twice {status}": 3}


@pytest.mark.parametrize("status", [400, 401, 404])
def test_failures_that_stay_are_not_repeated_and_are_missing(status, server, quick):
    (found,) = http(server)([request(f"always {status}")])
    assert found.score is None and f"HTTP {status}" in found.error
    assert server.seen == {f"always {status}": 1}


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("always 500", "HTTP 500"),
        ("not json", "no text"),
        ("broken json", "unreadable answer"),
        ("no choices", "no text"),
        ("null text", "no text"),
        ("close", "ConnectionError"),
    ],
)
def test_what_never_works_is_missing_after_its_retries_and_never_zero(order, reason, server, quick):
    good, found, other = http(server, retries=2)([request("x"), request(order), request("y")])
    assert found.score is None and reason in found.error, found.error
    assert server.seen[order] == 3
    assert good.score == other.score == 1.0


def test_an_unparsable_reply_is_missing_and_repeated_only_when_sampling(server, quick):
    (found,) = http(server)([request("say I like it, 10/10")])
    assert found.score is None and found.reply == "I like it, 10/10"
    assert set(server.seen.values()) == {1}  # at temperature 0 it would say the same again
    http(server, retries=2, temperature=0.7)([request("say still 10/10")])
    assert server.seen["say still 10/10"] == 3


def test_a_hanging_attempt_ends_in_time_and_is_repeated(server, quick):
    started = time.monotonic()
    once, never, drip = http(server, retries=1)(
        [request("hang once"), request("hang"), request("drip")]
    )
    assert once.score == 1.0
    assert never.score is None and ("0.5 s" in never.error or "imeout" in never.error)
    assert drip.score is None
    assert time.monotonic() - started < 4.0


def test_time_in_our_own_queue_is_no_part_of_the_time_out(server):
    # Forty calls of 20 ms through one slot take 0.8 s, more than the limit of one attempt.
    asked = [request(f"say {i} <verdict>1</verdict>") for i in range(40)]
    found = http(server, concurrency=1, timeout_s=0.5)(asked)
    assert [j.score for j in found] == [1.0] * 40


def test_a_server_that_is_not_there_is_missing(quick):
    url = "http://127.0.0.1:9/v1"
    cfg = JudgeConfig(kind="http", base_url=url, model="m", retries=1, timeout_s=2.0)
    (found,) = make_judge(cfg, RULES)([request()])
    assert found.score is None and "APIConnectionError" in found.error


def test_it_can_be_called_inside_an_event_loop(server):
    async def notebook():
        return http(server, timeout_s=5.0)([request("x")])

    assert asyncio.run(notebook())[0].score == 1.0
    assert http(server)([]) == []


def test_sources_with_a_rule_do_not_cost_a_call(server):
    ruled, asked = http(server, timeout_s=5.0)(
        [request("12", "builtin-arithmetic"), request("x")]
    )
    assert ruled.reply == "rule" and asked.score == 1.0
    assert server.seen == {"x": 1}


def test_long_texts_are_cut_in_the_middle():
    text = http_judge.messages(request("a" * 100_000 + "END"))[-1]["content"]
    assert len(text) < 40_000 and "characters left out" in text and "END" in text
