"""Seeing on the device that a row has just written a certain text, whatever its tokens.

A text such as "</payoff>" is one token here, five tokens there, and its last character may be the
first of a longer token. So each token's text is run through the automaton that looks for the text
(Knuth, Morris and Pratt), once, for each state that the automaton can be in:

    state' = table[token, state],   state = how many characters of the text were just written

On the device this is one look-up per token. The sampler itself knows no text.
"""

from collections.abc import Sequence

import numpy as np


def stop_table(pieces: Sequence[str], text: str) -> np.ndarray:
    """The next state of every (token, state), int8 `[V, len(text) + 1]`; the last state stays.

    Args:
      pieces: what each token id writes, "" for nothing (`data.chat.token_pieces`).
      text: of ASCII characters.

    Raises ValueError for a text that is empty, too long or not ASCII.
    """
    if not 0 < len(text) < 127 or not text.isascii():
        raise ValueError(f"text={text!r}: expected 1 to 126 ASCII characters")
    step_CN = _automaton(text)
    state_VN = np.tile(np.arange(len(text) + 1, dtype=np.int8), (len(pieces), 1))
    alive = np.array([i for i, piece in enumerate(pieces) if piece], np.int64)
    at = 0
    while alive.size:  # all tokens at once, character by character
        codes = np.array([min(ord(pieces[i][at]), 128) for i in alive])
        state_VN[alive] = np.take_along_axis(step_CN[codes], state_VN[alive].astype(np.int64), 1)
        at += 1
        alive = np.array([i for i in alive if len(pieces[i]) > at], np.int64)
    return state_VN


def _automaton(text: str) -> np.ndarray:
    """Next state by (character, state), int8 [129, N]; character 128 is every other one."""
    N = len(text) + 1
    step_CN = np.zeros((129, N), np.int8)
    for state in range(N - 1):
        for code in {ord(c) for c in text}:
            written = text[:state] + chr(code)
            # The longest beginning of the text with which what was written ends.
            step_CN[code, state] = next(
                n for n in range(len(written), -1, -1) if written.endswith(text[:n])
            )
    step_CN[:, N - 1] = N - 1
    return step_CN
