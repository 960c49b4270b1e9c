"""What a rollout is, and where it stands between two tokens.

Lengths, never token ids, say what is real: a length counts the stop token, which is trained on.
"""

import jax
from flax import struct

from gtalign_jax.model.decode import Cache


@struct.dataclass
class Rollout:
    """What was sampled.

    tokens_QGT: completion ids; what lies past a row's length is 0 and means nothing.
    logp_QGT: log-probability of each token under the distribution it was drawn from; 0 past it.
    lengths_QG: number of completion tokens, the stop token included.
    stopped_QG: the row ended by a stop token (otherwise it was cut at the limit).
    slots: row positions computed, those of finished rows too: iterations times Q G.
    """

    tokens_QGT: jax.Array
    logp_QGT: jax.Array
    lengths_QG: jax.Array
    stopped_QG: jax.Array
    slots: jax.Array


@struct.dataclass
class State:
    """Between two tokens.

    t: the position to feed next, one number where all rows are in step, else `[Q, G]`.
    token_QG: the token to feed there. done_QG: nothing more is drawn for the row, for now.
    limit_QG: how many completion tokens the row may have.
    seen_QG: how much of the text that rows wait at each has just written (`rollout.stopping`).
    keys, values: own caches (`model.decode`).
    """

    t: jax.Array
    token_QG: jax.Array
    done_QG: jax.Array
    limit_QG: jax.Array
    seen_QG: jax.Array
    keys: Cache
    values: Cache
    rollout: Rollout
