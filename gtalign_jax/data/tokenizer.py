"""Trains small byte-level BPE tokenizers and saves them as Hugging Face directories.

For the demo, whose model starts from nothing, and for tests that need a tokenizer but no download.
Text is cut before the merges are learnt, so that the reasoning chain is cheap:

    tags        one token each, ordinary ones: `decode(skip_special_tokens=True)` keeps them
    numbers     digit by digit
    JSON keys   whatever stands between two numbers of a payoff matrix may become one token
    words       with the space before them

Every byte has a token, so that encoding followed by decoding returns any text unchanged.
Knows nothing of tasks.
"""

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gtalign_jax.data.prompt import Prompt

PAD, END, START = "<|pad|>", "<|im_end|>", "<|im_start|>"
MAIN_FILE = "tokenizer.json"
BYTES = 256
TAGS = tuple(
    f"<{slash}{name}>"
    for name in ("thinking", "payoff", "analyze", "response")
    for slash in ("", "/")
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# First match wins, from left to right; whatever no alternative matches is cut out as it is.
CHAIN_PIECES = (
    r'[{}, ]*(?:"[A-Za-z_]+": ?\{?)+'  # {"VQ_DA":{"LLM":
    r"|[{}]+"
    r"| ?[VD]Q_(?:DA|CQ|AQ)"
    r"|(?:system|user|assistant)\n"
)
WORD_PIECES = (
    r" ?\d"
    r"|'(?:s|t|re|ve|m|ll|d)\b"
    r"| ?\p{L}+"
    r"| ?[^\s\p{L}\d]+"
    r"|\s+(?!\S)"
    r"|\s"
)
# The cut that transformers' Qwen2Tokenizer always makes, whatever tokenizer.json says: beside a
# Qwen2 config.json only a tokenizer with this very cut gives the same ids through AutoTokenizer.
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out_dir: str | os.PathLike | None = None,
    *,
    chain_pieces: bool = True,
) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE vocabulary from texts.

    Args:
      texts: what to learn from; rendered chats or bare text.
      vocab_size: an upper bound on the number of tokens, the 256 bytes included. Fewer are made
        where the texts do not hold so many repeated pieces.
      out_dir: where the tokenizer is saved, loadable by `AutoTokenizer`; None: nowhere.
      chain_pieces: keep tags and JSON keys whole (see the module). Save such a tokenizer beside a
        Qwen3 or Llama model, not a Qwen2 one (see QWEN2_PIECES). Without it: plain word pieces,
        fit for all of them.

    Returns:
      The tokenizer, with a ChatML template, `<|im_end|>` as EOS and a pad token of its own.

    Raises:
      ValueError: vocab_size leaves no room beyond bytes, specials and tags.
    """
    specials = [PAD, START, END]
    floor = BYTES + len(specials) + (len(TAGS) if chain_pieces else 0)
    if vocab_size <= floor:
        raise ValueError(f"vocab_size is {vocab_size}; it must be larger than {floor}")
    tokenizer = Tokenizer(models.BPE())
    pieces = f"{CHAIN_PIECES}|{WORD_PIECES}" if chain_pieces else QWEN2_PIECES
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tags = [AddedToken(tag, normalized=False) for tag in TAGS] if chain_pieces else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # What becomes an added token is cut out first, so that no merge is spent on it.
    whole = re.compile("|".join(map(re.escape, (*specials, *(t.content for t in tags)))))
    tokenizer.train_from_iterator((p for text in texts for p in whole.split(text)), trainer)
    tokenizer.add_tokens(tags)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    if out_dir is not None:
        _save(fast, Path(out_dir))
    return fast


def _save(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Each file renamed when complete, tokenizer.json last: where that is, all of it is whole."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as partial:
        tokenizer.save_pretrained(partial)
        for file in sorted(Path(partial).iterdir(), key=lambda f: f.name == MAIN_FILE):
            os.replace(file, out / file.name)


def chain_corpus(examples: Iterable[tuple[Prompt, str]]) -> list[str]:
    """The texts of (prompt, completion) examples as `train_tokenizer` should see them."""
    corpus = []
    for prompt, completion in examples:
        turns = "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in prompt.messages)
        corpus.append(f"{turns}{START}assistant\n{completion}{END}")
    return corpus
