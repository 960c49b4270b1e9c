"""The built-in tasks: deterministic, disjoint splits, answers that are true."""

import collections
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gtalign_jax.data import builtin


def _by_source(prompts):
    groups = {}
    for prompt in prompts:
        groups.setdefault(prompt.data_source, []).append(prompt)
    return groups


@pytest.fixture(scope="module")
def train():
    return builtin.generate("train", 4000, seed=3)


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others(train):
    assert builtin.generate("train", 4000, seed=3) == train
    assert builtin.generate("train", 4000, seed=4) != train


def test_the_prompts_of_a_seed_are_the_same_in_every_process(train):
    # Python salts hash() per process: a set's order or a hash() in the split would show here.
    program = (
        "from gtalign_jax.data import builtin; "
        "print([p.question for p in builtin.generate('train', 4000, seed=3)])"
    )
    for salt in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": salt},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == str([p.question for p in train])


def test_train_and_test_share_no_question_whatever_their_seeds(train):
    held_out = builtin.generate("test", 2000, seed=11)
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert {builtin.split_of(p.question) for p in held_out} == {"test"}


def test_every_fact_and_operand_pair_of_the_test_split_is_met_in_training():
    known = _by_source(builtin.generate("train", 12000, seed=0))
    asked = _by_source(builtin.generate("test", 512, seed=0))
    facts = {
        source: {_fact(p) for p in prompts} for source, prompts in known.items()
    }  # fmt: skip
    for source, prompts in asked.items():
        assert {_fact(p) for p in prompts} <= facts[source]


def _fact(prompt):
    """What must be known to answer: the slots without the names that wrap them."""
    if prompt.data_source == "builtin-arithmetic":
        return tuple(re.findall(r"\d+", prompt.question)), prompt.ground_truth
    extra = prompt.extra
    keys = ("topic", "subject", "verb", "occasion", "kind")
    return tuple(extra[key] for key in keys if key in extra)


def test_sources_come_in_their_shares_and_ids_are_unique(train):
    shares = {source: len(group) / len(train) for source, group in _by_source(train).items()}
    assert shares == {
        "builtin-arithmetic": 0.2,
        "builtin-ambiguity": 0.375,
        "builtin-safety": 0.3,
        "builtin-writing": 0.125,
    }
    kinds = collections.Counter(p.extra["kind"] for p in train)
    assert kinds["ambiguous"] == kinds["harmful"] == 800 and kinds["harmless"] == 400
    assert len({p.id for p in train}) == len({p.question for p in train}) == 4000


def test_tens_of_thousands_of_distinct_prompts_can_be_drawn():
    assert len({p.question for p in builtin.generate("train", 24000, seed=0)}) == 24000


def test_asking_for_more_than_the_world_holds_is_an_error_not_an_endless_loop():
    with pytest.raises(ValueError, match="no 800 distinct ambiguous prompts"):
        builtin.generate("test", 4000, seed=0)


def test_arithmetic_ground_truths_are_sums_or_differences(train):
    for prompt in _by_source(train)["builtin-arithmetic"]:
        first, second = map(int, re.findall(r"\d+", prompt.question))
        gains = any(verb in prompt.question for verb in builtin.GAINS)
        result = first + second if gains else first - second
        assert prompt.ground_truth == str(result)
        assert result >= 0


def test_an_ambiguous_question_names_no_subject_and_lists_every_reading(train):
    for prompt in _by_source(train)["builtin-ambiguity"]:
        topic = builtin.TOPICS[prompt.extra["topic"]]
        named = set(re.findall(r"\w+", prompt.question)) & set(builtin.subjects(topic))
        if prompt.extra["kind"] == "ambiguous":
            assert not named
            assert prompt.ground_truth.startswith("multipleQAs###")
            assert prompt.ground_truth.count("; Answer ") == len(topic.facts)
        else:
            assert len(named) == 1
            assert prompt.ground_truth == f"singleAnswer###{topic.facts[prompt.extra['subject']]}"


def test_harm_depends_on_the_deed_and_not_on_the_thing_or_its_owner(train):
    safety = _by_source(train)["builtin-safety"]
    things = {
        truth: {p.extra["object"] for p in safety if p.ground_truth == truth}
        for truth in ("harmful", "unharmful")
    }
    assert things["harmful"] == things["unharmful"] == set(builtin.THINGS)
    for truth, verbs in (("harmful", builtin.HARMS), ("unharmful", tuple(builtin.CARE))):
        owned = [p for p in safety if p.ground_truth == truth and "'s " in p.question]
        assert owned
        assert all(any(verb in p.question for verb in verbs) for p in owned)


def test_prompts_are_a_brief_system_message_and_the_bare_question(train):
    system, user = train[0].messages
    assert system["role"] == "system" and len(system["content"].split()) <= 15
    assert user == {"role": "user", "content": train[0].question}


def test_names_objects_and_answers_do_not_collide():
    for topic in builtin.TOPICS.values():
        assert not set(builtin.subjects(topic)) & set(topic.facts.values())
        assert all(" " not in answer for answer in topic.facts.values())
    assert len(set(builtin.NAMES)) == len(builtin.NAMES)
    assert not set(builtin.CARE) & set(builtin.HARMS)


@pytest.mark.parametrize("split", ["dev", ""])
def test_an_unknown_split_is_an_error_naming_the_allowed_ones(split):
    with pytest.raises(ValueError, match="allowed: train, test"):
        builtin.generate(split, 10, seed=0)


def test_without_reasoning_the_same_prompts_are_bare_questions(train):
    bare = builtin.generate("train", 4000, seed=3, reasoning="none")
    assert bare[0].messages == ({"role": "user", "content": bare[0].question},)
    for one, other in zip(train, bare, strict=True):
        assert dataclasses.replace(one, messages=other.messages) == other
