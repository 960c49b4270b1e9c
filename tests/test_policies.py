"""A policy, named on a command line, ready to answer: the same from a run and from its export."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_export import make_run

from gtalign_jax import export, policies
from gtalign_jax.data.chat import decode, encode_chat, load_tokenizer
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler

MESSAGES = ({"role": "user", "content": "What is the tide?"},)
MOVES = (("answer", 10), ("answer", 20), ("ask", 30), ("answer_ask", 40))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two cold-start checkpoints and two evaluations, of which the last one counts."""
    workdir = tmp_path_factory.mktemp("players") / "tiny"
    make_run(workdir, "qwen3", True, ("sft", 1), ("sft", 2))
    rows = [
        {"label": label, "id": str(i), "data_source": "builtin-ambiguity", "sample": 0,
         "prompt": list(MESSAGES), "valid": True, "response_kind": kind, "tokens": tokens + grown,
         "reasoning_tokens": tokens + grown - 1, "response_tokens": 1}
        for label, grown in (("before", 0), ("after", 100))
        for i, (kind, tokens) in enumerate(MOVES)
    ]
    (workdir / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "hf"
    assert export.main(["--workdir", str(trained), "--out", str(out)]) == 0
    return out


def one() -> list:
    return jax.devices()[:1]


def test_an_export_is_the_same_player_as_the_run_but_for_its_name(trained, exported):
    ours, theirs = (policies.load_player(str(where), devices=one())
                    for where in (trained, exported))
    assert ours.name == "tiny sft step 2" and theirs.name.endswith("/hf")
    assert ours.layout is None and ours.instruction == "brief"
    for field in ("stop_ids", "layout", "instruction", "usage"):
        assert getattr(ours, field) == getattr(theirs, field), field
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    # What a Hugging Face config does not know concerns fresh weights alone.
    same = {"init_scale": ours.model.init_scale}
    assert ours.model == dataclasses.replace(theirs.model, **same)
    ids = [encode_chat(player.tokenizer, MESSAGES) for player in (ours, theirs)]
    assert ids[0] == ids[1]
    assert decode(ours.tokenizer, ids[0]) == decode(theirs.tokenizer, ids[0])


def test_usage_is_that_of_the_last_evaluation(trained):
    player = policies.load_player(str(trained), devices=one())
    assert player.usage.output[0] == 115  # the mean of 110 and 120; the first label had 15
    assert player.usage.output[1] == 130 + 115  # a question, then an answer
    assert player.usage.input[0] == len(encode_chat(player.tokenizer, MESSAGES))
    assert player.usage.requests[:2] == (1, 2)


def test_rows_that_lack_what_is_measured_leave_the_usage_unknown(trained, tmp_path, caplog):
    rows = [json.loads(x) for x in (trained / "evaluations.jsonl").read_text().splitlines()]
    old = [{k: v for k, v in row.items() if k != "response_tokens"} for row in rows]
    for kept in (old, [row for row in rows if row["response_kind"] == "answer"]):
        (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        assert export.measure_usage(tmp_path, load_tokenizer(trained / "tokenizer")) is None
    assert "'response_tokens'" in caplog.text and "no row of response_kind 'ask'" in caplog.text


def test_a_checkpoint_can_be_named_and_asked_in_another_way(trained):
    first = policies.load_player(f"{trained}/checkpoints/sft/1", instruction="none", devices=one())
    last = policies.load_player(str(trained), devices=one())
    assert first.name == "tiny sft step 1" and first.instruction == "none"
    assert np.abs(first.params.embed_VD - last.params.embed_VD).max() > 0


@pytest.mark.slow
def test_several_devices_share_the_work_and_draw_the_same_tokens(trained):
    alone, shared = (policies.load_player(str(trained), devices=devices)
                     for devices in (one(), None))
    assert shared.layout.axis_size("prompts") == 8
    ids = encode_chat(alone.tokenizer, MESSAGES)
    tokens_QS, lengths_Q = jnp.tile(jnp.array(ids), (8, 1)), jnp.full(8, len(ids))
    drawn = []
    for player in (alone, shared):
        sampler = make_sampler(
            player.model, SamplerConfig(max_new_tokens=6), 2, player.stop_ids, player.layout
        )
        rollout = sampler(player.params, tokens_QS, lengths_Q, jnp.arange(8), jax.random.key(0))
        drawn.append(np.asarray(rollout.tokens_QGT))
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("heads,tensor", [((4, 2, 48, 320), 2), ((8, 8, 48, 320), 8),
                                          ((4, 2, 48, 313), 1)])
def test_weights_are_cut_over_as_many_devices_as_divide_them_all(heads, tensor):
    model = dataclasses.replace(
        tiny.CFG, num_heads=heads[0], num_kv_heads=heads[1], d_ff=heads[2], vocab_size=heads[3],
        vocab_multiple=1,
    )
    layout = policies._layout(model, "auto", None)
    assert layout.axis_size("heads") == tensor and layout.axis_size("prompts") == 8 // tensor


def test_weights_are_in_the_dtype_to_compute_in(exported):
    player = policies.load_player(str(exported), dtype="bfloat16", devices=one())
    assert {w.dtype for w in jax.tree.leaves(player.params)} == {jnp.dtype("bfloat16")}
    whole = policies.load_player(str(exported), devices=one())
    assert {w.dtype for w in jax.tree.leaves(whole.params)} == {jnp.dtype("float32")}


def test_a_model_that_is_not_of_ours_is_asked_with_the_whole_instruction(exported, tmp_path):
    other = shutil.copytree(exported, tmp_path / "other")
    (other / "gtalign.json").unlink()
    player = policies.load_player(str(other), devices=one())
    assert player.instruction == "ours" and player.usage is None


@pytest.mark.parametrize("about,message", [
    ({"instruction": "loud", "usage": None}, "instruction='loud'; allowed: ours"),
    ({"usage": None}, "instruction=None; allowed: ours"),
    ({"instruction": ["brief"], "usage": None}, "instruction=['brief']; allowed: ours"),
    ({"instruction": "brief", "usage": {"input": [1, 2, 3]}}, "usage has no \"output\""),
    ({"instruction": "brief", "usage": {"input": [1, 2, 3], "output": [1, 2, -1],
                                        "requests": [1, 2, 1]}}, "usage.output.AQ is -1"),
])
def test_a_wrong_description_beside_a_model_is_named(tmp_path, about, message):
    (tmp_path / "gtalign.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"gtalign\.json: ") as raised:
        export.read_about(tmp_path)
    assert message in str(raised.value)


@pytest.mark.parametrize("what,options,message", [
    ("", {}, "--model is empty; allowed"),
    ("./nowhere", {}, "--model='./nowhere': there is no such directory"),
    ("x", {"instruction": "loud"}, "instruction='loud'; allowed"),
    ("x", {"dtype": "int8"}, "model.compute_dtype='int8'"),
])
def test_mistakes_are_named_before_anything_is_loaded(what, options, message):
    with pytest.raises(ValueError) as raised:
        policies.load_player(what, **options)
    assert message in str(raised.value)
