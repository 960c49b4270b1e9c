"""The programs that the compile command knows are those that a run calls, with what lies beside."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
import runs
from jax.sharding import NamedSharding, PartitionSpec

from gtalign_jax import bench as bench_lib
from gtalign_jax import run as run_lib
from gtalign_jax.aot.programs import bytes_per_chip, programs
from gtalign_jax.model.load import ModelSource, model_sizes
from gtalign_jax.model.sharding import MeshConfig, make_mesh
from gtalign_jax.model.spec import num_params
from gtalign_jax.training import collect, grpo, learner, sft

# Wide enough for weights to outweigh what nobody counts (keys, advantages, a step's tokens).
WIDE = {
    "model__d_model": 256, "model__d_ff": 1024, "model__num_layers": 2, "model__head_dim": 64,
    "grpo__steps": 1, "sft__steps": 1, "rollout__micro_batch_prompts": 2,
    "grpo__prompts_per_step": 16, "mesh__fsdp": 4, "mesh__tensor": 2,
    "grpo__minibatches": 2, "model__compute_dtype": "bfloat16",
}


def by_name(config):
    mesh = make_mesh(config.mesh)
    return {p.name: p for p in programs(config, model_sizes(config.model), mesh)}


def on_first_chip() -> int:
    """Bytes of all arrays on device 0; several arrays may show the same piece of memory."""
    pieces = {}
    for array in jax.live_arrays():
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            continue
        for shard in array.addressable_shards:
            if shard.device == jax.devices()[0] and shard.data.size:
                pieces[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(pieces.values())


def test_bytes_of_a_chip_are_those_of_its_shards():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    tree = {
        "cut": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=place("fsdp", "tensor")),
        "whole": jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=place()),
    }
    assert bytes_per_chip(tree) == (8 // 4) * (6 // 2) * 4 + 5 * 2


def test_a_run_has_the_programs_of_its_stages_and_settings(tmp_path):
    full = by_name(runs.config(tmp_path, **WIDE))
    assert list(full) == [
        "initialise", "sft start", "sft update", "evaluate prefill", "evaluate decode", "reference",
        "grpo start", "reshard", "prefill", "decode", "games", "reward", "old logp",
        "reference logp", "update",
    ]
    calls = {name: p.calls for name, p in full.items() if p.calls}
    assert calls == {
        "reshard": 1, "prefill": 2, "decode": 2, "games": 1, "reward": 1, "old logp": 1,
        "reference logp": 1, "update": 2,
    }
    less = by_name(runs.config(tmp_path, stages=("grpo",), grpo__reference=False, grpo__beta=0.0,
                               model__path="Qwen/Qwen2.5-0.5B", mesh__fsdp=4, mesh__tensor=2))
    assert set(less) == {
        "grpo start", "reshard", "prefill", "decode", "games", "reward", "update"
    }
    assert {p.name for p in full.values() if p.where == "host"} == {"games", "reward"}


def test_a_run_that_packs_its_completions_has_the_programs_of_bins(tmp_path):
    """A bin for every row, in whole micro-batches, each as long as a completion may be."""
    padded = by_name(runs.config(tmp_path, **WIDE))
    packed = by_name(runs.config(tmp_path, **WIDE, grpo__pack=3, grpo__pack_rows=3))
    assert list(packed) == list(padded)
    for name in ("old logp", "reference logp", "update"):
        batch = packed[name].arguments[1]
        X, N, W = batch.inputs.shape
        rows = padded["update"].arguments[1].lengths_QG.size // X
        assert N == -(-rows // 3) * 3 and W == 24
        assert packed[name].calls == 2
        assert (packed[name].resident["whole batch"]
                == bytes_per_chip(padded["old logp"].arguments[1]))
    assert "while" in packed["update"].lower().as_text()


JUDGE = {"judge__kind": "jax", "judge__model": "Qwen/Qwen2.5-0.5B", "judge__batch_size": 8,
         "judge__prompt_tokens": 512, "judge__max_tokens": 64}


def test_a_judge_on_the_same_devices_has_programs_and_lies_beside_all_others(tmp_path):
    """Its weights are in bfloat16 and cut in two, but for norms and biases, which are small."""
    plain = by_name(runs.config(tmp_path, **WIDE))
    both = by_name(runs.config(tmp_path, **WIDE, **JUDGE))
    assert list(both) == [*plain, "judge prefill", "judge decode"]
    prefill, decode = both["judge prefill"], both["judge decode"]
    params, tokens_QS, lengths_Q = prefill.arguments
    assert tokens_QS.shape == (8, 512) and params.embed_VD.dtype == jnp.bfloat16
    half = num_params(model_sizes(ModelSource(path="Qwen/Qwen2.5-0.5B"))) * 2 / 2
    assert bytes_per_chip(params) == pytest.approx(half, rel=0.01)
    for name, program in plain.items():
        beside = {} if program.where == "host" else {"judge": bytes_per_chip(params)}
        assert both[name].resident == {**program.resident, **beside}
        assert both[name].calls == program.calls
    # 16 x 2 completions, each to be judged once, at most.
    assert (prefill.calls, decode.calls, decode.loop_steps) == (4, 4, 64)
    assert set(prefill.resident) == set(decode.resident) == {"state", "reference", "batch"}
    within = by_name(runs.config(tmp_path, **WIDE, **JUDGE, evaluate__every_steps=1))
    copy = within["judge decode"].resident["rollout's copy"]
    assert copy == bytes_per_chip(plain["decode"].arguments[0])
    alone = by_name(runs.config(tmp_path, **WIDE, **JUDGE, stages=("evaluate",)))
    assert set(alone["judge decode"].resident) == {"policy", "rollout's copy"}
    assert alone["judge decode"].calls == 0
    assert "while" in decode.lower().as_text()


@pytest.mark.parametrize("changed, message", [
    ({"judge__batch_size": 6}, "judge.batch_size=6 must be a multiple of 4"),
    ({"judge__model": "/no/such"}, "judge.model='/no/such'"),
    ({"mesh__tensor": 4, "mesh__fsdp": 2, "model__num_kv_heads": 4},
     "judge.model='Qwen/Qwen2.5-0.5B': mesh.tensor=4 does not divide"),
])
def test_a_judge_that_cannot_work_is_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        by_name(runs.config(tmp_path, **{**WIDE, **JUDGE, **changed}))


@pytest.mark.slow
@pytest.mark.long
def test_what_lies_on_a_chip_when_a_program_is_called_is_its_arguments_and_residents(
        tmp_path, monkeypatch):
    """A whole run whose functions look at the device's memory before they start."""
    seen = collections.defaultdict(list)

    def spying(name, function):
        def call(*args, **options):
            seen[name(*args) if callable(name) else name].append(on_first_chip())
            return function(*args, **options)

        return call

    def whose_logps(params, batch):
        return f"{'old' if params.embed_VD.dtype == jnp.float32 else 'reference'} logp"

    def spy_on(module, maker, name):
        make = getattr(module, maker)
        monkeypatch.setattr(
            module, maker, lambda *a, **k: spying(name, make(*a, **k))
        )

    spy_on(grpo, "make_update", "update")
    spy_on(sft, "make_update", "sft update")
    spy_on(grpo, "make_logps", whose_logps)
    spy_on(learner, "make_reshard", "reshard")
    make = bench_lib.make_sampler

    def make_sampler(model, settings, samples, *rest):
        made, prefix = make(model, settings, samples, *rest), "evaluate " * (samples == 1)
        return dataclasses.replace(made, prefill=spying(f"{prefix}prefill", made.prefill),
                                   first=spying(f"{prefix}decode", made.first))

    monkeypatch.setattr(bench_lib, "make_sampler", make_sampler)
    monkeypatch.setattr(collect, "decode", runs.fluent)
    before = on_first_chip()
    config = runs.config(tmp_path, **WIDE)
    run_lib.run(config)
    expected = by_name(config)
    assert set(seen) == {
        "sft update", "evaluate prefill", "evaluate decode", "reshard", "prefill", "decode",
        "old logp", "reference logp", "update",
    }
    for name, calls in seen.items():
        program = expected[name]
        counted = sum(program.resident.values()) + bytes_per_chip(program.arguments)
        lying = max(calls) - before
        assert lying == pytest.approx(counted, rel=0.05), (name, dict(program.resident))
