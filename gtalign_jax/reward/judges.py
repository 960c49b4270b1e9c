"""Who measures what no formula can: the contract of judges, the rule judge, the verdict's grammar.

A judge takes requests and returns one Judgement each, in order. It never raises for a request: one
that could not be judged comes back with score None, and that is not a score of 0: the trainer
leaves such a completion out. Knows no welfare.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gtalign_jax.reward import factors, tasks


@dataclass(frozen=True)
class JudgeRequest:
    """One question to a judge.

    Attributes:
      kind: "quality" (is the response good for its task?) or "consistency" (does the analysis
        follow from the matrix?).
      data_source, question, ground_truth, extra: of the prompt.
      response: the text of `<response>`. analyze: the text of `<analyze>`.
      pareto: keys of the Pareto set of the chain's matrix.
    """

    kind: Literal["quality", "consistency"]
    data_source: str
    question: str
    ground_truth: str
    response: str
    analyze: str = ""
    pareto: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """A raw score on the task's scale (None = missing, with `error`) and the words behind it."""

    score: float | None
    reply: str = ""
    error: str | None = None


_VERDICT = re.compile(
    r"<verdict>\s{0,9}([+-]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}))\s{0,9}</verdict>"
)

Judge = Callable[[Sequence[JudgeRequest]], list[Judgement]]
Rule = Callable[[JudgeRequest], float]


@dataclass(frozen=True)
class JudgeConfig:
    """Which judge, and for "http" how to reach it.

    Attributes:
      kind: "rule" (built-in tasks only), "http" (any OpenAI-compatible server) or "none".
      base_url, model: of the server, such as http://localhost:8000/v1.
      api_key_env: environment variable that holds the key; unset is fine for local servers.
      concurrency: requests in flight. timeout_s: seconds of one attempt, waiting in our own queue
        not counted. retries: attempts after the first, for failures that may pass.
      max_tokens, temperature: of the judge's reply.
    """

    kind: Literal["rule", "http", "none"] = "rule"
    base_url: str = ""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 32
    timeout_s: float = 120.0
    retries: int = 4
    max_tokens: int = 1024
    temperature: float = 0.0

    def __post_init__(self):
        """Refuses what could never work, before anything is compiled or sent."""
        if self.kind not in ("rule", "http", "none"):
            raise ValueError(f"judge.kind={self.kind!r}; allowed: rule, http, none")
        if self.kind == "http":
            for name in ("base_url", "model"):
                if not getattr(self, name):
                    raise ValueError(f"judge.{name} is empty; judge.kind='http' needs it")
        if self.concurrency < 1 or self.retries < 0 or self.timeout_s <= 0 or self.max_tokens < 1:
            raise ValueError(
                f"judge: concurrency={self.concurrency} and max_tokens={self.max_tokens} must be "
                f">= 1, retries={self.retries} >= 0, timeout_s={self.timeout_s} > 0"
            )


def make_judge(cfg: JudgeConfig, rules: Mapping[str, Rule]) -> Judge:
    """The configured judge. Sources that have a rule are judged by it unless `kind` is "none":
    a rule knows the built-in tasks better than any model, and costs nothing."""
    if cfg.kind == "none":
        return _nobody
    if cfg.kind == "rule":
        return lambda requests: [_by_rule(request, rules) for request in requests]
    from gtalign_jax.reward import http_judge  # the client takes a second to import

    ask = http_judge.HttpJudge(cfg)
    return lambda requests: _rules_first(requests, rules, ask)


def read_verdict(reply: str, scale: tuple[float, float], grades: tuple[float, ...]) -> Judgement:
    """The last well-formed `<verdict>NUMBER</verdict>` of a reply.

    Missing, with the reason, when there is none or when it is off the scale (or none of the
    `grades`, where the task has fixed ones): a judge that does not keep to its scale is not
    understood, and half-understood scores must not train anything.
    """
    verdicts = _VERDICT.findall(reply)
    if not verdicts:
        return Judgement(None, reply, "no <verdict>NUMBER</verdict> in the reply")
    score = float(verdicts[-1])
    allowed = score in grades if grades else scale[0] <= score <= scale[1]
    if not allowed:
        known = ", ".join(f"{g:g}" for g in grades) or f"{scale[0]:g} to {scale[1]:g}"
        return Judgement(None, reply, f"verdict {verdicts[-1][:20]} is off the scale ({known})")
    return Judgement(score, reply)


def scale_of(request: JudgeRequest) -> tuple[tuple[float, float], tuple[float, ...]]:
    """(scale, grades) that a verdict on this request must keep to."""
    if request.kind == "consistency":
        grades = tasks.CONSISTENCY_GRADES
        return (grades[0], grades[-1]), grades
    task = tasks.task_of(request.data_source)
    return task.scale, task.grades


def _nobody(requests: Sequence[JudgeRequest]) -> list[Judgement]:
    return [Judgement(None, "", "no judge is configured (judge.kind='none')") for _ in requests]


def _by_rule(request: JudgeRequest, rules: Mapping[str, Rule]) -> Judgement:
    if request.kind == "consistency":
        score = factors.consistency_by_solver(request.analyze, request.pareto)
        return Judgement(score, "solver")
    if request.data_source not in rules:
        reason = f"no rule judges {request.data_source!r}; judge.kind='http' asks a model"
        return Judgement(None, "", reason)
    return Judgement(float(rules[request.data_source](request)), "rule")


def _rules_first(
    requests: Sequence[JudgeRequest], rules: Mapping[str, Rule], ask: Judge
) -> list[Judgement]:
    has_rule = [r.kind == "quality" and r.data_source in rules for r in requests]
    asked = iter(ask([r for r, ruled in zip(requests, has_rule, strict=True) if not ruled]))
    return [
        _by_rule(request, rules) if ruled else next(asked)
        for request, ruled in zip(requests, has_rule, strict=True)
    ]
