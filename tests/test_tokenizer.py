"""Small tokenizers: exact round trip, cheap chains; sentencepiece directories load too."""

import json
import shutil
from pathlib import Path

import pytest

from gtalign_jax.data import builtin, chat, coldstart, tokenizer

HOSTILE = "ü 日本 👩‍👩‍👧 \u00a0 a  b\n\n\n c\r\n\t'don't' \"x\": {1.5} <|x|> e\u0301 \x00 </think>"


@pytest.fixture(scope="module")
def examples():
    return coldstart.cold_start_examples(builtin.generate("train", 2000, seed=0), seed=0)


@pytest.fixture(scope="module")
def saved(examples, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train_tokenizer(tokenizer.chain_corpus(examples), 900, path)
    return path


@pytest.fixture(scope="module")
def loaded(saved):
    return chat.load_tokenizer(saved)


def test_a_chain_takes_few_tokens(loaded, examples):
    lengths = [len(chat.encode_completion(loaded, text)) + 1 for _, text in examples]
    prompts = [len(chat.encode_chat(loaded, p.messages)) for p, _ in examples]
    assert sum(lengths) / len(lengths) <= 60
    assert max(lengths) <= 96
    assert max(prompts) <= 48


def test_tags_are_one_ordinary_token_and_survive_decoding(loaded):
    for tag in tokenizer.TAGS:
        assert len(loaded.tokenize(tag)) == 1
        ids = chat.encode_completion(loaded, tag)
        assert loaded.decode(ids, skip_special_tokens=True) == tag


def test_digits_are_split_and_json_between_numbers_is_one_token(loaded):
    assert loaded.tokenize("1234") == ["1", "2", "3", "4"]
    assert loaded.tokenize('{"VQ_DA":{"LLM":3,"user":12},"VQ_CQ":{"LLM":') == [
        '{"VQ_DA":{"LLM":', "3", ',"user":', "1", "2", '},"VQ_CQ":{"LLM":',
    ]  # fmt: skip


@pytest.mark.parametrize("chain_pieces", [True, False])
def test_every_text_survives_encoding_and_decoding(examples, chain_pieces):
    small = tokenizer.train_tokenizer(
        tokenizer.chain_corpus(examples[:200]), 500, chain_pieces=chain_pieces
    )
    for text in [HOSTILE, " ", "", *(text for _, text in examples[:50])]:
        assert chat.decode(small, chat.encode_completion(small, text)) == text


def test_pad_and_eos_differ_and_special_tokens_are_single(loaded):
    assert loaded.pad_token_id != loaded.eos_token_id
    for token in (tokenizer.PAD, tokenizer.START, tokenizer.END):
        assert len(loaded.tokenize(token)) == 1
    assert chat.stop_ids(loaded) == (loaded.eos_token_id,)


def test_the_vocabulary_keeps_to_its_bound(examples):
    texts = tokenizer.chain_corpus(examples[:300])
    for size in (300, 500, 900):
        for chain_pieces in (True, False):
            made = tokenizer.train_tokenizer(texts, size, chain_pieces=chain_pieces)
            assert len(made) <= size
            assert max(made.get_vocab().values()) == len(made) - 1
    with pytest.raises(ValueError, match="larger than 267"):
        tokenizer.train_tokenizer(texts, 267)


def test_training_is_deterministic(examples, loaded):
    again = tokenizer.train_tokenizer(tokenizer.chain_corpus(examples), 900)
    assert again.get_vocab() == loaded.get_vocab()


def test_a_kill_in_the_middle_of_saving_leaves_no_tokenizer_that_a_run_would_trust(
    tmp_path, monkeypatch
):
    def killed(self, folder):
        (Path(folder) / "tokenizer.json").write_text('{"version": "1.')
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer.PreTrainedTokenizerFast, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.train_tokenizer(["a"], 300, tmp_path / "tokenizer")
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("family", "chain_pieces"),
    [("qwen3", True), ("llama", True), ("qwen2", False), ("qwen3", False), ("llama", False)],
)
def test_ids_are_the_same_beside_a_model_config(examples, tmp_path, family, chain_pieces):
    # transformers picks another class beside some config.json, with its own way to cut words.
    tokenizer.train_tokenizer(
        tokenizer.chain_corpus(examples[:300]), 600, tmp_path / "alone", chain_pieces=chain_pieces
    )
    beside = shutil.copytree(tmp_path / "alone", tmp_path / "model")
    (beside / "config.json").write_text(json.dumps({"model_type": family}))
    left, right = chat.load_tokenizer(tmp_path / "alone"), chat.load_tokenizer(beside)
    for prompt, text in examples[:100]:
        assert chat.encode_completion(left, text) == chat.encode_completion(right, text)
        assert chat.encode_chat(left, prompt.messages) == chat.encode_chat(right, prompt.messages)
    assert chat.stop_ids(left) == chat.stop_ids(right)


SPM_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def sentencepiece_dir(examples, tmp_path_factory):
    """A Llama-2-style directory: tokenizer.model and tokenizer_config.json, no tokenizer.json."""
    import sentencepiece

    path = tmp_path_factory.mktemp("spm")
    texts = [text for pair in examples[:400] for text in (pair[0].question, pair[1])]
    (path / "corpus.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"), model_prefix=str(path / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, split_digits=True, minloglevel=2,
    )  # fmt: skip
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "chat_template": SPM_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_sentencepiece_directory_loads_with_exactly_one_bos(sentencepiece_dir, examples):
    spm = chat.load_tokenizer(sentencepiece_dir)
    assert spm("a b").input_ids[0] == spm.bos_token_id
    for template in (SPM_TEMPLATE, SPM_TEMPLATE.removeprefix("{{ bos_token }}")):
        spm.chat_template = template
        for prompt, _ in examples[:20]:
            ids = chat.encode_chat(spm, prompt.messages)
            assert ids[0] == spm.bos_token_id
            assert ids.count(spm.bos_token_id) == 1


def test_a_sentencepiece_completion_decodes_to_itself(sentencepiece_dir, examples):
    spm = chat.load_tokenizer(sentencepiece_dir)
    for _, text in examples[:50]:
        assert chat.decode(spm, chat.encode_completion(spm, text)) == text
    assert chat.stop_ids(spm) == (spm.eos_token_id,)
