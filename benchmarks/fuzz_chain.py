"""Hostile completions for the chain parser: millions of them, from a seed.

    python -m benchmarks.fuzz_chain [--strings=1000000 --seed=0]

Each is a valid chain that has been spoilt one to a few times (or no chain at all): deep nesting, up
to a megabyte of brackets or tags, NaN and 1e999, numbers of thousands of digits, repeated keys,
comments, escapes, lone halves of surrogate pairs, null bytes, look-alikes, half a tag. Checked for
every one: nothing is raised, every field has its type, no number is infinite or NaN, what the
matrix says is what the array holds, and time and memory stay within what the length allows.

One line of JSON; the status is 1 where any check failed, with the strings (as Python writes them)
on standard error. `--seed` and the number of a string make the same string again.
"""

import argparse
import json
import math
import random
import resource
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from gtalign_jax.game import chain
from gtalign_jax.game.chain import BLOCKS, KEYS, PLAYERS

MEGABYTE = 1 << 20
# What one string may cost: seconds of the processor, for any and per character, and bytes above
# what is held before, for any and per character (of up to four bytes, copied a few times).
MAX_S, MAX_S_PER_CHAR = 0.02, 0.2e-6
MAX_BYTES, MAX_BYTES_PER_CHAR = 8 * MEGABYTE, 40
TRACED = 200  # every so many strings memory is traced too; tracing is slow

NUMBERS = (
    "NaN", "-NaN", "Infinity", "-Infinity", "inf", "nan", "1e999", "-1e999", "1e-999", "1E+400",
    "9" * 309, "9" * 400, "-" + "9" * 4300, "9" * 4301, "1" * 9000, "0x10", "0b1", "1_000", "١٢",
    "１", "²", "½", "1e", "1e+", "1.e1", ".5", "-.5", "+1", "- 1", "--1", "01", "-0", "1j", "1+1",
    "2**99", "1e308", "1.8e308", "5e-324", "true", "True", "null", "None", "[]", "{}", '"1"', "''",
    "__import__('os')", "[" * 30, "{" * 30, '{"LLM": 1, "user": 1}', "1" + "0" * 308,
)  # fmt: skip
SCRAPS = (
    "{", "}", "[", "]", "(", ")", '"', "'", ":", ",", "#", "\\", "/", "/*", "*/", "//", "\n", "\r",
    "\t", " ", "\x00", "\x0b", "\x85", "\u2028", "\ufeff", "\ud800", "\udfff", "\U0001f600", "“",
    "”", "‘", "’", "\\u0000", "\\ud800", "\\x41", "\\N{DIGIT ONE}", "&lt;", "<!--", "-->", "```",
    "```json\n", "<", ">", "</", "<payoff", "payoff>", "</payoff", "＜payoff＞", "<PAYOFF>",
    "<payoff >", "< payoff>", "<|im_end|>", "e", "-", "+", ".", "\u200b", "\u0130", "ß", "é", "%s",
    "{0}", "$1", "\\1", "(?", "*" * 9,
)  # fmt: skip
TAGS = tuple(f"<{slash}{name}>" for name in BLOCKS for slash in ("", "/"))
KEY_WORDS = (*KEYS, *PLAYERS, "VQ_DA ", "vq_da", "VQ_XX", "", "__class__", "llm", "User", "\ud800")


def hostile(draw: random.Random) -> str:
    """One string."""
    text = _chain(draw)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3, 5))):
        text = draw.choice(_MUTATIONS)(draw, text)
    return text


def _chain(draw: random.Random) -> str:
    style = draw.random()
    if style < 0.05:
        return "".join(draw.choices((*SCRAPS, *TAGS, *NUMBERS), k=draw.randint(0, 60)))
    if style < 0.1:
        return "".join(map(chr, draw.choices(range(0x110000), k=draw.randint(0, 80))))
    cells = {key: {player: draw.choice((0, -1, 2.5, 4, 1e-9, -3e5)) for player in PLAYERS}
             for key in draw.sample(KEYS, 6)}
    block = str(cells) if style < 0.4 else json.dumps(cells, indent=draw.choice((None, None, 1)))
    return (f"<thinking>a b</thinking>{draw.choice(('', chr(10)))}<payoff>{block}</payoff>"
            "<analyze>So DQ_CQ.</analyze><response>Which one?</response>")


def _at(draw: random.Random, text: str, piece: str) -> str:
    at = draw.randint(0, len(text))
    return text[:at] + piece + text[at:]


def _insert(draw: random.Random, text: str) -> str:
    return _at(draw, text, draw.choice((*SCRAPS, *TAGS, *NUMBERS)))


def _repeat(draw: random.Random, text: str) -> str:
    """A scrap many times over: mostly tens, sometimes as long as the parser reads, rarely more."""
    piece = draw.choice((*SCRAPS, *TAGS, '{"a":', "{'a':", "[[", '"VQ_DA": ', "1,", " \n#", "9"))
    chars = draw.choices((60, 2_000, 19_000, 21_000, MEGABYTE), (700, 200, 60, 30, 1))[0]
    return _at(draw, text, piece * (draw.randint(1, chars) // len(piece) + 1))


def _repeat_inside(draw: random.Random, text: str) -> str:
    """The same right behind `<payoff>`, where it is parsed."""
    head, tag, rest = text.partition("<payoff>")
    return head + tag + _repeat(draw, "") + draw.choice((rest, "</payoff>" + rest))


def _delete(draw: random.Random, text: str) -> str:
    at = draw.randint(0, len(text))
    return text[:at] + text[at + draw.randint(1, 12) :]


def _cut(draw: random.Random, text: str) -> str:
    return text[: draw.randint(0, len(text))]


def _number(draw: random.Random, text: str) -> str:
    """Another value for some number of the matrix."""
    places = [i for i, character in enumerate(text) if character == ":"]
    if not places:
        return text
    at = draw.choice(places) + 1
    end = min((i for i in (text.find(",", at), text.find("}", at)) if i >= 0), default=at)
    return f"{text[:at]} {draw.choice(NUMBERS)}{text[end:]}"


def _key(draw: random.Random, text: str) -> str:
    """A key for another, which makes it a double or an unknown one."""
    return text.replace(draw.choice(KEY_WORDS[:8]), draw.choice(KEY_WORDS), draw.choice((1, -1)))


def _quotes(draw: random.Random, text: str) -> str:
    old, new = draw.choice((('"', "“"), ('"', "'"), ("'", '"'), ('"', "”"), ("'", "‘"), ('"', "")))
    return text.replace(old, new, draw.choice((1, 2, -1)))


def _tags(draw: random.Random, text: str) -> str:
    return text.replace(draw.choice(TAGS), draw.choice((*TAGS, "", "<", "</")), 1)


def _doubled(draw: random.Random, text: str) -> str:
    """Some part of the text again, somewhere."""
    at = draw.randint(0, len(text))
    return _at(draw, text, text[at : at + draw.randint(1, 400)][:5_000])


def _escaped(draw: random.Random, text: str) -> str:
    """Characters as JSON writes them when it must."""
    at = draw.randint(0, len(text))
    part = text[at : at + draw.randint(1, 30)]
    return text[:at] + "".join(f"\\u{ord(c) & 0xFFFF:04x}" for c in part) + text[at + len(part) :]


def _commented(draw: random.Random, text: str) -> str:
    comment = draw.choice((" # why\n", " // why\n", "/* why */", "#" * 90 + "\n", "<!-- -->"))
    return text.replace(",", f",{comment}", draw.choice((1, -1)))


_MUTATIONS: tuple[Callable[[random.Random, str], str], ...] = (
    _insert, _insert, _repeat, _repeat_inside, _delete, _cut, _number, _number, _key, _quotes,
    _tags, _doubled, _escaped, _commented,
)  # fmt: skip


def wrong(text: str, found: chain.Chain) -> str | None:
    """What is wrong with the parse of a text; None where nothing is."""
    for name in ("thinking", "analyze", "response", "error"):
        if not isinstance(getattr(found, name), str | None):
            return f"{name} is a {type(getattr(found, name)).__name__}"
    if not isinstance(found.prefix, str) or not isinstance(found.format_ok, bool):
        return "prefix or format_ok has not its type"
    if found.error is not None and not found.error.isprintable():
        return "the error cannot be shown"  # half a surrogate pair would end the one who logs it
    if found.error is None and (found.payoff is None or found.response is None):
        return "no error, and yet something is missing"
    if found.format_ok and (found.payoff is None or not text.startswith("<thinking>")):
        return "the format is called right"
    if (found.payoff is None) != (found.payoff_UAP is None):
        return "only one of payoff and payoff_UAP"
    return None if found.payoff is None else _wrong_matrix(found.payoff, found.payoff_UAP)


def _wrong_matrix(payoff: Any, payoff_UAP: Any) -> str | None:
    if type(payoff) is not dict or set(payoff) != set(KEYS):
        return "payoff has not the six keys"
    for cell in payoff.values():
        if type(cell) is not dict or set(cell) != set(PLAYERS):
            return "a cell has not the two players"
        for value in cell.values():
            if type(value) not in (int, float) or not math.isfinite(value):
                return f"{value!r} is no finite number"
    if payoff_UAP.shape != (2, 3, 2) or payoff_UAP.dtype != np.float64:
        return "payoff_UAP has not its shape"
    if not np.isfinite(payoff_UAP).all():
        return "payoff_UAP is not finite"
    written = [float(payoff[key][player]) for key in KEYS for player in PLAYERS]
    return None if payoff_UAP.reshape(-1).tolist() == written else "payoff_UAP is another matrix"


def parse_traced(text: str) -> tuple[chain.Chain, int]:
    """(the chain, the most bytes that parsing held at a time)."""
    tracemalloc.start()
    try:
        found = chain.parse(text)
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def fuzz(strings: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """(the summary, what was wrong)."""
    outcomes, problems, chars, longest, slowest, most_bytes = Counter(), [], 0, 0, (0.0, 0), 0
    began = time.process_time()
    for number in range(strings):
        text = hostile(random.Random(f"{seed} {number}"))
        chars, longest = chars + len(text), max(longest, len(text))
        started = time.process_time()
        try:
            found = chain.parse(text)
        except Exception as error:  # whatever it is: that is what is looked for
            problems.append(f"string {number}: {error!r}")
            continue
        spent = time.process_time() - started
        slowest = max(slowest, (spent, len(text)))
        problem = wrong(text, found)
        if spent > MAX_S + MAX_S_PER_CHAR * len(text):
            problem = problem or _slow(text)
        if number % TRACED == 0 or len(text) > MEGABYTE // 2:
            held = parse_traced(text)[1]
            most_bytes = max(most_bytes, held)
            if held > MAX_BYTES + MAX_BYTES_PER_CHAR * len(text):
                problem = problem or f"{held} bytes for {len(text)} characters"
        if problem:
            problems.append(f"string {number}: {problem}: {text[:200]!r}")
        outcomes[_outcome(found)] += 1
    return {
        "program": "fuzz_chain", "strings": strings, "seed": seed, "problems": len(problems),
        "characters": chars, "longest": longest, "outcomes": dict(outcomes.most_common()),
        "slowest_s": round(slowest[0], 5), "slowest_characters": slowest[1],
        "most_bytes_of_a_string": most_bytes,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "cpu_seconds": round(time.process_time() - began, 1),
    }, problems  # fmt: skip


def _slow(text: str) -> str | None:
    """Too slow even at the best of three more: a garbage collection is not the parser's doing."""
    spent = []
    for _ in range(3):
        started = time.process_time()
        chain.parse(text)
        spent.append(time.process_time() - started)
    if min(spent) <= MAX_S + MAX_S_PER_CHAR * len(text):
        return None
    return f"{min(spent):.3f} s for {len(text)} characters"


def _outcome(found: chain.Chain) -> str:
    """A short name of what the parser made of a string."""
    if found.error is None:
        return "well formed" if found.format_ok else "readable"
    return " ".join(word for word in found.error.split()[:6] if word.isalpha())


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strings", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    summary, problems = fuzz(args.strings, args.seed)
    print(json.dumps(summary), flush=True)
    for problem in problems[:100]:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
