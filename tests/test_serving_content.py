"""What the user reads of a completion, whole and piece by piece."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gtalign_jax.serving.content import CLOSE, OPEN, Content, content_of

CHAIN = "<thinking>a</thinking><payoff>{}</payoff><analyze>b</analyze><response>"


def streamed(pieces, stops=()) -> list[str]:
    content = Content(stops)
    return [*(content.feed(piece) for piece in pieces), content.finish()]


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stopped"),
    [
        (CHAIN + "It is 4.</response>", (), "It is 4.", False),
        (CHAIN + "\n It is 4. \n</response>\n", (), "It is 4.", False),
        (CHAIN + "a < b and </b> too</response>", (), "a < b and </b> too", False),
        (CHAIN + "one</response><response>two</response>", (), "one", False),
        (CHAIN + "cut before its ta</respo", (), "cut before its ta", False),
        (CHAIN + "cut </", (), "cut", False),
        (CHAIN + "is x <", (), "is x <", False),
        (CHAIN + "</response>", (), "", False),
        ("no chain at all", (), "no chain at all", False),
        ("<thinking>cut in thou", (), "<thinking>cut in thou", False),
        ("", (), "", False),
        (CHAIN + "one. two. three</response>", ("two",), "one.", True),
        (CHAIN + "one. two. three</response>", ("three", "two"), "one.", True),
        (CHAIN + "one</response>two", ("two",), "one", False),
        (CHAIN + "one</response>", ("response",), "one", False),
        (CHAIN + "a response</response>", ("response",), "a", True),
        (CHAIN + "one</response>", ("e</",), "one", False),
        (CHAIN + "one</b>", ("e</",), "on", True),
        (CHAIN + "xabcde</response>", ("abcde", "bcd"), "xa", True),
        ("one two", ("two",), "one", True),
        ("one tw", ("two",), "one tw", False),
        (CHAIN + "one tw", ("two",), "one tw", False),
        ("<payoff>STOP</payoff><response>one</response>", ("STOP",), "one", False),
    ],
)
def test_the_content_is_the_inside_of_the_response(text, stops, shown, stopped):
    assert content_of(text, stops) == (shown, stopped)


def first_stopped(content: str, stops) -> str:
    """Character by character: the content ends before the stop that is complete first."""
    for end in range(1, len(content) + 1):
        if written := [stop for stop in stops if content[:end].endswith(stop)]:
            return content[: end - max(map(len, written))].rstrip()
    return content.rstrip()


PIECES = st.lists(st.sampled_from(
    ["<response>", "</response>", "<resp", "onse>", "</", "<", ">", " ", "\n", "a", "b", "ab", "é"]
), max_size=12)  # fmt: skip


STOPS = st.lists(st.sampled_from(["a", "ab", "b ", "</", "resp", ">", "b</r", "abab"]), max_size=2)


@given(PIECES, STOPS)
@example(["<response>", "a", "b", "a"], ["ba"])
@example(["<response>", "ab", "</", "a"], ["b</", "a"])
def test_pieces_add_up_to_the_whole_however_the_text_is_cut(pieces, stops):
    text = "".join(pieces)
    whole = content_of(text, stops)[0]
    assert "".join(streamed(pieces, stops)) == whole
    assert "".join(streamed(text, stops)) == whole
    if CLOSE in (inside := text.partition(OPEN)[2]):
        assert whole == first_stopped(inside.partition(CLOSE)[0].lstrip(), stops)


@given(PIECES)
def test_nothing_that_was_shown_is_taken_back(pieces):
    text, shown, content = "", "", Content()
    for piece in pieces:
        text, shown = text + piece, shown + content.feed(piece)
        for rest in ("", CLOSE, CLOSE[1:], CLOSE[2:], " ", "x"):
            assert content_of(text + rest)[0].startswith(shown)


def test_a_piece_leaves_as_soon_as_nothing_can_change_it():
    pieces = [CHAIN[:20], CHAIN[20:] + "It is", " 4", ".</", "response>", "more"]
    assert streamed(pieces) == ["", "It is", " 4", ".", "", "", ""]
    assert streamed(["<response>a </", "b>"]) == ["a", " </b>", ""]
    assert streamed(["no chain", " at all"]) == ["", "", "no chain at all"]
