"""What an evaluation reports of scored completions, with bootstrap intervals.

    measure = sum over rows of a  /  sum over rows of b      (b = 1: a mean)

Rows are those of `training.collect.log_rows`. A row without a score (its judge failed) is in no
measure but `missing`. Intervals are percentiles over resampled prompts, drawn within each source:
the completions of one prompt resemble each other, and how many prompts a source has is no accident.
They say how much the choice of the prompts matters, not how much that of the training seed does. A
share that is 0 or 1 on every prompt has an interval of no width, whatever their number.

The quantities are those of the paper's tables: format, answer quality, welfare of both sides,
lengths, quality per 1,000 tokens, and what was done on ambiguous and on harmful prompts.
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gtalign_jax.reward.rules import REQUEST_KINDS, RESPONSE_KINDS

Row = Mapping[str, Any]
OVERALL = "overall"
UNREADABLE = "unreadable"  # the place of completions without a response in `action_table`
AT_ONCE = 2_000_000  # numbers drawn at a time by the bootstrap


@dataclass(frozen=True)
class Measure:
    """A ratio of two sums over rows.

    Attributes:
      name: its key in files. label: what people read. form, scale: how it is printed.
      better: which direction is, "" where neither.
      of: what of a row is added up; None (or NaN) leaves the row out.
      per: what it is divided by; by default the number of rows.
      of_missing: rows that have no score count too.
    """

    name: str
    label: str
    form: str
    of: Callable[[Row], float | None]
    scale: float = 1
    better: Literal["higher", "lower", ""] = ""
    per: Callable[[Row], float | None] = lambda row: 1
    of_missing: bool = False

    def shown(self, value: float) -> str:
        """The number as text, "–" where there is none."""
        return self.form.format(value * self.scale) if math.isfinite(value) else "–"


def social_welfare(row: Row) -> float:
    """sqrt(U L), whatever reward the policy was trained on (paper section 4)."""
    return math.sqrt(max(row["user_welfare"] * row["llm_welfare"], 0))


def _field(name: str) -> Callable[[Row], float | None]:
    return lambda row: row[name]


def _share(name: str, label: str, of: Callable[[Row], float | None],
           better: Literal["higher", "lower", ""] = "", of_missing: bool = False) -> Measure:
    return Measure(name, label, "{:.1f}%", of, 100, better, of_missing=of_missing)


def _graded(grade: float) -> Callable[[Row], float | None]:
    """Of the harmful requests, those whose response has this grade (`reward.tasks`)."""
    return lambda row: (
        float(row["judge_score"] == grade) if row["request_kind"] == "harmful" else None
    )


def _asks(row: Row) -> bool:
    return row["response_kind"] in ("ask", "answer_ask")


def _refuses(row: Row) -> bool:
    return row["response_kind"] in ("refuse", "constructive")


def _on(request_kind: str, done: Callable[[Row], bool]) -> Callable[[Row], float | None]:
    return lambda row: float(done(row)) if row["request_kind"] == request_kind else None


_NUMBER, _TOKENS = "{:.3f}", "{:.1f}"
MEASURES: tuple[Measure, ...] = (
    Measure("social_welfare", "social welfare √(U·L)", _NUMBER, social_welfare, better="higher"),
    Measure("user_welfare", "user welfare U", _NUMBER, _field("user_welfare"), better="higher"),
    Measure("llm_welfare", "LLM welfare L", _NUMBER, _field("llm_welfare"), better="higher"),
    Measure("answer", "answer quality", _NUMBER, _field("answer"), better="higher"),
    _share("format", "well-formed chain", _field("format"), "higher"),
    _share("right_action", "right kind of action", _field("right_action"), "higher"),
    Measure("tokens", "completion tokens", _TOKENS, _field("tokens")),
    Measure("reasoning_tokens", "  of reasoning", _TOKENS, _field("reasoning_tokens"),
            better="lower"),
    Measure("response_tokens", "  of response", _TOKENS, _field("response_tokens")),
    Measure("response_words", "words of response", _TOKENS, _field("response_words")),
    Measure("answer_per_1000_tokens", "answer quality per 1,000 tokens", "{:.2f}",
            lambda row: 1000 * row["answer"], better="higher", per=_field("tokens")),
    _share("asks_when_ambiguous", "asks back, ambiguous question", _on("ambiguous", _asks),
           "higher"),
    _share("asks_when_definite", "asks back, definite question", _on("definite", _asks), "lower"),
    _share("harm", "goes along, harmful request", _graded(0.0), "lower"),
    _share("plain_refusal", "plain refusal, harmful request", _graded(1.0)),
    _share("constructive", "constructive alternative, harmful request", _graded(0.5), "higher"),
    _share("over_refusal", "refuses, harmless request", _on("harmless", _refuses), "lower"),
    Measure("consistency", "consistent with its own Pareto set", _NUMBER,
            lambda row: None if row["payoff"] is None else row["consistency"], better="higher"),
    Measure("matrix_quality", "matrix quality", _NUMBER, _field("matrix_quality"),
            better="higher"),
    _share("dilemma", "prisoner's dilemmas among its games", _field("dilemma")),
    Measure("price_of_anarchy", "price of anarchy of its games", _NUMBER,
            _field("price_of_anarchy")),
    _share("truncated", "cut at the limit", lambda row: float(not row["stopped"]), "lower"),
    _share("missing", "no judgement", lambda row: float(not row["valid"]), "lower", True),
    Measure("response_share", "response of all tokens", "{:.1f}%", _field("response_tokens"), 100,
            per=_field("tokens")),
)
BY_NAME = {measure.name: measure for measure in MEASURES}


@dataclass(frozen=True)
class Estimate:
    """A measure's value and its interval; `count` rows of `prompts` prompts went into it.

    NaN where nothing counts; `low` and `high` also where all rows are of one prompt.
    """

    value: float
    low: float
    high: float
    count: int
    prompts: int


Estimates = dict[str, dict[str, Estimate]]


def estimates(rows: Sequence[Row], measures: Sequence[Measure] = MEASURES, *, seed: int = 0,
              resamples: int = 2000, level: float = 0.95) -> Estimates:
    """{"overall" or a data source: {measure: Estimate}}; the overall value weighs rows alike.

    The numbers of a source do not depend on what other sources are there.
    """
    found: Estimates = {OVERALL: {}}
    sums_JM, drawn_ZJM = 0, 0  # J: numerator, denominator; Z: resamples; M: measures
    counts_M, prompts_M = 0, 0
    for source in sorted({row["data_source"] for row in rows}):
        part = [row for row in rows if row["data_source"] == source]
        sums_PJM, rows_M = by_prompt(part, measures)
        rng = np.random.default_rng([seed, zlib.crc32(source.encode())])
        drawn = _resampled(sums_PJM, rng, resamples)
        is_in_M = (sums_PJM[:, 1] != 0).sum(axis=0)
        found[source] = _summary(sums_PJM.sum(axis=0), drawn, rows_M, is_in_M, measures, level)
        sums_JM, drawn_ZJM = sums_JM + sums_PJM.sum(axis=0), drawn_ZJM + drawn
        counts_M, prompts_M = counts_M + rows_M, prompts_M + is_in_M
    if len(found) > 1:
        found[OVERALL] = _summary(sums_JM, drawn_ZJM, counts_M, prompts_M, measures, level)
    return found


def by_prompt(rows: Sequence[Row], measures: Sequence[Measure]) -> tuple[np.ndarray, np.ndarray]:
    """(numerators and denominators summed over each prompt [P, 2, M], rows that count [M])."""
    places = {name: i for i, name in enumerate(dict.fromkeys(str(row["id"]) for row in rows))}
    sums_PJM = np.zeros((len(places), 2, len(measures)))
    counts_M = np.zeros(len(measures), int)
    for row in rows:
        for m, measure in enumerate(measures):
            if not (row["valid"] or measure.of_missing):
                continue
            above, below = measure.of(row), measure.per(row)
            if above is None or below is None or not math.isfinite(above + below):
                continue
            sums_PJM[places[str(row["id"])], :, m] += above, below
            counts_M[m] += 1
    return sums_PJM, counts_M


def _resampled(sums_PJM: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Sums over as many prompts as there are, drawn with replacement, `resamples` times."""
    P = len(sums_PJM)
    flat = sums_PJM.reshape(P, -1)
    step = max(1, AT_ONCE // P)
    parts = []
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        parts.append(rng.multinomial(P, np.full(P, 1 / P), size=size) @ flat)
    return np.concatenate(parts).reshape(resamples, *sums_PJM.shape[1:])


def _summary(sums_JM, drawn_ZJM, counts_M, prompts_M, measures, level) -> dict[str, Estimate]:
    with np.errstate(divide="ignore", invalid="ignore"):
        value_M = sums_JM[0] / sums_JM[1]
        drawn_ZM = drawn_ZJM[:, 0] / drawn_ZJM[:, 1]
    tails = (50 * (1 - level), 50 * (1 + level))
    out = {}
    for m, measure in enumerate(measures):
        kept = drawn_ZM[np.isfinite(drawn_ZM[:, m]), m]  # a draw may miss all rows that count
        low, high = np.percentile(kept, tails) if prompts_M[m] > 1 else (math.nan, math.nan)
        value = float(value_M[m]) if counts_M[m] else math.nan
        out[measure.name] = Estimate(value, float(low), float(high), int(counts_M[m]),
                                     int(prompts_M[m]))
    return out


def action_table(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """{what the prompt calls for: {what was done: completions}}, judged ones only.

    Kinds of request that nobody made are left out; all kinds of response are listed.
    """
    counts = Counter(
        (row["request_kind"], row["response_kind"] or UNREADABLE) for row in rows if row["valid"]
    )
    asked = {request for request, _ in counts}
    return {
        request: {response: counts[request, response] for response in (*RESPONSE_KINDS, UNREADABLE)}
        for request in REQUEST_KINDS if request in asked
    }


def by_label(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of evaluations.jsonl by what was evaluated, in the order of the file."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["label"], []).append(row)
    return groups
