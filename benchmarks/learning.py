"""The programs of an update, as the trainer makes and calls them, over random completions."""

import argparse
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks import ours
from benchmarks.peers import shapes
from gtalign_jax.model.spec import Params
from gtalign_jax.training.collect import Verdict
from gtalign_jax.training.grpo import Batch, GRPOConfig, place
from gtalign_jax.training.learner import Learner, host_metrics
from gtalign_jax.training.packing import Packing
from gtalign_jax.training.state import TrainState, make_optimizer, make_state


@dataclasses.dataclass
class Learning:
    """The state that is trained, the frozen reference, and the trainer's programs."""

    learner: Learner
    state: TrainState
    reference: Params

    def update(self, batch: Batch, plans: Sequence[Packing] = ()) -> dict[str, float]:
        """Reference log-probabilities, forward and backward, AdamW; the metrics are on the host."""
        self.state, seen = self.learner.update(self.state, self.reference, batch, plans)
        jax.block_until_ready(self.state)
        return host_metrics(seen)


def make(args: argparse.Namespace) -> Learning:
    train, rollout = ours.layouts()
    cfg = ours.model_of(args)
    grpo = GRPOConfig(
        learning_rate=shapes.LEARNING_RATE, beta=shapes.BETA, prompts_per_step=args.prompts,
        samples_per_prompt=args.samples, remat=args.remat,
        micro_batch_prompts=max(args.micro // args.samples, 1), pack=args.pack,
        pack_rows=args.pack_rows, logit_chunk=args.logit_chunk,
    )
    sampler = ours.sampler_of(args, rollout).config
    learner = Learner.make(cfg, grpo, train, rollout, filters=sampler.filters, dtype=args.dtype,
                           steps=1000)
    state = make_state(ours.weights(args, 0), cfg, make_optimizer(grpo, 1000), train)
    return Learning(learner, state, ours.weights(args, 0))


def batch(args: argparse.Namespace, learning: Learning, tokens_QGT, logp_QGT,
          reward_QG: np.ndarray) -> tuple[Batch, list[Packing]]:
    """What the trainer makes of a rollout and its rewards."""
    ids_QS, lengths_Q = ours.prompts(args)
    valid_QG, lengths_QG = np.ones(reward_QG.shape, bool), ours.lengths(args)
    adv_QG = np.asarray(learning.learner.advantages(reward_QG.astype(np.float32), valid_QG))
    verdict = Verdict(reward_QG.reshape(-1), valid_QG.reshape(-1), valid_QG.reshape(-1),
                      lengths_QG.reshape(-1))
    return place(Batch(
        prompt_QS=ids_QS, prompt_lengths_Q=lengths_Q, tokens_QGT=tokens_QGT,
        lengths_QG=lengths_QG, valid_QG=valid_QG, sampler_logp_QGT=logp_QGT, adv_QG=adv_QG,
        common=args.common_prefix,
    ), learning.learner.layout), learning.learner.plans(verdict, adv_QG, args.new_tokens)
