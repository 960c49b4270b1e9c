"""A process that judges without end and tells of each judgement, for a test to kill it.

    python judging_child.py URL STORE PROCESS FIRST STEP
"""

import itertools
import sys

from judging import request

from gtalign_jax.reward.http_judge import HttpJudge
from gtalign_jax.reward.judge_config import JudgeConfig
from gtalign_jax.reward.store import JudgementStore, remembering


def main(url: str, directory: str, process: int, first: int, step: int) -> None:
    cfg = JudgeConfig(kind="http", base_url=url, model="judge-1", concurrency=4, timeout_s=60.0)
    judge, store = HttpJudge(cfg), JudgementStore(directory, process)

    def ask(requests, told):
        def tell(i, judgement):
            told(i, judgement)  # the store first: what is printed is safe
            print(requests[i].response, f"{judgement.score:g}", flush=True)

        return judge(requests, tell)

    remembered = remembering(cfg, store, ask)
    for batch in itertools.count(first, step):
        remembered([request(f"work {batch}.{i}") for i in range(step)])


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
