"""Steered generation: the prices change, the matrix is edited, and the answer follows.

    prompts --prefill once--> sample until "</payoff>"      device, rows in step; they wait there
            --> parse, edit, solve (rollout.splice)         host
            --> feed the edited matrix to the kept caches   device, all rows at once (extend)
            --> sample to the end                           device, each row at its own position

Nothing is prefilled twice: a steered row goes back to its "<payoff>" and writes over what its cache
held after it. A row whose matrix does not parse, that never writes one, or that the prices do not
change, goes on as if nobody had looked: its draws depend on (key, prompt index, sample, position)
alone, so its tokens are those of `rollout.sampler`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.data.chat import token_pieces
from gtalign_jax.game.steering import SteeringConfig
from gtalign_jax.model import decode
from gtalign_jax.model.decode import PromptCache
from gtalign_jax.rollout import sampler as sampler_lib
from gtalign_jax.rollout.draws import row_keys
from gtalign_jax.rollout.player import Player
from gtalign_jax.rollout.sampler import SamplerConfig, make_sampler
from gtalign_jax.rollout.splice import MATRIX, Outcome, Splice, plan
from gtalign_jax.rollout.state import Rollout, State
from gtalign_jax.rollout.stopping import stop_table

NO_MATRIX = f"no {'…'.join(MATRIX)}: the completion ended before its matrix did"
NOT_ASKED = "not asked for"
WIDTH = 16  # forced tokens are padded to a multiple of this: few programs are compiled


@dataclasses.dataclass(frozen=True)
class SteeredRollout:
    """What was sampled, what was forced, and why.

    rollout: as in `rollout.sampler`, on the host; the log-probability of a forced token is 0.
    forced_QGT: True where a token was forced.
    outcomes: one per row, prompt-major.
    """

    rollout: Rollout
    forced_QGT: np.ndarray
    outcomes: tuple[Outcome, ...]


@dataclasses.dataclass(frozen=True)
class SteeredSampler:
    """The jitted programs of a steered rollout, made once; calling it runs them in turn.

    prefill(params, tokens_QS, lengths_Q) -> (PromptCache, last token of each prompt `[Q]`)
    until(params, cache, last_Q, index_Q, key) -> State: every row has ended, or closed its matrix
    extend(params, cache, k, v, feed_QGF, start_QG, count_QG) -> (k, v) with forced tokens in them
    finish(params, cache, state, index_Q, key) -> State: every row has ended

    `extend` and `finish` take the caches over.
    """

    player: Player
    prefill: Callable[..., tuple[PromptCache, jax.Array]]
    until: Callable[..., State]
    extend: Callable[..., tuple[jax.Array, jax.Array]]
    finish: Callable[..., State]

    def __call__(self, tokens_QS, lengths_Q, index_Q, key,
                 configs: SteeringConfig | Sequence[SteeringConfig | None]) -> SteeredRollout:
        """Steered completions of whole, right-padded prompts.

        Args:
          index_Q: identifies each prompt; it keys the randomness. The same prompt may stand there
            several times under one index with other prices: up to the matrix its rows are equal.
          configs: one for all prompts, or one for each; None: that prompt is not steered.
        """
        params = self.player.params
        cache, last_Q = self.prefill(params, tokens_QS, lengths_Q)
        state = self.until(params, cache, last_Q, index_Q, key)
        before = jax.device_get(state.replace(keys=None, values=None))
        Q, G = before.token_QG.shape
        if isinstance(configs, SteeringConfig):
            configs = [configs] * Q
        splices = [self._plan(before, q, g, configs[q]) for q in range(Q) for g in range(G)]
        after, forced_QGT = _spliced(before, splices)
        outcomes = tuple(splice.outcome for splice in splices)
        if after.done_QG.all():
            return SteeredRollout(after.rollout, forced_QGT, outcomes)
        caches = (state.keys, state.values)
        if forced_QGT.any():
            caches = self.extend(params, cache, *caches, *_feed(after, jax.device_get(last_Q),
                                                                splices))
        placed = jax.tree.map(
            lambda new, like: jax.device_put(new, like.sharding), after,
            state.replace(t=state.token_QG, keys=None, values=None),
        )
        state = placed.replace(keys=caches[0], values=caches[1])
        ended = self.finish(params, cache, state, index_Q, key)
        return SteeredRollout(jax.device_get(ended.rollout), forced_QGT, outcomes)

    def _plan(self, before: State, q: int, g: int, config: SteeringConfig | None) -> Splice:
        rollout = before.rollout
        ids = rollout.tokens_QGT[q, g, : rollout.lengths_QG[q, g]].tolist()
        if before.seen_QG[q, g] == sum(map(len, MATRIX)) and config is not None:
            return plan(self.player.tokenizer, ids, config, rollout.tokens_QGT.shape[2])
        reason = NOT_ASKED if config is None else NO_MATRIX
        return Splice(len(ids), (), Outcome(False, reason, None))


def _spliced(before: State, splices: Sequence[Splice]) -> tuple[State, np.ndarray]:
    """(state with the forced tokens in place and every row at its own position, forced_QGT)."""
    rollout = before.rollout
    Q, G, T = rollout.tokens_QGT.shape
    tokens_QGT, logp_QGT = rollout.tokens_QGT.copy(), rollout.logp_QGT.copy()
    forced_QGT = np.zeros((Q, G, T), bool)
    lengths_QG, token_QG = rollout.lengths_QG.copy(), before.token_QG.copy()
    for (q, g), splice in zip(np.ndindex(Q, G), splices, strict=True):
        if splice.forced:
            keep, end = splice.keep, splice.keep + len(splice.forced)
            tokens_QGT[q, g, keep:], logp_QGT[q, g, keep:] = 0, 0
            tokens_QGT[q, g, keep:end] = splice.forced
            forced_QGT[q, g, keep:end] = True
            lengths_QG[q, g], token_QG[q, g] = end, splice.forced[-1]
    rollout = rollout.replace(tokens_QGT=tokens_QGT, logp_QGT=logp_QGT, lengths_QG=lengths_QG)
    done_QG = rollout.stopped_QG | (lengths_QG >= T)
    return before.replace(t=lengths_QG, token_QG=token_QG, done_QG=done_QG, rollout=rollout), (
        forced_QGT)


def _feed(after: State, last_Q: np.ndarray, splices: Sequence[Splice]
          ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `extend` feeds: (tokens `[Q, G, F]`, first position `[Q, G]`, how many `[Q, G]`).

    The last forced token is not among them: the next step feeds it, and draws what follows.
    """
    Q, G, T = after.rollout.tokens_QGT.shape
    last_QG1 = np.broadcast_to(last_Q[:, None, None], (Q, G, 1))
    stream_QGT = np.concatenate([last_QG1, after.rollout.tokens_QGT], axis=2)  # by position
    most = max(len(splice.forced) for splice in splices)
    feed_QGF = np.zeros((Q, G, -(-most // WIDTH) * WIDTH), np.int32)
    start_QG = np.array([splice.keep for splice in splices], np.int32).reshape(Q, G)
    count_QG = np.array([len(splice.forced) for splice in splices], np.int32).reshape(Q, G)
    for q, g in np.ndindex(Q, G):
        start, count = start_QG[q, g], count_QG[q, g]
        feed_QGF[q, g, :count] = stream_QGT[q, g, start : start + count]
    return feed_QGF, start_QG, count_QG


def make_steered(player: Player, sampler: SamplerConfig, samples: int) -> SteeredSampler:
    """The steered sampler of `samples` (G) completions per prompt, for one player."""
    cfg, stop_ids, layout = player.model, player.stop_ids, player.layout
    pieces = token_pieces(player.tokenizer, cfg.padded_vocab_size)
    table_VN = stop_table(pieces, *MATRIX)

    def until(params, cache: PromptCache, last_Q, index_Q, key) -> State:
        state = sampler_lib.start(cfg, cache, last_Q, samples, sampler.max_new_tokens, layout)
        keys_QG = row_keys(key, index_Q, samples)
        return sampler_lib.run(params, cfg, cache, state, keys_QG, sampler.filters, stop_ids,
                               jnp.asarray(table_VN))

    def extend(params, cache: PromptCache, k, v, feed_QGF, start_QG, count_QG):
        model = decode.ready(params, cfg, cache, v)
        _, k, v = decode.extend(model, cfg, cache, k, v, feed_QGF, start_QG, count_QG)
        return k, v

    def finish(params, cache: PromptCache, state: State, index_Q, key) -> State:
        keys_QG = row_keys(key, index_Q, samples)
        return sampler_lib.run(params, cfg, cache, state, keys_QG, sampler.filters, stop_ids)

    return SteeredSampler(
        player=player,
        prefill=make_sampler(cfg, sampler, samples, stop_ids, layout).prefill,
        until=jax.jit(until),
        extend=jax.jit(extend, donate_argnums=(2, 3)),
        finish=jax.jit(finish, donate_argnums=2),
    )
