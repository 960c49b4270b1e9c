"""At most so many requests and tokens in any minute: the rate limits of a judge's servers.

A window that slides: what was sent counts for a minute. A bucket that fills up again would let
twice the rate through in the minute after a pause.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

WINDOW_S = 61.0  # a minute, and what a request may take on its way to the server
# Between two requests, about what a client computes for one. Requests that begin at once are all
# sent only when the last one is ready, and so are those that follow their answers.
START_GAP_S = 0.002
MAX_SLEEP_S = 1.0  # what keeps the next request back may end before it said


@dataclass
class Sent:
    """A request of so many `tokens` at time `at`, seconds of the clock."""

    at: float
    tokens: int


class Limits:
    """Waits, first come first served, until a request may be sent; for one event loop.

    Tokens are whole numbers: sums of fractions would be off by a little, and the limit with them.

    Args:
      requests, tokens: the most that may be sent within any `WINDOW_S` seconds; 0: no limit.
      clock: seconds that never go back.
      before: what was sent already, by somebody else.
    """

    def __init__(self, requests: int, tokens: int,
                 clock: Callable[[], float] = time.monotonic, before: Iterable[Sent] = ()):
        self._requests, self._tokens, self._clock = requests, tokens, clock
        self._sent: deque[Sent] = deque(before)
        self._turn = asyncio.Lock()

    async def take(self, tokens: int, is_open: Callable[[], float] = lambda: 0.0) -> Sent:
        """Counts a request, to be sent at once. One of more tokens than the limit counts as that.

        `is_open`: seconds for which nothing may be sent for other reasons.
        """
        if self._tokens:
            tokens = min(tokens, self._tokens)
        async with self._turn:  # a lock is fair: nobody small overtakes somebody large for ever
            await asyncio.sleep(START_GAP_S)
            while (wait_s := max(self._wait_s(tokens), is_open())) > 0:
                await asyncio.sleep(min(wait_s, MAX_SLEEP_S))
            sent = Sent(self._clock(), tokens)
            if self._requests or self._tokens:
                self._sent.append(sent)
            return sent

    def sent(self) -> list[Sent]:
        """What counts against the limits, the oldest first."""
        return list(self._sent)

    def settle(self, sent: Sent, tokens: int) -> None:
        """It used other `tokens` than counted. More than the limit would block for a minute."""
        sent.tokens = min(tokens, self._tokens) if self._tokens else tokens

    def _wait_s(self, tokens: int) -> float:
        """Seconds until a request of so many tokens fits into the window."""
        now = self._clock()
        while self._sent and self._sent[0].at <= now - WINDOW_S:
            self._sent.popleft()
        requests_over = len(self._sent) + 1 - self._requests if self._requests else 0
        tokens_over = self._tokens and sum(s.tokens for s in self._sent) + tokens - self._tokens
        for sent in self._sent:
            if requests_over <= 0 and tokens_over <= 0:
                break
            requests_over, tokens_over = requests_over - 1, tokens_over - sent.tokens
            if requests_over <= 0 and tokens_over <= 0:
                return sent.at + WINDOW_S - now
        return 0.0
