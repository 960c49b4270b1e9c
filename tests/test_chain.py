"""The chain parser: what it accepts, what it refuses with which reason, and what it costs."""

import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtalign_jax.game import chain
from gtalign_jax.game.chain import KEYS, parse, payoff_json, render

PAYOFF_UAP = np.arange(12, dtype=np.float64).reshape(2, 3, 2) / 4 - 1
MATRIX = json.loads(payoff_json(PAYOFF_UAP))
TEXT = render("think", PAYOFF_UAP, "choose DQ_AQ", "Hello there.")


def with_payoff(block: str) -> str:
    return (
        f"<thinking>t</thinking><payoff>{block}</payoff><analyze>a</analyze>"
        "<response>r</response>"
    )


def test_a_rendered_chain_parses_to_its_parts():
    found = parse(TEXT)
    assert (found.thinking, found.analyze, found.response) == (
        "think", "choose DQ_AQ", "Hello there.",
    )  # fmt: skip
    assert found.format_ok and found.error is None
    assert found.prefix == TEXT[: TEXT.index("<response>")]
    # The first cell is (VQ, DA) = (LLM -1, user -0.75); the last is (DQ, AQ).
    assert found.payoff["VQ_DA"] == {"LLM": -1, "user": -0.75}
    np.testing.assert_array_equal(found.payoff_UAP, PAYOFF_UAP)
    assert found.payoff_UAP[1, 2].tolist() == [1.5, 1.75]
    assert render("think", MATRIX, "choose DQ_AQ", "Hello there.") == TEXT


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=12, max_size=12))
def test_every_finite_matrix_survives_the_round_trip(numbers):
    payoff_UAP = np.array(numbers).reshape(2, 3, 2)
    np.testing.assert_array_equal(parse(render("", payoff_UAP, "", "")).payoff_UAP, payoff_UAP)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<thinking>", "</thinking>", "<payoff>", "</payoff>", "<analyze>", "</analyze>",
                "<response>", "</response>", "\n", " ", "{", "}", "[", '"', "'", ":", ",", "#",
                "-", "1", "e9", ".", "NaN", "true", "VQ_DA", '"LLM"', "“", "\\", "\x00", "\ud800",
                json.dumps(MATRIX),
            ]  # fmt: skip
        ),
        max_size=40,
    ).map("".join)
    | st.text(max_size=60).map(with_payoff)
)
def test_no_text_makes_the_parser_raise(text):
    found = parse(text)
    assert (found.payoff is None) == (found.payoff_UAP is None)
    assert found.error is None or found.payoff is None or found.response is None
    assert not found.format_ok or found.error is None


@pytest.mark.parametrize(
    ("text", "format_ok"),
    [
        (TEXT, True),
        (TEXT.replace("><", ">\n \t<"), True),
        (TEXT + "\n", True),
        (TEXT + "\nmore text after the line end", True),
        (TEXT + " more text", False),
        (TEXT + " ", False),
        ("\n" + TEXT, False),
        ("Sure! " + TEXT, False),
        (TEXT.replace("</thinking>", "</thinking>."), False),
        (TEXT.replace("</payoff>", "</payoff><payoff>{}</payoff>"), True),
        (TEXT + "<response>again</response>", True),
        (TEXT.replace("analyze", "analysis"), False),
    ],
)
def test_format_wants_four_blocks_in_order_and_a_line_end(text, format_ok):
    found = parse(text)
    assert found.format_ok is format_ok
    assert found.response == "Hello there." and found.payoff == MATRIX


def test_swapped_blocks_are_read_but_cost_the_format():
    think, rest = TEXT.split("<payoff>")
    payoff, rest = rest.split("</payoff>")
    found = parse(f"<payoff>{payoff}</payoff>{think}{rest}")
    assert found.payoff == MATRIX and found.error is None and not found.format_ok


@pytest.mark.parametrize(
    "block",
    [
        str(MATRIX),
        json.dumps(MATRIX, indent=4),
        json.dumps(MATRIX)[:-1] + ",}",
        json.dumps(MATRIX).replace('"', "“"),
        str(MATRIX).replace("'", "’"),
        json.dumps(MATRIX, indent=1).replace(",\n", ", # why\n"),
        json.dumps(MATRIX).replace("-1,", "- 1.0e0,"),
        # A key said twice counts as its last value, in JSON and in Python.
        json.dumps(MATRIX).replace("{", '{"VQ_DA": {"LLM": 9, "user": 9}, ', 1),
    ],
)
def test_json_python_dicts_and_curly_quotes_are_the_same_matrix(block):
    found = parse(with_payoff(block))
    assert found.error is None and found.format_ok
    assert found.payoff == MATRIX


def altered(value) -> str:
    return json.dumps(MATRIX | {"VQ_CQ": {"LLM": value, "user": 1}})


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("", "neither JSON nor a Python dict"),
        ("[1, 2]", "a list, not an object"),
        ("null", "a NoneType, not an object"),
        (f"```json\n{json.dumps(MATRIX)}\n```", "neither JSON nor a Python dict"),
        (json.dumps({k: MATRIX[k] for k in KEYS[1:]}), r"missing \['VQ_DA'\]"),
        (json.dumps(MATRIX | {"XX": 1}), r"unexpected \['XX'\]"),
        (json.dumps(MATRIX | {"VQ_CQ": {"LLM": 1}}), "VQ_CQ must hold exactly LLM and user"),
        (json.dumps(MATRIX | {"VQ_CQ": 3}), "VQ_CQ must hold exactly LLM and user"),
        (altered("3"), "VQ_CQ.LLM is a str, not a number"),
        (altered(None), "VQ_CQ.LLM is a NoneType"),
        (altered(True), "VQ_CQ.LLM is a bool"),
        (altered(float("nan")), "VQ_CQ.LLM is not finite"),
        (altered(float("inf")), "VQ_CQ.LLM is not finite"),
        (altered(10**400), "VQ_CQ.LLM is not finite"),
        (altered(777).replace("777", "1e999"), "VQ_CQ.LLM is not finite"),
        (str(MATRIX).replace("-1", "__import__('os')"), "neither JSON nor a Python dict"),
        (str(MATRIX).replace("-1", "2**9"), "neither JSON nor a Python dict"),
        (str(MATRIX) + "{}", "text after the object"),
    ],
)
def test_an_unreadable_matrix_says_why(block, reason):
    found = parse(with_payoff(block))
    assert found.payoff is None and found.payoff_UAP is None and not found.format_ok
    assert re.search(reason, found.error), found.error


def test_missing_blocks_are_data():
    assert parse("").error == "no <payoff> block"
    assert parse(TEXT.replace("</response>", "")).error == "no closed <response> block"
    without = parse(TEXT.replace("<analyze>choose DQ_AQ</analyze>", ""))
    assert without.analyze is None and without.error is None and not without.format_ok


MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    "text",
    [
        "[" * MEGABYTE,
        with_payoff("[" * MEGABYTE),
        with_payoff("{" * 64),
        with_payoff('{"a":' * 64 + "1" + "}" * 64),
        with_payoff("(" * 9999),
        with_payoff("-" * 19_999 + "1"),
        with_payoff("9" * 19_999),
        with_payoff(altered(777).replace("777", "9" * 19_000)),
        with_payoff("#" * 19_999),
        with_payoff(" \n#" * 6_000 + "!"),
        with_payoff("'" * 19_999),
        with_payoff("1." * 9_999),
        with_payoff("{'a':" * 60),
        "<payoff>" * (MEGABYTE // 8),
        "<response>" * (MEGABYTE // 10) + "</payoff>",
        "<thinking>" + "</thinking>" * (MEGABYTE // 11),
        "<thinking>" + "</thinking>   " * (MEGABYTE // 14),
        "<thinking></thinking>" + " " * MEGABYTE,
        TEXT + "</response> " * (MEGABYTE // 12),
    ],
    ids=range(19),
)
def test_hostile_text_costs_bounded_time(text):
    started = time.process_time()
    parse(text)
    assert time.process_time() - started < 0.5


def test_a_matrix_that_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="finite"):
        payoff_json(np.full((2, 3, 2), np.nan))


def test_the_instructions_name_every_block_key_and_player():
    for word in (*chain.BLOCKS, *KEYS, *chain.USER_ACTIONS, *chain.ACTIONS, *chain.PLAYERS):
        assert word in chain.INSTRUCTION
    assert len(chain.BRIEF_INSTRUCTION.split()) <= 15
