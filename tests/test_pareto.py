"""Pareto measures: the given cases, slow oracles in plain loops, and properties."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.evaluation import pareto

# Few values on purpose: ties and duplicates must be frequent.
WELFARE = st.sampled_from([0.0, 0.125, 0.3, 0.5, 0.55, 0.9, 1.0])
PAIRS = st.lists(st.tuples(WELFARE, WELFARE, WELFARE, WELFARE), min_size=1, max_size=12)
EPS = st.sampled_from([0.0, 0.05, 0.2])


def clouds(rows):
    whole = np.array(rows)
    return whole[:, :2], whole[:, 2:]


def numbers(tree, path=""):
    """{path: number} of a nested dict."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name, x in tree.items() for k, v in numbers(x, f"{path}/{name}").items()}


# ---- slow and plain: loops over Python floats, none of the module's own code


def slow_frontier(points):
    beaten = lambda p: any(  # noqa: E731
        q[0] >= p[0] and q[1] >= p[1] and (q[0] > p[0] or q[1] > p[1]) for q in points
    )
    return sorted({p for p in points if not beaten(p)})


def slow_counts(first, second, eps):
    def reaches(a, b):
        at_least = a[0] >= b[0] - eps and a[1] >= b[1] - eps
        return at_least and (a[0] > b[0] - eps or a[1] > b[1] - eps)

    out = {"first": 0, "second": 0, "equal": 0, "incomparable": 0}
    for a, b in zip(first, second, strict=True):
        one, other = reaches(a, b), reaches(b, a)
        if one and not other:
            out["first"] += 1
        elif other and not one:
            out["second"] += 1
        elif a == b:
            out["equal"] += 1
        else:
            out["incomparable"] += 1
    return out


def slow_regrets(points, frontier, ranges):
    out = []
    for p in points:
        best = math.inf
        for f in frontier:
            shortfalls = [(f[k] - p[k]) / (ranges[k] or 1.0) for k in (0, 1)]
            best = min(best, max(*shortfalls, 0.0))
        out.append(best)
    return out


def slow_hypervolume(points, reference):
    """Area of the union of rectangles, cell by cell of the grid that their corners make."""
    users = sorted({reference[0], *(p[0] for p in points)})
    llms = sorted({reference[1], *(p[1] for p in points)})
    area = 0.0
    for left, right in zip(users, users[1:], strict=False):
        for bottom, top in zip(llms, llms[1:], strict=False):
            inside = left >= reference[0] and bottom >= reference[1]
            if inside and any(p[0] >= right and p[1] >= top for p in points):
                area += (right - left) * (top - bottom)
    return area


@pytest.fixture(scope="module")
def cases(shared_dir):
    found = json.loads((shared_dir / "welfare_cases.json").read_text())["pareto_metrics"]
    assert len(found) == 4
    return found


def test_every_number_of_the_given_cases_is_reproduced(cases):
    compared = 0
    for case in cases:
        got = numbers(pareto.compare(case["first"], case["second"], case["eps"]))
        for path, value in numbers(case["expected"]).items():
            assert abs(got[path] - value) <= 1e-9, path
            compared += 1
    assert compared == 4 * 27


def test_the_given_cases_tell_likely_bugs_apart(cases):
    eps, case = 0.05, cases[3]
    first = np.array(case["first"])
    both = np.concatenate([first, np.array(case["second"])])
    frontier, span = pareto.joint_frontier(both), np.ptp(both, axis=0)
    wanted = case["expected"]
    # Coverage by distance instead of shortfall loses points that are better than frontier - eps.
    near = [(np.abs(frontier - p) <= eps * span).all(axis=1).any() for p in first]
    assert np.mean(near) < wanted["epsilon_coverage"]["file1"]
    # A hypervolume of the best corner alone is too small, that of the bounding box too large.
    low, area = both.min(axis=0), wanted["hypervolume_exact"]["file1"]
    assert (first - low).prod(axis=1).max() < area - 1e-3 < (first.max(axis=0) - low).prod()


@given(PAIRS, EPS)
def test_all_measures_agree_with_plain_loops(rows, eps):
    first, second = clouds(rows)
    got = pareto.compare(first, second, eps)
    a, b = [tuple(p) for p in first.tolist()], [tuple(p) for p in second.tolist()]
    counts = got["basic_compare"]
    assert slow_counts(a, b, eps) == {
        "first": counts["file1_dominates_file2"], "second": counts["file2_dominates_file1"],
        "equal": counts["equal"], "incomparable": counts["incomparable"],
    }  # fmt: skip
    frontier = slow_frontier(a + b)
    assert got["joint_frontier"] == [list(p) for p in frontier]
    lows = [min(p[k] for p in a + b) for k in (0, 1)]
    ranges = [max(p[k] for p in a + b) - lows[k] for k in (0, 1)]
    for side, points in (("file1", a), ("file2", b)):
        regrets = slow_regrets(points, frontier, ranges)
        assert got["avg_regret_Linf"][side] == pytest.approx(sum(regrets) / len(regrets), abs=1e-12)
        covered = sum(r <= eps for r in regrets) / len(regrets)
        assert got["epsilon_coverage"][side] == pytest.approx(covered, abs=1e-12)
        on_it = sum(p in frontier for p in points) / len(points)
        assert got["on_joint_frontier"][side] == pytest.approx(on_it, abs=1e-12)
        area = slow_hypervolume(points, lows)
        assert got["hypervolume_exact"][side] == pytest.approx(area, abs=1e-12)
        spans = [max(p[k] for p in points) - min(p[k] for p in points) for k in (0, 1)]
        shares = [span / r if r else 0.0 for span, r in zip(spans, ranges, strict=True)]
        spread = got["coverage_spread"][side]
        assert [spread["u_cov"], spread["l_cov"]] == pytest.approx(shares)
        assert spread["mean_cov"] == pytest.approx(sum(shares) / 2)


@given(PAIRS, EPS)
def test_exchanging_the_sides_exchanges_every_number(rows, eps):
    first, second = clouds(rows)
    there = numbers(pareto.compare(first, second, eps, rho=-2.0))
    back = numbers(pareto.compare(second, first, eps, rho=-2.0))
    turned = {"file1": "file2", "file2": "file1"}
    for path, value in there.items():
        parts = [turned.get(part, part) for part in path.split("/")]
        name = "/".join(parts).replace("file1_dominates_file2", "x")
        name = name.replace("file2_dominates_file1", "file1_dominates_file2")
        assert back[name.replace("x", "file2_dominates_file1") if "/x" in name else name] == value


@given(PAIRS, st.tuples(WELFARE, WELFARE))
def test_one_more_point_never_lowers_the_hypervolume(rows, extra):
    points, reference = clouds(rows)[0], np.zeros(2)
    more = np.concatenate([points, [extra]])
    before, after = (pareto.hypervolume(x, reference) for x in (points, more))
    assert after >= before - 1e-12
    beaten = ((points >= extra).all(axis=1)).any()
    assert (abs(after - before) < 1e-12) == (beaten or min(extra) == 0.0)


def test_points_below_the_reference_count_from_it():
    points = np.array([[2.0, -1.0], [1.0, 1.0], [-1.0, 3.0]])
    assert pareto.hypervolume(points, np.zeros(2)) == 1.0
    assert pareto.hypervolume(points - 5, np.zeros(2)) == 0.0


def test_a_staircase_worked_by_hand():
    points = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
    assert pareto.joint_frontier(points).tolist() == [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]
    assert pareto.hypervolume(points, np.zeros(2)) == 6.0  # 3 + 2 + 1
    regret = pareto.regret(np.array([[1.0, 1.0], [2.0, 1.5]]), points[:3], np.array([2.0, 2.0]))
    # (1, 1): (2, 2) lacks 1/2 on both sides, the others 2/2. (2, 1.5): (2, 2) lacks a quarter.
    assert regret.tolist() == [0.5, 0.25]


def test_dominance_with_slack_worked_by_hand():
    first = np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    second = np.array([[0.46, 0.46], [0.4, 0.52], [0.4, 0.6], [0.5, 0.5]])
    got = pareto.dominance_counts(first, second, 0.05)
    # Within the slack both reach each other; -0.1/+0.02 is reached only by the first; -0.1/+0.1
    # by none; the same point is equal, though both reach each other.
    assert got == {
        "common_count": 4, "file1_dominates_file2": 1, "file2_dominates_file1": 0, "equal": 1,
        "incomparable": 2,
    }  # fmt: skip
    strict = pareto.dominance_counts(first, second, 0.0)
    assert (strict["file1_dominates_file2"], strict["incomparable"], strict["equal"]) == (1, 2, 1)


def test_a_single_point_and_equal_clouds_have_zero_ranges_and_no_division_by_them():
    for point in ([[0.3, 0.7]], [[0.3, 0.7]] * 5):
        got = pareto.compare(point, point, 0.0)
        assert got["basic_compare"]["equal"] == len(point)
        assert set(numbers(got["coverage_spread"]).values()) == {0.0}
        assert got["hypervolume_exact"] == {"file1": 0.0, "file2": 0.0}
        assert got["avg_regret_Linf"] == {"file1": 0.0, "file2": 0.0}
        assert got["epsilon_coverage"] == {"file1": 1.0, "file2": 1.0}
        assert got["joint_frontier"] == [[0.3, 0.7]]
        assert got["NSW_avg"]["file1"] == pytest.approx(math.sqrt(0.21))


@pytest.mark.parametrize(
    ("rho", "expected"),
    [(1.0, 0.5), (0.0, 0.4), (-1.0, 0.32), (math.inf, 0.8), (-math.inf, 0.2), (1e-9, 0.4),
     (-1e6, 0.2), (1e6, 0.8), (2.0, math.sqrt(0.34))],
)  # fmt: skip
def test_ces_of_two_tenths_and_eight_tenths(rho, expected):
    got = pareto.ces_welfare(np.array([[0.2, 0.8], [0.8, 0.2]]), rho)
    assert got == pytest.approx([expected, expected], rel=2e-6)


@given(WELFARE, WELFARE, st.floats(-30, 30), st.floats(-30, 30))
def test_ces_rises_with_rho_between_the_worse_and_the_better_side(user, llm, one, other):
    point = np.array([[user, llm]])
    low, high = (pareto.ces_welfare(point, rho)[0] for rho in sorted([one, other]))
    assert low <= high * (1 + 1e-9)
    assert min(user, llm) <= low * (1 + 1e-9) and high <= (max(user, llm) + 1e-9) * (1 + 1e-9)


def test_welfare_of_a_side_that_gets_nothing_is_almost_nothing():
    point = np.array([[0.0, 1.0], [-3.0, 1.0]])
    assert pareto.nash_welfare(point) == pytest.approx([math.sqrt(1e-9)] * 2, rel=1e-6)
    assert pareto.cobb_douglas(point, 1.0) == pytest.approx([1e-9] * 2)


def test_twenty_thousand_points_on_one_frontier_are_compared_without_a_square_of_work():
    # Every point is on the frontier: a loop over (points, frontier) would take 8e8 steps.
    user = np.linspace(0, 1, 40_000)
    points = np.stack([user, 1 - user], axis=1)
    got = pareto.compare(points[::2], points[1::2], 0.0)
    assert len(got["joint_frontier"]) == 40_000
    assert got["epsilon_coverage"] == {"file1": 1.0, "file2": 1.0}
    assert got["hypervolume_exact"]["file1"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "eps", "names"),
    [
        ([[0.1, 0.2]], [[0.1, 0.2]] * 2, 0.0, "1 points"),
        ([], [], 0.0, "first"),
        ([[0.1, 0.2, 0.3]], [[0.1, 0.2, 0.3]], 0.0, "first"),
        ([[0.1, 0.2]], [[0.1, math.nan]], 0.0, "second"),
        ([[0.1, 0.2]], [[0.1, 0.2]], -0.1, "eps=-0.1"),
        ([[0.1, 0.2]], [[0.1, 0.2]], math.nan, "eps=nan"),
    ],
)
def test_what_cannot_be_compared_is_named(first, second, eps, names):
    with pytest.raises(ValueError, match=names):
        pareto.compare(first, second, eps)


def test_bad_exponents_are_named():
    with pytest.raises(ValueError, match="rho=nan"):
        pareto.compare([[0.1, 0.2]], [[0.1, 0.2]], 0.0, rho=math.nan)
    with pytest.raises(ValueError, match="alpha=2"):
        pareto.compare([[0.1, 0.2]], [[0.1, 0.2]], 0.0, alpha=2)
