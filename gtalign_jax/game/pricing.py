"""What a turn costs each side, as a transform of the payoff matrix (paper section 3.4).

    payoff'_UAP = payoff_UAP + (usage_AX @ rates_XP) * sensitivity_P

X = units of use (input tokens, output tokens, requests), `usage` = how many of them an action is
expected to take until the user has the answer, `rates` = dollars that each side gains per unit (a
price is a loss), `sensitivity` = payoff points per dollar. A policy is nothing but its rates, so
policies add up. Knows no tokenizer: whoever measures usage brings the token counts along.
"""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax.game.chain import ACTIONS, PLAYERS

UNITS = ("input", "output", "requests")
KINDS = {"answer": "DA", "ask": "CQ", "answer_ask": "AQ"}  # what a response is -> the action

# Payoff points per US dollar for (LLM, user). A person feels a dollar more than a provider with
# many users does. With equal sensitivities what one pays the other cancels in LLM + user: such a
# price would then move nothing but who gains.
SENSITIVITY = (100.0, 400.0)

MILLION = 1e6  # token prices are quoted in dollars per million tokens
MAX_DOLLARS = 1e6  # far above any price; keeps all arithmetic finite
MAX_UNITS = 1e9
MAX_PARTS = 16
MAX_RATE = MAX_PARTS * MAX_DOLLARS * 2  # a request may cost the user for two reasons (`free`)
MAX_TEXT = 1000
_PLUS = re.compile(r"\s*\+\s*(?=[^\s\d.])")  # between two policies, not in 1e+3


@dataclasses.dataclass(frozen=True)
class Usage:
    """Expected use per model action (DA, CQ, AQ) until the user has the answer.

    A clarifying question answers nothing yet, so its use counts the turn that follows too.
    """

    input: tuple[float, float, float]
    output: tuple[float, float, float]
    requests: tuple[float, float, float] = (1.0, 2.0, 1.0)

    def __post_init__(self):
        for unit in UNITS:
            values = {"input": self.input, "output": self.output, "requests": self.requests}[unit]
            if not isinstance(values, Sequence) or len(values) != len(ACTIONS):
                raise ValueError(f"usage.{unit} must hold one number for each of {ACTIONS}")
            numbers = [
                read_number(f"usage.{unit}.{action}", value, 0.0, MAX_UNITS)
                for action, value in zip(ACTIONS, values, strict=True)
            ]
            object.__setattr__(self, unit, tuple(numbers))

    @property
    def array_AX(self) -> np.ndarray:
        """float64 [3 actions, 3 units]."""
        return np.array([self.input, self.output, self.requests], np.float64).T


@dataclasses.dataclass(frozen=True)
class Pricing:
    """What each side gains (+) or pays (-) per unit of use, in US dollars: `rates` [X][P]."""

    name: str
    rates: tuple[tuple[float, float], ...]

    def __post_init__(self):
        array = np.asarray(self.rates, np.float64)
        if array.shape != (len(UNITS), len(PLAYERS)) or not (np.abs(array) <= MAX_RATE).all():
            raise ValueError(f"rates are [3 units][2 players] numbers within +-{MAX_RATE:g}")

    @property
    def rates_XP(self) -> np.ndarray:
        """float64 [3 units, 2 players], dollars per unit."""
        return np.array(self.rates, np.float64)


def reprice(payoff_UAP, usage_AX, rates_XP, sensitivity_P):
    """The matrix [U, A, P] after money: linear in the rates, the same for both user actions.

    Written with operators alone: jax arrays give the jittable, vmappable version, numpy arrays
    the host's.
    """
    points_AP = (usage_AX @ rates_XP) * sensitivity_P[None, :]
    return payoff_UAP + points_AP[None, :, :]


def compose(*pricings: Pricing) -> Pricing:
    """All of them at once: the sum of their rates."""
    if not pricings:
        raise ValueError("nothing to compose: give one pricing or more")
    total_XP = sum((pricing.rates_XP for pricing in pricings[1:]), pricings[0].rates_XP)
    return Pricing(" + ".join(p.name for p in pricings), tuple(map(tuple, total_XP.tolist())))


def _policy(lowest: float = 0.0):
    """Makes a policy of a function from dollars to rates: its keyword arguments are checked
    against its own signature, and lie between `lowest` and MAX_DOLLARS."""

    def wrap(rates: Callable[..., tuple]) -> Callable[..., Pricing]:
        allowed = tuple(inspect.signature(rates).parameters)
        policy_name = rates.__name__

        @functools.wraps(rates)
        def policy(**given: float) -> Pricing:
            for key in given:
                if key not in allowed:
                    expected = ", ".join(allowed) or "no key at all"
                    raise ValueError(
                        f"pricing {policy_name} has no key {_shown(key)}; it takes {expected}"
                    )
            numbers = {
                key: read_number(f"pricing {policy_name}.{key}", value, lowest, MAX_DOLLARS)
                for key, value in given.items()
            }
            settings = ", ".join(f"{key}={value:g}" for key, value in numbers.items())
            return Pricing(f"{policy_name}({settings})" if settings else policy_name,
                           rates(**numbers))

        return policy

    return wrap


@_policy()
def none():
    """No money changes hands and nothing costs: the matrix stays as written."""
    return ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))


@_policy()
def subscription(*, cost_input=1.0, cost_output=6.0):
    """The user pays nothing per turn; the provider bears its own cost ($ per million tokens)."""
    return ((-cost_input / MILLION, 0.0), (-cost_output / MILLION, 0.0), (0.0, 0.0))


@_policy()
def per_token(*, input=5.0, output=30.0, cost_input=1.0, cost_output=6.0):
    """The user pays per token, the provider receives it less its cost ($ per million tokens)."""
    return (
        ((input - cost_input) / MILLION, -input / MILLION),
        ((output - cost_output) / MILLION, -output / MILLION),
        (0.0, 0.0),
    )


@_policy()
def per_request(*, price=0.01, cost_input=1.0, cost_output=6.0):
    """The user pays `price` dollars for each request, whatever its length."""
    return ((-cost_input / MILLION, 0.0), (-cost_output / MILLION, 0.0), (price, -price))


@_policy()
def free(*, ads=0.002, nuisance=0.001, quota=0.0, cost_input=1.0, cost_output=6.0):
    """Paid by advertising or limited by a quota; all three in dollars per request.

    `ads`: what the provider earns. `nuisance`: what the advertisement costs the user in attention.
    `quota`: what it is worth to the user not to have used up one of the free requests.
    """
    return (
        (-cost_input / MILLION, 0.0),
        (-cost_output / MILLION, 0.0),
        (ads, -(nuisance + quota)),
    )


@_policy(lowest=-MAX_DOLLARS)
def given(
    *, llm_input=0.0, llm_output=0.0, llm_request=0.0,
    user_input=0.0, user_output=0.0, user_request=0.0,
):
    """Your own: what each side gains (+) or pays (-), $ per million tokens and per request."""
    return (
        (llm_input / MILLION, user_input / MILLION),
        (llm_output / MILLION, user_output / MILLION),
        (llm_request, user_request),
    )


POLICIES: dict[str, Callable[..., Pricing]] = {
    "subscription": subscription,
    "per_token": per_token,
    "per_request": per_request,
    "free": free,
    "given": given,
    "none": none,
}


def defaults(policy: str) -> dict[str, float]:
    """The keys that a policy of POLICIES takes, with the values it assumes."""
    parameters = inspect.signature(POLICIES[policy]).parameters
    return {key: parameter.default for key, parameter in parameters.items()}


def read(value: str | Mapping | Sequence) -> Pricing:
    """The pricing that a flag or a JSON value names: `"subscription"`,
    `"per_token:output=30,input=5"`, `{"policy": "per_token", "output": 30}`, a sum of texts
    (`"subscription + per_request:price=0.02"`) or a list of any of these (their sum).

    Raises ValueError, and nothing else, on everything that is no pricing.
    """
    if isinstance(value, str | Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        raise ValueError(f"pricing is {_shown(value)}; allowed is {_FORMS}, or a list of these")
    parts = [part for one in value[: MAX_PARTS + 1] for part in _summands(one)]
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ValueError(f"a sum of {max(len(parts), len(value))} pricings; allowed are 1 to "
                         f"{MAX_PARTS}")
    return compose(*map(_read_one, parts))


_FORMS = (
    f"one of {', '.join(POLICIES)}, with settings as in 'per_token:output=30' or "
    '{"policy": "per_token", "output": 30}'
)


def _summands(value: Any) -> list[Any]:
    return _PLUS.split(value) if isinstance(value, str) and len(value) <= MAX_TEXT else [value]


def _read_one(value: Any) -> Pricing:
    if isinstance(value, str):
        name, settings = _read_text(value)
    elif isinstance(value, Mapping):
        if "policy" not in value:
            raise ValueError(f'pricing has no key "policy"; allowed is {_FORMS}')
        name = value["policy"]
        settings = {key: number for key, number in value.items() if key != "policy"}
    else:
        raise ValueError(f"pricing is {_shown(value)}; allowed is {_FORMS}")
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"pricing policy {_shown(name)} is unknown; allowed is {_FORMS}")
    for key in settings:
        if not isinstance(key, str):
            raise ValueError(f"pricing {name} has no key {_shown(key)}; keys are strings")
    return POLICIES[name](**settings)


def _read_text(text: str) -> tuple[str, dict[str, float]]:
    """("per_token", {"output": 30.0}) from "per_token:output=30"."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"pricing of {len(text)} characters; allowed are {MAX_TEXT}")
    name, colon, rest = text.partition(":")
    name, settings = name.strip(), {}
    for part in rest.split(",") if colon else ():
        key, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals or key in settings:
            wrong = "stands twice" if equals else "is no key=number"
            raise ValueError(f"pricing {_shown(name)}: {_shown(part.strip())} {wrong}")
        try:
            settings[key] = float(number)
        except ValueError:
            raise ValueError(
                f"pricing {_shown(name)}: {_shown(key)} is {_shown(number)}, not a number"
            ) from None
    return name, settings


def read_usage(value: Any) -> Usage:
    """A usage from JSON, {"input": [DA, CQ, AQ], "output": [...], "requests": [...]} (the last may
    be missing), the form that `dataclasses.asdict` gives it. Raises ValueError only."""
    if not isinstance(value, Mapping):
        raise ValueError(f"usage is {_shown(value)}; allowed is an object with {UNITS}")
    for key in value:
        if key not in UNITS:
            raise ValueError(f"usage has no key {_shown(key)}; allowed are {', '.join(UNITS)}")
    for key in ("input", "output"):
        if key not in value:
            raise ValueError(f'usage has no "{key}"; it needs input and output')
    return Usage(**value)


def measured(
    rows: Iterable[Mapping[str, Any]],
    prompt_tokens: Callable[[Mapping[str, Any]], int] | None = None,
    follow_up: float = 0.5,
) -> Usage:
    """The usage that rows of evaluations.jsonl show (of one label: choose the rows first).

    First turns are measured: an action's mean `tokens`, and one mean prompt for all actions (which
    question is asked does not depend on the action). Second turns are derived: they read the first
    prompt, the response and the user's reply, taken to be as long as the question, and write a
    direct answer. A clarifying question (CQ) always has one, the follow-up question after an answer
    (AQ) in a share `follow_up` of the turns. What one of CQ and AQ took is derived from the other
    where nobody played it: AQ is an answer plus the text of a question.

    Args:
      rows: completions with response_kind, tokens, response_tokens and prompt.
      prompt_tokens: the length of a row's prompt; None takes its words for tokens.

    Raises ValueError where no row answers, or none asks anything.
    """
    count = prompt_tokens or _prompt_words
    written = {action: [] for action in ACTIONS}  # (tokens, response_tokens) of each row
    prompts = []
    for row in rows:
        action = KINDS.get(row["response_kind"])
        if action is not None:  # refusals and broken chains are none of the three actions
            written[action].append((row["tokens"], row["response_tokens"]))
            prompts.append(count(row))
    if not written["DA"] or not (written["CQ"] or written["AQ"]):
        missing = "'ask' or 'answer_ask'" if written["DA"] else "'answer'"
        raise ValueError(f"no row of response_kind {missing}: what actions take is unknown")
    found = {action: np.mean(pairs, axis=0) for action, pairs in written.items() if pairs}
    (answer, short), prompt = found["DA"], _mean(prompts)
    question = found["CQ"][1] if "CQ" in found else max(found["AQ"][1] - short, 0.0)
    ask = found["CQ"][0] if "CQ" in found else answer - short + question
    both, long = found["AQ"] if "AQ" in found else (answer + question, short + question)
    return Usage(
        input=(prompt, prompt + (prompt + 2 * question),
               prompt + follow_up * (prompt + long + question)),
        output=(answer, ask + answer, both + follow_up * answer),
        requests=(1.0, 2.0, 1.0 + follow_up),
    )


def _prompt_words(row: Mapping[str, Any]) -> int:
    return sum(len(message["content"].split()) for message in row["prompt"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def read_number(name: str, value: Any, low: float, high: float) -> float:
    """Any value as a float from `low` to `high`; ValueError with `name` where it is none."""
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared before it is converted: an integer may be beyond the largest float.
    if not fits or not low <= value <= high or not math.isfinite(value):
        raise ValueError(
            f"{name} is {_shown(value)}; allowed are numbers from {low:g} to {high:g}"
        )
    return float(value)


def _shown(value: Any) -> str:
    """Any value in a few characters: neither its size nor its depth matters."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "…")
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"a {type(value).__name__}"
