"""Where an edited matrix enters a row's tokens."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gtalign_jax.data.chat import decode, encode_completion, token_pieces
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.game import pricing
from gtalign_jax.game.chain import KEYS, payoff_json
from gtalign_jax.game.pricing import Usage
from gtalign_jax.game.steering import SteeringConfig, steer
from gtalign_jax.rollout import splice
from gtalign_jax.rollout.splice import plan
from gtalign_jax.rollout.stopping import stop_table

USAGE = Usage((100.0, 230.0, 100.0), (60.0, 130.0, 90.0))
PAYOFF = {key: {"LLM": 1, "user": 1} for key in KEYS} | {
    "VQ_DA": {"LLM": 2, "user": 2}, "VQ_CQ": {"LLM": 3, "user": 3},
}  # fmt: skip
DEAR = SteeringConfig(pricing.read("per_token:output=100,input=25"), USAGE)


def matrix(compact=True) -> str:
    text = payoff_json([[[PAYOFF[key][p] for p in ("LLM", "user")] for key in KEYS]])
    return text.replace(" ", "") if compact else text


HEAD = "<thinking>Vague, I think.</thinking>"
TEXT = f"{HEAD}<payoff>{matrix()}</payoff>"
TOKENIZERS = {
    "tags whole": train_tokenizer(["so it is", matrix()], 400),
    # ">{" and "}</" are tokens here, so that no token ends where the matrix begins.
    "plain pieces": train_tokenizer([TEXT, '>{"', '>{"VQ'] * 9, 320, chain_pieces=False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("joint", ["", "\n", "\n\n"])
@pytest.mark.parametrize("mode", ["action", "matrix"])
def test_kept_and_forced_tokens_read_as_the_edited_chain(name, joint, mode):
    tokenizer = TOKENIZERS[name]
    text = f"{HEAD}{joint}<payoff>{joint}{matrix()}{joint}</payoff>"
    config = SteeringConfig(DEAR.pricing, USAGE, mode=mode)
    ids = encode_completion(tokenizer, text)
    found = plan(tokenizer, ids, config, 1000)
    expected = f"{HEAD}{joint}<payoff>" + steer(text, config).forced
    assert decode(tokenizer, [*ids[: found.keep], *found.forced]) == expected
    assert found.outcome.steered and found.outcome.reason is None
    assert found.outcome.result.after.key == "VQ_DA" != found.outcome.result.before.key
    # Nothing sampled is thrown away that could stay.
    longer = decode(tokenizer, ids[: found.keep + 1])
    assert len(longer) > len(f"{HEAD}{joint}<payoff>")


def test_a_matrix_whose_first_brace_shares_its_token_with_the_tag_is_cut_before_it():
    tokenizer = TOKENIZERS["plain pieces"]
    ids = encode_completion(tokenizer, TEXT)
    found = plan(tokenizer, ids, DEAR, 1000)
    kept = decode(tokenizer, ids[: found.keep])
    assert kept == f"{HEAD}<payoff" and decode(tokenizer, found.forced).startswith(">{")


def test_a_tokenizer_that_starts_texts_with_a_space_keeps_what_was_sampled_without_one():
    tokenizer = words_after_spaces([TEXT] * 3)
    ids = tokenizer.convert_tokens_to_ids(list(TEXT.replace(" ", "▁")))
    assert decode(tokenizer, ids) == TEXT and encode_completion(tokenizer, TEXT)[0] != ids[0]
    found = plan(tokenizer, ids, DEAR, 1000)
    assert decode(tokenizer, ids[: found.keep]) == f"{HEAD}<payoff>"
    assert decode(tokenizer, [*ids[: found.keep], *found.forced]) == (
        f"{HEAD}<payoff>" + steer(TEXT, DEAR).forced)
    assert len(found.forced) < len(steer(TEXT, DEAR).forced)  # in the tokenizer's own words


def words_after_spaces(texts):
    """A tokenizer of Llama's kind: its spaces are part of the words after them."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])
    alphabet = [*map(chr, range(33, 127)), "▁", "\n"]
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=160, special_tokens=["<unk>"], show_progress=False, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def test_text_before_the_matrix_may_end_within_a_character():
    tokenizer = TOKENIZERS["tags whole"]
    ids = encode_completion(tokenizer, f"<thinking>木😀</thinking><payoff>{matrix()}</payoff>")
    found = plan(tokenizer, ids, DEAR, 1000)
    text = decode(tokenizer, [*ids[: found.keep], *found.forced])
    assert text.startswith("<thinking>木😀</thinking><payoff>{") and "�" not in text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_row_waits_for_the_end_of_its_matrix_not_for_a_mention_of_the_tag(name):
    tokenizer = TOKENIZERS[name]
    head = "<thinking>First the matrix, then </payoff>, and the answer.</thinking>"
    table_VN = stop_table(token_pieces(tokenizer, len(tokenizer)), *splice.MATRIX)
    ids, state = encode_completion(tokenizer, f"{head}<payoff>{matrix()}</payoff><analyze>"), 0
    states = [state := table_VN[i, state] for i in ids]
    waits = states.index(table_VN.shape[1] - 1) + 1
    found = plan(tokenizer, ids[:waits], DEAR, 1000)
    assert found.outcome.steered and decode(tokenizer, ids[: found.keep]).startswith(head)


@pytest.mark.parametrize("text, reason", [
    ("<thinking>x</thinking><payoff>{?}</payoff>", "neither JSON nor a Python dict"),
    ("<payoff>{}</payoff>", "missing"),
    ("no opening tag</payoff>", "no <payoff> block"),
])
def test_what_cannot_be_read_goes_on_unsteered_and_says_why(text, reason):
    tokenizer = TOKENIZERS["tags whole"]
    ids = encode_completion(tokenizer, text)
    found = plan(tokenizer, ids, DEAR, 1000)
    assert (found.keep, found.forced, found.outcome.result) == (len(ids), (), None)
    assert not found.outcome.steered and reason in found.outcome.reason


def test_prices_that_change_nothing_leave_the_row_as_it_is():
    tokenizer = TOKENIZERS["tags whole"]
    ids = encode_completion(tokenizer, TEXT)
    found = plan(tokenizer, ids, SteeringConfig(pricing.read("none"), USAGE), 1000)
    assert (found.keep, found.forced) == (len(ids), ())
    assert found.outcome.reason == splice.UNCHANGED and found.outcome.result.after.key == "VQ_CQ"


def test_a_row_that_the_floor_protects_says_so():
    tokenizer = TOKENIZERS["tags whole"]
    ids = encode_completion(tokenizer, TEXT)
    held = plan(tokenizer, ids, SteeringConfig(DEAR.pricing, USAGE, floor=7.0), 1000).outcome
    assert not held.steered
    assert held.reason == "No cell is left: prices do not act here, and VQ_CQ stands."


def test_a_row_without_room_for_one_sampled_token_goes_on_unsteered():
    tokenizer = TOKENIZERS["tags whole"]
    ids = encode_completion(tokenizer, TEXT)
    fits = plan(tokenizer, ids, DEAR, 1000)
    needed = fits.keep + len(fits.forced) + 1
    assert plan(tokenizer, ids, DEAR, needed).outcome.steered
    tight = plan(tokenizer, ids, DEAR, needed - 1)
    assert (tight.keep, tight.forced) == (len(ids), ())
    assert f"no room: {needed - 1} tokens" in tight.outcome.reason
    assert tight.outcome.result.after.key == "VQ_DA"
