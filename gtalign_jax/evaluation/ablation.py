"""Several rewards, several seeds, the same prompts: which differences are more than luck?

    value       a measure over the rows of all seeds together
    interval    bootstrap: seeds are drawn with replacement, and prompts (within each source, the
                same ones for all seeds, since all seeds met the same prompts)
    difference  second - first, over seeds and prompts that both have; its interval comes from the
                same draws for both sides, its p-value from a permutation test over the prompts
    shown       the interval excludes 0, p after Holm's adjustment over all comparisons is below
                0.05, and all seeds agree on the sign

Three seeds are few: a draw holds all of them in one of ten mixtures, and even three of three seeds
on the same side happen by chance once in four times. An interval that says something has to, but
it is too narrow by about a fifth (a variance estimated from n draws is (n - 1) / n too small).

Knows what rows mean only through `measures`; runs are named by whoever calls.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax.evaluation import paired, pareto
from gtalign_jax.evaluation.measures import BY_NAME, Measure, Row, by_prompt
from gtalign_jax.reward.factors import LLMWeights

RESAMPLES = 2000
LEVEL = 0.95
TESTED = (  # measures whose differences are tested; one row of a completion gives one number
    "social_welfare", "bare_social_welfare", "user_welfare", "llm_welfare", "answer", "format",
    "right_action", "tokens", "reasoning_tokens", "response_tokens", "asks_when_ambiguous",
    "asks_when_definite", "harm", "plain_refusal", "constructive", "over_refusal",
)  # fmt: skip

SeedRows = Mapping[int, Sequence[Row]]  # a policy's rows by training seed


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A measure of one policy. `by_seed`: the same of each seed's rows; NaN where nothing counts.

    With one seed the interval is about prompts alone.
    """

    value: float
    low: float
    high: float
    by_seed: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A measure's difference, second - first.

    Attributes:
      low, high: its interval over seeds and prompts. p: over prompts, after Holm's adjustment; NaN
        for measures that are not tested. by_seed: the difference of each seed.
      shown: it is more than luck, by the rule of this module.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    by_seed: dict[int, float]
    shown: bool


def bare_social_welfare(weights: LLMWeights) -> Measure:
    """Social welfare without what only a tagged chain can earn, to compare one with none.

    L0 = (w_quality q_llm + w_verbosity verbosity) / (w_quality + w_verbosity), sqrt(U L0).
    """
    whole = weights.quality + weights.verbosity

    def of(row: Row) -> float:
        bare = weights.quality * row["q_llm"] + weights.verbosity * row["verbosity"]
        return math.sqrt(max(row["user_welfare"] * bare / whole, 0.0))

    return Measure("bare_social_welfare", "√(U·L₀): format and matrix left out", "{:.3f}", of,
                   better="higher")


class Comparison:
    """Policies on the same prompts. Raises ValueError where they were not the same."""

    def __init__(self, policies: Mapping[str, SeedRows], weights: LLMWeights, seed: int = 0,
                 resamples: int = RESAMPLES) -> None:
        """`policies`: {name: {training seed: rows of an evaluation}}."""
        self.measures = {**BY_NAME, "bare_social_welfare": bare_social_welfare(weights)}
        self.policies, self.left_out = _common_rows(policies)
        _check_same(self.policies)
        self._seed, self._resamples = seed, resamples
        self._sums = {name: self._summed(rows) for name, rows in self.policies.items()}

    def outcomes(self, name: str) -> dict[str, Outcome]:
        """All measures of a policy, by name."""
        seeds = tuple(self.policies[name])
        value_M, by_seed_SM = _ratios(self._sums[name], range(len(seeds)))
        low_M, high_M = self._interval(self._drawn(name, seeds))
        return {
            measure: Outcome(
                float(value_M[m]), float(low_M[m]), float(high_M[m]),
                {s: float(by_seed_SM[i, m]) for i, s in enumerate(seeds)},
            )
            for m, measure in enumerate(self.measures)
        }

    def contrasts(self, first: str, others: Sequence[str]) -> dict[str, dict[str, Contrast]]:
        """{other: {measure: Contrast}} of `first` with each other policy on their common seeds.

        A policy without a common seed is left out. Holm's adjustment is over all of it.
        """
        others = [name for name in others if set(self.policies[name]) & set(self.policies[first])]
        tests = [(name, measure) for name in others for measure in TESTED]
        raw = {name: self._p_values(first, name) for name in others}
        adjusted = paired.holm([raw[name][measure] for name, measure in tests])
        p = dict(zip(tests, adjusted.tolist(), strict=True))
        return {name: self._contrast(first, name, p) for name in others}

    def pareto(self, first: str, second: str, eps: float = pareto.EPS) -> dict[str, Any] | None:
        """`pareto.compare` of completions of the same prompt, seed and sample number; None where
        none of them was judged on both sides."""
        both = self._matched(first, second, ("user_welfare", "llm_welfare"))
        complete_B = both.complete_B(both.measures)
        if not complete_B.any():
            return None
        return pareto.compare(both.first_MB.T[complete_B], both.second_MB.T[complete_B], eps)

    def _contrast(self, first: str, second: str,
                  p: Mapping[tuple[str, str], float]) -> dict[str, Contrast]:
        seeds = self._common(first, second)
        sides = []
        for name in (first, second):
            places = [list(self.policies[name]).index(s) for s in seeds]
            sides.append((*_ratios(self._sums[name], places), self._drawn(name, seeds)))
        (one_M, one_SM, one_ZM), (two_M, two_SM, two_ZM) = sides
        low_M, high_M = self._interval(two_ZM - one_ZM)
        out = {}
        for m, measure in enumerate(self.measures):
            by_seed = dict(zip(seeds, (two_SM - one_SM)[:, m].tolist(), strict=True))
            p_value = p.get((second, measure), math.nan)
            sign = math.copysign(1, two_M[m] - one_M[m])
            out[measure] = Contrast(
                float(one_M[m]), float(two_M[m]), float(two_M[m] - one_M[m]), float(low_M[m]),
                float(high_M[m]), p_value, by_seed,
                shown=bool((low_M[m] > 0 or high_M[m] < 0) and p_value < paired.SIGNIFICANT
                           and all(sign * d > 0 for d in by_seed.values())),
            )
        return out

    def _p_values(self, first: str, second: str) -> dict[str, float]:
        both = self._matched(first, second, TESTED)
        there = [name for name in TESTED if both.complete_B([name]).any()]
        if not there:  # no judge answered on one side
            return dict.fromkeys(TESTED, math.nan)
        # Its intervals, which know one seed only, are not used: as few draws as it takes.
        found = paired.assess(both.select(there), self._seed, resamples=2)
        return {name: found[name].p if name in found else math.nan for name in TESTED}

    def _matched(self, first: str, second: str, measures: Sequence[str]) -> paired.Matching:
        seeds = self._common(first, second)
        return paired.match(*(self._numbers(name, seeds, measures) for name in (first, second)),
                            measures)

    def _numbers(self, name: str, seeds: Sequence[int],
                 measures: Sequence[str]) -> list[dict[str, Any]]:
        """Rows as `paired` wants them: one number per measure, and samples of all seeds apart."""
        return [
            {"id": row["id"], "data_source": row["data_source"], "valid": row["valid"],
             "sample": f"{s}/{row['sample']}",
             **{m: self.measures[m].of(row) if row["valid"] else None for m in measures}}
            for s in seeds for row in self.policies[name][s]
        ]

    def _common(self, first: str, second: str) -> tuple[int, ...]:
        return tuple(s for s in self.policies[first] if s in self.policies[second])

    def _summed(self, by_seed: SeedRows) -> dict[str, np.ndarray]:
        """Per source numerators and denominators by seed and prompt [S, P, 2, M]."""
        measures = tuple(self.measures.values())
        sources = sorted({row["data_source"] for rows in by_seed.values() for row in rows})
        return {
            source: np.stack([
                by_prompt([r for r in rows if r["data_source"] == source], measures)[0]
                for rows in by_seed.values()
            ])
            for source in sources
        }

    def _drawn(self, name: str, seeds: Sequence[int]) -> np.ndarray:
        """The measures of resampled seeds and prompts [Z, M]; equal seeds give equal draws."""
        places = [list(self.policies[name]).index(s) for s in seeds]
        S, Z = len(places), self._resamples
        rng = np.random.default_rng([self._seed, S])
        weight_ZS = rng.multinomial(S, np.full(S, 1 / S), size=Z)
        total_ZJM = 0
        for source, sums_SPJM in self._sums[name].items():
            P = sums_SPJM.shape[1]
            rng = np.random.default_rng([self._seed, zlib.crc32(source.encode())])
            weight_ZP = rng.multinomial(P, np.full(P, 1 / P), size=Z)
            for i, place in enumerate(places):
                flat_PX = sums_SPJM[place].reshape(P, -1)
                part_ZX = weight_ZS[:, i][:, None] * (weight_ZP @ flat_PX)
                total_ZJM = total_ZJM + part_ZX.reshape(Z, *sums_SPJM.shape[2:])
        with np.errstate(divide="ignore", invalid="ignore"):
            return total_ZJM[:, 0] / total_ZJM[:, 1]

    def _interval(self, drawn_ZM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Percentiles of the finite draws of each measure; NaN where there is none."""
        tails = (50 * (1 - LEVEL), 50 * (1 + LEVEL))
        ends = []
        for drawn_Z in drawn_ZM.T:
            kept = drawn_Z[np.isfinite(drawn_Z)]
            ends.append(np.percentile(kept, tails) if len(kept) else (math.nan, math.nan))
        low_M, high_M = np.array(ends).T
        return low_M, high_M


def _key(row: Row) -> tuple[str, int]:
    return str(row["id"]), row["sample"]


def _common_rows(
    policies: Mapping[str, SeedRows],
) -> tuple[dict[str, dict[int, list[Row]]], int]:
    """(the rows of completions that all runs have, in one order; prompts that not all have).

    Tokenizers and instructions differ in which prompts they leave too long to ask.
    """
    runs = [rows for by_seed in policies.values() for rows in by_seed.values()]
    keys = [{_key(row) for row in rows} for rows in runs]
    common = set.intersection(*keys) if keys else set()
    if runs and not common:
        raise ValueError("the runs have no held-out prompt in common")
    kept = {
        name: {
            s: sorted((row for row in rows if _key(row) in common), key=_key)
            for s, rows in by_seed.items()
        }
        for name, by_seed in policies.items() if by_seed
    }
    apart = {key[0] for one in keys for key in one} - {key[0] for key in common}
    return kept, len(apart)


def _check_same(policies: Mapping[str, SeedRows]) -> None:
    wanted: list[Any] | None = None
    for name, by_seed in policies.items():
        for seed, rows in by_seed.items():
            asked = [(row["id"], row["sample"], row["question"]) for row in rows]
            wanted = asked if wanted is None else wanted
            if asked != wanted:
                raise ValueError(
                    f"{name}, seed {seed}: {len(asked)} completions, and not of the same prompts "
                    f"as the first run's {len(wanted)}; all runs must answer the same held-out "
                    "prompts equally often"
                )


def _ratios(sums: Mapping[str, np.ndarray], places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(measures over these seeds together [M], of each seed [S, M])."""
    total_SJM = sum(sums_SPJM[list(places)].sum(axis=1) for sums_SPJM in sums.values())
    whole_JM = total_SJM.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return whole_JM[0] / whole_JM[1], total_SJM[:, 0] / total_SJM[:, 1]
