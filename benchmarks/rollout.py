"""How fast completions are sampled: prefill and decode of one step's prompts.

    python -m benchmarks.rollout [--size=small --prompts=8 --samples=8 --prompt-len=128
        --common-prefix=0 --new-tokens=128 --lengths=fixed|longtail --repeats=3]

One line of JSON: the median of the repeats after a warm-up, new tokens per second, the needed
operations per second by formula, peak memory, the share of decoded positions that belong to a live
row, and the time of the prefill alone. Random weights; no row ends before its length.
"""

import sys
import time

import jax
import numpy as np

from benchmarks import ours


def main(argv=None) -> int:
    args = ours.parse(__doc__, argv)
    _, layout = ours.layouts()
    params, (ids_QS, lengths_Q) = ours.weights(args, 0), ours.prompts(args)
    sampler, limit_QG = ours.sampler_of(args, layout), ours.lengths(args)
    index_Q = np.arange(args.prompts, dtype=np.int32)
    prefills, rollouts = [], []

    def once(repeat: int):
        began = time.perf_counter()
        cache, last_Q = jax.block_until_ready(sampler.prefill(params, ids_QS, lengths_Q))
        prefills.append(time.perf_counter() - began)
        key = jax.random.key(repeat)
        rollouts.append(sampler.decode(params, cache, last_Q, index_Q, key, limit_QG))
        return rollouts[-1]

    seconds = ours.timed(args, once)
    if not (np.asarray(rollouts[-1].lengths_QG) == limit_QG).all():
        raise RuntimeError("a completion has not the expected length")
    ours.report("gtalign_jax rollout", args, "rollout", seconds,
                new_tokens_per_s=round(float(limit_QG.sum() / np.median(seconds)), 1),
                live=round(float(limit_QG.sum() / rollouts[-1].slots), 4),
                prefill_seconds=round(float(np.median(prefills[args.warmup:])), 4))
    return 0


if __name__ == "__main__":
    sys.exit(main())
