"""What the benchmarks of this project's own programs share: model, prompts, completions, FLOPs."""

import argparse
import functools
import random
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import shapes
from gtalign_jax.aot import roofline
from gtalign_jax.model.sharding import ROLLOUT, TRAIN, Layout, MeshConfig, make_mesh
from gtalign_jax.model.spec import ModelConfig, Params, init_params
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler

LONGTAIL = (200, 1500)  # median and 99th percentile of completion lengths


def parse(doc: str, argv=None, micro: bool = False) -> argparse.Namespace:
    """The common flags; `micro`: also those of an update."""
    parser = shapes.make_parser(doc)
    if micro:
        parser.add_argument("--micro", type=int, default=0,
                            help="sequences per forward and backward pass; 0: of one prompt")
        parser.add_argument("--remat", default="none")
        parser.add_argument("--logit-chunk", type=int, default=128,
                            help="positions of a row whose logits exist at a time")
        parser.add_argument("--pack", type=int, default=0,
                            help="groups whose completions share a row of the update; 0: none")
        parser.add_argument("--pack-rows", type=int, default=1, help="such rows at a time")
    parser.add_argument("--layers", type=int, default=0, help="instead of the size's own")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    shapes.check(parser, args)
    if args.common_prefix == args.prompt_len:
        parser.error("--common-prefix must leave at least one token of each prompt")
    return args


def model_of(args: argparse.Namespace) -> ModelConfig:
    s = shapes.SIZES[args.size]
    layers = args.layers or s.layers
    return ModelConfig("qwen2", s.vocab, s.d_model, s.d_ff, layers, s.heads, s.kv_heads,
                       s.head_dim, qkv_bias=True, init_scale=shapes.DEVIATION)


def weights(args: argparse.Namespace, seed: int) -> Params:
    cfg, dtype = model_of(args), jnp.dtype(args.dtype)
    return jax.jit(functools.partial(init_params, cfg, dtype=dtype))(jax.random.key(seed))


def prompts(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """(ids `[Q, S]`, lengths `[Q]`)."""
    ids = np.array(shapes.prompts_of(args), np.int32)
    return ids, np.full(len(ids), args.prompt_len, np.int32)


def lengths(args: argparse.Namespace) -> np.ndarray:
    """How long each completion is, `[Q, G]`: all new tokens, or a log-normal draw below them."""
    shape = (args.prompts, args.samples)
    if args.lengths == "fixed":
        return np.full(shape, args.new_tokens, np.int32)
    median, tail = LONGTAIL
    draw = random.Random(args.seed)
    spread = np.log(tail / median) / 2.3263  # standard deviations at the 99th percentile
    drawn = [median * np.exp(spread * draw.gauss(0, 1)) for _ in range(shape[0] * shape[1])]
    return np.clip(np.ceil(drawn), 1, args.new_tokens).astype(np.int32).reshape(shape)


def layouts() -> tuple[Layout, Layout]:
    """(for training, for rollout), over all devices."""
    mesh = make_mesh(MeshConfig())
    return Layout(mesh, TRAIN), Layout(mesh, ROLLOUT)


def sampler_of(args: argparse.Namespace, layout: Layout):
    """The sampler; its stop token lies outside the vocabulary, so that lengths are exact."""
    cfg = model_of(args)
    return make_sampler(cfg, SamplerConfig(max_new_tokens=args.new_tokens), args.samples,
                        (cfg.vocab_size,), layout, args.common_prefix)


def timed(args: argparse.Namespace, once) -> list[float]:
    """Seconds of each counted repeat of `once(repeat)`, after the warm-up."""
    seconds = []
    for repeat in range(args.warmup + args.repeats):
        began = time.perf_counter()
        jax.block_until_ready(once(repeat))
        seconds.append(time.perf_counter() - began)
    return seconds[args.warmup:]


def flops(args: argparse.Namespace) -> dict[str, float]:
    """Needed operations by formula, prompts and prefix counted once; nothing recomputed counts.

    With long-tailed lengths each row counts with the mean length.
    """
    cfg, Q, G = model_of(args), args.prompts, args.samples
    S, T, P = args.prompt_len, round(float(lengths(args).mean())), args.common_prefix
    forward = roofline.forward_work(cfg, Q, G, S, T, P).useful_flops
    decode = roofline.decode_work(cfg, Q, G, S, T, P).useful_flops
    found = {"rollout": roofline.prefill_work(cfg, Q, S, P).useful_flops + decode,
             "update": 4 * forward}  # reference forward; policy forward and backward
    return found | {"iteration": sum(found.values())}


def report(program: str, args: argparse.Namespace, part: str, seconds: list[float],
           **extra) -> None:
    args.part = part
    median = float(np.median(seconds))
    shapes.report(program, args, seconds, lengths=args.lengths,
                  gflops_per_s=round(flops(args)[part] / median / 1e9, 1), **extra)
