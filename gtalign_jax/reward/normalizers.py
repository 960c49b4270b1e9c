"""Per-source normalisers: rewards of unlike tasks on one scale, before GRPO forms its groups.

With x a reward, g the rewards of its source (mean m, population std s, n of them), a those of the
whole batch (mean M, std S), e = 1e-6 and F the mid-rank distribution function (rank - 1/2) / n,
linear between the values of g:

    zscore       (x - m) / (s + e)
    minmax       (x - min g) / (max g - min g), in [0, 1]
    robustz      tanh((w(x) - med) / (2 * 1.4826 * MAD)); w cuts at the 1 % and 99 % quantiles of g,
                 median and MAD (median absolute deviation) are those of w(g)
    cdf          2 F(x) - 1
    quantile     the F(x) quantile of the whole batch, taken at an element of it
    james        (x - k m - (1 - k) M) / (sqrt(k s^2 + (1 - k) S^2) + 2e), k = n / (n + 50):
                 a James-Stein shrinkage of a small source's mean and variance to the batch's
    decentralize (x - m) / (S + e): centred by source, scaled alike for all
    selfadapt    tanh((x - m) / 2): centred by source, bounded, its scale kept

A source whose rewards are all equal gets 0 (quantile: the batch's median; james: its distance from
the batch). Missing rewards (valid = False) are in no statistic and come out as 0. The paper trains
without; `none` is the default of the callers. Knows nothing of groups.
"""

from collections.abc import Callable, Sequence

import numpy as np

EPSILON = 1e-6
MAD_TO_STD = 1.4826  # of a normal distribution
CUT = (0.01, 0.99)
SHRINKAGE = 50  # rewards; a source of that many is trusted half

Normalizer = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def none(x: np.ndarray, source: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """The rewards as they are."""
    del source, batch
    return x


def zscore(x: np.ndarray, source: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Standard score within the source; plain distance from the mean where it has no spread."""
    del batch
    std = source.std()
    return (x - source.mean()) / (std + EPSILON if std > EPSILON else 1.0)


def minmax(x: np.ndarray, source: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Position between the source's smallest and largest reward."""
    del batch
    width = np.ptp(source)
    return (x - source.min()) / width if width > 0 else np.zeros_like(x)


def robustz(x: np.ndarray, source: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Standard score by median and MAD of the winsorised source, squashed to (-1, 1)."""
    del batch
    low, high = np.quantile(source, CUT)
    kept = np.clip(source, low, high)
    median = np.median(kept)
    spread = 2 * MAD_TO_STD * np.median(np.abs(kept - median))
    # The floor only matters where more than half of a source is equal.
    return np.tanh((np.clip(x, low, high) - median) / max(spread, EPSILON))


def cdf(x: np.ndarray, source: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Mid-rank within the source, from -1 to 1; ties share their mean rank."""
    del batch
    return 2 * _distribution(x, source) - 1


def quantile(x: np.ndarray, source: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Every source gets the whole batch's distribution."""
    return np.quantile(batch, _distribution(x, source), method="lower")


def james(x: np.ndarray, source: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Standard score with mean and variance shrunk to the batch's."""
    own = len(source) / (len(source) + SHRINKAGE)
    mean = own * source.mean() + (1 - own) * batch.mean()
    variance = own * source.var() + (1 - own) * batch.var()
    return (x - mean) / (np.sqrt(variance) + 2 * EPSILON)


def decentralize(x: np.ndarray, source: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Distance from the source's mean in standard deviations of the batch."""
    return (x - source.mean()) / (batch.std() + EPSILON)


def selfadapt(x: np.ndarray, source: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Distance from the source's mean, squashed to (-1, 1)."""
    del batch
    return np.tanh((x - source.mean()) / 2)


NORMALIZERS: dict[str, Normalizer] = {
    "none": none,
    "zscore": zscore,
    "minmax": minmax,
    "robustz": robustz,
    "cdf": cdf,
    "quantile": quantile,
    "james": james,
    "decentralize": decentralize,
    "selfadapt": selfadapt,
}


def normalize(
    kind: str,
    reward_B: np.ndarray,
    sources: Sequence[str],
    valid_B: np.ndarray | None = None,
    population_B: np.ndarray | None = None,
) -> np.ndarray:
    """Rewards normalised by source, float64 [B]; 0 where not valid.

    Args:
      kind: a key of NORMALIZERS.
      reward_B: the rewards. sources: the data source of each row.
      valid_B: rows that have a reward; None = all.
      population_B: values for the statistics, row by row, if not the rewards themselves (say, a
        history kept in float32).

    Raises ValueError for an unknown kind or lengths that differ.
    """
    if kind not in NORMALIZERS:
        raise ValueError(f"normalizer={kind!r} is unknown; allowed: {', '.join(NORMALIZERS)}")
    reward_B = np.asarray(reward_B, np.float64)
    population_B = reward_B if population_B is None else np.asarray(population_B, np.float64)
    valid_B = np.ones(reward_B.shape, bool) if valid_B is None else np.asarray(valid_B, bool)
    names_B = np.asarray(sources, dtype=object)
    if not reward_B.shape == population_B.shape == valid_B.shape == names_B.shape:
        raise ValueError(
            f"rows differ: rewards {reward_B.shape}, population {population_B.shape}, "
            f"valid {valid_B.shape}, sources {names_B.shape}"
        )
    out_B = np.zeros_like(reward_B)
    for name in set(names_B[valid_B]):
        rows_B = valid_B & (names_B == name)
        out_B[rows_B] = NORMALIZERS[kind](
            reward_B[rows_B], population_B[rows_B], population_B[valid_B]
        )
    return out_B


def _distribution(x: np.ndarray, source: np.ndarray) -> np.ndarray:
    values, counts = np.unique(source, return_counts=True)
    middle = (np.cumsum(counts) - counts / 2) / len(source)
    return np.interp(x, values, middle)
