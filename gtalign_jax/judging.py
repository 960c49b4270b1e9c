"""The judge of a run: rules first, then what the store knows, then a language model.

    rules -> store -> HTTP servers, or a model on the run's own devices

Opened before anything is compiled; what cannot work is found out then (reward/preflight.py).
"""

import contextlib
import os
from collections.abc import Sequence

from gtalign_jax.config import Config
from gtalign_jax.pod import exchange
from gtalign_jax.pod.exchange import is_first, process_count, process_index
from gtalign_jax.reward import preflight, tasks
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.judges import Judge, JudgeError, make_judge
from gtalign_jax.reward.rules import RULES
from gtalign_jax.reward.store import JudgementStore, remembering
from gtalign_jax.workdir import local


def open_judge(config: Config, sources: Sequence[str]) -> Judge:
    """The judge that the config names. A collective.

    Args:
      sources: the data sources of all prompts that it may be asked about.

    Raises ValueError for a config that cannot work, JudgeError for a judge that does not.
    """
    cfg = config.judge
    if cfg.kind in ("rule", "none"):
        return make_judge(cfg, RULES)
    mine = cfg.share(process_count())
    ask = _model(mine)
    directory = cfg.store or os.path.join(local(config.workdir), "judgements")
    if cfg.preflight and cfg.mode == "live":
        _preflight(config, mine, sources)
    if cfg.store != "none":
        ask = remembering(mine, JudgementStore(directory, process_index()), ask)
    return make_judge(mine, RULES, ask)


def _model(cfg: JudgeConfig):
    from gtalign_jax.reward.http_judge import HttpJudge  # the client takes a second to import

    return HttpJudge(cfg)


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


def _preflight(config: Config, cfg: JudgeConfig, sources: Sequence[str]) -> None:
    used, consistency = asked_about(config, sources), config.reward.consistency == "judge"
    problem = None
    if (used or consistency) and is_first():
        with contextlib.closing(_model(preflight.patience(cfg))) as ask:
            problem = preflight.run(cfg, used, consistency, ask, ask.models)
    problem = exchange.broadcast(problem, "judge's pre-flight")
    if problem:
        raise JudgeError(f"{problem}. judge.preflight=False skips this check.")
