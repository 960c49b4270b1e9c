"""Prompts from files: the schema is kept, what breaks it is reported, never silently dropped."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gtalign_jax.data import builtin, sources
from gtalign_jax.data.sources import DataConfig, load_prompts
from gtalign_jax.game import chain


def row(question="Who?", **changes):
    return {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Four blocks. Question: {question}"},
        ],
        "data_source": "ambig_qa",
        "ability": "qa",
        "reward_model": {"style": "rule", "ground_truth": "singleAnswer###Ada"},
        "extra_info": {"index": 7, "single_turn_prompt": question},
    } | changes


def write_parquet(path, rows):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def write_jsonl(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def jsonl_config(path, **changes):
    return DataConfig(**({"source": "jsonl", "train": (str(path),)} | changes))


def test_parquet_and_jsonl_give_the_same_prompts(tmp_path):
    rows = [row("Who?"), row("When?")]
    parquet = write_parquet(tmp_path / "a" / "train.parquet", rows)
    jsonl = write_jsonl(tmp_path / "a" / "train.jsonl", rows)
    from_parquet = load_prompts(DataConfig(source="parquet", train=(parquet,)), "train")
    from_jsonl = load_prompts(jsonl_config(jsonl), "train")
    assert [p.id for p in from_parquet] == ["0:a/train.parquet:0", "0:a/train.parquet:1"]
    for left, right in zip(from_parquet, from_jsonl, strict=True):
        assert left.messages == right.messages
        assert (left.question, left.ground_truth) == (right.question, right.ground_truth)
    assert from_parquet[1].question == "When?"
    assert from_parquet[1].ground_truth == "singleAnswer###Ada"
    assert from_parquet[1].messages[1]["content"] == "Four blocks. Question: When?"
    assert from_parquet[1].extra == {"index": 7}


def test_a_held_out_prompt_is_called_the_same_whatever_files_stand_before_its_own(tmp_path):
    """Two evaluations are matched by id; only files of one name have to be numbered."""
    names = [write_jsonl(tmp_path / f"{n}.jsonl", [row("Who?")]) for n in ("a", "b")]
    (tmp_path / "x" / tmp_path.name).mkdir(parents=True)
    twin = write_jsonl(tmp_path / "x" / tmp_path.name / "b.jsonl", [row("When?")])

    def ids(*files):
        return [p.id for p in load_prompts(jsonl_config("", test=files), "test")]

    folder = tmp_path.name
    assert ids(*names) == [f"{folder}/a.jsonl:0", f"{folder}/b.jsonl:0"]
    assert ids(names[1]) == [f"{folder}/b.jsonl:0"]
    assert ids(*names, twin) == [f"{folder}/a.jsonl:0", f"1:{folder}/b.jsonl:0",
                                 f"2:{folder}/b.jsonl:0"]


def test_a_local_folder_loads_as_a_hub_set(tmp_path, monkeypatch):
    import datasets

    # Its cache database is closed by the garbage collector, which Python 3.13 warns about.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_parquet(tmp_path / "set" / "train.parquet", [row("Who?")])
    cfg = DataConfig(source="hub", train=(str(tmp_path / "set"),))
    (prompt,) = load_prompts(cfg, "train")
    assert (prompt.question, prompt.data_source) == ("Who?", "ambig_qa")


def test_our_instruction_replaces_the_one_in_the_file(tmp_path):
    cfg = jsonl_config(write_jsonl(tmp_path / "a.jsonl", [row()]), instruction="ours")
    (prompt,) = load_prompts(cfg, "train")
    assert prompt.messages[0] == {"role": "system", "content": chain.SYSTEM}
    assert prompt.messages[1]["content"] == f"{chain.INSTRUCTION}\n\nWho?"


def test_our_instruction_keeps_the_conversation_before_the_last_question(tmp_path):
    history = [
        {"role": "user", "content": "Help me."},
        {"role": "assistant", "content": "With what?"},
        {"role": "user", "content": "A sum."},
    ]
    rows = [row(extra_info={"single_turn_prompt": "1 + 1?", "chat_history": history})]
    cfg = jsonl_config(write_jsonl(tmp_path / "a.jsonl", rows), instruction="ours")
    (prompt,) = load_prompts(cfg, "train")
    assert prompt.question == "1 + 1?"
    assert [m["role"] for m in prompt.messages] == ["system", "user", "assistant", "user"]
    assert prompt.messages[1:3] == tuple(history[:2])
    assert prompt.messages[3]["content"] == f"{chain.INSTRUCTION}\n\nA sum."


def test_without_reasoning_a_question_stands_under_a_text_that_knows_no_blocks(tmp_path):
    history = [{"role": "user", "content": "Help me."}, {"role": "assistant", "content": "How?"},
               {"role": "user", "content": "A sum."}]
    rows = [row(), row(extra_info={"single_turn_prompt": "1 + 1?", "chat_history": history})]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    bare, chat = load_prompts(jsonl_config(path, instruction="ours", reasoning="none"), "train")
    system = {"role": "system", "content": chain.PLAIN_SYSTEM}
    assert bare.messages == (system, {"role": "user", "content": "Who?"})
    assert chat.messages == (system, *history)
    for name in (*chain.BLOCKS, *chain.KEYS, "<"):
        assert name not in chain.PLAIN_SYSTEM
    with pytest.raises(ValueError, match="set data.instruction = 'ours'"):
        load_prompts(jsonl_config(path, reasoning="none"), "train")


def test_without_extra_info_the_question_is_the_last_message(tmp_path):
    bare = row()
    del bare["extra_info"]
    (prompt,) = load_prompts(jsonl_config(write_jsonl(tmp_path / "a.jsonl", [bare])), "train")
    assert prompt.question == "Four blocks. Question: Who?"


def test_malformed_rows_are_reported_with_file_and_row_skipped_and_counted(tmp_path, caplog):
    user = {"role": "user", "content": "Who?"}
    bad = [
        (row(prompt=[]), "not a list of chat messages"),
        (row(prompt=None), "not a list of chat messages"),
        (row(prompt=[{"role": "user"}]), "has no role and content"),
        (row(prompt=[{"role": "robot", "content": "x"}]), "role 'robot'; allowed: system"),
        (row(prompt=[{"role": "user", "content": 5}]), "the content of a message is 5"),
        (row(prompt=[{"role": "user", "content": " "}]), "the last message is empty"),
        (row(prompt=[user, {"role": "assistant", "content": "I"}]), "from 'assistant'"),
        (row(data_source=""), "data_source is ''"),
        (row(data_source=None), "data_source is None"),
        (row(reward_model=None), "without a ground_truth"),
        (row(reward_model={"style": "rule"}), "without a ground_truth"),
        (row(reward_model={"ground_truth": None}), "ground_truth is None"),
        (row(reward_model={"ground_truth": True}), "ground_truth is True"),
        (row(reward_model={"ground_truth": " "}), "ground_truth is empty"),
        (row(extra_info=[1]), "extra_info is [1]"),
        (row(extra_info={"single_turn_prompt": 3}), "single_turn_prompt is 3"),
        ("{not json", "not a JSON object: "),
        ("[1, 2]", "not a JSON object but a list"),
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [*(b for b, _ in bad), row()])
    (prompt,) = load_prompts(jsonl_config(path), "train")
    assert prompt.id.endswith(f"a.jsonl:{len(bad)}")
    for number, (_, why) in enumerate(bad):
        assert any(
            f"{path} row {number} skipped" in message and why in message
            for message in caplog.messages
        ), why
    assert f"{path}: skipped {len(bad)} malformed of {len(bad) + 1} rows" in caplog.messages


def test_bytes_that_are_no_text_and_endless_nesting_cost_their_own_row_only(tmp_path, caplog):
    good = json.dumps(row()).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, b'{"x": "\xff"}', b"[" * 100_000, good]))
    prompts = load_prompts(jsonl_config(path), "train")
    assert [prompt.id.rpartition(":")[2] for prompt in prompts] == ["0", "3"]
    assert f"{path} row 1 skipped: not a JSON object" in caplog.text
    assert f"{path} row 2 skipped: not a JSON object" in caplog.text


def test_a_file_full_of_bad_rows_names_some_and_counts_all(tmp_path, caplog):
    rows = [row(data_source="")] * 100 + [row()]
    load_prompts(jsonl_config(write_jsonl(tmp_path / "a.jsonl", rows)), "train")
    assert len(caplog.messages) == sources.MAX_REPORTS + 1
    assert "skipped 100 malformed of 101 rows" in caplog.messages[-1]


def test_a_number_is_a_ground_truth_as_its_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row(reward_model={"ground_truth": 1.6})])
    assert load_prompts(jsonl_config(path), "train")[0].ground_truth == "1.6"


@pytest.mark.parametrize("column", sources.REQUIRED)
def test_a_missing_column_is_an_error_naming_file_column_and_columns(tmp_path, column):
    rows = [{key: value for key, value in row().items() if key != column}]
    path = write_parquet(tmp_path / "a" / "x.parquet", rows)
    with pytest.raises(ValueError) as error:
        load_prompts(DataConfig(source="parquet", train=(path,)), "train")
    assert f"{path}: no column {column!r}" in str(error.value)
    assert "has ability" in str(error.value) and "extra_info" in str(error.value)


def test_a_prompt_that_is_a_plain_string_raises(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row(), row(prompt="<|im_start|>user ...")])
    with pytest.raises(TypeError, match="row 1: the prompt is a plain string"):
        load_prompts(jsonl_config(path), "train")


def test_files_without_a_usable_row_or_missing_files_are_errors(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row(data_source="")])
    with pytest.raises(ValueError, match="none of its 1 rows is usable"):
        load_prompts(jsonl_config(path), "train")
    with pytest.raises(ValueError, match="data.train: no file matches"):
        load_prompts(jsonl_config(tmp_path / "*.none"), "train")
    with pytest.raises(ValueError, match="data.test is empty"):
        load_prompts(jsonl_config(path), "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "csv"}, "data.source = 'csv'; allowed: builtin, parquet, jsonl, hub"),
        ({"reasoning": "some"}, "data.reasoning = 'some'; allowed: tagged, none"),
        ({"instruction": "mine"}, "data.instruction = 'mine'; allowed: as_given, ours"),
    ],
)
def test_unknown_choices_are_errors_naming_the_allowed_ones(changes, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(DataConfig(**changes), "train")
    with pytest.raises(ValueError, match="split = 'dev'; allowed: train, test"):
        load_prompts(DataConfig(), "dev")


def test_globs_keep_name_order_and_ids_stay_unique_over_equal_names(tmp_path):
    for folder in ("b", "a"):
        write_parquet(tmp_path / folder / "train.parquet", [row(folder)])
    cfg = DataConfig(source="parquet", train=(str(tmp_path / "*" / "train.parquet"),))
    assert [p.question for p in load_prompts(cfg, "train")] == ["a", "b"]
    twice = DataConfig(source="parquet", train=cfg.train * 2)
    assert len({p.id for p in load_prompts(twice, "train")}) == 4


def test_a_size_keeps_a_seeded_choice_in_file_order(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row(str(i)) for i in range(100)])
    kept = [load_prompts(jsonl_config(path, train_size=10, seed=s), "train") for s in (0, 0, 1)]
    numbers = [[int(p.question) for p in prompts] for prompts in kept]
    assert numbers[0] == numbers[1] == sorted(numbers[0]) and len(numbers[0]) == 10
    assert numbers[2] != numbers[0]
    assert len(load_prompts(jsonl_config(path, train_size=500), "train")) == 100


def test_builtin_prompts_come_from_the_generator():
    cfg = DataConfig(test_size=20, seed=5)
    assert load_prompts(cfg, "test") == builtin.generate("test", 20, seed=5)


REAL = {  # rows in the file, and those without a ground truth
    "abg_coqa": (1055, 0),
    "advbench": (520, 0),
    "ambig_qa": (300, 0),
    "math-hard": (353, 1),
    "medium": (248, 0),
    "minerva_math": (272, 0),
    "wildguard": (300, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_test_sets_load_whole(name, shared_dir, caplog):
    path = Path(shared_dir) / "data" / name / "test.parquet"
    prompts = load_prompts(DataConfig(source="parquet", test=(str(path),)), "test")
    rows, broken = REAL[name]
    assert len(prompts) == rows - broken
    assert len(caplog.messages) == 2 * (broken > 0)
    assert all(p.question and len(p.messages) == 2 for p in prompts)
