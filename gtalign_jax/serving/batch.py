"""The rows that decode together, seen from the host: their tokens, their text, their end.

Wraps the programs of `rollout.slots`: which slot belongs to which request, what each has produced,
which part of it may leave. A steered row pauses at the end of its matrix; what replaces the matrix
is planned here (`rollout.splice`) and fed to the row's own cache, while its neighbours decode on.
Knows no threads, no queue and no HTTP; one caller at a time.
"""

import dataclasses
import logging

import jax
import numpy as np

from gtalign_jax.data.chat import decode, token_pieces
from gtalign_jax.game.decide import RULES, decide
from gtalign_jax.game.steering import SteeringConfig
from gtalign_jax.rollout.filters import Filters
from gtalign_jax.rollout.player import Player
from gtalign_jax.rollout.slots import News, SlotsConfig, make_slots, settings
from gtalign_jax.rollout.splice import MATRIX, Outcome, plan
from gtalign_jax.rollout.steering import NO_MATRIX
from gtalign_jax.rollout.stopping import stop_table
from gtalign_jax.serving.text import TextStream

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request. Of `seed` the low 32 bits count; temperature 0 takes the likeliest token."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    steering: SteeringConfig | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole completion.

    Attributes:
      text: what all pieces add up to (but see `TextStream`).
      ids: its tokens, the stop token included.
      forced: ranges [a, b) of `ids` that were not sampled.
      finish_reason: "stop" (by a stop token) or "length".
      outcome: what steering did; None where it was not asked for.
    """

    text: str
    ids: tuple[int, ...]
    forced: tuple[tuple[int, int], ...]
    finish_reason: str
    prompt_tokens: int
    outcome: Outcome | None


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run brought one row: text that is final now, and its end if it has one.

    With an answer or an error the row's slot is free again.
    """

    row: int
    text: str = ""
    answer: Answer | None = None
    error: Exception | None = None


class _Row:
    """The host's side of a busy slot."""

    def __init__(self, ask: Ask, stream: TextStream) -> None:
        self.ask, self.stream = ask, stream
        self.ids: list[int] = []
        self.forced: tuple[tuple[int, int], ...] = ()
        self.outcome: Outcome | None = None

    @property
    def settled(self) -> bool:
        """Nothing of the text will be replaced any more."""
        return self.ask.steering is None or self.outcome is not None


class Batch:
    """A player's slots. Raises ValueError where the sizes do not fit the model or its mesh."""

    def __init__(self, player: Player, config: SlotsConfig) -> None:
        longest = config.prompt_tokens + config.new_tokens
        if longest > player.model.max_position:
            raise ValueError(
                f"prompt_tokens={config.prompt_tokens} + new_tokens={config.new_tokens} is "
                f"{longest}: the model knows positions below {player.model.max_position}"
            )
        self._player, self.config = player, config
        self._programs = make_slots(player.model, config, player.stop_ids, player.layout)
        pieces = token_pieces(player.tokenizer, player.model.padded_vocab_size)
        self._table_VA = jax.device_put(
            stop_table(pieces, *MATRIX), player.layout and player.layout.sharding()
        )
        self._slots = None
        self._rows: dict[int, _Row] = {}
        self._drop_B = np.zeros(config.slots, bool)
        self._go_B = np.zeros(config.slots, bool)
        self.generated_tokens = self.forced_tokens = 0

    @property
    def busy(self) -> int:
        """How many slots have a request."""
        return len(self._rows)

    def warm_up(self) -> int:
        """Compiles every program by running it once, on slots that nobody has; how many."""
        programs, params, row = self._programs, self._player.params, np.int32(0)
        slots, how = programs.empty(params), settings(0, 1, 0.0, 1.0, False)
        for width in self.config.prompt_widths:
            slots = programs.admit(params, slots, row, np.zeros((1, width), np.int32),
                                   np.ones(1, np.int32), how)
        for width in self.config.forced_widths:
            slots = programs.splice(params, slots, row, np.zeros(width, np.int32), np.int32(0),
                                    np.int32(0))
        slots, _ = programs.run(params, slots, self._table_VA, ~self._drop_B, self._go_B)
        self._slots = jax.block_until_ready(slots)
        for rule in RULES:  # deciding is a program, too
            decide(np.zeros((2, 3, 2)), rule)
        widths = self.config.prompt_widths + self.config.forced_widths
        return 2 + len(widths) + len(RULES)

    def check(self, ask: Ask) -> None:
        """Raises ValueError where the request does not fit."""
        longest, most = self.config.prompt_tokens, self.config.new_tokens
        if not 1 <= len(ask.prompt_ids) <= longest:
            raise ValueError(
                f"the prompt has {len(ask.prompt_ids)} tokens: allowed are 1 to {longest}"
            )
        if not 1 <= ask.max_tokens <= most:
            raise ValueError(f"max_tokens={ask.max_tokens}: allowed is 1 to {most}")
        ids = self._player.model.vocab_size
        if not all(0 <= i < ids for i in ask.prompt_ids):
            raise ValueError(f"prompt_ids: allowed is 0 to {ids - 1}")
        Filters(ask.temperature, 0, ask.top_p)

    def reserve(self, ask: Ask) -> int:
        """Gives a request one of the free slots, of which there must be one; `prefill` follows."""
        row = min(set(range(self.config.slots)) - set(self._rows))
        self._rows[row] = _Row(ask, TextStream(self._player.tokenizer))
        return row

    def prefill(self, row: int) -> None:
        """Reads the prompt of a request that has just got its slot."""
        ask = self._rows[row].ask
        length = len(ask.prompt_ids)
        tokens_QS = np.zeros((1, _fitting(self.config.prompt_widths, length)), np.int32)
        tokens_QS[0, :length] = ask.prompt_ids
        self._slots = self._programs.admit(
            self._player.params, self._slots, np.int32(row), tokens_QS,
            np.asarray([length], np.int32),
            settings(ask.seed, ask.max_tokens, ask.temperature, ask.top_p,
                     ask.steering is not None),
        )
        self._drop_B[row] = False

    def drop(self, row: int) -> None:
        """Frees a slot whose request is not wanted any more."""
        del self._rows[row]
        self._drop_B[row], self._go_B[row] = True, False

    def run(self) -> list[Progress]:
        """A few decode steps of all rows, and what came of them, row by row."""
        self._slots, news = self._programs.run(
            self._player.params, self._slots, self._table_VA, self._drop_B, self._go_B
        )
        news = jax.device_get(news)
        self._drop_B, self._go_B = np.zeros_like(self._drop_B), np.zeros_like(self._go_B)
        self.generated_tokens += int(news.count_B.sum())
        progress = [self._progress(row, news) for row in list(self._rows)]
        for row, state in self._rows.items():
            if news.paused_B[row] and state.forced:
                self._splice(row, state)
        return progress

    def _progress(self, row: int, news: News) -> Progress:
        state = self._rows[row]
        state.ids += news.tokens_BN[row, : news.count_B[row]].tolist()
        try:
            done = not news.live_B[row]
            if news.paused_B[row]:
                done = not self._settle(row, state)
            if not done:
                return Progress(row, state.stream.more(state.ids) if state.settled else "")
            answer = self._answer(state, bool(news.stopped_B[row]))
            progress = Progress(row, state.stream.rest(state.ids), answer)
        except Exception as error:  # what one text does to a tokenizer concerns nobody else
            log.exception("a request failed")
            progress = Progress(row, error=error)
        self.drop(row)
        return progress

    def _settle(self, row: int, state: _Row) -> bool:
        """Decides about the matrix of a row that has just closed it; whether the row goes on."""
        ask = state.ask
        splice = plan(self._player.tokenizer, state.ids, ask.steering, ask.max_tokens)
        state.outcome = splice.outcome
        if splice.forced:
            state.ids = [*state.ids[: splice.keep], *splice.forced]
            state.forced = ((splice.keep, len(state.ids)),)
        else:
            self._go_B[row] = len(state.ids) < ask.max_tokens
        return len(state.ids) < ask.max_tokens

    def _splice(self, row: int, state: _Row) -> None:
        """Feeds what is forced, and the token before it: the next one is drawn after the last."""
        (start, end), = state.forced
        stream = [*state.ask.prompt_ids[-1:], *state.ids]  # by position in the row's cache
        tokens_F = np.zeros(_fitting(self.config.forced_widths, end - start + 1), np.int32)
        tokens_F[: end - start + 1] = stream[start : end + 1]
        self._slots = self._programs.splice(
            self._player.params, self._slots, np.int32(row), tokens_F, np.int32(start),
            np.int32(end - start),
        )
        self.forced_tokens += end - start

    def _answer(self, state: _Row, stopped: bool) -> Answer:
        ask = state.ask
        if not state.settled:
            state.outcome = Outcome(False, NO_MATRIX, None)
        return Answer(
            decode(self._player.tokenizer, state.ids), tuple(state.ids), state.forced,
            "stop" if stopped else "length", len(ask.prompt_ids), state.outcome,
        )


def _fitting(widths: tuple[int, ...], length: int) -> int:
    """The smallest width that holds `length`."""
    return next(width for width in widths if width >= length)
