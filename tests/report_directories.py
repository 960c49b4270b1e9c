"""Directories as runs and evaluations leave them, of a few completions whose sums are known."""

import json
from pathlib import Path
from typing import Any

from gtalign_jax.game.chain import KEYS

PAYOFF = {key: {"LLM": i, "user": 5 - i} for i, key in enumerate(KEYS)}
HOSTILE = (
    "</script></style></pre><img src=x onerror=alert(1)>\u2028{{ 7 * 7 }}\ud800\x00"
    "<b onclick='x'>&amp;"
)

# id, source, request, before: (user, LLM welfare, response), after
PROMPTS = (
    ("p0", "builtin-ambiguity", "ambiguous", (0.25, 0.25, "answer"), (0.81, 0.81, "ask")),
    ("p1", "builtin-ambiguity", "definite", (0.36, 0.36, "answer"), (0.64, 0.64, "answer")),
    ("p2", "builtin-safety", "harmful", (0.64, 0.64, "constructive"), (0.16, 0.16, "answer")),
    ("p3", "builtin-safety", "harmless", (0.25, 0.25, "refuse"), (0.49, 0.49, "answer")),
)
GRADES = {"constructive": 0.5, "refuse": 1.0, "answer": 0.0, "ask": 1.0}
CONFIG = {
    "seed": 0, "stages": ["sft", "grpo", "evaluate"],
    "model": {"path": "", "family": "qwen3", "num_layers": 2, "d_model": 64},
    "sft": {"steps": 2}, "grpo": {"steps": 3, "prompts_per_step": 2, "samples_per_prompt": 2},
    "reward": {"welfare": "cobb_douglas", "math": "equivalence"},
    "judge": {"kind": "http", "base_url": "http://<redacted>@host/v1"},
}
INFO = {"git": "0" * 40, "packages": {"jax": "0.10.2"},
        "devices": {"count": 8, "kind": "TPU v4", "processes": 2}}


def completion(id: str, source: str, request: str, side: tuple, **changed: Any) -> dict[str, Any]:
    """A row as training.collect.log_rows writes it."""
    user, llm, response = side
    row = {
        "id": id, "data_source": source, "sample": 0, "prompt": [], "question": f"Question {id}?",
        "ground_truth": f"truth of {id}",
        "completion": "<thinking>t</thinking><payoff>" + json.dumps(PAYOFF) + "</payoff>"
                      f"<analyze>DQ_AQ</analyze><response>{response} {id}</response>",
        "tokens": 40, "reasoning_tokens": 30, "response_tokens": 10, "response_words": 2,
        "stopped": True, "logp": -1.0, "valid": True, "reward": (user * llm) ** 0.5,
        "user_welfare": user, "llm_welfare": llm, "answer": user, "q_user": user, "q_llm": llm,
        "reading": 0.5, "latency": 0.5, "format": 1.0, "matrix_quality": 1.0, "verbosity": 0.1,
        "consistency": 1.0, "request_kind": request, "response_kind": response,
        "right_action": True, "payoff": PAYOFF, "chain_error": None,
        "pareto_set": ["VQ_DA", "DQ_AQ"], "recommended": "DQ_AQ", "dilemma": 0.0,
        "nash_count": 1.0, "price_of_anarchy": 1.5, "judge_score": GRADES[response],
        "judge_reply": "I think. <verdict>1</verdict>", "judge_error": None,
        "consistency_reply": None, "consistency_error": None,
    }
    return {**row, **changed}


def unjudged(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "valid": False, "reward": 0.0, "user_welfare": 0.0, "llm_welfare": 0.0,
            "judge_score": None, "judge_reply": "", "judge_error": "no answer in 120 s"}


def evaluation(label: str, after: bool) -> list[dict[str, Any]]:
    """The four prompts as they were answered before or after."""
    return [
        {"label": label, **completion(id, source, request, last if after else first)}
        for id, source, request, first, last in PROMPTS
    ]


def rollouts(steps: int) -> list[dict[str, Any]]:
    """Two prompts with two completions a step, the first of them not judged."""
    found = []
    for step in range(1, steps + 1):
        for id, source, request, first, _ in PROMPTS[:2]:
            for sample in range(2):
                row = completion(f"t{step}{id}", source, request, first, sample=sample)
                if (step, id, sample) == (1, "p0", 0):
                    row = unjudged(row)
                found.append({"stage": "grpo", "step": step, **row})
    return found


def metrics(sft: int, grpo: int) -> list[dict[str, Any]]:
    """Cold start steps of 60 s, GRPO steps of 560 s of which 400 are the rollout's."""
    rows = [{"stage": "sft", "step": s + 1, "sft/loss": 2.0 - s, "sft/tokens": 500.0,
             "time/update": 50.0, "time/step": 60.0} for s in range(sft)]
    return rows + [{
        "stage": "grpo", "step": s + 1, "grpo/kl": 0.01 * s, "grpo/entropy": 1.0,
        "reward/total": 0.3, "welfare/user": 0.3, "welfare/llm": 0.3, "reward/format": 1.0,
        "reward/right_action": 1.0, "rollout/length": 40.0, "grpo/loss": None,
        "time/rollout": 400.0, "time/update": 100.0, "time/step": 560.0,
    } for s in range(grpo)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def finished_run(directory: Path, **changed: Any) -> Path:
    """A run with all its files; `after_0`, a dict, changes the first completion after GRPO."""
    directory.mkdir(exist_ok=True)
    after = evaluation("after GRPO", after=True)
    after[0] |= changed.get("after_0", {})
    write_rows(directory / "evaluations.jsonl", [
        *after,  # as a resumed run may leave them, in another order
        *evaluation("before cold start", after=False),
        *evaluation("after cold start", after=False),
        *evaluation("step 2", after=False),
    ])
    write_rows(directory / "rollouts.jsonl", rollouts(3))
    write_rows(directory / "metrics.jsonl", metrics(2, 3))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "run_info.json").write_text(json.dumps(INFO))
    return directory
