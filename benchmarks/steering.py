"""What steering costs: the same batch plainly, and steered by a price, in turn, in one process.

    python -m benchmarks.steering --model=runs/demo [--prompts=64 --samples=4] [--d_ff=8192]

One line of JSON: medians in seconds, their ratio to plain generation with its spread over the
repeats, and how much each way generated. "unchanged" looks at every matrix and changes none;
"action" forces matrix and choice, "matrix" the matrix alone.

A step of one row of the demo's model takes less than a millisecond, in which fixed costs show.
--d_ff adds neurons that are computed and read by nobody: the same completions at the cost of a
larger model.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from gtalign_jax.data import builtin
from gtalign_jax.data.batches import PromptSet
from gtalign_jax.game import pricing
from gtalign_jax.game.steering import SteeringConfig
from gtalign_jax.policies import load_player
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler
from gtalign_jax.rollout.steering import make_steered

MAX_PROMPT = 64


def timed(call) -> tuple[float, object]:
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


def widened(player, d_ff: int):
    """The same function with `d_ff` neurons per layer: the new ones have output weights of 0."""
    def more(weights, axis, scale):
        shape = list(weights.shape)
        shape[axis] = d_ff - shape[axis]
        new = scale * jax.random.normal(jax.random.key(0), shape, weights.dtype)
        return jnp.concatenate([weights, new], axis)

    layers = player.params.layers
    layers = layers.replace(gate_LDF=more(layers.gate_LDF, 2, 0.02),
                            up_LDF=more(layers.up_LDF, 2, 0.02),
                            down_LFD=more(layers.down_LFD, 1, 0.0))
    return dataclasses.replace(player, params=player.params.replace(layers=layers),
                               model=dataclasses.replace(player.model, d_ff=d_ff))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run of the built-in tasks")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=112)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--pricing", default="per_token:output=60,input=15")
    parser.add_argument("--d_ff", type=int, default=0, help="neurons per layer; 0: as they are")
    args = parser.parse_args(argv)
    player = load_player(args.model)
    if args.d_ff:
        player = widened(player, args.d_ff)
    prompts = builtin.generate("test", args.prompts, 0)
    batch = PromptSet(prompts, player.tokenizer, MAX_PROMPT).take(range(args.prompts))
    sampler = SamplerConfig(max_new_tokens=args.new_tokens)
    plain = make_sampler(player.model, sampler, args.samples, player.stop_ids, player.layout)
    steered = make_steered(player, sampler, args.samples)
    rows = (batch.tokens_QS, batch.lengths_Q, batch.index_Q)

    def config(text, mode="action"):
        return SteeringConfig(pricing.read(text), player.usage, (1000.0, 4000.0), mode=mode)

    ways = {
        "plain": lambda key: plain(player.params, *rows, key),
        "unchanged": lambda key: steered(*rows, key, config("none")).rollout,
        "action": lambda key: steered(*rows, key, config(args.pricing)).rollout,
        "matrix": lambda key: steered(*rows, key, config(args.pricing, "matrix")).rollout,
    }
    seconds = {name: [] for name in ways}
    tokens = dict.fromkeys(ways, 0)
    for repeat in range(args.repeats + 1):
        for name, call in ways.items():
            spent, rollout = timed(lambda: call(jax.random.key(repeat)))  # noqa: B023
            if repeat:  # the first one compiles
                seconds[name].append(spent)
                tokens[name] += int(rollout.lengths_QG.sum())
    found = {"rows": args.prompts * args.samples, "d_ff": player.model.d_ff,
             "device": jax.devices()[0].device_kind}
    for name, spent in seconds.items():
        ratios = sorted(a / b for a, b in zip(spent, seconds["plain"], strict=True))
        found[name] = {
            "seconds": round(statistics.median(spent), 4),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratios[0], 3), round(ratios[-1], 3)],
            "tokens": tokens[name] // args.repeats,
        }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
