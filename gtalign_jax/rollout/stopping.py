"""Seeing on the device that a row has just written a certain text, whatever its tokens.

A text such as "</payoff>" is one token here, five tokens there, and its last character may be the
first of a longer token. So each token's text is run through the automaton that looks for the text
(Knuth, Morris and Pratt), once, for each state that the automaton can be in:

    state' = table[token, state],   state = how many characters of the text were just written

Of several texts each is looked for only after the one before it: a "</payoff>" that is mentioned
before any "<payoff>" closes nothing. On the device this is one look-up per token. The sampler
itself knows no text.
"""

from collections.abc import Sequence

import numpy as np


def stop_table(pieces: Sequence[str], *texts: str) -> np.ndarray:
    """The next state of every (token, state), int8 `[V, N]`; the last state stays.

    N is 1 more than the texts have characters; state N - 1: all of them were written, in order.

    Args:
      pieces: what each token id writes, "" for nothing (`data.chat.token_pieces`).
      texts: of ASCII characters.

    Raises ValueError for texts that are empty, too long or not ASCII.
    """
    together = "".join(texts)
    if not all(texts) or not 0 < len(together) < 127 or not together.isascii():
        raise ValueError(f"text={' '.join(texts)!r}: expected 1 to 126 ASCII characters")
    step_CN = _automaton(texts)
    state_VN = np.tile(np.arange(step_CN.shape[1], dtype=np.int8), (len(pieces), 1))
    alive = np.array([i for i, piece in enumerate(pieces) if piece], np.int64)
    at = 0
    while alive.size:  # all tokens at once, character by character
        codes = np.array([min(ord(pieces[i][at]), 128) for i in alive])
        state_VN[alive] = np.take_along_axis(step_CN[codes], state_VN[alive].astype(np.int64), 1)
        at += 1
        alive = np.array([i for i in alive if len(pieces[i]) > at], np.int64)
    return state_VN


def _automaton(texts: Sequence[str]) -> np.ndarray:
    """Next state by (character, state), int8 [129, N]; character 128 is every other one."""
    N, first = sum(map(len, texts)) + 1, 0
    step_CN = np.zeros((129, N), np.int8)
    for text in texts:  # its states follow those of the text before
        step_CN[:, first : first + len(text)] = first
        for state in range(len(text)):
            for code in {ord(c) for c in text}:
                written = text[:state] + chr(code)
                # The longest beginning of the text with which what was written ends.
                step_CN[code, first + state] = first + next(
                    n for n in range(len(written), -1, -1) if written.endswith(text[:n])
                )
        first += len(text)
    step_CN[:, N - 1] = N - 1
    return step_CN
