"""The forward pass of generation, over caches.

    prefill      prompts_QS          -> PromptCache    keys and values of each prompt, once
    decode_step  token_QG + caches   -> hidden_QGD     one token of every row
    extend       tokens_QGF + caches -> hidden_QGFD    several tokens, of rows out of step

A group's G completions have one prompt, and all prompts may begin alike (in GTAlign most of every
prompt is the same instruction). So keys and values exist in three places: of the common prefix once
per batch shard, of the rest of each prompt once per group, and of its own tokens once per row
(`attend_cached`). Heads come before positions: what one head reads lies together.

Own caches are `[L, A, B, K, H, C]` (keys, transposed) and `[L, A, B, K, C, H]` (values): the rows
in use are the first of each of the A parts. For whole groups A = Q and B = G. On accelerators that
is one array and a scan over layers. On a CPU, where a scan would copy each layer's weights and
caches out of their arrays at every token, layers are unrolled, each with arrays of its own (L = 1),
and a cache of a few blocks is so many arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gtalign_jax.model import attend_cached, forward
from gtalign_jax.model.attention import prompt_mask
from gtalign_jax.model.block import cos_sin, finish, fuse, qkv, rms_norm
from gtalign_jax.model.sharding import Layout, platform_of
from gtalign_jax.model.spec import ModelConfig, Params

# Logical axes of keys and values: of prompts (and of their common prefix), and of own tokens.
PROMPT_CACHE_AXES = ("layers", "prompts", "act_heads", None, None)  # LQKHS, LXKHP
OWN_CACHE_AXES = ("layers", "prompts", None, "act_heads", None, None)  # LQGKHC

Cache = tuple[jax.Array, ...]  # of all layers: one array, or one for each


@struct.dataclass
class PromptCache:
    """Keys and values of the prompt stream, without the prefix common to all.

    lengths_Q: of the whole stream, the prefix included. common: the prefix's keys and values,
    `[L, X, K, H, P]` and `[L, X, K, P, H]`; None where prompts begin differently.
    """

    k_LQKHS: jax.Array
    v_LQKSH: jax.Array
    lengths_Q: jax.Array
    common: tuple[jax.Array, jax.Array] | None = None

    @property
    def prefix(self) -> int:
        return 0 if self.common is None else self.common[0].shape[4]

    @property
    def width(self) -> int:
        """Of the longest prompt that fits, the prefix included."""
        return self.prefix + self.k_LQKHS.shape[4]

    @property
    def mask_QS(self) -> jax.Array:
        """What is real of the prompts without the prefix."""
        return prompt_mask(self.lengths_Q - self.prefix, self.k_LQKHS.shape[4])


def prefill(params: Params, cfg: ModelConfig, tokens_QS, lengths_Q, layout: Layout | None = None,
            common: int = 0) -> PromptCache:
    """Keys and values of the prompt stream (all prompt tokens but the last).

    `common`: how many tokens all prompts begin with; fewer than any prompt has.
    """
    past = forward.common_past(params, cfg, tokens_QS, common, layout)
    keys = lambda k: jnp.moveaxis(k, -3, -1)  # noqa: E731  SKH -> KHS
    values = lambda v: jnp.swapaxes(v, -3, -2)  # noqa: E731  SKH -> KSH
    _, (k, v) = forward.run_prompts(
        params, cfg, tokens_QS[:, common:], lengths_Q - common, layout, past=past,
        emit=lambda k, v: (keys(k), values(v)),
    )
    before = None if past is None else (keys(past.k_LXPKH), values(past.v_LXPKH))
    return PromptCache(k, v, lengths_Q, before)


def unrolls(layout: Layout | None) -> bool:
    """Whether layers are unrolled: on a CPU, unless their weights are cut."""
    whole = layout is None or layout.axis_size("act_heads") == 1
    return whole and platform_of(layout) == "cpu"


def own_caches(cfg: ModelConfig, Q: int, G: int, T: int, dtype,
               layout: Layout | None = None) -> tuple[Cache, Cache]:
    """Zeros for the keys and the values of T tokens of every row."""
    L, K, H, C = cfg.num_layers, cfg.num_kv_heads, cfg.head_dim, attend_cached.own_width(T)
    arrays, depth = 1, L
    if unrolls(layout):
        pieces = attend_cached.own_pieces(T)
        arrays, depth, C = L * pieces, 1, C // pieces

    def zeros(*shape: int) -> jax.Array:
        x = jnp.zeros((depth, Q, G, *shape), dtype)
        return x if layout is None else layout.constrain(x, *OWN_CACHE_AXES)

    return (tuple(zeros(K, H, C) for _ in range(arrays)),
            tuple(zeros(K, C, H) for _ in range(arrays)))


@struct.dataclass
class Model:
    """What `decode_step` and `extend` read and do not change; `ready` makes it before any loop.

    layers: the weights. shared: keys and values of prompts and prefix, `(k, v, (k, v) or None)`.
    Both stacked, or where layers are unrolled one for each. cos_S1H, sin_S1H: of every position.
    """

    params: Params
    layers: Any
    shared: Any
    cos_S1H: jax.Array
    sin_S1H: jax.Array


def _is_unrolled(caches: Cache) -> bool:
    return len(caches) > 1


def _width(caches: Cache, cfg: ModelConfig) -> int:
    """Positions of the own caches (values)."""
    return caches[0].shape[4] * max(len(caches) // cfg.num_layers, 1)


def ready(params: Params, cfg: ModelConfig, prompt: PromptCache, values: Cache) -> Model:
    """The model for rows that go on from `prompt` with such own caches."""
    layers, shared = params.layers, (prompt.k_LQKHS, prompt.v_LQKSH, prompt.common)
    if _is_unrolled(values):
        each = [jax.tree.map(lambda w: w[i], (layers, shared))  # noqa: B023
                for i in range(cfg.num_layers)]
        layers, shared = [fuse(w) for w, _ in each], [kv for _, kv in each]
    # A table: computed where it is used, it would be computed for every head of every row.
    width = prompt.width + _width(values, cfg)
    return Model(params, layers, shared, *cos_sin(cfg, jnp.arange(width), 3))


def decode_step(model: Model, cfg: ModelConfig, prompt: PromptCache, k: Cache, v: Cache, token_QG,
                t) -> tuple[jax.Array, Cache, Cache]:
    """One token of every row, written at own-cache position `t` (the same for all rows).

    Rows are the first of each of the caches' A parts: Q G = A b with b <= B.

    Returns (final hidden `[Q, G, D]`, the two own caches with position t filled).
    """
    (_, A, *_), (Q, G) = k[0].shape, token_QG.shape

    def write(cache, new, at, axis: int):
        """At position `t - at` of `axis`, if it is there."""
        place = [0] * 6
        inside = jnp.clip(t - at, 0, cache.shape[axis] - 1)
        place[axis] = inside
        if cache.shape[axis] < _width(v, cfg):  # a piece of the cache, and perhaps not the one
            old = jax.lax.dynamic_slice(cache, place, new.shape)
            new = jnp.where(inside == t - at, new, old)
        return jax.lax.dynamic_update_slice(cache, new, place)

    def write_k(cache, new_LQGFKH, at):
        L, _, _, _, K, H = new_LQGFKH.shape
        return write(cache, new_LQGFKH.reshape(L, A, Q * G // A, K, H, 1), at, 5)

    def write_v(cache, new_LQGFKH, at):
        L, _, _, _, K, H = new_LQGFKH.shape
        return write(cache, new_LQGFKH.reshape(L, A, Q * G // A, K, 1, H), at, 4)

    x, k, v = _cached(model, cfg, prompt, k, v, token_QG[..., None], jnp.reshape(t, (1, 1)),
                      (write_k, write_v))
    return x[:, :, 0], k, v


def extend(model: Model, cfg: ModelConfig, prompt: PromptCache, k: Cache, v: Cache, tokens_QGF,
           start_QG, count_QG) -> tuple[jax.Array, Cache, Cache]:
    """Some tokens of every row at once, at own-cache positions that differ from row to row.

    Row (q, g) feeds its first `count_QG` tokens at positions start, start + 1, …; the rest of its F
    writes nothing, and neither does a position past the cache. With F = 1 it is `decode_step` of
    rows that are not in step.

    Returns (final hidden `[Q, G, F, D]`, the two own caches).
    """
    (Q, G, F), C = tokens_QGF.shape, v[0].shape[4]
    at_QGF = start_QG[..., None] + jnp.arange(F)[None, None]
    fed_QGF = jnp.arange(F)[None, None] < count_QG[..., None]
    q_QGF = jnp.broadcast_to(jnp.arange(Q)[:, None, None], (Q, G, F))
    g_QGF = jnp.broadcast_to(jnp.arange(G)[None, :, None], (Q, G, F))

    def place(at) -> jax.Array:
        """Where in a piece of the cache that begins at `at`; its width for nowhere."""
        here = fed_QGF & (at_QGF >= at) & (at_QGF < at + C)
        return jnp.where(here, at_QGF - at, C)

    def write_k(cache, new_LQGFKH, at):
        # Not by vmap: that would turn the whole cache over, and back, for a few positions.
        new = jnp.moveaxis(new_LQGFKH, 0, 3)
        return cache.at[:, q_QGF, g_QGF, :, :, place(at)].set(new, mode="drop")

    def write_v(cache, new_LQGFKH, at):
        new = jnp.moveaxis(new_LQGFKH, 0, 3)
        return cache.at[:, q_QGF, g_QGF, :, place(at)].set(new, mode="drop")

    return _cached(model, cfg, prompt, k, v, tokens_QGF, start_QG, (write_k, write_v))


def _cached(model: Model, cfg: ModelConfig, prompt: PromptCache, k: Cache, v: Cache, tokens_QGF,
            start_QG, write: tuple[Callable, Callable]) -> tuple[jax.Array, Cache, Cache]:
    """All blocks over new tokens of rows whose own ones before `start_QG` are in the caches.

    `write(cache, new, at)`: how new keys, and values, `[L, Q, G, F, K, H]` go into a cache, or the
    piece of it that begins at `at`. That is done when all layers have read, so that it can be done
    in place.
    """
    F = tokens_QGF.shape[2]
    at_QGF = prompt.lengths_Q[:, None, None] + start_QG[..., None] + jnp.arange(F)[None, None]
    cos, sin = (x.at[at_QGF].get(mode="clip") for x in (model.cos_S1H, model.sin_S1H))
    mask_QS, flat = prompt.mask_QS, _is_unrolled(k)

    def block(x_QGFD, w, shared, own):
        q, new_k, new_v = qkv(x_QGFD, w, cfg, cos, sin)
        prompt_k, prompt_v, common = shared
        q_QGKMH = attend_cached.queries(q)
        running = attend_cached.new(q_QGKMH, new_k, new_v, flat)
        if common is not None:
            running = attend_cached.add_shared(running, q_QGKMH, *common, flat=flat)
        running = attend_cached.add_shared(running, q_QGKMH, prompt_k, prompt_v, mask_QS, flat=flat)
        running = own(running, q_QGKMH)
        x_QGFD = finish(x_QGFD, attend_cached.finish(running, F, q.dtype), w, cfg)
        return x_QGFD, (new_k, new_v)

    x = jnp.take(model.params.embed_VD, tokens_QGF, axis=0)
    if not flat:
        def step(x, xs):
            own = lambda running, q: attend_cached.add_own(  # noqa: E731
                running, q, k[0], v[0], xs[2], start_QG, flat=False)
            return block(x, *xs[:2], own)

        x, new = jax.lax.scan(step, x, (model.layers, model.shared, jnp.arange(cfg.num_layers)))
        new, pieces = [new], 1
    else:
        new, pieces = [], len(k) // cfg.num_layers
        for i, (w, shared) in enumerate(zip(model.layers, model.shared, strict=True)):
            caches = list(zip(k, v, strict=True))[i * pieces : (i + 1) * pieces]
            own = lambda running, q, caches=caches: attend_cached.add_pieces(  # noqa: E731
                running, q, caches, start_QG, flat=True)
            x, fresh = block(x, w, shared, own)
            new.append(jax.tree.map(lambda y: y[None], fresh))
        new = [jax.tree.map(lambda y: _after(y, x), fresh) for fresh in new]
    width = v[0].shape[4]
    k, v = (
        tuple(put(cache, new[i // pieces][side], i % pieces * width)
              for i, cache in enumerate(caches))
        for side, (put, caches) in enumerate(zip(write, (k, v), strict=True))
    )
    return rms_norm(x, model.params.final_norm_D, cfg.norm_eps), k, v


def _after(new: jax.Array, x: jax.Array) -> jax.Array:
    """`new`, once `x` is known.

    XLA writes into a cache in place only where that is certain to come after all reading of it. It
    drops its own barriers before it decides that, so this is a sum with a zero that it cannot see
    through.
    """
    return new + jnp.minimum(jnp.abs(x.reshape(-1)[0]), 0).astype(new.dtype)
