"""Growing completions leave in pieces: all of the text, and never half a character."""

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
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)
