"""gtalign_jax.report.figures and ink: what is drawn equals the data; SVGs fit into any page."""

import io
import itertools
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.image import imread

from gtalign_jax.evaluation.measures import BY_NAME, OVERALL, Estimate, estimates
from gtalign_jax.evaluation.pareto import joint_frontier
from gtalign_jax.game.chain import KEYS
from gtalign_jax.report import figures, ink
from gtalign_jax.report.figures_plane import clumps
from gtalign_jax.report.figures_time import KIND_HATCHES, PANELS, pooled
from gtalign_jax.reward.rules import RESPONSE_KINDS, RIGHT_KINDS

HOSTILE = 'a<script>&"\'$x_$ 😀'
KINDS = [*RESPONSE_KINDS, None]


def row(step, i, *, valid=True, request="definite", kind="answer", user=0.5, llm=0.5):
    return {
        "stage": "grpo", "step": step, "id": f"p{i}", "data_source": "source", "valid": valid,
        "user_welfare": user, "llm_welfare": llm, "format": 1.0, "right_action": i % 2 == 0,
        "reasoning_tokens": 40 + i, "response_tokens": 10, "response_words": 8 + i,
        "request_kind": request, "response_kind": kind,
    }  # fmt: skip


def random_rows(steps, per_step, seed=0):
    rng = np.random.default_rng(seed)
    return [
        row(step, int(rng.integers(5)), valid=bool(rng.random() < 0.9),
            request=("ambiguous", "harmful")[rng.integers(2)], kind=KINDS[rng.integers(7)],
            user=float(rng.uniform()), llm=float(rng.uniform()))
        for step in steps for _ in range(per_step)
    ]


def matrix(values):
    """Payoffs (LLM, user) of the six cells in the order of KEYS."""
    return {key: {"LLM": llm, "user": user} for key, (llm, user) in zip(KEYS, values, strict=True)}


@pytest.fixture
def drawn(monkeypatch):
    """{name: figure} of what is drawn, without the seconds that rendering takes."""
    found = {}

    def keep(name, title, caption, alt, figure):
        found[name] = figure
        return ink.Picture(name, title, caption, "", b"", alt)

    monkeypatch.setattr(ink, "draw", keep)
    return found


def lines_of(figure, color, points=None):
    """[N, 2] of the lines of a colour in the first plot, if given only those of `points` points."""
    lines = [np.array(line.get_xydata()) for line in figure.axes[0].lines
             if line.get_color() == color]
    return [line for line in lines if points is None or len(line) == points]


def band_of(figure, color):
    """Corners of the areas of a colour, rounded, as a set."""
    found = set()
    for area in figure.axes[0].collections:
        if np.allclose(area.get_facecolor()[0, :3], to_rgb(color), atol=1e-6):
            found |= {tuple(np.round(v, 9)) for v in area.get_paths()[0].vertices.tolist()}
    return found


def to_rgb(color):
    return [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def hostile_pictures():
    cloud = np.random.default_rng(0).uniform(size=(40, 2))
    rows = random_rows([1, 2, 3], 12)
    return [
        figures.welfare_plane({HOSTILE: cloud, "b": cloud**2}),
        figures.forest("forest", HOSTILE, [(HOSTILE, HOSTILE, 0.5, 0.4, 0.6), ("r", "g", 1, 0, 2)]),
        *figures.payoff_heat_maps({HOSTILE: [matrix([(1, 2)] * 6)]}),
        *figures.length_histograms({HOSTILE: rows}),
        *figures.action_shares(rows),
    ]


@pytest.fixture(scope="module")
def pictures():
    return hostile_pictures()


def test_svgs_are_well_formed_need_nothing_from_outside_and_run_nothing(pictures):
    for picture in pictures:
        root = ET.fromstring(picture.svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and picture.svg.startswith("<svg")
        assert root.get("width") == "100%" and root.get("height") is None and root.get("viewBox")
        assert root.get("role") == "img"
        tags = {element.tag.partition("}")[2] for element in root.iter()}
        assert not tags & {"image", "script", "style", "foreignObject", "metadata", "a"}
        assert picture.svg.count("http") == picture.svg.count('xmlns="http://www.w3.org/2000/svg"')
        for element in root.iter():
            assert not [key for key in element.attrib if key.lower().startswith("on")]


def test_colours_of_the_theme_are_variables_and_nothing_else(pictures):
    for picture in pictures:
        assert "var(--ink, #1f2328)" in picture.svg and "var(--muted, " in picture.svg
        rest = re.sub(r"var\(--\w+, #\w{6}\)", "", picture.svg)
        assert not [color for color in ink.THEME if color in rest]
        for attribute in re.findall(r' (?:fill|stroke)="([^"]*)"', picture.svg):
            assert "var(" not in attribute, "a variable in a presentation attribute is ignored"


def test_ids_are_those_of_their_picture_and_references_meet_them(pictures):
    seen = set()
    for picture in pictures:
        root = ET.fromstring(picture.svg)
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids)) and not seen & set(ids)
        assert all(name.startswith(f"{picture.name}-") for name in ids)
        pointed = re.findall(r'(?:url\(#|href="#)([\w-]+)', picture.svg)
        pointed += root.get("aria-labelledby").split()
        assert pointed and set(pointed) <= set(ids)
        seen |= set(ids)


def test_labels_are_escaped_and_read_as_they_are(pictures):
    for picture in pictures[:4]:
        assert "<script" not in picture.svg and "&lt;script&gt;&amp;" in picture.svg
    texts = ["".join(e.itertext()) for e in ET.fromstring(pictures[0].svg).iter()
             if e.tag.endswith("}text")]
    assert HOSTILE in texts  # dollars, too: no formula is made of it


def test_the_same_numbers_give_the_same_bytes(pictures):
    again = hostile_pictures()
    assert [p.svg for p in again] == [p.svg for p in pictures]
    assert [p.png for p in again] == [p.png for p in pictures]


def test_pngs_are_light_and_as_wide_as_150_dots_per_inch_make_them(pictures):
    for picture in pictures:
        pixels = imread(io.BytesIO(picture.png))
        assert pixels.shape[1] == 630
        assert np.all(pixels[-1, -1] == 1)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_legends_and_texts_lie_inside_the_picture(monkeypatch):
    found = []
    real = ink.draw

    def keep(name, title, caption, alt, figure):
        picture = real(name, title, caption, alt, figure)
        found.append(figure)
        return picture

    monkeypatch.setattr(ink, "draw", keep)
    long = "a name of seventy letters, more than any picture has room for, or two"
    points = [(f"{long} {i}", 0.5 + 0.01 * i, 0.4, 0.6, 0.5, 0.4, 0.6) for i in range(9)]
    figures.plane_points("points", long, points)
    figures.forest("forest", long, [(long + str(i), long, i, i - 1, i + 1) for i in range(3)])
    figures.length_histograms({long: random_rows([1], 9), f"日本語{long}": random_rows([1], 9, 1)})
    assert len(found) == 4
    for figure in found:
        figure.draw_without_rendering()
        texts = [t for axes in figure.axes for t in axes.texts]
        for artist in (*figure.legends, *texts):
            box = artist.get_window_extent()
            assert box.x0 >= -1 and box.y0 >= -1
            assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
            assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes
                           if artist in figure.legends)


@pytest.mark.parametrize("name", ["", "1a", "a b", 'a"', "a/b", "ä"])
def test_a_name_that_could_not_be_an_id_is_refused(name):
    with pytest.raises(ValueError, match="name="):
        ink.draw(name, "title", "", "", ink.blank())


def test_short_keeps_both_ends_and_drops_what_xml_cannot_bear():
    assert ink.short("plain") == "plain"
    assert ink.short("a\x00b\n c\ud800") == "a b c"
    assert ink.short("") == "–"
    assert ink.short("x" * 30 + "end", limit=11) == "xxxxx…xxend"
    assert ink.columns(ink.short("日" * 1000, limit=11)) <= 11


def test_series_differ_without_colour_and_are_seen_on_both_papers():
    assert len({(ink.style(i).color, ink.style(i).marker) for i in range(49)}) == 49
    assert len({str(style.dash) for style in ink.STYLES}) == len(ink.STYLES)
    assert len({style.marker for style in ink.STYLES}) == len(ink.STYLES)
    for panel in PANELS:
        assert len({str(curve.dash) for curve in panel.curves}) == len(panel.curves)
        assert len({curve.marker for curve in panel.curves}) == len(panel.curves)
    assert len(set(KIND_HATCHES.values())) == len(KIND_HATCHES)

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for color in (ink.BLUE, ink.VERMILLION, ink.GREEN, ink.PURPLE):
        for paper in ("#ffffff", "#0d1117"):
            light, dark = sorted((luminance(to_rgb(color)), luminance(to_rgb(paper))))[::-1]
            assert (light + 0.05) / (dark + 0.05) > 3, "WCAG 2.1, contrast of graphics"


def test_pools_are_runs_of_steps_in_order_and_no_more_than_fit():
    assert pooled([3, 1, 2, 2], most=5) == [[1], [2], [3]]
    assert pooled(range(7), most=3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert pooled([], most=3) == []
    assert len(pooled(range(1, 601))) == 50


def test_curves_are_the_means_of_valid_completions_with_bootstrap_bands(drawn):
    rows = random_rows([1, 2, 3], 20)
    figures.learning_curves([], rows, {})
    [curve] = lines_of(drawn["welfare"], ink.PALETTE["user"], 3)
    for step in (1, 2, 3):
        users = [r["user_welfare"] for r in rows if r["step"] == step and r["valid"]]
        assert curve[step - 1] == pytest.approx((step, sum(users) / len(users)))
    band = band_of(drawn["welfare"], ink.PALETTE["user"])
    for step in (1, 2, 3):
        some = [r for r in rows if r["step"] == step]
        wanted = estimates(some, [BY_NAME["user_welfare"]], resamples=400)[OVERALL]["user_welfare"]
        assert {(step, round(wanted.low, 9)), (step, round(wanted.high, 9))} <= band
        assert wanted.low < curve[step - 1, 1] < wanted.high


def test_the_spread_shows_quantiles_of_social_welfare(drawn):
    rows = random_rows([1, 2], 23)
    figures.learning_curves([], rows, {})
    band = band_of(drawn["welfare_spread"], ink.INK)
    middle = lines_of(drawn["welfare_spread"], ink.INK, 2)[0]
    for step in (1, 2):
        values = sorted(math.sqrt(r["user_welfare"] * r["llm_welfare"]) for r in rows
                        if r["step"] == step and r["valid"])
        for share in (0.1, 0.25, 0.5, 0.75, 0.9):
            place = share * (len(values) - 1)
            below = math.floor(place)
            above = min(below + 1, len(values) - 1)
            wanted = values[below] + (place - below) * (values[above] - values[below])
            if share == 0.5:
                assert middle[step - 1] == pytest.approx((step, wanted))
            else:
                assert (step, round(wanted, 9)) in band


def test_evaluations_stand_at_their_steps_and_other_labels_nowhere(drawn):
    found = {
        label: {"user_welfare": Estimate(value, value - 0.1, value + 0.1, 9, 9)}
        for label, value in (("before cold start", 0.1), ("after cold start", 0.2), ("step 4", 0.3),
                             ("after GRPO", 0.4), ("step four", 0.5))
    }
    figures.learning_curves([], random_rows(range(1, 9), 4), found)
    color = ink.PALETTE["user"]
    marks = {tuple(line[0]) for line in lines_of(drawn["welfare"], color, 1)}
    assert marks == {(0, 0.2), (4, 0.3), (8, 0.4)}
    ends = [line for line in lines_of(drawn["welfare"], color, 2) if line[0, 0] == line[1, 0]]
    assert np.array(ends)[1] == pytest.approx(np.array([[4, 0.2], [4, 0.4]]))


def test_without_completions_curves_are_those_of_the_metrics(drawn):
    rows = [{"stage": "grpo", "step": s, "reward/total": 0.1 * s, "welfare/user": None,
             "grpo/kl": 0.5} for s in (1, 2, 3)]
    rows += [{"stage": "sft", "step": s, "sft/loss": 1 / s} for s in range(1, 101)]
    names = [picture.name for picture in figures.learning_curves(rows, [], {})]
    assert names == ["welfare", "cold_start_loss", "kl"]
    [curve] = lines_of(drawn["welfare"], ink.INK, 3)
    assert curve == pytest.approx(np.array([[1, 0.1], [2, 0.2], [3, 0.3]]))
    assert not lines_of(drawn["welfare"], ink.PALETTE["user"])
    loss = lines_of(drawn["cold_start_loss"], ink.INK)[0]
    assert len(loss) == 50
    assert loss[1] == pytest.approx((3.5, (1 / 3 + 1 / 4) / 2))  # two steps a point


def test_action_bars_are_shares_that_fill_the_step_wanted_ones_below(drawn):
    rows = random_rows(range(1, 7), 14)
    rows = [r for r in rows if not (r["step"] == 4 and r["request_kind"] == "harmful")]
    pictures = figures.action_shares(rows)
    assert [p.name for p in pictures] == ["actions_ambiguous", "actions_harmful"]
    for request, steps in (("ambiguous", [1, 2, 3, 4, 5, 6]), ("harmful", [1, 2, 3, 5, 6])):
        axes = drawn[f"actions_{request}"].axes[0]
        thick = {round(sum(s[:, 0]) / 2): s[0, 1] for s in axes.collections[0].get_segments()}
        assert sorted(thick) == steps
        for step in steps:
            some = [r["response_kind"] for r in rows if r["valid"] and r["step"] == step
                    and r["request_kind"] == request]
            bars = [b for b in axes.patches if abs(b.get_x() + b.get_width() / 2 - step) < 0.1]
            assert sum(b.get_height() for b in bars) == pytest.approx(1)
            for kind in KINDS:
                heights = [b.get_height() for b in bars
                           if (b.get_hatch() or "") == KIND_HATCHES[kind or "unreadable"]]
                assert sum(heights) == pytest.approx(some.count(kind) / len(some))
            right = sum(kind in RIGHT_KINDS[request] for kind in some) / len(some)
            assert thick[step] == pytest.approx(right)


def brute_frontier(points):
    return sorted({
        tuple(p) for p in points
        if not any(q[0] >= p[0] and q[1] >= p[1] and (q[0] > p[0] or q[1] > p[1]) for q in points)
    })


@pytest.mark.parametrize("seed", range(5))
def test_frontiers_equal_brute_force_also_with_ties(seed):
    points = np.random.default_rng(seed).integers(0, 6, size=(30, 2)) / 5
    assert [tuple(p) for p in joint_frontier(points)] == brute_frontier(points.tolist())


def test_the_welfare_plane_draws_frontiers_of_all_points_and_means(drawn):
    rng = np.random.default_rng(3)
    clouds = {"before": rng.uniform(size=(900, 2)), "none": [], "after": rng.uniform(size=(9, 2))}
    clouds["before"][5] = math.nan
    picture = figures.welfare_plane(clouds | {"nulls": [(None, 0.5), (0.5, math.nan)]})
    assert "400 fullest spots" in picture.caption
    axes = drawn["welfare_plane"].axes[0]
    for i, label in ((0, "before"), (2, "after")):
        cloud = np.array([p for p in clouds[label] if not np.isnan(p).any()])
        color = ink.style(i).color
        step = next(line for line in axes.lines if line.get_drawstyle() == "steps-pre"
                    and line.get_color() == color)
        corners = step.get_xydata()
        assert [tuple(p) for p in corners[1:-1]] == brute_frontier(cloud.tolist())
        assert corners[0, 1] == cloud[:, 1].max() and corners[-1, 0] == cloud[:, 0].max()
        assert any(np.allclose(line, [cloud.mean(axis=0)])
                   for line in lines_of(drawn["welfare_plane"], color, 1))
    assert [len(marks.get_offsets()) for marks in axes.collections] == [400, 9]


def test_clumps_count_every_point_once():
    points = np.random.default_rng(0).integers(0, 30, size=(200, 2)) / 500
    places, counts = clumps(points)
    slow = {}
    for x, y in points.tolist():
        slow.setdefault((math.floor(x / 0.01), math.floor(y / 0.01)), []).append((x, y))
    assert counts.sum() == 200 and sorted(counts) == sorted(map(len, slow.values()))
    assert list(counts) == sorted(counts, reverse=True)
    wanted = sorted(tuple(np.mean(group, axis=0).round(9)) for group in slow.values())
    assert sorted(tuple(p.round(9)) for p in places) == wanted


def test_heat_maps_show_means_and_recommended_shares_in_one_scale(drawn):
    first = matrix([(0, 0), (1, 2), (3, 3), (0, 0), (0, 0), (0, 0)])  # recommended: VQ_AQ
    second = matrix([(5, 5), (1, 0), (0, -1), (0, 0), (0, 0), (0, 0)])  # recommended: VQ_DA
    absurd = matrix([(1e9, 0)] * 6)
    pictures = figures.payoff_heat_maps({
        "a": [first, second, None, absurd], "none": [None], "b": [second],
    })
    assert [p.name for p in pictures] == ["payoff_1", "payoff_3"]
    assert "wrote (2)" in pictures[0].caption
    assert "numbers beyond ±100: 1." in pictures[0].caption
    texts = [[t.get_text() for t in axes.texts] for axes in drawn["payoff_1"].axes]
    assert texts == [
        ["2.50", "1.00", "1.50", "0.00", "0.00", "0.00"],
        ["2.50", "1.00", "1.00", "0.00", "0.00", "0.00"],
        ["50%", "0%", "50%", "0%", "0%", "0%"],
    ]
    # The scale runs from -1 (user at VQ_AQ of b) to 5 (VQ_DA of b): equal payoffs, equal colours.
    cells_a, cells_b = ([p.get_facecolor() for p in drawn[name].axes[1].patches]
                        for name in ("payoff_1", "payoff_3"))
    assert cells_a[3] == cells_b[3] and cells_a[0] != cells_b[0]


def test_recommended_shares_agree_with_a_slow_solver():
    cells = np.random.default_rng(1).integers(-3, 4, size=(60, 6, 2)).astype(float)

    def best(game):
        kept = [i for i, p in enumerate(game) if not any(
            q[0] >= p[0] and q[1] >= p[1] and (q[0] > p[0] or q[1] > p[1]) for q in game)]
        return max(kept, key=lambda i: (game[i].sum(), game[i][1], game[i][0], -i))

    share_UA = figures.recommended_shares(cells.reshape(60, 2, 3, 2))
    counts = np.bincount([best(game) for game in cells], minlength=6)
    assert share_UA.reshape(-1) == pytest.approx(counts / 60)
    assert share_UA.sum() == pytest.approx(1)


def test_histograms_are_shares_of_each_label(drawn):
    groups = {"before": random_rows([1], 50), "after": random_rows([1], 70, seed=1)}
    pictures = figures.length_histograms(groups)
    assert [p.name for p in pictures] == ["histogram_reasoning_tokens", "histogram_response_words"]
    axes = drawn["histogram_response_words"].axes[0]
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    for patch, rows in zip(outlines, groups.values(), strict=True):
        words = [r["response_words"] for r in rows if r["valid"]]
        shares, edges, _ = patch.get_data()
        assert shares.sum() == pytest.approx(1)
        for share, low, high in zip(shares, edges, edges[1:], strict=False):
            assert share == pytest.approx(sum(low <= w < high for w in words) / len(words))
    means = [np.mean([r["response_words"] for r in rows if r["valid"]]) for rows in groups.values()]
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx(means)


def test_long_tails_fit_into_thirty_bins_of_whole_numbers():
    edges = figures.bin_edges(np.array([3.0, 900.0]))
    assert len(edges) - 1 <= 30 and edges[0] == 2.5 and edges[-1] > 900
    assert len(set(np.diff(edges))) == 1 and np.diff(edges)[0] == 30


def test_a_forest_has_a_point_and_an_interval_per_row_and_bears_gaps(drawn):
    rows = [("x", "a", 0.5, 0.4, 0.7), ("x", "b", None, 0.1, 0.2), ("y", "b", 0.2, math.nan, 0.3),
            ("x", "c", 0.9, 0.8, 1.0)]
    figures.forest("forest", "title", rows, scale=100, form="{:.1f}%")
    axes = drawn["forest"].axes[0]
    assert [t.get_text() for t in axes.texts] == ["x", "50.0%", "90.0%", "y", "20.0%"]
    heights = {}
    for color, value, ends in ((0, 50, (40, 70)), (2, 90, (80, 100)), (1, 20, None)):
        lines = lines_of(drawn["forest"], ink.style(color).color)
        [point] = [line for line in lines if len(line) == 1]
        assert point[0, 0] == pytest.approx(value)
        heights[color] = point[0, 1]
        intervals = [line for line in lines if len(line) == 2]
        assert (not intervals) if ends is None else intervals[0][:, 0] == pytest.approx(ends)
    low, high = axes.get_ylim()
    assert low > heights[1] > heights[2] > heights[0] > high  # from above: x a, x c, y b


def test_measures_are_drawn_by_label_and_by_source_overall_first(drawn):
    estimate = {"user_welfare": Estimate(0.5, 0.4, 0.6, 3, 3)}
    found = {"before": {OVERALL: estimate, "z": estimate}, "after": {OVERALL: {}, "b": estimate}}
    measure = BY_NAME["user_welfare"]
    assert figures.source_bars(found, measure).name == "by_source_user_welfare"
    texts = [t.get_text() for t in drawn["by_source_user_welfare"].axes[0].texts]
    assert texts == ["overall", "0.500", "b", "0.500", "z", "0.500"]
    figures.measure_bars({"before": estimate, "after": {}}, [measure, BY_NAME["llm_welfare"]])
    assert [t.get_text() for t in drawn["measures"].axes[0].texts] == ["user welfare U", "0.500"]


def test_points_of_the_plane_carry_intervals_of_both_axes(drawn):
    figures.plane_points("p", "t", [("a", 0.5, 0.4, 0.6, 0.3, 0.2, 0.35),
                                    ("b", None, 0, 1, 0, 0, 1),
                                    ("c", 0.7, math.nan, None, 0.6, 0.5, 0.65)])
    a, c = (lines_of(drawn["p"], ink.style(i).color) for i in (0, 2))
    assert [line.tolist() for line in a] == [
        [[0.4, 0.3], [0.6, 0.3]], [[0.5, 0.2], [0.5, 0.35]], [[0.5, 0.3]]]
    assert [line.tolist() for line in c] == [[[0.7, 0.5], [0.7, 0.65]], [[0.7, 0.6]]]
    assert not lines_of(drawn["p"], ink.style(1).color)


def test_where_there_is_nothing_to_draw_nothing_is_drawn():
    invalid = [row(step, 0, valid=False, user=None, llm=None) for step in (1, 2)]
    for rows in ([], invalid):
        assert figures.learning_curves([], rows, {}) == []
        assert figures.action_shares(rows) == []
        assert figures.length_histograms({"a": rows}) == []
    assert figures.length_histograms({}) == []
    assert figures.payoff_heat_maps({}) == figures.payoff_heat_maps({"a": [None]}) == []
    assert figures.welfare_plane({}) is None and figures.welfare_plane({"a": []}) is None
    assert figures.forest("f", "t", []) is None and figures.measure_bars({}, []) is None
    assert figures.forest("f", "t", [("a", "b", math.nan, 0, 1)]) is None
    assert figures.plane_points("p", "t", []) is None
    assert figures.source_bars({}, BY_NAME["format"]) is None


def test_one_step_and_hundreds_of_steps_are_pictures():
    one = random_rows([7], 12)
    hundreds = [row(step, i) for step, i in itertools.product(range(1, 401), range(2))]
    for rows, pooling in ((one, ""), (hundreds, "Each point pools 8 neighbouring steps.")):
        found = figures.learning_curves([], rows, {})
        assert [p.name for p in found] == ["welfare", "welfare_spread", "behaviour", "lengths"]
        for picture in found:
            assert ET.fromstring(picture.svg).tag.endswith("svg") and picture.alt
            assert pooling in picture.caption and (pooling or "pools" not in picture.caption)
