"""A model small enough for exact comparisons, and rows to feed it."""

import jax
import jax.numpy as jnp
import numpy as np

from gtalign_jax.model.spec import ModelConfig, init_params

CFG = ModelConfig(
    family="qwen3", vocab_size=50, d_model=32, d_ff=48, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, qk_norm=True, qkv_bias=True, vocab_multiple=8, init_scale=0.3,
)


def params(seed: int = 0):
    return init_params(CFG, jax.random.key(seed))


def rows(Q: int = 3, G: int = 4, S: int = 9, T: int = 7, seed: int = 0):
    """(prompts [Q, S], lengths [Q] with the extremes 1 and S, completions [Q, G, T])."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, S + 1, Q)
    lengths[0], lengths[-1] = S, 1
    return (
        jnp.asarray(rng.integers(0, 50, (Q, S)), jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(rng.integers(0, 50, (Q, G, T)), jnp.int32),
    )


def concatenated(prompts_QS, lengths_Q, tokens_QGT, q: int, g: int) -> np.ndarray:
    """The plain row `[1, S + T]`: prompt q followed by its completion g."""
    prompt = np.asarray(prompts_QS[q, : int(lengths_Q[q])])
    return np.concatenate([prompt, np.asarray(tokens_QGT[q, g])])[None]
