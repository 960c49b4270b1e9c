"""The text of a completion while it grows: what is final leaves, half a character waits."""

from transformers import PreTrainedTokenizerBase

from gtalign_jax.data.chat import decode

CONTEXT = 8  # tokens before the new ones that are decoded with them: spaces depend on what precedes
LONGEST = 4  # bytes of a character, so tokens at most that one may be spread over
BROKEN = "\ufffd"  # what a character decodes to of which bytes are missing


class TextStream:
    """Turns growing token ids into pieces of text, at a cost that does not grow with the length.

    The pieces of one completion add up to `decode(tokenizer, ids)`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._done = 0  # tokens whose text has left
        self._sent = ""

    @property
    def sent(self) -> str:
        return self._sent

    def more(self, ids: list[int]) -> str:
        """The text of `ids` that has not left yet, up to the last whole character."""
        first = max(0, self._done - CONTEXT)
        before = decode(self._tokenizer, ids[first : self._done])
        for end in range(len(ids), max(self._done, len(ids) - LONGEST), -1):
            text = decode(self._tokenizer, ids[first:end])
            if not text.endswith(BROKEN):
                return self._leave(text[len(before):], end)
        return ""

    def rest(self, ids: list[int]) -> str:
        """All that has not left yet; a broken last character too, since nothing will mend it."""
        text = decode(self._tokenizer, ids)
        if not text.startswith(self._sent):  # a tokenizer whose text depends on more than CONTEXT
            return self._leave("", len(ids))
        return self._leave(text[len(self._sent):], len(ids))

    def _leave(self, text: str, done: int) -> str:
        self._done, self._sent = done, self._sent + text
        return text
