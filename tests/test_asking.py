"""A user's conversation is put to a policy as its training put it."""

import pytest

from gtalign_jax.data import asking, builtin, sources
from gtalign_jax.data.sources import DataConfig
from gtalign_jax.game import chain

QUESTION = "What sound does it make?"
TURNS = (
    {"role": "user", "content": "A riddle, please."},
    {"role": "assistant", "content": "About what?"},
    {"role": "user", "content": QUESTION},
)


def row(turns) -> dict:
    return {
        "prompt": [{"role": "user", "content": "as the file says it"}],
        "data_source": "ambig_qa", "reward_model": {"ground_truth": "singleAnswer###moo"},
        "extra_info": {"chat_history": list(turns)},
    }


@pytest.mark.parametrize("reasoning", chain.REASONING)
def test_a_built_in_question_is_asked_as_the_generator_asks_it(reasoning):
    prompt = builtin.generate("test", 3, seed=0, reasoning=reasoning)[1]
    instruction = asking.instruction_of(DataConfig(reasoning=reasoning))
    bare = [{"role": "user", "content": prompt.question}]
    assert asking.ask(bare, instruction) == prompt.messages


@pytest.mark.parametrize("reasoning,name", [("tagged", "ours"), ("none", "plain")])
@pytest.mark.parametrize("turns", [TURNS, TURNS[-1:]])
def test_a_conversation_is_asked_as_the_rows_of_files_are(turns, reasoning, name):
    data = DataConfig(source="parquet", instruction="ours", reasoning=reasoning)
    assert asking.instruction_of(data) == name
    kind = "ours" if reasoning == "tagged" else "none"
    prompt = sources.read_prompt(row(turns), "0", kind)
    assert asking.ask(turns, name) == prompt.messages


def test_what_the_caller_tells_the_system_follows_ours_in_the_one_system_message():
    told = {"role": "system", "content": "Answer in French."}
    system, *rest = asking.ask([told, *TURNS], "brief")
    assert system["content"] == f"{chain.BRIEF_INSTRUCTION}\n\nAnswer in French."
    assert rest == list(TURNS)
    assert asking.ask([told, *TURNS], "none") == (told, *TURNS)
    assert asking.ask(TURNS, "none") == TURNS


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"instruction='mine'; allowed: ours, brief, plain, none"):
        asking.ask(TURNS, "mine")
    with pytest.raises(ValueError, match="the last one is from 'assistant'"):
        asking.ask(TURNS[:2], "brief")
    with pytest.raises(ValueError, match="not a list of chat messages"):
        asking.ask([], "brief")
    with pytest.raises(TypeError, match="plain string"):
        asking.ask("Why?", "brief")
