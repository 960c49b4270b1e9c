"""One policy asked the same prompts at several prices.

    (price, prompt) pairs  ->  batches of one shape  ->  one SteeredRollout per price

The same prompt is sampled under the same index at each price, so up to the matrix its texts are the
same, and only what follows from the price can differ.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from gtalign_jax.data.batches import PromptSet
from gtalign_jax.game.steering import SteeringConfig
from gtalign_jax.model.sharding import prompt_shards
from gtalign_jax.rollout.player import Player
from gtalign_jax.rollout.sampler import SamplerConfig
from gtalign_jax.rollout.steering import SteeredRollout, make_steered
from gtalign_jax.training.state import named_key


def play(
    player: Player, prompts: PromptSet, configs: Sequence[SteeringConfig], sampler: SamplerConfig,
    *, samples: int = 1, seed: int = 0, batch_size: int = 64,
    told: Callable[[int, int], None] = lambda done, count: None,
) -> list[SteeredRollout]:
    """What `player` answers to all prompts under each of `configs`, on the host.

    Args:
      batch_size: rows of prompts per call, rounded up to what the devices share evenly.
      told: called after each batch with how many pairs are done, and how many there are.
    """
    pairs = [(c, q) for c in range(len(configs)) for q in range(len(prompts))]
    shards = prompt_shards(player.layout)
    size = -(-min(batch_size, len(pairs)) // shards) * shards
    sample = make_steered(player, sampler, samples)
    key = named_key(jax.random.key(seed), "steer", 0)
    parts = []
    for start in range(0, len(pairs), size):
        chosen = pairs[start : start + size]
        real = len(chosen)
        chosen = chosen + chosen[:1] * (size - real)
        batch = prompts.take([q for _, q in chosen])
        whole = sample(
            batch.tokens_QS, batch.lengths_Q, batch.index_Q, key, [configs[c] for c, _ in chosen]
        )
        parts.append(_rows(whole, 0, real))
        told(start + real, len(pairs))
    whole = _joined(parts)
    return [_rows(whole, c * len(prompts), len(prompts)) for c in range(len(configs))]


def _rows(steered: SteeredRollout, first: int, count: int) -> SteeredRollout:
    """`count` prompts from number `first` on."""
    at, samples = slice(first, first + count), steered.forced_QGT.shape[1]
    rollout = jax.tree.map(lambda x: np.asarray(x)[at] if np.ndim(x) else x, steered.rollout)
    outcomes = steered.outcomes[first * samples : (first + count) * samples]
    return SteeredRollout(rollout, steered.forced_QGT[at], outcomes)


def _joined(parts: Sequence[SteeredRollout]) -> SteeredRollout:
    rollout = jax.tree.map(
        lambda *xs: np.concatenate(xs) if np.ndim(xs[0]) else sum(xs),
        *(part.rollout for part in parts),
    )
    return SteeredRollout(
        rollout, np.concatenate([part.forced_QGT for part in parts]),
        tuple(outcome for part in parts for outcome in part.outcomes),
    )


def spans(forced_T: np.ndarray) -> list[list[int]]:
    """[[first, end], …] of the stretches of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], forced_T.astype(np.int8), [0]])))
    return edges.reshape(-1, 2).tolist()
