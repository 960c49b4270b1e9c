"""Cloud TPU slices by their usual names, as devices to compile for without owning one.

    describe("v5p-64")             32 chips as 2x4x4: v4 and v5p count TensorCores, two per chip
    describe("v5e-256", slices=2)  2 slices of 16x16 chips: v5e and v6e count chips

One chip is one JAX device everywhere. The devices belong to no machine: a mesh can be built from
them and programs compiled for it (`jit(...).lower(...).compile()` then runs libtpu's compiler),
but nothing can run. Shapes are the ones that Google Cloud gives for a size by default.
"""

import dataclasses
import math
import os
from typing import Any

from gtalign_jax.aot.chips import CHIPS, Chip

_TORUS_3D = {  # TensorCores -> chips along x, y, z
    8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4), 256: (4, 4, 8),
    384: (4, 4, 12), 512: (4, 8, 8), 1024: (8, 8, 8), 1536: (8, 8, 12), 2048: (8, 8, 16),
    4096: (8, 16, 16),
}
_PLANE_2D = {  # chips -> chips along x, y
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
    256: (16, 16),
}
_SHAPES = {
    "v4": _TORUS_3D,
    "v5p": _TORUS_3D | {8192: (16, 16, 16), 12288: (16, 16, 24)},
    "v5e": _PLANE_2D,
    "v6e": _PLANE_2D,
}
_ALIASES = {"v5litepod": "v5e"}
# libtpu reads these when it is loaded, to find the chips that it is to drive. It would ask a cloud
# machine's metadata server and wait where there is none, admit one process per machine, and warn
# of what it has not found; here it only compiles. So a process that has described a topology must
# not go on to use an attached TPU.
_COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    name: as asked for, "v5p-64". chip: its kind. shape: chips along each side of one slice.
    chips: of all slices together, = `len(devices)`. chips_per_host: of one virtual machine.
    devices: in JAX's order, slice by slice.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int
    chips_per_host: int
    devices: tuple[Any, ...] = dataclasses.field(repr=False)

    @property
    def chips(self) -> int:
        return len(self.devices)

    @property
    def chips_per_slice(self) -> int:
        return self.chips // self.slices

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    def ici_bandwidth(self, group: int) -> float:
        """Bytes per second that can reach the worst-placed of `group` chips of one slice.

        Along a side that closes into a ring two links lead to every chip, along one that does not
        only one leads to the chip at its end. Rings: in v4 and v5p if all sides are multiples of 4
        (whole cubes), in v5e and v6e along sides of 16. A group of all chips of the slice uses all
        sides, a smaller one is taken to lie along one side.
        """
        cubes = self.chip.cores == 2 and all(side % 4 == 0 for side in self.shape)
        links = sum(
            2 if cubes or self.chip.cores == 1 and side == 16 else 1
            for side in self.shape if side > 1
        )
        used = links if group >= self.chips_per_slice else min(2, links)
        return max(1, used) * self.chip.link_bandwidth


def names() -> dict[str, list[str]]:
    """The names that `describe` knows, by generation."""
    return {kind: [f"{kind}-{size}" for size in shapes] for kind, shapes in _SHAPES.items()}


def _find(name: str) -> tuple[str, tuple[int, ...]]:
    """(generation, shape of one slice) of a name."""
    prefix, _, size = name.lower().strip().partition("-")
    generation = _ALIASES.get(prefix, prefix)
    if generation in _SHAPES and size.isdigit() and int(size) in _SHAPES[generation]:
        return generation, _SHAPES[generation][int(size)]
    known = "\n".join(f"  {', '.join(row)}" for row in names().values())
    raise ValueError(
        f"topology {name!r} is not known. There are (v4 and v5p count TensorCores, 2 per chip; "
        f"v5e, also called v5litepod, and v6e count chips):\n{known}"
    )


def _host_bounds(generation: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Chips of one virtual machine: four, but one or eight where a v5e or v6e has no more."""
    if CHIPS[generation].cores == 1 and math.prod(shape) in (1, 8):
        return (shape[0], shape[1], 1)
    return (2, 2, 1)


def describe(name: str, slices: int = 1) -> Topology:
    """The devices of `slices` slices of that name.

    Raises:
      ValueError: an unknown name (all known ones are listed), or fewer than one slice.
      RuntimeError: libtpu, which holds the compiler, is not installed or cannot be loaded.
    """
    generation, shape = _find(name)
    if slices < 1:
        raise ValueError(f"slices={slices}: must be >= 1")
    for variable, value in _COMPILE_ONLY.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    bounds = _host_bounds(generation, shape)
    try:
        devices = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{generation}:{'x'.join(map(str, shape))}",
            num_slices=slices,
            chip_config_name="megacore" if CHIPS[generation].cores == 2 else "default",
            chips_per_host_bounds=bounds,
        ).devices
    except RuntimeError as error:
        raise RuntimeError(
            f"cannot describe {name!r}: compiling for a TPU needs libtpu, which holds the "
            f"compiler and needs no TPU (pip install libtpu). JAX says: {error}"
        ) from error
    return Topology(name, CHIPS[generation], shape, slices, math.prod(bounds), tuple(devices))
