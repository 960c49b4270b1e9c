"""Where the edited matrix enters a row's tokens: what is kept, and what is forced after it.

    kept tokens      "… <payoff>"                         as they were sampled
    forced tokens    "{edited matrix}</payoff> …"         as the tokenizer writes them

The joint rarely falls between two sampled tokens (">{" is one token in many vocabularies), so the
last kept token is the last one that ends before the matrix, and the forced text starts there.
"""

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gtalign_jax.data.chat import decode, encode_completion
from gtalign_jax.game.steering import Steered, SteeringConfig, steer

OPENING = "<payoff>"
CLOSING = "</payoff>"
MATRIX = (OPENING, CLOSING)  # a row waits when it has written one after the other
UNCHANGED = "the prices change neither the matrix nor the choice"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What steering did to one row.

    Attributes:
      steered: tokens were forced.
      reason: why none were, else None.
      result: the matrix before and after with both decisions; None where none could be read.
    """

    steered: bool
    reason: str | None
    result: Steered | None


@dataclasses.dataclass(frozen=True)
class Splice:
    """The first `keep` tokens of a row stay, `forced` ones take the place of those after them."""

    keep: int
    forced: tuple[int, ...]
    outcome: Outcome


def plan(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], config: SteeringConfig,
         room: int) -> Splice:
    """How a row goes on that has just closed its matrix.

    Args:
      ids: the completion's tokens up to the one that closed "</payoff>".
      room: the most tokens that the completion may have; one must be left to be sampled.
    """
    text = decode(tokenizer, ids)
    try:
        result = steer(text, config)
    except ValueError as error:
        return _unspliced(ids, str(error), None)
    if result.forced is None:
        return _unspliced(ids, result.held or UNCHANGED, result)
    head = text[: text.index(OPENING) + len(OPENING)]
    keep, forced = _joined(tokenizer, ids, head, result.forced)
    if decode(tokenizer, [*ids[:keep], *forced]) != head + result.forced:
        return _unspliced(ids, "the tokenizer does not write the edited matrix as it reads", result)
    if keep + len(forced) >= room:
        reason = f"no room: {keep + len(forced)} tokens up to the answer, the limit is {room}"
        return _unspliced(ids, reason, result)
    return Splice(keep, tuple(forced), Outcome(True, None, result))


def _unspliced(ids: Sequence[int], reason: str, result: Steered | None) -> Splice:
    return Splice(len(ids), (), Outcome(False, reason, result))


def _joined(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], head: str,
            forced: str) -> tuple[int, list[int]]:
    """(number of kept tokens, forced ones) for the text head + forced, where head is sampled."""
    low, high = 0, len(ids)
    whole = tokenizer.convert_tokens_to_ids(OPENING)
    if whole in ids and len(decode(tokenizer, ids[: ids.index(whole) + 1])) == len(head):
        low = high = ids.index(whole) + 1  # the tag is a token of its own: nothing to look for
    while low < high:  # the most tokens whose text is no longer than the head
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(decode(tokenizer, ids[:middle])) <= len(head) else (
            low, middle - 1)
    while not head.startswith(decode(tokenizer, ids[:low])):  # it ends within a character
        low -= 1
    rest = head[len(decode(tokenizer, ids[:low])):] + forced
    for before in ("", "\n"):  # some tokenizers start every text with a space; here, before a line
        cut = len(encode_completion(tokenizer, before))
        after = encode_completion(tokenizer, before + rest)[cut:]
        if decode(tokenizer, [*ids[:low], *after]) == head + forced:
            return low, after
    # Then the whole is encoded, and what it has in common with the sampled tokens is kept.
    whole = encode_completion(tokenizer, head + forced)
    same = (a == b for a, b in zip(ids, whole, strict=False))
    keep = next((i for i, equal in enumerate(same) if not equal), min(len(ids), len(whole)))
    return keep, whole[keep:]
