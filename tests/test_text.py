"""Growing completions leave in pieces: all of the text, and never half a character."""

import json

import numpy as np
import pytest
import writer

from gtalign_jax.data.chat import decode
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.serving.text import TextStream


def pieces(tokenizer, ids, sizes):
    """What leaves when `ids` come in groups of these sizes, and at the end."""
    stream, at, out = TextStream(tokenizer), 0, []
    for size in sizes:
        at += size
        out.append(stream.more(ids[:at]))
    return [*out, stream.rest(ids)]


def test_a_character_of_several_tokens_leaves_when_it_is_whole():
    tokenizer = train_tokenizer(["ab"], 270)
    ids = tokenizer("a😀ü").input_ids
    assert len(ids) == 7  # one token each for the bytes: 1 + 4 + 2
    assert pieces(tokenizer, ids, [1] * 7) == ["a", "", "", "", "😀", "", "ü", ""]
    assert pieces(tokenizer, ids, [3, 3, 1]) == ["a", "😀", "ü", ""]


def test_what_is_cut_within_a_character_ends_with_a_replacement():
    tokenizer = train_tokenizer(["ab"], 270)
    ids = tokenizer("a😀").input_ids[:3]
    assert pieces(tokenizer, ids, [1, 1, 1]) == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_of_any_tokens_add_up_to_their_text(seed):
    """Special tokens, broken bytes and long characters included."""
    tokenizer = writer.tokenizer()
    rng = np.random.default_rng(seed)
    chain = tokenizer("<thinking>grün 木 café 😀</thinking> naïve").input_ids
    ids = [*rng.integers(0, len(tokenizer), 20).tolist(), *chain,
           *rng.integers(0, len(tokenizer), 20).tolist(), *chain]
    sizes = []
    while sum(sizes) < len(ids):
        sizes.append(min(int(rng.integers(1, 9)), len(ids) - sum(sizes)))
    got = pieces(tokenizer, ids, sizes)
    assert "".join(got) == decode(tokenizer, ids)
    assert not any(piece.endswith("\ufffd") for piece in got[:-1])
    assert sum(bool(piece) for piece in got) > 5


def test_the_spaces_of_a_sentencepiece_tokenizer_are_kept(sentencepiece):
    text = "the model answers  twice , and asks"
    ids = sentencepiece(text, add_special_tokens=False).input_ids
    assert decode(sentencepiece, ids) == text
    assert "".join(pieces(sentencepiece, ids, [1] * len(ids))) == text


@pytest.mark.parametrize("size", [1, 3, 8])
def test_long_runs_of_bytes_are_read_from_the_beginning_of_a_character(sentencepiece, size):
    """This tokenizer reads neighbouring bytes together: all of them are characters, or none."""
    text = "the " + "木" * 12 + "😀 answers"
    ids = sentencepiece(text, add_special_tokens=False).input_ids
    assert len(ids) > 40 and decode(sentencepiece, ids) == text
    got = pieces(sentencepiece, ids, [size] * (len(ids) // size))
    assert "".join(got) == text and max(map(len, got)) < 12


def test_a_byte_that_belongs_to_no_character_loses_none_of_the_text_around_it(sentencepiece):
    one, other = (sentencepiece(text, add_special_tokens=False).input_ids
                  for text in ("the model 木木", "木 answers twice"))
    stray = sentencepiece.convert_tokens_to_ids("<0xE6>")
    got = "".join(pieces(sentencepiece, [*one, stray, *other], [1] * (len(one) + 3)))
    assert got.startswith("the model 木木") and got.endswith("answers twice")


@pytest.fixture(scope="module")
def sentencepiece():
    """Llama's way: a word's space is the beginning of its token, and a text's first one is cut."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    texts = ["the model answers and asks twice , the user reads"] * 3
    trainer = trainers.BpeTrainer(vocab_size=376, show_progress=False, special_tokens=[
        "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    tokenizer.train_from_iterator(texts, trainer)
    made = json.loads(tokenizer.to_str())  # bytes are text, though a trainer knows no way to say so
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] == "<unk>"]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)
