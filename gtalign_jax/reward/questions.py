"""Who answers which question about a batch: what is known already, algebra, or the judge.

    completions -> (row, JudgeRequest)      ask
    (row, JudgeRequest) -> Judgement        answer
    Judgement -> Qualities                  qualities, by the task of the row

The judge is asked once, with all that is left. What fails, in a judge or in a task of the user's,
is missing in its own row and touches no other.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gtalign_jax.data.prompt import Prompt
from gtalign_jax.game.chain import Chain
from gtalign_jax.reward import math_equal, tasks
from gtalign_jax.reward.judges import Judge, Judgement, JudgeRequest, missing, task_of

KINDS = ("quality", "consistency")


def failed(judgement: Judgement | None) -> bool:
    """It was wanted, and there is no score."""
    return judgement is not None and judgement.score is None


def ask(
    prompts: Sequence[Prompt], all_tasks: Sequence[tasks.Task], chains: Sequence[Chain],
    pareto: Sequence[tuple[str, ...]], usable_B: np.ndarray, kinds: Sequence[str],
) -> list[tuple[int, JudgeRequest]]:  # fmt: skip
    """(row, request) for every question of these kinds that there is about usable completions."""
    return [
        (
            row,
            JudgeRequest(
                kind=kind,
                data_source=prompts[row].data_source,
                question=prompts[row].question,
                ground_truth=prompts[row].ground_truth,
                response=chains[row].response,
                analyze=chains[row].analyze or "",
                pareto=pareto[row],
                extra=prompts[row].extra,
                task=all_tasks[row],
            ),
        )
        for kind in kinds
        for row in np.flatnonzero(usable_B).tolist()
    ]


def answer(
    asked: Sequence[tuple[int, JudgeRequest]], given: Sequence[Mapping[str, float]], judge: Judge,
    by: str,
) -> dict[str, list[Judgement | None]]:  # fmt: skip
    """Judgements by kind and row, None where nothing was asked.

    Args:
      given: raw scores that are known, by row and kind; these are not asked for.
      by: how mathematics is measured, `RewardConfig.math`.
    """
    found: dict[str, list[Judgement | None]] = {kind: [None] * len(given) for kind in KINDS}
    waiting: dict[Callable, list[tuple[int, JudgeRequest]]] = {_by_algebra: [], judge: []}
    for row, request in asked:
        if request.kind in given[row]:
            found[request.kind][row] = Judgement(float(given[row][request.kind]), "given")
            continue
        mathematical = request.kind == "quality" and task_of(request).measure == "math"
        waiting[_by_algebra if mathematical and by != "judge" else judge].append((row, request))
    for ask, rows in waiting.items():
        # A judge is called without any, too: on a pod its answer may take all processes.
        answers = ask([request for _, request in rows])
        for (row, request), judgement in zip(rows, answers, strict=True):
            if ask is _by_algebra and by == "fallback" and not _is_settled(judgement):
                waiting[judge].append((row, request))
            else:
                found[request.kind][row] = judgement
    return found


def qualities(
    all_tasks: Sequence[tasks.Task], prompts: Sequence[Prompt], chains: Sequence[Chain],
    quality: list[Judgement | None],
) -> list[tasks.Qualities | None]:  # fmt: skip
    """Qualities of every row that has a score; a row whose task fails becomes missing in
    `quality`."""
    found: list[tasks.Qualities | None] = [None] * len(quality)
    for row, judgement in enumerate(quality):
        if judgement is None or judgement.score is None:
            continue
        task, truth = all_tasks[row], prompts[row].ground_truth
        try:
            values = tasks.Qualities(*task.qualities(judgement.score, truth, chains[row].response))
            if not all(math.isfinite(value) and 0 <= value <= 1 for value in values):
                raise ValueError(f"{values} must lie in [0, 1]")
            found[row] = values
        except Exception as error:  # a user's task may raise whatever it likes
            told = f"to_qualities of {task.name!r}: {tasks.told(error)}"
            quality[row] = missing("task_error", told, judgement.reply)
    return found


def _by_algebra(requests: Sequence[JudgeRequest]) -> list[Judgement]:
    verdicts = math_equal.equivalent([(r.ground_truth, r.response) for r in requests])
    return [
        missing("unreadable", note, note) if value is None else Judgement(value, note)
        for value, note in verdicts
    ]


def _is_settled(judgement: Judgement) -> bool:
    return judgement.score is not None and not judgement.reply.startswith(math_equal.UNSETTLED)
