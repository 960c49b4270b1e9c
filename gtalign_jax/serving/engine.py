"""Requests come and go, the batch runs on: one thread owns the devices, asyncio only queues.

    submit -> queue -> a free slot (prefill) -> bursts of decode steps -> deltas -> answer

Between two bursts the thread looks up: it drops what was cancelled or is late, admits who has
waited longest, and hands new text out.

Knows no HTTP and no tokens. Nothing is kept of a request that has ended.
"""

import asyncio
import collections
import dataclasses
import logging
import threading
import time

from gtalign_jax.rollout.player import Player
from gtalign_jax.rollout.slots import SlotsConfig
from gtalign_jax.serving.batch import Answer, Ask, Batch, Progress

log = logging.getLogger(__name__)

RECENT = 32  # finished requests from which it is estimated how long one takes
LATE_S = 5.0  # by which callers outwait the device thread before they give up on it


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes and limits of an engine.

    slots: requests that decode at once. queue: requests that wait for a slot. prompt_tokens,
    new_tokens: the longest prompt and completion. burst: decode steps between two looks at queue
    and results. deadline_s: from submission to the last token. admissions: prompts that are
    prefilled between two bursts at most, so that decoding goes on while many arrive.
    """

    slots: int = 8
    queue: int = 64
    prompt_tokens: int = 1024
    new_tokens: int = 512
    burst: int = 8
    deadline_s: float = 120.0
    admissions: int = 2

    def __post_init__(self) -> None:
        for key, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"{key}={value}: must be > 0")

    @property
    def sizes(self) -> SlotsConfig:
        return SlotsConfig(self.slots, self.prompt_tokens, self.new_tokens, self.burst)


class EngineError(RuntimeError):
    """The engine cannot answer: it failed, or it is not running."""


class Overloaded(Exception):
    """The queue is full; worth another try after `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


@dataclasses.dataclass(frozen=True)
class Delta:
    """Completion text that is final: whole characters, and nothing that a splice may replace."""

    text: str


class Ticket:
    """What `submit` gives: `async for event in ticket` yields Deltas, then one Answer.

    Iterating raises EngineError (the engine or this request failed, or the engine stops) or
    TimeoutError (past the deadline).
    """

    def __init__(self, engine: "Engine", ask: Ask, deadline: float) -> None:
        self.ask, self.deadline, self.cancelled = ask, deadline, False
        self.admitted = 0.0  # when it got its slot
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._events: asyncio.Queue[Delta | Answer | Exception] = asyncio.Queue()
        self._ended = False

    def cancel(self) -> None:
        """Gives the request up; its slot is free at the engine's next look. Safe to call twice."""
        self._engine.cancel(self)

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> Delta | Answer:
        if self._ended:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self.deadline - time.monotonic() + LATE_S):
                event = await self._events.get()
        except TimeoutError:
            self._ended = True
            self.cancel()
            raise TimeoutError("the engine did not answer by the deadline") from None
        self._ended = not isinstance(event, Delta)
        if isinstance(event, Exception):
            raise event
        return event

    def post(self, event: Delta | Answer | Exception) -> None:
        """Hands an event to whoever iterates; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancelled = True


class Engine:
    """Continuous batching of one player's completions.

    Raises ValueError where the sizes do not fit the model or its mesh.
    """

    def __init__(self, player: Player, config: EngineConfig) -> None:
        self.config = config
        self._batch = Batch(player, config.sizes)  # the device thread's, from start on
        self._changed = threading.Condition()  # guards all of what follows
        self._phase = "new"  # starting, running, stopping, stopped, failed
        self._error: str | None = None
        self._patience = float("inf")  # when a stopping engine gives up what still runs
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._running: dict[int, Ticket] = {}  # by slot
        self._counts = collections.Counter()
        self._took: collections.deque[float] = collections.deque(maxlen=RECENT)  # seconds
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    # The callers' side.

    def start(self) -> None:
        """Starts the device thread and waits until every program is compiled.

        Raises EngineError where that fails.
        """
        self._phase = "starting"
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._phase != "starting")
            if self._phase == "failed":
                raise EngineError(self._error)

    async def stop(self, grace_s: float) -> None:
        """Refuses new requests, finishes those it has within `grace_s`, fails the rest."""
        with self._changed:
            if self._phase == "new":
                self._phase = "stopped"
                return
            if self._phase in ("starting", "running"):
                self._phase = "stopping"
            self._patience = time.monotonic() + grace_s
            self._changed.notify_all()
        await asyncio.to_thread(self._thread.join, grace_s + LATE_S)
        if self._thread.is_alive():
            log.error("the device thread is stuck; it ends with the process")
            self._end("stopped", "the server is shutting down")

    def submit(self, ask: Ask) -> Ticket:
        """Queues a request; called inside the event loop in which the ticket is awaited.

        Raises:
          ValueError: the prompt is empty or too long, or a setting is out of range.
          Overloaded: the queue is full.
          EngineError: the engine is not running.
        """
        self._batch.check(ask)
        with self._changed:
            if self._phase != "running":
                raise EngineError(self._error or f"the engine is {self._phase}")
            if len(self._waiting) >= self.config.queue:
                self._counts["refused"] += 1
                raise Overloaded(self._retry_after())
            ticket = Ticket(self, ask, time.monotonic() + self.config.deadline_s)
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """As `Ticket.cancel`."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._counts["cancelled"] += 1

    def state(self) -> dict[str, object]:
        """How it goes: the phase, what went wrong if it failed, and counts since the start."""
        counted = ("finished", "cancelled", "failed", "late", "refused", "prompt_tokens",
                   "programs")
        with self._changed:
            return {
                "phase": self._phase, "healthy": self._phase == "running", "error": self._error,
                "slots": self.config.slots, "busy": len(self._running),
                "queued": len(self._waiting), **{name: self._counts[name] for name in counted},
                "generated_tokens": self._batch.generated_tokens,
                "forced_tokens": self._batch.forced_tokens,
            }

    def _retry_after(self) -> float:
        """Seconds in which half of the queue will have been served, as long as requests took."""
        if not self._took:
            return min(1.0, self.config.deadline_s)
        each = sum(self._took) / len(self._took) / self.config.slots
        return min(max(each * len(self._waiting) / 2, 1.0), self.config.deadline_s)

    # The device thread.

    def _main(self) -> None:
        try:
            self._warm_up()
            while self._has_work():
                self._sweep()
                self._admit()
                if self._batch.busy:
                    for progress in self._batch.run():
                        self._hand_out(progress)
        except Exception as error:  # whatever it is, nobody may wait for it for ever
            log.exception("the engine failed")
            self._end("failed", f"the engine failed: {type(error).__name__}: {error}")
        else:
            self._end("stopped", "the server is shutting down")

    def _warm_up(self) -> None:
        began = time.perf_counter()
        programs = self._batch.warm_up()
        log.info("compiled %d programs in %.1f s", programs, time.perf_counter() - began)
        with self._changed:
            self._counts["programs"] = programs
            if self._phase == "starting":
                self._phase = "running"
            self._changed.notify_all()

    def _has_work(self) -> bool:
        """Waits for something to do; False when there is nothing left and nothing will come."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._running or self._waiting or self._phase == "stopping"
            )
            out_of_patience = time.monotonic() > self._patience
            return bool(self._running or self._waiting) and not out_of_patience

    def _sweep(self) -> None:
        """Frees the slots of those who gave up or are late, and ends the late in the queue."""
        now = time.monotonic()
        with self._changed:
            late = [ticket for ticket in self._waiting if now > ticket.deadline]
            for ticket in late:
                self._waiting.remove(ticket)
            leaving = {row: ticket for row, ticket in self._running.items()
                       if ticket.cancelled or now > ticket.deadline}
            for row in leaving:
                del self._running[row]
            gone = [ticket for ticket in leaving.values() if ticket.cancelled]
            late += [ticket for ticket in leaving.values() if not ticket.cancelled]
            self._counts["cancelled"] += len(gone)
            self._counts["late"] += len(late)
        for row in leaving:
            self._batch.drop(row)
        for ticket in late:
            ticket.post(TimeoutError(f"not finished within {self.config.deadline_s:g} s"))

    def _admit(self) -> None:
        """First come, first served."""
        for _ in range(self.config.admissions):
            with self._changed:
                if not self._waiting or self._batch.busy == self.config.slots:
                    return
                ticket = self._waiting.popleft()
                row = self._batch.reserve(ticket.ask)
                self._running[row], ticket.admitted = ticket, time.monotonic()
                self._counts["prompt_tokens"] += len(ticket.ask.prompt_ids)
            self._batch.prefill(row)

    def _hand_out(self, progress: Progress) -> None:
        """To whom a row belongs, what it brought."""
        ticket = self._running[progress.row]
        if progress.answer is not None or progress.error is not None:
            with self._changed:
                del self._running[progress.row]
                if progress.error is None:
                    self._counts["finished"] += 1
                    self._took.append(time.monotonic() - ticket.admitted)
                else:
                    self._counts["failed"] += 1
        if progress.text:
            ticket.post(Delta(progress.text))
        if progress.error is not None:
            error = EngineError(f"{type(progress.error).__name__}: {progress.error}")
            ticket.post(error)
        if progress.answer is not None:
            ticket.post(progress.answer)

    def _end(self, phase: str, why: str) -> None:
        """Nobody waits any longer."""
        with self._changed:
            self._phase, self._error = phase, why if phase == "failed" else None
            tickets = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._counts["failed"] += len(tickets)
            self._changed.notify_all()
        for ticket in tickets:
            ticket.post(EngineError(why))
