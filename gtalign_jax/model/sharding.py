"""Where arrays live: a mesh of named axes, and rules from logical axes to mesh axes.

Training rules and rollout rules are two values of one type. Batches are cut by prompt over every
axis but `tensor`.

    TRAIN    every weight is cut along `embed` over fsdp and tensor, and gathered where it is used;
             `tensor` cuts the sequence, and the heads inside attention. One dimension, so that the
             gradient's sum is a reduce-scatter; over two XLA would sum it whole on every device.
    ROLLOUT  every weight is cut by heads, mlp and vocab over `tensor` and stays so: the decode loop
             gathers none
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gtalign_jax.model.spec import ModelConfig, is_spec, param_specs

MESH_AXES = ("slice", "data", "fsdp", "tensor")
ATTENTION = ("auto", "flash", "dense")
BATCH_AXES = ("slice", "data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1, "the rest".

    `slice` is the number of TPU slices, between which data travels over the data-centre network; 0:
    as many as the devices say that there are (1 where they do not know of slices).
    """

    slice: int = 0
    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis or axes (None: not cut). First of weights, then of activations."""

    layers: str | None = None
    vocab: str | None = None
    embed: tuple[str, ...] | None = None
    mlp: str | None = None
    heads: str | None = None
    kv_heads: str | None = None
    prompts: tuple[str, ...] | None = BATCH_AXES
    sequence: str | None = "tensor"  # of the residual stream
    act_heads: str | None = "tensor"  # key/value heads in attention and in caches

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array with these logical axes."""
        table = dataclasses.asdict(self)
        return PartitionSpec(*(None if axis is None else table[axis] for axis in axes))


TRAIN = Rules(embed=("fsdp", "tensor"))
ROLLOUT = Rules(vocab="tensor", mlp="tensor", heads="tensor", kv_heads="tensor")


def is_flash(attention: str, platform: str) -> bool:
    """Whether `attention`, one of ATTENTION, is the kernel on this kind of device."""
    return attention == "flash" or (attention == "auto" and platform == "tpu")


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
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def is_tpu(self) -> bool:
        return self.platform == "tpu"

    @property
    def flash(self) -> bool:
        return is_flash(self.attention, self.platform)

    def axis_size(self, axis: str) -> int:
        """Over how many devices a logical axis is cut."""
        names = dataclasses.asdict(self.rules)[axis] or ()
        sizes = dict(zip(MESH_AXES, self.mesh.devices.shape, strict=True))
        return math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names))

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.rules.spec(*axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pin an intermediate value to its place; trailing dimensions are not cut.

        An axis that does not divide its dimension leaves that dimension whole.
        """
        axes = tuple(
            axis if axis is None or n % self.axis_size(axis) == 0 else None
            for axis, n in zip(axes, x.shape, strict=False)
        )
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))


def platform_of(layout: Layout | None) -> str:
    """The kind of device that a program with this layout is for."""
    return jax.default_backend() if layout is None else layout.platform


Axes = tuple[str | None, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(w: jax.Array, layout: Layout, axes: Axes) -> jax.Array:
    """A weight that lies cut along `axes`, whole on every device for as long as it is used.

    Its gradient is summed straight into the cut pieces (a reduce-scatter). A plain constraint would
    sum it whole on every device first.
    """
    return layout.constrain(w)


def _gather_forward(w: jax.Array, layout: Layout, axes: Axes):
    return gather(w, layout, axes), None


def _gather_backward(layout: Layout, axes: Axes, _: None, grad: jax.Array):
    return (layout.constrain(grad, *axes),)


gather.defvjp(_gather_forward, _gather_backward)


def prompt_shards(layout: Layout | None, prompts: int = 0) -> int:
    """Into how many parts a batch of prompts is cut; 1 where the devices do not divide it."""
    shards = 1 if layout is None else layout.axis_size("prompts")
    return 1 if prompts % shards else shards


def slice_count(devices: Sequence[Any]) -> int:
    """The number of TPU slices; 1 for devices that do not know of slices."""
    return len({d.slice_index for d in devices if hasattr(d, "slice_index")}) or 1


def mesh_shape(cfg: MeshConfig, device_count: int, slices: int = 1) -> tuple[int, ...]:
    """The size of each mesh axis, -1 and the number of slices resolved.

    Raises:
      ValueError: more than one -1, a product that is not the number of devices, or an axis other
        than `slice` that would cross slices.
    """
    sizes = [getattr(cfg, axis) for axis in MESH_AXES]
    sizes[0] = sizes[0] or slices
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
    if sizes[0] % slices:
        raise ValueError(
            f"mesh ({shown}) on {slices} slices: mesh.slice must be a multiple of {slices}, or 0 "
            "for as many; else another axis would run over the network between slices"
        )
    return tuple(sizes)


def batch_shards(cfg: MeshConfig, device_count: int, slices: int = 1) -> int:
    """Into how many parts a batch is cut. Raises ValueError as `mesh_shape` does."""
    sizes = dict(zip(MESH_AXES, mesh_shape(cfg, device_count, slices), strict=True))
    return math.prod(sizes[axis] for axis in BATCH_AXES)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them), axes `MESH_AXES`.

    On TPUs neighbours along an axis are neighbours on the chip's links as far as the shape allows;
    only the axis `slice` leaves a slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = slice_count(devices)
    shape = mesh_shape(cfg, len(devices), slices)
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)
    # Large slices have physical axes that no mesh axis fills: those must be split among several.
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, **options), MESH_AXES)
    inside = (shape[0] // slices, *shape[1:])
    between = (slices, *[1] * (len(shape) - 1))
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, between, **options), MESH_AXES)


def check_model_fits(cfg: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError where a cut dimension is not a multiple of its mesh axis."""
    sizes = dict(zip(MESH_AXES, mesh.devices.shape, strict=True))
    chips = sizes["fsdp"] * sizes["tensor"]
    if cfg.d_model % chips:
        allowed = [n for n in range(1, chips + 1) if cfg.d_model % n == 0]
        raise ValueError(
            f"mesh.fsdp={sizes['fsdp']} x mesh.tensor={sizes['tensor']} = {chips} does not divide "
            f"the model's d_model={cfg.d_model}: it may be one of {allowed}; more chips can go to "
            "mesh.data"
        )
    for key, size, axis in (
        ("num_heads", cfg.num_heads, "tensor"),
        ("num_kv_heads", cfg.num_kv_heads, "tensor"),
        ("d_ff", cfg.d_ff, "tensor"),
        ("padded_vocab_size", cfg.padded_vocab_size, "tensor"),
    ):
        if size % sizes[axis]:
            allowed = [n for n in range(1, sizes[axis] + 1) if size % n == 0]
            raise ValueError(
                f"mesh.{axis}={sizes[axis]} does not divide the model's {key}={size}: "
                f"mesh.{axis} may be one of {allowed}"
            )


def placed(shapes: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s of these shapes and dtypes that lie where `shardings`, alike in form,
    say."""
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )


def param_shardings(cfg: ModelConfig, layout: Layout) -> Any:
    """`NamedSharding`s in the shape of `Params`."""
    return jax.tree.map(lambda s: layout.sharding(*s.axes), param_specs(cfg), is_leaf=is_spec)
