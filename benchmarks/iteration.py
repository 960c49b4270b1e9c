"""How fast a whole step is: rollout, a reward that costs nothing, advantages, and the update.

    python -m benchmarks.iteration [--size=small --prompts=8 --samples=8 --prompt-len=128
        --common-prefix=0 --new-tokens=128 --lengths=fixed|longtail --micro=8 --repeats=3]

One line of JSON as of the other benchmarks, with the medians of rollout and update.
"""

import sys
import time

import jax
import numpy as np

from benchmarks import learning, ours
from benchmarks.peers import shapes


def main(argv=None) -> int:
    args = ours.parse(__doc__, argv, micro=True)
    made, (_, layout) = learning.make(args), ours.layouts()
    sampler, limit_QG = ours.sampler_of(args, layout), ours.lengths(args)
    (ids_QS, lengths_Q), index_Q = ours.prompts(args), np.arange(args.prompts, dtype=np.int32)
    phases: dict[str, list[float]] = {"rollout": [], "update": []}

    def once(repeat: int):
        began = time.perf_counter()
        policy = made.learner.reshard(made.state.params)
        key = jax.random.key(repeat)
        rollout = sampler(policy, ids_QS, lengths_Q, index_Q, key, limit_QG)
        del policy
        tokens_QGT, lengths_QG = jax.device_get((rollout.tokens_QGT, rollout.lengths_QG))
        phases["rollout"].append(time.perf_counter() - began)
        reward_QG = np.array([
            [shapes.reward(row[:n], limit) for row, n, limit in zip(*group, strict=True)]
            for group in zip(tokens_QGT, lengths_QG, limit_QG, strict=True)
        ])
        began = time.perf_counter()
        batch = learning.batch(args, made, rollout.tokens_QGT, rollout.logp_QGT, reward_QG)
        loss = made.update(*batch)["grpo/loss"]
        phases["update"].append(time.perf_counter() - began)
        return loss

    seconds = ours.timed(args, once)
    medians = {f"{name}_seconds": round(float(np.median(spent[args.warmup:])), 4)
               for name, spent in phases.items()}
    ours.report("gtalign_jax iteration", args, "iteration", seconds, **medians)
    return 0


if __name__ == "__main__":
    sys.exit(main())
