"""The main job on real input: `main` with the paper's config, scaled down, on the four sources.

Nothing is mocked. A Hugging Face directory goes in; real prompts of ~1,000 tokens are answered;
math-verify and a judge on loopback that speaks the OpenAI protocol score; the run is killed and
continued; transformers reads what comes out. Only the size is small. The weights are random, so a
cold start first teaches one chain by heart: without it no completion would be readable, and no
judge would ever be asked.

The same by hand, with MODEL a small Hugging Face directory (chat template included), CHAINS a JSONL
file of {"messages", "completion"} and a judge that serves at URL:

    export GTALIGN_DATA=../shared/data GTALIGN_JUDGE_URL=URL GTALIGN_JUDGE_MODEL=NAME
    python -m gtalign_jax.main --config=configs/tpu_v4.py:all --config.workdir=runs/real \\
        --config.stages="('sft','grpo','evaluate','export')" --config.sft.examples=CHAINS \\
        --config.model.path=MODEL --config.model.compute_dtype=float32 \\
        --config.data.train_size=24 --config.data.test_size=16 \\
        --config.data.max_prompt_tokens=1200 --config.sft.steps=80 --config.sft.batch_size=4 \\
        --config.sft.micro_batch_size=0 --config.sft.learning_rate=1e-2 \\
        --config.sft.decay=cosine --config.sft.warmup_updates=5 \\
        --config.grpo.steps=3 --config.grpo.prompts_per_step=4 --config.grpo.samples_per_prompt=4 \\
        --config.grpo.micro_batch_prompts=2 --config.grpo.learning_rate=1e-4 \\
        --config.rollout.max_new_tokens=160 --config.rollout.micro_batch_prompts=0 \\
        --config.evaluate.batch_size=8 --config.checkpoint.every=1 --config.mesh.tensor=1

The published data have no medium/train.parquet: the test adds `--config.data.train=…` with the
test prompts of that source in its place.
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gtalign_jax.data.chat import render_chat
from gtalign_jax.data.sources import DataConfig, load_prompts
from gtalign_jax.data.tokenizer import train_tokenizer
from gtalign_jax.game import chain as chain_lib
from gtalign_jax.game.chain import KEYS, render
from gtalign_jax.reward import math_equal
from gtalign_jax.reward.factors import NAMES as FACTORS
from gtalign_jax.training import plots

ROOT = Path(__file__).resolve().parent.parent
# The small source counts ten times, as the 24 prompts that are drawn must hold all four.
TRAIN = ("math-hard/train", "ambig_qa/train", "wildguard/train", *["medium/test"] * 10)
TEST = ("math-hard/test", "ambig_qa/test", "wildguard/test", "medium/test")
CHAINS = 200
SOURCES = {name.split("/")[0] for name in TEST}
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
        self.asked: list[str] = []
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
            self.server.asked.append(text)
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


@pytest.fixture
def judge():
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


SETTINGS = {
    "stages": "('sft','grpo','evaluate','export')",
    "model.compute_dtype": "float32",
    "data.train_size": 24, "data.test_size": 16, "data.max_prompt_tokens": 1200,
    "sft.steps": 80, "sft.batch_size": 4, "sft.micro_batch_size": 0,
    "sft.learning_rate": 1e-2, "sft.decay": "cosine", "sft.warmup_updates": 5,
    "grpo.steps": 3, "grpo.prompts_per_step": 4, "grpo.samples_per_prompt": 4,
    "grpo.micro_batch_prompts": 2, "grpo.learning_rate": 1e-4,
    "rollout.max_new_tokens": 160, "rollout.micro_batch_prompts": 0,
    "evaluate.batch_size": 8, "checkpoint.every": 1, "mesh.tensor": 1,
}  # fmt: skip


def files(data: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(data / f"{name}.parquet") for name in names)


RESPONSES = {
    "math-hard": ("The answer is $\\boxed{5}$.", "Thus $\\boxed{3}$."),
    "ambig_qa": ("Which one do you mean?", "It is the first."),
    "wildguard": ("I cannot help with that, but here is a safer way.", "No."),
    "medium": ("It is a good idea, and here is why.", "Which story do you want?"),
}


def chains(prompts) -> list[tuple]:
    """(prompt, completion): every source has two responses, all have the same matrix."""
    payoff = {key: {"LLM": 1, "user": 2} for key in KEYS} | {"DQ_DA": {"LLM": 4, "user": 3}}
    chosen = []
    for source, responses in RESPONSES.items():
        rows = [prompt for prompt in prompts if prompt.data_source == source][:CHAINS // 4]
        for prompt, response in zip(rows, itertools.cycle(responses), strict=False):
            chosen.append((prompt, render("Let us see.", payoff, "DQ_DA is best.", response)))
    return chosen


def make_inputs(folder: Path, data: Path) -> None:
    """MODEL, a random Qwen2 directory with its own tokenizer, and CHAINS, the cold start."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    prompts = load_prompts(DataConfig(source="parquet", train=files(data, TRAIN)), "train")
    examples = chains(prompts)
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


def start(folder: Path, data: Path, judge: JudgeServer, log: Path) -> subprocess.Popen:
    """The run as a user starts it, on one device; what it prints goes to `log`."""
    settings = SETTINGS | {
        "workdir": folder / "run",
        "model.path": folder / "model",
        "sft.examples": folder / "chains.jsonl",
        "data.train": files(data, TRAIN),
    }
    command = [sys.executable, "-m", "gtalign_jax.main", "--config=configs/tpu_v4.py:all"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    variables |= {"GTALIGN_DATA": str(data), "GTALIGN_JUDGE_URL": judge.url,
                  "GTALIGN_JUDGE_MODEL": "grader", "TRANSFORMERS_VERBOSITY": "error",
                  # The second run need not compile again what the first one did.
                  "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    with open(log, "wb") as out:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=out)


def rows(path: Path) -> list[dict]:
    """The complete lines of a JSONL file, none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def steps_of(run: Path, stage: str) -> list[int]:
    return [row["step"] for row in rows(run / "metrics.jsonl") if row["stage"] == stage]


def kill_in_grpo(process: subprocess.Popen, run: Path, log: Path) -> None:
    """SIGKILL as soon as the first GRPO step is saved."""
    deadline = time.monotonic() + 400
    while not (run / "checkpoints" / "grpo" / "1").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert 3 not in steps_of(run, "grpo"), "killed too late to prove anything"


def check_metrics(run: Path) -> None:
    assert steps_of(run, "sft") == list(range(1, 81))
    assert steps_of(run, "grpo") == [1, 2, 3]
    steps = [row for row in rows(run / "metrics.jsonl") if row["stage"] == "grpo"]
    for row in steps:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row
        assert {f"reward/{name}" for name in FACTORS} <= set(row)
        assert row["reward/missing"] == 0
    assert any(row["grpo/grad_norm"] > 0 and row["reward/total"] > 0 for row in steps)
    assert any(row["grpo/groups_without_signal"] < 1 for row in steps)


def check_scores(run: Path, judge: JudgeServer) -> None:
    """Every completion is logged with its factors, and scored by whom its source says."""
    trained, held_out = rows(run / "rollouts.jsonl"), rows(run / "evaluations.jsonl")
    assert len(trained) == 3 * 4 * 4
    final = [row for row in held_out if row["label"] == plots.AFTER]
    assert len(final) == 16
    assert {row["data_source"] for row in trained} == SOURCES
    assert {row["data_source"] for row in final} == SOURCES
    scored = [row for row in (*trained, *held_out) if row["judge_score"] is not None]
    for row in scored:
        assert set(FACTORS) <= set(row) and row["valid"] and row["reward"] > 0
        asked = any(row["question"] in text and f"{chain_lib.parse(row['completion']).response}"
                    in text for text in judge.asked)
        if row["data_source"] == "math-hard":
            assert not asked and "<verdict>" not in row["judge_reply"]
            boxed = math_equal.last_boxed(row["completion"])
            if boxed and row["ground_truth"].isdecimal():
                assert row["judge_score"] == float(boxed == row["ground_truth"])
        else:
            assert asked and f"<verdict>{row['judge_score']:g}</verdict>" in row["judge_reply"]
    assert {row["data_source"] for row in scored} == SOURCES
    offered = {text.rpartition("Possible grades: ")[2].rstrip(".") for text in judge.asked}
    assert offered == set(GRADES)
    results = json.loads((run / "results.json").read_text())
    assert list(results) == [plots.BEFORE, plots.COLD_START, plots.AFTER]
    assert {f"source/{name}" for name in SOURCES} <= set(results[plots.AFTER])
    assert results[plots.BEFORE]["reward/total"] == 0 < results[plots.AFTER]["reward/total"]


def check_export(run: Path) -> None:
    """transformers continues a held-out prompt with the very completion that the run logged."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = next(row for row in rows(run / "evaluations.jsonl")
               if row["label"] == plots.AFTER and row["judge_score"] is not None)
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    model = AutoModelForCausalLM.from_pretrained(run / "hf", dtype="float32").eval()
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=160, do_sample=False)
    text = tokenizer.decode(out[0, prompt.input_ids.shape[1]:], skip_special_tokens=True)
    assert text == row["completion"]


@pytest.mark.slow
@pytest.mark.hf
def test_the_papers_config_runs_on_the_four_real_sources_and_survives_a_kill(
    tmp_path, shared_dir, judge
):
    data, run = shared_dir / "data", tmp_path / "run"
    make_inputs(tmp_path, data)
    killed = start(tmp_path, data, judge, tmp_path / "killed.log")
    try:
        kill_in_grpo(killed, run, tmp_path / "killed.log")
    finally:
        killed.kill()
        killed.wait()
    again = start(tmp_path, data, judge, tmp_path / "again.log")
    try:
        assert again.wait(400) == 0, (tmp_path / "again.log").read_text()
    finally:
        again.kill()
        again.wait()
    said = (tmp_path / "again.log").read_text()
    assert "sft: continuing after step 80" in said and "grpo: continuing after step" in said
    assert "HTTP Request" not in said  # a line for each would bury the steps
    check_metrics(run)
    check_scores(run, judge)
    check_export(run)
