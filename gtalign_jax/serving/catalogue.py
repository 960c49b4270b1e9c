"""The game as the server tells and plays it without a model: GET /v1/game, POST /v1/game/decide."""

import dataclasses
import inspect
from typing import Any

import numpy as np

from gtalign_jax.game import pricing, steering
from gtalign_jax.game.chain import ACTIONS, KEYS, PLAYERS, USER_ACTIONS
from gtalign_jax.game.decide import RULES
from gtalign_jax.serving.chat import Service
from gtalign_jax.serving.errors import ApiError
from gtalign_jax.serving.protocol import DecideRequest
from gtalign_jax.serving.replies import Described, GameReply, Parameter, PolicyCard

_MILLION = "US dollars per million"
PARAMETERS = {  # of the pricing policies
    "input": f"the user pays, {_MILLION} input tokens",
    "output": f"the user pays, {_MILLION} output tokens",
    "cost_input": f"costs the provider, {_MILLION} input tokens",
    "cost_output": f"costs the provider, {_MILLION} output tokens",
    "price": "the user pays, US dollars per request",
    "ads": "an advertiser pays the provider, US dollars per request",
    "nuisance": "an advertisement costs the user in attention, US dollars per request",
    "quota": "a free request that is used up costs the user, US dollars",
    "llm_input": f"the provider gains, {_MILLION} input tokens",
    "llm_output": f"the provider gains, {_MILLION} output tokens",
    "llm_request": "the provider gains, US dollars per request",
    "user_input": f"the user gains, {_MILLION} input tokens",
    "user_output": f"the user gains, {_MILLION} output tokens",
    "user_request": "the user gains, US dollars per request",
}
MODES = {
    "action": "The edited matrix and the solved action are put into the chain.",
    "matrix": "Only the edited matrix is put into the chain; the model analyses it itself.",
}
ROWS = {
    "played": "The choice stays in the row of how the question was read: vague or detailed.",
    "all": "Any of the six cells may be chosen.",
}


def game(service: Service) -> GameReply:
    """All policies with their parameters and defaults, rules, modes, and the server's settings."""
    config = service.steering
    return GameReply(
        model=service.name,
        actions=list(ACTIONS), user_actions=list(USER_ACTIONS), keys=list(KEYS),
        policies={name: _policy(name) for name in pricing.POLICIES},
        rules={name: rule.summary for name, rule in RULES.items()},
        modes={name: MODES[name] for name in steering.MODES},
        rows={name: ROWS[name] for name in steering.ROWS},
        usage=service.usage and dataclasses.asdict(service.usage),
        sensitivity=list(config.sensitivity), pricing=config.pricing.name,
        rule=config.rule, mode=config.mode, floor=config.floor,
        steered_by_default=service.steered,
    )  # fmt: skip


def _policy(name: str) -> PolicyCard:
    keys = pricing.defaults(name)
    return PolicyCard(
        help=inspect.getdoc(pricing.POLICIES[name]).partition("\n")[0],
        parameters={
            key: Parameter(default=value, help=PARAMETERS[key]) for key, value in keys.items()
        },
    )


def decide(service: Service, request: DecideRequest) -> Described:
    """The given matrix under the given prices, as a steered reply would describe it.

    Raises ApiError where payoffs leave the range in which prices mean something.
    """
    config = service.settings(request)
    cells: dict[str, Any] = request.payoff.model_dump()
    written = np.array([[cells[key][player] for player in PLAYERS] for key in KEYS], np.float64)
    shape = (len(USER_ACTIONS), len(ACTIONS), len(PLAYERS))
    try:
        steered = steering.solve(written.reshape(shape), config)
    except ValueError as error:
        raise ApiError(400, str(error), "payoff") from error
    return Described(**steering.describe(steered, config))
