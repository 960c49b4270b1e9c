"""What the endpoints refuse, and what becomes of a request when something goes wrong."""

import asyncio
import dataclasses

import pytest
import scripted
from scripted import CHAIN, Script, ask, call, error, get, make, post

from gtalign_jax.data import asking
from gtalign_jax.data.chat import encode_chat
from gtalign_jax.serving.api import ApiConfig, create_app
from gtalign_jax.serving.chat import NO_USE
from gtalign_jax.serving.engine import EngineError, Overloaded

DEAR = "per_token:output=3000"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_answers_429_before_anything_else_and_says_when_to_come_back(stream):
    app, _ = make(Script(refuse=Overloaded(2.3)))
    got = post(app, ask(stream=stream))
    assert "try again in 3 s" in error(got, 429, code="overloaded")
    assert got.headers["retry-after"] == "3"


def test_when_the_queue_fills_up_between_two_choices_the_first_is_given_up():
    app, engine = make(Script(), Script(refuse=Overloaded(0)))
    got = post(app, ask(n=2))
    error(got, 429)
    assert got.headers["retry-after"] == "1"
    assert [ticket.cancelled for ticket in engine.tickets] == [True]


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (TimeoutError("late"), 504, "timeout_error"),
        (EngineError("/secret/path"), 503, "server_error"),
        (ValueError("max_tokens is 0"), 400, "invalid_request_error"),
        (ZeroDivisionError("/secret/path"), 500, "server_error"),
    ],
)
@pytest.mark.parametrize("where", ["refuse", "fault"])
def test_what_the_engine_raises_becomes_an_error_that_tells_no_secret(fault, status, kind, where):
    app, engine = make(Script(**{where: fault}))
    got = post(app, ask())
    assert "secret" not in error(got, status)
    assert got.json["error"]["type"] == kind
    assert all(ticket.cancelled for ticket in engine.tickets)


def test_a_fault_of_one_choice_ends_the_others():
    held = Script(held=asyncio.Event())
    app, engine = make(Script(fault=EngineError("gone")), held)
    error(post(app, ask(n=2)), 503)
    assert [ticket.cancelled for ticket in engine.tickets] == [True, True]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", [0, len(CHAIN) - 20])
def test_a_client_that_leaves_frees_its_slot(stream, before):
    async def leave_in_the_middle():
        leave, arrived = asyncio.Event(), asyncio.Event()
        app, engine = make(Script(held=asyncio.Event(), before=before))
        request = asyncio.create_task(
            call(app, "POST", "/v1/chat/completions", ask(stream=stream, n=2), leave=leave,
                 arrived=arrived)
        )
        while len(engine.tickets) < 2:
            await asyncio.sleep(0)
        if stream:
            await arrived.wait()
        assert not any(ticket.cancelled for ticket in engine.tickets)
        leave.set()
        await request
        return engine.tickets

    tickets = asyncio.run(asyncio.wait_for(leave_in_the_middle(), 30))
    assert [ticket.cancelled for ticket in tickets] == [True, True]


def test_a_client_that_takes_nothing_any_more_is_given_up(monkeypatch):
    monkeypatch.setattr("gtalign_jax.serving.stream.SLOW_S", 0.05)

    async def stall():
        app, engine = make()
        body = [{"type": "http.request", "body": ask(stream=True), "more_body": False}]
        forever = asyncio.Event()

        async def receive():
            return body.pop() if body else await forever.wait()

        async def send(message):
            if message.get("body"):
                await forever.wait()

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions",
                 "headers": [(b"content-type", b"application/json")], "query_string": b"",
                 "raw_path": b"/", "root_path": "", "scheme": "http", "asgi": {"version": "3.0"}}
        await app(scope, receive, send)
        return engine.tickets

    (ticket,) = asyncio.run(asyncio.wait_for(stall(), 30))
    assert ticket.cancelled


# -------------------------------------------------------------------------- requests refused


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "'user'"),
        ({"messages": [{"role": "user", "content": 4}]}, "messages", "string"),
        ({"messages": [{"role": "user", "content": "x" * 200_001}]}, "messages", "200000"),
        ({"messages": [{"role": "user", "content": "x"}] * 257}, "messages", "256"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "'user'"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "tool_calls", "not"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "messages", "200"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"max_tokens": 65}, "max_tokens", "64"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens", "64"),
        ({"temperature": -1}, "temperature", "0"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater"),
        ({"seed": 2**63}, "seed", "less"),
        ({"seed": True}, "seed", "integer"),
        ({"n": 5}, "n", "4"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stream": 1}, "stream", "boolean"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "not supported"),
        ({"pricing": "flat"}, "pricing", "subscription"),
        ({"pricing": "per_token:output=x"}, "pricing", "not a number"),
        ({"pricing": {"policy": "per_token", "ouput": 3}}, "pricing", "ouput"),
        ({"pricing": ["none"] * 17}, "pricing", "16"),
        ({"rule": "dictator"}, "rule", "pareto_welfare"),
        ({"mode": "none"}, "mode", "matrix"),
        ({"sensitivity": [1]}, "sensitivity", "2"),
        ({"sensitivity": [1, -1]}, "sensitivity", "greater"),
        ({"usage": {"input": [1, 2, 3]}}, "usage", "output"),
    ],
)
def test_a_wrong_field_is_named(fields, param, words):
    app, engine = make()
    assert words in error(post(app, ask(**fields)), 400, param)
    assert not engine.tickets


@pytest.mark.parametrize("fields", [
    {"tools": None, "tool_choice": "none", "logprobs": False, "presence_penalty": 0.0},
    {"response_format": {"type": "text"}, "logit_bias": {}, "modalities": ["text"], "n": None},
    {"store": True, "service_tier": "auto", "parallel_tool_calls": True, "x": [[[]]]},
    {"stop": [], "pricing": None, "rule": None, "stream_options": {"include_usage": True}},
])  # fmt: skip
def test_fields_that_ask_for_nothing_and_unknown_ones_do_no_harm(fields):
    assert post(make()[0], ask(**fields)).status == 200


def test_false_is_not_zero():
    assert "top_k" in error(post(make()[0], ask(top_k=False)), 400, "top_k")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/game/decide"])
def test_a_steering_field_under_another_name_is_not_passed_over(path):
    app, _ = make()
    said = error(post(app, ask(prices="free", payoff=scripted.PAYOFF), path), 400, "prices")
    assert said.endswith("did you mean pricing?")
    assert post(app, ask(prices=None, payoff=scripted.PAYOFF), path).status == 200


def test_another_models_name_is_404_as_openai_says_it():
    app, _ = make()
    said = error(post(app, ask(model="gpt-4o")), 404, "model", "model_not_found")
    assert "'gpt-4o'" in said and "'tiny'" in said
    error(get(app, "/v1/models/gpt-4o"), 404, "model", "model_not_found")
    assert get(app, "/v1/models/tiny").json == get(app, "/v1/models").json["data"][0]
    assert get(app, "/v1/models/tiny").json["id"] == "tiny"


def test_a_prompt_beyond_the_limit_is_told_in_tokens():
    long = [{"role": "user", "content": "word " * 300}]
    got = post(make()[0], ask(messages=long))
    length = len(encode_chat(scripted.player().tokenizer, asking.ask(long, "brief")))
    assert f"{length} tokens" in error(got, 400, "messages", "context_length_exceeded")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[" * 100_000, b'{"model": NaN}', b'{"seed": ' + b"1" * 10_000 + b"}",
        b"\xff\xfe", ask().replace(b"What", b"\xff"), ask().replace(b"What", b"\\ud800"),
        b'"text"', b"[]", b"null", b"1e999", ask(temperature=0).replace(b"0}", b"1e999}"),
        ask(temperature=0).replace(b"0}", b"Infinity}"), ask(x=0).replace(b"0}", b"NaN}"),
    ],
    ids=lambda body: repr(body[:20]),
)  # fmt: skip
def test_hostile_json_is_refused(body):
    got = post(make()[0], body)
    assert got.status == 400 and set(got.json["error"]) == {"message", "type", "param", "code"}


def test_odd_text_is_text():
    app, engine = make()
    assert post(app, ask(messages=[{"role": "user", "content": "a\0b\ufffd😀"}])).status == 200
    ids = engine.tickets[0].ask.prompt_ids
    assert "a\0b\ufffd😀" in scripted.player().tokenizer.decode(ids)


def test_a_template_that_refuses_an_order_of_roles_is_the_requests_fault(monkeypatch):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    monkeypatch.setattr(scripted.player().tokenizer, "chat_template", template)
    assert "no system" in error(post(make()[0], ask()), 400, "messages")


def test_prices_without_known_use_are_refused_unless_the_request_brings_it():
    engine = scripted.Engine()
    plain = scripted.service(engine)
    unknown = dataclasses.replace(plain.steering, usage=NO_USE)
    app = create_app(dataclasses.replace(plain, steering=unknown), ApiConfig())
    assert "usage" in error(post(app, ask(pricing=DEAR)), 400, "usage")
    assert get(app, "/v1/game").json["usage"] is None
    assert post(app, ask(rule="egalitarian")).status == 200
    use = {"input": [1, 2, 1], "output": [60, 130, 90]}
    game = post(app, ask(pricing=DEAR, usage=use)).json["choices"][0]["message"]["gtalign"]
    assert game["decision"]["key"] == "VQ_DA"
