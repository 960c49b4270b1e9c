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

    The closing tag is no content, so no stop is looked for in it; of several stops the one counts
    that is complete first.

    Attributes:
      stopped: one of `stops` came up in the content, which ends before it.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
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
        self._trim(self._inside + text)
        end = self._inside.find(CLOSE)
        if end >= 0:
            return self._last(end)
        end = len(self._inside) - _begun(self._inside, (CLOSE,))
        if self._stop(end) is not None:
            return self._last(end)
        # A stop that is complete may still turn out to reach into the closing tag.
        undecided = self._stop(len(self._inside))
        if undecided is None:
            undecided = len(self._inside) - _begun(self._inside, self._stops)
        final = self._inside[: min(end, undecided)].rstrip()
        self._inside = self._inside[len(final) :]
        self._given = self._given or bool(final)
        return final

    def finish(self) -> str:
        """The rest, when the completion has ended."""
        if self._closed:
            return ""
        if self._inside is None:
            self._trim(self._before)
        # A completion that was cut may end within its closing tag; a lone "<" may be meant.
        elif (cut := _begun(self._inside, (CLOSE,))) > 1:
            self._inside = self._inside[:-cut]
        return self._last(len(self._inside))

    def _trim(self, inside: str) -> None:
        self._inside = inside if self._given else inside.lstrip()

    def _stop(self, end: int) -> int | None:
        """Where the stop begins that is complete first within the first `end` characters."""
        found = [(at + len(stop), at) for stop in self._stops
                 if (at := self._inside.find(stop, 0, end)) >= 0]
        return min(found)[1] if found else None

    def _last(self, end: int) -> str:
        """The content's last piece: `end` characters, or what stands before a stop in them."""
        stop = self._stop(end)
        self.stopped, self._closed = stop is not None, True
        return self._inside[: end if stop is None else stop].rstrip()


def _begun(text: str, ends: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of one of `ends`."""
    sizes = range(min(len(text), max(map(len, ends), default=1) - 1), 0, -1)
    return next((n for n in sizes if any(end.startswith(text[-n:]) for end in ends)), 0)


def content_of(text: str, stops: Sequence[str] = ()) -> tuple[str, bool]:
    """(content of a whole completion, whether one of `stops` ended it)."""
    content = Content(stops)
    shown = content.feed(text) + content.finish()
    return shown, content.stopped
