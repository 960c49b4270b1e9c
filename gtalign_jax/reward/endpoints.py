"""The servers that a judge's model runs on: one attempt at a time, and which server is next.

An attempt has its own time-out and ends in a judgement, a score or a reason why there is none. A
server that says when to come back (Retry-After) is left alone until then. One that failed
`SUSPECT_AFTER` times in a row is asked only where no other can be, and now and then by a single
attempt that finds out whether it works again.

Knows the OpenAI chat protocol; limits of rate and number are `http_judge`'s.
"""

import asyncio
import base64
import dataclasses
import email.utils
import itertools
import logging
import math
import os
import re
import time
import urllib.parse
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice

from gtalign_jax.reward import prompts
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judgement, JudgeRequest, missing, read_verdict, scale_of

PASSING_STATUS = (408, 409, 425, 429)
SUSPECT_AFTER = 3
SUSPECT_S = 2.0  # doubled each time that it turns out to fail still
MAX_SUSPECT_S = 60.0
ALIAS_AFTER = 3
MIN_SECRET_CHARS = 8  # a shorter key ("none", "EMPTY") protects nothing, and is a part of words
# What the model said, so that its server works.
SAID = ("refused", "truncated", "unparsable", "off_scale")
# The client looks at all of its connections for each request: several small pools are faster.
CONNECTIONS_PER_CLIENT = 32

# A date or revision behind a name: -0613, -20250929, -2024-08-06, -v1:0, @main, :latest, -latest.
_DATED = re.compile(r"[-_](?:\d{4}|\d{6}|\d{8}|\d{4}-\d{2}-\d{2}|v\d+(?::\d+)?)|[@:]\w+|-latest")
# How a reply ends that was not broken off; some servers say nothing.
_ENDED = ("stop", "eos_token", "stop_sequence", "eos", "", None)

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
        key, user = _key(cfg.api_key_env), _user(url)
        # The transport logs the address: user and password travel in the header alone.
        parts = urllib.parse.urlsplit(url)
        bare = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        basic = base64.b64encode(urllib.parse.unquote(user).encode()).decode() if user else ""
        password = user.partition(":")[2]
        secrets = (key, urllib.parse.unquote(user), user, basic, urllib.parse.unquote(password),
                   password)
        self._secrets = [secret for secret in secrets if len(secret) >= MIN_SECRET_CHARS]
        self._clients = [
            openai.AsyncOpenAI(
                base_url=bare, max_retries=0, timeout=cfg.timeout_s,
                api_key=key or "none",  # local servers need none, but the client insists on one
                default_headers={"Authorization": f"Basic {basic}"} if user else None,
            )
            for _ in range(math.ceil(cfg.concurrency / CONNECTIONS_PER_CLIENT))
        ]
        self._next_client = itertools.cycle(self._clients)
        self._more_fields = cfg.more_fields()
        self._failures, self._pause_s = 0, 0.0
        self._known_as: str | None = None
        self._stranger, self._met = "", 0  # a name that it answers by, and how often in a row
        self._rests_until = self._suspect_until = 0.0

    def rest_s(self) -> float:
        """Seconds that the server still wants to be left alone."""
        return max(self._rests_until - time.monotonic(), 0.0)

    def is_suspect(self) -> bool:
        """It failed several times in a row, a moment ago or, for all that is known, still does."""
        if self._failures < SUSPECT_AFTER:
            return False
        return time.monotonic() < self._suspect_until or self.in_flight > 0

    async def models(self) -> list[str]:
        """The models that the server lists. Raises ValueError that says why it lists none."""
        try:
            page = await asyncio.wait_for(self._clients[0].models.list(), self._cfg.timeout_s)
            return [model.id for model in page.data if isinstance(model.id, str)]
        except TimeoutError:
            raise ValueError(f"no answer within {self._cfg.timeout_s:g} s") from None
        except openai.APIStatusError as error:  # somebody is there
            words = self._without_secrets(f"HTTP {error.status_code}: {error.message}")
            raise ValueError(words[:300]) from None
        except openai.APIConnectionError as error:
            raise ValueError(self._without_secrets(_why(error))[:300]) from None
        except Exception:  # whatever the client makes of an answer: somebody is there
            raise ValueError("HTTP 200: no list of models") from None

    async def attempt(self, request: JudgeRequest) -> Attempt:
        """Asks once."""
        began = time.monotonic()
        self.in_flight += 1
        try:
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
            return self._failed("connection", _why(error))
        except Exception as error:  # whatever the client makes of a body that is no answer
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
        failed = self._failed(cause, f"HTTP {status}: {error.message}")
        return Attempt(failed.judgement, may_pass)

    def _read(self, answer: Any, request: JudgeRequest) -> Attempt:
        """The judgement in an answer. What a server calls its answer may be anything."""
        choice = _first_choice(answer)
        if choice is None:
            return self._failed("unreadable", "the answer holds no text")
        tokens = getattr(answer.usage, "total_tokens", None)
        tokens = tokens if type(tokens) is int and tokens > 0 else None
        message = choice.message
        text = message.content if isinstance(message.content, str) else None
        if self._is_another(answer.model):
            name = self._without_secrets(answer.model)
            found = missing("wrong_model", f"asked {self._cfg.model!r}, {name!r} answered")
        elif choice.finish_reason == "content_filter" or message.refusal:
            found = missing("refused", "the judge refused", text or str(message.refusal or ""))
        elif text is None:
            found = missing("unreadable", "the answer holds no text")
        elif choice.finish_reason == "length":
            told = f"cut after judge.max_tokens={self._cfg.max_tokens} tokens"
            found = missing("truncated", told, text)
        elif not any(choice.finish_reason == end for end in _ENDED):
            found = missing("truncated", f"the reply ended by {choice.finish_reason!r}", text)
        else:
            found = read_verdict(text, *scale_of(request))
        clean = dataclasses.replace(found, reply=self._without_secrets(found.reply),
                                    error=found.error and self._without_secrets(found.error))
        return Attempt(clean, True, tokens)

    def _is_another(self, model: Any) -> bool:
        """Whether an answer names a model that is not the one asked for.

        Services add dates to names, and some servers have one name for everything: what a server
        calls itself `ALIAS_AFTER` times in a row, before it ever used the name asked for, is taken
        for its name from then on.
        """
        asked = self._cfg.model
        if not isinstance(model, str) or not model:
            return False
        if model == asked or model.startswith(asked) and _DATED.fullmatch(model[len(asked):]):
            self._known_as = asked
            return False
        if self._known_as is None:
            self._met = self._met + 1 if model == self._stranger else 1
            self._stranger = model
            if self._met == ALIAS_AFTER:
                self._known_as = model
                log.warning("%s answers as %r when asked for %r", self.url,
                            self._without_secrets(model), asked)
        return model != self._known_as

    def _failed(self, cause: str, error: str) -> Attempt:
        return Attempt(missing(cause, self._without_secrets(error)), True)

    def _without_secrets(self, text: str) -> str:
        """Some servers repeat the key. To be called before anything is cut: half a key is one."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _timed(self, found: Judgement, seconds: float) -> Judgement:
        return dataclasses.replace(found, attempts=1, seconds=seconds)

    def _note(self, cause: str | None) -> None:
        """Failures in a row, of the server and not of what its model said.

        A refusal counts: a server that is quick to refuse would draw all requests to itself.
        """
        if cause is None or cause in SAID:
            if self._failures >= SUSPECT_AFTER:
                log.info("%s works again", self.url)
            self._failures, self._pause_s = 0, 0.0
            return
        self._failures += 1
        now = time.monotonic()
        if self._failures == SUSPECT_AFTER:
            log.warning("%s failed %d times in a row (%s)", self.url, self._failures, cause)
        # Many attempts may fail at once: only one after the pause says that it was too short.
        if self._failures >= SUSPECT_AFTER and now >= self._suspect_until:
            self._pause_s = min(max(2 * self._pause_s, SUSPECT_S), MAX_SUSPECT_S)
            self._suspect_until = now + self._pause_s


def choose(endpoints: Collection[Endpoint], tried: Collection[Endpoint] = ()) -> Endpoint:
    """The endpoint to ask next: one that is sound, may be asked soonest, was not `tried`, and has
    the least to do, in this order."""
    return min(endpoints, key=lambda e: (e.is_suspect(), e.rest_s(), e in tried, e.in_flight))


def _why(error: Exception) -> str:
    """The words of what lies behind an error, which may have none but its name."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}"


def _first_choice(answer: Any) -> Choice | None:
    """The client checks no types: what is no answer by the protocol is None."""
    choices = answer.choices if isinstance(answer, ChatCompletion) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    is_one = isinstance(first, Choice) and isinstance(first.message, ChatCompletionMessage)
    return first if is_one else None


def _key(name: str) -> str:
    """The key in an environment variable, which may end in a line break; "" where it is not set."""
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"judge.api_key_env={name!r}: the key in it holds characters that no HTTP "
                         "header may have; allowed: printable ASCII")
    return key


def _user(url: str) -> str:
    """USER:PASSWORD of an address, as it stands there; "" where there is none."""
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[0]


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
