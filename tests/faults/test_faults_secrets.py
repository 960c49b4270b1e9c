"""Planted secrets are in nothing that a run writes or says, in no spelling of them."""

import base64
import dataclasses
import json
import urllib.parse
from pathlib import Path

import judging
import pytest
import runs

from gtalign_jax import command, run
from gtalign_jax.config import Config, fingerprint, load_run_config, resolved_json, save_run_info
from gtalign_jax.freeze import ConfigError
from gtalign_jax.redact import redact_text
from gtalign_jax.reward.judges import JudgeError
from gtalign_jax.training import collect

KEY, PASSWORD = "judge-key/7Q+x%41\\z9", "pass w\u00f6rd&8"  # each spelling of them is another
PASTED = "sk-proj-0123456789abc"
ADDRESS = f"https://me:{urllib.parse.quote(KEY, safe='')}@host"
OTHERS = {"HF_TOKEN": "hf_" + "aB3" * 12, "WANDB_API_KEY": "0123456789" * 4}


def spellings(secret: str) -> set[bytes]:
    """As it is, and as URLs, base64 and JSON would hold it."""
    raw = secret.encode()
    texts = {secret, urllib.parse.quote(secret), urllib.parse.quote(secret, safe=""),
             urllib.parse.quote_plus(secret), json.dumps(secret)[1:-1],
             json.dumps(secret, ensure_ascii=False)[1:-1]}
    # In base64 three ways: by where in the whole text it begins.
    coded = [base64.b64encode(b"x" * n + raw)[4 * (n > 0) : -4] for n in range(3)]
    return {text.encode() for text in texts} | set(coded)


def leaks(where: dict[str, bytes], secrets) -> list[tuple[str, bytes]]:
    return [(name, spelling) for name, content in where.items()
            for secret in secrets for spelling in spellings(secret) if spelling in content]


def files(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() + str(file).encode() for file in directory.rglob("*")
            if file.is_file()}


@pytest.fixture
def planted(monkeypatch):
    for name, value in {**OTHERS, "PLANTED_KEY": KEY}.items():
        monkeypatch.setenv(name, value)
    return (*OTHERS.values(), KEY, PASSWORD)


def asking(workdir, *servers, **more):
    """A run whose first judge is known by a password, the second by a key."""
    plain = [server.url for server in servers]
    user = urllib.parse.quote(f"alice:{PASSWORD}", safe=":")
    urls = [plain[0].replace("://", f"://{user}@"), *plain[1:]]
    return runs.config(
        workdir, judge__kind="http", judge__rules=False, judge__base_url=",".join(urls),
        judge__model="judge-1", judge__api_key_env="PLANTED_KEY", judge__retries=0,
        grpo__steps=1, sft__steps=1, **more,
    )


def test_the_search_finds_each_spelling():
    for secret in (KEY, PASSWORD):
        for code in (lambda s: s, urllib.parse.quote, json.dumps,
                     lambda s: base64.b64encode(f"alice:{s}".encode()).decode()):
            assert leaks({"x": f"before {code(secret)} after".encode()}, [secret])


@pytest.mark.slow
@pytest.mark.long  # W&B remembers its key for the life of the process
def test_a_run_whose_judges_repeat_their_keys_writes_and_says_none(
    tmp_path, planted, monkeypatch, capfd, caplog,
):
    caplog.set_level("INFO", "gtalign_jax")
    monkeypatch.setattr(collect, "decode", runs.fluent)
    with judging.serving(echo=True) as first, judging.serving(echo=True) as second:
        config = asking(tmp_path, first, second, judge__preflight=False, judge__max_missing=1.0,
                        track__wandb="offline", track__mlflow=str(tmp_path / "mlflow"))
        given = f"--config.judge.base_url={config.judge.base_url}"
        monkeypatch.setattr("sys.argv", ["main", given])
        run.run(config)
        asked = {a.authorization for server in (first, second) for a in server.asked}
    assert any(KEY in (text or "") for text in asked) and len(asked) == 2  # both were sent
    written = files(tmp_path)
    for name in ("config.json", "run_info.json", "rollouts.jsonl", "report.html", "hf/config.json"):
        assert str(tmp_path / name) in written
    assert any(".wandb" in name for name in written) and any("mlflow.db" in n for n in written)
    assert any("judgements" in name for name in written)
    said = capfd.readouterr()
    heard = {"stdout": said.out.encode(), "stderr": said.err.encode(), "log": caplog.text.encode()}
    assert leaks(written | heard, planted) == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["401", "server", "no_verdict", "pre-flight", "down"])
def test_a_judge_that_fails_with_the_key_in_its_words_ends_a_run_without_it(
    fault, tmp_path, planted, monkeypatch, capfd, caplog,
):
    monkeypatch.setattr(collect, "decode", runs.fluent)
    with judging.serving(echo=True, behave=lambda asked: fault) as server:
        config = asking(tmp_path, server, stages=("grpo",),
                        judge__preflight=fault in ("pre-flight", "down"))
        if fault == "down":
            server.stop()
        error = ""
        try:
            run.run(config)
        except (JudgeError, ValueError) as caught:
            error = str(caught)
    refused = any(PASSWORD in base64.b64decode(asked.authorization.split()[1]).decode()
                  for asked in server.asked)
    assert error if config.judge.preflight else refused
    said = capfd.readouterr()
    heard = {"error": error.encode(), "stdout": said.out.encode(),
             "stderr": said.err.encode(), "log": caplog.text.encode()}
    assert leaks(files(tmp_path) | heard, planted) == []


# ---- what stands in the config -------------------------------------------------------------------


@pytest.mark.parametrize("key,value", [
    ("workdir", f"{ADDRESS}/run"), ("data__train", (f"{ADDRESS}/a.jsonl",)),
    ("model__path", f"{ADDRESS}/model"), ("judge__api_key_env", PASTED),
    ("judge__extra_body", json.dumps({"api_key": KEY})), ("track__name", OTHERS["HF_TOKEN"]),
    ("judge__extra_body", json.dumps({"headers": {"x-api-key": KEY}})),
    ("judge__extra_body", '{"api_key": "judge-key/7Q", '),
])
def test_a_secret_in_the_config_is_refused_and_not_repeated(key, value, tmp_path, capsys):
    with pytest.raises(ConfigError) as caught:
        runs.config(**{"workdir": tmp_path, key: value})
    command._fail(caught.value, 2)
    told = capsys.readouterr().err
    assert key.replace("__", ".") in told and len(told.splitlines()) == 1
    assert leaks({"told": told.encode()}, [KEY, "judge-key/7Q", PASTED, *OTHERS.values()]) == []


def test_addresses_may_hold_a_password_and_files_have_them_without(tmp_path, monkeypatch):
    judge = dataclasses.replace(Config().judge, base_url="http://me:p@ssw0rd@h:1/v1,http://o:0ther@i")
    track = dataclasses.replace(Config().track, mlflow="http://me:p@ssw0rd@server")
    config = dataclasses.replace(Config(), judge=judge, track=track, workdir=str(tmp_path))
    monkeypatch.setattr("sys.argv", [
        "main", f"--config.judge.base_url={judge.base_url}", f"--track.mlflow={track.mlflow}",
        f"--config.judge.api_key_env={PASTED}", f"--token={OTHERS['HF_TOKEN']}",
    ])
    save_run_info(tmp_path, config)
    written = files(tmp_path) | {"fingerprint": json.dumps(fingerprint(config)).encode()}
    for secret in ("ssw0rd", "0ther", PASTED, OTHERS["HF_TOKEN"]):
        assert not [name for name, content in written.items() if secret.encode() in content]
    assert "http://<redacted>@h:1/v1,http://<redacted>@i" in resolved_json(config)
    load_run_config(tmp_path)  # may be read again


@pytest.mark.parametrize("text", [
    "hf-internal-testing/tiny-random-gpt2", "runs/hf_qwen2_5_0_5b_instruct_long_name",
    "Qwen/Qwen2.5-3B@0123456789abcdef0123456789abcdef01234567", "gs://bucket/max_tokens=5",
    "sk-learn-models-of-some-kind", '{"chat_template_kwargs": {"enable_thinking": true}}',
])
def test_what_is_no_secret_stays(text):
    assert redact_text(text) == text


def test_the_last_line_of_a_command_says_no_secret(capsys):
    error = ValueError(f'HTTP 401 from {ADDRESS}/v1: {{"Authorization": "Bearer abcdefgh12"}}')
    assert command._fail(error, 1) == 1
    told = capsys.readouterr().err
    assert "abcdefgh12" not in told and "HTTP 401 from https://<redacted>@host/v1" in told
