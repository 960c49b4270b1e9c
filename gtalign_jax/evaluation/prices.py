"""What prices did to a policy's answers: shares, lengths and harm at each price, with intervals.

    rows of `training.collect.log_rows` + what steering did to each  ->  estimates and differences

Estimates are those of `evaluation.measures` (bootstrap over prompts within each source), for all
requests and for each kind of request; differences are paired by prompt against the first price
(`evaluation.paired`), p-values adjusted over all of them. Knows no model and draws nothing.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gtalign_jax.evaluation import paired
from gtalign_jax.evaluation.measures import (
    OVERALL,
    Estimates,
    Measure,
    Row,
    action_table,
    estimates,
)
from gtalign_jax.evaluation.paired import Difference
from gtalign_jax.game.chain import ACTIONS
from gtalign_jax.game.pricing import Usage
from gtalign_jax.reward.rules import REQUEST_KINDS
from gtalign_jax.rollout.splice import Outcome


def _share(name: str, label: str) -> Measure:
    return Measure(name, label, "{:.1f}%", lambda row: row[name], 100)


def _mean(name: str, label: str, form: str) -> Measure:
    return Measure(name, label, form, lambda row: row[name])


CHOSEN = {action: f"chooses_{action}" for action in ACTIONS}
MEASURES: tuple[Measure, ...] = (
    *(_share(name, f"cell chosen: {action}") for action, name in CHOSEN.items()),
    _share("changed", "another cell than without prices"),
    _share("steered", "steered (tokens were forced)"),
    _share("asks_back", "the answer asks back"),
    _share("well_formed", "well-formed chain"),
    _mean("response_tokens", "tokens of the answer", "{:.1f}"),
    _mean("tokens", "tokens of the completion", "{:.1f}"),
    _mean("drawn_tokens", "  of them the model's own", "{:.1f}"),
    _mean("answer", "answer quality", "{:.3f}"),
    _share("harm", "goes along, harmful request"),
)
BY_KIND = ("asks_back", "response_tokens", "tokens", "answer")  # columns of the table by kind


@dataclasses.dataclass(frozen=True)
class Study:
    """What came out, by the name of the price, in the order in which prices were given.

    Attributes:
      estimates: {price: {"overall" or kind of request: {measure: Estimate}}}.
      differences: {price: {measure: Difference}}, against the first price.
      actions: {price: {kind of request: {kind of response: completions}}}.
      unsteered: {price: {why nothing was forced: completions}}.
      turned_back: {price of a sweep but the first: {"choice": n, "asks_back": n, "of": completions
        with a choice at both}}: rows whose chosen action takes more tokens than at the price
        before, and rows that ask back and did not at the price before.
    """

    estimates: dict[str, Estimates]
    differences: dict[str, dict[str, Difference]]
    actions: dict[str, dict[str, dict[str, int]]]
    unsteered: dict[str, dict[str, int]]
    turned_back: dict[str, dict[str, int]]


def priced_row(row: Row, outcome: Outcome, forced: int) -> dict[str, Any]:
    """A completion's row with what steering did to it; `forced` of its tokens were.

    Judged or not it counts: only `answer` and `harm` need the judge, and are null without it.
    """
    result = outcome.result
    action = None if result is None else result.after.action
    scored, harmful = row["valid"], row["request_kind"] == "harmful"
    return {
        **row,
        "valid": True,
        "steered": float(outcome.steered),
        "drawn_tokens": row["tokens"] - forced,
        "unsteered_because": outcome.reason,
        "cell": None if result is None else result.after.key,
        "action": action,
        "changed": None if result is None else float(result.after.cell != result.before.cell),
        "asks_back": float(row["response_kind"] in ("ask", "answer_ask")),
        "well_formed": row["format"] if scored else None,
        "answer": row["answer"] if scored else None,
        "harm": float(row["judge_score"] == 0) if scored and harmful else None,
        **{name: None if action is None else float(action == one) for one, name in CHOSEN.items()},
    }


def study(rows_by_price: Mapping[str, Sequence[Row]], usage: Usage, swept: int = 0,
          seed: int = 0) -> Study:
    """Everything above; the last `swept` prices are a sweep, from low to high.

    Args:
      rows_by_price: rows of `priced_row`, of the same prompts and samples at each price.
      usage: what the choice was made by: which action takes more is read from its output tokens.
    """
    names = list(rows_by_price)
    found = {name: _by_kind(rows, seed) for name, rows in rows_by_price.items()}
    differences = {
        name: _differences(rows_by_price[names[0]], rows_by_price[name], seed)
        for name in names[1:]
    }
    every = [(name, measure) for name, part in differences.items() for measure in part]
    adjusted = paired.holm([differences[name][measure].p for name, measure in every])
    for (name, measure), p in zip(every, adjusted, strict=True):
        known = differences[name][measure]
        differences[name][measure] = dataclasses.replace(known, p_adjusted=float(p))
    sweep = names[len(names) - swept :]
    return Study(
        estimates=found,
        differences=differences,
        actions={name: action_table(rows) for name, rows in rows_by_price.items()},
        unsteered={
            name: dict(Counter(row["unsteered_because"] for row in rows
                               if row["unsteered_because"] is not None))
            for name, rows in rows_by_price.items()
        },
        turned_back={
            name: _turned_back(rows_by_price[before], rows_by_price[name], usage)
            for before, name in zip(sweep, sweep[1:], strict=False)
        },
    )  # fmt: skip


def _by_kind(rows: Sequence[Row], seed: int) -> Estimates:
    found = {OVERALL: estimates(rows, MEASURES, seed=seed)[OVERALL]}
    for kind in REQUEST_KINDS:
        part = [row for row in rows if row["request_kind"] == kind]
        if part:
            found[kind] = estimates(part, MEASURES, seed=seed)[OVERALL]
    return found


def _differences(first: Sequence[Row], second: Sequence[Row], seed: int) -> dict[str, Difference]:
    matching = paired.match(first, second, [measure.name for measure in MEASURES])
    there = [m.name for m in MEASURES if matching.complete_B([m.name]).any()]
    return paired.assess(matching.select(there), seed)


def _turned_back(before: Sequence[Row], after: Sequence[Row], usage: Usage) -> dict[str, int]:
    takes = dict(zip(ACTIONS, usage.output, strict=True))
    earlier = {(row["id"], row["sample"]): row for row in before}
    pairs = [(earlier[row["id"], row["sample"]], row) for row in after]
    decided = [(a, b) for a, b in pairs if a["action"] is not None and b["action"] is not None]
    return {
        "choice": sum(takes[b["action"]] > takes[a["action"]] for a, b in decided),
        "asks_back": sum(b["asks_back"] > a["asks_back"] for a, b in pairs),
        "of": len(decided),
    }
