"""A judge's server that none of us wrote: `transformers serve` with a tiny random Qwen2.

The model lies in a cache as the hub's client makes it, so that the server finds it by its name and
lists it. What it says is nonsense of a few tokens. Needs torch.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.reward import tasks

NAME = "tests/random-judge"
COMMIT = "0" * 40
START_S = 180.0


@dataclass(frozen=True)
class Foreign:
    """A running server: its address, the name of its model, and where it logs to."""

    url: str
    model: str
    log: Path


def make_model(cache: Path) -> None:
    """A model with a tokenizer and a chat template, in the cache of the hub's client."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    repo = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (snapshot, repo / "refs", repo / "blobs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    corpus = [task.rubric for task in tasks.TASKS.values()]
    tokenizer = train_tokenizer(corpus, 512, snapshot, chain_pieces=False)
    size = -(-len(tokenizer) // 64) * 64
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ))
    # All tokens are about equally likely: with every fourth an end, most replies are short, and
    # with a few tokens allowed the others are cut.
    ends = list(range(0, size, 4))
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0, do_sample=True)
    model.save_pretrained(snapshot)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Foreign]:
    """`transformers serve` on a free port of loopback, until it is no longer needed."""
    cache, log = folder / "hub", folder / "serve.log"
    if not cache.exists():
        make_model(cache)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What tests start is told to have no torch (conftest.py); this server lives on it.
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
             if path and not path.endswith("torch_free")]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-c", "from transformers.cli.transformers import app; app()",
               "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
               "--default-seed", "0"]
    with log.open("wb") as out:
        child = subprocess.Popen(command, env=variables, stdout=out, stderr=out)
    try:
        _wait(child, f"http://127.0.0.1:{port}/health", log)
        yield Foreign(f"http://127.0.0.1:{port}/v1", NAME, log)
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait(child: subprocess.Popen, url: str, log: Path) -> None:
    over = time.monotonic() + START_S
    while time.monotonic() < over and child.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"transformers serve did not start:\n{log.read_text()[-3000:]}")
