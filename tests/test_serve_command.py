"""The command: its mistakes, what its flags mean, how it ends."""

import asyncio
import copy
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pods
import pytest
import scripted
import writer
from scripted import serving

from gtalign_jax import serve
from gtalign_jax.game import pricing
from gtalign_jax.serving.api import ApiConfig
from gtalign_jax.serving.chat import Service
from gtalign_jax.serving.engine import EngineError

ROOT = Path(__file__).resolve().parent.parent
QUESTION = [{"role": "user", "content": "Why?"}]


def mistake(capsys, *flags: str) -> str:
    """The one line in which the command tells a mistake."""
    assert serve.main(["--model=runs/none", "--port=0", *flags]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    return told.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ("--model=", "runs/none")),
        (["--pricing=flat"], ("--pricing", "flat", "subscription")),
        (["--pricing=per_token:output=x"], ("output", "x")),
        (["--sensitivity=1"], ("--sensitivity", "two")),
        (["--sensitivity=a,b"], ("--sensitivity=a,b", "LLM,USER")),
        (["--usage={"], ("--usage={",)),
        (['--usage={"input": [1, 2, 3]}'], ("--usage", "output")),
        (["--api_key_env=GTALIGN_NO_SUCH_KEY"], ("--api_key_env=GTALIGN_NO_SUCH_KEY", "not set")),
        (["--max_body_bytes=0"], ("max_body_bytes=0", "> 0")),
        (["--grace_s=-1"], ("--grace_s=-1", ">= 0")),
        (["--host=no.such.host.invalid"], ("--host=no.such.host.invalid",)),
        (["--port=70000"], ("--port=70000",)),
    ],
)
def test_a_mistake_ends_in_one_line_that_names_it(capsys, flags, words):
    told = mistake(capsys, *flags)
    assert told.startswith("error: ") and all(word in told for word in words), told


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port}" in mistake(capsys, f"--port={port}")


@pytest.mark.parametrize("flags", [[], ["--model=x", "--prot=1"], ["--model=x", "--slots=many"],
                                   ["--model=x", "--rule=dictator"]])  # fmt: skip
def test_a_flag_that_is_none_ends_in_one_line_too(capsys, flags):
    with pytest.raises(SystemExit) as caught:
        serve.main(flags)
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize(("host", "key", "warned"), [
    ("127.0.0.1", None, False), ("127.0.0.1", "k", False), ("0.0.0.0", "k", False),
    ("0.0.0.0", None, True),
])  # fmt: skip
def test_listening_to_the_world_without_a_key_is_warned_of(caplog, host, key, warned):
    with serve._listen(host, 0) as listener:
        serve._warn(listener, ApiConfig(key=key))
    assert ("--api_key_env" in caplog.text) == warned


def test_sizes_fit_a_small_model_unless_they_are_given():
    def sizes(positions: int, *flags: str) -> tuple[int, int]:
        player = dataclasses.replace(
            writer.player(), model=dataclasses.replace(writer.player().model,
                                                       max_position=positions)
        )
        config = serve._engine_config(serve._arguments(["--model=x", *flags]), player)
        return config.prompt_tokens, config.new_tokens

    assert sizes(32_768) == (1024, 512)
    assert sizes(512) == (256, 256)
    assert sizes(512, "--new_tokens=100") == (412, 100)
    assert sizes(512, "--prompt_tokens=400") == (400, 112)
    assert sizes(512, "--prompt_tokens=400", "--new_tokens=90") == (400, 90)


@pytest.mark.parametrize(("template", "flags", "words"), [
    (None, (), "no chat template"),
    ("{{ raise_exception('no system') }}", (), "--instruction=ours: .*no system"),
    ("{{ messages[-1]['content'] }}", ("--prompt_tokens=50",), "--prompt_tokens=50: .*--instruct"),
])  # fmt: skip
def test_a_model_that_nobody_could_ask_anything_is_not_served(
    capsys, monkeypatch, template, flags, words
):
    tokenizer = copy.deepcopy(writer.tokenizer())
    tokenizer.chat_template = template
    player = dataclasses.replace(writer.player(), tokenizer=tokenizer, instruction="ours")
    monkeypatch.setattr(serve, "load_player", lambda what, **how: player)
    assert re.search(words, mistake(capsys, *flags))


def test_flags_steer_requests_that_say_nothing_and_need_known_use():
    def service(*flags: str, usage=writer.USAGE) -> Service:
        args = serve._arguments(["--model=x", *flags])
        player = dataclasses.replace(writer.player(), usage=usage)
        return serve._service(args, player, None, serve._steering(args))

    assert not service().steered and service().name == "writer"
    made = service("--pricing=per_token", "--pricing=per_request", "--sensitivity=2,3",
                   "--mode=matrix", "--name=other")
    assert made.steered and made.name == "other" and made.steering.usage == writer.USAGE
    assert made.steering.pricing == pricing.read(["per_token", "per_request"])
    assert (made.steering.sensitivity, made.steering.mode) == ((2, 3), "matrix")
    assert service("--rule=egalitarian", usage=None).steered
    with pytest.raises(ValueError, match="--usage"):
        service("--pricing=per_token", usage=None)
    given = '--usage={"input": [1, 2, 3], "output": [4, 5, 6]}'
    assert service("--pricing=per_token", given, usage=None).steering.usage.output == (4, 5, 6)
    assert service(given).steering.usage.output == (4, 5, 6)


def test_what_does_not_finish_in_the_grace_time_is_told_so():
    script = scripted.Script(held=asyncio.Event(), before=len(scripted.CHAIN) - 20,
                             fault=EngineError("the server is shutting down"))
    service = scripted.service(scripted.Engine(script))
    with serving(service, ApiConfig(), grace_s=0.1) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="tiny", messages=QUESTION, stream=True
            )
            next(chunk for chunk in stream if chunk.choices[0].delta.content)
            server.loop.call_soon_threadsafe(server.end)
            with pytest.raises(openai.APIError, match="could not answer"):
                list(stream)


def test_a_server_that_does_not_come_up_does_not_say_that_it_is_ready(capsys, monkeypatch):
    async def fails(self, sockets):
        raise OSError("no more sockets")

    monkeypatch.setattr(serve.Server, "serve", fails)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(OSError):
        asyncio.run(serve.Server(*scripted.make(), listener, 0).run())
    assert capsys.readouterr().out == ""


CHILD = """
import sys
import writer
from gtalign_jax import serve
serve.load_player = lambda what, **how: writer.player()
serve.log_to_stderr()
sys.exit(serve.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_sigterm_lets_a_reply_finish_refuses_new_ones_and_ends_with_status_0():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(("tests", pods.PATH)), "SERVE_KEY": "k"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, "--model=writer", "--port=0", "--prompt_tokens=32",
         "--new_tokens=31", "--slots=1", "--api_key_env=SERVE_KEY"],
        cwd=ROOT, env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        url = process.stdout.readline().removeprefix("ready: ").strip()
        assert url.startswith("http://127.0.0.1:"), process.communicate()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            ask = {"model": "writer", "messages": QUESTION}
            # Four choices, one slot: when the first text comes, most of it is still to be done.
            stream = client.chat.completions.create(**ask, n=4, stream=True)
            next(stream)
            process.send_signal(signal.SIGTERM)
            refused = None
            while refused is None:
                try:
                    client.chat.completions.create(**ask)
                except openai.APIError as error:
                    refused = error
            finished = {c.index for chunk in stream for c in chunk.choices if c.finish_reason}
        assert finished == {0, 1, 2, 3}
        assert isinstance(refused, openai.InternalServerError | openai.APIConnectionError)
        assert process.wait(60) == 0
        log = process.stderr.read()
        assert "SIGTERM: ending" in log and "Traceback" not in log
        assert "Why?" not in log and "blue" not in log
    finally:
        process.kill()
        process.communicate()
