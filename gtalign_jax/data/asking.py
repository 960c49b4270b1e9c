"""How a policy was taught to be asked, and a user's conversation put to it that way.

    ours    our system text, and the whole instruction before the last question (as the prompts of
            files are sent with data.instruction = "ours")
    brief   the short system text of the built-in tasks
    plain   the system text of the baseline that was trained without blocks
    none    the conversation as it is

Knows no tokenizer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax.data import builtin, sources
from gtalign_jax.data.sources import TEXTS, DataConfig, Messages

OURS, BRIEF, PLAIN, NONE = "ours", "brief", "plain", "none"
_BRIEF = builtin.messages_for("")[0]["content"]
ASKED: dict[str, tuple[str, str]] = {  # (system text, what stands before the last question)
    OURS: TEXTS["ours"], BRIEF: (_BRIEF, ""), PLAIN: TEXTS["none"], NONE: ("", ""),
}
INSTRUCTIONS = tuple(ASKED)


def instruction_of(data: DataConfig) -> str:
    """One of `INSTRUCTIONS`: how a run with this data asked its policy.

    Prompts sent as their files have them ask for the same blocks in other words: "ours".
    """
    if data.source == "builtin":
        return BRIEF if data.reasoning == "tagged" else NONE
    return OURS if data.reasoning == "tagged" else PLAIN


def ask(messages: Sequence[Mapping[str, Any]], instruction: str) -> Messages:
    """A conversation that ends with the user, as a policy taught by `instruction` expects it.

    What the caller's own system messages say follows ours, in one message: many chat templates
    allow no second one.

    Raises:
      ValueError: an unknown instruction, messages that are none or do not end with the user.
      TypeError: a plain string instead of messages.
    """
    check_instruction(instruction)
    turns = sources.read_messages(messages)
    if turns[-1]["role"] != "user":
        raise ValueError(
            f"messages: the last one is from {turns[-1]['role']!r}; it must be from 'user'"
        )
    system, before = ASKED[instruction]
    told = [system, *(turn["content"] for turn in turns if turn["role"] == "system")]
    said = [turn for turn in turns if turn["role"] != "system"]
    text = "\n\n".join(part for part in told if part.strip())
    first = [{"role": "system", "content": text}] if text else []
    return (*first, *said[:-1], {"role": "user", "content": before + said[-1]["content"]})


def check_instruction(instruction: str, key: str = "instruction") -> None:
    """Raises ValueError for one that is not in `INSTRUCTIONS`."""
    if instruction not in INSTRUCTIONS:  # a file may hold any JSON value: nothing is hashed
        raise ValueError(f"{key}={instruction!r}; allowed: {', '.join(INSTRUCTIONS)}")
