"""A server that speaks just enough of the OpenAI chat protocol to answer every request alike.

    python -m benchmarks.fake_judge [--latency=2]

Prints its address, then serves until its input ends. Each answer comes `--latency` seconds after
its request, however many wait; a GET of /v1/stats says how many requests there were, and how many
at the same time.
"""

import argparse
import asyncio
import json
import sys

ANSWER = {
    "id": "x", "object": "chat.completion", "created": 0, "model": "fake",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {
        "role": "assistant",
        "content": "The response does what was asked, with small weaknesses in the second half. "
                   "<verdict>1</verdict>"}}],
    "usage": {"prompt_tokens": 900, "completion_tokens": 24, "total_tokens": 924},
}  # fmt: skip


class FakeJudge:
    """Answers any number of connections, which stay open."""

    def __init__(self, latency_s: float):
        self._latency_s = latency_s
        self.asked = self.now = self.most = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(_length(head))
                answer = await self._answer() if head.startswith(b"POST") else self._stats()
                body = json.dumps(answer).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                             b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):  # the client has gone
            pass
        finally:
            writer.close()

    async def _answer(self) -> dict:
        self.asked, self.now = self.asked + 1, self.now + 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self._latency_s)
        self.now -= 1
        return ANSWER

    def _stats(self) -> dict:
        return {"asked": self.asked, "most": self.most}


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def _serve(latency_s: float) -> None:
    server = await asyncio.start_server(FakeJudge(latency_s).serve, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--latency", type=float, default=2.0, help="seconds")
    asyncio.run(_serve(parser.parse_args(argv).latency))
    return 0


if __name__ == "__main__":
    sys.exit(main())
