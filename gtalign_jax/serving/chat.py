"""One chat completion: request -> tokens -> tickets of the engine -> reply or stream.

    messages ─ask─► as the model was taught ─template─► prompt_ids ─submit─► Delta … Answer

Choice i of n is drawn with seed + i. What the user reads is the response block (serving/content);
the chain, the matrix and the decision travel beside it as `gtalign`. Whatever the engine raises
becomes an error in OpenAI's form, before a stream has begun with its own status, after that as an
event.
"""

import asyncio
import contextlib
import dataclasses
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from gtalign_jax.data import asking
from gtalign_jax.data.chat import encode_chat
from gtalign_jax.game import chain, pricing, steering
from gtalign_jax.game.pricing import Usage
from gtalign_jax.game.steering import SteeringConfig
from gtalign_jax.rollout.player import Player
from gtalign_jax.serving.batch import Answer, Ask
from gtalign_jax.serving.content import Content, content_of
from gtalign_jax.serving.engine import Delta, Engine, EngineError, Overloaded, Ticket
from gtalign_jax.serving.errors import ApiError, unforeseen
from gtalign_jax.serving.protocol import ChatRequest, Steer
from gtalign_jax.serving.replies import Choice, Completion, Game, Reply, TokenCount
from gtalign_jax.serving.stream import event

log = logging.getLogger(__name__)

NO_USE = Usage((0, 0, 0), (0, 0, 0))  # where nothing has a price
SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Service:
    """What answers: a model under its name, and how a request that says nothing is steered.

    Attributes:
      steering: the settings of a request that gives none; its usage is NO_USE where the model's
        own is not known.
      steered: whether such a request is steered at all.
    """

    player: Player
    engine: Engine
    name: str
    steering: SteeringConfig
    steered: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def usage(self) -> Usage | None:
        return None if self.steering.usage is NO_USE else self.steering.usage

    def settings(self, asked: Steer) -> SteeringConfig:
        """The server's settings with what a request asks for. Raises ApiError."""
        given = {name: getattr(asked, name) for name in Steer.STEERING}
        given = {name: value for name, value in given.items() if value is not None}
        # Prices must not buy harm: what the server holds to, a request cannot undo.
        given["floor"] = max(given.get("floor", self.steering.floor), self.steering.floor)
        if "sensitivity" in given:
            given["sensitivity"] = tuple(given["sensitivity"])
        config = dataclasses.replace(self.steering, **given)
        if config.usage is NO_USE and config.pricing.rates_XP.any():
            raise ApiError(
                400, "usage: how much of what has a price each action takes is not known for this "
                'model; give "usage": {"input": [DA, CQ, AQ], "output": [DA, CQ, AQ]}', "usage",
            )  # fmt: skip
        return config


@dataclasses.dataclass
class Turn:
    """A request that was admitted: one ticket for each choice."""

    service: Service
    request: ChatRequest
    config: SteeringConfig | None
    seed: int
    prompt_tokens: int
    tickets: Sequence[Ticket]
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    async def whole(self) -> Completion:
        """The reply in one piece. Raises ApiError."""
        answers = {}
        try:
            async for index, news in _merged(self.tickets):
                if isinstance(news, Answer):
                    answers[index] = news
        except Exception as error:
            raise refusal(error) from error
        finally:
            self.cancel()
        choices = []
        for index in range(len(self.tickets)):
            answer = answers[index]
            content, stopped = content_of(answer.text, self.request.stops)
            reply = Reply(content=content, gtalign=await self.game(index, answer))
            finish = "stop" if stopped else answer.finish_reason
            choices.append(Choice(index=index, message=reply, finish_reason=finish))
        return Completion(
            id=self.id, created=self.created, model=self.service.name, choices=choices,
            usage=self.count(answers),
        )  # fmt: skip

    async def events(self) -> AsyncGenerator[bytes]:
        """The reply as server-sent events; an error is the last one."""
        try:
            async for chunk in self._chunks():
                yield event(chunk)
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield event(refusal(error).body)
        finally:
            self.cancel()

    async def _chunks(self) -> AsyncGenerator[dict[str, Any]]:
        contents = [Content(self.request.stops) for _ in self.tickets]
        answers = {}
        for index in range(len(self.tickets)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, news in _merged(self.tickets):
            content = contents[index]
            if isinstance(news, Delta):
                text = content.feed(news.text)
            else:
                answers[index] = news
                text = content.finish()
            if text:
                yield self._chunk(index, {"content": text})
            if isinstance(news, Answer):
                game = (await self.game(index, news)).model_dump()
                finish = "stop" if content.stopped else news.finish_reason
                yield self._chunk(index, {"gtalign": game}, finish)
        if self._counts:
            yield {**self._head(), "choices": [], "usage": self.count(answers).model_dump()}

    @property
    def _counts(self) -> bool:
        options = self.request.stream_options
        return bool(options and options.include_usage)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id, "object": "chat.completion.chunk", "created": self.created,
            "model": self.service.name,
        }  # fmt: skip

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None = None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self._counts else {}
        return {**self._head(), "choices": [choice], **usage}

    def count(self, answers: dict[int, Answer]) -> TokenCount:
        """The prompt once, all completions with the tokens that were forced."""
        written = sum(len(answer.ids) for answer in answers.values())
        return TokenCount(
            prompt_tokens=self.prompt_tokens, completion_tokens=written,
            total_tokens=self.prompt_tokens + written,
        )  # fmt: skip

    async def game(self, index: int, answer: Answer) -> Game:
        """The chain behind choice `index`, and its game where that can be read."""
        return await asyncio.to_thread(
            _game, self.service, self.config, answer, (self.seed + index) % SEEDS
        )


def _game(service: Service, config: SteeringConfig | None, answer: Answer, seed: int) -> Game:
    outcome, described, parsed = answer.outcome, {}, chain.parse(answer.text)
    if outcome is not None and outcome.result is not None:
        described = steering.describe(outcome.result, config)
    elif config is None:
        unpriced = dataclasses.replace(
            service.steering, pricing=pricing.read("none"), rule=steering.DEFAULT_RULE
        )
        with contextlib.suppress(ValueError):  # payoffs beyond what can be priced
            if parsed.payoff_UAP is not None:
                solved = steering.solve(parsed.payoff_UAP, unpriced)
                described = steering.describe(solved, unpriced)
    return Game(
        chain=answer.text, error=parsed.error, forced=list(answer.forced),
        steered=outcome is not None and outcome.steered, seed=seed,
        reason=outcome.reason if outcome is not None else None, **described,
    )  # fmt: skip


async def begin(service: Service, request: ChatRequest) -> Turn:
    """Admits a request to the engine's queue. Raises ApiError."""
    if request.model != service.name:
        raise ApiError(
            404, f"the model {request.model!r} does not exist; this server has {service.name!r}",
            "model", "model_not_found",
        )  # fmt: skip
    config = service.settings(request) if request.asked or service.steered else None
    prompt_ids = await asyncio.to_thread(_prompt, service.player, request)
    limits = service.engine.config
    if len(prompt_ids) > limits.prompt_tokens:
        raise ApiError(
            400, f"messages are {len(prompt_ids):,} tokens; this server takes "
            f"{limits.prompt_tokens:,} (with its own instruction)", "messages",
            "context_length_exceeded",
        )  # fmt: skip
    most = request.limit or limits.new_tokens
    if most > limits.new_tokens:
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        raise ApiError(400, f"{name} is {most:,}; allowed are 1 to {limits.new_tokens:,}", name)
    seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed % SEEDS
    tickets: list[Ticket] = []
    try:
        for index in range(request.n or 1):
            tickets.append(service.engine.submit(Ask(
                prompt_ids=prompt_ids, max_tokens=most,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=(seed + index) % SEEDS, steering=config,
            )))  # fmt: skip
    except Exception as error:
        for ticket in tickets:
            ticket.cancel()
        raise refusal(error) from error
    return Turn(service, request, config, seed, len(prompt_ids), tickets)


def _prompt(player: Player, request: ChatRequest) -> tuple[int, ...]:
    try:
        asked = asking.ask([message.plain() for message in request.messages], player.instruction)
        return tuple(encode_chat(player.tokenizer, asked))
    except (ValueError, TypeError) as error:  # a template may refuse a role, or their order
        raise ApiError(400, str(error), "messages") from error


def refusal(error: Exception) -> ApiError:
    """What a client is told of an exception of the engine's."""
    match error:
        case ApiError():
            return error
        case Overloaded():
            wait = max(1, math.ceil(error.retry_after_s))
            said = f"too many requests are waiting; try again in {wait} s"
            return ApiError(429, said, headers={"retry-after": str(wait)})
        case TimeoutError():
            return ApiError(504, "the reply was not ready by the deadline")
        case EngineError():
            log.error("a request was not answered: %s", error)  # its words are for the log alone
            return ApiError(503, "the model could not answer; the server's log says why")
        case ValueError():
            return ApiError(400, str(error))
    return unforeseen(error, "a chat completion")


async def _merged(tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, Delta | Answer]]:
    """(choice, event) of all tickets as they come, until each has given its answer."""
    if len(tickets) == 1:
        async for news in tickets[0]:
            yield 0, news
        return
    arrived: asyncio.Queue = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(i, ticket, arrived)) for i, ticket in enumerate(tickets)]
    try:
        running = len(pumps)
        while running:
            index, news = await arrived.get()
            if isinstance(news, Exception):
                raise news
            running -= news is None
            if news is not None:
                yield index, news
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(index: int, ticket: Ticket, arrived: asyncio.Queue) -> None:
    try:
        async for news in ticket:
            arrived.put_nowait((index, news))
        arrived.put_nowait((index, None))
    except Exception as error:  # handed on to whoever reads the queue
        arrived.put_nowait((index, error))
