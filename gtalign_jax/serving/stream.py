"""Work that ends when the client leaves: a reply in the making, a stream of server-sent events."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.responses import Response

from gtalign_jax.serving.gate import Disconnected, Message, Receive, Send

T = TypeVar("T")
SLOW_S = 30.0  # how long a client may leave a piece of a stream untaken
SILENCE_S = 15.0  # after which a comment keeps proxies from taking the stream for dead
STILL_HERE = b": still here\n\n"


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result. Raises Disconnected, with the work cancelled, when the client leaves."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


class EventStream(Response):
    """Sends `events` as they come; `end` is called however the stream ends, even unbegun."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], end: Callable[[], None]) -> None:
        self.events, self.end = events, end
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            await while_there(receive, self._pump(send))
        except (Disconnected, TimeoutError):  # it left, or takes nothing any more
            pass
        finally:
            self.end()
            await self.events.aclose()

    async def _pump(self, send: Callable[[Message], Awaitable[None]]) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        coming = asyncio.ensure_future(anext(self.events, b""))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=SILENCE_S)
                chunk = coming.result() if done else STILL_HERE
                async with asyncio.timeout(SLOW_S):
                    await send({
                        "type": "http.response.body", "body": chunk, "more_body": bool(chunk),
                    })  # fmt: skip
                if not chunk:
                    return
                if done:
                    coming = asyncio.ensure_future(anext(self.events, b""))
        finally:  # before anybody closes the events, nobody must be waiting for one
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
