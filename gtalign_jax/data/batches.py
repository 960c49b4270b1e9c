"""Encoded prompts and the batches cut from them, a pure function of (seed, step, process).

    stream position  p = step * batch_size + i
    prompt           permutation(seed, epoch = p div N)[p mod N]

There is no iterator state: resuming needs the step and nothing else. A batch may straddle two
epochs, so no tail is dropped. Every batch of a PromptSet has one padded width, so that nothing
recompiles. Knows nothing of models or devices.
"""

import copy
import dataclasses
import functools
import logging
from collections.abc import Collection, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from gtalign_jax.data.chat import encode_chats
from gtalign_jax.data.prompt import Prompt

log = logging.getLogger(__name__)

WIDTH_MULTIPLE = 16
PAD_ID = 0  # any valid id: masks come from lengths


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the right; what is padding follows from lengths_Q alone.

    Attributes:
      prompts: Q prompts.
      tokens_QS: int32 token ids.
      lengths_Q: int32 number of real tokens of each row.
      common: how many tokens all prompts of the set begin with (`PromptSet.common`).
      index_Q: int32 position of each row in the stream of prompts over all processes; with the
        seed it keys the sampling randomness, so that the number of processes changes no token.
    """

    prompts: tuple[Prompt, ...]
    tokens_QS: np.ndarray
    lengths_Q: np.ndarray
    index_Q: np.ndarray
    common: int


class PromptSet:
    """The prompts of a split as token ids, overlong ones dropped and counted.

    Attributes:
      prompts: those kept, in order.
      token_lists: their token ids.
      dropped: how many had more than max_prompt_tokens.
      pad_to: the width S of every batch: the longest kept prompt, rounded up to 16.
      common: how many tokens all kept prompts begin with, of the shortest all but the last. In
        GTAlign that is the instruction, and most of every prompt.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int,
    ):
        """Encodes prompts.

        Raises:
          ValueError: no prompt is left.
        """
        encoded = encode_chats(tokenizer, [prompt.messages for prompt in prompts])
        kept = [
            (p, ids)
            for p, ids in zip(prompts, encoded, strict=True)
            if len(ids) <= max_prompt_tokens
        ]
        self.dropped = len(encoded) - len(kept)
        if not kept:
            shortest = min(map(len, encoded), default=0)
            raise ValueError(
                f"data.max_prompt_tokens = {max_prompt_tokens} leaves none of {len(encoded)} "
                f"prompts; the shortest has {shortest} tokens"
            )
        if self.dropped:
            log.warning(
                "dropped %d of %d prompts: more than max_prompt_tokens = %d tokens (longest: %d)",
                self.dropped, len(encoded), max_prompt_tokens, max(map(len, encoded)),
            )  # fmt: skip
        self.prompts = tuple(prompt for prompt, _ in kept)
        self.token_lists = tuple(ids for _, ids in kept)
        longest = max(map(len, self.token_lists))
        self.pad_to = -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.common = common_prefix(self.token_lists)

    def __len__(self) -> int:
        return len(self.prompts)

    def among(self, ids: Collection[str]) -> "PromptSet":
        """The prompts with one of these ids, in the same order and as wide as all of them."""
        kept = [at for at, prompt in enumerate(self.prompts) if prompt.id in ids]
        part = copy.copy(self)
        part.prompts = tuple(self.prompts[at] for at in kept)
        part.token_lists = tuple(self.token_lists[at] for at in kept)
        return part

    def batch(
        self,
        step: int,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> PromptBatch:
        """This process's share of the prompts of a step.

        Args:
          step: from 0.
          batch_size: prompts of the step over all processes; each takes a contiguous share.
          seed: of the permutations.
          process_index, process_count: whose share.

        Raises:
          ValueError: batch_size is not a positive multiple of process_count.
        """
        if batch_size <= 0 or batch_size % process_count:
            raise ValueError(
                f"batch_size = {batch_size} prompts cannot be shared by {process_count} "
                f"processes; it must be a positive multiple of {process_count}"
            )
        share = batch_size // process_count
        first = step * batch_size + process_index * share
        stream = np.arange(first, first + share, dtype=np.int64)
        return self.take(epoch_rows(len(self), stream, seed), stream)

    def take(self, chosen: Sequence[int], index_Q: Sequence[int] | None = None) -> PromptBatch:
        """The batch of the given prompts, by position in `prompts`; for evaluation in order.

        index_Q is the same positions unless given.
        """
        tokens_QS, lengths_Q = pad_right([self.token_lists[at] for at in chosen], self.pad_to)
        return PromptBatch(
            prompts=tuple(self.prompts[at] for at in chosen),
            tokens_QS=tokens_QS,
            lengths_Q=lengths_Q,
            index_Q=np.asarray(chosen if index_Q is None else index_Q).astype(np.int32),
            common=self.common,
        )


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with; at least one less than the shortest has."""
    # Of all rows, the first and the last in order differ soonest.
    first, last = min(rows), max(rows)
    most = min(map(len, rows)) - 1
    return next((i for i in range(most) if first[i] != last[i]), max(most, 0))


def epoch_rows(size: int, stream: Sequence[int], seed: int) -> list[int]:
    """Which of `size` items stands at each position of an endless stream of shuffled epochs."""
    epochs, places = np.divmod(np.asarray(stream, np.int64), size)
    return [
        int(_permutation(seed, int(epoch), size)[place])
        for epoch, place in zip(epochs, places, strict=True)
    ]


def pad_right(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids `[n, width]`, lengths `[n]`), int32; raises ValueError where a row is longer."""
    tokens = np.full((len(rows), width), PAD_ID, np.int32)
    lengths = np.array([len(row) for row in rows], np.int32)
    for at, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(f"a row of {len(row)} tokens does not fit a width of {width}")
        tokens[at, : len(row)] = row
    return tokens, lengths


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)
