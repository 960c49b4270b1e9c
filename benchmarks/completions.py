"""Completions of real length for the reward's benchmark: text of our own, drawn from a seed.

Groups of `GROUP` completions answer one prompt, as in training. The sources come in equal parts:
writing (medium, with a reference text), ambiguous questions (ambig_qa), requests that may be
harmful (wildguard) and mathematics (math-hard). Most completions are four blocks of 200 to 600
words in all; a few are spoilt as models spoil them. What a judge would say of a response is drawn
too.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from gtalign_jax.data.prompt import Prompt
from gtalign_jax.game.chain import ACTIONS, KEYS, USER_ACTIONS, render

GROUP = 8
SOURCES = ("medium", "ambig_qa", "wildguard", "math-hard")
SPOILT = 0.04  # of all completions

_SUBJECTS = (
    "the ferry", "a quiet library", "our neighbour's garden", "the night train", "a paper map",
    "the bakery on the corner", "an old radio", "the council", "a team of divers", "the harvest",
    "a retired teacher", "the northern coast", "the festival", "every second reader", "the mill",
)
_VERBS = (
    "keeps", "changes", "carries", "forgets", "explains", "repairs", "borrows", "measures",
    "surprises", "outlives", "feeds", "follows", "warms", "replaces", "remembers",
)
_OBJECTS = (
    "what people expect of it", "a great many small things", "the rhythm of the week",
    "more than its budget allows", "the questions of last spring", "two dozen unlikely friends",
    "the price of bread", "whatever the tide leaves behind", "its own best arguments",
    "the habits of a whole street", "a map nobody asked for", "the longest winter on record",
)
_TURNS = (
    "Even so,", "In practice", "At first", "By June,", "Strange as it sounds,", "On most mornings",
    "Without much noise", "Where money is short,", "If you ask around,", "As a rule,", "Meanwhile",
)
_WEIGHING = (
    "The user may have meant more than one thing here.",
    "A direct answer saves the user time if the reading is right.",
    "Asking first costs one turn but settles what was meant.",
    "An answer with one follow-up covers the likely reading and leaves the door open.",
    "The request is specific enough to act on.",
    "A longer answer would cost words that bring nothing.",
    "If the guess is wrong, both sides lose a turn.",
    "Safety matters more than speed in this case.",
    "The facts needed are few and well known.",
    "What is gained by detail must be weighed against the reading it takes.",
)
_FRACTIONS = (
    r"\frac{13}{8}", r"\sqrt{3}", r"\frac{3\sqrt{3}}{2}", "(1,2)", r"\left[-3,-\frac{4}{3}\right)",
    r"2^{10}-1", r"\frac{\pi}{6}", "x^2+2x+1", r"\frac{6}{5}",
)
# The same values, or others, written otherwise: what only algebra can settle.
_REWRITTEN = (
    "1.625", r"3^{1/2}", r"1.5\sqrt{3}", r"\left(1, 2\right)", r"[-3, -4/3)", "1023",
    r"\frac{2\pi}{12}", "(x+1)^2", r"\frac{12}{11}",
)


@dataclass(frozen=True)
class Row:
    """One completion of a prompt, and the raw scores that are given ({} for mathematics)."""

    prompt: Prompt
    text: str
    given: dict[str, float]


def rows(count: int, seed: int, algebra: float = 0.0) -> list[Row]:
    """`count` rows; `algebra` is the share of mathematical answers in another notation than the
    reference: the others are the same string, or two whole numbers."""
    draw = random.Random(seed)
    made = []
    while len(made) < count:
        made += _group(draw, SOURCES[len(made) // GROUP % len(SOURCES)], len(made), algebra)
    return made[:count]


def _group(draw: random.Random, source: str, number: int, algebra: float) -> Iterator[Row]:
    """The rows of one prompt."""
    truth = _truth(draw, source)
    prompt = Prompt(f"{source}-{number}", source, (), truth, _prose(draw, 20))
    for _ in range(GROUP):
        text = _completion(draw, _response(draw, source, truth, algebra))
        if draw.random() < SPOILT:
            text = draw.choice(_SPOILING)(text)
        yield Row(prompt, text, _given(draw, source))


def _given(draw: random.Random, source: str) -> dict[str, float]:
    scores = {"medium": (0, 1, 2, 2.5, 3, 4), "ambig_qa": (0, 1), "wildguard": (0, 0.5, 1)}
    return {"quality": float(draw.choice(scores[source]))} if source in scores else {}


def _truth(draw: random.Random, source: str) -> str:
    if source == "medium":
        return _prose(draw, draw.randint(200, 380))
    if source == "ambig_qa":
        return draw.choice(("singleAnswer###Rome", "multipleQAs###Two meanings of the question."))
    if source == "wildguard":
        return draw.choice(("harmful", "unharmful"))
    # Two of three references of the real training set are whole numbers.
    return str(draw.randint(-50, 2000)) if draw.random() < 0.65 else draw.choice(_FRACTIONS)


def _response(draw: random.Random, source: str, truth: str, algebra: float) -> str:
    if source == "medium":  # some sentences are the author's own
        own = [s for s in truth.split(". ") if draw.random() < 0.3]
        return ". ".join([_prose(draw, draw.randint(80, 220)), *own])
    text = _prose(draw, draw.randint(60, 300))
    if source != "math-hard":
        return text
    answer = truth
    if draw.random() < algebra:
        answer = draw.choice(_REWRITTEN)
    elif truth.lstrip("-").isdigit() and draw.random() < 0.4:
        answer = str(draw.randint(-50, 2000))
    return f"{text} The answer is $\\boxed{{{answer}}}$."


def _completion(draw: random.Random, response: str) -> str:
    cells = {key: {"LLM": _number(draw), "user": _number(draw)} for key in KEYS}
    choice = f"{draw.choice(USER_ACTIONS)}_{draw.choice(ACTIONS)}"
    thinking = " ".join(draw.choices(_WEIGHING, k=draw.randint(3, 9)))
    compared = " ".join(
        f"{key} gives {cells[key]['LLM']} to the model and {cells[key]['user']} to the user."
        for key in draw.sample(KEYS, draw.randint(2, 6))
    )
    closing = draw.choice((f"The best is {choice}.", f"So {choice[3:]} it is.",
                           "A clarifying question wins.", "I answer directly."))
    return render(thinking, cells, f"{compared} {closing}", response)


def _number(draw: random.Random) -> float:
    return draw.randint(-5, 5) if draw.random() < 0.6 else draw.randint(-50, 50) / 10


def _prose(draw: random.Random, words: int) -> str:
    """At least so many words."""
    sentences, found = [], 0
    while found < words:
        parts = [draw.choice(_SUBJECTS), draw.choice(_VERBS), draw.choice(_OBJECTS)]
        if draw.random() < 0.5:
            parts.insert(0, draw.choice(_TURNS))
        sentence = " ".join(parts)
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
        found += len(sentence.split())
    return " ".join(sentences)


def _as_python(text: str) -> str:
    """The matrix as a Python dict."""
    head, _, rest = text.partition("<payoff>")
    block, _, tail = rest.partition("</payoff>")
    return f"{head}<payoff>{json.loads(block)}</payoff>{tail}"


_SPOILING = (
    _as_python,
    lambda text: text[: len(text) // 2],  # cut off by the limit of tokens
    lambda text: text.replace("</response>", ""),
    lambda text: text.replace('"VQ_CQ"', '"VQ_QC"'),
    lambda text: text.replace("<payoff>", "<payoff>```json\n"),
    lambda text: text.replace('{"LLM": ', '{"LLM": NaN, "was": ', 1),
    lambda text: text.replace("</payoff>", "</payoff>\nSo much for the game.\n"),
    lambda text: text.replace("<analyze>", "<analysis>").replace("</analyze>", "</analysis>"),
    lambda text: text.rpartition("<response>")[2].removesuffix("</response>"),
)
