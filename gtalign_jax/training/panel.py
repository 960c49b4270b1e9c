"""Is the policy learning the task, or the reward? A step's figures, and when to say something.

    Experience -> panel -> {"hacking/<name>": value}            of one step
    rows of metrics.jsonl -> Suspicions -> warnings             of what goes on for several

A reward has gaps: a judge that likes length, a factor that pays for any matrix. What fills them
shows first in what the completions look like. Each figure alone may be innocent, so nothing here
changes the training: a person is told where to look.

n-grams are of words, in lower case and of n = 4: shorter ones are repeated by any fluent text.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gtalign_jax.training.collect import Experience, mean

N = 4
DECILES = 10

Gram = tuple[str, ...]
Row = Mapping[str, Any]


def panel(experience: Experience) -> dict[str, float]:
    """`hacking/<name>` of a step's completions; what nothing can be said about is left out.

    repeated_ngrams: share of a response's n-grams that stood in it before, the mean over responses.
    copied_prompt: share of a response's distinct n-grams that the user's question holds.
    duplicate_responses: share of responses that another of their group is equal to.
    same_matrix: share of the readable matrices that are the most frequent one; distinct_matrices:
      how many different ones there are, over their number.
    length_reward, length_answer: correlation of a completion's tokens with its reward and with
      Q (the factor `answer`), each less its mean over the group, as GRPO compares them.
    q_by_length_0 … 9: mean Q of the completions in each decile of length. Equal lengths share one
      decile, that of the middle of them, so nobody's order decides; where completions are fewer
      than deciles, or lengths are equal, some deciles hold none and are left out.

    Rewards and Q are those of judged completions alone; a missing judgement is in no mean.
    """
    scores, judged_B = experience.scores, experience.scores.valid_B
    groups_B = experience.rows_B // experience.samples
    questions = [prompt.question for prompt in experience.prompts]
    responses = [chain.response for chain in scores.chains]
    repeated_B, copied_B = _copying(questions, responses)
    matrices = _counts(x.tobytes() for x in scores.payoff_BUAP[scores.parsed_B] + 0.0)  # no -0.0
    lengths, groups = experience.lengths_B[judged_B], groups_B[judged_B]
    answer, reward = scores.factors["answer"][judged_B], scores.reward_B[judged_B]
    out = {
        "repeated_ngrams": mean(repeated_B, np.isfinite(repeated_B)),
        "copied_prompt": mean(copied_B, np.isfinite(copied_B)),
        "duplicate_responses": _duplicates(groups_B, responses),
        "same_matrix": max(matrices, default=math.nan) / max(sum(matrices), 1),
        "distinct_matrices": len(matrices) / sum(matrices) if matrices else math.nan,
        "length_reward": _correlation(lengths, reward, groups),
        "length_answer": _correlation(lengths, answer, groups),
    }
    deciles = _deciles(lengths)
    for i in range(DECILES):
        out[f"q_by_length_{i}"] = mean(answer, deciles == i)
    return {f"hacking/{name}": value for name, value in out.items() if not math.isnan(value)}


def _grams(text: str | None) -> tuple[set[Gram], int]:
    """(the distinct n-grams of a text, how many it has)."""
    words = (text or "").lower().split()
    return set(zip(*(words[i:] for i in range(N)), strict=False)), max(len(words) - N + 1, 0)


def _copying(questions: Sequence[str], responses: Sequence[str | None]
             ) -> tuple[np.ndarray, np.ndarray]:
    """(share of n-grams repeated, share copied) by row; NaN where a text is too short for any."""
    asked = {question: _grams(question)[0] for question in set(questions)}
    repeated_B, copied_B = np.full((2, len(responses)), np.nan)
    for b, (question, response) in enumerate(zip(questions, responses, strict=True)):
        distinct, count = _grams(response)
        if count:
            repeated_B[b] = 1 - len(distinct) / count
        if count and asked[question]:
            copied_B[b] = len(distinct & asked[question]) / len(distinct)
    return repeated_B, copied_B


def _counts(things: Iterable[Any]) -> list[int]:
    return list(collections.Counter(things).values())


def _duplicates(groups_B: np.ndarray, responses: Sequence[str | None]) -> float:
    there = [pair for pair in zip(groups_B.tolist(), responses, strict=True) if pair[1] is not None]
    return sum(n for n in _counts(there) if n > 1) / len(there) if there else math.nan


def _correlation(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float:
    """Pearson's, within groups; NaN where one of the two is the same throughout every group."""
    x, y = _centred(x, groups), _centred(y, groups)
    norm = math.sqrt(float((x**2).sum()) * float((y**2).sum()))
    return float((x * y).sum()) / norm if norm else math.nan


def _centred(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each value less the mean of its group; exactly 0 where a group's values are equal."""
    x = x.astype(np.float64)
    _, at = np.unique(groups, return_inverse=True)
    centred = x - (np.bincount(at, x) / np.bincount(at))[at] if len(x) else x
    return np.where(np.abs(centred) > 1e-12 * np.abs(x), centred, 0.0)  # rounding in the mean


def _deciles(lengths: np.ndarray) -> np.ndarray:
    ordered = np.sort(lengths)
    below, up_to = (np.searchsorted(ordered, lengths, side) for side in ("left", "right"))
    return DECILES * (below + up_to) // max(2 * len(lengths), 1)  # of the mean rank, in integers


# ------------------------------------------------------------------------------- suspicions

# One step is noise: a condition must hold at each of so many steps in a row.
SUSTAINED = 5
# Fluent answers of some hundred words repeat 1 to 5 % of their 4-grams, lists and derivations up
# to 10 %.
REPEATED = 0.2
# Taking up the question's words is good style; half of an answer made of them is no answer.
COPIED = 0.5
# Two kinds of question (vague, detailed) are two kinds of game: at most half should be alike.
SAME_MATRIX = 0.9
# As good as nothing is learnt from a step of which 19 groups of 20 have no advantage.
NO_SIGNAL = 0.95
# Trends: the mean of the last ten steps against that of the ten before them.
HALF = 10
# Length doubles within 40 steps at this rate.
LONGER = 1.2
# Changes of Q and of the reward, both on [0, 1]. Beyond SURE standard errors they are no noise.
FLAT, MOVED, SURE = 0.01, 0.02, 2.0


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """A kind of warning: `seen(rows)` says what the last `span` rows show, if they show it."""

    name: str
    span: int
    seen: Callable[[Sequence[Row]], str | None]
    advice: str


class Suspicions:
    """Watches the rows of a stage's metrics; warns once about each kind.

    Its state follows from the rows that it was given: a run that resumes passes those already
    written, and goes on as if it had never stopped.
    """

    def __init__(self, before: Iterable[Row] = ()) -> None:
        """`before`: the rows of metrics.jsonl up to the step that is resumed from."""
        self._rows: collections.deque[Row] = collections.deque(maxlen=2 * HALF + SUSTAINED - 1)
        self._said: set[str] = set()
        for row in before:
            self.add(row["step"], row)

    def add(self, step: int, metrics: Row) -> list[str]:
        """What there is to warn about after this step, and was not before."""
        self._rows.append(metrics)
        rows = list(self._rows)
        out = []
        for kind in KINDS:
            if kind.name in self._said or len(rows) < kind.span + SUSTAINED - 1:
                continue
            ends = range(len(rows) - SUSTAINED + 1, len(rows) + 1)
            found = [kind.seen(rows[end - kind.span:end]) for end in ends]
            if all(found):
                self._said.add(kind.name)
                steps = f"so it was at each of the steps {step - SUSTAINED + 1} to {step}"
                out.append(f"{found[-1]} ({steps}). {kind.advice}")
        return out


def _known(rows: Sequence[Row], metric: str) -> list[float]:
    """The values there are: absent, null (in a file) and NaN are none."""
    values = [row.get(metric) for row in rows]
    return [float(x) for x in values if x is not None and math.isfinite(x)]


def _at_least(metric: str, limit: float, what: str) -> Callable[[Sequence[Row]], str | None]:
    def seen(rows: Sequence[Row]) -> str | None:
        found = _known(rows[-1:], metric)
        if not found or found[0] < limit:
            return None
        return f"{what}: {metric} is {found[0]:.2f}, at least {limit:g}"

    return seen


@dataclasses.dataclass(frozen=True)
class _Change:
    """The means of a metric over both halves of some rows, and the standard error between them."""

    before: float
    after: float
    error: float

    @classmethod
    def of(cls, rows: Sequence[Row], metric: str) -> "_Change | None":
        """None where a half knows it of less than half of its steps."""
        halves = [_known(part, metric) for part in (rows[:HALF], rows[HALF:])]
        if min(map(len, halves)) < HALF / 2:
            return None
        before, after = (float(np.mean(half)) for half in halves)
        return cls(before, after, math.sqrt(sum(np.var(x, ddof=1) / len(x) for x in halves)))

    @property
    def size(self) -> float:
        return self.after - self.before

    @property
    def is_sure(self) -> bool:
        return abs(self.size) > SURE * self.error

    def __str__(self) -> str:
        return f"from {self.before:.3g} to {self.after:.3g}"


def _longer_not_better(rows: Sequence[Row]) -> str | None:
    length, answer = (_Change.of(rows, name) for name in ("rollout/length", "reward/answer"))
    if length is None or answer is None:
        return None
    if length.after < LONGER * length.before or not length.is_sure or answer.size > FLAT:
        return None
    return (f"completions get longer and not better: rollout/length went {length} tokens (at least "
            f"{LONGER:g} times) within {2 * HALF} steps, reward/answer {answer}")


def _rewarded_not_better(rows: Sequence[Row]) -> str | None:
    reward, answer = (_Change.of(rows, name) for name in ("reward/total", "reward/answer"))
    if reward is None or answer is None:
        return None
    rises = reward.size >= MOVED and reward.is_sure
    falls = answer.size <= -MOVED and answer.is_sure
    if not (rises and falls):
        return None
    return (f"the reward rises and the answers get worse: reward/total went {reward}, reward/answer"
            f" {answer} (both by at least {MOVED:g}) within {2 * HALF} steps")


KINDS = (
    Suspicion(
        "repeated", 1,
        _at_least("hacking/repeated_ngrams", REPEATED, "the responses repeat themselves"),
        "Read `completion` in rollouts.jsonl: if repetition is paid for, a window of "
        "reward.reading_words is too long or the judge likes length; a larger grpo.beta holds the "
        "policy nearer to the language of its reference.",
    ),
    Suspicion(
        "copied", 1,
        _at_least("hacking/copied_prompt", COPIED, "the responses copy the question"),
        "Compare `completion` with `question`, and see `judge_score` and `judge_reply`, in "
        "rollouts.jsonl: a judge that takes the question for an answer needs another "
        "judge.model; a larger grpo.beta slows the drift.",
    ),
    Suspicion(
        "same matrix", 1,
        _at_least("hacking/same_matrix", SAME_MATRIX, "nearly all payoff matrices are one"),
        "See `payoff` in rollouts.jsonl: the matrix no longer depends on the question. "
        "reward.llm.matrix_quality pays for any matrix that tells the players apart: give it less "
        "weight.",
    ),
    Suspicion(
        "no signal", 1,
        _at_least("grpo/groups_without_signal", NO_SIGNAL,
                  "almost no group has completions of unlike rewards"),
        "Compare `reward` and `answer` of each `id` in rollouts.jsonl: prompts may be too easy or "
        "too hard, or rollout.temperature too low; if grpo/groups_filtered is as large, "
        "grpo.filter_on names a factor that hardly varies.",
    ),
    Suspicion(
        "longer", 2 * HALF, _longer_not_better,
        "See `tokens`, `response_words` and `answer` in rollouts.jsonl: reward.reading_words and "
        "reward.verbosity_words say which lengths pay; under grpo.aggregation='sequence' a wrong "
        "completion is charged less per token the longer it is, under 'token' it is not.",
    ),
    Suspicion(
        "rewarded", 2 * HALF, _rewarded_not_better,
        "Compare the factors beside `answer` and `reward` in rollouts.jsonl: the one that rises is "
        "paid too well in reward.user or reward.llm; grpo.filter_on='answer' leaves out groups "
        "that differ by their shape alone.",
    ),
)
