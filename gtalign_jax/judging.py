"""The judge of a run: rules first, then what the store knows, then a language model.

    rules -> store -> HTTP servers, or a model on the run's own devices

Opened before anything is compiled; what cannot work is found out then (reward/preflight.py).
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from gtalign_jax.config import Config
from gtalign_jax.model.sharding import Layout
from gtalign_jax.pod import exchange
from gtalign_jax.pod.exchange import is_first, process_count, process_index
from gtalign_jax.reward import preflight, tasks
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judge, JudgeError, Judgement, JudgeRequest, make_judge
from gtalign_jax.reward.limits import Sent
from gtalign_jax.reward.rules import RULES
from gtalign_jax.reward.store import JudgementStore, remembering
from gtalign_jax.training import model_judge
from gtalign_jax.workdir import local


def open_judge(config: Config, sources: Sequence[str], layout: Layout, dtype: Any) -> Judge:
    """The judge that the config names. A collective.

    Args:
      sources: the data sources of all prompts that it may be asked about.
      layout, dtype: for a model on the run's own devices: how it is cut, and what it computes in.

    Raises ValueError and the like for a config that cannot work, JudgeError for a judge that does
    not.
    """
    cfg = config.judge
    if cfg.kind in ("rule", "none"):
        return make_judge(cfg, RULES)
    on_devices = cfg.kind == "jax"
    mine = cfg if on_devices else cfg.share(process_count())
    ask = _no_model
    if cfg.mode == "live":
        ask = model_judge.make(cfg, layout, dtype) if on_devices else None
        sent = _preflight(config, sources, ask) if cfg.preflight else []
        ask = ask or _http(mine, sent)
    if cfg.store != "none":
        directory = cfg.store or os.path.join(local(config.workdir), "judgements")
        ask = remembering(mine, JudgementStore(directory, process_index()), ask)
    return make_judge(mine, RULES, ask)


def _http(cfg: JudgeConfig, before: Sequence[Sent] = ()):
    from gtalign_jax.reward.http_judge import HttpJudge  # the client takes a second to import

    return HttpJudge(cfg, before)


def _no_model(requests: Sequence[JudgeRequest], told: Any = None) -> list[Judgement]:
    """What replays has nobody to ask."""
    raise AssertionError(f"{len(requests)} requests to a judge that replays")


def asked_about(config: Config, sources: Sequence[str]) -> list[tasks.Task]:
    """The tasks among `sources` whose quality a language model judges."""
    found = [tasks.task_of(source, config.reward.tasks) for source in sorted(set(sources))]
    by_algebra = config.reward.math == "equivalence"
    ruled = RULES if config.judge.rules else {}
    return [
        task for task in found
        if not (task.measure == "math" and by_algebra)
        and not (config.judge.rules and task.rule is not None) and task.name not in ruled
    ]


def _preflight(config: Config, sources: Sequence[str], on_devices: Any) -> list[Sent]:
    """Tries the judge; returns what this process has sent to servers for that."""
    cfg, sent, problem = config.judge, [], None
    used, consistency = asked_about(config, sources), config.reward.consistency == "judge"
    if not used and not consistency:
        return sent
    if on_devices:  # all processes answer together, and so come to the same end
        problem = preflight.run(cfg, used, consistency, on_devices, None)
    elif is_first():
        with contextlib.closing(_http(preflight.patience(cfg))) as patient:
            problem = preflight.run(cfg, used, consistency, patient, patient.models)
            sent = patient.sent()
    problem = exchange.broadcast(problem, "judge's pre-flight")
    if problem:
        raise JudgeError(f"{problem}. judge.preflight=False skips this check.")
    return sent
