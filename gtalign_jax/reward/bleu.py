"""Character BLEU-4, how close a piece of writing comes to the author's own text.

    BLEU = min(1, e^(1 - |ref| / |hyp|)) * (p1 p2 p3 p4)^(1/4)

with p_n the clipped precision of character n-grams. No smoothing: a text that shares no 4-gram
with the reference scores 0. Knows no task.
"""

import math
from collections import Counter

MAX_ORDER = 4


def char_bleu(hypothesis: str, reference: str) -> float:
    """BLEU-4 over characters of one hypothesis against one reference, in [0, 1]."""
    if not hypothesis or not reference:
        return 0.0
    log_precision = 0.0
    for order in range(1, MAX_ORDER + 1):
        found, wanted = _ngrams(hypothesis, order), _ngrams(reference, order)
        matches = sum(min(count, wanted[gram]) for gram, count in found.items() if gram in wanted)
        if matches == 0:
            return 0.0
        log_precision += math.log(matches / found.total()) / MAX_ORDER
    brevity = min(0.0, 1 - len(reference) / len(hypothesis))
    return math.exp(brevity + log_precision)


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))
