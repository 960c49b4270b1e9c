"""A player that writes chains with a matrix, though nobody has trained it.

Its head says which token may follow which, so that every completion has its blocks in order. Among
the words that may follow it draws, with probabilities that depend, through attention, on all that
stands before: a cache that is wrong draws other words. One matrix in two or three cannot be read.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from transformers import PreTrainedTokenizerFast

from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.game.pricing import Usage
from gtalign_jax.model.spec import is_spec, param_specs
from gtalign_jax.rollout.player import Player
from gtalign_jax.rollout.slots import SlotsConfig
from gtalign_jax.serving.batch import Batch

CELLS = (
    '{"VQ_DA":{"LLM":2,"user":2},', '"VQ_CQ":{"LLM":3,"user":3},', '"VQ_AQ":{"LLM":1,"user":1},',
    '"DQ_DA":{"LLM":0,"user":1},', '"DQ_CQ":{"LLM":0,"user":0},', '"DQ_AQ":{"LLM":1,"user":0}}',
)
BROKEN = '{"VQ_DA":{"LLM":?},'
THOUGHTS = (" vague", " open", " dark", " grün")
WORDS = (" red", " blue", " 10", " 😀", "木", " so", " it")
ANALYSIS = "VQ_CQ is best."
# A question costs a second turn: dear tokens turn the choice from CQ to DA.
USAGE = Usage((100.0, 230.0, 100.0), (60.0, 130.0, 90.0))
CONFIG = SlotsConfig(slots=3, prompt_tokens=24, new_tokens=128, burst=4)


def follows() -> dict[str, tuple[str, ...]]:
    """What may come after each piece."""
    after = dict(zip(CELLS, [(cell,) for cell in CELLS[1:]] + [("</payoff>",)], strict=True))
    after |= {thought: (*THOUGHTS, "</thinking>") for thought in THOUGHTS}
    after |= {word: (*WORDS, "</response>", "</response>") for word in WORDS}
    return after | {
        "<thinking>": THOUGHTS, "</thinking>": ("<payoff>",), "<payoff>": (CELLS[0], BROKEN),
        BROKEN: (CELLS[1],), "</payoff>": ("<analyze>",), "<analyze>": (ANALYSIS,),
        ANALYSIS: ("</analyze>",), "</analyze>": ("<response>",), "<response>": WORDS,
        "</response>": ("<|im_end|>",),
    }


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer(["a b"], 270)
    # Not WORDS: written as bytes, their characters come in pieces.
    made.add_tokens([*CELLS, BROKEN, *THOUGHTS, ANALYSIS])
    # So that an edited matrix is tens of tokens, not hundreds.
    made.add_tokens([cell.partition(":{")[0] + ':{"LLM":' for cell in CELLS] + [',"user":'])
    made.add_tokens([word for word in WORDS if word.isascii()])
    return made


@functools.cache
def player() -> Player:
    ids = lambda text: tokenizer()(text, add_special_tokens=False).input_ids  # noqa: E731
    V = len(tokenizer())
    cfg = dataclasses.replace(tiny.CFG, vocab_size=V, d_model=V, vocab_multiple=1,
                              tie_embeddings=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(  # by numpy: JAX would compile a program for each shape
        lambda spec: np.ones(spec.shape, np.float32) if spec.init == "ones"
        else (0.1 * rng.normal(size=spec.shape)).astype(np.float32),
        param_specs(cfg), is_leaf=is_spec,
    )
    # Quiet enough that attention never overrules what may follow.
    layers = params.layers.replace(o_LNHD=params.layers.o_LNHD * 0.02,
                                   down_LFD=params.layers.down_LFD * 0)
    bonus_DV = np.zeros((V, V), np.float32)
    bonus_DV[:, ids("<thinking>")[0]] = 1  # after whatever the prompt ends with
    for piece, nexts in follows().items():
        before = ids(piece)
        for a, b in zip(before, before[1:], strict=False):
            bonus_DV[a] = np.eye(V)[b]
        bonus_DV[before[-1]] = sum(np.eye(V)[ids(text)[0]] for text in nexts)
    params = params.replace(embed_VD=np.eye(V, dtype=np.float32), layers=layers,
                            head_VD=params.head_VD / 2 + 3 * bonus_DV.T.clip(0, 1))
    return Player("writer", cfg, jax.tree.map(jnp.asarray, params), tokenizer(),
                  tuple(ids("<|im_end|>")), None, "none", USAGE)


@functools.cache
def batch() -> Batch:
    """Slots that are ready; one for all tests, since its programs take seconds to compile."""
    made = Batch(player(), CONFIG)
    made.warm_up()
    return made
