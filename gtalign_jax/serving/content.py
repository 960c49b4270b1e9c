"""What of a completion the user reads: the inside of its response block, as it becomes final.

    text so far      <thinking>…</analyze><response>It is 4.</resp
    may be shown                                    It is 4.

A completion without a response block is shown whole, once it is certain that none will come. The
same object serves streamed and whole replies, so that both give the same content. Knows no tokens.
"""

from collections.abc import Sequence

OPEN, CLOSE = "<response>", "</response>"


class Content:
    """Fed with the pieces of a completion's text, gives the pieces of its content.

    Attributes:
      stopped: one of `stops` came up in the content, which ends before it.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._ends = (CLOSE, *stops)
        self._longest = max(map(len, self._ends))
        self._before = ""  # all of the text, until OPEN was found
        self._inside: str | None = None  # what follows OPEN and was not given out yet
        self._given = False
        self._closed = False
        self.stopped = False

    def feed(self, text: str) -> str:
        """What is final and new after `text`."""
        if self._closed:
            return ""
        if self._inside is None:
            searched = max(0, len(self._before) - len(OPEN))
            self._before += text
            found = self._before.find(OPEN, searched)
            if found < 0:
                return ""
            text, self._before = self._before[found + len(OPEN) :], ""
            self._inside = ""
        self._inside += text
        return self._give()

    def finish(self) -> str:
        """The rest, when the completion has ended."""
        if self._closed:
            return ""
        if self._inside is None:
            self._inside, self._ends = self._before, self._ends[1:]
            shown = self._give() if self._ends else ""
            if self._closed:
                return shown
            return shown + self._rest()
        # A completion that was cut may end within its closing tag; a lone "<" may be meant.
        cut = self._inside.rfind("</")
        if cut >= 0 and CLOSE.startswith(self._inside[cut:]):
            self._inside = self._inside[:cut]
        return self._rest()

    def _rest(self) -> str:
        rest = self._inside.rstrip()
        self._closed = True
        return rest if self._given else rest.lstrip()

    def _give(self) -> str:
        if not self._given:
            self._inside = self._inside.lstrip()
        ends = [(self._inside.find(end), end) for end in self._ends]
        found = [(at, end) for at, end in ends if at >= 0]
        if found:
            at, end = min(found)
            self.stopped, self._closed = end != CLOSE, True
            return self._inside[:at].rstrip()
        final = self._inside[: len(self._inside) - self._held()].rstrip()
        self._inside = self._inside[len(final) :]
        self._given = self._given or bool(final)
        return final

    def _held(self) -> int:
        """How many of the last characters may be the beginning of an end."""
        for size in range(min(self._longest - 1, len(self._inside)), 0, -1):
            tail = self._inside[-size:]
            if any(end.startswith(tail) for end in self._ends):
                return size
        return 0


def content_of(text: str, stops: Sequence[str] = ()) -> tuple[str, bool]:
    """(content of a whole completion, whether one of `stops` ended it)."""
    content = Content(stops)
    shown = content.feed(text) + content.finish()
    return shown, content.stopped
