"""Mathematical equivalence: what is equal, and that nothing takes longer than it may."""

import threading
import time

import pytest

from gtalign_jax.reward.math_equal import MathChecker, last_boxed, same_string


@pytest.fixture(scope="module")
def checker():
    made = MathChecker(workers=2, timeout_s=20.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("truth", "response", "equal"),
    [
        ("342", "So the sum is \\boxed{342}.", 1),
        ("342", "The answer is 342.", 1),
        ("342", "The answer is 341.", 0),
        ("342", "\\boxed{342} or perhaps \\boxed{341}", 0),
        ("342", "Which of the two numbers do you mean?", 0),
        ("342", "", 0),
        ("\\frac{1}{2}", "It is 0.5", 1),
        ("\\frac94\\pi", "$\\frac{9\\pi}{4}$", 1),
        ("1 - 2x", "We get \\boxed{-2x+1}", 1),
        ("(-4,4)", "the interval $(-4, 4)$", 1),
        ("\\text{A, D, F, G, H}", "\\boxed{A, D, F, G, H}", 1),
        ("12+6\\sqrt{3}", "\\boxed{6(2+\\sqrt3)}", 1),
        ("12+6\\sqrt{3}", "\\boxed{22.39}", 0),
        ("4.5e33", "\\boxed{4.5 \\times 10^{33}}", 1),
        ("4.5e33", "It is about 4.5e33 erg", 1),
        ("4.5e33", "\\boxed{4.5 \\times 10^{32}}", 0),
        ("-1./3", "\\boxed{-\\frac{1}{3}}", 1),
        ("np.arcsin(10/13)", "$\\arcsin(10/13)$", 1),
    ],
)
def test_equal_is_what_a_mathematician_calls_equal(truth, response, equal, checker):
    ((score, note),) = checker([(truth, response)])
    assert score == equal, note


@pytest.mark.slow
def test_hostile_answers_end_in_time_and_the_next_one_is_still_served():
    hostile = [
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{10000000!!}",
        "\\boxed{" + "(" * 3000 + "}",
        "$" + "\\frac{1}{" * 900 + "1" + "}" * 900 + "$",
        "\\boxed{" + "{" * 100_000,
        "1+" * 500_000,
    ]
    checker = MathChecker(workers=2, timeout_s=8.0)
    try:
        checker([("1", "\\boxed{4/2}")])  # starting a worker takes a second of its own
        started = time.monotonic()
        found = checker([("12", answer) for answer in hostile] + [("12", "\\boxed{24/2}")])
        # Two workers, at most 8 s and a restart each.
        assert time.monotonic() - started < 4 * 8 + 20
        assert [score for score, _ in found] == [0.0] * len(hostile) + [1.0]
    finally:
        checker.close()


@pytest.mark.slow
def test_a_worker_that_overruns_is_ended_and_replaced():
    checker = MathChecker(workers=1, timeout_s=20.0)
    try:
        assert checker([("3", "\\boxed{6/2}")])[0][0] == 1.0
        checker._timeout_s = 0.2
        started = time.monotonic()
        ((score, note),) = checker([("12", "\\boxed{9^{9^{9^{9}}}}")])
        assert score == 0.0 and "not settled within 0.2 s" in note
        assert time.monotonic() - started < 5.0
        checker._timeout_s = 20.0
        assert checker([("3", "\\boxed{6/2}")])[0][0] == 1.0
    finally:
        checker.close()


def test_what_needs_no_algebra_starts_no_worker_and_equal_answers_are_compared_once(monkeypatch):
    checker, asked = MathChecker(workers=1), []

    def ask(truth, answer, is_boxed):
        asked.append((truth, answer, is_boxed))
        return 0.25, "asked"

    monkeypatch.setattr(checker, "_ask", ask)
    settled = [
        ("342", "\\boxed{342}", 1.0), ("342", "\\boxed{341}", 0.0), ("-7", "\\boxed{ 7 }", 0.0),
        ("\\frac12", "so $\\boxed{\\frac 12}$", 1.0), ("342", "no number", 0.0),
    ]  # fmt: skip
    assert [s for s, _ in checker([pair[:2] for pair in settled])] == [s for *_, s in settled]
    assert asked == []
    # The same value in another notation, a number without a box and one too long are algebra.
    open_ones = ["\\boxed{0342}", "341 or so", "\\boxed{341.0}", "\\boxed{" + "9" * 30 + "}"]
    found = checker([("342", response) for response in open_ones * 3])
    assert [score for score, _ in found] == [0.25] * 12 and len(asked) == 4
    assert ("342", "0342", True) in asked and ("342", "341 or so", False) in asked


@pytest.mark.parametrize("other", ["341", "-342", "0", "3420"])
def test_algebra_too_tells_different_whole_numbers_apart(other, checker):
    assert checker._ask("342", other, True)[0] == 0.0


def test_it_serves_any_thread(checker):
    found = []
    thread = threading.Thread(target=lambda: found.extend(checker([("3", "\\boxed{9/3}")])))
    thread.start()
    thread.join()
    assert found[0][0] == 1.0


def test_an_unreadable_reference_is_missing_and_not_wrong(checker):
    ((score, note),) = checker([("", "\\boxed{3}")])
    assert score is None and "cannot be read" in note


def test_last_boxed_balances_braces():
    assert last_boxed("\\boxed{1} \\boxed{\\frac{1}{2}} end") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{1} \\boxed{2") is None
    assert last_boxed("none") is None


def test_same_string_ignores_spaces_and_dollars_but_not_emptiness():
    assert same_string("\\left( 1, 2 \\right)", "$(1,2)$.")
    assert not same_string("", " ")
    assert not same_string("12", "21")
