"""Hostile completions: the parser never raises, lets no infinite number out, and costs little.

The longer run, of a million strings, is benchmarks/fuzz_chain.py.
"""

import json
import math
import random
import time
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from benchmarks import fuzz_chain
from gtalign_jax.game import chain
from gtalign_jax.game.chain import KEYS, parse

CELL = '{"LLM": 1, "user": 2}'
MATRIX = "{" + ", ".join(f'"{key}": {CELL}' for key in KEYS) + "}"
VALID = (
    f"<thinking>t</thinking><payoff>{MATRIX}</payoff><analyze>a</analyze><response>r</response>"
)
LONG = 200_000
AS_MUCH_AS_IS_READ = chain.MAX_PAYOFF_CHARS - len(MATRIX)


def inside(block: str) -> str:
    return VALID.replace(MATRIX, block)


def number(text: str) -> str:
    """The matrix with another number in its first cell."""
    return inside(MATRIX.replace("1", text, 1))


@hypothesis.settings(max_examples=2000)
@hypothesis.given(st.integers(0, 2**64))
def test_nothing_is_wrong_with_the_parse_of_a_spoilt_chain(seed):
    text = fuzz_chain.hostile(random.Random(seed))
    assert fuzz_chain.wrong(text, parse(text)) is None


# What json and Python take for a number or a name, and what looks like it.
numbers = (
    st.floats().map(repr) | st.integers().map(str) | st.sampled_from(fuzz_chain.NUMBERS)
    | st.text("0123456789.eE+-_ ", max_size=12)
)
names = st.sampled_from((*KEYS, "LLM", "user")) | st.text(max_size=4)
quotes = st.sampled_from(('"', "'", "“", "”", "’", ""))
scraps = st.sampled_from(fuzz_chain.SCRAPS) | st.sampled_from(fuzz_chain.TAGS)
named = st.tuples(quotes, names, quotes).map("".join)
cells = st.tuples(*[numbers] * 2).map(lambda two: f'{{"LLM": {two[0]}, "user": {two[1]}}}')
blocks = st.lists(cells, min_size=6, max_size=6).map(
    lambda six: "{" + ", ".join(f'"{k}": {c}' for k, c in zip(KEYS, six, strict=True)) + "}"
) | st.lists(named | numbers | scraps | cells, max_size=30).map("".join)


@hypothesis.settings(max_examples=2000)
@hypothesis.given(blocks)
def test_nothing_is_wrong_with_the_parse_of_a_strange_matrix(block):
    text = inside(block)
    found = parse(text)
    assert fuzz_chain.wrong(text, found) is None
    if found.payoff is not None and "</" not in block:  # as json reads it, where that can
        try:
            read = json.loads(block)
        except ValueError:
            return
        assert found.payoff == read


@pytest.mark.parametrize(
    "text",
    [
        "[" * LONG, inside("[" * LONG), inside("{" * 64), inside('{"a":' * 64), inside("(" * 9999),
        inside("[" * 64 + "]" * 64), inside('{"a":' * 30 + "1" + "}" * 30),
        inside(MATRIX + " " * LONG), inside(" " * LONG + "!"), inside("#" * 19_999),
        inside("# \n" * 6_600 + "x"), inside("'" * 19_999), inside("'a" * 9_999),
        inside("1." * 9_999), inside("9" * 19_999), inside("1e" * 9_999), inside("- " * 9_999),
        inside("\\" * 19_999), inside('"' + "\\u0000" * 3_000 + '"'),
        inside('"VQ_DA": ' * 2_000), inside("{" + f'"VQ_DA": {CELL}, ' * 20 + MATRIX[1:]),
        number("9" * 4_300), number("9" * 4_301), number("9" * (AS_MUCH_AS_IS_READ - 9)),
        number("1e" + "9" * 4_000), number("0." + "0" * 15_000 + "1"), number("1e-99999"),
        number("NaN"), number("-Infinity"), number("1e999"), number("٣"), number("１"),
        number("9" * 309), number("-" + "9" * 309), number("1_0"), number("0x1"),
        "<payoff>" * (LONG // 8), "<payoff>" * (LONG // 8) + "</payoff>",
        "<payoff>x</payoff>" * (LONG // 18), "<response>" * (LONG // 10) + "</response>",
        "</response>" * (LONG // 11), "</thinking> " * (LONG // 12),
        "<thinking>" + "</thinking>  " * (LONG // 13), "<thinking></thinking>" + " " * LONG,
        "<thinking></thinking><payoff></payoff>" + "</payoff>\n<analyz" * (LONG // 17),
        VALID + "</response> " * (LONG // 12), VALID + "\n" * LONG, VALID[:-1], VALID[:-12],
        VALID.replace("<payoff>", "<payoff"), VALID.replace("</payoff>", "</payoff"),
        VALID.replace("<", "＜"), VALID.replace('"', "\x00"), "\ud800" * LONG, "\x00" * LONG,
        inside(MATRIX.replace("VQ_DA", "\ud800")), inside("\ud800"), inside('"\\ud800"'),
        inside("{'\ud800': " + CELL + "}"), inside("{'VQ_DA' \U0001f600}"),
    ],
    ids=lambda text: f"{text[:40]!a}x{len(text)}",
)  # fmt: skip
def test_the_worst_known_forms_cost_little_and_harm_nothing(text):
    started = time.process_time()
    found, held = fuzz_chain.parse_traced(text)
    assert time.process_time() - started < 2.0  # a hundred times what it takes, of the processor
    assert held < fuzz_chain.MAX_BYTES + fuzz_chain.MAX_BYTES_PER_CHAR * len(text)
    assert fuzz_chain.wrong(text, found) is None


@pytest.mark.parametrize(
    "text", [VALID, number("9" * 308), number("5e-324"), number("- 1"), inside(MATRIX + " " * LONG)]
)
def test_what_can_be_read_is_read(text):
    found = parse(text)
    assert found.payoff is not None and fuzz_chain.wrong(text, found) is None


def test_the_check_notices_what_it_is_there_for():
    found = parse(VALID)
    assert fuzz_chain.wrong(VALID, found) is None

    def with_value(value):
        cells = found.payoff | {"DQ_CQ": {"LLM": value, "user": 2}}
        payoff_UAP = np.array([[float(c["LLM"]), float(c["user"])] for c in cells.values()])
        return replace(found, payoff=cells, payoff_UAP=payoff_UAP.reshape(2, 3, 2))

    assert fuzz_chain.wrong(VALID, with_value(3)) is None
    for value in (math.nan, math.inf, -math.inf, True, np.float64(1)):
        assert "is no finite number" in fuzz_chain.wrong(VALID, with_value(value))
    other = replace(found, payoff_UAP=found.payoff_UAP + 1)
    assert fuzz_chain.wrong(VALID, other) == "payoff_UAP is another matrix"
    assert "only one" in fuzz_chain.wrong(VALID, replace(found, payoff_UAP=None))
    assert "analyze is a int" in fuzz_chain.wrong(VALID, replace(found, analyze=1))
    assert "cannot be shown" in fuzz_chain.wrong(VALID, replace(found, error="\ud800"))
    assert "missing" in fuzz_chain.wrong(VALID, replace(found, response=None))


def test_a_parser_that_lets_infinity_out_is_caught_and_ours_is_not(monkeypatch):
    """The same strings, with and without the fault; they come to every kind of end."""
    summary, problems = fuzz_chain.fuzz(3000, seed=7)
    assert problems == [] and summary["problems"] == 0
    assert {"well formed", "readable", "no block", "payoff is not finite",
            "payoff block with more than"} <= set(summary["outcomes"])
    monkeypatch.setattr(chain, "_is_finite", lambda value: True)
    _, problems = fuzz_chain.fuzz(3000, seed=7)
    assert any("is no finite number" in problem for problem in problems)


def test_the_same_seed_makes_the_same_strings():
    one, same, other = (
        [fuzz_chain.hostile(random.Random(f"{seed} {i}")) for i in range(50)] for seed in (1, 1, 2)
    )
    assert one == same != other
