"""Character BLEU-4, how close a piece of writing comes to the author's own text.

    BLEU = min(1, e^(1 - |ref| / |hyp|)) * (p1 p2 p3 p4)^(1/4)

with p_n the clipped precision of character n-grams. No smoothing: a text that shares no 4-gram
with the reference scores 0. Knows no task.

An n-gram is written as one number of n digits of 16 bits, each a code point plus one: those of all
orders are counted in one sort, and a shorter one is always the smaller number.
"""

import functools
import math

import numpy as np

MAX_ORDER = 4
_DIGIT_BITS = 64 // MAX_ORDER
_LARGEST = (1 << _DIGIT_BITS) - 2  # code point that is a digit; 0 stays free
# Below the n-grams of each order and above those of the one before.
_SMALLEST = np.array([0, *(1 << _DIGIT_BITS * n for n in range(1, MAX_ORDER))], np.uint64)


def char_bleu(hypothesis: str, reference: str) -> float:
    """BLEU-4 over characters of one hypothesis against one reference, in [0, 1]."""
    if min(len(hypothesis), len(reference)) < MAX_ORDER:
        return 0.0
    if not (_fits(hypothesis) and _fits(reference)):
        hypothesis, reference = _renumbered(hypothesis, reference)
    found, counts = _ngrams(hypothesis)
    wanted, limits = _reference_ngrams(reference)
    place = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
    matched = np.where(wanted[place] == found, np.minimum(counts, limits[place]), 0)
    log_precision = 0.0
    by_order = np.add.reduceat(matched, np.searchsorted(found, _SMALLEST))
    for order, matches in enumerate(by_order.tolist()):
        if matches == 0:
            return 0.0
        log_precision += math.log(matches / (len(hypothesis) - order)) / MAX_ORDER
    brevity = min(0.0, 1 - len(reference) / len(hypothesis))
    return math.exp(brevity + log_precision)


def _ngrams(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(n-grams of all orders as numbers, ascending, and how often each occurs)."""
    digits = _code_points(text).astype(np.uint64) + np.uint64(1)
    grams = [digits]
    for order in range(1, MAX_ORDER):
        grams.append((grams[-1][:-1] << np.uint64(_DIGIT_BITS)) | digits[order:])
    ordered = np.sort(np.concatenate(grams))  # np.unique does the same, and takes longer
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts = np.concatenate(([0], changes))
    return ordered[starts], np.concatenate((changes, [len(ordered)])) - starts


# The samples of a prompt share a reference, and come one after the other.
_reference_ngrams = functools.lru_cache(maxsize=32)(_ngrams)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _fits(text: str) -> bool:
    return text.isascii() or _code_points(text).max() <= _LARGEST


def _renumbered(*texts: str) -> list[str]:
    """The texts with their own characters numbered from 0, where some do not fit into a digit.

    Of more than 65,535 different characters, more than any language has, the last count as one.
    """
    alphabet = sorted(set().union(*texts))
    numbers = {ord(character): min(i, _LARGEST) for i, character in enumerate(alphabet)}
    return [text.translate(numbers) for text in texts]
