"""Which settings would make room for a program that does not fit.

    held      arguments + outputs + what else the run keeps: weights, moments, reference
    the rest  temporaries: activations, caches; they follow the micro-batch

Smaller micro-batches help where only the second is too large. Every flag named here passes the
config's own checks; whether it is enough, the next compilation says (`--fit` tries them).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from gtalign_jax.aot.measure import Row
from gtalign_jax.aot.topology import Topology, names
from gtalign_jax.config import Config, check
from gtalign_jax.model.sharding import batch_shards, check_model_fits, make_mesh
from gtalign_jax.model.spec import ModelConfig

MICRO_BATCH = {  # program -> the key that cuts its batch
    "sft update": "sft.micro_batch_size",
    "old logp": "grpo.micro_batch_prompts",
    "reference logp": "grpo.micro_batch_prompts",
    "update": "grpo.micro_batch_prompts",
    "prefill": "rollout.micro_batch_prompts",
    "decode": "rollout.micro_batch_prompts",
    "evaluate prefill": "evaluate.batch_size",
    "evaluate decode": "evaluate.batch_size",
}
REMAT = {"sft update": "sft.remat", "update": "grpo.remat"}


def get(config: Config, key: str) -> Any:
    """The value of `section.name`."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def put(config: Config, values: dict[str, Any]) -> Config:
    """`config` with other values, by `section.name`. Raises ValueError where a section refuses."""
    for key, value in values.items():
        section, name = key.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def flags(values: dict[str, Any]) -> str:
    """The overrides of a command line."""
    return " ".join(f"--config.{key}={value}" for key, value in values.items())


def whole_batch(config: Config, topology: Topology, key: str) -> int:
    """The largest useful value of `key`; micro-batches are counted per batch shard."""
    grpo = config.grpo
    shards = batch_shards(config.mesh, topology.chips, topology.slices)
    return {
        "sft.micro_batch_size": config.sft.batch_size // shards,
        "grpo.micro_batch_prompts": grpo.prompts_per_step // grpo.minibatches // shards,
        "rollout.micro_batch_prompts": grpo.prompts_per_step // shards,
        "evaluate.batch_size": config.evaluate.batch_size,
    }[key]


def micro_batches(config: Config, model: ModelConfig, topology: Topology, key: str) -> list[int]:
    """The values of `key` that a run on `topology` would accept, rising; the whole batch too."""
    whole = whole_batch(config, topology, key)
    sizes = [n for n in range(1, whole + 1) if whole % n == 0]
    return [n for n in sizes if is_allowed(put(config, {key: n}), model, topology)]


def is_allowed(config: Config, model: ModelConfig, topology: Topology) -> bool:
    """Whether a run would accept this config on these chips."""
    try:
        check(config, topology.chips, topology.slices, "tpu")
        check_model_fits(model, make_mesh(config.mesh, topology.devices))
    except ValueError:
        return False
    return True


def advice(row: Row, config: Config, model: ModelConfig, topology: Topology) -> list[str]:
    """What would help `row`, the cheapest first."""
    out = []
    if row.held <= row.capacity:
        out += _smaller(row, config, model, topology)
        if row.name in REMAT and get(config, REMAT[row.name]) != "full":
            out.append(flags({REMAT[row.name]: "full"}))
        out += _shorter(row, config)
    elif config.mesh.data > 1:
        out.append(f"{flags({'mesh.data': 1, 'mesh.fsdp': -1})} (cut weights, do not copy them)")
    out += _tensor(row, config, model, topology)
    if row.held > row.capacity and "reference" in row.resident:
        out.append(f"{flags({'grpo.reference': False, 'grpo.beta': 0.0})} (another experiment)")
    generation = topology.chip.generation
    sizes = names()[generation]
    bigger = [n for n in sizes if int(n.split("-")[1]) > int(topology.name.split("-")[1])]
    if bigger:
        out.append(f"more chips, --topology={bigger[0]}")
    return out


def _smaller(row: Row, config: Config, model: ModelConfig, topology: Topology) -> Iterator[str]:
    """The largest smaller micro-batch for which the temporaries, scaled, would fit."""
    if row.name not in MICRO_BATCH:
        return
    key = MICRO_BATCH[row.name]
    now = get(config, key) or whole_batch(config, topology, key)
    sizes = [n for n in micro_batches(config, model, topology, key) if n < now]
    room = (row.capacity - row.held) / max(row.temporaries + row.code, 1)
    good = [n for n in sizes if n <= now * room]
    if sizes:
        yield f"{flags({key: max(good) if good else min(sizes)})} (now {now})"


def _shorter(row: Row, config: Config) -> Iterator[str]:
    if row.name == "sft update":
        yield f"sft.max_completion_tokens below {config.sft.max_completion_tokens}"
    elif row.stage == "judge":
        for key in ("batch_size", "prompt_tokens", "max_tokens"):
            yield f"judge.{key} below {getattr(config.judge, key)}"
    elif row.name in MICRO_BATCH and not row.name.endswith("prefill"):
        yield f"rollout.max_new_tokens below {config.rollout.max_new_tokens}"
    elif row.name in MICRO_BATCH:
        yield f"data.max_prompt_tokens below {config.data.max_prompt_tokens}"


def _tensor(row: Row, config: Config, model: ModelConfig, topology: Topology) -> Iterator[str]:
    """Cuts heads and the rollout's weights; and a prompt then has several chips to itself."""
    for size in range(max(config.mesh.tensor, 1) + 1, topology.chips + 1):
        values: dict[str, Any] = {"mesh.tensor": size}
        wider = put(config, values)
        if topology.chips % size or not is_allowed(wider, model, topology):
            continue
        if row.name in MICRO_BATCH and (key := MICRO_BATCH[row.name]):
            values[key] = min(micro_batches(wider, model, topology, key))
        yield flags(values)
        return
