"""A judge's server on loopback that fails as servers do, and remembers who asked what and when.

It speaks the OpenAI chat protocol. What it does to a request is a function of the request: by
default the graded response is an order (`obey`), else a seeded plan (`Plan`).
"""

import contextlib
import email.utils
import html
import itertools
import json
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gtalign_jax.reward.http_judge import HttpJudge
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import JudgeRequest

# Failures of a server and its network, of what it says, and of how the model says it.
SERVER_FAULTS = (
    "rate_limit", "rate_limit_date", "server", "hang", "drip", "half", "reset", "close", "html",
    "half_json", "no_choices", "null_text", "odd_choices", "wrong_model", "not_found",
)  # fmt: skip
SAID_FAULTS = (
    "garbage", "no_verdict", "other_words", "off_scale", "truncated", "refused", "filtered",
    "thinking",
)  # fmt: skip
FAULTS = (*SERVER_FAULTS, *SAID_FAULTS)
SLOW_S = 0.3


def unframed(shown: str) -> str:
    """The text that stands in a frame of a prompt, as it was before."""
    spelt = html.unescape(shown)
    return re.sub(r"\[U\+([0-9A-F]{4,6})\]", lambda found: chr(int(found[1], 16)), spelt)


@dataclass
class Asked:
    """A request as the server saw it; times are of the monotonic clock.

    Attributes:
      count: how often the same prompt had been asked, this time included.
      running: requests under way when it came, itself included.
      fault: what was done to it, "" if it was answered well. ended: when that was over.
    """

    body: dict[str, Any]
    authorization: str | None
    connection: int
    at: float
    count: int = 1
    running: int = 1
    fault: str = ""
    ended: float | None = None

    @property
    def prompt(self) -> str:
        """What the user's turn says."""
        return self.body["messages"][-1]["content"]

    @property
    def parts(self) -> dict[str, str]:
        """The material by the name of its frame, as it was before it was framed."""
        frames = re.findall(r"<(\w+)>\n(.*?)\n</\1>", self.prompt, re.S)
        return {name: unframed(text) for name, text in frames}

    @property
    def response(self) -> str:
        """What is graded."""
        parts = self.parts
        return parts["response"] if "response" in parts else parts["analysis"]


def obey(asked: Asked) -> str:
    """The graded response is the order: "say TEXT", or the name of a fault, which "once" or
    "twice" after it ends. Anything else is answered well."""
    order, _, times = asked.response.partition(" ")
    if order == "say":
        return asked.response
    known = order in FAULTS or order == "slow" or order.isdigit()
    over = asked.count > {"once": 1, "twice": 2}.get(times, asked.count)
    return order if known and not over else ""


@dataclass(frozen=True)
class Plan:
    """A share of all requests fails, each in a way and at a time that the seed decides: the same
    prompts fail in the same way at the same attempt, in whatever order they come."""

    share: float
    seed: int = 0
    faults: Sequence[str] = FAULTS

    def __call__(self, asked: Asked) -> str:
        dice = random.Random(f"{self.seed}/{asked.count}/{asked.prompt}")
        return dice.choice(self.faults) if dice.random() < self.share else ""


def full_marks(asked: Asked) -> str:
    """A grade for everybody."""
    return "1"


@dataclass
class Settings:
    """How a server behaves.

    Attributes:
      behave: what is done to a request: "" (answered well), a fault's name, a status, "slow", or
        "say TEXT". grade: of a request that is answered well.
      models: what it lists. latency_s: of a good answer. retry_after: seconds, as it says them.
      usage: tokens that an answer says it took. echo: it repeats the authorization in all it says.
    """

    behave: Callable[[Asked], str] = obey
    grade: Callable[[Asked], str] = full_marks
    models: Sequence[str] = ("judge-1",)
    latency_s: float = 0.0
    retry_after: str = "1"
    usage: int | None = None
    echo: bool = False


class JudgeServer(ThreadingHTTPServer):
    """Serves from a thread of its own between `start` and `stop`."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, settings: Settings, port: int = 0):
        self.settings, self.lock, self.over = settings, threading.Lock(), threading.Event()
        self.running, self.connections, self.sockets = 0, itertools.count(), set()
        self.all_asked, self.seen = [], {}
        super().__init__(("127.0.0.1", port), _Handler)
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """As a server that dies: connections are cut, nobody listens any more."""
        self.over.set()
        self.shutdown()
        self.server_close()
        with self.lock:
            for open_socket in self.sockets:
                with contextlib.suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()

    def handle_error(self, request, client_address):
        """Clients that gave up are part of the test."""

    @property
    def asked(self) -> list[Asked]:
        """All requests so far."""
        with self.lock:
            return list(self.all_asked)

    def counts(self) -> dict[str, int]:
        """How often each response was to be graded."""
        counts: dict[str, int] = {}
        for asked in self.asked:
            counts[asked.response] = counts.get(asked.response, 0) + 1
        return counts


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        """Silence."""

    def setup(self):
        super().setup()
        self.number = next(self.server.connections)
        with self.server.lock:
            self.server.sockets.add(self.request)

    def finish(self):
        with self.server.lock:
            self.server.sockets.discard(self.request)
        super().finish()

    def do_GET(self):
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "test"}
                  for name in self.server.settings.models]
        if self.server.settings.echo:
            return self.refuse(401, f"no such key: {self.headers['authorization']}")
        return self.reply(200, {"object": "list", "data": models})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server, settings = self.server, self.server.settings
        asked = Asked(body, self.headers["authorization"], self.number, time.monotonic())
        with server.lock:
            asked.count = server.seen[asked.prompt] = server.seen.get(asked.prompt, 0) + 1
            server.all_asked.append(asked)
            server.running += 1
            asked.running = server.running
        try:
            asked.fault = settings.behave(asked)
            self.serve(asked)
        finally:
            with server.lock:
                server.running -= 1
                asked.ended = time.monotonic()

    def serve(self, asked: Asked) -> None:
        settings, fault = self.server.settings, asked.fault
        server_over = self.server.over
        server_over.wait(SLOW_S if fault == "slow" else settings.latency_s)
        if self.path != "/v1/chat/completions":
            return self.refuse(404, "no such path")
        if fault.isdigit():
            return self.refuse(int(fault), "not so")
        if fault.startswith("say "):
            return self.say(fault[4:], asked)
        if fault and fault != "slow":
            return getattr(self, f"fault_{fault}")(asked)
        return self.say(f"Thought over.\n<verdict>{settings.grade(asked)}</verdict>", asked)

    def fault_rate_limit(self, asked):
        self.refuse(429, "too many", {"Retry-After": self.server.settings.retry_after})

    def fault_rate_limit_date(self, asked):
        then = time.time() + float(self.server.settings.retry_after)
        self.refuse(429, "too many", {"Retry-After": email.utils.formatdate(then, usegmt=True)})

    def fault_server(self, asked):
        self.refuse(500, "broken")

    def fault_not_found(self, asked):
        self.refuse(404, f"The model `{asked.body['model']}` does not exist.")

    def fault_hang(self, asked):
        self.server.over.wait(60)
        self.close_connection = True

    def fault_drip(self, asked):
        """A byte now and then keeps a time-out of each read from firing."""
        self.send_response(200)
        self.send_header("content-length", "100000")
        self.end_headers()
        self.close_connection = True
        while not self.server.over.wait(0.05):
            self.wfile.write(b" ")

    def fault_half(self, asked):
        """The connection ends in the middle of a good answer."""
        data = json.dumps(chat(asked, "<verdict>1</verdict>")).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:len(data) // 2])
        self.close_connection = True

    def fault_reset(self, asked):
        """A linger of 0 s makes closing a reset."""
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.request.detach())  # at once: the base class would say goodbye first
        self.close_connection = True

    def fault_close(self, asked):
        self.close_connection = True

    def fault_html(self, asked):
        self.send(200, b"<html><verdict>1</verdict> proxy error</html>", "text/html")

    def fault_half_json(self, asked):
        self.send(200, b'{"choices": [{"message": {"content": "<verdict>1</ver', "application/json")

    def fault_no_choices(self, asked):
        self.reply(200, chat(asked, "") | {"choices": []})

    def fault_odd_choices(self, asked):
        """What no client of a typed protocol expects; another kind each time."""
        odd = ["text", [1], [None], {"0": 1}, [{"message": "text"}], [[]], 7, [{"message": []}]]
        self.reply(200, chat(asked, "") | {"choices": odd[asked.count % len(odd)]})

    def fault_null_text(self, asked):
        self.say(None, asked)

    def fault_wrong_model(self, asked):
        self.reply(200, chat(asked, "<verdict>1</verdict>") | {"model": "another"})

    def fault_garbage(self, asked):
        self.say("\ufffd\x00 }{ <verdict><verdict> \ud800 </verdict> 1 0", asked)

    def fault_no_verdict(self, asked):
        self.say("I like it: 1 out of 1.", asked)

    def fault_other_words(self, asked):
        self.say("<verdict>excellent</verdict>\n**Verdict: 1**\n<Verdict>1</Verdict>", asked)

    def fault_off_scale(self, asked):
        self.say("<verdict>1</verdict>, or in percent: <verdict>100</verdict>", asked)

    def fault_truncated(self, asked):
        self.say("<verdict>1</verdict>? Let me see once more: it", asked, "length")

    def fault_filtered(self, asked):
        self.say("<verdict>1</verdict>", asked, "content_filter")

    def fault_refused(self, asked):
        answer = chat(asked, "<verdict>0</verdict>")
        answer["choices"][0]["message"]["refusal"] = "I cannot help with that."
        self.reply(200, answer)

    def fault_thinking(self, asked):
        self.say("<think>It could be <verdict>1</verdict>", asked)

    def say(self, text: str | None, asked: Asked, finish: str = "stop") -> None:
        if self.server.settings.echo:
            text = f"You are {asked.authorization}. {text}"
        answer = chat(asked, text, finish)
        if self.server.settings.usage is not None:
            answer["usage"] = {"prompt_tokens": 0, "completion_tokens": 0,
                               "total_tokens": self.server.settings.usage}
        self.reply(200, answer)

    def refuse(self, status: int, why: str, headers: dict[str, str] | None = None) -> None:
        if self.server.settings.echo:
            why = f"{self.headers['authorization']}: {why}"
        self.reply(status, {"error": {"message": why, "type": "test", "code": None}}, headers)

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), "application/json", headers)

    def send(self, status, data, kind, headers=None):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def chat(asked: Asked, text: str | None, finish: str = "stop") -> dict[str, Any]:
    """An answer of the protocol."""
    message = {"role": "assistant", "content": text}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": asked.body["model"],
            "choices": [{"index": 0, "finish_reason": finish, "message": message}]}


@contextlib.contextmanager
def serving(port: int = 0, **settings: Any) -> Iterator[JudgeServer]:
    """A server with these `Settings`."""
    server = JudgeServer(Settings(**settings), port)
    try:
        yield server
    finally:
        if not server.over.is_set():
            server.stop()


def config(*servers: JudgeServer, **fields: Any) -> JudgeConfig:
    """A client's config for these servers: eight at a time, three retries."""
    urls = ",".join(server.url for server in servers)
    usual = {"kind": "http", "base_url": urls, "model": "judge-1", "concurrency": 8,
             "timeout_s": 20.0, "retries": 3}
    return JudgeConfig(**(usual | fields))


@contextlib.contextmanager
def asking(*servers: JudgeServer, **fields: Any) -> Iterator[HttpJudge]:
    """A client of these servers, closed in the end."""
    judge = HttpJudge(config(*servers, **fields))
    try:
        yield judge
    finally:
        judge.close()


def request(response: str = "r", source: str = "ambig_qa", **fields: Any) -> JudgeRequest:
    """To grade a response on the scale 0, 1."""
    usual = {"question": "the question", "ground_truth": "singleAnswer###truth"}
    return JudgeRequest("quality", source, response=response, **(usual | fields))


def most_within(window_s: float, times: Sequence[float], weights: Sequence[float] = ()) -> float:
    """The largest sum of weights (1 each, if none are given) in any window of so many seconds."""
    weights = weights or [1.0] * len(times)
    events = sorted(zip(times, weights, strict=True))
    return max(
        sum(weight for at, weight in events[i:] if at < began + window_s)
        for i, (began, _) in enumerate(events)
    )

