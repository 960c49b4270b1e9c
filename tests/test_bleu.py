"""Character BLEU by sorted numbers equals the textbook's, whatever the characters."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtalign_jax.reward.bleu import char_bleu


def textbook(hypothesis: str, reference: str) -> float:
    log_precision = 0.0
    for order in (1, 2, 3, 4):
        found, wanted = (
            Counter(text[i : i + order] for i in range(len(text) - order + 1))
            for text in (hypothesis, reference)
        )
        matches = sum(min(count, wanted[gram]) for gram, count in found.items())
        if matches == 0:
            return 0.0
        log_precision += math.log(matches / sum(found.values())) / 4
    return math.exp(min(0.0, 1 - len(reference) / len(hypothesis)) + log_precision)


# Few characters, so that texts share n-grams: the ends of what fits into 16 bits, one below and
# one above, halves of pairs, and what lies outside the basic plane.
ALPHABET = "ab \x00\n\xff’漢\ud800\udfff\ufffd\ufffe\uffff\U00010000😀\U0010ffff"
texts = st.sampled_from(ALPHABET).map(lambda c: f"ab{c}").flatmap(
    lambda alphabet: st.text(alphabet, max_size=60)
)


@given(texts, texts)
def test_every_pair_of_texts_has_the_value_of_the_textbook(hypothesis, reference):
    assert char_bleu(hypothesis, reference) == textbook(hypothesis, reference)
    assert char_bleu(hypothesis, hypothesis + reference) == textbook(
        hypothesis, hypothesis + reference)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\x00\x00\x00\x00", "abcd"),  # a zero is a character, and not the absence of one
        ("aaa\uffff", "aaa\x00"),
        ("abc\U00010061", "abca"),  # equal in the lower 16 bits
        ("ab😀cd", "ab😁cd"),
    ],
)
def test_characters_that_are_not_equal_are_not_taken_for_equal(one, other):
    assert char_bleu(one, other) == textbook(one, other) < 1.0
    assert char_bleu(one, one) == char_bleu(other, other) == 1.0


def test_long_texts_of_prose_have_the_value_of_the_textbook():
    words = "the tide leaves a map behind, and nobody on the coast asks for it twice. ".split()
    one = " ".join(words[i * i % len(words)] for i in range(300))
    other = " ".join(words[i * 7 % len(words)] for i in range(250))
    assert 0 < char_bleu(one, other) == textbook(one, other) < 1
