"""Where every array of every shipped config lies: a changed rule shows as a diff of tests/golden.

    GTALIGN_WRITE_GOLDEN=1 python -m pytest tests/test_golden_shardings.py     writes the files anew
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from runs import config_of

from gtalign_jax.aot.topology import describe
from gtalign_jax.config import Config
from gtalign_jax.model import decode, load
from gtalign_jax.model.sharding import ROLLOUT, TRAIN, Layout, make_mesh, param_shardings
from gtalign_jax.model.spec import abstract_params
from gtalign_jax.paper import FITS
from gtalign_jax.training.state import abstract_state, make_optimizer

GOLDEN = Path(__file__).resolve().parent / "golden"
CONFIGS = [("demo_cpu", "", "v5e-8")] + [
    (f"tpu_{machine}", size, fit.slice) for machine, fits in FITS.items()
    for size, fit in fits.items()
]


def place(x: jax.ShapeDtypeStruct, sharding) -> str:
    """For instance "float32 36x2048x16x128 (None, fsdp+tensor) -> 36x512x16x128 on a chip"."""
    axes = ["+".join(a) if isinstance(a, tuple) else str(a) for a in sharding.spec]
    by = "x".join
    return (f"{x.dtype} {by(map(str, x.shape))} ({', '.join(axes)}) -> "
            f"{by(map(str, sharding.shard_shape(x.shape)))} on a chip")


def named(tree, shardings) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    places = jax.tree.leaves(shardings)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): place(x, where)
        for (path, x), where in zip(leaves, places, strict=True)
    }


def shardings_of(config: Config, slice_name: str) -> dict:
    model = load.model_sizes(config.model)
    mesh = make_mesh(config.mesh, describe(slice_name).devices)
    train, rollout = Layout(mesh, TRAIN), Layout(mesh, ROLLOUT)
    dtype = jnp.dtype(config.model.compute_dtype)
    Q, G = config.grpo.prompts_per_step, config.grpo.samples_per_prompt
    S, T = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    state = abstract_state(model, make_optimizer(config.grpo, 1), train)
    adam = state.opt_state[1][0]
    L, K, H = model.num_layers, model.num_kv_heads, model.head_dim
    arrays = {
        "prompt cache k": ((L, Q, K, H, S), decode.PROMPT_CACHE_AXES, dtype),
        "prompt cache v": ((L, Q, K, S, H), decode.PROMPT_CACHE_AXES, dtype),
        "completion cache k": ((L, Q, G, K, H, T), decode.OWN_CACHE_AXES, dtype),
        "completion cache v": ((L, Q, G, K, T, H), decode.OWN_CACHE_AXES, dtype),
        "prompts": ((Q, S), ("prompts",), jnp.int32),
        "completions": ((Q, G, T), ("prompts",), jnp.int32),
        "log-probabilities": ((Q, G, T), ("prompts",), jnp.float32),
    }
    weights = abstract_params(model, dtype)
    return {
        "slice": slice_name,
        "mesh": dict(mesh.shape),
        "policy": named(state.params, jax.tree.map(lambda x: x.sharding, state.params)),
        "first moment": named(adam.mu, jax.tree.map(lambda x: x.sharding, adam.mu)),
        "second moment": named(adam.nu, jax.tree.map(lambda x: x.sharding, adam.nu)),
        "reference": named(weights, param_shardings(model, train)),
        "rollout": named(weights, param_shardings(model, rollout)),
        "arrays": {
            name: place(jax.ShapeDtypeStruct(shape, kind), rollout.sharding(*axes))
            for name, (shape, axes, kind) in arrays.items()
        },
    }


@pytest.mark.parametrize("name, size, slice_name", CONFIGS)
def test_every_array_lies_where_the_golden_file_says(name, size, slice_name):
    found = shardings_of(config_of(name, size), slice_name)
    path = GOLDEN / f"{name}{'_' if size else ''}{size}.json"
    if os.environ.get("GTALIGN_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(path.read_text(encoding="utf-8"))


def test_there_is_no_golden_file_without_a_config():
    names = {f"{name}{'_' if size else ''}{size}.json" for name, size, _ in CONFIGS}
    assert {path.name for path in GOLDEN.glob("*.json")} == names
