"""An engine that plays from a script, a client without a network, and a server with one.

The engine has the interface of `serving.engine.Engine`, so that what happens rarely (a full queue,
a deadline, a fault in the middle of a reply) happens when a test wants it.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tiny

from gtalign_jax import serve
from gtalign_jax.data import builtin
from gtalign_jax.data.coldstart import cold_start_examples
from gtalign_jax.data.tokenizer import chain_corpus, train_tokenizer
from gtalign_jax.game import pricing
from gtalign_jax.game.chain import KEYS, render
from gtalign_jax.game.pricing import Usage
from gtalign_jax.game.steering import SteeringConfig
from gtalign_jax.rollout.player import Player
from gtalign_jax.rollout.splice import plan
from gtalign_jax.serving.api import ApiConfig, create_app
from gtalign_jax.serving.batch import Answer, Ask
from gtalign_jax.serving.chat import Service
from gtalign_jax.serving.engine import Delta, EngineConfig

# A clarifying question costs a second turn: dear tokens turn the choice from CQ to DA.
USAGE = Usage((100.0, 230.0, 100.0), (60.0, 130.0, 90.0))
PAYOFF = {key: {"LLM": 1, "user": 1} for key in KEYS} | {
    "VQ_DA": {"LLM": 2, "user": 2}, "VQ_CQ": {"LLM": 3, "user": 3},
}  # fmt: skip
RESPONSE = "Which one — the café's or Anna's?"
CHAIN = render("It is vague.", PAYOFF, "VQ_CQ is best.", RESPONSE)


@functools.cache
def player() -> Player:
    """A real tokenizer; the weights are never used."""
    prompts = builtin.generate("train", 60, 0)
    tokenizer = train_tokenizer(chain_corpus(cold_start_examples(prompts, 0)), 500)
    return Player("tiny", tiny.CFG, {}, tokenizer, (), None, "brief", USAGE)


@dataclasses.dataclass
class Script:
    """What happens to a request.

    refuse: raised by `submit`. text: the completion. fault: raised after `before` characters.
    held: nothing after `before` characters until it is set.
    """

    text: str = CHAIN
    refuse: Exception | None = None
    fault: Exception | None = None
    held: asyncio.Event | None = None
    before: int = 0
    finish_reason: str = "stop"


class Ticket:
    def __init__(self, ask: Ask, script: Script) -> None:
        self.ask, self.script = ask, script
        self.cancelled = self.answered = False

    def cancel(self) -> None:
        self.cancelled = self.cancelled or not self.answered

    async def __aiter__(self):
        script, tokenizer = self.script, player().tokenizer
        text, outcome, forced = script.text, None, ()
        if self.ask.steering is not None:
            text, outcome, forced = self._steered(text)
        for at in range(0, len(text), 3):
            if at >= script.before:
                if script.held is not None:
                    await script.held.wait()
                if script.fault is not None:
                    raise script.fault
            yield Delta(text[at : at + 3])
            await asyncio.sleep(0)
        self.answered = True
        yield Answer(
            text, tuple(tokenizer(text).input_ids), forced, script.finish_reason,
            len(self.ask.prompt_ids), outcome,
        )  # fmt: skip

    def _steered(self, text: str):
        """As the engine: plan at the end of the matrix, and go on with other words."""
        tokenizer = player().tokenizer
        head, closing, rest = text.partition("</payoff>")
        ids = tokenizer(head + closing).input_ids
        splice = plan(tokenizer, ids, self.ask.steering, 10_000)
        if not splice.outcome.steered:
            return text, splice.outcome, ()
        before = tokenizer.decode(ids[: splice.keep]) + tokenizer.decode(splice.forced)
        forced = ((splice.keep, splice.keep + len(splice.forced)),)
        return before + "It is 4.</response>", splice.outcome, forced


class Engine:
    """Takes the scripts in turn, the last one for ever."""

    def __init__(self, *scripts: Script, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig(prompt_tokens=200, new_tokens=64)
        self.scripts, self.tickets = list(scripts or (Script(),)), []
        self.phase = "running"

    def submit(self, ask: Ask) -> Ticket:
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        if script.refuse is not None:
            raise script.refuse
        self.tickets.append(Ticket(ask, script))
        return self.tickets[-1]

    async def stop(self, grace_s: float) -> None:
        """What still runs goes on to its fault."""
        for ticket in self.tickets:
            if ticket.script.held is not None:
                ticket.script.held.set()

    def state(self) -> dict[str, Any]:
        return {"phase": self.phase, "error": "/secret/path", "busy": 0}


def service(engine: Any, price: str = "none", **settings: Any) -> Service:
    config = SteeringConfig(pricing=pricing.read(price), usage=USAGE)
    return Service(player(), engine, "tiny", config, **settings)


@functools.cache
def _made(config: ApiConfig, steered: bool, price: str):
    engine = Engine()
    return create_app(service(engine, price, steered=steered), config), engine


def make(*scripts: Script, config: ApiConfig | None = None, steered: bool = False,
         price: str = "none"):
    """(application, engine), made once for each config and then only told another script: building
    an application takes longer than most requests."""
    app, engine = _made(config or ApiConfig(), steered, price)
    engine.__init__(*scripts)
    app.state.traffic.__init__()
    return app, engine


@contextlib.contextmanager
def serving(service: Service, config: ApiConfig, grace_s: float = 10):
    """The URL of a server in a thread of its own; ends it as SIGTERM would."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = serve.Server(create_app(service, config), service.engine, listener, grace_s)
    thread = threading.Thread(target=lambda: asyncio.run(server.run()), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it began"
            time.sleep(0.01)
        yield server
    finally:
        with contextlib.suppress(RuntimeError):  # a test has ended it
            server.loop.call_soon_threadsafe(server.end)
        thread.join(30)
        assert not thread.is_alive()
        listener.close()


@dataclasses.dataclass
class Got:
    """A response as it came: `parts` are what `send` was called with."""

    status: int = 0
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    parts: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """What each server-sent event carries; the last one may be "[DONE]"."""
        lines = self.body.decode().split("\n\n")
        assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
        data = [line.removeprefix("data: ") for line in lines]
        return [one if one == "[DONE]" else json.loads(one) for one in data]


async def call(
    app: Callable, method: str, path: str, body: bytes | Sequence[bytes] = b"",
    headers: Mapping[str, str] | None = None, leave: asyncio.Event | None = None,
    arrived: asyncio.Event | None = None, pieces: int = 1,
) -> Got:  # fmt: skip
    """One request. A body in several pieces is sent as chunks; the client goes when `leave` is set;
    `arrived` is set with so many `pieces` of the reply's body."""
    to_send = [body] if isinstance(body, bytes) else list(body)
    given = {"content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "scheme": "http", "client": ("127.0.0.1", 1), "server": ("test", 80),
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items()],
    }  # fmt: skip
    got, over = Got(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if to_send:
            piece = to_send.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(to_send)}
        await (over if leave is None else leave).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            got.status = message["status"]
            got.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            got.parts.append(message.get("body", b""))
            if arrived is not None and len(got.parts) >= pieces:
                arrived.set()

    try:
        await app(scope, receive, send)
    finally:
        over.set()
    return got


def ask(**fields: Any) -> bytes:
    """A chat completion's body."""
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    return json.dumps({"model": "tiny", "messages": messages, **fields}).encode()


def post(app: Callable, body: bytes | Sequence[bytes], path: str = "/v1/chat/completions", **more):
    return asyncio.run(call(app, "POST", path, body, **more))


def get(app: Callable, path: str, **more) -> Got:
    return asyncio.run(call(app, "GET", path, **more))


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
