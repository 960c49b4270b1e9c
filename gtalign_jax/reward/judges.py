"""Who measures what no formula can: the contract of judges, the rule judge, the verdict's grammar.

A judge takes requests and returns one Judgement each, in order. It never raises for a request: one
that could not be judged comes back with score None, and that is not a score of 0: the trainer
leaves such a completion out. Knows no welfare.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gtalign_jax.reward import factors, tasks
from gtalign_jax.reward.judge_config import JudgeConfig

# Why a judgement is missing. What was never asked (an unreadable chain) is none of these.
CAUSES = (
    "timeout", "rate_limit", "server", "connection", "rejected", "wrong_model", "unreadable",
    "refused", "truncated", "unparsable", "off_scale", "deadline", "too_long", "not_stored",
    "no_judge", "task_error",
)


class JudgeError(RuntimeError):
    """The judge cannot be worked with: not reached, not understood, or failing too often."""


@dataclass(frozen=True)
class JudgeRequest:
    """One question to a judge.

    Attributes:
      kind: "quality" (is the response good for its task?) or "consistency" (does the analysis
        follow from the matrix?).
      data_source, question, ground_truth, extra: of the prompt.
      response: the text of `<response>`. analyze: the text of `<analyze>`.
      pareto: keys of the Pareto set of the chain's matrix.
      task: how the source is measured; None: the built-in task of its name.
    """

    kind: Literal["quality", "consistency"]
    data_source: str
    question: str
    ground_truth: str
    response: str
    analyze: str = ""
    pareto: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    task: tasks.Task | None = None


@dataclass(frozen=True)
class Judgement:
    """A raw score on the task's scale (None = missing, with `error`) and the words behind it.

    Attributes:
      cause: one of CAUSES where the score is missing, else None.
      components: parts of the score by name, where the task declares some; logged, never weighed.
      attempts: how often a server was asked. seconds: what its last answer took. stored: the
        judgement comes from the store.
    """

    score: float | None
    reply: str = ""
    error: str | None = None
    cause: str | None = None
    components: Mapping[str, float] = field(default_factory=dict)
    attempts: int = 0
    seconds: float = 0.0
    stored: bool = False


def missing(cause: str, error: str, reply: str = "") -> Judgement:
    """No score, and why: one of CAUSES, and words for the user."""
    return Judgement(None, reply, error[:300], cause)


_VERDICT = re.compile(
    r"<verdict>\s{0,9}([+-]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}))\s{0,9}</verdict>"
)

Judge = Callable[[Sequence[JudgeRequest]], list[Judgement]]
Rule = Callable[[JudgeRequest], "float | tasks.Measured"]


def make_judge(cfg: JudgeConfig, rules: Mapping[str, Rule], ask: Judge | None = None) -> Judge:
    """The configured judge. What has a rule is judged by it, unless `kind` is "none" or `rules`
    False: a rule knows its task better than any model, and costs nothing.

    `ask`: the language model that judges the rest; made here for "http" if it is not given.
    """
    if cfg.kind == "none":
        return _nobody
    if cfg.kind == "rule":
        return lambda requests: [_by_rule(request, rules) for request in requests]
    if ask is None:
        from gtalign_jax.reward import http_judge  # the client takes a second to import

        ask = http_judge.HttpJudge(cfg)
    if not cfg.rules:
        return ask
    return lambda requests: _rules_first(requests, rules, ask)


def read_verdict(reply: str, scale: tuple[float, float], grades: tuple[float, ...]) -> Judgement:
    """The last well-formed `<verdict>NUMBER</verdict>` of a reply, after what a reasoning model
    thought aloud (`</think>`).

    Missing, with the reason, when there is none or when it is off the scale (or none of the
    `grades`, where the task has fixed ones): a judge that does not keep to its scale is not
    understood, and half-understood scores must not train anything.
    """
    said = reply.rpartition("</think>")[2]
    if "<think>" in said:
        return missing("truncated", "the reply ends before </think>", reply)
    verdicts = _VERDICT.findall(said)
    if not verdicts:
        return missing("unparsable", "no <verdict>NUMBER</verdict> in the reply", reply)
    score = float(verdicts[-1])
    if grades:  # as they are shown to the judge: 1/3 is "0.333333" there
        score = next((grade for grade in grades if f"{grade:g}" == f"{score:g}"), math.nan)
    if not scale[0] <= score <= scale[1]:
        known = ", ".join(f"{g:g}" for g in grades) or f"{scale[0]:g} to {scale[1]:g}"
        off = f"verdict {verdicts[-1][:20]} is off the scale ({known})"
        return missing("off_scale", off, reply)
    return Judgement(score, reply)


def task_of(request: JudgeRequest) -> tasks.Task:
    """How the source of a request is measured. Raises ValueError for an unknown one."""
    return request.task or tasks.task_of(request.data_source)


def scale_of(request: JudgeRequest) -> tuple[tuple[float, float], tuple[float, ...]]:
    """(scale, grades) that a verdict on this request must keep to."""
    if request.kind == "consistency":
        grades = tasks.CONSISTENCY_GRADES
        return (grades[0], grades[-1]), grades
    task = task_of(request)
    return task.scale, task.grades


def _nobody(requests: Sequence[JudgeRequest]) -> list[Judgement]:
    why = "no judge is configured (judge.kind='none')"
    return [missing("no_judge", why) for _ in requests]


def _rule_of(request: JudgeRequest, rules: Mapping[str, Rule]) -> Rule | None:
    own = None if request.task is None else request.task.rule
    return own or rules.get(request.data_source)


def _by_rule(request: JudgeRequest, rules: Mapping[str, Rule]) -> Judgement:
    if request.kind == "consistency":
        score = factors.consistency_by_solver(request.analyze, request.pareto)
        return Judgement(score, "solver")
    rule = _rule_of(request, rules)
    if rule is None:
        reason = f"no rule judges {request.data_source!r}; judge.kind='http' asks a model"
        return missing("no_judge", reason)
    try:
        measured = tasks.Measured.of(rule(request))
        _check_measured(request, measured)
    except Exception as error:  # a user's rule may raise whatever it likes: one row, not the batch
        return missing("task_error", f"the rule of {request.data_source!r}: {tasks.told(error)}")
    return Judgement(measured.score, "rule", components=measured.components)


def _check_measured(request: JudgeRequest, measured: tasks.Measured) -> None:
    declared = request.task.components if request.task else ()
    if request.task is not None and request.task.rule is not None:
        low, high = request.task.scale
        if not low <= measured.score <= high:
            raise ValueError(f"the score {measured.score:g} is off the scale {low:g} to {high:g}")
    if set(measured.components) != set(declared):
        raise ValueError(f"components {sorted(measured.components)}; declared: {sorted(declared)}")


def _rules_first(
    requests: Sequence[JudgeRequest], rules: Mapping[str, Rule], ask: Judge
) -> list[Judgement]:
    has_rule = [r.kind == "quality" and _rule_of(r, rules) is not None for r in requests]
    asked = iter(ask([r for r, ruled in zip(requests, has_rule, strict=True) if not ruled]))
    return [
        _by_rule(request, rules) if ruled else next(asked)
        for request, ruled in zip(requests, has_rule, strict=True)
    ]
