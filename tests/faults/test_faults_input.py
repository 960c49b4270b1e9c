"""What users hand over, damaged or hostile: one line that names the file, and nothing is run."""

import contextlib
import json
import shutil

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
from absl import flags
from ml_collections import config_flags

from gtalign_jax import export
from gtalign_jax.config import from_flag, load_run_config, parse_flags
from gtalign_jax.data.chat import encode_chats, load_tokenizer, stop_ids
from gtalign_jax.data.coldstart import load_examples
from gtalign_jax.data.sources import DataConfig, load_prompts
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.model.safetensors_io import MAX_JSON_BYTES, read_json
from gtalign_jax.training import plots
from gtalign_jax.training.metrics import JsonLines, read_rows

NO_JSON = {
    "empty": b"", "half": b'{"a": 1', "more": b'{"a": 1} x', "a list": b"[]", "a number": b"5",
    "UTF-16": '{"a": 1}'.encode("utf-16"), "Latin-1": b'{"a": "\xe9"}', "NUL": b"\x00" * 64,
    "BOM": b'\xef\xbb\xbf{"a": 1}', "a key twice": b'{"a": 1, "a": 2}',
    "deep arrays": b'{"a": ' + b"[" * 100_000, "deep objects": b'{"a":' * 100_000,
    "deeper than allowed": b'{"a":' * 70 + b"1" + b"}" * 70,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
}  # fmt: skip


def refusal(action, *arguments) -> str:
    """The one line with which an action is refused."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        action(*arguments)
    text = str(caught.value)
    assert text.strip() and "\n" not in text
    return text


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_a_file_that_is_no_json_object_is_named_wherever_one_is_read(content, tmp_path):
    for name, read in (
        ("any.json", lambda: read_json(tmp_path / "any.json")),
        ("config.json", lambda: load_run_config(tmp_path)),
        ("results.json", lambda: plots.read_results(tmp_path)),
        ("gtalign.json", lambda: export.read_about(tmp_path)),
    ):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in refusal(read)


def test_json_has_bounds_in_bytes_and_what_is_no_file_is_named(tmp_path):
    large, folder, loop = (tmp_path / name for name in ("large.json", "folder.json", "loop.json"))
    with large.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    folder.mkdir()
    loop.symlink_to(loop)
    assert "large.json: not JSON that can be read: larger than 64 MiB" in refusal(read_json, large)
    assert "folder.json: Is a directory" in refusal(read_json, folder)
    assert "loop.json: Too many levels of symbolic links" in refusal(read_json, loop)
    assert "absent.json" in refusal(read_json, tmp_path / "absent.json")


@hypothesis.given(content=st.binary(max_size=60) | st.text(max_size=30).map(str.encode)
                  | st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists)
                  .map(lambda x: json.dumps(x).encode()))
@hypothesis.settings(max_examples=100)
def test_any_bytes_are_an_object_or_refused(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert isinstance(read_json(file), dict)


# ---- a work directory that somebody has edited ---------------------------------------------------


@pytest.mark.parametrize("line", [
    b"", b"{", b"[]", b"5", b"\xff\xfe", b"\x00\x00", b"[" * 100_000, b'{"stage": "grpo"}',
    b'{"stage": "grpo", "step": "1"}', b'{"stage": [], "step": 1}',
])
def test_a_line_of_a_log_that_is_no_row_is_named_with_its_number(line, tmp_path):
    file = tmp_path / "metrics.jsonl"
    good = b'{"stage": "grpo", "step": 1}\n'
    file.write_bytes(good + line + b"\n" + good)
    where = f"{file}, line 2, is no "
    assert refusal(lambda: read_rows(file, stage=str, step=int)).startswith(where)
    lines = JsonLines(file)
    assert refusal(lines.truncate, "grpo", 0).startswith(where)
    lines.close()
    assert file.read_bytes() == good + line + b"\n" + good  # nothing is lost by the refusal


def test_a_row_may_hold_what_ends_a_line_elsewhere(tmp_path):
    lines = JsonLines(tmp_path / "rows.jsonl")
    lines.append([{"stage": "a", "step": i, "text": "\u2028\x85\ud800"} for i in (1, 2)])
    assert lines.truncate("a", 1) == 1
    lines.close()
    (row,) = read_rows(tmp_path / "rows.jsonl", stage=str, step=int)
    assert row == {"stage": "a", "step": 1, "text": "\u2028\x85\ud800"}


@pytest.mark.parametrize("results", [{"a": 1}, {"a": {"b": "x"}}, {"a": {"b": True}}, {"a": []}])
def test_results_of_another_shape_are_refused_with_the_remedy(results, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "results.json: expected {evaluation: {metric: number or null}}; delete the file" in (
        refusal(plots.read_results, tmp_path)
    )


@pytest.mark.parametrize("content", [{"nonsense": 1}, {"seed": "x"}, {"model": []}, {"grpo": None}])
def test_a_config_of_a_run_with_other_keys_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert refusal(load_run_config, tmp_path).startswith(f"{tmp_path / 'config.json'}: ")


# ---- config files and flags ----------------------------------------------------------------------

CONFIG_FILES = {
    "not Python": "def get_config(:\n", "raises": "raise RuntimeError('two\\nlines')\n",
    "raises a key": "def get_config():\n    raise KeyError('x')\n", "no get_config": "x = 1\n",
    "bytes": "\x00\x01", "needs more": "import no_such_module\n",
    "no end": "def get_config():\n    return get_config()\n", "stops": "assert False, 'x'\n",
    "no function": "get_config = 5\n", "arguments": "def get_config(a, b):\n    return a\n",
    "no config": "def get_config():\n    return 'x'\n",
}


@pytest.fixture
def holder(monkeypatch):
    """A --config flag of this test's own."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    return config_flags.DEFINE_config_file("config", None, ", as in x", flag_values=values)


LOADED = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections


@LOADED
@pytest.mark.parametrize("text", CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_a_config_file_that_fails_is_one_line_and_status_2(text, tmp_path, holder, capsys):
    file = tmp_path / "mine.py"
    file.write_text(text)
    try:
        parse_flags(["main", f"--config={file}"])
        told = refusal(from_flag, holder)
    except SystemExit as end:
        assert end.code == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert str(file) in told
    assert "--config" in told and "load_module" not in told


@LOADED
def test_a_config_file_that_fails_tells_no_secret_of_the_command_line(tmp_path, holder, capsys):
    file = tmp_path / "mine.py"
    file.write_text("raise RuntimeError('https://me:pw12345@host/')\n")
    with pytest.raises(SystemExit):
        parse_flags(["main", f"--config={file}"])
    assert "pw12345" not in capsys.readouterr().err


# ---- tokenizers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer's directory, for copies."""
    out = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_tokenizer(["hello world"] * 3, 300, out)
    return out


def edited(trained, tmp_path, name: str, content):
    """A copy with another file: bytes, or changes to the JSON object that it holds."""
    copy = tmp_path / "tokenizer"
    shutil.copytree(trained, copy)
    if isinstance(content, dict):
        content = json.dumps(json.loads((copy / name).read_text()) | content).encode()
    (copy / name).write_bytes(content)
    return copy


REMOTE = {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}, "tokenizer_class": "Theirs"}


@pytest.mark.parametrize("name,content", [
    *(("tokenizer.json", NO_JSON[kind]) for kind in ("empty", "a list", "UTF-16", "deep arrays")),
    *(("tokenizer_config.json", NO_JSON[kind]) for kind in ("half", "a list", "deep objects")),
    ("tokenizer.json", b"{}"), ("tokenizer_config.json", {"eos_token": 5}),
    ("tokenizer_config.json", {"pad_token": []}), ("tokenizer_config.json", {"tokenizer_class": 5}),
    ("tokenizer_config.json", REMOTE),
])
def test_a_tokenizer_that_cannot_be_loaded_is_named(name, content, trained, tmp_path):
    directory = edited(trained, tmp_path, name, content)
    told = refusal(load_tokenizer, directory)
    assert told.startswith(f"{directory}: its tokenizer cannot be loaded: ")


def test_a_tokenizers_own_code_is_never_run(trained, tmp_path, capfd):
    directory = edited(trained, tmp_path, "tokenizer_config.json", REMOTE)
    (directory / "theirs.py").write_text("print('it ran')\nclass Theirs: pass\n")
    assert "it comes as code of its own, which is never run" in refusal(load_tokenizer, directory)
    assert "it ran" not in capfd.readouterr().out


TEMPLATES = {
    "no template": "{% for %}", "out of the sandbox": "{{ ''.__class__.__mro__[1] }}",
    "module": "{% import 'os' as os %}{{ os }}", "file": "{% include '/etc/passwd' %}",
    "refuses": "{{ raise_exception('no system role') }}", "absent": "{{ nothing.there }}",
    "types": "{{ messages + 1 }}", "zero": "{{ 1 / 0 }}",
    "no end": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "long": "{% for i in range(10 ** 9) %}x{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_that_fails_or_reaches_out_is_refused(template, trained, tmp_path):
    tokenizer = load_tokenizer(edited(trained, tmp_path, "chat_template.jinja", template.encode()))
    for use in (stop_ids, lambda tok: encode_chats(tok, [[{"role": "user", "content": "hi"}]])):
        assert refusal(use, tokenizer).startswith(f"the chat template of '{tmp_path}/tokenizer' fa")


@pytest.mark.parametrize("stops", ["x", 1.5, True, -4, 2**40, [[1]], [1, "x"], {"a": 1}])
def test_stop_ids_that_are_none_are_refused(stops, trained):
    told = refusal(stop_ids, load_tokenizer(trained), {"eos_token_id": stops})
    assert "generation_config.json" in told and f"eos_token_id={stops!r}" in told


# ---- prompts and examples ------------------------------------------------------------------------

ROW = {"prompt": [{"role": "user", "content": "hi"}], "data_source": "medium",
       "reward_model": {"ground_truth": "x"}}
GOOD = json.dumps(ROW).encode()


def prompts(file, source: str = "jsonl"):
    return load_prompts(DataConfig(source=source, train=(str(file),)), "train")


@pytest.mark.parametrize("content,told", [
    (b"", "no column 'prompt'"), (b"\n \n", "no column 'prompt'"),
    (b"[1]\n", "none of its 1 lines can be read; the first: not a JSON object but a list"),
    (GOOD.decode().encode("utf-16"), "none of its 1 lines can be read; the first: not a JSON obj"),
    (b"\x00" * 50, "none of its 1 lines can be read"), (b"[" * 100_000, "none of its 1 lines can"),
    (GOOD.replace(b'"hi"', b'"\\ud800"'), "half a surrogate pair is no text: '\\ud800'"),
    (GOOD.replace(b"prompt", b"prompts"), "no column 'prompt'"),
    *((json.dumps(ROW | change).encode(), "none of its 1 rows is usable") for change in (
        {"prompt": None}, {"prompt": []}, {"prompt": [1]}, {"prompt": {"role": "user"}},
        {"prompt": [{"role": [], "content": "x"}]}, {"prompt": [{"role": "user", "content": ""}]},
        {"prompt": [{"role": "user", "content": ["x"]}]}, {"data_source": 5}, {"data_source": ""},
        {"reward_model": {}}, {"reward_model": {"ground_truth": []}}, {"extra_info": 5},
        {"extra_info": {"single_turn_prompt": 5}},
    )),
])
def test_a_file_of_prompts_without_a_usable_row_is_named_with_the_reason(content, told, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    message = refusal(prompts, file)
    assert message.startswith(str(file)) and told in message


@pytest.mark.parametrize("other", [
    b"\xff\xfe", b"\x00" * 50, b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"[1]", b"null",
    GOOD[:-3], GOOD.replace(b'"hi"', b'"\\udc00"'),
])
def test_a_bad_line_is_skipped_and_the_good_ones_count(other, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + other + b"\r\n" + GOOD)
    assert len(prompts(file)) == 2


def test_files_that_cannot_be_opened_are_named(tmp_path):
    for read in (prompts, load_examples):
        assert refusal(read, str(tmp_path)) == f"{tmp_path}: Is a directory"
    assert "no file matches" in refusal(prompts, "/nowhere/*.jsonl")
    assert "data.train='no/such'" in refusal(prompts, "no/such", "hub")
    for key in ("train_size", "test_size", "max_prompt_tokens"):
        assert f"data.{key}=-1: must be >= " in refusal(lambda key=key: DataConfig(**{key: -1}))


BYTES = st.tuples(st.integers(0, 10**6), st.integers(0, 255))  # (place, value)


@hypothesis.given(places=st.lists(BYTES, max_size=4), length=st.integers(0, 10**6))
@hypothesis.settings(max_examples=150)
def test_a_damaged_parquet_file_is_read_or_named(places, length, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW] * 3), file)
    content = bytearray(file.read_bytes())
    for at, value in places:
        content[at % len(content)] = value
    file.write_bytes(content[: max(length, 1)])
    try:
        assert prompts(file, "parquet")
    except (ValueError, TypeError) as error:
        assert str(file) in str(error) and "\n" not in str(error)
