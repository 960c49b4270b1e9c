"""The servers that a judge's model runs on: one attempt at a time, and which server is next.

An attempt has its own time-out and ends in a judgement, a score or a reason why there is none. A
server that says when to come back (Retry-After) is left alone until then. One that failed
`SUSPECT_AFTER` times in a row is asked only where no other can be, and tried again now and then.

Knows the OpenAI chat protocol; limits of rate and number are `http_judge`'s.
"""

import asyncio
import email.utils
import itertools
import logging
import math
import os
import time
import urllib.parse
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import openai

from gtalign_jax.reward import prompts
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judgement, JudgeRequest, missing, read_verdict, scale_of

PASSING_STATUS = (408, 409, 425, 429)
SUSPECT_AFTER = 3
SUSPECT_S = 2.0  # doubled with each further failure
MAX_SUSPECT_S = 60.0
# The client looks at all of its connections for each request: several small pools are faster.
CONNECTIONS_PER_CLIENT = 32
# Between two requests that begin, about what the client computes for one. Requests that begin at
# once are all sent only when the last one is ready, and so are those that follow their answers.
START_GAP_S = 0.002

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended: whether another may help, and the tokens that it used, if known."""

    judgement: Judgement
    may_pass: bool
    tokens: int | None = None


class Endpoint:
    """One server. Attributes: url, without user and password; in_flight, attempts under way."""

    def __init__(self, cfg: JudgeConfig, url: str):
        self._cfg, self.url, self.in_flight = cfg, shown_url(url), 0
        # Local servers need no key, but the client insists on one.
        self._key = os.environ.get(cfg.api_key_env, "")
        self._clients = [
            openai.AsyncOpenAI(
                base_url=url, api_key=self._key or "none", max_retries=0, timeout=cfg.timeout_s
            )
            for _ in range(math.ceil(cfg.concurrency / CONNECTIONS_PER_CLIENT))
        ]
        self._next_client = itertools.cycle(self._clients)
        self._starts = asyncio.Lock()
        self._more_fields = cfg.more_fields()
        self._failures, self._known_as = 0, None
        self._rests_until = self._suspect_until = 0.0

    def rest_s(self) -> float:
        """Seconds that the server still wants to be left alone."""
        return max(self._rests_until - time.monotonic(), 0.0)

    def is_suspect(self) -> bool:
        """It failed several times in a row, the last time a moment ago."""
        return time.monotonic() < self._suspect_until

    async def models(self) -> list[str]:
        """The models that the server lists."""
        page = await asyncio.wait_for(self._clients[0].models.list(), self._cfg.timeout_s)
        return [model.id for model in page.data]

    async def attempt(self, request: JudgeRequest) -> Attempt:
        """Asks once."""
        self.in_flight += 1
        try:
            async with self._starts:
                await asyncio.sleep(START_GAP_S)
            began = time.monotonic()
            attempt = await self._ask(request)
        finally:
            self.in_flight -= 1
        self._note(attempt.judgement.cause)
        return Attempt(
            self._timed(attempt.judgement, time.monotonic() - began), attempt.may_pass,
            attempt.tokens,
        )

    async def close(self) -> None:
        """Closes the connections."""
        for client in self._clients:
            await client.close()

    async def _ask(self, request: JudgeRequest) -> Attempt:
        cfg = self._cfg
        fields = {
            "model": cfg.model, "messages": prompts.messages(request),
            "max_tokens": cfg.max_tokens, "temperature": cfg.temperature, "top_p": cfg.top_p,
            **self._more_fields,
        }
        # Not `chat.completions.create`: comparing the fields with its types takes it longer than
        # all the rest of the request.
        call = next(self._next_client).post(
            "/chat/completions", cast_to=openai.types.chat.ChatCompletion, body=fields
        )
        try:
            # The client's own limit is per read: a server that drips evades it.
            answer = await asyncio.wait_for(call, cfg.timeout_s)
        except TimeoutError:
            return self._failed("timeout", f"no answer within {cfg.timeout_s:g} s")
        except openai.APIStatusError as error:
            return self._refusal(error)
        except openai.APITimeoutError as error:
            return self._failed("timeout", f"{type(error).__name__}: {error}")
        except openai.APIConnectionError as error:
            return self._failed("connection", f"{type(error).__name__}: {error.__cause__ or error}")
        except (openai.OpenAIError, ValueError, TypeError) as error:  # a body that is no answer
            return self._failed("unreadable", f"unreadable answer: {type(error).__name__}: {error}")
        return self._read(answer, request)

    def _refusal(self, error: openai.APIStatusError) -> Attempt:
        """A status that is no success."""
        status, headers = error.status_code, error.response.headers
        may_pass = status in PASSING_STATUS or status >= 500
        wait_s = _retry_after_s(headers.get("retry-after"), headers.get("date"))
        if may_pass and wait_s > 0:
            self._rests_until = max(self._rests_until, time.monotonic() + wait_s)
        cause = "rate_limit" if status == 429 else "server" if may_pass else "rejected"
        failed = self._failed(cause, f"HTTP {status}: {str(error.message)[:200]}")
        return Attempt(failed.judgement, may_pass)

    def _read(self, answer: Any, request: JudgeRequest) -> Attempt:
        """The judgement in an answer. What a server calls its answer may be anything."""
        if not isinstance(answer, openai.types.chat.ChatCompletion) or not answer.choices:
            return self._failed("unreadable", "the answer holds no text")
        tokens = getattr(answer.usage, "total_tokens", None)
        tokens = tokens if isinstance(tokens, int) else None
        choice = answer.choices[0]
        message = choice.message
        text = message.content if message and isinstance(message.content, str) else None
        if self._is_another(answer.model):
            found = missing("wrong_model", f"asked {self._cfg.model!r}, {answer.model!r} answered")
        elif choice.finish_reason == "content_filter" or (message and message.refusal):
            found = missing("refused", "the judge refused", text or "")
        elif text is None:
            found = missing("unreadable", "the answer holds no text")
        elif choice.finish_reason == "length":
            told = f"cut after judge.max_tokens={self._cfg.max_tokens} tokens"
            found = missing("truncated", told, text)
        else:
            found = read_verdict(text, *scale_of(request))
        return Attempt(found, True, tokens)

    def _is_another(self, model: Any) -> bool:
        """Whether an answer names a model that is not the one asked for.

        Services add dates to names, and some servers have one name for everything: what a server
        calls itself at first, it must go on calling itself.
        """
        if not isinstance(model, str) or not model or model.startswith(self._cfg.model):
            return False
        if self._known_as is None:
            self._known_as = model
            log.warning("%s answers as %r when asked for %r", self.url, model, self._cfg.model)
        return model != self._known_as

    def _failed(self, cause: str, error: str) -> Attempt:
        if self._key:  # some servers repeat it
            error = error.replace(self._key, "***")
        return Attempt(missing(cause, error), True)

    def _timed(self, found: Judgement, seconds: float) -> Judgement:
        return Judgement(found.score, found.reply, found.error, found.cause, attempts=1,
                         seconds=seconds)

    def _note(self, cause: str | None) -> None:
        """Failures in a row, of the server and not of what it said."""
        if cause not in ("timeout", "connection", "server"):
            self._failures = 0
            return
        self._failures += 1
        over = self._failures - SUSPECT_AFTER
        if over >= 0:
            pause_s = min(SUSPECT_S * 2.0**min(over, 10), MAX_SUSPECT_S)
            self._suspect_until = time.monotonic() + pause_s
        if over == 0:
            log.warning("%s failed %d times in a row (%s)", self.url, self._failures, cause)


def choose(endpoints: Collection[Endpoint], not_again: Endpoint | None = None) -> Endpoint:
    """The endpoint to ask next: one that may be asked, is sound, is another one than the last, and
    has the least to do, in this order."""
    return min(
        endpoints,
        key=lambda e: (e.rest_s() > 0, e.rest_s() if e.rest_s() > 0 else 0.0, e.is_suspect(),
                       e is not_again, e.in_flight),
    )


def shown_url(url: str) -> str:
    """The address without user, password and query."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path,
                                    "", ""))


def _retry_after_s(header: str | None, date: str | None) -> float:
    """Seconds of a Retry-After header, which may be a number or a date (RFC 9110, 10.2.3)."""
    if not header:
        return 0.0
    try:
        return min(max(float(header), 0.0), 86_400.0)
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(header).timestamp()
        now = email.utils.parsedate_to_datetime(date).timestamp() if date else time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(until - now, 0.0), 86_400.0)
