"""How fast a step's completions are learnt from: reference, forward, backward, AdamW.

    python -m benchmarks.update [--size=small --prompts=8 --samples=8 --prompt-len=128
        --common-prefix=0 --new-tokens=128 --lengths=fixed|longtail --micro=8 --repeats=3]

One line of JSON: the median of the repeats after a warm-up, tokens per second as one counts them
who computes every prompt for every completion, the needed operations per second by formula, and
peak memory. Random weights, completions and rewards.
"""

import sys

import numpy as np

from benchmarks import learning, ours


def main(argv=None) -> int:
    args = ours.parse(__doc__, argv, micro=True)
    made, draw = learning.make(args), np.random.default_rng(args.seed)
    shape = (args.prompts, args.samples)
    tokens_QGT = draw.integers(5, ours.model_of(args).vocab_size, (*shape, args.new_tokens))
    logp_QGT = np.full(tokens_QGT.shape, -8.0, np.float32)
    batch = learning.batch(args, made, tokens_QGT.astype(np.int32), logp_QGT, draw.random(shape))
    padded = float(ours.lengths(args).mean()) / args.new_tokens
    fill = float(np.mean([plan.fill for plan in batch[1]])) if args.pack else padded
    ours.report("gtalign_jax update", args, "update",
                ours.timed(args, lambda _: made.update(*batch)["grpo/loss"]),
                padding=round(1 - fill, 4))
    return 0


if __name__ == "__main__":
    sys.exit(main())
