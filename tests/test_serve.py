"""The server as clients meet it: a real engine behind a real socket.

The model writes chains though nobody trained it (tests/writer.py); it is compiled once.
"""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import writer
from scripted import serving

from gtalign_jax.game import pricing
from gtalign_jax.game.steering import SteeringConfig
from gtalign_jax.serving.api import ApiConfig
from gtalign_jax.serving.chat import Service
from gtalign_jax.serving.engine import Engine, EngineConfig

ROOT = Path(__file__).resolve().parent.parent
# Few widths, so few programs to compile.
SIZES = EngineConfig(slots=2, queue=2, prompt_tokens=32, new_tokens=128, burst=4, deadline_s=300)
QUESTION = [{"role": "user", "content": "Why?"}]
DEAR = "per_token:output=3000"


@pytest.fixture(scope="module")
def server():
    engine = Engine(writer.player(), SIZES)
    engine.start()
    config = SteeringConfig(pricing=pricing.read("none"), usage=writer.USAGE)
    service = Service(writer.player(), engine, "writer", config)
    with serving(service, ApiConfig()) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def state(server) -> dict:
    with urllib.request.urlopen(f"{server.url}/health") as reply:
        return json.load(reply)["engine"]


def until(server, what, seconds: float = 60) -> None:
    """Waits for the engine to be in some state."""
    deadline = time.monotonic() + seconds
    while not what(state(server)):
        assert time.monotonic() < deadline, state(server)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def steerable(server) -> int:
    """A seed with which the model writes a matrix that can be read."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        for seed in range(50):
            reply = client.chat.completions.create(model="writer", messages=QUESTION, seed=seed)
            if "written" in reply.choices[0].message.gtalign:
                return seed
    raise AssertionError("no seed of fifty writes a matrix")


# ------------------------------------------------------------------------- the official client


def test_the_official_client_lists_and_retrieves_the_model(client):
    assert [model.id for model in client.models.list()] == ["writer"]
    assert client.models.retrieve("writer").owned_by == "gtalign_jax"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


def test_the_official_client_gets_a_reply_and_the_same_one_again_and_streamed(client, steerable):
    ask = {"model": "writer", "messages": QUESTION, "seed": steerable}
    reply = client.chat.completions.create(**ask)
    (choice,) = reply.choices
    game = choice.message.gtalign
    assert choice.finish_reason == "stop" and choice.message.role == "assistant"
    inside = game["chain"].partition("<response>")[2].partition("</response>")[0]
    assert choice.message.content == inside.strip() != ""
    assert not game["steered"] and game["seed"] == steerable
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert client.chat.completions.create(**ask).choices[0].message == choice.message

    *chunks, last = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    told = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(told) == choice.message.content and max(map(len, told)) < len(inside)
    assert chunks[-1].choices[0].delta.gtalign == game
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage == reply.usage


def test_prices_given_by_the_official_client_change_what_is_done(client, steerable):
    ask = {"model": "writer", "messages": QUESTION, "seed": steerable}
    plain = client.chat.completions.create(**ask).choices[0].message.gtalign
    reply = client.chat.completions.create(**ask, extra_body={"pricing": DEAR})
    game = reply.choices[0].message.gtalign
    assert game["steered"], game["reason"]
    assert game["changed"] and game["written"] == plain["written"]
    assert (game["before"]["action"], game["decision"]["action"]) == ("CQ", "DA")
    assert "VQ_DA is best." in game["chain"]
    ((first, last),) = game["forced"]
    assert 0 < first < last <= reply.usage.completion_tokens
    free = client.chat.completions.create(**ask, extra_body={"pricing": "none"})
    same = free.choices[0].message.gtalign
    assert same["chain"] == plain["chain"] and not same["steered"] and same["reason"]
    *_, chunk = client.chat.completions.create(**ask, stream=True, extra_body={"pricing": DEAR})
    assert chunk.choices[0].delta.gtalign == game


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError),
        ({"max_tokens": 10_000}, openai.BadRequestError),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError),
        ({"extra_body": {"pricing": "flat"}}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "long " * 100}]}, openai.BadRequestError),
    ],
)
def test_the_official_client_knows_refusals_for_what_they_are(client, fields, kind):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**({"model": "writer", "messages": QUESTION} | fields))
    assert caught.value.code and caught.value.param in {*fields, "pricing"}


def test_more_requests_than_the_queue_holds_are_told_to_come_back_and_then_all_are_served(server):
    def one(seed: int) -> str:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=30) as patient:
            reply = patient.chat.completions.create(
                model="writer", messages=QUESTION, seed=seed, temperature=1.5
            )
            return reply.choices[0].message.gtalign["chain"]

    before = state(server)
    with ThreadPoolExecutor(12) as pool:
        chains = list(pool.map(one, range(12)))
    after = state(server)
    assert len(chains) == 12 and all(chains)
    assert after["finished"] - before["finished"] == 12
    assert after["refused"] > before["refused"]
    assert after["busy"] == after["queued"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slots(server, stream, monkeypatch):
    batch = server.engine._batch
    run, inside, go_on = batch.run, threading.Event(), threading.Event()

    def held():
        inside.set()
        assert go_on.wait(60)
        return run()

    monkeypatch.setattr(batch, "run", held)  # so that no reply is done before the client has left
    before = state(server)
    body = json.dumps({"model": "writer", "messages": QUESTION, "stream": stream, "n": 2}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" \
           f"Content-Length: {len(body)}\r\n\r\n"
    try:
        with socket.create_connection(server.address) as raw:
            raw.sendall(head.encode() + body)
            until(server, lambda now: now["busy"] + now["queued"] == 2)
            assert inside.wait(60)
            tickets = list(server.engine._running.values())
        deadline = time.monotonic() + 60
        while not all(ticket.cancelled for ticket in tickets):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        go_on.set()
    until(server, lambda now: now["busy"] == now["queued"] == 0)
    after = state(server)
    ended = {name: after[name] - before[name] for name in ("finished", "cancelled", "failed")}
    assert ended == {"finished": 0, "cancelled": 2, "failed": 0}


# ----------------------------------------------------------------------------------------- curl


@pytest.fixture(scope="module")
def curl():
    path = shutil.which("curl")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have curl")
        pytest.skip("no curl")

    def run(*words: str, data: bytes = b"") -> bytes:
        done = subprocess.run([path, "-sS", "--max-time", "60", *words], input=data, timeout=90,
                              capture_output=True, check=True)
        return done.stdout

    return run


JSON = ("-H", "Content-Type: application/json")


def test_curl_gets_a_reply_a_stream_and_a_decision(server, curl, steerable):
    url = f"{server.url}/v1/chat/completions"
    ask = {"model": "writer", "messages": QUESTION, "seed": steerable}
    whole = json.loads(curl(url, *JSON, "-d", json.dumps(ask)))
    lines = curl("-N", url, *JSON, "-d", json.dumps(ask | {"stream": True})).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    message = whole["choices"][0]["message"]
    assert text == message["content"] != ""
    asked = json.dumps({"payoff": message["gtalign"]["written"], "pricing": DEAR})
    found = json.loads(curl(f"{server.url}/v1/game/decide", *JSON, "-d", asked))
    assert found["decision"]["action"] == "DA"


def test_curl_is_refused_with_a_body_that_is_too_large_chunked_or_not(server, curl):
    large = b'{"model": "' + b"x" * (1 << 20) + b'"}'
    for how in ((), ("-H", "Transfer-Encoding: chunked")):
        reply = curl("-w", "\n%{http_code}", f"{server.url}/v1/chat/completions", *JSON, *how,
                     "--data-binary", "@-", data=large)
        assert reply.rsplit(b"\n", 1)[1] == b"413"


def test_a_length_that_lies_and_no_http_at_all_do_no_harm(server):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for said in (
        head + b"Content-Length: 500\r\n\r\n{}", head + b"Content-Length: -1\r\n\r\n",
        head + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}{", b"\0\xff nothing \r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):  # fmt: skip
        with socket.create_connection(server.address) as raw:
            raw.sendall(said)
            raw.shutdown(socket.SHUT_WR)
            reply = b""
            while piece := raw.recv(65536):
                reply += piece
        assert not reply.startswith(b"HTTP/1.1 5"), reply
    assert state(server)["phase"] == "running"
