"""The endpoints over an engine that plays from a script: replies, streams, the game, the page."""

import asyncio
import json
import re

import pytest
import scripted
from scripted import CHAIN, PAYOFF, RESPONSE, Script, ask, call, error, get, make, post

from gtalign_jax.data import asking
from gtalign_jax.data.chat import encode_chat
from gtalign_jax.game import pricing
from gtalign_jax.game.chain import KEYS
from gtalign_jax.game.decide import RULES
from gtalign_jax.serving.gate import SECURITY
from gtalign_jax.serving.stream import STILL_HERE

DEAR = "per_token:output=3000"


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
