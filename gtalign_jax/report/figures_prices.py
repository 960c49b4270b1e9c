"""What prices did, as one figure: the cells chosen, turns that ask back, lengths and harm."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from gtalign_jax.evaluation.measures import OVERALL, Estimate
from gtalign_jax.evaluation.prices import CHOSEN, Study
from gtalign_jax.report import ink
from gtalign_jax.report.ink import Picture

COLORS = {"DA": ink.BLUE, "CQ": ink.ORANGE, "AQ": ink.SKY}
HATCHES = {"DA": "", "CQ": "//", "AQ": ".."}
CURVES = (  # (measure, kind of request, what it is called)
    ("asks_back", OVERALL, "asks back"),
    ("asks_back", "ambiguous", "asks back, ambiguous question"),
    ("harm", "harmful", "goes along, harmful request"),
)


def prices_figure(study: Study) -> Picture:
    """Prices from left to right in their order; bars are shares, whiskers 95 % intervals."""
    names = list(study.estimates)
    figure = ink.blank(6.6)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for axes in (top, middle, bottom):
        ink.quiet(axes)
    _stack(top, study)
    for i, (measure, kind, _) in enumerate(CURVES):
        found = [by_kind[kind][measure] for by_kind in study.estimates.values() if kind in by_kind]
        if len(found) == len(names):
            _curve(middle, found, i)
    middle.set_ylim(-0.04, 1.04)
    for axes in (top, middle):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _curve(bottom, [by_kind[OVERALL]["response_tokens"] for by_kind in study.estimates.values()],
           len(CURVES))
    highest = max(ink.numbers(e for by_kind in study.estimates.values()
                              for one in [by_kind[OVERALL]["response_tokens"]]
                              for e in (one.value, one.high)), default=1.0)
    bottom.set_ylim(0, 1.08 * max(highest, 1.0))  # marks moved aside do not count for matplotlib
    bottom.set_xticks(range(len(names)), [name.replace("(", "\n(") for name in names],
                      rotation=90 if len(names) > 3 else 0, fontsize=ink.SMALL - 2)
    ink.says(top, y="cell chosen, share of completions")
    ink.says(middle, y="what the answer does")
    ink.says(bottom, y="tokens of the answer")
    handles = [Patch(facecolor=COLORS[a], hatch=HATCHES[a], edgecolor=ink.PAPER) for a in CHOSEN]
    looks = [ink.style(i) for i in range(len(CURVES))]
    handles += [Line2D([], [], color=k.color, marker=k.marker, linestyle=k.dash) for k in looks]
    ink.legend(figure, handles, [*CHOSEN, *(label for *_, label in CURVES)])
    told = "; ".join(
        f"{name}: " + ", ".join(f"{a} {_percent(by_kind[OVERALL][m])}" for a, m in CHOSEN.items())
        + f", asks back {_percent(by_kind[OVERALL]['asks_back'])}, "
        f"{by_kind[OVERALL]['response_tokens'].value:.1f} tokens of answer"
        for name, by_kind in study.estimates.items()
    )
    caption = ("Above: which action the rule chose on the edited matrix. Middle: what the answer "
               "then did. Below: how long it was. Whiskers: 95 % intervals.")
    return ink.draw("steering", "Steering by price", caption, told, figure)


def _stack(axes: Axes, study: Study) -> None:
    places, below = np.arange(len(study.estimates)), np.zeros(len(study.estimates))
    for action, measure in CHOSEN.items():
        shares = np.array([by_kind[OVERALL][measure].value for by_kind in study.estimates.values()])
        shares = np.nan_to_num(shares)
        axes.bar(places, shares, 0.7, bottom=below, color=COLORS[action], hatch=HATCHES[action],
                 edgecolor=ink.PAPER, linewidth=0.8)
        below += shares
    axes.set_ylim(0, 1)


def _curve(axes: Axes, found: list[Estimate], i: int) -> None:
    look, places = ink.style(i), ink.aside(axes, 4.0 * (i - 1))
    values = [e.value for e in found]
    axes.plot(range(len(found)), values, color=look.color, marker=look.marker, linestyle=look.dash,
              markersize=5, linewidth=1.5, transform=places)
    for x, e in enumerate(found):
        axes.plot([x, x], [e.low, e.high], color=look.color, linewidth=1, transform=places)


def _percent(e: Estimate) -> str:
    return f"{e.value:.0%}" if np.isfinite(e.value) else "–"
