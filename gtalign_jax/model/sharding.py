"""Where arrays live: a mesh of named axes, and rules from logical axes to mesh axes.

Training rules and rollout rules are two values of one type. Under `TRAIN` every weight is cut
over `fsdp` (and `tensor`); under `ROLLOUT` it is cut over `tensor` only, so that the decode loop
gathers no weight. Batches are cut by prompt over every axis but `tensor`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtalign_jax.model.spec import ModelConfig, is_spec, param_specs

MESH_AXES = ("slice", "data", "fsdp", "tensor")
ATTENTION = ("auto", "flash", "dense")
BATCH_AXES = ("slice", "data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1, "the rest"."""

    slice: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis (None: not cut)."""

    layers: str | None = None
    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    mlp: str | None = "tensor"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    prompts: tuple[str, ...] | None = BATCH_AXES
    sequence: str | None = "tensor"  # of the residual stream between blocks

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array with these logical axes."""
        table = dataclasses.asdict(self)
        return PartitionSpec(*(None if axis is None else table[axis] for axis in axes))


TRAIN = Rules()
ROLLOUT = Rules(embed=None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, the rules in force on it, and how attention is computed there.

    `attention`: "flash" (the Pallas kernel; interpreted, slowly, where there is no TPU), "dense",
    or "auto": flash on TPUs. Hashable: a static argument.
    """

    mesh: Mesh
    rules: Rules
    attention: str = "auto"

    @property
    def is_tpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "tpu"

    @property
    def flash(self) -> bool:
        return self.attention == "flash" or (self.attention == "auto" and self.is_tpu)

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.rules.spec(*axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pin an intermediate value to its place; trailing dimensions are not cut.

        An axis that does not divide its dimension leaves that dimension whole.
        """
        sizes = dict(zip(MESH_AXES, self.mesh.devices.shape, strict=True))
        table = dataclasses.asdict(self.rules)

        def divides(axis: str | None, size: int) -> bool:
            cut = () if axis is None or table[axis] is None else table[axis]
            names = (cut,) if isinstance(cut, str) else cut
            return size % math.prod(sizes[name] for name in names) == 0

        axes = tuple(
            axis if divides(axis, n) else None for axis, n in zip(axes, x.shape, strict=False)
        )
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))


def mesh_shape(cfg: MeshConfig, device_count: int) -> tuple[int, ...]:
    """The size of each mesh axis, -1 resolved.

    Raises:
      ValueError: more than one -1, or a product that is not the number of devices.
    """
    sizes = [getattr(cfg, axis) for axis in MESH_AXES]
    shown = ", ".join(f"{a}={n}" for a, n in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise ValueError(f"mesh ({shown}): sizes are >= 1, and at most one may be -1")
    known = math.prod(n for n in sizes if n != -1)
    if -1 in sizes and device_count % known == 0:
        sizes[sizes.index(-1)] = device_count // known
    if math.prod(sizes) != device_count:
        divisors = [n for n in range(1, device_count + 1) if device_count % n == 0]
        raise ValueError(
            f"mesh ({shown}) does not fit {device_count} devices: the product of the sizes must "
            f"be {device_count}; sizes that divide it are {divisors}, or -1 for the rest"
        )
    return tuple(sizes)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them), axes `MESH_AXES`."""
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(cfg, len(devices))
    if devices[0].platform == "cpu":
        return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)
    return jax.make_mesh(
        shape, MESH_AXES, (jax.sharding.AxisType.Auto,) * len(shape), devices=devices
    )


def check_model_fits(cfg: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError where a cut dimension is not a multiple of its mesh axis."""
    sizes = dict(zip(MESH_AXES, mesh.devices.shape, strict=True))
    for key, size, axis in (
        ("num_heads", cfg.num_heads, "tensor"),
        ("num_kv_heads", cfg.num_kv_heads, "tensor"),
        ("d_ff", cfg.d_ff, "tensor"),
        ("padded_vocab_size", cfg.padded_vocab_size, "tensor"),
        ("d_model", cfg.d_model, "fsdp"),
    ):
        if size % sizes[axis]:
            allowed = [n for n in range(1, sizes[axis] + 1) if size % n == 0]
            raise ValueError(
                f"mesh.{axis}={sizes[axis]} does not divide the model's {key}={size}: "
                f"mesh.{axis} may be one of {allowed}"
            )


def param_shardings(cfg: ModelConfig, layout: Layout) -> Any:
    """`NamedSharding`s in the shape of `Params`."""
    return jax.tree.map(lambda s: layout.sharding(*s.axes), param_specs(cfg), is_leaf=is_spec)
