"""What every request passes before the application sees it: key, shut-down, body, time.

    key        Authorization: Bearer KEY for all of /v1, compared in constant time, before any of
               the body is read
    shut-down  once the server is told to end, nothing new begins (503)
    body       at most `max_body_bytes`, counted as they arrive, whatever Content-Length says,
               within `body_s` seconds; outside /v1 none is read

The frameworks' own limit answers in plain text, and it reads before anybody asked for the key.
"""

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gtalign_jax.serving.errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

GUARDED = "/v1/"
SECURITY = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Disconnected(Exception):
    """The client left before its request was whole."""


class Traffic:
    """How many requests are inside, and whether more may come."""

    def __init__(self) -> None:
        self.closing = False
        self.inside = 0

    async def drain(self, grace_s: float) -> bool:
        """Lets nothing new in; True once all inside are done, False after `grace_s` seconds."""
        self.closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self.inside:
                    await asyncio.sleep(0.02)
        return not self.inside


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(
        self, app: Any, traffic: Traffic, key: bytes | None, max_body_bytes: int, body_s: float
    ) -> None:
        self.app, self.traffic, self.key = app, traffic, key
        self.max_body_bytes, self.body_s = max_body_bytes, body_s

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan; the server offers no websockets
            await self.app(scope, receive, send)
            return
        send = _secured(send)
        guarded = scope["path"].startswith(GUARDED)
        self.traffic.inside += guarded
        try:
            if guarded:
                self._admit(scope)
                if scope["method"] in ("POST", "PUT", "PATCH"):
                    receive = await self._body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except Disconnected:
            pass
        else:
            await self.app(scope, receive, send)
        finally:
            self.traffic.inside -= guarded

    def _admit(self, scope: MutableMapping[str, Any]) -> None:
        if self.key is not None:
            scheme, _, given = _header(scope, b"authorization").partition(b" ")
            right = hmac.compare_digest(given.strip(), self.key)
            if not (right and scheme.lower() == b"bearer"):
                raise ApiError(
                    401, "a key is needed: send it as Authorization: Bearer KEY",
                    headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
        if self.traffic.closing:
            raise ApiError(503, "the server is shutting down", headers=_LAST)

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> Receive:
        """Reads all of the body; returns a `receive` that gives it once, and then goes on."""
        length = _header(scope, b"content-length")
        too_large = ApiError(
            413, f"the body is larger than {self.max_body_bytes:,} bytes", headers=_LAST
        )
        if length.isdigit() and int(length[:20]) > self.max_body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_s):
                more = True
                while more:
                    part = await receive()
                    if part["type"] == "http.disconnect":
                        raise Disconnected
                    body += part.get("body", b"")
                    more = part.get("more_body", False)
                    if len(body) > self.max_body_bytes:
                        raise too_large
        except TimeoutError:
            said = f"the body did not arrive within {self.body_s:g} s"
            raise ApiError(408, said, headers=_LAST) from None
        whole = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def replay() -> Message:
            message = next(whole, None)
            return message if message is not None else await receive()

        return replay


_LAST = {"connection": "close"}  # what is left of the body must not be taken for a new request


def _header(scope: MutableMapping[str, Any], name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _secured(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = [(name.encode(), value.encode()) for name, value in SECURITY.items()]
            message["headers"] = [*message.get("headers", ()), *extra]
        await send(message)

    return with_headers
