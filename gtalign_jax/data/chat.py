"""Chat messages -> token ids and back: the template applied once, one BOS, the ids that stop.

Knows no task; a tokenizer is whatever transformers' AutoTokenizer loads (sentencepiece included).
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
MAX_ID = 2**31  # ids are int32
TOKENIZER_FILES = "tokenizer.json with tokenizer_config.json, or tokenizer.model"
NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or a hub name; never runs code that comes with it.

    Raises:
      ValueError: it cannot be read, or only by such code; names the directory.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # Whatever a file holds that is not as transformers expects, it fails as Python does.
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        if "trust_remote_code" in str(error):
            reason = "it comes as code of its own, which is never run"
        raise ValueError(
            f"{path}: its tokenizer cannot be loaded: {reason}; allowed: the files of a tokenizer "
            f"that transformers knows, {TOKENIZER_FILES}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages,
                variables: Mapping[str, Any] = NO_VARIABLES) -> str:
    """The prompt text: messages in the chat template, with the opening of the assistant's turn.

    `variables`: what else the template may ask for, such as {"enable_thinking": False}.

    Raises:
      TypeError: messages is a string (a text on which a template may have been applied already).
      ValueError: the tokenizer has no chat template, or one that fails or refuses the messages.
    """
    if isinstance(messages, str):
        raise TypeError(
            "a prompt must be a list of chat messages ({'role', 'content'}), not a string: the "
            f"chat template is applied here, exactly once. Got {messages[:60]!r}"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; add chat_template "
            "to its tokenizer_config.json, or use the model's instruction-tuned variant"
        )
    return _templated(tokenizer, messages, add_generation_prompt=True, **variables)


def _templated(tokenizer: PreTrainedTokenizerBase, messages: Messages, **variables: Any) -> str:
    """The text that the chat template makes; it runs in jinja2's sandbox, and reads no files."""
    turns = [dict(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **variables)
    except Exception as error:  # a template fails as Python does, and refuses what it likes
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} fails: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of a prompt, with exactly one BOS where the tokenizer uses one.

    The ids are those of `apply_chat_template(messages, add_generation_prompt=True)`. Only where
    the template forgets the BOS that the tokenizer puts before plain text, it is put there.

    Raises:
      TypeError, ValueError: as `render_chat`; ValueError also when the template writes two BOS.
    """
    return encode_chats(tokenizer, [messages])[0]


def encode_chats(tokenizer: PreTrainedTokenizerBase, chats: Iterable[Messages],
                 variables: Mapping[str, Any] = NO_VARIABLES) -> list[list[int]]:
    """`encode_chat` of many prompts, in one call of the tokenizer; `variables` as `render_chat`."""
    texts = [render_chat(tokenizer, messages, variables) for messages in chats]
    if not texts:
        return []
    bos = tokenizer.bos_token_id
    starts_text = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    rows = []
    for ids in tokenizer(texts, add_special_tokens=False).input_ids:
        if starts_text and ids[:1] != [bos]:
            ids = [bos, *ids]
        if starts_text and ids[:2] == [bos, bos]:
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} writes the BOS token twice"
            )
        rows.append(list(ids))
    return rows


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of what follows a prompt: no BOS and no EOS (the caller closes the turn)."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The token ids that end a completion, sorted.

    They are the EOS of generation_config.json (one id or several), the tokenizer's EOS, and the
    special token with which the chat template closes an assistant's turn: base models often name
    only the end of a document, while their template ends a turn with another token.

    Args:
      tokenizer: the model's tokenizer.
      generation_config: the content of generation_config.json, or None where there is none.

    Raises:
      ValueError: there is no such id, or what is given there is none.
    """
    listed = (generation_config or {}).get("eos_token_id")
    given = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(i) is int and 0 <= i < MAX_ID for i in given):
        raise ValueError(f"generation_config.json of {tokenizer.name_or_path!r}: eos_token_id="
                         f"{listed!r:.80}; allowed: a token id, or a list of them")
    ids = set(given)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    turn_end = _turn_end(tokenizer)
    if turn_end is not None:
        ids.add(turn_end)
    if not ids:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token and its generation_config "
            "names none: a completion could never end; set eos_token"
        )
    return tuple(sorted(int(i) for i in ids))


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "closing"}]
    text = _templated(tokenizer, turns)
    after = tokenizer(text.rpartition("closing")[2].lstrip(), add_special_tokens=False).input_ids
    added = tokenizer.added_tokens_decoder
    return after[0] if after and after[0] in added and added[after[0]].special else None


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a completion: special tokens dropped, spaces left as they were sampled."""
    return tokenizer.decode(
        [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def token_pieces(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """What each of `size` token ids writes, right in its printable ASCII characters.

    Tokens that `decode` drops, and ids without a token, write "". All else (spaces, bytes that are
    part of a character) stands for itself as the tokenizer spells it, which is never ASCII.
    """
    special = set(tokenizer.all_special_ids)  # and those that no role of the tokenizer's names:
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = min(size, len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(range(known))
    pieces = ["" if i in special or name is None else _BYTE.sub(_byte, name)
              for i, name in enumerate(names)]
    return pieces + [""] * (size - known)


_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")  # how sentencepiece names the byte tokens


def _byte(match: re.Match) -> str:
    return chr(int(match[1], 16))
