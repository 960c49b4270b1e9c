"""Which cell to play: decision rules by name, and the reasons for a choice.

A rule is a mask of candidate cells and a list of values: the candidate with the largest first
value is chosen, ties go by the next value, at last by the lowest index (`payoff.first_best`).

`allowed_UA` restricts the game: a rule sees the allowed cells and nothing else, so that no payoff
of a closed cell (dominance, the disagreement point, the user's best reply) can matter.
Dominance is `payoff.pareto_mask`'s. Knows no prices.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.game import payoff as game
from gtalign_jax.game.chain import ACTIONS, KEYS

LLM, USER = game.LLM, game.USER


@dataclass(frozen=True)
class Rule:
    """A rule: `values(payoff_UAP, allowed_UA) -> (candidates_UA, values, scales)`; see `choose`.

    Attributes:
      summary: the rule in one sentence.
      candidates: what the candidates are called in a reason.
      labels: what each value is called in a reason.
    """

    summary: str
    candidates: str
    labels: tuple[str, ...]
    values: Callable


@dataclass(frozen=True)
class Decision:
    """A choice and why. `cell` is 0..5, user action major; `pareto` holds the keys of the whole
    matrix's Pareto set, `open` those of the cells among which the rule could choose."""

    cell: int
    key: str
    action: str
    rule: str
    pareto: tuple[str, ...]
    reasons: tuple[str, ...]
    open: tuple[str, ...] = KEYS


def choose(payoff_UAP: jax.Array, rule: str, allowed_UA: jax.Array | None = None) -> jax.Array:
    """The cell that `rule` plays, int32 0..5: one game, jittable and vmappable (rule static).

    At least one cell must be allowed.
    """
    if allowed_UA is None:
        allowed_UA = jnp.ones(payoff_UAP.shape[:2], bool)
    candidates_UA, values, scales = RULES[rule].values(payoff_UAP, allowed_UA)
    flat = tuple(value_UA.reshape(-1) for value_UA in values)
    return game.first_best(candidates_UA.reshape(-1), flat, scales)


def _closed(payoff_UAP, allowed_UA):
    """The matrix with every closed cell far below every allowed one for both sides."""
    scale = jnp.max(jnp.where(allowed_UA[:, :, None], jnp.abs(payoff_UAP), 0.0))
    return jnp.where(allowed_UA[:, :, None], payoff_UAP, -2 * scale - 1), scale


def _by_welfare(payoff_UAP, scale):
    """Values LLM + user, user, LLM: the order of `payoff.recommended`."""
    return (payoff_UAP.sum(-1), payoff_UAP[..., USER], payoff_UAP[..., LLM]), (scale,) * 3


def _pareto_welfare(payoff_UAP, allowed_UA):
    closed_UAP, scale = _closed(payoff_UAP, allowed_UA)
    return game.pareto_mask(closed_UAP) & allowed_UA, *_by_welfare(closed_UAP, scale)


def _utilitarian(payoff_UAP, allowed_UA):
    return allowed_UA, *_by_welfare(*_closed(payoff_UAP, allowed_UA))


def _nash_product(payoff_UAP, allowed_UA):
    closed_UAP, scale = _closed(payoff_UAP, allowed_UA)
    worst_P = jnp.min(jnp.where(allowed_UA[:, :, None], payoff_UAP, jnp.inf), axis=(0, 1))
    gain_UAP = closed_UAP - worst_P[None, None, :]
    values, scales = _by_welfare(closed_UAP, scale)
    # A product of two differences: its rounding grows with the square of what they were made of.
    return allowed_UA, (gain_UAP.prod(-1), *values), (4 * scale * scale, *scales)


def _egalitarian(payoff_UAP, allowed_UA):
    closed_UAP, scale = _closed(payoff_UAP, allowed_UA)
    values, scales = _by_welfare(closed_UAP, scale)
    return allowed_UA, (closed_UAP.min(-1), *values), (scale, *scales)


def _stackelberg(payoff_UAP, allowed_UA):
    closed_UAP, scale = _closed(payoff_UAP, allowed_UA)
    replies_UA = game.best_user(closed_UAP) & allowed_UA
    return replies_UA, (closed_UAP[..., LLM], closed_UAP[..., USER]), (scale, scale)


_WELFARE = ("LLM + user", "user", "LLM")
RULES: dict[str, Rule] = {
    "pareto_welfare": Rule(
        "the largest LLM + user on the Pareto set (the rule that the model is trained on)",
        "the Pareto set", _WELFARE, _pareto_welfare,
    ),
    # The largest sum is never dominated, so this is pareto_welfare found without dominance.
    "utilitarian": Rule("the largest LLM + user", "the open cells", _WELFARE, _utilitarian),
    "nash_product": Rule(
        "the largest product of what each side gains over its worst cell",
        "the open cells", ("product of gains", *_WELFARE), _nash_product,
    ),
    "egalitarian": Rule(
        "the best for whoever gets less", "the open cells", ("smaller payoff", *_WELFARE),
        _egalitarian,
    ),
    "stackelberg": Rule(
        "the LLM commits to an action, the user replies with its own best way of asking",
        "the user's best replies", ("LLM", "user"), _stackelberg,
    ),
}


@functools.partial(jax.jit, static_argnames="rule")
def _solve(payoff_UAP, allowed_UA, rule):
    """Rows of one array, to be fetched at once: the cell, the Pareto set, the candidates, each of
    the rule's values, and for each value within what it counts as equal."""
    candidates_UA, values, scales = RULES[rule].values(payoff_UAP, allowed_UA)
    ties = [game.tie(payoff_UAP.dtype, scale) for scale in scales]
    rows = (choose(payoff_UAP, rule, allowed_UA), game.pareto_mask(payoff_UAP), candidates_UA,
            *values, *ties)
    return jnp.stack([
        jnp.broadcast_to(row.astype(payoff_UAP.dtype), (2, 3)).reshape(-1) for row in rows
    ])


@contextlib.contextmanager
def _host_float64() -> Iterator[None]:
    """Payoffs are decimals with ties: float64, and on the host, where a call takes no transfer."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        device = jax.local_devices()[0]
    with jax.enable_x64(True), jax.default_device(device):
        yield


def decide(
    payoff_UAP: np.ndarray, rule: str = "pareto_welfare", allowed_UA: np.ndarray | None = None
) -> Decision:
    """`choose` on the host in float64, with the Pareto set and the reasons in words.

    Raises ValueError for an unknown rule, a wrong shape, payoffs that are not finite, or where no
    cell is allowed.
    """
    payoff_UAP = np.asarray(payoff_UAP, np.float64)
    if rule not in RULES:
        raise ValueError(f"rule is {str(rule)[:40]!r}; allowed are {', '.join(RULES)}")
    if payoff_UAP.shape != (2, 3, 2) or not np.isfinite(payoff_UAP).all():
        raise ValueError("a payoff matrix holds 2 x 3 x 2 finite numbers")
    allowed_UA = np.ones((2, 3), bool) if allowed_UA is None else np.asarray(allowed_UA, bool)
    if allowed_UA.shape != (2, 3) or not allowed_UA.any():
        raise ValueError("allowed must be 2 x 3 truth values, at least one of them true")
    return _decided(payoff_UAP.tobytes(), allowed_UA.tobytes(), rule)


@functools.lru_cache(maxsize=4096)  # a batch repeats its matrices, and steering its questions
def _decided(payoff: bytes, allowed: bytes, rule: str) -> Decision:
    payoff_UAP = np.frombuffer(payoff, np.float64).reshape(2, 3, 2)
    allowed_UA = np.frombuffer(allowed, bool).reshape(2, 3)
    with _host_float64():
        solved = np.asarray(_solve(payoff_UAP, allowed_UA, rule=rule))
    labels = RULES[rule].labels
    cell, pareto_I, candidates_I = int(solved[0, 0]), solved[1] > 0, solved[2] > 0
    values, ties = solved[3 : 3 + len(labels)], solved[3 + len(labels) :, 0]
    open_keys = _keys(allowed_UA.reshape(-1))
    return Decision(
        cell=cell, key=KEYS[cell], action=ACTIONS[cell % len(ACTIONS)], rule=rule,
        pareto=_keys(pareto_I), open=open_keys,
        reasons=(
            *_setting(RULES[rule], open_keys, _keys(pareto_I), _keys(candidates_I)),
            *_comparison(labels, cell, candidates_I, values, ties),
        ),
    )


def _keys(mask_I: np.ndarray) -> tuple[str, ...]:
    return tuple(key for key, kept in zip(KEYS, mask_I, strict=True) if kept)


def _setting(rule: Rule, open_keys, pareto, candidates) -> Iterator[str]:
    """What was there to choose from."""
    yield f"Pareto set: {', '.join(pareto)}."
    if open_keys != KEYS:
        yield f"Open cells: {', '.join(open_keys)}."
    if candidates not in (open_keys, pareto):
        yield f"Among them {rule.candidates}: {', '.join(candidates)}."


def _comparison(labels, cell: int, keep_I, values, ties) -> Iterator[str]:
    """The chosen cell against the best other one, value by value until they differ."""
    key = KEYS[cell]
    if keep_I.sum() == 1:
        yield f"{key} is the only candidate."
        return
    for label, value_I, tie in zip(labels, values, ties, strict=True):
        value_I = np.where(keep_I, value_I, -np.inf)
        keep_I = value_I >= value_I.max() - tie
        if keep_I.sum() == 1:
            value_I[cell], value = -np.inf, value_I[cell]
            second = int(value_I.argmax())
            yield (f"{key} has the largest {label}, {value:.10g}, before {KEYS[second]} "
                   f"with {value_I[second]:.10g}.")
            return
        tied = ", ".join(KEYS[i] for i in np.flatnonzero(keep_I))
        yield f"{tied} tie at {label} {value_I[cell]:.10g}."
    yield f"Both sides get the same from them: {key} is the first."
