"""What the TPU compiler makes of the programs that pods live by, on small models."""

import re

import pytest
import runs

from gtalign_jax.aot import hlo
from gtalign_jax.aot.measure import measure
from gtalign_jax.aot.programs import programs
from gtalign_jax.aot.topology import describe
from gtalign_jax.model.load import model_sizes
from gtalign_jax.model.sharding import make_mesh

pytestmark = pytest.mark.slow
SMALL = {
    "model__d_model": 256, "model__d_ff": 640, "model__num_layers": 3, "model__head_dim": 128,
    "model__num_heads": 4, "model__num_kv_heads": 2, "model__tie_embeddings": False,
    "model__vocab_size": 32_000, "model__compute_dtype": "bfloat16", "stages": ("grpo",),
    "data__max_prompt_tokens": 128, "rollout__max_new_tokens": 256, "grpo__steps": 1,
    "grpo__prompts_per_step": 4, "grpo__samples_per_prompt": 4, "grpo__remat": "full",
    "grpo__logit_chunk": 64,
}


def program_of(tmp_path, name: str, slice_name: str, **changes):
    """(program, topology) of a run on `slice_name`."""
    config = runs.config(tmp_path, **{**SMALL, **changes})
    topology = describe(slice_name)
    mesh = make_mesh(config.mesh, topology.devices)
    made = programs(config, model_sizes(config.model), mesh)
    return next(p for p in made if p.name == name), topology


def test_the_decode_loop_gathers_no_weight_and_calls_no_host(tmp_path):
    """The rules of rollout cut weights over `tensor` alone, and leave them there.

    What the loop does send: two sums per layer, the embedding's, and one token's logits and the
    little that says which token was drawn.
    """
    program, _ = program_of(tmp_path, "decode", "v4-8", mesh__tensor=2)
    bodies = hlo.while_bodies(program.lower().compile().as_text())
    assert not any(body.host for body in bodies)
    inside = [c for body in bodies for c in body.collectives]
    shapes = {(c.kind, c.shape) for c in inside}
    assert ("all-reduce", "bf16[2,4,1,256]") in shapes, shapes
    layers = next(body for body in bodies if body.trips == 3)
    assert {c.kind for c in layers.collectives} == {"all-reduce"}
    gathered = {shape for kind, shape in shapes if kind not in ("all-reduce",)}
    # Q G = 8 rows on a chip, half of the vocabulary on each of two: nothing has a weight's shape.
    rows = ("f32[2,4,", "s32[2,4,", "pred[2,4,")
    assert all(shape.startswith(rows) for shape in gathered), shapes


def test_the_update_attends_by_the_kernel_and_sums_gradients_into_pieces(tmp_path):
    """Of all-reduces there are only those of vectors, and the head's, where XLA prefers it."""
    row = measure(*program_of(tmp_path, "update", "v4-8", mesh__tensor=2))
    assert any("splash" in name for name in row.kernels), row.kernels
    summed = {c.shape for c in row.collectives if c.kind == "reduce-scatter"}
    assert any("640" in shape for shape in summed), summed
    smallest = 256 * 2 * 128 * 2  # bytes of a layer's smallest matrix
    whole = [c for c in row.collectives if c.kind == "all-reduce" and c.bytes >= smallest]
    assert all("32000" in c.shape for c in whole), whole


def test_the_update_holds_neither_scores_nor_logits(tmp_path):
    """Rows of 384 tokens, groups of 128 + 4 x 384: no array has two such dimensions, as scores
    have, nor one beside the vocabulary's. A chunk of logits has 64 positions."""
    program, _ = program_of(
        tmp_path, "update", "v5e-1", grpo__prompts_per_step=1, rollout__max_new_tokens=384,
        model__d_ff=320, model__num_layers=2, model__num_heads=2, model__num_kv_heads=1,
    )
    text = program.lower().compile().as_text()
    found = re.findall(r"[a-z0-9]+\[([\d,]+)\]", text)
    shapes = {tuple(map(int, dims.split(","))) for dims in found}
    assert (1, 1664, 256) in shapes and any(32_000 in shape for shape in shapes)
    long = {shape: [n for n in shape if n >= 384] for shape in shapes}
    assert not [shape for shape, dims in long.items() if len(dims) > 1]
