"""Chats become ids with the template applied once and one BOS; stop ids; decoding."""

import pytest

from gtalign_jax.data import chat, tokenizer

TURNS = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why 12?"})
BOS_TEMPLATE = "{{ bos_token }}" + tokenizer.CHAT_TEMPLATE


@pytest.fixture
def small():
    return tokenizer.train_tokenizer(["Why 12? Be brief. " * 3], 300)


@pytest.fixture
def with_bos(small):
    """A tokenizer that writes <s> before plain text, as Llama's do."""
    from tokenizers.processors import TemplateProcessing

    small.add_special_tokens({"bos_token": "<s>"})
    small.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", small.bos_token_id)]
    )
    return small


def test_ids_are_those_of_the_template_applied_once(small):
    golden = small.apply_chat_template(list(TURNS), add_generation_prompt=True, return_dict=False)
    ids = chat.encode_chat(small, TURNS)
    assert ids == golden
    text = small.decode(ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhy 12?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_many_chats_encode_as_each_one(small):
    chats = [TURNS, TURNS[1:]]
    assert chat.encode_chats(small, chats) == [chat.encode_chat(small, c) for c in chats]
    assert chat.encode_chats(small, []) == []


def test_what_a_template_asks_for_is_given_to_it(small):
    small.chat_template += "{% if enable_thinking is false %}<think></think>{% endif %}"
    quiet = {"enable_thinking": False}
    text = chat.render_chat(small, TURNS, quiet)
    assert text == chat.render_chat(small, TURNS) + "<think></think>"
    assert small.decode(chat.encode_chats(small, [TURNS], quiet)[0]) == text


def test_a_string_prompt_raises(small):
    with pytest.raises(TypeError, match="exactly once"):
        chat.encode_chat(small, "<|im_start|>user\nWhy?<|im_end|>\n")


def test_a_tokenizer_without_template_is_an_error_naming_it(small):
    small.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        chat.encode_chat(small, TURNS)


@pytest.mark.parametrize("template", [tokenizer.CHAT_TEMPLATE, BOS_TEMPLATE])
def test_there_is_exactly_one_bos_whoever_writes_it(with_bos, template):
    with_bos.chat_template = template
    ids = chat.encode_chat(with_bos, TURNS)
    assert ids[0] == with_bos.bos_token_id
    assert ids.count(with_bos.bos_token_id) == 1


def test_a_template_that_writes_two_bos_is_an_error(with_bos):
    with_bos.chat_template = "{{ bos_token }}" + BOS_TEMPLATE
    with pytest.raises(ValueError, match="writes the BOS token twice"):
        chat.encode_chat(with_bos, TURNS)


def test_no_bos_is_invented_for_a_tokenizer_that_uses_none(small):
    assert small.bos_token_id is None
    assert chat.encode_chat(small, TURNS)[0] == small.convert_tokens_to_ids("<|im_start|>")


def test_completions_get_neither_bos_nor_eos(with_bos):
    ids = chat.encode_completion(with_bos, "Why?")
    assert not set(ids) & {with_bos.bos_token_id, with_bos.eos_token_id}
    assert chat.decode(with_bos, ids) == "Why?"


def test_stop_ids_are_all_eos_ids_and_the_end_of_a_turn(small):
    end = small.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids(small, None) == (end,)
    assert chat.stop_ids(small, {}) == (end,)
    assert chat.stop_ids(small, {"eos_token_id": 77}) == tuple(sorted({end, 77}))
    assert chat.stop_ids(small, {"eos_token_id": [77, end, 5]}) == tuple(sorted({5, end, 77}))


def test_a_base_model_also_stops_where_its_template_ends_a_turn(small):
    # Qwen's base models name <|endoftext|> as EOS, while their template closes with <|im_end|>.
    end = small.convert_tokens_to_ids("<|im_end|>")
    small.add_special_tokens({"eos_token": "<|endoftext|>"})
    assert small.eos_token_id != end
    assert set(chat.stop_ids(small)) == {end, small.eos_token_id}


def test_a_tokenizer_that_never_stops_is_an_error(small):
    small.eos_token = None
    small.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ValueError, match="a completion could never end"):
        chat.stop_ids(small)


def test_decoding_drops_special_tokens_and_keeps_tags_and_spaces(small):
    text = "<thinking> a , b .</thinking>  <payoff>{}</payoff> do n't"
    ids = [*chat.encode_completion(small, text), small.eos_token_id, small.pad_token_id]
    assert chat.decode(small, ids) == text
