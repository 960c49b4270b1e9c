"""Is the judge there, does it have the model, and can its replies be read? Asked before a run.

A judge that is misspelt or that does not keep to the form of a verdict would otherwise show after
the first compilation and rollout, or only as a reward that never comes. One golden sample per task,
whose answer is right beyond doubt, is judged with a short time-out.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

from gtalign_jax.reward import tasks
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judgement, JudgeRequest, scale_of
from gtalign_jax.reward.limits import WINDOW_S

MAX_TIMEOUT_S = 30.0
RETRIES = 2  # a server that has a name of its own for the model is believed at the third time
MAX_SHOWN = 10  # models named in an error

log = logging.getLogger(__name__)


def patience(cfg: JudgeConfig) -> JudgeConfig:
    """The same judge, given up on sooner."""
    timeout_s = min(cfg.timeout_s, MAX_TIMEOUT_S)
    waits_s = 3 * WINDOW_S if cfg.requests_per_minute or cfg.tokens_per_minute else 0.0
    return dataclasses.replace(cfg, timeout_s=timeout_s, retries=RETRIES,
                               deadline_s=min(cfg.deadline_s, 2 * timeout_s + waits_s))


def check_models(cfg: JudgeConfig, models: Mapping[str, Sequence[str] | str]) -> str | None:
    """What is wrong with the servers' lists of models (`HttpJudge.models`); None if nothing is.

    A server that answers, but has no such list, may still be a judge.
    """
    silent = {url: why for url, why in models.items()
              if isinstance(why, str) and not why.startswith("HTTP ")}
    told = "; ".join(f"{url}: {why}" for url, why in silent.items())
    if len(silent) == len(models):
        return f"judge.base_url: nobody answers ({told})"
    if silent:
        log.warning("judge.base_url: %s; the other servers are asked", told)
    for url, listed in models.items():
        if isinstance(listed, str) or not listed or cfg.model in listed:
            continue
        known = ", ".join(listed[:MAX_SHOWN]) + (", …" if len(listed) > MAX_SHOWN else "")
        return f"judge.model={cfg.model!r} is not at {url}; it has: {known}"
    return None


def golden(used: Sequence[tasks.Task], consistency: bool) -> list[JudgeRequest]:
    """A request for each task with a golden sample, and one about consistency."""
    found = [
        JudgeRequest("quality", task.name, *task.golden, task=task)
        for task in used if task.golden is not None
    ]
    if consistency:
        found.append(JudgeRequest(
            "consistency", "", "", "", "", "Both gain most at DQ_DA, so I choose DQ_DA.",
            ("DQ_DA", "VQ_CQ"),
        ))
    return found


def check_golden(requests: Sequence[JudgeRequest], answers: Sequence[Judgement]) -> str | None:
    """What is wrong with judgements of golden samples; None if nothing is.

    A low grade is only warned of: the judge may be weak, but it is understood.
    """
    for request, answer in zip(requests, answers, strict=True):
        about = f"the golden sample of {request.data_source or 'consistency'!r}"
        if answer.score is None:
            said = f"; it said {answer.reply[-200:]!r}" if answer.reply else ""
            return (f"the judge cannot be used: {about} got no grade ({answer.cause}: "
                    f"{answer.error}{said})")
        (low, high), _ = scale_of(request)
        if answer.score < (low + high) / 2:
            log.warning("the judge gives %s, whose answer is right, %g of %g: %r", about,
                        answer.score, high, answer.reply[-200:])
    return None


def run(cfg: JudgeConfig, used: Sequence[tasks.Task], consistency: bool,
        ask: Callable[[Sequence[JudgeRequest]], list[Judgement]],
        models: Callable[[], Mapping[str, Sequence[str] | str]] | None) -> str | None:
    """What is wrong with the judge, in a sentence; None if it may be worked with.

    `models`: None for a judge that has no servers. `ask` is called once in any case.
    """
    problem = check_models(cfg, models()) if models else None
    requests = [] if problem else golden(used, consistency)
    return check_golden(requests, ask(requests)) or problem
