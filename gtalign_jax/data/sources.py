"""Where prompts come from: the built-in tasks, parquet or JSONL files, or a `datasets` hub name.

Files and hub sets have the schema of the paper's code, one row per prompt:

    prompt        chat messages [{"role": ..., "content": ...}, ...]
    data_source   the task, such as "ambig_qa"
    reward_model  {"ground_truth": ...}
    extra_info    optional; `single_turn_prompt` is the user's whole question without instructions,
                  `chat_history` the conversation so far, up to the user's last message

Rows that break it are reported with file and row, skipped and counted. A column that no row of a
file has is an error, and so is a prompt that is a plain string: its chat template would have been
applied already, or never.
"""

import dataclasses
import glob
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet

from gtalign_jax.data import builtin
from gtalign_jax.data.prompt import Prompt as Prompt
from gtalign_jax.game import chain

log = logging.getLogger(__name__)

REQUIRED = ("prompt", "data_source", "reward_model")
ROLES = ("system", "user", "assistant", "tool")
SPLITS = ("train", "test")
INSTRUCTIONS = ("as_given", "ours")
TEXTS = {  # (system text, what stands before the last question) in place of the file's messages
    "ours": (chain.SYSTEM, f"{chain.INSTRUCTION}\n\n"),
    "none": (chain.PLAIN_SYSTEM, ""),
}
MAX_REPORTS = 20  # malformed rows named one by one; the rest are only counted

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which prompts, and how many of them.

    Attributes:
      source: "builtin", "parquet", "jsonl" or "hub".
      train, test: files or globs (parquet, jsonl), or hub names ("owner/name", or
        "owner/name:config"), whose split of the same name is read.
      instruction: "as_given" sends the file's messages; "ours" sends the chat history, or else
        the bare question, under `game.chain`'s system text and instruction instead.
      reasoning: what the model is asked for: "tagged", the four blocks of `game.chain`, or "none",
        the bare response: built-in prompts then carry no instruction, others our system text
        alone (`instruction` must be "ours", since the file's messages ask for blocks). As
        `reward.reasoning`.
      max_prompt_tokens: longer prompts are dropped and counted.
      seed: of the built-in generator and of the choice that a size makes.
      train_size, test_size: how many prompts; 0 = all (built-in: `builtin.DEFAULT_SIZES`).
    """

    source: str = "builtin"
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    instruction: str = "as_given"
    reasoning: str = "tagged"
    max_prompt_tokens: int = 2048
    seed: int = 0
    train_size: int = 0
    test_size: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_prompt_tokens", 1), ("train_size", 0), ("test_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be >= {least}")
        if self.reasoning == "none" and self.source != "builtin" and self.instruction != "ours":
            raise ValueError(
                f"data.instruction = {self.instruction!r} with data.reasoning = 'none': the "
                "messages of the file ask for the blocks; set data.instruction = 'ours'"
            )


class MalformedRow(ValueError):
    """Why one row cannot become a prompt."""


def load_prompts(cfg: DataConfig, split: str) -> list[Prompt]:
    """The prompts of a split, in the order of their files.

    Raises:
      ValueError: an unknown source, split or instruction; no files; a missing column; a file of
        which no row is usable.
      TypeError: a prompt that is a plain string.
    """
    _check(cfg, split)
    size = {"train": cfg.train_size, "test": cfg.test_size}[split]
    if cfg.source == "builtin":
        return builtin.generate(split, size, cfg.seed, cfg.reasoning)
    asked = cfg.instruction if cfg.reasoning == "tagged" else "none"
    read = list(SOURCES[cfg.source](cfg, split))
    short = [_short_name(name) for name, _ in read]
    prompts = []
    for order, (name, rows) in enumerate(read):
        # Evaluations of other sets of files are compared by these ids; training prompts, and files
        # that the last two parts of their paths do not tell apart, are numbered.
        alone = split == "test" and short.count(short[order]) == 1
        prefix = short[order] if alone else f"{order}:{short[order]}"
        prompts += _read_rows(prefix, name, rows, asked)
    if size and size < len(prompts):
        kept = random.Random(f"subset/{cfg.seed}/{split}").sample(range(len(prompts)), size)
        prompts = [prompts[i] for i in sorted(kept)]
    return prompts


def _check(cfg: DataConfig, split: str) -> None:
    sources = ("builtin", *SOURCES)
    for key, value, allowed in (
        ("split", split, SPLITS),
        ("data.source", cfg.source, sources),
        ("data.instruction", cfg.instruction, INSTRUCTIONS),
        ("data.reasoning", cfg.reasoning, chain.REASONING),
    ):
        if value not in allowed:
            raise ValueError(f"{key} = {value!r}; allowed: {', '.join(allowed)}")
    names = {"train": cfg.train, "test": cfg.test}[split]
    if cfg.source != "builtin" and not names:
        raise ValueError(f"data.{split} is empty; data.source = {cfg.source!r} needs names in it")


def _parquet(cfg: DataConfig, split: str) -> Iterator[tuple[str, list[Row]]]:
    for path in _files(cfg, split):
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except FileNotFoundError:
            raise
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path}: not Parquet that can be read: {_short(error)}") from error
        yield path, rows


def _jsonl(cfg: DataConfig, split: str) -> Iterator[tuple[str, list[Row | MalformedRow]]]:
    for path in _files(cfg, split):
        yield path, read_jsonl(path)


def _hub(cfg: DataConfig, split: str) -> Iterator[tuple[str, list[Row]]]:
    import datasets  # slow to import, and only this source needs it

    for name in {"train": cfg.train, "test": cfg.test}[split]:
        path, _, subset = name.partition(":")
        try:
            rows = datasets.load_dataset(path, subset or None, split=split).to_list()
        except Exception as error:  # of whichever library reads the format that was found there
            raise ValueError(
                f"data.{split}={name!r}: {type(error).__name__}: {_short(error)}; allowed: "
                "owner/name or owner/name:config of a set on the hub"
            ) from error
        yield name, rows


SOURCES = {"parquet": _parquet, "jsonl": _jsonl, "hub": _hub}


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def read_jsonl(path: str) -> list[Row | MalformedRow]:
    """The objects of a JSONL file, in place of a bad line what is wrong with it; no blank lines.

    Raises FileNotFoundError, and ValueError for anything else that cannot be read.
    """
    rows: list[Row | MalformedRow] = []
    try:
        # bytes: a line that is no UTF-8 is a bad line, not a bad file
        with open(path, "rb") as lines:
            for line in lines:
                if line.strip():
                    row, problem = parse_line(line)
                    problem = problem or _unwritable(line, row)
                    rows.append(row if problem is None else MalformedRow(problem))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    return rows


def _unwritable(line: bytes, row: Row) -> str | None:
    """What keeps a row from tokenizers, judges and files: half a surrogate pair has no UTF-8."""
    if b"\\u" in line:
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            return f"half a surrogate pair is no text: {error.object[error.start]!r}"
    return None


def parse_line(line: bytes) -> tuple[dict[str, Any], str | None]:
    """(the JSON object of a line, None), or ({}, what is wrong with the line)."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return {}, f"not a JSON object: {error}"
    if not isinstance(row, dict):
        return {}, f"not a JSON object but a {type(row).__name__}"
    return row, None


def _files(cfg: DataConfig, split: str) -> list[str]:
    found = []
    for pattern in {"train": cfg.train, "test": cfg.test}[split]:
        if "://" in pattern:  # gs:// and the like: pyarrow opens them, globbing is local only
            found.append(pattern)
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"data.{split}: no file matches {pattern!r}")
        found += matches
    return found


def _short_name(name: str) -> str:
    """The last two parts of a path: ids must not depend on where the files lie."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def _read_rows(
    prefix: str, name: str, rows: Sequence[Row | MalformedRow], instruction: str
) -> list[Prompt]:
    if rows and all(isinstance(row, MalformedRow) for row in rows):
        raise ValueError(f"{name}: none of its {len(rows)} lines can be read; the first: {rows[0]}")
    columns = sorted({key for row in rows if isinstance(row, Mapping) for key in row})
    for column in REQUIRED:
        if column not in columns:
            raise ValueError(
                f"{name}: no column {column!r}; it needs {', '.join(REQUIRED)} "
                f"and has {', '.join(columns) or 'none'}"
            )
    prompts, skipped = [], 0
    for number, row in enumerate(rows):
        try:
            prompts.append(read_prompt(row, f"{prefix}:{number}", instruction))
        except MalformedRow as error:
            skipped += 1
            if skipped <= MAX_REPORTS:
                log.warning("%s row %d skipped: %s", name, number, error)
        except TypeError as error:
            raise TypeError(f"{name} row {number}: {error}") from None
    if skipped:
        log.warning("%s: skipped %d malformed of %d rows", name, skipped, len(rows))
    if not prompts:
        raise ValueError(f"{name}: none of its {len(rows)} rows is usable")
    return prompts


def read_prompt(row: Row | MalformedRow, row_id: str, instruction: str = "as_given") -> Prompt:
    """A row in the schema of this module -> Prompt; raises MalformedRow, or TypeError (string).

    `instruction`: one of `INSTRUCTIONS`, or "none": like "ours", but blocks are not asked for.
    """
    if isinstance(row, MalformedRow):
        raise row
    messages = _ending_with_user(read_messages(row.get("prompt")))
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        raise MalformedRow(f"data_source is {source!r}, not a name")
    info = row.get("extra_info") or {}
    if not isinstance(info, Mapping):
        raise MalformedRow(f"extra_info is {info!r:.60}, not an object")
    question = info.get("single_turn_prompt") or messages[-1]["content"]
    if not isinstance(question, str):
        raise MalformedRow(f"extra_info.single_turn_prompt is {question!r:.30}, not text")
    if instruction in TEXTS:
        turns = info.get("chat_history") or [{"role": "user", "content": question}]
        messages = _instructed(_ending_with_user(read_messages(turns)), *TEXTS[instruction])
    return Prompt(
        id=row_id,
        data_source=source,
        messages=messages,
        ground_truth=_ground_truth(row.get("reward_model")),
        question=question,
        extra={key: value for key, value in info.items() if key != "single_turn_prompt"},
    )


Messages = tuple[Mapping[str, str], ...]


def _ending_with_user(messages: Messages) -> Messages:
    if messages[-1]["role"] != "user":
        raise MalformedRow(f"the last message is from {messages[-1]['role']!r}, not from the user")
    return messages


def _instructed(turns: Messages, system: str, instruction: str) -> Messages:
    """A conversation under `system`, with `instruction` before its last question."""
    last = {"role": "user", "content": instruction + turns[-1]["content"]}
    return ({"role": "system", "content": system}, *turns[:-1], last)


def read_messages(value: Any) -> Messages:
    """Checks chat messages.

    Raises:
      TypeError: a plain string.
      MalformedRow: anything else that is not a list of {"role", "content"}.
    """
    if isinstance(value, str):
        raise TypeError(
            "the prompt is a plain string; it must be a list of chat messages "
            "({'role', 'content'}), to which the chat template is applied later, once"
        )
    if not isinstance(value, Sequence) or not value:
        raise MalformedRow(f"the prompt is {value!r:.60}, not a list of chat messages")
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise MalformedRow(f"message {message!r:.60} has no role and content")
        if message["role"] not in ROLES:
            raise MalformedRow(f"role {message['role']!r:.30}; allowed: {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise MalformedRow(f"the content of a message is {message['content']!r:.30}, not text")
    if not value[-1]["content"].strip():
        raise MalformedRow("the last message is empty")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _ground_truth(reward_model: Any) -> str:
    if not isinstance(reward_model, Mapping) or "ground_truth" not in reward_model:
        raise MalformedRow(f"reward_model is {reward_model!r:.60}, without a ground_truth")
    truth = reward_model["ground_truth"]
    if isinstance(truth, int | float) and not isinstance(truth, bool):
        truth = str(truth)
    if not isinstance(truth, str):
        raise MalformedRow(f"ground_truth is {truth!r:.60}, not text")
    if not truth.strip():
        raise MalformedRow("ground_truth is empty")
    return truth
