"""The handful of completions that a report shows: best, worst and most changed.

Chosen by social welfare √(U·L) among judged completions, ties by the order of the file, and where
it can be from as many data sources as possible. What is shown of one: question, chain, matrix,
factors, the judge's reply; texts are cut, and how much was left out is said.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax.evaluation.measures import social_welfare
from gtalign_jax.game import chain as chain_lib

Row = Mapping[str, Any]
EACH = 2  # completions of each kind
FACTORS = (
    ("answer", "answer quality"), ("q_user", "quality for the user"),
    ("q_llm", "quality for the model"), ("reading", "reading"), ("latency", "latency"),
    ("format", "format"), ("matrix_quality", "matrix quality"), ("verbosity", "verbosity"),
    ("consistency", "consistency"),
)  # fmt: skip
AT_ONCE = 700  # characters of a text in plain sight
AT_MOST = 10_000  # with the rest of it, which folds out


@dataclasses.dataclass(frozen=True)
class Cut:
    """A text in three parts: seen at once, seen when folded out, and characters left out."""

    head: str
    rest: str
    left_out: int

    @classmethod
    def of(cls, text: str, at_once: int = AT_ONCE) -> "Cut":
        if len(text) <= at_once * 1.2:  # no fold for a few words
            return cls(text, "", 0)
        return cls(text[:at_once], text[at_once:AT_MOST], max(len(text) - AT_MOST, 0))


@dataclasses.dataclass(frozen=True, eq=False)  # two are the same only if they are one
class Example:
    """A prompt with its completion before (None without a comparison) and after."""

    why: str
    before: Row | None
    after: Row

    @property
    def change(self) -> float | None:
        """Social welfare after less before; None where one of them was not judged."""
        if self.before is None or not self.before["valid"]:
            return None
        return social_welfare(self.after) - social_welfare(self.before)


def choose(before: Sequence[Row], after: Sequence[Row], each: int = EACH) -> list[Example]:
    """At most `each` of the best, worst, most improved and most worsened; none of them twice."""
    others = {(row["id"], row["sample"]): row for row in before}
    pairs = [
        Example("", others.get((row["id"], row["sample"])), row) for row in after if row["valid"]
    ]
    ranked = sorted(pairs, key=lambda pair: -social_welfare(pair.after))
    moved = sorted((pair for pair in pairs if pair.change), key=lambda pair: -pair.change)
    taken: set[tuple[Any, Any]] = set()
    chosen: list[Example] = []
    for why, order in (
        ("Best after", ranked),
        ("Worst after", ranked[::-1]),
        ("Most improved", [pair for pair in moved if pair.change > 0]),
        ("Most worsened", [pair for pair in moved[::-1] if pair.change < 0]),
    ):
        free = [pair for pair in order if _key(pair) not in taken]
        picked = _varied(free, each)
        taken |= {_key(pair) for pair in picked}
        chosen += [dataclasses.replace(pair, why=why) for pair in picked]
    return chosen


def _key(pair: Example) -> tuple[Any, Any]:
    return pair.after["id"], pair.after["sample"]


def _varied(order: Sequence[Example], each: int) -> list[Example]:
    """The first `each`, of different sources as long as there is one that was not shown yet."""
    firsts = {pair.after["data_source"]: pair for pair in reversed(order)}
    leading = sorted(firsts.values(), key=order.index)[:each]
    rest = [pair for pair in order if pair not in leading]
    return (leading + rest)[:each]


def shown(row: Row) -> dict[str, Any]:
    """A completion for the template: texts cut, matrix as rows of cells."""
    chain = chain_lib.parse(row["completion"])
    if row.get("chain_error") is None and chain.response is None:
        chain = chain_lib.plain(row["completion"])  # the baseline without reasoning blocks
    reply = row.get("judge_error") or row.get("judge_reply") or ""
    return {
        "row": row,
        "social_welfare": social_welfare(row) if row["valid"] else None,
        "blocks": [
            (name, Cut.of(text)) for name, text in (
                ("response", chain.response), ("thinking", chain.thinking),
                ("analyze", chain.analyze),
            ) if text
        ],
        "completion": Cut.of(row["completion"]),
        "matrix": matrix(row),
        "error": row.get("chain_error"),
        "factors": [(label, row[name]) for name, label in FACTORS if row.get(name) is not None],
        "judge": Cut.of(str(reply)),
        "grade": row["judge_score"],
        "judge_failed": not row["valid"],
    }


def matrix(row: Row) -> list[dict[str, Any]] | None:
    """[{"user": "VQ", "cells": [{"action", "llm", "user", "recommended", "pareto"}, …]}, …]."""
    payoff = row["payoff"]
    if payoff is None:
        return None
    pareto, recommended = row.get("pareto_set") or (), row.get("recommended")
    return [
        {"user": user, "cells": [
            {
                "action": action,
                "llm": payoff[key]["LLM"],
                "user": payoff[key]["user"],
                "recommended": key == recommended,
                "pareto": key in pareto,
            }
            for action in chain_lib.ACTIONS for key in [f"{user}_{action}"]
        ]}
        for user in chain_lib.USER_ACTIONS
    ]
