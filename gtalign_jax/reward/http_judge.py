"""A language model as judge, behind servers that speak the OpenAI chat protocol.

At most `concurrency` attempts are in flight, over all calls of the judge at once, and never more
requests or tokens a minute than allowed. An attempt that fails is repeated, elsewhere if there are
several servers, after
    2**attempt / 2 s, at most 30 s, times a random factor between 0.5 and 1
or when the server wants it. What still fails, or is late for the step, is missing, never 0.

All requests of a process go through one event loop in a thread of its own, so that connections and
limits outlive a call, and calls from several threads share them.
"""

import asyncio
import dataclasses
import functools
import random
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import openai

from gtalign_jax.reward import prompts
from gtalign_jax.reward.endpoints import Attempt, Endpoint, choose
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judgement, JudgeRequest, missing
from gtalign_jax.reward.limits import Limits

MAX_DELAY_S = 30.0
CHARS_PER_TOKEN = 3.0  # a cautious guess for the limit of tokens, until the server has counted

Told = Callable[[int, Judgement], None]


class HttpJudge:
    """Callable judge; see the module. Safe to call from any thread, also inside an event loop."""

    def __init__(self, cfg: JudgeConfig):
        self._cfg = cfg
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, requests: Sequence[JudgeRequest],
                 told: Told = lambda i, judgement: None) -> list[Judgement]:
        """One Judgement per request, in order; raises for no answer of a server.

        `told` hears of each as it comes, with the request's number, in a thread of the judge's.
        """
        return self._run(self._all(requests, told)) if requests else []

    def models(self) -> dict[str, list[str] | str]:
        """By server's address: the models that it lists, or why it lists none."""
        return self._run(self._models())

    def close(self) -> None:
        """Closes the connections, and ends the thread."""
        with self._starting:
            if self._loop is not None:
                loop, self._loop = self._loop, None
                asyncio.run_coroutine_threadsafe(self._close(), loop).result()
                loop.call_soon_threadsafe(loop.stop)

    def _run(self, work: Coroutine) -> Any:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                target = functools.partial(_forever, self._loop)
                threading.Thread(target=target, name="judge", daemon=True).start()
                asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> None:
        cfg = self._cfg
        self._endpoints = [Endpoint(cfg, url) for url in cfg.urls]
        self._slots = asyncio.Semaphore(cfg.concurrency)
        self._limits = Limits(cfg.requests_per_minute, cfg.tokens_per_minute)

    async def _close(self) -> None:
        await asyncio.gather(*(endpoint.close() for endpoint in self._endpoints))

    async def _models(self) -> dict[str, list[str] | str]:
        async def one(endpoint: Endpoint) -> list[str] | str:
            try:
                return await endpoint.models()
            except TimeoutError:
                return f"no answer within {self._cfg.timeout_s:g} s"
            except openai.APIStatusError as error:
                return f"HTTP {error.status_code}: {error.message}"[:300]
            except Exception as error:  # whatever the client makes of an answer: its words
                return f"{type(error).__name__}: {error}"[:300]

        answers = await asyncio.gather(*map(one, self._endpoints))
        return {e.url: answer for e, answer in zip(self._endpoints, answers, strict=True)}

    async def _all(self, requests: Sequence[JudgeRequest], told: Told) -> list[Judgement]:
        late = missing("deadline", f"not judged within judge.deadline_s={self._cfg.deadline_s:g}")
        found = [late] * len(requests)

        async def one(i: int) -> None:
            found[i] = await self._one(requests[i])
            told(i, found[i])

        tasks = [asyncio.create_task(one(i)) for i in range(len(requests))]
        _, pending = await asyncio.wait(tasks, timeout=self._cfg.deadline_s)
        for task in pending:
            task.cancel()
        for problem in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(problem, Exception):
                raise problem
        return found

    async def _one(self, request: JudgeRequest) -> Judgement:
        last: Endpoint | None = None
        for attempt in range(self._cfg.retries + 1):
            last, ended = await self._attempt(request, last)
            judgement = dataclasses.replace(ended.judgement, attempts=attempt + 1)
            if judgement.score is not None or not ended.may_pass or attempt == self._cfg.retries:
                return judgement
            if choose(self._endpoints, last) is last:  # elsewhere it may go on at once
                await asyncio.sleep(_backoff_s(attempt))
        raise AssertionError("unreachable")

    async def _attempt(self, request: JudgeRequest, last: Endpoint | None
                       ) -> tuple[Endpoint, Attempt]:
        async with self._slots:
            tokens = _tokens(request, self._cfg)
            rest_s = lambda: choose(self._endpoints, last).rest_s()  # noqa: E731
            sent = await self._limits.take(tokens, rest_s)
            endpoint = choose(self._endpoints, last)
            ended = await endpoint.attempt(request)
            if ended.tokens is not None:
                self._limits.settle(sent, ended.tokens)
        return endpoint, ended


def _forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _tokens(request: JudgeRequest, cfg: JudgeConfig) -> float:
    """What a request may use: its prompt, by a guess, and the longest reply."""
    if not cfg.tokens_per_minute:
        return 0.0
    chars = sum(len(message["content"].encode()) for message in prompts.messages(request))
    return chars / CHARS_PER_TOKEN + cfg.max_tokens


def _backoff_s(attempt: int) -> float:
    return min(2**attempt / 2, MAX_DELAY_S) * random.uniform(0.5, 1.0)
