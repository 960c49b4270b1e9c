"""The automaton that sees a text go by, token by token."""

import itertools
import random
import re

import numpy as np
import pytest
import writer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from gtalign_jax.data.chat import decode, encode_completion, token_pieces
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.game.chain import KEYS, render
from gtalign_jax.rollout.stopping import stop_table


def first_seen(table_VN, ids):
    """After how many tokens the table has seen its text; None: not at all."""
    state = 0
    for count, token in enumerate(ids, 1):
        state = table_VN[token, state]
        if state == table_VN.shape[1] - 1:
            return count
    return None


@pytest.mark.parametrize("text", ["</payoff>", "aab", "abab", "a"])
def test_every_cut_of_every_text_is_seen_at_the_token_that_completes_it(text):
    """All sequences of up to five pieces; "aaab" must not be lost after "aa" was a false start."""
    pieces = ["", "a", "b", "ab", "ba", "aab", "</pay", "off>", "<", "</payoff", "x</payoff>y", "é"]
    table_VN = stop_table(pieces, text)
    assert table_VN.shape == (len(pieces), len(text) + 1) and table_VN.dtype == np.int8
    for ids in itertools.product(range(len(pieces)), repeat=4):
        texts = list(itertools.accumulate(pieces[i] for i in ids))
        expected = next((n for n, whole in enumerate(texts, 1) if text in whole), None)
        assert first_seen(table_VN, ids) == expected, [pieces[i] for i in ids]


@pytest.mark.parametrize("texts", [("<p>", "</p>"), ("ab", "ba"), ("aab", "ab", "a")])
def test_texts_are_seen_one_after_the_other(texts):
    pieces = ["a", "b", "ab", "<p>", "</p", ">", "<", "p></p>x", "x</p><", "/"]
    table_VN = stop_table(pieces, *texts)
    in_order = re.compile(".*?".join(map(re.escape, texts)))
    for ids in itertools.product(range(len(pieces)), repeat=4):
        wholes = list(itertools.accumulate(pieces[i] for i in ids))
        expected = next((n for n, whole in enumerate(wholes, 1) if in_order.search(whole)), None)
        assert first_seen(table_VN, ids) == expected, wholes[-1]


@pytest.mark.parametrize("text", ["", "é", "x" * 127])
def test_a_text_that_the_table_cannot_hold_is_refused(text):
    with pytest.raises(ValueError, match="1 to 126 ASCII"):
        stop_table(["a"], text)


TOKENIZERS = {
    "tags whole": train_tokenizer(["so it is"], 275),
    # Merges that straddle the tags: "}</", "off>", ">\n" and the like become tokens.
    "plain pieces": train_tokenizer(
        [render("x", {key: {"LLM": 1, "user": 2} for key in KEYS}, "a", "b")] * 3
        + ["}</payoff>\n<analyze>", "</pay", "off>"] * 9, 330, chain_pieces=False),
    "words as bytes": writer.player().tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(parts=st.lists(st.sampled_from(
    ["</payoff>", "</pay", "off>", "<", "/", "> ", "\n", "木", "é", " off", "</payoff", "{1}"]),
    max_size=8))
def test_a_real_tokenizer_is_seen_to_write_what_it_decodes(name, parts):
    tokenizer, text = TOKENIZERS[name], "".join(parts)
    table_VN = stop_table(token_pieces(tokenizer, len(tokenizer) + 3), "</payoff>")
    ids = encode_completion(tokenizer, text)
    assert decode(tokenizer, ids) == text
    expected = next(
        (n for n in range(1, len(ids) + 1) if "</payoff>" in decode(tokenizer, ids[:n])), None
    )
    assert first_seen(table_VN, ids) == expected


def test_special_tokens_and_ids_beyond_the_vocabulary_write_nothing():
    """What `decode` drops must not break a text in two: "</pay<|pad|>off>" reads "</payoff>"."""
    tokenizer = TOKENIZERS["plain pieces"]
    size = len(tokenizer) + 5
    pieces = token_pieces(tokenizer, size)
    assert len(pieces) == size and pieces[-5:] == [""] * 5
    pad = tokenizer.pad_token_id
    ids = [*encode_completion(tokenizer, "</pay"), pad, *encode_completion(tokenizer, "off>")]
    assert decode(tokenizer, ids) == "</payoff>"
    assert first_seen(stop_table(pieces, "</payoff>"), ids) == len(ids)


def test_a_special_token_without_a_role_writes_nothing_either():
    tokenizer = train_tokenizer(["so it is"], 270, chain_pieces=False)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|reserved|>", special=True)])
    reserved = tokenizer.convert_tokens_to_ids("<|reserved|>")
    assert reserved not in tokenizer.all_special_ids and decode(tokenizer, [reserved]) == ""
    assert token_pieces(tokenizer, reserved + 1)[reserved] == ""


def test_a_vocabulary_of_a_real_size_takes_little_time():
    rng = random.Random(0)
    pieces = ["".join(rng.choices("</payoff>abc ", k=rng.randint(1, 12))) for _ in range(150_000)]
    table_VN = stop_table(pieces, "</payoff>")
    for i in (0, 77, 149_999):
        assert first_seen(table_VN, [i]) == (1 if "</payoff>" in pieces[i] else None)
