"""Operations and memory traffic by formula, and the least time in which a topology does them.

    time = max(compute, HBM, links that run beside them) + links for which everything waits

each being an amount per chip / the published peak of the chip.

Q prompts of S tokens, G completions of T tokens each; L, D, F, N, K, H, V of the model (padded V).
`W = L (2 D N H + 2 D K H + 3 D F)` are the weights of the blocks, `V D` those of the head.

    matrix products     2 W per token, and 2 V D per token whose logits are wanted
    attention           4 L N H per pair of a query and a key that it sees:
                        S (S + 1) / 2 per prompt, once for all of its completions;
                        T S + T (T + 1) / 2 per completion
    backward pass       twice the forward pass

What this is not: a measurement. It has no latencies, no padding of tiles, no time lost between
operations; looking up embeddings, norms, rotations and the draw count nothing. So a real step takes
longer, and only the ratio of two modelled times (sizes, topologies) should be trusted.
The compiler's own `cost_analysis()` is of no use here: it counts the body of a loop once.
"""

import dataclasses
from collections.abc import Sequence

from gtalign_jax.aot.hlo import Collective
from gtalign_jax.aot.topology import Topology
from gtalign_jax.model.attend_cached import own_block
from gtalign_jax.model.spec import ModelConfig, num_params

COMPUTE_BYTES = 2  # bfloat16: weights as computed with, activations, caches
FLOAT_BYTES = 4  # logits, master weights, gradients, both moments of Adam
SAMPLING_PASSES = 4  # over the logits per token: written, maximum, running sum, search in it

# Remat policy -> which parts of a block's forward pass the backward pass repeats:
# (matrix products with weights, attention). Keys are those of model.forward.REMAT_POLICIES.
REPEATED = {"none": (0, 0), "full": (1, 1), "dots": (0, 1), "attention": (1, 0)}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program must do, summed over all chips.

    flops: operations. useful_flops: without what is repeated to save memory; MFU counts these.
    hbm_bytes: activations, caches, optimizer state: read or written by one chip of all.
    weight_bytes: weights of the compute dtype as read by one full copy of the model; every group
      of `tensor` chips holds or gathers such a copy and reads it.
    """

    flops: float
    useful_flops: float
    hbm_bytes: float
    weight_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * value for value in dataclasses.astuple(self)))

    def hbm_bytes_per_chip(self, chips: int, tensor: int) -> float:
        """Traffic of one chip; `tensor` chips share one copy of the weights."""
        return self.hbm_bytes / chips + self.weight_bytes / tensor


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that each resource is busy in one run of a program, and the modelled time."""

    compute: float
    hbm: float
    ici: float
    dcn: float
    total: float

    @property
    def bound(self) -> str:
        """The busiest resource."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))


def block_weights(cfg: ModelConfig) -> int:
    """W: weights of all blocks' matrix products."""
    D, N, K, H = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    return cfg.num_layers * (2 * D * N * H + 2 * D * K * H + 3 * D * cfg.d_ff)


def head_weights(cfg: ModelConfig) -> int:
    """V D: weights of the head, whether or not the embedding lends them."""
    return cfg.padded_vocab_size * cfg.d_model


def cache_bytes(cfg: ModelConfig) -> int:
    """Keys and values of one token, all layers."""
    return 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * COMPUTE_BYTES


def _attention(cfg: ModelConfig, pairs: float) -> float:
    """Scores and weighted sum: 2 H operations each, per head and pair."""
    return 4.0 * cfg.num_layers * cfg.num_heads * cfg.head_dim * pairs


def _prompt_tokens(Q: int, S: int, common: int) -> int:
    """Prompt positions computed: what all prompts begin with, once."""
    return common + Q * (S - common)


def _prompt_pairs(Q: int, S: int, common: int) -> float:
    once, rest = common * (common + 1) / 2, S - common
    return once + Q * (rest * common + rest * (rest + 1) / 2)


def _row_pairs(Q: int, G: int, S: int, T: int) -> float:
    return Q * G * (T * S + T * (T + 1) / 2)


def _activation_bytes(cfg: ModelConfig, tokens: float) -> float:
    """Inputs and outputs of the matrix products of one forward pass.

    Per layer: read D, write q, k, v, read them, write and read the attended N H, write D; read D,
    write gate and up (2 F), read them, write D.
    """
    heads = (2 * (cfg.num_heads + 2 * cfg.num_kv_heads) + 2 * cfg.num_heads) * cfg.head_dim
    return COMPUTE_BYTES * cfg.num_layers * tokens * (4 * cfg.d_model + heads + 4 * cfg.d_ff)


def prefill_work(cfg: ModelConfig, Q: int, S: int, common: int = 0) -> Work:
    """The prompts' keys and values, once per prompt, and once of their `common` first tokens; no
    logits."""
    tokens = _prompt_tokens(Q, S, common)
    flops = 2.0 * block_weights(cfg) * tokens + _attention(cfg, _prompt_pairs(Q, S, common))
    traffic = _activation_bytes(cfg, tokens) + cache_bytes(cfg) * tokens
    return Work(flops, flops, traffic, COMPUTE_BYTES * block_weights(cfg))


def decode_work(cfg: ModelConfig, Q: int, G: int, S: int, T: int, common: int = 0) -> Work:
    """T steps of all Q G rows, none of which ends early.

    Every step reads all weights, each prompt's cache once for its G rows (of the `common` first
    tokens once for all), and what the rows have written, in whole blocks.
    """
    weights = block_weights(cfg) + head_weights(cfg)
    rows = Q * G
    flops = 2.0 * weights * rows * T + _attention(cfg, _row_pairs(Q, G, S, T))
    own = (T + own_block(T)) / 2  # on average
    caches = cache_bytes(cfg) * (_prompt_tokens(Q, S, common) + rows * own)
    logits = FLOAT_BYTES * SAMPLING_PASSES * rows * cfg.padded_vocab_size
    per_step = caches + logits + _activation_bytes(cfg, rows)
    return Work(flops, flops, float(T * per_step), float(COMPUTE_BYTES * T * weights))


def forward_work(cfg: ModelConfig, Q: int, G: int, S: int, T: int, common: int = 0) -> Work:
    """Log-probabilities of Q G completions that share their group's prompt: one forward pass.

    With G = 1 it is a plain pass over Q sequences of S + T tokens with logits for T of them.
    `common`: tokens that all prompts begin with, computed once.
    """
    tokens, logits = _prompt_tokens(Q, S, common) + Q * G * T, Q * G * T
    flops = 2.0 * block_weights(cfg) * tokens + 2.0 * head_weights(cfg) * logits
    flops += _attention(cfg, _prompt_pairs(Q, S, common) + _row_pairs(Q, G, S, T))
    traffic = _activation_bytes(cfg, tokens) + 2 * FLOAT_BYTES * logits * cfg.padded_vocab_size
    weights = COMPUTE_BYTES * (block_weights(cfg) + head_weights(cfg))
    return Work(flops, flops, float(traffic), float(weights))


def optimizer_work(cfg: ModelConfig) -> Work:
    """Adam: reads weights, gradients and two moments, writes weights and moments; 12 operations."""
    params = num_params(cfg)
    return Work(12.0 * params, 0.0, 7.0 * FLOAT_BYTES * params)


def reshard_work(cfg: ModelConfig) -> Work:
    """Master weights read by the chips that hold them, the rollout's copies written."""
    params = num_params(cfg)
    return Work(0.0, 0.0, FLOAT_BYTES * params, COMPUTE_BYTES * params)


def update_work(cfg: ModelConfig, Q: int, G: int, S: int, T: int, *, remat: str = "none",
                micro_batches: int = 1, common: int = 0) -> Work:
    """Forward, backward and optimizer of one update over Q prompts in `micro_batches` pieces.

    The head's logits are always computed again in the backward pass (`training.logp`), the blocks
    as the remat policy says. Each piece reads the weights once per pass and adds its gradients to
    a sum. Useful: three forward passes.

    Raises:
      ValueError: a remat policy that is not in `REPEATED`.
    """
    if remat not in REPEATED:
        raise ValueError(f"remat={remat!r}: expected one of {tuple(REPEATED)}")
    forward = forward_work(cfg, Q, G, S, T, common)
    products, attention = REPEATED[remat]
    tokens, logits = _prompt_tokens(Q, S, common) + Q * G * T, Q * G * T
    repeated = 2.0 * head_weights(cfg) * logits
    repeated += products * 2.0 * block_weights(cfg) * tokens
    pairs = _prompt_pairs(Q, S, common) + _row_pairs(Q, G, S, T)
    repeated += attention * _attention(cfg, pairs)
    passes = 4 if products or attention else 3
    gradients = 3 * FLOAT_BYTES * num_params(cfg) * micro_batches  # read the sum, add, write it
    return Work(
        3 * forward.flops + repeated, 3 * forward.flops,
        passes * forward.hbm_bytes + gradients, passes * micro_batches * forward.weight_bytes,
    ) + optimizer_work(cfg)


def _link_seconds(found: Sequence[Collective], topology: Topology, iterations: int) -> float:
    """Seconds that the links (DCN: the network card's share) of one chip are busy."""
    seconds = 0.0
    for collective in found:
        if collective.over_dcn:
            bandwidth = topology.chip.dcn_bandwidth
        else:
            bandwidth = topology.ici_bandwidth(collective.group_size)
        seconds += collective.total_bytes(iterations) / bandwidth
    return seconds


def seconds(work: Work, found: Sequence[Collective], topology: Topology, *, tensor: int,
            iterations: int = 1) -> Times:
    """The least time of one run of a program.

    The compiled text says which collectives run beside other work (started and awaited later, in
    chains of fusions, wound around matrix products): they are taken to do so perfectly. For the
    others (`Collective.blocking`) the chip waits, and so it does for all of those inside the decode
    loop, where nothing is left to do meanwhile: their time is added.

    Args:
      found: the program's collectives, `hlo.collectives`; amounts are per chip already.
      tensor: chips that share one copy of the weights.
      iterations: of the loop whose length the compiler cannot know; 1 where there is none.
    """
    compute = work.flops / topology.chips / topology.chip.bf16_flops
    hbm = work.hbm_bytes_per_chip(topology.chips, tensor) / topology.chip.hbm_bandwidth
    beside = [c for c in found if not (c.in_loop or c.blocking)]
    between = [c for c in found if c.in_loop or c.blocking]
    ici, dcn = (
        [_link_seconds([c for c in part if c.over_dcn == over], topology, iterations)
         for part in (beside, between)]
        for over in (False, True)
    )
    total = max(compute, hbm, ici[0], dcn[0]) + ici[1] + dcn[1]
    return Times(compute, hbm, sum(ici), sum(dcn), total)


def mfu(useful_flops: float, total_seconds: float, topology: Topology) -> float:
    """Model FLOPs utilisation: useful operations / what all chips could do in that time."""
    return useful_flops / (total_seconds * topology.chip.bf16_flops * topology.chips)
