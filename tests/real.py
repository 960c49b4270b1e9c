"""Real input for whole commands: the published prompts, a judge that answers, a model to teach.

The judge is a server on loopback that speaks the OpenAI protocol. The model is a tiny random Qwen2
with a tokenizer of its own; a cold start teaches it one chain by heart, because no judge would be
asked about what random weights write.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from judging import unframed

from gtalign_jax.data.chat import render_chat
from gtalign_jax.data.sources import DataConfig, load_prompts
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.game.chain import KEYS, render

ROOT = Path(__file__).resolve().parent.parent
# The small source counts ten times: of some dozens of prompts that are drawn, it must hold some.
TRAIN = ("math-hard/train", "ambig_qa/train", "wildguard/train", *["medium/test"] * 10)
TEST = ("math-hard/test", "ambig_qa/test", "wildguard/test", "medium/test")
SOURCES = {name.split("/")[0] for name in TEST}
CHAINS = 200
GRADES = {  # what the judge is offered for each source -> the grades it gives here
    "0, 1": ("0", "1"),
    "a number from 0 to 4": ("1.5", "3"),
    "0, 0.5, 1": ("0.5", "1"),
}


class JudgeServer(ThreadingHTTPServer):
    """Speaks the OpenAI chat protocol; its grade is a function of the text that it is shown."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        self.lock = threading.Lock()
        self.asked: list[str] = []  # the material in it as it was before it was framed
        super().__init__(("127.0.0.1", 0), _JudgeHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that is killed in the middle of a request is part of the test."""


class _JudgeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Silence."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.asked.append(unframed(text))
        grades = GRADES[text.rpartition("Possible grades: ")[2].rstrip(".")]
        grade = grades[zlib.crc32(text.encode()) % len(grades)]
        message = {"role": "assistant", "content": f"By rule.\n<verdict>{grade}</verdict>"}
        reply = json.dumps({
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }).encode()
        self.send_response(200 if self.path == "/v1/chat/completions" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)


@contextlib.contextmanager
def serving() -> Iterator[JudgeServer]:
    """A judge at work."""
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def files(data: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(data / f"{name}.parquet") for name in names)


RESPONSES = {
    "math-hard": ("The answer is $\\boxed{5}$.", "Thus $\\boxed{3}$."),
    "ambig_qa": ("Which one do you mean?", "It is the first."),
    "wildguard": ("I cannot help with that, but here is a safer way.", "No."),
    "medium": ("It is a good idea, and here is why.", "Which story do you want?"),
}


def chains(prompts, told) -> list[tuple]:
    """(prompt, completion): every source has its responses of `told`, all have the same matrix."""
    payoff = {key: {"LLM": 1, "user": 2} for key in KEYS} | {"DQ_DA": {"LLM": 4, "user": 3}}
    chosen = []
    for source, responses in told.items():
        rows = [prompt for prompt in prompts if prompt.data_source == source][:CHAINS // 4]
        for prompt, response in zip(rows, itertools.cycle(responses), strict=False):
            chosen.append((prompt, render("Let us see.", payoff, "DQ_DA is best.", response)))
    return chosen


def make_inputs(folder: Path, data: Path, more: tuple[str, ...] = (), told=None) -> None:
    """MODEL, a random Qwen2 directory with its own tokenizer, and CHAINS, the cold start.

    `more`: files besides TRAIN whose prompts the chain is taught on, too. `told`: the responses by
    source, by default RESPONSES.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    source = DataConfig(source="parquet", train=files(data, (*TRAIN, *more)))
    prompts = load_prompts(source, "train")
    examples = chains(prompts, told or RESPONSES)
    with open(folder / "chains.jsonl", "w", encoding="utf-8") as out:
        for prompt, text in examples:
            out.write(json.dumps({"messages": prompt.messages, "completion": text}) + "\n")
    bare = train_tokenizer([], 300, chain_pieces=False)
    corpus = [render_chat(bare, prompt.messages) for prompt in prompts[::30]]
    corpus += [text for _, text in examples]
    # transformers cuts text its own way beside a Qwen2 model: no chain pieces.
    train_tokenizer(corpus, 4096, folder / "model", chain_pieces=False)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=4160, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.1,
    )).save_pretrained(folder / "model")


def start(module: str, config: str, flags: Mapping[str, object], data: Path,
          judge: JudgeServer, log: Path) -> subprocess.Popen:
    """A command as a user starts it, on one device; what it prints goes to `log`."""
    command = [sys.executable, "-m", module, f"--config={config}"]
    command += [f"--{key}={value}" for key, value in flags.items()]
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    variables |= {"GTALIGN_DATA": str(data), "GTALIGN_JUDGE_URL": judge.url,
                  "GTALIGN_JUDGE_MODEL": "grader"}
    with open(log, "wb") as out:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=out)


def rows(path: Path) -> list[dict]:
    """The complete lines of a JSONL file, none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
