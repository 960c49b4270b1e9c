"""One game and its prices: what a written matrix becomes, and what is to be done about it.

    written matrix --prices--> edited matrix --rule--> action --> the text to go on with

Money is added exactly and the decision is taken on the exact values; what is written is then
rounded, to as few decimals (at least those of the model's own numbers) as still lead to the same
decision. A decision on rounded values would not be safe: rounding LLM and user apart moves their
sum by up to a decimal, so that a rising price could turn the choice back and forth. With exact
values and
`pareto_welfare`, the use of a unit by the chosen action never grows with its price as long as the
user's sensitivity is not below the provider's: each LLM + user is a straight line in the price,
falling faster the more the action uses, and the largest of such lines only ever hands over to one
that uses less. (The other rules promise nothing of the kind.)

Knows the text of chains, no tokenizer and no model.
"""

import dataclasses
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gtalign_jax.game import chain
from gtalign_jax.game.chain import ACTIONS, KEYS, PLAYERS, USER_ACTIONS
from gtalign_jax.game.decide import RULES, Decision, decide
from gtalign_jax.game.pricing import SENSITIVITY, UNITS, Pricing, Usage, read_number, reprice

DEFAULT_RULE = "pareto_welfare"  # the one that the model's instruction asks for
MODES = ("action", "matrix")
ROWS = ("played", "all")
MAX_PAYOFF = 1e6  # beyond it nine decimals are no longer exact, and no price means anything
MAX_DECIMALS = 9
MAX_JOINT = 8  # characters of white space between two blocks that are worth repeating
_FIELDS = ("key", "action", "user_action", "pareto", "llm", "user", "rule")


@dataclass(frozen=True)
class SteeringConfig:
    """How prices act on a turn.

    Attributes:
      pricing, usage, sensitivity: see `game.pricing`; sensitivity is points per dollar (LLM, user).
      rule: one of `decide.RULES`.
      mode: "action" forces the edited matrix and the solved action; "matrix" the matrix alone, and
        the model analyses it itself.
      rows: "played" keeps the choice in the row (VQ or DQ) of the written matrix's recommended
        cell, as prices change what the model does and not how the user asked; "all" opens all six.
      floor: a cell whose written LLM + user is below it is never chosen, so that prices cannot buy
        harm; where no cell is left, prices do not act on the turn at all. In mode "matrix" the
        model itself chooses: there they do not act where such a cell of the edited matrix would be
        the best by the default rule, be it of all cells or of the row.
      decimals: of what the prices add; None: as many as the model's own numbers have.
      analysis: the text of <analyze>; fields key, action, user_action, pareto, llm, user, rule.
    """

    pricing: Pricing
    usage: Usage
    sensitivity: tuple[float, float] = SENSITIVITY
    rule: str = DEFAULT_RULE
    mode: str = "action"
    rows: str = "played"
    floor: float = 0.0
    decimals: int | None = None
    analysis: str = "{key} is best."

    def __post_init__(self):
        for name, value, allowed in (
            ("rule", self.rule, tuple(RULES)), ("mode", self.mode, MODES), ("rows", self.rows, ROWS)
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {str(value)[:40]!r}; allowed are {', '.join(allowed)}")
        if not isinstance(self.sensitivity, Sequence) or len(self.sensitivity) != len(PLAYERS):
            raise ValueError("sensitivity must hold two numbers, points per dollar (LLM, user)")
        feel = tuple(
            read_number(f"sensitivity of {player}", value, 0.0, MAX_PAYOFF)
            for player, value in zip(PLAYERS, self.sensitivity, strict=True)
        )
        object.__setattr__(self, "sensitivity", feel)  # JSON brings a list
        read_number("floor", self.floor, -MAX_PAYOFF, MAX_PAYOFF)
        if self.decimals is not None and self.decimals not in range(MAX_DECIMALS + 1):
            raise ValueError(
                f"decimals is {str(self.decimals)[:40]}; allowed are 0 to {MAX_DECIMALS} and None"
            )
        _check_analysis(self.analysis)


@dataclass(frozen=True)
class Steered:
    """What `steer` made of one matrix.

    Attributes:
      written_UAP, edited_UAP: float64 [2, 3, 2], before and after money.
      before: the default rule on the written matrix: what the model does unsteered.
      after: the config's rule on the edited matrix, among the cells that the config leaves open.
      forced: the text in place of everything behind "<payoff>"; None where nothing changes.
      held: why the floor kept prices from acting at all; None where it did not.
    """

    written_UAP: np.ndarray
    edited_UAP: np.ndarray
    before: Decision
    after: Decision
    forced: str | None
    held: str | None = None


def steer(text: str, config: SteeringConfig) -> Steered:
    """Steers a completion that has come as far as its first `</payoff>`.

    Raises ValueError, one line, where it has no matrix that can be read and priced.
    """
    parsed = chain.parse(text)
    if parsed.payoff_UAP is None:
        raise ValueError(parsed.error)
    steered = solve(parsed.payoff_UAP, config)
    same = np.array_equal(steered.written_UAP, steered.edited_UAP)
    if same and (config.mode == "matrix" or steered.after.cell == steered.before.cell):
        return steered
    return dataclasses.replace(steered, forced=_forced(text, steered, config))


def solve(written_UAP: np.ndarray, config: SteeringConfig) -> Steered:
    """`steer` for a matrix without text (`forced` is None); float64 [2, 3, 2], finite.

    Raises ValueError where a payoff is beyond +-1e6 before or after money.
    """
    exact_UAP = reprice(
        written_UAP, config.usage.array_AX, config.pricing.rates_XP, np.array(config.sensitivity)
    )
    for name, payoff_UAP in (("written", written_UAP), ("repriced", exact_UAP)):
        if not np.abs(payoff_UAP).max() <= MAX_PAYOFF:
            raise ValueError(f"a {name} payoff is beyond 1e6: no price can be set against it")
    before = decide(written_UAP)
    allowed_UA, why = _open_cells(written_UAP, before, config)
    if not allowed_UA.any():
        held = f"No cell is left: prices do not act here, and {before.key} stands."
        return _untouched(written_UAP, before, why, held)
    edited_UAP = _rounded(written_UAP, exact_UAP, allowed_UA, config)
    tempting = _tempting(written_UAP, edited_UAP, before, config)
    if config.mode == "matrix" and tempting is not None:
        held = (f"Reading the edited matrix the model would choose {tempting}: prices do not act "
                f"here, and {before.key} stands.")
        return _untouched(written_UAP, before, why, held)
    after = decide(edited_UAP, config.rule, allowed_UA)
    after = dataclasses.replace(after, reasons=(*why, *after.reasons))
    return Steered(written_UAP, edited_UAP, before, after, forced=None)


def _untouched(written_UAP: np.ndarray, before: Decision, why: tuple[str, ...],
               held: str) -> Steered:
    after = dataclasses.replace(before, reasons=(*why, held))
    return Steered(written_UAP, written_UAP, before, after, forced=None, held=held)


def _open_cells(
    written_UAP: np.ndarray, before: Decision, config: SteeringConfig
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The cells among which the rule may choose, bool [U, A], and why the others are closed."""
    allowed_UA, why = _rows(before, config), []
    if config.rows == "played":
        row = before.key.partition("_")[0]
        why.append(f"The question was read as {row}; prices do not change that.")
    sum_UA = written_UAP.sum(-1)
    low_UA = allowed_UA & _below_floor(written_UAP, config)
    closed = ", ".join(
        f"{KEYS[i]} ({sum_UA.flat[i]:.10g})" for i in np.flatnonzero(low_UA.reshape(-1))
    )
    if closed:
        why.append(f"Written LLM + user below the floor {config.floor:g}: {closed}.")
        allowed_UA &= ~low_UA
    return allowed_UA, tuple(why)


def _rows(before: Decision, config: SteeringConfig) -> np.ndarray:
    """The cells that `config.rows` leaves open, bool [U, A]."""
    rows_U = np.arange(len(USER_ACTIONS)) == before.cell // len(ACTIONS)
    return np.repeat(rows_U[:, None] | (config.rows == "all"), len(ACTIONS), axis=1)


def _below_floor(written_UAP: np.ndarray, config: SteeringConfig) -> np.ndarray:
    return written_UAP.sum(-1) < config.floor - 1e-9


def _tempting(
    written_UAP: np.ndarray, edited_UAP: np.ndarray, before: Decision, config: SteeringConfig
) -> str | None:
    """A cell below the floor that a model would choose which reads the edited matrix, if any.

    It knows the default rule alone, reads the rounded numbers, and may look at all cells or at
    those of the row that it took the question for.
    """
    below_UA = _below_floor(written_UAP, config)
    views = (None, _rows(before, config))
    read = (decide(edited_UAP, DEFAULT_RULE, cells_UA) for cells_UA in views)
    return next((found.key for found in read if below_UA.flat[found.cell]), None)


def _rounded(
    written_UAP: np.ndarray, exact_UAP: np.ndarray, allowed_UA: np.ndarray, config: SteeringConfig
) -> np.ndarray:
    """`exact_UAP` with what money adds rounded, so that the rule decides as on the exact values.

    The shift is rounded, not the payoff: what the model wrote keeps its own decimals.
    """
    cell = decide(exact_UAP, config.rule, allowed_UA).cell
    fewest = _decimals(written_UAP) if config.decimals is None else config.decimals
    for decimals in range(fewest, MAX_DECIMALS + 1):
        shift_UAP = np.round(exact_UAP - written_UAP, decimals)
        # 0.3 - 0.1 is to be written 0.2, and a payoff that no money reaches as it was.
        tidy_UAP = np.round(written_UAP + shift_UAP, MAX_DECIMALS)
        edited_UAP = np.where(shift_UAP == 0, written_UAP, tidy_UAP)
        if decide(edited_UAP, config.rule, allowed_UA).cell == cell:
            return edited_UAP
    return exact_UAP


def _decimals(payoff_UAP: np.ndarray) -> int:
    """How many decimals the numbers have: a model reads best what looks like its own writing."""
    return next((d for d in range(MAX_DECIMALS) if (np.round(payoff_UAP, d) == payoff_UAP).all()),
                MAX_DECIMALS)


def _forced(text: str, steered: Steered, config: SteeringConfig) -> str:
    head, _, rest = text.partition("<payoff>")
    block = chain.rewrite(rest.partition("</payoff>")[0], steered.edited_UAP)
    if config.mode == "matrix":
        return f"{block}</payoff>"
    thinking = head.rstrip()
    joint = head[len(thinking) :] if thinking.endswith("</thinking>") else ""
    if len(joint) > MAX_JOINT:
        joint = ""
    analysis = _analysis(config.analysis, steered)
    return f"{block}</payoff>{joint}<analyze>{analysis}</analyze>{joint}<response>"


def _analysis(template: str, steered: Steered) -> str:
    after = steered.after
    llm, user = steered.edited_UAP.reshape(len(KEYS), len(PLAYERS))[after.cell]
    return template.format(
        key=after.key, action=after.action, user_action=after.key.partition("_")[0],
        pareto=", ".join(after.pareto), llm=f"{llm:.10g}", user=f"{user:.10g}", rule=after.rule,
    )


def _check_analysis(template: str) -> None:
    """Plain fields only: a template may come from outside, and `{key.__class__}` is a way in."""
    wrong = ValueError(
        f"analysis is {str(template)[:60]!r}; allowed is text of up to 500 characters without '<' "
        f"and with the fields {', '.join(_FIELDS)} in braces"
    )
    if not isinstance(template, str) or len(template) > 500 or "<" in template:
        raise wrong
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        raise wrong from None
    for _, field, spec, conversion in parts:
        if field is not None and (field not in _FIELDS or spec or conversion):
            raise wrong


def describe(steered: Steered, config: SteeringConfig) -> dict[str, Any]:
    """All of it as JSON values: matrices by key, prices, decisions with reasons, dollars."""
    usage_AX, rates_XP = config.usage.array_AX, config.pricing.rates_XP
    rates = {
        player: dict(zip(UNITS, rates_XP[:, p].tolist(), strict=True))
        for p, player in enumerate(PLAYERS)
    }
    money = {
        action: dict(zip(PLAYERS, money_P, strict=True))
        for action, money_P in zip(ACTIONS, (usage_AX @ rates_XP).tolist(), strict=True)
    }
    return {
        "written": chain.payoff_dict(steered.written_UAP),
        "edited": chain.payoff_dict(steered.edited_UAP),
        "pricing": {"name": config.pricing.name, "rates": rates},
        "sensitivity": dict(zip(PLAYERS, config.sensitivity, strict=True)),
        "rule": config.rule,
        "rows": config.rows,
        "mode": config.mode,
        "before": _decision(steered.before),
        "decision": _decision(steered.after),
        "changed": steered.after.cell != steered.before.cell,
        "money": money,
        "usage": {unit: list(values) for unit, values in dataclasses.asdict(config.usage).items()},
    }


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(decision).items()
    }
