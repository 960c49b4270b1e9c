"""What this machine can do: the rate of large float32 matrix products, and of memory.

    python -m benchmarks.roofline [--repeats=7]

One line of JSON: GFLOP/s of a product of two 2,048 x 2,048 matrices, and GB/s of reading and
writing 256 MB in place. The other benchmarks' operations per second are to be held against the
first, sampling of few rows against the second.
"""

import argparse
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp

SIDE, FLOATS = 2048, 2**26


def fastest(call, repeats: int) -> tuple[float, float]:
    """(median, least) seconds of `call` after a warm-up."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), min(seconds)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    a = jax.random.normal(jax.random.key(0), (SIDE, SIDE), jnp.dtype(args.dtype))
    product = jax.jit(jnp.matmul)
    median, least = fastest(lambda: product(a, a), args.repeats)
    held = [jnp.zeros(FLOATS, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def in_place():
        held.append(add(held.pop()))
        return held[0]

    copy, copy_least = fastest(in_place, args.repeats)
    flops, bytes_moved = 2 * SIDE**3, 2 * 4 * FLOATS
    print(json.dumps({
        "device": jax.devices()[0].device_kind, "dtype": args.dtype,
        "matmul_gflops": round(flops / median / 1e9, 1),
        "matmul_gflops_best": round(flops / least / 1e9, 1),
        "memory_gb_per_s": round(bytes_moved / copy / 1e9, 1),
        "memory_gb_per_s_best": round(bytes_moved / copy_least / 1e9, 1),
    }))
    return 0


if __name__ == "__main__":
    sys.exit(main())
