"""Is the answer of a response mathematically equal to the reference? By `math-verify`, in bounds.

Symbolic algebra on a model's text can run for ever (9^9^9^9) and fill the memory, in C code that no
signal interrupts; `math-verify`'s own time-outs are signals and work in a main thread only. So the
algebra runs in worker processes, in their main threads, with limited memory; the caller (any
thread) waits a limited time and ends a worker that exceeds it. Equal strings, and two whole
numbers, need no worker.

A run of this file as a module is such a worker: a JSON line in, a JSON line out, until its input
ends. Knows no task. Deviation from the paper's code: numbers in programmers' notation (4.5e33,
-1./3, np.arcsin) are understood on both sides.
"""

import atexit
import functools
import json
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TIMEOUT_S = 10.0
START_TIMEOUT_S = 120.0
SOFT_TIMEOUT_S = 3  # the library's own, in whole seconds; spares most restarts of a worker
MAX_WORKERS = 4
MAX_CHARS = 10_000  # of a response; the end is kept, as the answer stands there
MEMORY_BYTES = 4 << 30
UNSETTLED = "not settled "  # how the note begins where time or memory ended the comparison

_NUMBER = re.compile(r"(?<![\w.])(\d{1,40}\.?\d{0,40}|\.\d{1,40})[eE]([+-]?\d{1,5})(?![\w.])")
_WHOLE = re.compile(r"\s{0,9}-?\d{1,18}\s{0,9}", re.ASCII)
_BARE_POINT = re.compile(r"(?<=\d)\.(?=\s*[/*)])")
_NUMPY = re.compile(r"\bnp\.(?=(?:arc)?(?:sin|cos|tan|sqrt|exp|log|pi)\b)")
_INVISIBLE = re.compile(r"\\(?:left|right|displaystyle|,|;|!|:)|[\s$]")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}`, braces balanced; None without one."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for position in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : position]
        return None  # the last box never closes, then no earlier one is the final answer
    return None


def same_string(one: str, other: str) -> bool:
    """Equal up to spaces, dollar signs, sizing commands and `\\text{}`."""

    def bare(text: str) -> str:
        return _TEXT.sub(r"\1", _INVISIBLE.sub("", text)).rstrip(".")

    return bare(one) == bare(other) != ""


def as_latex(text: str, in_prose: bool = False) -> str:
    """Programmers' numbers and functions as LaTeX: 4.5e33 is 4.5 times ten to the 33; between
    dollar signs where the text around is prose."""
    text = _NUMBER.sub(r"$\1 \\times 10^{\2}$" if in_prose else r"\1 \\times 10^{\2}", text)
    return _NUMPY.sub(r"\\", _BARE_POINT.sub("", text))


class MathChecker:
    """Up to `workers` processes, started when first needed; safe to call from any thread."""

    def __init__(self, workers: int | None = None, timeout_s: float = TIMEOUT_S):
        self._count = workers or max(1, min(MAX_WORKERS, os.cpu_count() or 1))
        self._timeout_s = timeout_s
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for _ in range(self._count):
            self._idle.put(_Worker())

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float | None, str]]:
        """(score, note) for each (ground truth, response), in order.

        1 equal, 0 not; 0 also where the comparison does not end in time or memory, as the answer
        is to blame. None only where the worker fails for reasons of its own.
        """
        questions = [(truth, *_final_answer(response)) for truth, response in pairs]
        # The samples of a prompt often end in the same answer: it is compared once.
        found = {question: _settled(*question) for question in questions}
        unsettled = [question for question, verdict in found.items() if verdict is None]
        if unsettled:
            with ThreadPoolExecutor(self._count) as pool:
                asked = pool.map(lambda question: self._ask(*question), unsettled)
                found |= zip(unsettled, asked, strict=True)
        return [found[question] for question in questions]

    def close(self) -> None:
        """Ends the worker processes."""
        for worker in [self._idle.get() for _ in range(self._count)]:
            worker.stop()
            self._idle.put(worker)

    def _ask(self, truth: str, answer: str, is_boxed: bool) -> tuple[float | None, str]:
        request = {"truth": truth, "answer": f"\\boxed{{{answer}}}" if is_boxed else answer}
        worker = self._idle.get()
        try:
            return worker.ask(request, self._timeout_s)
        finally:
            self._idle.put(worker)


def _final_answer(response: str) -> tuple[str, bool]:
    """(the content of the last box, True), or (the end of the response, False) without one."""
    response = response[-MAX_CHARS:]
    boxed = last_boxed(response)
    return (response, False) if boxed is None else (boxed, True)


def _settled(truth: str, answer: str, is_boxed: bool) -> tuple[float, str] | None:
    """(score, note) where no algebra is needed."""
    if same_string(truth, answer):
        return 1.0, "same string"
    if not is_boxed and not re.search(r"[\d\\$]", answer):
        return 0.0, "no mathematics in the response"
    if is_boxed and _WHOLE.fullmatch(truth) and _WHOLE.fullmatch(answer):
        if int(truth) != int(answer):
            return 0.0, "another whole number"
    return None


class _Worker:
    """One process and the pipe to it."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._rest = b""

    def ask(self, request: dict[str, str], timeout_s: float) -> tuple[float | None, str]:
        for _ in range(2):  # a worker may have died of the request before
            try:
                self._start()
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                reply = self._read_line(timeout_s)
            except BrokenPipeError:
                self.stop()
                continue
            if reply is None:
                self.stop()
                return 0.0, f"{UNSETTLED}within {timeout_s:g} s: counted as unequal"
            if reply == b"":  # killed, as the system does when memory runs out
                self.stop()
                continue
            answer = json.loads(reply)
            return (None if answer["equal"] is None else float(answer["equal"])), answer["note"]
        return None, "the math worker ended twice without an answer"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
        self._process, self._rest = None, b""

    def _start(self) -> None:
        if self._process is not None:
            return
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path}, bufsize=0,
        )  # fmt: skip
        if self._read_line(START_TIMEOUT_S) != b"ready":
            self.stop()
            raise RuntimeError("the math worker did not start: is math-verify installed?")

    def _read_line(self, timeout_s: float) -> bytes | None:
        """The next line, b"" when the process has ended, None when time is up."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self._process.stdout], [], [], remaining)[0]:
                return None
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                return b""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


_LOCK = threading.Lock()


@functools.cache
def _shared_checker() -> MathChecker:
    checker = MathChecker()
    atexit.register(checker.close)
    return checker


def equivalent(pairs: Sequence[tuple[str, str]]) -> list[tuple[float | None, str]]:
    """`MathChecker` with the processes of this program, (ground truth, response) each."""
    with _LOCK:  # batches are scored by several threads
        checker = _shared_checker()
    return checker(pairs)


def _serve() -> None:
    """A worker: answers requests until its input ends."""
    import logging
    import resource

    import math_verify

    logging.disable(logging.CRITICAL)
    if sys.platform == "linux":  # elsewhere address space is no measure of memory
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_compare(math_verify, request["truth"], request["answer"])), flush=True)


def _compare(math_verify: Any, truth: str, answer: str) -> dict[str, Any]:
    answer = as_latex(answer, in_prose="\\boxed" not in answer and "$" not in answer)
    limit = {"parsing_timeout": SOFT_TIMEOUT_S}
    # The library ends what takes it too long without a word: as unreadable, or as unequal.
    began = time.monotonic()
    is_late = lambda: time.monotonic() - began >= SOFT_TIMEOUT_S  # noqa: E731
    late = {"equal": False, "note": f"{UNSETTLED}in time: counted as unequal"}
    try:
        gold = math_verify.parse(f"\\boxed{{{as_latex(truth)}}}", **limit)
        if not gold:
            unread = {"equal": None, "note": f"the reference {truth[:80]!r} cannot be read"}
            return late if is_late() else unread
        found = math_verify.parse(answer, **limit)
        equal = math_verify.verify(gold, found, timeout_seconds=SOFT_TIMEOUT_S)
    except (MemoryError, RecursionError) as error:
        note = f"{UNSETTLED}for {type(error).__name__}: counted as unequal"
        return {"equal": False, "note": note}
    if not equal and is_late():
        return late
    return {"equal": bool(equal), "note": f"read as {str(found[:1])[:200]}"}


if __name__ == "__main__":
    _serve()
