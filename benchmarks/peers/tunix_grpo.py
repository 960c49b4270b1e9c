"""Tunix at work: its own sampler, or rollout, update and whole iterations of its GRPOLearner.

    /tmp/peers/tunix/bin/python -m benchmarks.peers.tunix_grpo [--size=small] [--part=update]

One line of JSON. --part=rollout runs the sampler alone; the other parts run one `train()`, whose
methods are timed where the learner calls them: the rollout is tokenising, generation and
detokenising, and the update all of an iteration but that and the reward, which is next to
nothing: reference log-probabilities, policy, AdamW.
"""

import sys
import time
import warnings

import jax
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.peers import shapes


class WordTokenizer:
    """A token is the word of its id; the id that pads and ends is no token of the model."""

    def __init__(self, vocab: int):
        self._end = vocab

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_) -> str:
        return shapes.to_text(ids)

    def bos_id(self) -> int:
        return 0  # for Tunix: none

    def eos_id(self) -> int:
        return self._end

    def pad_id(self) -> int:
        return self._end


class TimedCluster(RLCluster):
    """Tells a clock when it generates."""

    clock: shapes.Clock

    def generate(self, *args, **kwargs):
        with self.clock.phase("rollout"):
            return super().generate(*args, **kwargs)


class TimedLearner(GRPOLearner):
    """Tells the clock of its cluster when it scores, and where iterations begin and end."""

    def _compute_rewards(self, *args, **kwargs):
        with self.rl_cluster.clock.phase("reward"):
            return super()._compute_rewards(*args, **kwargs)

    def train(self, *args, **kwargs):
        self.rl_cluster.clock.start()
        super().train(*args, **kwargs)

    def _run_global_step(self, *args, **kwargs):
        super()._run_global_step(*args, **kwargs)
        jax.block_until_ready(nnx.state(self.rl_cluster.actor_trainer.model))
        self.rl_cluster.clock.end()


def make_model(size: shapes.Size, seed: int) -> Qwen2:
    """Random weights in float32."""
    model = Qwen2(ModelConfig(
        num_layers=size.layers, vocab_size=size.vocab, embed_dim=size.d_model,
        hidden_dim=size.d_ff, num_heads=size.heads, head_dim=size.head_dim,
        num_kv_heads=size.kv_heads, rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=True),
        rngs=nnx.Rngs(seed))
    source = np.random.default_rng(seed)

    def draw(weights: jax.Array) -> jax.Array:
        if weights.ndim < 2:  # biases are 0 and norms are 1 already
            return weights
        drawn = source.standard_normal(weights.shape, np.float32) * np.float32(shapes.DEVIATION)
        return jax.numpy.asarray(drawn)

    # As Tunix draws them, kernels of the MLP are 0 and embeddings have deviation 1.
    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


def time_sampler(args) -> list[float]:
    """Seconds of every call of the sampler, after warming up."""
    size = shapes.SIZES[args.size]
    cache = CacheConfig(args.prompt_len + args.new_tokens, size.layers, size.kv_heads,
                        size.head_dim)
    sampler = Sampler(make_model(size, args.seed), WordTokenizer(size.vocab), cache)
    texts = [shapes.to_text(ids) for ids in shapes.prompts_of(args) for _ in range(args.samples)]
    seconds = []
    for repeat in range(args.warmup + args.repeats):
        began = time.perf_counter()
        found = sampler(texts, args.new_tokens, args.prompt_len, temperature=1.0, top_p=1.0,
                        seed=repeat)
        seconds.append(time.perf_counter() - began)
        for completion in found.tokens:
            shapes.reward(completion.tolist(), args.new_tokens)
    return seconds[args.warmup:]


def make_cluster(args, micro: int, clock: shapes.Clock) -> TimedCluster:
    """One mesh for all roles; all prompts are generated at once, the rest goes by micro-batch."""
    size = shapes.SIZES[args.size]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    training = RLTrainingConfig(
        eval_every_n_steps=1_000_000, max_steps=args.warmup + args.repeats,
        actor_optimizer=optax.adamw(shapes.LEARNING_RATE, weight_decay=0.0),
        mini_batch_size=args.prompts,
        # Tunix counts prompts.
        train_micro_batch_size=micro // args.samples,
        compute_logps_micro_batch_size=micro // args.samples,
        rollout_micro_batch_size=args.prompts)
    rollout = RolloutConfig(
        max_tokens_to_generate=args.new_tokens, max_prompt_length=args.prompt_len,
        kv_cache_size=args.prompt_len + args.new_tokens, temperature=1.0, top_p=1.0)
    cluster = TimedCluster(
        actor=make_model(size, args.seed), reference=make_model(size, args.seed),
        tokenizer=WordTokenizer(size.vocab),
        cluster_config=ClusterConfig(
            role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)},
            training_config=training, rollout_config=rollout))
    cluster.clock = clock
    return cluster


def train(args, micro: int, clock: shapes.Clock) -> None:
    texts = np.array([shapes.to_text(ids) for ids in shapes.prompts_of(args)])

    def rewards(prompts, completions, **_):
        return [shapes.reward([int(word) for word in text.split()], args.new_tokens)
                for text in completions]

    learner = TimedLearner(make_cluster(args, micro, clock),
                           GRPOConfig(num_generations=args.samples, beta=shapes.BETA), rewards)
    learner.train({"prompts": texts} for _ in range(args.warmup + args.repeats))


def main(argv=None) -> int:
    parser = shapes.make_parser(__doc__)
    shapes.add_micro(parser)
    args = shapes.parse_peer(parser, argv, shapes.PARTS)
    warnings.simplefilter("ignore", DeprecationWarning)
    if args.part == "rollout":
        with shapes.quiet():
            seconds = time_sampler(args)
        shapes.report("tunix", args, seconds)
        return 0
    micro = shapes.micro_of(parser, args, multiple=args.samples)
    clock = shapes.Clock()
    with shapes.quiet():
        train(args, micro, clock)
    clock.report("tunix", args, micro=micro)
    return 0


if __name__ == "__main__":
    sys.exit(main())
