"""What every request passes first: key, shut-down, the body's size, kind and time."""

import asyncio
import hmac

import pytest
from scripted import Script, ask, call, get, make, post

from gtalign_jax.serving.api import ApiConfig

KEY = "s3cret-key"
LOCKED = ApiConfig(key=KEY)
SMALL = ApiConfig(max_body_bytes=400, body_s=0.1)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong"), bearer(""), bearer(KEY + "x"), bearer(KEY[:-1]), bearer("schlüssel"),
     {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, {"x-api-key": KEY}],
    ids=str,
)  # fmt: skip
def test_without_the_key_nothing_of_the_interface_is_reached(headers):
    app, engine = make(config=LOCKED)
    for got in (
        post(app, ask(), headers=headers), post(app, b"{}", "/v1/game/decide", headers=headers),
        get(app, "/v1/models", headers=headers), get(app, "/v1/game", headers=headers),
        get(app, "/v1/nothing", headers=headers),
    ):  # fmt: skip
        assert got.status == 401 and got.headers["www-authenticate"] == "Bearer"
        assert got.json["error"]["code"] == "invalid_api_key"
        assert KEY.encode() not in got.body
    assert not engine.tickets


def test_with_the_key_all_of_it_is_and_the_page_needs_none():
    app, _ = make(config=LOCKED)
    assert post(app, ask(), headers=bearer(KEY)).status == 200
    assert get(app, "/v1/models", headers={"authorization": f"bearer  {KEY} "}).status == 200
    for path in ("/", "/health", "/openapi.json"):
        assert get(app, path).status == 200
    assert get(app, "/openapi.json").json["components"]["securitySchemes"]


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared, honest = [], hmac.compare_digest

    def compare(one, other):
        compared.append({one, other})
        return honest(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    app, _ = make(config=LOCKED)
    assert get(app, "/v1/models", headers=bearer("wrong")).status == 401
    assert get(app, "/v1/models").status == 401
    assert compared == [{b"wrong", KEY.encode()}, {b"", KEY.encode()}]


def test_the_key_is_not_shown_and_must_fit_into_a_header():
    assert KEY not in repr(LOCKED)
    for key in ("a\nb", "schlüssel"):
        with pytest.raises(ValueError, match="printable ASCII") as caught:
            ApiConfig(key=key)
        assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (ask(user="x" * 400), {}),
        (ask(user="x" * 400), {"content-length": "10"}),
        ([b"x" * 100] * 5, {"transfer-encoding": "chunked"}),
        (b"", {"content-length": "401"}),
        (b"", {"content-length": "9" * 30}),
    ],
    ids=["no length", "a length that lies", "chunks", "length alone", "an endless length"],
)
def test_a_body_beyond_the_limit_is_refused_however_it_comes(body, headers):
    app, engine = make(config=SMALL)
    got = post(app, body, headers=headers)
    assert got.status == 413 and got.json["error"]["code"] == "body_too_large"
    assert "400 bytes" in got.json["error"]["message"] and got.headers["connection"] == "close"
    assert not engine.tickets


def test_no_more_of_a_body_is_read_than_the_limit():
    app, _ = make(config=SMALL)
    pieces = [b"x" * 100] * 50
    taken = []

    class Counted(list):
        def pop(self, at):
            taken.append(at)
            return super().pop(at)

    asyncio.run(_post_pieces(app, Counted(pieces)))
    assert len(taken) == 5


async def _post_pieces(app, pieces):
    async def receive():
        return {"type": "http.request", "body": pieces.pop(0), "more_body": True}

    async def send(message):
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions",
             "headers": [(b"content-type", b"application/json")]}
    await app(scope, receive, send)


@pytest.mark.parametrize(("path", "status"), [("/", 405), ("/health", 405), ("/other", 404)])
def test_outside_the_interface_no_body_is_read(path, status):
    app, _ = make(config=SMALL)
    assert post(app, [b"x" * 100] * 5, path).status == status  # read, it would be too large: 413


def test_a_body_in_pieces_within_the_limit_is_put_together():
    app, _ = make(config=SMALL)
    body = ask()
    assert post(app, [body[:10], b"", body[10:]]).status == 200


def test_a_body_that_does_not_arrive_is_waited_for_no_longer_than_allowed():
    app, engine = make(config=SMALL)

    async def stall():
        never = asyncio.Event()
        sent = []

        async def receive():
            await never.wait()

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions",
                 "headers": [(b"content-type", b"application/json")]}
        await asyncio.wait_for(app(scope, receive, send), 30)
        return sent

    start, *_ = asyncio.run(stall())
    assert start["status"] == 408 and not engine.tickets


def test_a_client_that_leaves_before_its_body_is_whole_is_forgotten():
    app, engine = make()

    async def leave():
        messages = [{"type": "http.request", "body": b"{", "more_body": True},
                    {"type": "http.disconnect"}]
        sent = []

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions",
                 "headers": [(b"content-type", b"application/json")]}
        await app(scope, receive, send)
        return sent

    assert asyncio.run(leave()) == [] and not engine.tickets
    assert app.state.traffic.inside == 0


@pytest.mark.parametrize("kind", [
    "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/jsonp", "json", ";;;", "text/plain; application/json",
])  # fmt: skip
def test_only_json_is_read_so_that_other_sites_cannot_send_it(kind):
    got = post(make()[0], ask(), headers={"content-type": kind})
    assert got.status == 415 and got.json["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_by_any_of_its_spellings_is(kind):
    assert post(make()[0], ask(), headers={"content-type": kind}).status == 200


def test_a_server_that_ends_lets_finish_what_runs_and_nothing_new_in():
    async def scene():
        held = asyncio.Event()
        app, engine = make(Script(held=held), Script())
        running = asyncio.create_task(call(app, "POST", "/v1/chat/completions", ask()))
        while not engine.tickets:
            await asyncio.sleep(0)
        drained = asyncio.create_task(app.state.traffic.drain(30))
        await asyncio.sleep(0)
        refused = await call(app, "POST", "/v1/chat/completions", ask())
        health = await call(app, "GET", "/health")
        assert not drained.done()
        held.set()
        return await running, refused, health, await drained

    running, refused, health, drained = asyncio.run(asyncio.wait_for(scene(), 30))
    assert running.status == 200 and drained
    assert refused.status == 503 and refused.json["error"]["code"] == "unavailable"
    assert health.status == 503 and health.json["status"] == "closing"


def test_what_does_not_finish_in_time_is_not_waited_for():
    async def scene():
        leave = asyncio.Event()
        app, engine = make(Script(held=asyncio.Event()))
        request = asyncio.create_task(
            call(app, "POST", "/v1/chat/completions", ask(), leave=leave)
        )
        while not engine.tickets:
            await asyncio.sleep(0)
        drained = await app.state.traffic.drain(0.05)
        leave.set()
        await request
        return drained

    assert asyncio.run(asyncio.wait_for(scene(), 30)) is False
