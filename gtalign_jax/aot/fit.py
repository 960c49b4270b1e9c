"""The largest micro-batches and the cheapest recomputation that fit, found by compiling.

For each remat policy the largest micro-batch whose update fits; of these the one that the roofline
models fastest. Then the largest micro-batch of the rollout. Memory grows with the micro-batch, so
the sizes are bisected.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gtalign_jax.aot.knobs import flags, get, micro_batches, put
from gtalign_jax.aot.measure import Row
from gtalign_jax.aot.programs import Program, programs
from gtalign_jax.aot.topology import Topology
from gtalign_jax.config import Config
from gtalign_jax.model.forward import REMAT_POLICIES
from gtalign_jax.model.sharding import make_mesh
from gtalign_jax.model.spec import ModelConfig

SEARCHES = (  # stage, key of the micro-batch, key of the remat policy, programs that must fit
    ("sft", "sft.micro_batch_size", "sft.remat", ("sft update",)),
    ("grpo", "grpo.micro_batch_prompts", "grpo.remat", ("update", "reference logp", "old logp")),
    ("grpo", "rollout.micro_batch_prompts", None, ("decode", "prefill")),
)
Compile = Callable[[Config, str], Row | None]  # one program of a config; None: it has none


@dataclasses.dataclass(frozen=True)
class Found:
    """values: what to set, by key. missing: keys for which no allowed size fits."""

    values: dict[str, Any]
    missing: tuple[str, ...]

    @property
    def flags(self) -> str:
        return flags(self.values)


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of rising `sizes` that fits, None where none does; fitting is monotone."""
    low, high, best = 0, len(sizes) - 1, None
    while low <= high:
        middle = (low + high + 1) // 2
        if fits(sizes[middle]):
            best, low = sizes[middle], middle + 1
        else:
            high = middle - 1
    return best


def search(config: Config, model: ModelConfig, topology: Topology, compile_one: Compile) -> Found:
    """The values to set; `compile_one(config, name)` compiles one program of a config."""
    values: dict[str, Any] = {}
    missing = []
    for stage, key, remat, wanted in SEARCHES:
        if stage not in config.stages:
            continue
        sizes = micro_batches(config, model, topology, key)
        candidates = []
        for policy in REMAT_POLICIES if remat else (None,):
            start = put(config, {remat: policy} if remat else {})
            found = _largest_of(start, key, sizes, wanted, compile_one)
            if found is not None:
                size, seconds = found
                chosen = {key: size} | ({remat: policy} if remat else {})
                candidates.append((seconds, -size, chosen))
        if candidates:
            values |= min(candidates, key=lambda c: c[:2])[2]
            config = put(config, values)
        else:
            missing.append(key)
    return Found(values, tuple(missing))


def _largest_of(config: Config, key: str, sizes: Sequence[int], wanted: Sequence[str],
                compile_one: Compile) -> tuple[int, float] | None:
    """(the largest size with which all `wanted` programs fit, their modelled seconds per step)."""
    seconds: dict[int, float] = {}

    def fits(size: int) -> bool:
        total = 0.0
        for name in wanted:
            row = compile_one(put(config, {key: size}), name)
            if row is None:
                continue
            if not row.fits:
                return False
            total += max(row.calls, 1) * row.times.total
        seconds[size] = total
        return True

    best = largest(sizes, fits)
    return None if best is None else (best, seconds[best])


def compiler(model: ModelConfig, topology: Topology,
             measure: Callable[[Program, Config], Row]) -> Compile:
    """A `Compile` that compiles nothing twice."""
    done: dict[tuple[Config, str], Row | None] = {}

    def compile_one(config: Config, name: str) -> Row | None:
        if (config, name) not in done:
            mesh = make_mesh(config.mesh, topology.devices)
            named = {program.name: program for program in programs(config, model, mesh)}
            done[config, name] = measure(named[name], config) if name in named else None
        return done[config, name]

    return compile_one


def tried(config: Config, name: str) -> str:
    """The searched settings that decide about the program `name`, as text."""
    keys = [key for _, micro, remat, wanted in SEARCHES if name in wanted
            for key in (micro, remat) if key is not None]
    return ", ".join(f"{key}={get(config, key)}" for key in keys)
