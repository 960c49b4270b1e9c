"""A language model as judge, behind servers that speak the OpenAI chat protocol.

At most `concurrency` attempts are in flight, over all calls of the judge at once, and never more
requests or tokens a minute than allowed. An attempt that fails is repeated, elsewhere if there are
several servers, after
    2**attempt / 2 s, at most 30 s, times a random factor between 0.5 and 1
or when the server wants it; where another server is left to try, at once. What still fails, or is
late for the step, is missing, never 0.

All requests of a process go through one event loop in a thread of its own, so that connections and
limits outlive a call, and calls from several threads share them.
"""

import asyncio
import dataclasses
import functools
import math
import random
import threading
import weakref
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

from gtalign_jax.reward import prompts
from gtalign_jax.reward.endpoints import Attempt, Endpoint, choose
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judgement, JudgeRequest, missing
from gtalign_jax.reward.limits import Limits, Sent

MAX_DELAY_S = 30.0
CHARS_PER_TOKEN = 3.0  # a cautious guess for the limit of tokens, until the server has counted

Told = Callable[[int, Judgement], None]


class HttpJudge:
    """Callable judge; see the module. Safe to call from any thread, also inside an event loop."""

    def __init__(self, cfg: JudgeConfig, before: Sequence[Sent] = ()):
        """`before`: what was sent under the same limits (`sent` of another judge)."""
        self._cfg, self._before = cfg, before
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __call__(self, requests: Sequence[JudgeRequest],
                 told: Told = lambda i, judgement: None) -> list[Judgement]:
        """One Judgement per request, in order; raises for no answer of a server.

        `told` hears of each as it comes, with the request's number, in a thread of the judge's.
        """
        return self._run(self._all(requests, told)) if requests else []

    def models(self) -> dict[str, list[str] | str]:
        """By server's address: the models that it lists, or why it lists none."""
        return self._run(self._models())

    def sent(self) -> list[Sent]:
        """What counts against its limits."""
        return self._limits.sent() if self._loop is not None else list(self._before)

    def close(self) -> None:
        """Ends calls that are under way (they raise CancelledError), connections and the thread."""
        with self._starting:
            if self._loop is not None:
                self._loop = None
                self._finish()

    def _run(self, work: Coroutine) -> Any:
        with self._starting:
            try:
                loop = self._loop = self._loop or self._started()
            except BaseException:
                work.close()
                raise
            future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        finally:
            future.cancel()  # Ctrl-C while waiting: nobody wants the rest

    def _started(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        target = functools.partial(_forever, loop)
        self._thread = threading.Thread(target=target, name="judge", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), loop).result()
        except BaseException:
            _end(loop, self._thread)
            raise
        # Also for a judge that is forgotten: its connections would stay open until the end.
        self._finish = weakref.finalize(self, _finish, loop, self._thread, self._endpoints)
        return loop

    async def _open(self) -> None:
        cfg = self._cfg
        self._endpoints = [Endpoint(cfg, url) for url in cfg.urls]
        self._slots = asyncio.Semaphore(cfg.concurrency)
        self._limits = Limits(cfg.requests_per_minute, cfg.tokens_per_minute, before=self._before)

    async def _models(self) -> dict[str, list[str] | str]:
        async def one(endpoint: Endpoint) -> list[str] | str:
            try:
                return await endpoint.models()
            except ValueError as error:
                return str(error)

        answers = await asyncio.gather(*map(one, self._endpoints))
        return {e.url: answer for e, answer in zip(self._endpoints, answers, strict=True)}

    async def _all(self, requests: Sequence[JudgeRequest], told: Told) -> list[Judgement]:
        late = f"not judged within judge.deadline_s={self._cfg.deadline_s:g}"
        found = [missing("deadline", late)] * len(requests)

        async def one(i: int) -> None:
            def failed(last: Judgement) -> None:
                so_far = missing("deadline", f"{late}; so far: {last.error}")
                found[i] = dataclasses.replace(so_far, attempts=last.attempts)

            found[i] = await self._one(requests[i], failed)
            told(i, found[i])

        tasks = [asyncio.create_task(one(i)) for i in range(len(requests))]
        try:  # a judgement that cannot be told (a full disk) is no reason to go on asking
            await asyncio.wait(tasks, timeout=self._cfg.deadline_s,
                               return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for problem in ended:
            if isinstance(problem, Exception):
                raise problem
        return found

    async def _one(self, request: JudgeRequest, failed: Callable[[Judgement], None]) -> Judgement:
        """`failed` hears of each attempt that another follows."""
        too_long = prompts.too_long(request)
        if too_long:
            return missing("too_long", too_long)
        tried: set[Endpoint] = set()
        may_pass = False  # at one of the servers that were tried
        for attempt in range(self._cfg.retries + 1):
            endpoint, ended = await self._attempt(request, tried)
            judgement = dataclasses.replace(ended.judgement, attempts=attempt + 1)
            tried.add(endpoint)
            may_pass |= ended.may_pass
            is_left = choose(self._endpoints, tried) not in tried  # a server that knows more?
            is_last = attempt == self._cfg.retries or not (may_pass or is_left)
            if judgement.score is not None or is_last:
                return judgement
            failed(judgement)
            if not is_left:
                await asyncio.sleep(_backoff_s(attempt))
                tried.clear()
                may_pass = False
        raise AssertionError("unreachable")

    async def _attempt(self, request: JudgeRequest, tried: Collection[Endpoint]
                       ) -> tuple[Endpoint, Attempt]:
        async with self._slots:
            tokens = _tokens(request, self._cfg)
            rest_s = lambda: choose(self._endpoints, tried).rest_s()  # noqa: E731
            sent = await self._limits.take(tokens, rest_s)
            endpoint = choose(self._endpoints, tried)
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


async def _close(endpoints: Collection[Endpoint]) -> None:
    under_way = asyncio.all_tasks() - {asyncio.current_task()}
    for task in under_way:
        task.cancel()
    await asyncio.gather(*under_way, return_exceptions=True)
    await asyncio.gather(*(endpoint.close() for endpoint in endpoints))


def _finish(loop: asyncio.AbstractEventLoop, thread: threading.Thread,
            endpoints: Collection[Endpoint]) -> None:
    if threading.current_thread() is thread:  # forgotten there: it cannot wait for itself
        closing = loop.create_task(_close(endpoints))
        closing.add_done_callback(lambda _: loop.stop())
        return
    asyncio.run_coroutine_threadsafe(_close(endpoints), loop).result()
    _end(loop, thread)


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def _tokens(request: JudgeRequest, cfg: JudgeConfig) -> int:
    """What a request may use: its prompt, by a guess, and the longest reply."""
    if not cfg.tokens_per_minute:
        return 0
    chars = sum(len(message["content"].encode()) for message in prompts.messages(request))
    return math.ceil(chars / CHARS_PER_TOKEN) + cfg.max_tokens


def _backoff_s(attempt: int) -> float:
    return min(2.0 ** min(attempt, 10) / 2, MAX_DELAY_S) * random.uniform(0.5, 1.0)
