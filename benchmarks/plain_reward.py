"""The reward of one completion as one would write it down: one row at a time, no arrays.

The same formulas as `gtalign_jax.reward`, without its batches, arrays and compiled parts; it shares
no code with it. What `benchmarks.reward` holds ours against, in numbers and in seconds. It is no
parser for hostile text.
"""

import ast
import json
import math
import re
from collections import Counter
from typing import Any

from math_verify import parse, verify

KEYS = ("VQ_DA", "VQ_CQ", "VQ_AQ", "DQ_DA", "DQ_CQ", "DQ_AQ")
FOUR_BLOCKS = re.compile(
    r"<thinking>.*?</thinking>\s*<payoff>.*?</payoff>\s*<analyze>.*?</analyze>\s*"
    r"<response>.*?</response>$",
    re.DOTALL | re.MULTILINE,
)
MENTION = re.compile(
    r"(?<![A-Za-z])(?P<cell>(?:VQ|DQ)[ _-]?(?:DA|CQ|AQ))(?![A-Za-z])"
    r"|(?<![A-Za-z])(?P<action>DA|CQ|AQ)(?![A-Za-z])"
    r"|(?P<DA>(?i:direct(?:ly)? answer|answer(?:ing|s)? (?:it |this )?directly))"
    r"|(?P<CQ>(?i:clarif(?:y|ying|ication)))"
    r"|(?P<AQ>(?i:follow-?\s?up))"
)


def reward(
    source: str, truth: str, completion: str, judged: float | None
) -> tuple[float, dict[str, Any]]:
    """(Cobb-Douglas welfare with the solver's consistency, the game's metrics); `judged` is None
    for mathematics."""
    response, analyze = block(completion, "response"), block(completion, "analyze")
    matrix = read_matrix(block(completion, "payoff"))
    pareto = [] if matrix is None else pareto_set(matrix)
    game = {} if matrix is None else solve(matrix, pareto)
    if matrix is None or response is None or analyze is None:
        return 0.0, game
    q_user, q_llm = qualities(source, truth, response, judged)
    prefix = completion.split("<response>", 1)[0]
    user = (1e-4 + 0.5 * q_user + 0.2 * window(len(response.split()), 20, 500)
            + 0.3 * math.exp(-len(prefix) / 500))
    llm = (1e-4 + 0.35 * q_llm + 0.2 * bool(FOUR_BLOCKS.match(completion))
           + 0.2 * matrix_quality(matrix) + 0.2 * consistency(analyze, pareto)
           + 0.05 * window(len(completion.split()), 500, 1000))
    return math.sqrt(user * llm), game


def block(text: str, name: str) -> str | None:
    found = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return found[1].strip() if found else None


def read_matrix(text: str | None) -> dict[str, dict[str, float]] | None:
    if text is None:
        return None
    for curly, straight in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'")):
        text = text.replace(curly, straight)
    try:
        matrix = json.loads(text)
    except ValueError:
        try:
            matrix = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return None
    return matrix if is_matrix(matrix) else None


def is_matrix(matrix: Any) -> bool:
    if not isinstance(matrix, dict) or set(matrix) != set(KEYS):
        return False
    for cell in matrix.values():
        if not isinstance(cell, dict) or set(cell) != {"LLM", "user"}:
            return False
        for value in cell.values():
            if isinstance(value, bool) or not isinstance(value, int | float):
                return False
            if not math.isfinite(value):
                return False
    return True


def qualities(source: str, truth: str, response: str, judged: float | None) -> tuple[float, float]:
    """(for the user, for the model)."""
    if source == "math-hard":
        score = float(same_answer(truth, response))
        return score, score
    if source == "medium":
        return char_bleu(response, truth), min(max(judged / 4, 0.0), 1.0)
    score = min(max(judged, 0.0), 1.0)
    if source == "wildguard":
        safe = 1.0 if score > 0 else 0.0
        return (1.0 if score < 1 else 0.0) if truth == "harmful" else safe, safe
    return score, score


def same_answer(truth: str, response: str) -> bool:
    """Equal strings are equal; the rest is algebra."""
    found = re.findall(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", response)
    answer = found[-1] if found else response
    if re.sub(r"\s", "", answer) == re.sub(r"\s", "", truth):
        return True
    return verify(parse(f"\\boxed{{{truth}}}"), parse(f"\\boxed{{{answer}}}"))


def char_bleu(hypothesis: str, reference: str) -> float:
    log_precision = 0.0
    for order in (1, 2, 3, 4):
        found = Counter(hypothesis[i : i + order] for i in range(len(hypothesis) - order + 1))
        wanted = Counter(reference[i : i + order] for i in range(len(reference) - order + 1))
        matches = sum(min(count, wanted[gram]) for gram, count in found.items())
        if matches == 0:
            return 0.0
        log_precision += math.log(matches / sum(found.values())) / 4
    return math.exp(min(0.0, 1 - len(reference) / len(hypothesis)) + log_precision)


def matrix_quality(matrix: dict[str, dict[str, float]]) -> float:
    points = 0
    for cell in matrix.values():
        llm, user = cell["LLM"], cell["user"]
        points += user != llm
        points += abs(user - llm) / max(abs(user), abs(llm), 1e-8) > 0.1
    return points / 12


def pareto_set(matrix: dict[str, dict[str, float]]) -> list[str]:
    """The cells that no other one dominates."""
    kept = []
    for key in KEYS:
        own, dominated = matrix[key], False
        for other in matrix.values():
            no_worse = all(other[p] >= own[p] - 1e-9 for p in ("LLM", "user"))
            better = any(other[p] > own[p] + 1e-9 for p in ("LLM", "user"))
            dominated = dominated or (no_worse and better)
        if not dominated:
            kept.append(key)
    return kept


def solve(matrix: dict[str, dict[str, float]], pareto: list[str]) -> dict[str, Any]:
    """What the metrics hold about the game: the cell to play, equilibria, dilemma, anarchy."""
    # Rounded, so that 0.1 + 0.2 ties with 0.3.
    total = {key: round(cell["LLM"] + cell["user"], 9) for key, cell in matrix.items()}
    nash = [
        key for key in KEYS
        if all(matrix[key]["LLM"] >= matrix[o]["LLM"] - 1e-9 for o in KEYS if o[:2] == key[:2])
        and all(matrix[key]["user"] >= matrix[o]["user"] - 1e-9 for o in KEYS if o[3:] == key[3:])
    ]
    worst = min((total[key] for key in nash), default=0.0)
    return {
        "recommended": max(pareto, key=lambda k: (total[k], matrix[k]["user"], matrix[k]["LLM"])),
        "nash_count": len(nash), "dilemma": bool(nash) and not set(nash) & set(pareto),
        "price_of_anarchy": max(total.values()) / worst if worst > 0 else math.nan,
    }  # fmt: skip


def consistency(analyze: str, pareto: list[str]) -> float:
    """1 if the last cell or action named lies in the set, 0.5 if an earlier one does."""
    inside = []
    for found in MENTION.finditer(analyze):
        if found["cell"]:
            inside.append(f"{found['cell'][:2]}_{found['cell'][-2:]}" in pareto)
        else:
            action = found["action"] or found.lastgroup
            inside.append(any(key.endswith(action) for key in pareto))
    if inside and inside[-1]:
        return 1.0
    return 0.5 if any(inside) else 0.0


def window(count: int, low: float, high: float) -> float:
    return sigmoid(0.005 * (count - low)) * sigmoid(0.005 * (high - count))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
