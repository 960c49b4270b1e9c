"""The endpoints over an engine that plays from a script: replies, refusals, what goes wrong."""

import asyncio
import dataclasses
import json
import re

import pytest
import scripted
from scripted import CHAIN, PAYOFF, RESPONSE, Script, ask, call, get, make, post

from gtalign_jax.data import asking
from gtalign_jax.data.chat import encode_chat
from gtalign_jax.game import pricing
from gtalign_jax.game.chain import KEYS
from gtalign_jax.game.decide import RULES
from gtalign_jax.serving.api import ApiConfig, create_app
from gtalign_jax.serving.chat import NO_USE
from gtalign_jax.serving.engine import EngineError, Overloaded
from gtalign_jax.serving.gate import SECURITY
from gtalign_jax.serving.stream import STILL_HERE

DEAR = "per_token:output=3000"


def error(got, status: int, param=None, code=None) -> str:
    """Checks a refusal; returns its message."""
    assert got.status == status, got.body
    assert got.headers["content-type"] == "application/json"
    assert set(got.json) == {"error"}
    assert set(got.json["error"]) == {"message", "type", "param", "code"}
    assert got.json["error"]["param"] == param
    if code is not None:
        assert got.json["error"]["code"] == code
    return got.json["error"]["message"]


def tokens(text: str) -> int:
    return len(scripted.player().tokenizer(text).input_ids)


# ------------------------------------------------------------------------------- whole replies


def test_a_reply_has_the_response_as_content_and_the_chain_beside_it():
    app, engine = make()
    got = post(app, ask(seed=7, temperature=0.5, top_p=0.9, max_tokens=20, user="u", metadata={}))
    assert got.status == 200
    reply = got.json
    assert reply["object"] == "chat.completion" and reply["model"] == "tiny"
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{24}", reply["id"])
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop" and choice["index"] == 0
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", RESPONSE)
    game = message["gtalign"]
    assert game["chain"] == CHAIN and game["written"] == PAYOFF and game["seed"] == 7
    assert (game["error"], game["steered"], game["reason"], game["forced"]) == (
        None, False, None, [],
    )
    assert game["pricing"]["name"] == "none" and game["decision"]["key"] == "VQ_CQ"
    (ticket,) = engine.tickets
    assert (ticket.ask.seed, ticket.ask.temperature, ticket.ask.top_p) == (7, 0.5, 0.9)
    assert ticket.ask.max_tokens == 20 and ticket.ask.steering is None
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    asked = asking.ask(messages, "brief")
    assert list(ticket.ask.prompt_ids) == encode_chat(scripted.player().tokenizer, asked)
    assert reply["usage"] == {
        "prompt_tokens": len(ticket.ask.prompt_ids), "completion_tokens": tokens(CHAIN),
        "total_tokens": len(ticket.ask.prompt_ids) + tokens(CHAIN),
    }  # fmt: skip


def test_prices_change_the_decision_and_the_answer_and_forced_tokens_are_told():
    app, engine = make()
    game = post(app, ask(pricing=DEAR)).json["choices"][0]["message"]["gtalign"]
    assert game["steered"] and game["changed"]
    assert (game["before"]["key"], game["decision"]["key"]) == ("VQ_CQ", "VQ_DA")
    assert "VQ_DA is best." in game["chain"] and game["edited"] != PAYOFF
    ((first, last),) = game["forced"]
    whole = scripted.player().tokenizer(game["chain"]).input_ids
    assert 0 < first < last < len(whole)
    assert engine.tickets[0].ask.steering.pricing == pricing.read(DEAR)


def test_all_of_a_requests_steering_reaches_the_engine_and_the_servers_own_fills_the_rest():
    app, engine = make(steered=True)
    use = {"input": [1, 2, 1], "output": [3, 4, 5]}
    post(app, ask(
        pricing=[{"policy": "per_token"}, "per_request:price=1"], rule="egalitarian",
        mode="matrix", rows="all", sensitivity=[1, 2.5], usage=use, floor=2,
    ))  # fmt: skip
    config = engine.tickets[0].ask.steering
    assert config.pricing == pricing.compose(
        pricing.read("per_token"), pricing.read("per_request:price=1")
    )
    assert (config.rule, config.mode, config.rows) == ("egalitarian", "matrix", "all")
    assert (config.sensitivity, config.floor) == ((1, 2.5), 2)
    assert config.usage == pricing.read_usage(use)
    post(app, ask())
    assert engine.tickets[1].ask.steering == scripted.service(engine).steering


def test_a_request_may_raise_the_servers_floor_and_not_lower_it():
    app, engine = make(steered=True)
    for floor in (-9, 0, 3):
        post(app, ask(pricing=DEAR, floor=floor))
    assert [ticket.ask.steering.floor for ticket in engine.tickets] == [0, 0, 3]


@pytest.mark.parametrize("prices", [None, DEAR])
def test_a_completion_without_a_matrix_is_told_as_such(prices):
    app, _ = make(Script(text="I do not know.", finish_reason="length"))
    (choice,) = post(app, ask(pricing=prices)).json["choices"]
    game = choice["message"]["gtalign"]
    assert choice["message"]["content"] == "I do not know."
    assert choice["finish_reason"] == "length"
    assert game["error"] == "no <payoff> block" and "written" not in game
    assert not game["steered"] and bool(game["reason"]) == bool(prices)


def test_several_choices_are_drawn_with_seeds_of_their_own_and_counted_together():
    app, engine = make(Script(), Script(text="<response>two</response>"))
    reply = post(app, ask(n=2, seed=2**32 - 1)).json
    assert [c["message"]["content"] for c in reply["choices"]] == [RESPONSE, "two"]
    assert [c["index"] for c in reply["choices"]] == [0, 1]
    assert [ticket.ask.seed for ticket in engine.tickets] == [2**32 - 1, 0]
    assert [c["message"]["gtalign"]["seed"] for c in reply["choices"]] == [2**32 - 1, 0]
    one = len(engine.tickets[0].ask.prompt_ids)
    both = tokens(CHAIN) + tokens("<response>two</response>")
    assert reply["usage"] == {
        "prompt_tokens": one, "completion_tokens": both, "total_tokens": one + both,
    }  # fmt: skip


def test_a_stop_text_ends_the_content_but_not_the_chain():
    app, _ = make(Script(finish_reason="length"))
    (choice,) = post(app, ask(stop=["Anna", "caf"])).json["choices"]
    assert choice["message"]["content"] == "Which one — the"
    assert choice["finish_reason"] == "stop" and choice["message"]["gtalign"]["chain"] == CHAIN


def test_text_parts_and_developer_messages_are_what_they_mean():
    app, engine = make()
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    post(app, ask(messages=[
        {"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts},
    ]))  # fmt: skip
    said = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"},
    ]  # fmt: skip
    asked = asking.ask(said, "brief")
    assert list(engine.tickets[0].ask.prompt_ids) == encode_chat(
        scripted.player().tokenizer, asked
    )


# ----------------------------------------------------------------------------------- streaming


def deltas(got, index: int = 0) -> list[dict]:
    return [
        event["choices"][0]["delta"] for event in got.events[:-1]
        if event["choices"] and event["choices"][0]["index"] == index
    ]  # fmt: skip


def test_a_stream_shows_the_response_piece_by_piece_and_ends_with_the_game():
    app, _ = make()
    got = post(app, ask(stream=True, seed=3, stream_options={"include_usage": True}))
    assert got.headers["content-type"].startswith("text/event-stream")
    assert got.headers["cache-control"] == "no-store"
    *chunks, counted, done = got.events
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    first, *middle, last = deltas(got)
    assert first == {"role": "assistant", "content": ""}
    assert [set(delta) for delta in middle] == [{"content"}] * len(middle) and len(middle) > 5
    assert "".join(delta["content"] for delta in middle) == RESPONSE
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * len(middle) + [
        None, "stop",
    ]
    whole = post(app, ask(seed=3)).json
    assert last == {"gtalign": whole["choices"][0]["message"]["gtalign"]}
    assert counted["choices"] == [] and counted["usage"] == whole["usage"]
    assert {chunk["usage"] for chunk in chunks} == {None}


def test_a_steered_stream_and_one_with_stops_say_what_the_whole_replies_say():
    app, _ = make()
    for fields in ({"pricing": DEAR}, {"stop": "Anna"}, {"n": 2, "pricing": DEAR, "stop": "4"}):
        whole = post(app, ask(seed=1, **fields)).json
        got = post(app, ask(seed=1, stream=True, **fields))
        assert "usage" not in got.events[0]
        for index, choice in enumerate(whole["choices"]):
            told = deltas(got, index)
            text = "".join(delta.get("content", "") for delta in told)
            assert text == choice["message"]["content"]
            assert told[-1]["gtalign"] == choice["message"]["gtalign"]


def test_a_fault_after_the_first_piece_is_an_event_and_the_stream_ends_without_done():
    script = Script(fault=TimeoutError(), before=len(CHAIN) - 30)
    app, engine = make(script)
    got = post(app, ask(stream=True))
    assert got.status == 200
    assert got.events[-1]["error"]["code"] == "deadline_exceeded"
    assert got.events[-2]["choices"][0]["delta"]["content"]
    assert engine.tickets[0].cancelled


def test_a_stream_that_waits_says_now_and_then_that_it_is_still_there(monkeypatch):
    monkeypatch.setattr("gtalign_jax.serving.stream.SILENCE_S", 0.01)

    async def scene():
        held, waited = asyncio.Event(), asyncio.Event()
        app, engine = make(Script(held=held))
        arrived = asyncio.create_task(
            call(app, "POST", "/v1/chat/completions", ask(stream=True), arrived=waited,
                 pieces=2)
        )
        await waited.wait()
        held.set()
        return await arrived

    got = asyncio.run(asyncio.wait_for(scene(), 30))
    assert STILL_HERE in got.parts
    got.parts = [part for part in got.parts if part != STILL_HERE]
    assert "".join(delta.get("content", "") for delta in deltas(got)) == RESPONSE
    assert got.events[-1] == "[DONE]"


# ------------------------------------------------------------------------------- what goes wrong


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


# --------------------------------------------------------------------------- the game, the rest


def decide(**fields):
    return post(make()[0], json.dumps({"payoff": PAYOFF, **fields}).encode(), "/v1/game/decide")


def test_a_matrix_is_decided_as_a_steered_reply_would_be():
    app, _ = make()
    steered = post(app, ask(pricing=DEAR, rule="utilitarian")).json
    game = steered["choices"][0]["message"]["gtalign"]
    alone = decide(pricing=DEAR, rule="utilitarian")
    assert alone.status == 200
    assert {key: game[key] for key in alone.json} == alone.json
    assert decide(pricing=DEAR, floor=5).json["decision"]["key"] == "VQ_CQ"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"payoff": {}}, "payoff"),
        ({"payoff": PAYOFF | {"VQ_DA": {"LLM": 1}}}, "payoff"),
        ({"payoff": PAYOFF | {"VQ_DA": {"LLM": 1, "user": 1e7}}}, "payoff"),
        ({"payoff": PAYOFF | {"VQ_DA": {"LLM": 1, "user": True}}}, "payoff"),
        ({"payoff": PAYOFF | {"XX_DA": {"LLM": 1, "user": 1}}}, "payoff"),
        ({"pricing": {"policy": "given", "user_request": -1e6}, "sensitivity": [0, 1e6]}, "payoff"),
        ({"floor": "low"}, "floor"),
    ],
)
def test_a_matrix_that_cannot_be_decided_is_refused(fields, param):
    error(decide(**fields), 400, param)


def test_the_game_lists_what_can_be_asked_for():
    game = get(make()[0], "/v1/game").json
    assert list(game["policies"]) == list(pricing.POLICIES)
    assert list(game["rules"]) == list(RULES) and game["keys"] == list(KEYS)
    for name, policy in game["policies"].items():
        told = {key: value["default"] for key, value in policy["parameters"].items()}
        assert told == pricing.defaults(name)
    assert game["sensitivity"] == list(pricing.SENSITIVITY)
    assert game["usage"]["output"] == list(scripted.USAGE.output)


def test_health_says_whether_the_engine_runs_and_nothing_that_is_private():
    app, engine = make()
    got = get(app, "/health")
    assert got.status == 200 and got.json["status"] == "ok" and b"secret" not in got.body
    engine.phase = "failed"
    assert (get(app, "/health").status, get(app, "/health").json["status"]) == (503, "failed")


def test_the_pages_files_are_served_and_no_other_files_and_nothing_from_elsewhere_may_run():
    app, _ = make()
    got = get(app, "/")
    assert got.status == 200 and got.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in got.headers["content-security-policy"]
    assert "unsafe" not in got.headers["content-security-policy"]
    names = re.findall(r'(?:src|href)="/?([\w.]+)"', got.body.decode())
    assert {name.rpartition(".")[2] for name in names} >= {"js", "css"}
    for name in names:
        assert get(app, f"/{name}").status == 200, name
    for path in ("/../api.py", "/api.py", "/page/index.html", "//", "/index.html/", "/docs"):
        error(get(app, path), 404)


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nothing", "/v1/nothing"])
def test_every_reply_has_the_headers_that_keep_others_out(path):
    got = get(make()[0], path)
    assert {name: got.headers[name] for name in SECURITY} == SECURITY
    assert not any(name.startswith("access-control") for name in got.headers)


def test_unknown_paths_and_methods_are_refused_in_the_same_form():
    app, _ = make()
    error(get(app, "/v1/nothing"), 404)
    got = get(app, "/v1/chat/completions")
    error(got, 405, code="method_not_allowed")
    assert got.headers["allow"] == "POST"
    error(asyncio.run(call(app, "DELETE", "/v1/models/tiny")), 405)
