"""Is the second policy better than the first on the same prompts, or was it luck?

    difference = mean over prompts of (second - first)

with a bootstrap interval (prompts are resampled, within each data source, so that every resample
has the same mix) and a permutation test (under the null hypothesis each prompt's two numbers could
as well have been swapped). Several samples of one prompt are averaged first: they are not
independent. All p-values of one call are also given after Holm's adjustment, which keeps the
chance of even one false alarm among them below the level that one test promises.

Rows are dicts as in evaluations.jsonl or score's output. A row with `valid` false, or whose value
is null or absent, is missing: it is in no mean, and pairs that lack a side are left out and
counted. Which fields are measures is the caller's choice; what they mean is not known here.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

MEASURES = ("user_welfare", "llm_welfare", "reward")
RESAMPLES = 2000
LEVEL = 0.95
SIGNIFICANT = 0.05  # a difference is more than luck with p, after Holm's adjustment, below this
PERMUTATIONS = 9999  # at least RESAMPLES, and this many where they cost little: the smallest p that
SWAPS = 20_000_000  # can come out is 2 / (permutations + 1), which Holm multiplies by the tests
BATCH_BYTES = 64 << 20  # what the permutation test may hold at a time
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One measure on both sides, over the prompts where both have it.

    Attributes:
      first, second: means. difference: second - first. low, high: its 95 % interval, percentiles
        of the bootstrap. p: two-sided, of the permutation test. p_adjusted: after Holm.
      pairs: how many prompts. With fewer than two, intervals and p are NaN.
      first_low … second_high: intervals of the means alone, from the same resamples.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    pairs: int
    first_low: float
    first_high: float
    second_low: float
    second_high: float


@dataclasses.dataclass(frozen=True)
class Matching:
    """Rows of both sides, laid side by side; B pairs, M measures.

    Attributes:
      by: ("id", "sample"), or ("id",) with several rows of an id averaged.
      ids, sources: of each pair; a source is "" where rows have no data_source.
      first_MB, second_MB: the values; NaN where missing.
      averaged: how many ids had several rows on a side that became one mean.
      only_first, only_second: ids that the other side does not have.
      samples_unmatched: pairs of an id that both have and a sample that only one has.
      missing_first, missing_second: rows without a value of the first measure, of matched pairs.
    """

    by: tuple[str, ...]
    measures: tuple[str, ...]
    ids: tuple[str, ...]
    sources: tuple[str, ...]
    first_MB: np.ndarray
    second_MB: np.ndarray
    averaged: int
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    samples_unmatched: int
    missing_first: int
    missing_second: int

    def complete_B(self, measures: Sequence[str]) -> np.ndarray:
        """Which pairs have all of these measures on both sides."""
        at = [self.measures.index(name) for name in measures]
        return np.isfinite(self.first_MB[at] + self.second_MB[at]).all(axis=0)

    def select(self, measures: Sequence[str]) -> "Matching":
        """These measures alone, in this order."""
        at = [self.measures.index(name) for name in measures]
        return dataclasses.replace(
            self, measures=tuple(measures), first_MB=self.first_MB[at], second_MB=self.second_MB[at]
        )

    def of_source(self, source: str) -> "Matching":
        """The pairs of one data source; what was not matched stays with the whole."""
        mine = np.array(self.sources) == source
        return dataclasses.replace(
            self,
            ids=tuple(np.array(self.ids)[mine].tolist()),
            sources=tuple(np.array(self.sources)[mine].tolist()),
            first_MB=self.first_MB[:, mine],
            second_MB=self.second_MB[:, mine],
        )


def differences(first_rows: Iterable[Row], second_rows: Iterable[Row],
                measures: Sequence[str] = MEASURES, seed: int = 0,
                resamples: int = RESAMPLES) -> dict[str, Difference]:
    """Every measure's paired difference, second - first, over rows matched by id.

    Raises ValueError where `match` does, and for a measure that no pair has.
    """
    return assess(match(first_rows, second_rows, measures), seed, resamples)


def match(first_rows: Iterable[Row], second_rows: Iterable[Row],
          measures: Sequence[str] = MEASURES) -> Matching:
    """Pairs rows by (id, sample) where every row has a sample, else by id, averaging repeats.

    The pairs stand in the first side's order. Raises ValueError for a row without an id, a measure
    that is no finite number, a (id, sample) that stands twice, an id with two data sources, and
    where both sides have no id in common.
    """
    sides = [list(first_rows), list(second_rows)]
    by_sample = all(row.get("sample") is not None for rows in sides for row in rows)
    first, second = (
        _grouped(rows, by_sample, name) for rows, name in zip(sides, ("first", "second"),
                                                              strict=True)
    )
    first_ids, second_ids = ({key[0]: None for key in side} for side in (first, second))
    keys = [key for key in first if key in second]
    if not keys:
        what = "(id, sample)" if set(first_ids) & set(second_ids) else "id"
        raise ValueError(
            f"no {what} is in both: the first side has {_some(first_ids)}, the second "
            f"{_some(second_ids)}. Both must be completions of the same prompts"
        )
    mine, theirs = [first[key] for key in keys], [second[key] for key in keys]
    first_MB, missing_first = _values(mine, measures)
    second_MB, missing_second = _values(theirs, measures)
    shared = first_ids.keys() & second_ids.keys()
    return Matching(
        by=("id", "sample") if by_sample else ("id",),
        measures=tuple(measures),
        ids=tuple(key[0] for key in keys),
        sources=tuple(_source([*a, *b], key[0]) for key, a, b in zip(keys, mine, theirs,
                                                                    strict=True)),
        first_MB=first_MB,
        second_MB=second_MB,
        averaged=sum(len(a) > 1 or len(b) > 1 for a, b in zip(mine, theirs, strict=True)),
        only_first=tuple(i for i in first_ids if i not in shared),
        only_second=tuple(i for i in second_ids if i not in shared),
        samples_unmatched=sum(
            key[0] in shared for key in first.keys() ^ second.keys()
        ),
        missing_first=missing_first,
        missing_second=missing_second,
    )


def assess(matching: Matching, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Difference]:
    """Intervals and p-values of matched rows; the same seed gives the same numbers.

    The permutation test draws PERMUTATIONS where prompts times these are at most SWAPS, else fewer,
    but never less than `resamples`; where all 2**prompts swaps are no more, it goes through all.
    """
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: must be >= 1")
    both_MB = np.isfinite(matching.first_MB + matching.second_MB)
    for name, has_B in zip(matching.measures, both_MB, strict=True):
        if not has_B.any():
            raise ValueError(f"measure {name!r}: no pair of rows has it on both sides")
    ids, id_B = np.unique(np.array(matching.ids), return_inverse=True)
    source_I = np.empty(len(ids), dtype=object)
    source_I[id_B] = matching.sources
    sides = [_by_id(x, both_MB, id_B, len(ids)) for x in (matching.first_MB, matching.second_MB)]
    p_M = _permutation(sides[1] - sides[0], seed, resamples)
    out = {}
    for m, adjusted in enumerate(holm(p_M)):
        has_I = np.isfinite(sides[0][m])
        values_I2 = np.stack([side[m, has_I] for side in sides], axis=1)
        out[matching.measures[m]] = _difference(
            values_I2, source_I[has_I], float(p_M[m]), float(adjusted), seed, resamples
        )
    return out


def assess_by_source(matching: Matching, seed: int = 0,
                     resamples: int = RESAMPLES) -> dict[str, dict[str, Difference]]:
    """{data source: {measure: Difference}}, Holm's adjustment over all of them together.

    Measures that no pair of a source has are left out there. Empty with fewer than two sources.
    """
    sources = sorted(set(matching.sources))
    if len(sources) < 2:
        return {}
    out: dict[str, dict[str, Difference]] = {}
    for source in sources:
        own = matching.of_source(source)
        there = [name for name in own.measures if own.complete_B([name]).any()]
        out[source] = assess(own.select(there), seed, resamples) if there else {}
    every = [(source, name) for source, part in out.items() for name in part]
    adjusted = holm([out[source][name].p for source, name in every])
    for (source, name), p in zip(every, adjusted, strict=True):
        out[source][name] = dataclasses.replace(out[source][name], p_adjusted=float(p))
    return out


def holm(p_M: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment of p-values: the k-th smallest of m counts m - k + 1 times.

    NaNs are no tests: they stay, and do not count. (S. Holm, Scand. J. Statist. 6, 1979.)
    """
    p_M = np.asarray(p_M, float)
    adjusted_M, tests = np.full(len(p_M), np.nan), int(np.isfinite(p_M).sum())
    largest = 0.0
    for rank, at in enumerate(np.argsort(p_M)[:tests]):
        largest = max(largest, min(1.0, (tests - rank) * p_M[at]))
        adjusted_M[at] = largest
    return adjusted_M


def bootstrap_means(values_I2: np.ndarray, source_I: np.ndarray, seed: int,
                    resamples: int) -> np.ndarray:
    """Column means of resamples of the rows, drawn within each source. [resamples, 2]

    scipy.stats.bootstrap refuses a source with a single row; here it resamples to itself.
    """
    rng = np.random.default_rng(seed)
    strata = [np.flatnonzero(source_I == source) for source in sorted(set(source_I))]
    means = np.empty((resamples, values_I2.shape[1]))
    for r in range(resamples):
        drawn = np.concatenate([rows[rng.integers(len(rows), size=len(rows))] for rows in strata])
        means[r] = np.bincount(drawn, minlength=len(values_I2)) @ values_I2 / len(values_I2)
    return means


def _difference(values_I2: np.ndarray, source_I: np.ndarray, p: float, p_adjusted: float,
                seed: int, resamples: int) -> Difference:
    intervals = np.full((3, 2), np.nan)
    if len(values_I2) > 1:
        means = bootstrap_means(values_I2, source_I, seed, resamples)
        drawn = np.column_stack([means, means[:, 1] - means[:, 0]])
        intervals = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T
    (first_low, first_high), (second_low, second_high), (low, high) = intervals.tolist()
    first, second = values_I2.mean(axis=0).tolist()
    return Difference(
        first, second, float((values_I2[:, 1] - values_I2[:, 0]).mean()), low, high, p, p_adjusted,
        len(values_I2), first_low, first_high, second_low, second_high,
    )  # fmt: skip


def _permutation(difference_MI: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Two-sided p-values of the mean paired difference, all from the same swaps. [M]

    Swapping a prompt's two numbers turns its difference's sign. A missing difference counts as 0:
    it takes no part, whichever sign it has.
    """
    M, count = difference_MI.shape
    pairs_M = np.isfinite(difference_MI).sum(axis=1)
    if count < 2:
        return np.full(M, np.nan)
    import scipy.stats  # takes a second, for which no command that compares nothing should wait

    found = scipy.stats.permutation_test(
        (np.nan_to_num(difference_MI),), lambda x, axis: x.sum(axis=axis),
        permutation_type="samples", vectorized=True, axis=-1,
        n_resamples=max(resamples, min(PERMUTATIONS, SWAPS // count)),
        batch=max(1, BATCH_BYTES // (8 * M * count)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return np.where(pairs_M > 1, found.pvalue, np.nan)


def _by_id(values_MB: np.ndarray, counts_MB: np.ndarray, id_B: np.ndarray, ids: int) -> np.ndarray:
    """Means over the pairs of each id that count; NaN where none does. [M, ids]"""
    out = np.full((len(values_MB), ids), np.nan)
    for m, (values, counts) in enumerate(zip(values_MB, counts_MB, strict=True)):
        number = np.bincount(id_B[counts], minlength=ids)
        total = np.bincount(id_B[counts], weights=values[counts], minlength=ids)
        out[m, number > 0] = total[number > 0] / number[number > 0]
    return out


def _grouped(rows: Iterable[Row], by_sample: bool, side: str) -> dict[tuple[str, Any], list[Row]]:
    groups: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        if row.get("id") is None:
            raise ValueError(f"a row of the {side} side has no `id`: rows are matched by it")
        key = (str(row["id"]), row["sample"] if by_sample else None)
        groups.setdefault(key, []).append(row)
        if by_sample and len(groups[key]) > 1:
            raise ValueError(
                f"id {key[0]!r}, sample {key[1]!r} stands twice on the {side} side: rows of one "
                "policy are needed, of one label or one training step, each completion once "
                "(rows without `sample` would be averaged per id)"
            )
    return groups


def _values(groups: Sequence[Sequence[Row]], measures: Sequence[str]) -> tuple[np.ndarray, int]:
    """(means of every group's rows that have the measure [M, B], rows without the first one)."""
    out, missing = np.full((len(measures), len(groups)), np.nan), 0
    for b, rows in enumerate(groups):
        for m, name in enumerate(measures):
            values = [x for row in rows if (x := _value(row, name)) is not None]
            missing += (len(rows) - len(values)) * (m == 0)
            if values:
                out[m, b] = sum(values) / len(values)
    return out, missing


def _value(row: Row, name: str) -> float | None:
    value = row.get(name)
    if value is None or row.get("valid") is False:
        return None
    # An integer may be finite and yet no float.
    if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"id {row['id']!r}: {name}={value!r} must be a finite number or null")
    return float(value)


def _source(rows: Sequence[Row], name: str) -> str:
    sources = {str(row.get("data_source") or "") for row in rows} - {""}
    if len(sources) > 1:
        raise ValueError(
            f"id {name!r} has several data sources ({', '.join(sorted(sources))}): one id must "
            "mean one prompt"
        )
    return sources.pop() if sources else ""


def _some(ids: Iterable[str], shown: int = 3) -> str:
    """The first few of several ids, quoted, and how many more there are."""
    ids = list(ids)
    rest = f" and {len(ids) - shown} more" if len(ids) > shown else ""
    return (", ".join(map(repr, ids[:shown])) + rest) or "no rows"
