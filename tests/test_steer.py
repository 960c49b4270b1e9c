"""The steer command: what it prints, what it keeps, and how it says what is wrong."""

import dataclasses
import io
import json

import numpy as np
import pytest
import runs
import writer
from rich.console import Console

from gtalign_jax import policies, steer, steer_held_out, steer_questions, steered
from gtalign_jax.data.chat import decode, encode_completion
from gtalign_jax.game.chain import KEYS

QUESTIONS = tuple(f"Which {thing}?" for thing in "abcdefgh")
COMMAND = ["--model=writer", "--pricing=none", "--pricing=per_token:output=100,input=25",
           *(f"--question={text}" for text in QUESTIONS), "--temperature=1", "--seed=3",
           "--max_new_tokens=256"]  # fmt: skip


def player():
    """The writer without attention: on any prompt every second matrix is broken, by the draw."""
    whole = writer.player()
    layers = whole.params.layers
    quiet = layers.replace(o_LNHD=layers.o_LNHD * 0)
    return dataclasses.replace(whole, params=whole.params.replace(layers=quiet))


@pytest.fixture(scope="module")
def found():
    """What --json prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "load_player", lambda *_, **__: player())
        printed = io.StringIO()
        patch.setattr("sys.stdout", printed)
        assert steer.main([*COMMAND, "--json"]) == 0
    return json.loads(printed.getvalue())


@pytest.mark.slow
def test_every_question_is_answered_at_every_price_and_alike_up_to_the_matrix(found):
    assert [one["question"] for one in found["questions"]] == list(QUESTIONS)
    for question in found["questions"]:
        free, dear = question["answers"]
        assert [one["pricing"] for one in (free, dear)] == [
            "none", "per_token(output=100, input=25)"]
        assert free["text"].partition("<payoff>")[0] == dear["text"].partition("<payoff>")[0] != ""
        assert not free["steered"] and free["forced"] == [] and free["reason"]
        if dear["steered"]:
            assert dear["written"] == free["written"] == free["edited"] != dear["edited"]
    assert any(question["answers"][1]["steered"] for question in found["questions"])


@pytest.mark.slow
def test_what_was_forced_is_where_it_is_said_to_be(found):
    tokenizer = writer.player().tokenizer
    for one in (a for question in found["questions"] for a in question["answers"] if a["steered"]):
        (first, end), = one["forced"]
        ids = encode_completion(tokenizer, one["text"])
        assert one["tokens"] == len(ids) + one["stopped"]  # the stop token is no text
        forced = decode(tokenizer, ids[first:end])
        assert forced.endswith(f"<analyze>{one['decision']['key']} is best.</analyze><response>")
        assert json.loads(forced.partition("</payoff>")[0].lstrip(">")) == one["edited"]


def shown(found, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    steer_questions.show(console, found)
    return console.file.getvalue()


def document(*names: str, **changed) -> dict:
    """One question at prices of these names."""
    written = {key: {"LLM": 4, "user": 3} for key in KEYS}
    decision = {"key": "VQ_DA", "pareto": ["VQ_DA"], "reasons": ["It is the only candidate."]}
    answers = [
        {"pricing": name, "written": written, "before": {**decision, "key": "VQ_AQ"},
         "edited": written | {"VQ_CQ": {"LLM": -4.3, "user": -126.2}}, "decision": decision,
         "text": "<thinking>", "response": "A banana is yellow.", "tokens": 55, "forced": [[7, 46]],
         "response_tokens": 12, "stopped": True, "steered": True, "reason": None, **changed}
        for name in names
    ]
    return {"model": "demo", "questions": [{"question": "Why\x07?", "answers": answers}],
            "usage": {"input": [37, 87, 50], "output": [52, 100, 70], "requests": [1, 2, 1.5]}}


@pytest.mark.parametrize("width,tables", [(160, 1), (80, 1), (60, 2), (20, 2)])
def test_columns_stand_side_by_side_where_there_is_room(width, tables):
    text = shown(document("subscription", "per_token(output=100)"), width)
    assert max(map(len, text.splitlines())) <= width
    assert sum(line[1:6] == "VQ_DA" for line in text.splitlines()) == tables
    if width == 160:
        assert "-4.3'/-126.2'" in text and "VQ_DA instead of VQ_AQ" in text
        assert "tokens 7 to 45" in text and "55, of them 12 in the answer" in text


def test_an_answer_without_a_matrix_or_a_response_says_so():
    found = document("none", response=None, steered=False, forced=[], reason="no matrix",
                     stopped=False)
    for key in ("written", "edited", "before", "decision"):
        del found["questions"][0]["answers"][0][key]
    text = shown(found, 120)
    assert "nothing: no matrix" in text and "(no response block) <thinking>" in text
    assert "cut off at the limit" in text and "VQ_DA" not in text


def test_a_price_that_no_matrix_can_hold_leaves_its_column_empty():
    found = document("none", "given(user_request=-1e+06)")
    dear = found["questions"][0]["answers"][1]
    for key in ("written", "edited", "before", "decision"):
        del dear[key]
    dear.update(steered=False, reason="a repriced payoff is beyond 1e6")
    text = shown(found, 160)
    row = next(line for line in text.splitlines() if line[1:6] == "VQ_AQ")
    assert row.count("4 /") == 2 and row.rstrip().endswith("–")
    assert "nothing: a repriced payoff is beyond 1e6" in text


def test_the_matrix_shows_what_changed_what_is_pareto_and_what_was_chosen():
    matrix = {key: {"LLM": 2, "user": 1} for key in KEYS}
    edited = matrix | {"VQ_CQ": {"LLM": 2, "user": -0.5}}
    decision = {"key": "VQ_CQ", "pareto": ["VQ_CQ"]}
    cell = lambda *a: " ".join(steer_questions._cell(*a).plain.split())  # noqa: E731
    assert cell(edited, decision, "VQ_CQ", matrix) == "2 / -0.5'*<"
    assert cell(edited, decision, "VQ_DA", matrix) == "2 / 1"
    assert cell(matrix, decision, "VQ_CQ") == "2 / 1 *<"


def test_what_a_model_writes_cannot_command_the_terminal():
    text = shown(document("none", response="a\x1b[2Jb\nc [bold]d[/bold]\u202e"), 120)
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "a�[2Jb" in text and "[bold]d[/bold]" in text


def test_stretches_of_forced_tokens_are_found():
    assert steered.spans(np.array([0, 1, 1, 0, 1], bool)) == [[1, 3], [4, 5]]
    assert steered.spans(np.zeros(3, bool)) == []


def test_a_sweep_is_one_pricing_for_each_number():
    assert steer._sweep("per_token:input=2,output=0,10,1e2") == [
        "per_token:input=2,output=0", "per_token:input=2,output=10", "per_token:input=2,output=1e2"]
    args = steer._arguments(["--model=x", "--held_out=3", "--pricing=subscription",
                             "--sweep=per_request:price=0,1", "--sensitivity=3,5", "--floor=2"])
    configs = steer._configs(args)
    assert [config.pricing.name for config in configs] == [
        "subscription", "per_request(price=0)", "per_request(price=1)"]
    assert {config.sensitivity for config in configs} == {(3.0, 5.0)} and len(args.swept) == 2


@pytest.mark.parametrize("flags,message", [
    ([], "--question=TEXT"),
    (["--question=a", "--held_out=3"], "--question=TEXT"),
    (["--question=a"], "--pricing: none given"),
    (["--question=a", "--pricing=none", "--pricing=none"], "each once"),
    (["--question=a", "--pricing=weekly"], "--pricing=weekly: pricing policy 'weekly' is unknown"),
    (["--question=a", "--pricing=none", "--sweep=per_token:output=1"], "--sweep, --out"),
    (["--held_out=3", "--sweep=per_token"], "--sweep=per_token: allowed"),
    (["--held_out=3", "--sweep=per_token:output=1,x"], "--sweep=per_token:output=x: "),
    (["--held_out=-1"], "--held_out=-1: must be >= 0"),
    (["--held_out=2", "--pricing=none", "--samples=0"], "--samples=0: must be >= 1"),
    (["--held_out=2", "--pricing=none", "--samples=2"], "--samples=2 at --temperature=0: "),
    (["--question=a", "--pricing=none", "--sensitivity=1"], "--sensitivity=1: allowed: two"),
    (["--question=a", "--pricing=none", "--sensitivity=1,-2"], "sensitivity of user is -2"),
    (["--question=a", "--pricing=none", "--rule=best"], "rule is 'best'; allowed are"),
    (["--question=a", "--pricing=none", "--mode=all"], "mode is 'all'; allowed are"),
    (["--question=a", "--pricing=none", "--usage={"], "--usage={: "),
    (["--question=a", "--pricing=none", "--usage={}"], "usage has no \"input\""),
    (["--question=a", "--pricing=none", "--temperature=-1"], "temperature"),
    (["--question=a", "--pricing=none", "--instruction=loud"], "instruction='loud'; allowed"),
    (["--question=a", "--pricing=none"], "--model='./nowhere': there is no such directory"),
])  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(flags, message, capsys):
    assert steer.main(["--model=./nowhere", *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert message in said.err


def test_a_model_whose_use_was_not_measured_needs_it_told(monkeypatch, capsys):
    unknown = dataclasses.replace(writer.player(), usage=None)
    monkeypatch.setattr(policies, "load_player", lambda *_, **__: unknown)
    assert steer.main(COMMAND) == 2
    assert "was not measured" in capsys.readouterr().err


@pytest.mark.slow
def test_held_out_prompts_give_tables_that_a_plain_loop_over_the_completions_confirms(
    tmp_path, monkeypatch, capsys
):
    run = runs.config(tmp_path, data__max_prompt_tokens=2048)
    monkeypatch.setattr(policies, "load_player", lambda *_, **__: player())
    monkeypatch.setattr(steer_held_out, "_settings", lambda *_: run)
    out = tmp_path / "out"
    assert steer.main([
        "--model=writer", "--pricing=subscription", "--sweep=per_token:output=1,100",
        "--held_out=6", "--temperature=1", "--max_new_tokens=256", "--batch_size=9",
        f"--out={out}",
    ]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "writer: 6 held-out prompts" in said and "cell chosen: CQ" in said
    names = ["subscription", "per_token(output=1)", "per_token(output=100)"]
    rows = runs.rows(out, "steering.jsonl")
    assert [row["pricing"] for row in rows] == [name for name in names for _ in range(6)]
    assert [row["id"] for row in rows[:6]] == [row["id"] for row in rows[6:12]]
    found = json.loads((out / "steering.json").read_text())
    for name in names:
        mine = [row for row in rows if row["pricing"] == name]
        means = found["estimates"][name]["overall"]
        assert means["asks_back"]["value"] == sum(row["asks_back"] for row in mine) / 6
        chosen = [row["action"] == "CQ" for row in mine if row["action"] is not None]
        assert means["chooses_CQ"]["value"] == pytest.approx(sum(chosen) / len(chosen))
        assert means["tokens"]["value"] == pytest.approx(sum(row["tokens"] for row in mine) / 6)
        assert means["drawn_tokens"]["value"] <= means["tokens"]["value"]
    assert {row["action"] for row in rows[:6]} - {None} == {"CQ"}
    assert {row["action"] for row in rows[12:]} - {None} == {"DA"}  # the writer's tokens are dear
    for name in ("steering.md", "steering.csv", "steering.png"):
        assert (out / name).stat().st_size > 500


def test_a_model_without_known_held_out_prompts_is_named(monkeypatch):
    policy = policies.Policy("org/name", runs.config("x"), "x")
    monkeypatch.setattr(policies, "find", lambda *_: policy)
    builtin = dataclasses.replace(writer.player(), instruction="brief")
    assert steer_held_out._settings("org/name", builtin, 600).data.test_size == 600
    with pytest.raises(ValueError, match="no held-out prompts are known for --model=org/name"):
        steer_held_out._settings("org/name", writer.player(), 3)


def test_held_out_prompts_of_a_run_are_asked_as_it_was_taught(monkeypatch):
    policy = policies.Policy("run", runs.config("x"), "x", run="x")
    monkeypatch.setattr(policies, "find", lambda *_: policy)
    monkeypatch.setattr(steer_held_out, "load_run_config", lambda _: runs.config("x"))
    taught = dataclasses.replace(writer.player(), instruction="brief")
    assert steer_held_out._settings("x", taught, 3).data.source == "builtin"
    other = dataclasses.replace(taught, instruction="ours")
    with pytest.raises(ValueError, match="--instruction=ours: held-out .* allowed .* is 'brief'"):
        steer_held_out._settings("x", other, 3)
