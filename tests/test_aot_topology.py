"""Slices by name: every common one is described by libtpu itself, with one device per chip."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from gtalign_jax.aot import topology
from gtalign_jax.aot.chips import CHIPS, GIB, oom_shortfall
from gtalign_jax.aot.topology import describe

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"v4": "TPU v4", "v5p": "TPU v5", "v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}


@pytest.mark.parametrize(
    "name, chips, shape, hosts",
    [
        # v4 and v5p are named after TensorCores: half as many chips, four on each host.
        ("v4-8", 4, (2, 2, 1), 1),
        ("v4-32", 16, (2, 2, 4), 4),
        ("v4-4096", 2048, (8, 16, 16), 512),
        ("v5p-64", 32, (2, 4, 4), 8),
        ("v5p-256", 128, (4, 4, 8), 32),
        ("v5p-12288", 6144, (16, 16, 24), 1536),
        # v5e and v6e are named after chips.
        ("v5e-1", 1, (1, 1), 1),
        ("v5litepod-8", 8, (2, 4), 1),
        ("v5e-16", 16, (4, 4), 4),
        ("v6e-256", 256, (16, 16), 64),
        ("V6E-4", 4, (2, 2), 1),
    ],
)
def test_a_slice_has_the_chips_shape_and_hosts_of_google_clouds_tables(name, chips, shape, hosts):
    found = describe(name)
    assert (found.chips, found.shape, found.hosts) == (chips, shape, hosts)


def test_every_listed_name_is_accepted_by_libtpu_with_one_device_per_chip():
    for generation, names in topology.names().items():
        for name in names:
            found = describe(name)
            assert {d.device_kind for d in found.devices} == {KINDS[generation]}
            assert found.chips * found.chip.cores == int(name.split("-")[1])
            assert len({d.process_index for d in found.devices}) == found.hosts
            corner = [max(d.coords[i] for d in found.devices) + 1 for i in range(len(found.shape))]
            assert tuple(corner) == found.shape
    assert {"v4-8", "v4-4096"} <= set(topology.names()["v4"])


def test_two_slices_have_their_devices_slice_by_slice():
    found = describe("v5e-256", slices=2)
    assert (found.chips, found.chips_per_slice, found.hosts) == (512, 256, 128)
    assert [d.slice_index for d in found.devices] == [0] * 256 + [1] * 256


@pytest.mark.parametrize("name", ["v4-7", "v4-12", "v5e-512", "v3-8", "v4", "v4-", "", "tpu-v4-8"])
def test_an_unknown_name_ends_with_the_list_of_known_ones(name):
    with pytest.raises(ValueError, match="is not known") as error:
        describe(name)
    for known in ("v4-8,", "v4-4096", "v5p-64,", "v5e-256", "v6e-1,", "v5litepod"):
        assert known in str(error.value)


def test_fewer_than_one_slice_is_refused():
    with pytest.raises(ValueError, match="slices=0"):
        describe("v4-8", slices=0)


def in_own_process(code: str) -> subprocess.CompletedProcess:
    """libtpu stays loaded once it is, and JAX notes where it lies: a process that knows neither."""
    environment = {k: v for k, v in os.environ.items() if "TPU" not in k}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env=environment)


DESCRIBE = "from gtalign_jax.aot import topology; print(topology.describe('v4-8').chips)"


def test_without_libtpu_the_error_says_what_to_install():
    done = in_own_process(f"import sys; sys.modules['libtpu'] = None; {DESCRIBE}")
    assert done.returncode == 1 and done.stdout == ""
    assert "RuntimeError: cannot describe 'v4-8'" in done.stderr
    assert "pip install libtpu" in done.stderr


@pytest.mark.slow
def test_two_processes_compile_at_once_and_libtpu_warns_of_no_missing_machine():
    # The first holds libtpu until the second has described its topology, too.
    second = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {DESCRIBE!r}])"
    done = in_own_process(f"{DESCRIBE}; {second}")
    assert done.stdout.split() == ["4", "4"]
    assert "WARNING" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name, group, links",
    [
        ("v4-8", 4, 2),  # 2x2: one link along each of two sides, no rings
        ("v4-64", 32, 3),  # 2x4x4 is no whole cube: no rings
        ("v4-128", 64, 6),  # a cube closes into rings along all three sides
        ("v4-128", 8, 2),  # eight of its chips: one ring, entered from both sides
        ("v5p-1536", 768, 6),
        ("v5e-64", 64, 2),  # 8x8 is a grid
        ("v5e-128", 128, 3),  # 8x16: rings along the long side only
        ("v6e-256", 256, 4),
        ("v6e-256", 16, 2),
        ("v5e-1", 1, 1),
    ],
)
def test_a_group_of_chips_is_reached_over_the_links_of_its_worst_placed_chip(name, group, links):
    found = describe(name)
    per_link = {"v4": 50e9, "v5p": 100e9, "v5e": 50e9, "v6e": 100e9}[found.chip.generation]
    assert found.ici_bandwidth(group) == links * per_link


def compile_copy(name: str, rows: int) -> None:
    """Compiles a program whose only memory is its argument of `rows` KiB, updated in place."""
    place = SingleDeviceSharding(describe(name).devices[0])
    x = jax.ShapeDtypeStruct((rows, 2, 128), jnp.float32, sharding=place)
    jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()


@pytest.mark.parametrize("generation, name", [
    ("v4", "v4-8"), ("v5p", "v5p-8"), ("v5e", "v5e-4"), ("v6e", "v6e-4"),
])
def test_the_compiler_accepts_a_chips_memory_and_refuses_more(generation, name):
    capacity = CHIPS[generation].hbm_bytes
    # The program itself takes 110 to 150 KiB.
    compile_copy(name, capacity // 1024 - 160)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        compile_copy(name, capacity // 1024 - 100)
    needed, there = oom_shortfall(str(error.value))
    assert there == pytest.approx(capacity, abs=0.005 * GIB)  # it is printed to hundredths
    assert 0 < needed - there < 0.0001 * GIB  # the shortfall is not lost in that rounding


def test_temporaries_beyond_the_memory_are_refused_with_their_size():
    place = SingleDeviceSharding(describe("v5e-4").devices[0])
    x = jax.ShapeDtypeStruct((1024, 1024, 30 * 1024), jnp.float32, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        # Two arrays of 120 GiB, the sum of which is read in another order than it is made in.
        jax.jit(lambda x: jnp.sort(x + 1, axis=0) + jnp.sort(x, axis=1)).lower(x).compile()
    needed, there = oom_shortfall(str(error.value))
    assert there == pytest.approx(15.75 * GIB, abs=0.005 * GIB) and needed >= 120 * GIB


@pytest.mark.parametrize("text, expected", [
    ("Used 18.24G of 15.75G hbm. Exceeded hbm capacity by 2.50G.", (18.25 * GIB, 15.75 * GIB)),
    ("Used 30.75G of 30.75G hbm. Exceeded hbm capacity by 512B.", (30.75 * GIB + 512, 30.75 * GIB)),
    ("arguments (15.75G) exceeds available HBM (15.75G).", (15.75 * GIB + 1, 15.75 * GIB)),
    ("temporaries (1.5T) exceeds available HBM (512.00M).", (1.5 * 1024 * GIB, 0.5 * GIB)),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.", None),
    ("INTERNAL: something else", None),
])
def test_a_refusal_says_what_is_needed_and_what_there_is(text, expected):
    assert oom_shortfall(text) == expected


def test_speeds_are_of_one_chip_and_each_has_its_source():
    for generation, chip in CHIPS.items():
        assert chip.generation == generation and f"cloud.google.com/tpu/docs/{generation}" \
            in chip.source
        # In all four generations 160 to 560 operations are done in the time that a byte takes.
        assert 160 < chip.bf16_flops / chip.hbm_bandwidth < 570
        assert chip.hbm_bandwidth > chip.ici_bandwidth > chip.dcn_bandwidth
        assert chip.link_bandwidth * chip.ici_links == chip.ici_bandwidth
