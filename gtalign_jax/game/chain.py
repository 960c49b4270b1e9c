"""The reasoning chain: text <-> (thinking, payoff, analyze, response) (paper section 3).

    <thinking>...</thinking><payoff>{...}</payoff><analyze>...</analyze><response>...</response>

A block is the text between its first opening tag and the first closing tag after that. Everything
here is linear in the length of the text, never raises on any text, and evaluates nothing: a
mistake of the model is data (`Chain.error`). Knows no tokenizer and no reward.

The paper's own code differs on purpose in two points: it takes booleans and NaN or Infinity for
payoffs; here they make the matrix unreadable.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

USER_ACTIONS = ("VQ", "DQ")
ACTIONS = ("DA", "CQ", "AQ")
PLAYERS = ("LLM", "user")
KEYS = tuple(f"{user}_{action}" for user in USER_ACTIONS for action in ACTIONS)
REASONING = ("tagged", "none")  # the four blocks, or the bare response
BLOCKS = ("thinking", "payoff", "analyze", "response")

MAX_PAYOFF_CHARS = 20_000
MAX_BRACKETS = 64  # a matrix has seven; the rest is room for repeated keys

SYSTEM = (
    "You are an assistant in a repeated game with your user. A turn is good when both sides gain: "
    "the user gets a correct, safe answer to what was really meant, with little to read and "
    "little to wait for; you give it without wasted words. When a question leaves its meaning "
    "open, asking can be worth more than guessing. When a request would harm somebody, offer the "
    "nearest thing that helps without the harm."
)

INSTRUCTION = """\
Before you answer, treat this turn as a game and write exactly four blocks, in this order, with \
nothing before, between or after them:
<thinking>...</thinking>
<payoff>...</payoff>
<analyze>...</analyze>
<response>...</response>

The user has asked in one of two ways: VQ, a question that is vague or can be read in several \
ways, or DQ, one that is detailed and clear. You can act in three ways: DA, answer directly; CQ, \
ask one clarifying question and no more; AQ, answer and add one follow-up question.

<thinking>: two to five sentences. Say which kind of question this is, and what each of your three \
actions would bring and cost both sides: being right, settling what was meant, time, length, safety.
<payoff>: one strict JSON object, no comments and no trailing comma, with exactly the keys \
"VQ_DA", "VQ_CQ", "VQ_AQ", "DQ_DA", "DQ_CQ", "DQ_AQ". The value of each is an object with exactly \
two numbers, "LLM" (what you gain) and "user" (what the user gains), between -5 and 5 with at \
most one decimal; higher is better.
<analyze>: list the cells on the Pareto frontier: those for which no other cell is at least as \
good for both sides and better for one. Among them choose the cell with the largest LLM + user; \
if several tie, the largest user; if they still tie, the largest LLM. Name its key.
<response>: carry the chosen action out for the user. No word about the game here."""

# For the baseline without blocks ("none" of REASONING): what both sides gain by, and no format.
PLAIN_SYSTEM = (
    "You are an assistant. Give your user a short, correct and helpful answer to what was really "
    "meant. When a question leaves its meaning open, asking can be worth more than guessing. When "
    "a request would harm somebody, offer the nearest thing that helps without the harm."
)

BRIEF_INSTRUCTION = "Write thinking, payoff, analyze, response; act on the best cell."

_TAGS = {name: (f"<{name}>", f"</{name}>") for name in BLOCKS}
_KEY_SET, _PLAYER_SET, _NUMBERS = frozenset(KEYS), frozenset(PLAYERS), (int, float)
_CURLY_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})
_JOINTS = tuple(
    re.compile(rf"</{before}>\s*<{after}>")
    for before, after in zip(BLOCKS, BLOCKS[1:], strict=False)
)
_END = re.compile(r"</response>$", re.MULTILINE)
# Each alternative eats all it can and nothing follows it, so no text makes it backtrack.
_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)|(?P<mark>[{}:,])"""
    r"""|"(?P<double>[^"\\\n]*)"|'(?P<single>[^'\\\n]*)'"""
    r"""|(?P<number>[+-]?\s?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"""
)


@dataclass(frozen=True)
class Chain:
    """One completion, taken apart.

    Attributes:
      thinking, analyze, response: the stripped blocks, None where absent.
      payoff: the matrix as written, {"VQ_DA": {"LLM": x, "user": y}, ...}; None if unreadable.
      payoff_UAP: the same as float64 [2, 3, 2]; None if unreadable.
      format_ok: the whole text is four blocks in order with a readable matrix (design: format = 1).
      prefix: the text before the first `<response>`, what the user waits for.
      error: why payoff or response is missing, else None.
    """

    thinking: str | None
    payoff: dict[str, dict[str, float]] | None
    analyze: str | None
    response: str | None
    payoff_UAP: np.ndarray | None
    format_ok: bool
    prefix: str
    error: str | None


def parse(text: str) -> Chain:
    """Takes a completion apart; total over all strings."""
    payoff_block = _block(text, "payoff")
    payoff, payoff_UAP, error = None, None, "no <payoff> block"
    if payoff_block is not None:
        payoff, payoff_UAP, error = _read_payoff(payoff_block)
    response = _block(text, "response")
    if error is None and response is None:
        error = "no closed <response> block"
    return Chain(
        thinking=_block(text, "thinking"),
        payoff=payoff,
        analyze=_block(text, "analyze"),
        response=response,
        payoff_UAP=payoff_UAP,
        format_ok=payoff is not None and _is_four_blocks(text),
        prefix=text.partition("<response>")[0],
        error=error,
    )


def plain(text: str) -> Chain:
    """A completion that is meant to have no blocks: all of it is the response.

    There is nothing that the user waits for, no matrix and no format to keep; an empty completion
    has no response.
    """
    response = text.strip()
    return Chain(
        thinking=None, payoff=None, analyze=None, response=response or None, payoff_UAP=None,
        format_ok=False, prefix="", error=None if response else "an empty completion",
    )


def render(
    thinking: str, payoff: Mapping[str, Mapping[str, float]] | np.ndarray, analyze: str,
    response: str,
) -> str:
    """A well-formed chain; `payoff` is a mapping by key or a `payoff_UAP` array."""
    if isinstance(payoff, Mapping):
        payoff = np.array([[payoff[key][player] for player in PLAYERS] for key in KEYS])
    return (
        f"<thinking>{thinking}</thinking><payoff>{payoff_json(payoff)}</payoff>"
        f"<analyze>{analyze}</analyze><response>{response}</response>"
    )


def payoff_json(payoff_UAP: np.ndarray) -> str:
    """The matrix as the JSON object that the instruction asks for; whole numbers without `.0`."""
    return json.dumps(payoff_dict(payoff_UAP))


def payoff_dict(payoff_UAP: np.ndarray) -> dict[str, dict[str, float]]:
    """{"VQ_DA": {"LLM": x, "user": y}, ...} with whole numbers as int; ValueError if not finite."""
    cells_IP = np.asarray(payoff_UAP, np.float64).reshape(len(KEYS), len(PLAYERS))
    if not np.isfinite(cells_IP).all():
        raise ValueError(f"payoffs must be finite, got {cells_IP.tolist()}")
    return {
        key: {player: _short(value) for player, value in zip(PLAYERS, row_P, strict=True)}
        for key, row_P in zip(KEYS, cells_IP.tolist(), strict=True)
    }


def rewrite(block: str, payoff_UAP: np.ndarray) -> str:
    """A written matrix with other numbers, in its own notation: quotes, spaces, order of keys.

    Numbers that stay the same keep their text. `block` is the inside of a payoff block that
    `parse` reads; in a notation that cannot be followed (JSON with escapes) the matrix is written
    anew, compact if the block has no space after a comma or colon.
    """
    if len(block) > MAX_PAYOFF_CHARS:  # white space around the object is not counted by `parse`
        block = block.strip()
    block = block.translate(_CURLY_QUOTES)
    cells = payoff_dict(payoff_UAP)
    pieces, end, path = [], 0, []
    for token in _TOKEN.finditer(block):
        if token["mark"] == "{":
            path.append("")
        elif token["mark"] == "}" and path:
            path.pop()
        elif token["number"] is not None and len(path) == len(("key", "player")):
            value = cells.get(path[0], {}).get(path[1])
            if value is not None and value != _read_number(token):
                pieces += [block[end : token.start()], json.dumps(value)]
                end = token.end()
        elif path and token["mark"] is None and token["skip"] is None:
            path[-1] = token["single"] if token["double"] is None else token["double"]
    rewritten = "".join((*pieces, block[end:]))
    _, found_UAP, error = _read_payoff(rewritten.strip())
    if error is None and np.array_equal(found_UAP, payoff_UAP):
        return rewritten
    spaced = payoff_json(payoff_UAP)
    return spaced if re.search(r"[,:]\s", block) else spaced.replace(" ", "")


def read_matrix(matrix: Any) -> np.ndarray:
    """`payoff_UAP`, float64 [2, 3, 2], of a parsed JSON value; ValueError where it is none."""
    if not _is_plain_matrix(matrix) and (error := _matrix_error(matrix)) is not None:
        raise ValueError(error)
    cells = [matrix[key][player] for key in KEYS for player in PLAYERS]
    shape = (len(USER_ACTIONS), len(ACTIONS), len(PLAYERS))
    return np.array(cells, np.float64).reshape(shape)


def _short(value: float) -> int | float:
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def _block(text: str, name: str) -> str | None:
    # Two finds, not a lazy regex: many opening tags without a closing one would be quadratic.
    opening, closing = _TAGS[name]
    start = text.find(opening)
    end = text.find(closing, start + len(opening)) if start >= 0 else -1
    return text[start + len(opening) : end].strip() if end >= 0 else None


def _is_four_blocks(text: str) -> bool:
    """Starts with `<thinking>`, has each joint after the one before, closes at a line end."""
    if not text.startswith("<thinking>"):
        return False
    position = len("<thinking>")
    for pattern in (*_JOINTS, _END):
        match = pattern.search(text, position)
        if match is None:
            return False
        position = match.end()
    return True


def _read_payoff(block: str) -> tuple[dict | None, np.ndarray | None, str | None]:
    """(matrix as written, payoff_UAP, None) or (None, None, reason)."""
    if len(block) > MAX_PAYOFF_CHARS:
        return None, None, f"payoff block longer than {MAX_PAYOFF_CHARS} characters"
    if sum(map(block.count, "{[(")) > MAX_BRACKETS:
        return None, None, f"payoff block with more than {MAX_BRACKETS} brackets"
    if not block.isascii():
        block = block.translate(_CURLY_QUOTES)
    try:
        matrix = json.loads(block)
    except ValueError:  # also numbers of thousands of digits; no RecursionError: few brackets
        try:
            matrix = _read_literal(block)
        except ValueError as error:
            return None, None, f"payoff is neither JSON nor a Python dict: {error}"
    try:
        return matrix, read_matrix(matrix), None
    except ValueError as error:
        return None, None, str(error)


def _is_plain_matrix(matrix: Any) -> bool:
    """What nearly every matrix is: ordinary numbers under the right keys. Of any other,
    `_matrix_error` says more, and takes longer."""
    if not isinstance(matrix, dict) or matrix.keys() != _KEY_SET:
        return False
    cells = list(matrix.values())
    if not all(type(cell) is dict and cell.keys() == _PLAYER_SET for cell in cells):
        return False
    values = [value for cell in cells for value in cell.values()]
    return frozenset(_NUMBERS).issuperset(map(type, values)) and all(
        [-1e300 < value < 1e300 for value in values]  # NaN is not
    )


def _matrix_error(matrix: Any) -> str | None:
    """What keeps a parsed value from being a payoff matrix, None if nothing does."""
    if not isinstance(matrix, dict):
        return f"payoff is a {type(matrix).__name__}, not an object"
    if matrix.keys() != _KEY_SET:
        missing = sorted(_KEY_SET - matrix.keys())
        extra = sorted(str(key)[:20] for key in matrix.keys() - _KEY_SET)
        return f"payoff keys: missing {missing}, unexpected {extra[:6]}"
    for key in KEYS:
        cell = matrix[key]
        if not isinstance(cell, dict) or cell.keys() != _PLAYER_SET:
            return f"payoff cell {key} must hold exactly LLM and user"
        for player in PLAYERS:
            value = cell[player]
            if not isinstance(value, _NUMBERS) or isinstance(value, bool):
                return f"payoff {key}.{player} is a {type(value).__name__}, not a number"
            if not _is_finite(value):
                return f"payoff {key}.{player} is not finite"
    return None


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _read_literal(block: str) -> dict[str, dict[str, float]]:
    """An object of objects of numbers in Python's notation: single quotes, trailing commas,
    comments. Raises ValueError. Two levels are all there is, so nothing can recurse."""
    tokens, end = [], 0
    while match := _TOKEN.match(block, end):
        if match["skip"] is None:
            tokens.append(match)
        end = match.end()
    if end < len(block):
        raise ValueError(f"unexpected {block[end : end + 12]!r} at character {end}")
    kinds = iter(tokens)
    matrix = _read_dict(kinds, lambda token: _read_dict(kinds, _read_number, token))
    if next(kinds, None) is not None:
        raise ValueError("text after the object")
    return matrix


def _read_dict(tokens, read_value, token: re.Match | None = None) -> dict:
    """One `{name: value, ...}` from an iterator of tokens; `token` is its brace if already read."""
    _expect(token or next(tokens, None), "{")
    found = {}
    while True:
        token = next(tokens, None)
        if token is not None and token["mark"] == "}":
            return found
        name = None if token is None else token["double"]
        if name is None and token is not None:
            name = token["single"]
        if name is None:
            raise ValueError(f"expected a quoted name or '}}' {_where(token)}")
        _expect(next(tokens, None), ":")
        found[name] = read_value(next(tokens, None))
        token = next(tokens, None)
        if token is not None and token["mark"] == "}":
            return found
        _expect(token, ",")


def _read_number(token: re.Match | None) -> int | float:
    if token is None or token["number"] is None:
        raise ValueError(f"expected a number {_where(token)}")
    digits = re.sub(r"\s", "", token["number"])
    return int(digits) if re.fullmatch(r"[+-]?\d+", digits) else float(digits)


def _expect(token: re.Match | None, mark: str) -> None:
    if token is None or token["mark"] != mark:
        raise ValueError(f"expected {mark!r} {_where(token)}")


def _where(token: re.Match | None) -> str:
    return "at the end" if token is None else f"before character {token.end()}"
