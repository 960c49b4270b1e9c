"""The text of a completion while it grows: what is final leaves, half a character waits."""

import collections

from transformers import PreTrainedTokenizerBase

from gtalign_jax.data.chat import decode

CONTEXT = 8  # tokens before the new ones, at least: spaces depend on what precedes
LONGEST = 4  # bytes of a character, so tokens at most that one may be spread over
BROKEN = "\ufffd"  # what a character decodes to of which bytes are missing


class TextStream:
    """Turns growing token ids into pieces of text, at a cost that does not grow with the length.

    The pieces of one completion add up to `decode(tokenizer, ids)`; only where a byte that belongs
    to no character makes a tokenizer read those around it anew, they keep what has left.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._done = 0  # tokens whose text has left
        self._sent = ""
        # Where pieces with text begin, the first of them CONTEXT tokens back: some tokenizers read
        # bytes right only from the beginning of a character on.
        self._begins: collections.deque[int] = collections.deque()

    @property
    def sent(self) -> str:
        return self._sent

    def more(self, ids: list[int]) -> str:
        """The text of `ids` that has not left yet, up to the last whole character."""
        first, before = self._context(ids)
        for end in range(len(ids), max(self._done, len(ids) - LONGEST), -1):
            text = decode(self._tokenizer, ids[first:end])
            if not text.endswith(BROKEN):
                return self._leave(text[len(before):], end)
        return ""

    def rest(self, ids: list[int]) -> str:
        """All that has not left yet; a broken last character too, since nothing will mend it."""
        text, before = decode(self._tokenizer, ids), self._sent
        if not text.startswith(before):
            first, before = self._context(ids)
            text = decode(self._tokenizer, ids[first:])
        return self._leave(text[len(before):], len(ids))

    def _context(self, ids: list[int]) -> tuple[int, str]:
        """(where to decode from, the text from there that has left)."""
        first = self._begins[0] if self._begins else 0
        return first, decode(self._tokenizer, ids[first : self._done])

    def _leave(self, text: str, done: int) -> str:
        if text:
            self._begins.append(self._done)
        while len(self._begins) > 1 and self._begins[1] <= done - CONTEXT:
            self._begins.popleft()
        self._done, self._sent = done, self._sent + text
        return text
