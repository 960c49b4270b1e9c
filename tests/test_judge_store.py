"""What was judged is kept: through kill -9, rubbish, full disks and several writers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from judging import asking, config, request, serving

from gtalign_jax.reward import prompts
from gtalign_jax.reward import store as store_lib
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import JudgeRequest
from gtalign_jax.reward.store import JudgementStore, key_of, remembering
from gtalign_jax.reward.tasks import TASKS

TESTS = Path(__file__).resolve().parent
CFG = JudgeConfig(kind="http", base_url="http://127.0.0.1:9/v1", model="judge-1")
KEY = "ab" * 32


def by_content(asked):
    """A grade that depends on what is graded."""
    return str(zlib.crc32(asked.response.encode()) % 2)


def grade(response):
    return float(zlib.crc32(response.encode()) % 2)


def nobody(requests, told):
    raise AssertionError(f"a judge was asked about {[r.response for r in requests]}")


def start(server, store, process=0, first=0, step=8):
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, str(TESTS / "judging_child.py"), server.url, str(store),
               str(process), str(first), str(step)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)


def told_by(child, count):
    """The first judgements that a process told of, response -> score."""
    lines = [child.stdout.readline().rsplit(maxsplit=1) for _ in range(count)]
    return {response: float(score) for response, score in lines}


def kill(child):
    """kill -9, and what it had told by then."""
    child.send_signal(signal.SIGKILL)
    with child.stdout as told:  # `communicate` would overlook what `readline` has read ahead
        rest = told.read()
    child.wait(60)
    whole = [line.rsplit(maxsplit=1) for line in rest.split("\n")[:-1]]
    return {response: float(score) for response, score in whole}


def fill(store, count, **fields):
    for i in range(count):
        store.put(f"{i:064x}", **({"score": 1.0, "reply": "<verdict>1</verdict>"} | fields))


@pytest.mark.slow
def test_whatever_was_told_before_a_kill_is_there_after_it(tmp_path):
    with serving(grade=by_content) as server:
        child = start(server, tmp_path)
        told = told_by(child, 100) | kill(child)
        before = server.counts()
        assert len(told) >= 100
        with asking(server) as ask:
            remembered = remembering(config(server), JudgementStore(tmp_path), ask)
            found = remembered([request(response) for response in told])
        assert server.counts() == before, "nothing was asked again"
    assert [j.score for j in found] == list(told.values()) == list(map(grade, told))
    assert all(judgement.stored for judgement in found)
    assert {0.0, 1.0} == set(told.values())


@pytest.mark.slow
def test_a_restart_asks_only_what_is_lacking_and_writes_to_a_file_of_its_own(tmp_path):
    with serving(grade=by_content) as server:
        child = start(server, tmp_path)
        told = told_by(child, 20) | kill(child)
        (file,) = tmp_path.iterdir()
        # As if the last line had been cut by the kill.
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
        asked_before = sum(server.counts().values())
        child = start(server, tmp_path)
        more = told_by(child, 20) | kill(child)
    assert not set(more) & (set(told) - {_response_of(told, lines[-1])}), "asked again"
    assert sum(server.counts().values()) - asked_before >= 20
    store = JudgementStore(tmp_path)
    keys = {response: key_of(request(response), config(server).identity())
            for response in told | more}
    lost = {response for response, key in keys.items() if store.get(key) is None}
    assert lost <= {_response_of(told, lines[-1])}
    assert len(list(tmp_path.iterdir())) == 2


def _response_of(told, line):
    """The response whose judgement is in a line."""
    keys = {key_of(request(response), CFG.identity()): response for response in told}
    return keys.get(json.loads(line)["key"])


@pytest.mark.slow
def test_processes_that_write_at_once_write_to_files_of_their_own(tmp_path):
    with serving(grade=by_content) as server:
        children = [start(server, tmp_path, process=0, first=1000 * i) for i in range(2)]
        children.append(start(server, tmp_path, process=3, first=9000))
        told = {}
        for child in children:
            told |= told_by(child, 24)
        for child in children:
            told |= kill(child)
    assert {path.name for path in tmp_path.iterdir()} == {
        "0000-000000.jsonl", "0000-000001.jsonl", "0003-000000.jsonl"}
    replay = remembering(dataclasses.replace(CFG, mode="replay"), JudgementStore(tmp_path), nobody)
    assert [j.score for j in replay([request(response) for response in told])] == [
        grade(response) for response in told]


def test_threads_that_write_at_once_keep_each_line_whole(tmp_path):
    store = JudgementStore(tmp_path)

    def write(worker):
        for i in range(50):
            store.put(f"{worker:032x}{i:032x}", reply=f"{worker} {i} " * 200)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for readable in (store, JudgementStore(tmp_path)):
        assert len(readable) == 400
        assert readable.get(f"{5:032x}{7:032x}")["reply"] == "5 7 " * 200


def test_equal_requests_are_asked_once_and_failures_again(tmp_path, monkeypatch):
    with serving() as server, asking(server, retries=0) as ask:
        remembered = remembering(config(server), JudgementStore(tmp_path), ask)
        wanted = [request(text) for text in ("a", "b", "a", "no_verdict", "a", "no_verdict")]
        first, second = remembered(wanted), remembered(wanted)
    assert server.counts() == {"a": 1, "b": 1, "no_verdict": 2}
    assert [j.score for j in first] == [j.score for j in second] == [1, 1, 1, None, 1, None]
    assert [j.stored for j in first] == [False] * 6
    assert [j.stored for j in second] == [True, True, True, False, True, False]
    assert {j.cause for j in first if j.score is None} == {"unparsable"}
    assert len(JudgementStore(tmp_path)) == 2, "what failed is not kept"


def test_whatever_a_judgement_depends_on_makes_another_key(monkeypatch):
    asked = request("an answer")
    task = TASKS["ambig_qa"]
    judges = [CFG, *(dataclasses.replace(CFG, **change) for change in (
        {"model": "judge-2"}, {"temperature": 0.5}, {"top_p": 0.9}, {"max_tokens": 10},
        {"thinking": "on"}, {"reasoning_effort": "low"}, {"extra_body": '{"seed": 1}'},
    ))]  # fmt: skip
    requests = [asked, *(dataclasses.replace(asked, **change) for change in (
        {"question": "another"}, {"ground_truth": "another"}, {"response": "another"},
        {"response": "an answer "}, {"data_source": "wildguard"},
        {"task": dataclasses.replace(task, rubric="Be kind.")},
        {"task": dataclasses.replace(task, grades=(0.0, 0.5, 1.0))},
    )), JudgeRequest("consistency", "ambig_qa", "", "", "", "an answer", ("DQ_CQ",))]  # fmt: skip
    keys = [key_of(asked, judge.identity()) for judge in judges]
    keys += [key_of(other, CFG.identity()) for other in requests[1:]]
    monkeypatch.setattr(prompts, "VERSION", prompts.VERSION + 1)
    keys.append(key_of(asked, CFG.identity()))
    assert len(set(keys)) == len(keys) == len(judges) + len(requests)


def test_where_and_how_fast_it_was_asked_makes_no_other_key():
    other = dataclasses.replace(CFG, base_url="http://elsewhere/v1", concurrency=1, retries=9,
                                timeout_s=1.0, api_key_env="MINE", deadline_s=5.0)
    assert key_of(request(), other.identity()) == key_of(request(), CFG.identity())


def test_a_replay_needs_no_network_and_says_what_it_lacks(tmp_path):
    with serving(grade=by_content) as server, asking(server) as ask:
        wanted = [request(f"text {i}") for i in range(6)]
        live = remembering(config(server), JudgementStore(tmp_path), ask)(wanted)
    cfg = dataclasses.replace(CFG, mode="replay")
    replay = remembering(cfg, JudgementStore(tmp_path), nobody)
    found = replay([*wanted, request("new"), wanted[0]])
    assert [j.score for j in found] == [*(j.score for j in live), None, live[0].score]
    assert found[6].cause == "not_stored" and "judge.mode='replay'" in found[6].error
    assert [j.reply for j in found[:6]] == [j.reply for j in live]


def test_a_store_is_as_good_as_the_parser_of_today(tmp_path):
    """A reply that today's parser does not take is asked for anew, whatever score it once had."""
    store = JudgementStore(tmp_path)
    store.put(key_of(request("x"), CFG.identity()), score=1.0, reply="one, I would say")
    with serving() as server, asking(server) as ask:
        (found,) = remembering(CFG, store, ask)([request("x")])
    assert found.score == 1.0 and not found.stored and len(server.asked) == 1


RUBBISH = {
    "nothing": b"",
    "an empty line": b"\n",
    "no JSON": b"Judgements\n",
    "half a line": b'{"key": "' + KEY.encode() + b'", "reply": "<verd\n',
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "null": b"null\n",
    "no key": b'{"reply": "<verdict>1</verdict>"}\n',
    "a key of another type": b'{"key": 7, "reply": "<verdict>1</verdict>"}\n',
    "a key of other letters": b'{"key": "xyz", "reply": "<verdict>1</verdict>"}\n',
    "no reply": b'{"key": "' + KEY.encode() + b'"}\n',
    "a reply of another type": b'{"key": "' + KEY.encode() + b'", "reply": 1}\n',
    "no UTF-8": b"\xff\xfe\x00\n",
    "zeros, as after a crash of the system": b"\x00" * 5000 + b"\n",
    "deep nesting": b"[" * 100_000 + b"\n",
    "a huge number": b'{"key": ' + b"9" * 10_000 + b"}\n",
}


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_what_is_no_judgement_is_left_out_and_what_stands_around_it_is_read(
        rubbish, tmp_path, caplog):
    fill(JudgementStore(tmp_path), 3)
    (file,) = tmp_path.iterdir()
    first, second, third = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + RUBBISH[rubbish] + second + third)
    store = JudgementStore(tmp_path)
    assert len(store) == 3
    assert all(store.get(f"{i:064x}")["reply"] == "<verdict>1</verdict>" for i in range(3))
    if RUBBISH[rubbish]:
        assert "1 lines are no judgements" in caplog.text
    store.put(KEY, reply="new")
    assert JudgementStore(tmp_path).get(KEY)["reply"] == "new"


def test_a_last_line_without_its_end_is_not_read_even_if_it_looks_whole(tmp_path):
    """Of "12" a kill may leave "1"."""
    fill(JudgementStore(tmp_path), 2)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert len(JudgementStore(tmp_path)) == 1


def test_a_directory_may_hold_other_things(tmp_path):
    (tmp_path / "sub.jsonl").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n')
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    store = JudgementStore(tmp_path)
    fill(store, 1)
    assert len(JudgementStore(tmp_path)) == 1
    assert len(JudgementStore(tmp_path / "not" / "there")) == 0
    assert not (tmp_path / "not").exists(), "reading creates nothing"


def test_a_file_that_changes_after_it_was_read_gives_no_judgement_of_another(tmp_path):
    fill(JudgementStore(tmp_path), 3)
    store = JudgementStore(tmp_path)
    (file,) = tmp_path.iterdir()
    first, second, third = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(second + first)  # of the same length, another order; the third is gone
    assert [store.get(f"{i:064x}") for i in range(3)] == [None] * 3
    store.put(f"{2:064x}", reply="asked again")
    assert store.get(f"{2:064x}")["reply"] == "asked again"
    file.unlink()
    fresh = JudgementStore(tmp_path)
    next(tmp_path.iterdir()).unlink()
    assert fresh.get(f"{2:064x}") is None


def test_a_file_that_is_full_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(store_lib, "MAX_BYTES", 1000)
    store = JudgementStore(tmp_path)
    fill(store, 30, reply="r" * 100)
    store.put("ff" * 32, reply="r" * 5000)  # longer than a file may be: alone in one
    sizes = {path.name: path.stat().st_size for path in sorted(tmp_path.iterdir())}
    assert list(sizes) == [f"0000-{i:06d}.jsonl" for i in range(len(sizes))]
    assert sum(size > 1000 for size in sizes.values()) == 1
    for again in (store, JudgementStore(tmp_path)):
        assert len(again) == 31 and again.get("ff" * 32)["reply"] == "r" * 5000
        assert all(again.get(f"{i:064x}") for i in range(30))


def test_a_key_keeps_its_first_row(tmp_path):
    store = JudgementStore(tmp_path)
    store.put(KEY, reply="first")
    store.put(KEY, reply="second")
    assert store.get(KEY)["reply"] == "first" and len(store) == 1
    assert len(next(tmp_path.iterdir()).read_bytes().splitlines()) == 1


def test_a_reply_of_any_characters_comes_back_as_it_was(tmp_path):
    reply = 'line\nline\r\u2028 \ud800 \x00 "quoted" \\n 日本 <verdict>1</verdict>'
    JudgementStore(tmp_path).put(KEY, reply=reply)
    assert JudgementStore(tmp_path).get(KEY)["reply"] == reply


def test_a_directory_that_cannot_be_written_to_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    store = JudgementStore(tmp_path / "file" / "judgements")
    with serving() as server, asking(server) as ask:
        with pytest.raises(OSError, match="judgements"):
            remembering(config(server), store, ask)([request("x")])


def test_a_full_device_is_an_error_that_names_the_file(tmp_path):
    store = JudgementStore(tmp_path)
    store.put("00" * 32, reply="there is room")
    store._file = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        store.put(KEY, reply="there is none")
    assert store.get(KEY) is None


FULL_DISK = """
import resource, sys
from gtalign_jax.reward.store import JudgementStore
store = JudgementStore(sys.argv[1])
store.put("00" * 32, reply="r" * 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for key in ("11", "22"):
    try:
        store.put(key * 32, reply="r" * 2000)
    except OSError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
store.put("33" * 32, reply="there is room again")
"""


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_what_is_written_after_it_is_whole(tmp_path):
    """A limit of file size does what a full disk does: a part is written, then nothing."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], text=True,
                          capture_output=True, cwd=TESTS.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is the disk full?") == 2 and str(tmp_path) in done.stdout
    store = JudgementStore(tmp_path)
    assert len(store) == 2 and store.get("33" * 32)["reply"] == "there is room again"
