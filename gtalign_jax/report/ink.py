"""One matplotlib figure, rendered twice: as SVG that follows the page's theme, and as PNG in light.

    colours of the light theme in the figure  ->  var(--ink, #1f2328) … in the SVG

A figure is drawn with the four colours `INK`, `MUTED`, `GRID`, `PAPER` and those of `PALETTE`. In
the SVG the four become CSS variables, whose fall-back is the light theme; the palette (Okabe and
Ito's, which colour-blind people can tell apart) is readable on white and on near black. Whatever
a colour says, a dash, a marker or a hatch says too. Knows nothing of runs.
"""

import dataclasses
import io
import math
import re
import textwrap
import unicodedata
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Transform, offset_copy

INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#e1e4e8", "#ffffff"
THEME = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}

BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, YELLOW = "#e69f00", "#56b4e9", "#f0e442"
PALETTE = {  # what a colour stands for, where it always stands for the same
    "social": INK, "user": BLUE, "llm": VERMILLION, "format": GREEN, "action": PURPLE,
    "reasoning": PURPLE, "response": GREEN, "baseline": MUTED,
    "answer": BLUE, "answer_ask": SKY, "ask": ORANGE, "refuse": VERMILLION,
    "constructive": GREEN, "none": YELLOW, "unreadable": MUTED,
}  # fmt: skip

WIDTH, HEIGHT = 4.2, 3.2  # inches: 316 pixels, as wide as a phone has room for, scale by 1.05
TEXT, SMALL = 11, 10  # points
LINE = 0.21  # inches that a line of small text takes
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_RC = {
    "svg.fonttype": "none",  # text stays text: to be searched, selected and read aloud
    "svg.hashsalt": "gtalign",  # ids, too, are the same each time
    "svg.image_inline": True,
    "text.parse_math": False,  # a dollar in a label is a dollar
    "font.family": ["DejaVu Sans"],
    "hatch.linewidth": 0.8,
}
_TEXT_FONT = re.compile(r"(font:[^;]*?\d(?:\.\d+)?px )[^;]*")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A finished figure.

    Attributes:
      name: of its files, and the prefix of all ids in the SVG: letters, digits, `-` and `_`.
      title, caption, alt: plain text, to be escaped by whoever puts it into a page; `alt` says
        what is to be seen, with the numbers that matter.
      svg: one `<svg>` element as wide as its place, to stand inside HTML.
      png: the same in the light theme, with the title, 150 dots per inch.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes
    alt: str


@dataclasses.dataclass(frozen=True)
class Style:
    """How one series looks, with and without colour. `dash` is a matplotlib line style."""

    color: str
    marker: str
    dash: Any


STYLES = (
    Style(BLUE, "o", "-"),
    Style(VERMILLION, "s", (0, (5, 2))),
    Style(GREEN, "^", (0, (1.2, 1.5))),
    Style(PURPLE, "D", (0, (6, 2, 1.2, 2))),
    Style(INK, "v", (0, (3, 1.5, 1, 1.5, 1, 1.5))),
    Style(ORANGE, "P", (0, (9, 2))),
    Style(SKY, "X", (0, (2, 3))),
)


def style(i: int) -> Style:
    """The look of series number `i`: the seven of `STYLES`, then other pairs of the same."""
    n = len(STYLES)
    marked = STYLES[(i + i // n) % n]  # the next round pairs each colour with another marker
    return dataclasses.replace(marked, color=STYLES[i % n].color)


def panel(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of one empty plot: no frame, a quiet grid."""
    figure = blank(height)
    axes = figure.add_subplot()
    quiet(axes)
    return figure, axes


def blank(height: float = HEIGHT) -> Figure:
    """A figure of the common width, `height` inches high, that lays itself out when drawn."""
    return Figure(figsize=(WIDTH, height), layout="constrained", facecolor=PAPER)


def quiet(axes: Axes, *, grid: str = "y") -> None:
    """Takes away what is not data. `grid`: "x", "y", "both"."""
    axes.set_facecolor("none")
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=SMALL, length=0, pad=5)
    axes.xaxis.label.set(color=MUTED, fontsize=SMALL)
    axes.yaxis.label.set(color=MUTED, fontsize=SMALL)


def ticks(axis: Axis, most: int, *, integer: bool = False) -> None:
    """About `most` ticks, at round numbers."""
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=integer,
                                       min_n_ticks=1 if integer else 2))


def aside(axes: Axes, place: float) -> Transform:
    """Data coordinates moved `place` points to the right: marks of one spot do not hide another."""
    return offset_copy(axes.transData, axes.figure, x=place, units="points")


def says(axes: Axes, x: str = "", y: str = "") -> None:
    """Names the axes: x below, y above the plot's left end, where it reads without a tilt."""
    axes.set_xlabel(x, color=MUTED, fontsize=SMALL)
    if y:
        axes.set_title(y, loc="left", color=MUTED, fontsize=SMALL, fontweight="normal")


def legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend below the plot, in as many columns as there is room for.

    The figure grows by its lines: the plot keeps its height.
    """
    if not handles:
        return
    room, handle, letter = 72 * WIDTH - 8, 44, 0.62 * SMALL  # points
    wide = [handle + letter * columns(label) for label in labels]
    fits = [n for n in range(1, min(4, len(labels)) + 1)
            if sum(max(column) for column in np.array_split(wide, n)) <= room]
    ncols = max(fits, default=1)
    lines = math.ceil(len(labels) / ncols)
    figure.set_figheight(figure.get_figheight() + LINE * (lines - 1))
    figure.legend(
        handles, labels, loc="outside lower left", ncols=ncols, fontsize=SMALL, frameon=False,
        labelcolor=INK, handlelength=2.4, columnspacing=1.0, borderaxespad=0.2, borderpad=0.2,
    )  # fmt: skip


def short(text: object, limit: int = 38) -> str:
    """`text` on one line and at most `limit` columns wide, its middle left out where needed.

    Characters that XML or a font cannot bear (controls, halves of surrogate pairs) become spaces.
    """
    clean = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    if columns(clean) <= limit:
        return clean or "–"
    head, tail = clean[:limit], clean[-limit:]
    while columns(head) > limit // 2:
        head = head[:-1]
    while columns(tail) > limit - limit // 2 - 1:
        tail = tail[1:]
    return f"{head.rstrip()}…{tail.lstrip()}"


def columns(text: str) -> int:
    """How wide a text is: an East Asian character counts for two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def draw(name: str, title: str, caption: str, alt: str, figure: Figure) -> Picture:
    """The figure as a Picture. The same figure gives the same bytes each time.

    Raises ValueError for a `name` that could not be a file's or an id's.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise ValueError(f"name={name!r}: letters, digits, '-' and '_' only, a letter first")
    title, alt = short(title, 200), short(alt, 2000)
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # DejaVu has no Chinese; a browser has. In the PNG such a letter is an empty box.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")
        for text in figure.findobj(Text):  # made before the context above held
            text.set_parse_math(False)
        svg = io.StringIO()
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", facecolor="none", metadata=empty)
        png = io.BytesIO()
        lines = textwrap.wrap(title, 36)
        figure.set_figheight(figure.get_figheight() + 0.22 * len(lines))
        figure.suptitle("\n".join(lines), x=0.02, ha="left", color=INK, fontsize=TEXT + 1,
                        fontweight="bold").set_parse_math(False)
        figure.savefig(png, format="png", dpi=150, facecolor=PAPER, metadata={"Software": None})
    return Picture(name, title, caption, _inline(svg.getvalue(), name, title, alt),
                   png.getvalue(), alt)


def _inline(svg: str, name: str, title: str, alt: str) -> str:
    """matplotlib's document as an element of a page: themed, own ids, no style that leaks out."""
    root = ET.fromstring(svg.encode())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)  # its <style> is a `*` rule: it would reach all of the page
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        attributes = {k.removeprefix(f"{{{_XLINK}}}"): v for k, v in element.attrib.items()}
        paints = [f"{k}: {attributes.pop(k)}" for k in ("fill", "stroke") if k in attributes]
        if paints:  # as attributes of their own they could not be variables
            styles = filter(None, (*paints, attributes.get("style")))
            attributes["style"] = "; ".join(styles)
        element.attrib.clear()
        element.attrib.update({k: _mended(k, v, name) for k, v in attributes.items()})
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {
        "xmlns": _SVG, "width": "100%", "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "style": "display:block;height:auto;stroke-linejoin:round;stroke-linecap:butt",
    }  # fmt: skip
    for i, (tag, text) in enumerate((("title", title), ("desc", alt))):
        element = ET.Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(i, element)
    return ET.tostring(root, encoding="unicode")


def _mended(key: str, value: str, name: str) -> str:
    """One attribute: ids and what points to them get a prefix, theme colours become variables."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1) if value.startswith("#") else value
    value = value.replace("url(#", f"url(#{name}-")
    if key != "style":
        return value
    value = _TEXT_FONT.sub(lambda match: match[1] + FONTS, value)
    for color, variable in THEME.items():
        value = value.replace(color, f"var({variable}, {color})")
    return value


def numbers(values: Iterable[Any]) -> list[float]:
    """The numbers among `values`: None, NaN and infinities are left out."""
    floats = (float(v) for v in values if v is not None)
    return [v for v in floats if v - v == 0]
