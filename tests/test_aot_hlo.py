"""Collectives read from compiled text: a text written by hand, and programs compiled for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gtalign_jax.aot import hlo, hlo_text
from gtalign_jax.aot.topology import describe

TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%keep (whole: bf16[16,8]) -> bf16[4,8] {
  %whole = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[] constant(0)
  %reduced = bf16[16,8]{1,0} all-reduce(%whole), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %mine = bf16[4,8]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={4,8}
}

%inner_body (s: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %s = (s32[], f32[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%two, %i)
  %x = f32[16,8]{1,0} get-tuple-element(%s), index=1
  %start = (f32[16,8]{1,0}, f32[16,8]{1,0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %done = f32[16,8]{1,0} collective-permute-done(%start)
  ROOT %out = (s32[], f32[16,8]{1,0}) tuple(%next, %done)
}

%inner_condition (s: (s32[], f32[16,8])) -> pred[] {
  %s = (s32[], f32[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%outer_body (s: (s32[], f32[16,8], s32[])) -> (s32[], f32[16,8], s32[]) {
  %s = (s32[], f32[16,8]{1,0}, /*index=2*/s32[]) parameter(0)
  %t = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %later = s32[] add(%t, %one)
  %x = f32[16,8]{1,0} get-tuple-element(%s), index=1
  %limit = s32[] get-tuple-element(%s), index=2
  %zero = s32[] constant(0)
  %begin = s32[] copy(%zero)
  %in = (s32[], f32[16,8]{1,0}) tuple(%begin, %x)
  %inner = (s32[], f32[16,8]{1,0}) while(%in), condition=%inner_condition, body=%inner_body
  %y = f32[16,8]{1,0} get-tuple-element(%inner), index=1
  %all = f32[16,8]{1,0} all-reduce(%y), replica_groups=mesh['p'=2,'q'=4] {'q'}, to_apply=%add
  ROOT %out = (s32[], f32[16,8]{1,0}, s32[]) tuple(%later, %all, %limit)
}

%outer_condition (s: (s32[], f32[16,8], s32[])) -> pred[] {
  %s = (s32[], f32[16,8]{1,0}, s32[]) parameter(0)
  %t = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=2
  ROOT %less = pred[] compare(%t, %limit), direction=LT
}

ENTRY %main (x: f32[16,8], w: bf16[16,8], n: s32[]) -> f32[16,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %w = bf16[16,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %gathered = bf16[32,8]{1,0} all-gather(%w), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %everyone = bf16[16,8]{1,0} all-to-all(%w), dimensions={0}
  %alone = bf16[16,8]{1,0} all-reduce(%w), replica_groups={{0},{1}}, to_apply=%add
  %kept = bf16[4,8]{1,0} fusion(%w), kind=kCustom, calls=%keep
  %zero = s32[] constant(0)
  %in = (s32[], f32[16,8]{1,0}, s32[]) tuple(%zero, %x, %n)
  %outer = (s32[], f32[16,8]{1,0}, s32[]) while(%in), condition=%outer_condition, body=%outer_body
  ROOT %result = f32[16,8]{1,0} get-tuple-element(%outer), index=1
}
"""  # noqa: E501


def test_a_text_written_by_hand_has_the_collectives_counted_by_hand():
    found = [
        (c.kind, c.bytes, c.count, c.group_size, c.in_loop) for c in hlo.collectives(TEXT)
    ]
    assert [c.kind for c in hlo.collectives(TEXT) if not c.blocking] == ["collective-permute"]
    assert found == [
        ("all-gather", 256, 1, 2, False),  # bf16[16,8] from one other chip
        ("all-to-all", 7 / 8 * 256, 1, 8, False),  # no groups given: all eight
        ("reduce-scatter", 3 / 4 * 256, 1, 4, False),  # an all-reduce would be twice as much
        ("collective-permute", 512, 3, 2, True),  # 0, 2, 4 < 5; start and done are one
        ("all-reduce", 2 * 3 / 4 * 512, 1, 4, True),  # axis q has 4; once per outer iteration
    ]


def test_the_caller_says_how_often_the_loop_of_unknown_length_runs():
    found = hlo.collectives(TEXT)
    outside, per_iteration = 256 + 224 + 192, 3 * 512 + 768
    assert hlo.total_bytes(found, over_dcn=False, iterations=10) == outside + 10 * per_iteration
    assert hlo.total_bytes(found, over_dcn=True, iterations=10) == 0


def test_loops_are_listed_with_their_depth_and_length_if_it_is_known():
    outer, inner = hlo.while_bodies(TEXT)
    assert (outer.name, outer.trips, outer.depth) == ("outer", None, 0)
    assert (inner.name, inner.trips, inner.depth) == ("inner", 3, 1)
    assert [(c.kind, c.count) for c in outer.collectives] == [
        ("collective-permute", 3), ("all-reduce", 1)
    ]
    assert [(c.kind, c.count) for c in inner.collectives] == [("collective-permute", 1)]


@pytest.mark.parametrize("change, trips", [
    (("constant(5)", "constant(6)"), 3), (("constant(5)", "constant(7)"), 4),
    (("constant(5)", "constant(-1)"), 0),
    (("%five), direction=LT", "%five), direction=LE"), 3),
    (("constant(5)", "constant(4)"), 2), (("%five), direction=LT", "%five), direction=EQ"), None),
    (("add(%two, %i)", "multiply(%two, %i)"), None),
    (("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"11"}}'), 11),
])
def test_the_length_of_a_loop_follows_from_its_start_step_and_bound(change, trips):
    text = TEXT.replace(*change)
    assert text != TEXT
    assert hlo.while_bodies(text)[1].trips == trips


def test_bytes_of_shapes_count_elements_and_not_the_padding_of_tiles():
    assert hlo_text.shape_bytes("bf16[4,8]{1,0:T(8,128)(2,1)S(3)}") == 64
    assert hlo_text.shape_bytes("(f32[3]{0}, /*index=1*/pred[2,2]{1,0}, u32[], token[])") == 20
    assert hlo_text.shape_bytes("s4[6]{0}") == 3


def test_text_that_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("module @jit_f { }")


# --- Programs compiled by libtpu -------------------------------------------------------------

L, D, F = 3, 256, 512  # layers of two weights, bf16[D, F] and bf16[F, D]
WEIGHTS = 2 * L * D * F * 2


def mesh_of(name: str, slices: int, shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
    return Mesh(np.asarray(describe(name, slices).devices).reshape(shape), axes)


def on(mesh: Mesh, shape: tuple[int, ...], *cut, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*cut)))


def layers(up_LDF, down_LFD, x_BD, place):
    """L residual feed-forward layers; what enters and leaves each lies at `place`."""
    def layer(x_BD, weights):
        up_DF, down_FD = weights
        out = x_BD + jax.nn.silu(x_BD @ up_DF) @ down_FD
        return jax.lax.with_sharding_constraint(out, place), None

    return jax.lax.scan(layer, x_BD, (up_LDF, down_LFD))[0]


def text_of(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


def fsdp(name: str, slices: int, chips: int, gradients: bool, D: int = D, F: int = F,
         rows: int = 64) -> str:
    """Layers whose weights are cut over the chips of a slice; `rows` of the batch on each chip."""
    mesh = mesh_of(name, slices, (slices, chips), ("slice", "fsdp"))
    batch = ("slice", "fsdp")
    place = NamedSharding(mesh, P(batch))

    def forward(up, down, x):
        return layers(up, down, x, place)

    def loss(up, down, x):
        return (forward(up, down, x).astype(jnp.float32) ** 2).mean()

    def step(up, down, x):
        up_grad, down_grad = jax.grad(loss, argnums=(0, 1))(up, down, x)
        return up - up_grad, down - down_grad

    return text_of(
        step if gradients else forward,
        on(mesh, (L, D, F), None, "fsdp"), on(mesh, (L, F, D), None, None, "fsdp"),
        on(mesh, (rows * chips * slices, D), batch),
    )


@pytest.mark.parametrize("name, chips", [("v4-16", 8), ("v5p-8", 4), ("v5e-8", 8), ("v6e-4", 4)])
def test_fsdp_gathers_every_layers_weights_once(name, chips):
    found = hlo.collectives(fsdp(name, 1, chips, gradients=False))
    assert {c.kind for c in found} <= {"all-gather", "collective-permute"}
    assert not any(c.in_loop for c in found)  # the scan's length is known
    total = hlo.total_bytes(found, over_dcn=False)
    assert total == pytest.approx(WEIGHTS * (chips - 1) / chips, rel=0.01)


def test_gradients_are_reduced_within_a_slice_over_ici_and_between_slices_over_dcn():
    chips, slices = 4, 2
    text = fsdp("v5e-4", slices, chips, gradients=True)
    found = hlo.collectives(text)
    # Forward and backward pass gather the weights, in chains of fusions too: each counts once.
    assert "chain_id" in text
    assert {c.blocking for c in found if c.kind == "all-gather"} == {False, True}
    gathered = sum(c.total_bytes() for c in found if c.kind == "all-gather")
    assert gathered == pytest.approx(2 * WEIGHTS * (chips - 1) / chips, rel=0.01)
    # Within a slice the gradients are reduced to shards, or whole and then cut.
    reduced = sum(
        c.total_bytes() for c in found
        if not c.over_dcn and c.kind in ("reduce-scatter", "all-reduce")
    )
    once = WEIGHTS * (chips - 1) / chips
    assert 0.99 * once < reduced < 2.2 * once
    # Between two slices an all-reduce of each chip's shard: 2 (2 - 1) / 2 of it arrives.
    across = [c for c in found if c.over_dcn]
    assert {(c.kind, c.group_size) for c in across} == {("all-reduce", 2)}
    assert sum(c.total_bytes() for c in across) == pytest.approx(WEIGHTS / chips, rel=0.01)


@pytest.mark.slow
def test_a_loop_of_permutations_around_a_matrix_product_is_counted_as_often_as_it_turns():
    # Wide enough that the compiler winds the gathering around the products: in each of them 8
    # shards come by from both sides in turns of 2, and one before the first turn, where 7 would do.
    wide = 8
    text = fsdp("v4-16", 1, 8, gradients=False, D=wide * D, F=16 * F, rows=1024)
    found = hlo.collectives(text)
    assert {c.kind for c in found} == {"collective-permute"}
    assert not any(c.in_loop or c.blocking for c in found)
    total = hlo.total_bytes(found, over_dcn=False)
    assert total == WEIGHTS * wide * 16 * 9 / 8
    assert sorted(loop.trips for loop in hlo.while_bodies(text)) == [2, 2, L]


def test_an_all_reduce_fused_with_the_cut_that_a_chip_keeps_is_a_reduce_scatter():
    text = fsdp("v5e-4", 2, 4, gradients=True, D=2 * D, F=2 * F)
    assert "all-reduce-scatter" in text and " reduce-scatter(" not in text
    reduced = [c for c in hlo.collectives(text) if c.kind == "reduce-scatter"]
    assert reduced and not any(c.over_dcn for c in reduced)
    for c in reduced:  # one of the two weights of a layer; padding may add a little
        assert c.bytes == pytest.approx(2 * D * 2 * F * 2 * 3 / 4, rel=0.05)


def decode_text(name: str, slices: int = 1) -> tuple[str, int]:
    """A while loop of unknown length over layers cut over 4 (or 2) chips; rows per chip."""
    data, tensor = (2, 4) if slices == 1 else (4, 2)
    mesh = mesh_of(name, slices, (data, tensor), ("data", "tensor"))
    place = NamedSharding(mesh, P("data"))

    def decode(up, down, x, limit):
        def unfinished(state):
            return (state[0] < limit) & jnp.any(state[1] > 0)

        def step(state):
            return state[0] + 1, layers(up, down, state[1], place)

        return jax.lax.while_loop(unfinished, step, (0, x))

    rows = 64
    text = text_of(
        decode, on(mesh, (L, D, F), None, None, "tensor"), on(mesh, (L, F, D), None, "tensor"),
        on(mesh, (rows, D), "data"), on(mesh, (), dtype=jnp.int32),
    )
    return text, rows // data


@pytest.mark.parametrize("name", ["v4-16", "v5e-8"])
def test_a_decode_loop_reduces_activations_once_per_layer_and_gathers_no_weights(name):
    text, rows = decode_text(name)
    outer, inner = hlo.while_bodies(text)
    assert (outer.trips, inner.trips) == (None, L)
    assert {c.kind for c in outer.collectives} == {"all-reduce"} and outer.host == ()
    per_layer = [c for c in outer.collectives if c.group_size == 4]
    assert [(c.count, c.in_loop) for c in per_layer] == [(L, False)]  # seen from inside the loop
    assert per_layer[0].bytes == 2 * 3 / 4 * rows * D * 2
    found = hlo.collectives(text)
    assert all(c.in_loop for c in found)
    # Beside them, one bit per iteration tells the chips whether any row goes on.
    assert hlo.total_bytes(found, over_dcn=False, iterations=100) == pytest.approx(
        100 * L * per_layer[0].bytes, rel=0.001
    )


def test_a_loop_over_two_slices_talks_over_dcn_in_its_condition_and_that_is_no_host_callback():
    text, _ = decode_text("v5e-4", slices=2)
    outer = hlo.while_bodies(text)[0]
    across = [c for c in outer.collectives if c.over_dcn]
    assert [c.kind for c in across] == ["all-reduce"] and across[0].bytes < 1024
    assert outer.host == ()


def test_a_weight_gathered_inside_the_loop_is_seen():
    mesh = mesh_of("v4-8", 1, (4,), ("fsdp",))
    whole = NamedSharding(mesh, P())

    def decode(w, x, limit):
        def step(state):
            return state[0] + 1, jax.lax.with_sharding_constraint(state[1] @ w, whole)

        return jax.lax.while_loop(lambda s: (s[0] < limit) & jnp.any(s[1] > 0), step, (0, x))

    text = text_of(decode, on(mesh, (D, D), "fsdp"), on(mesh, (8, D)),
                   on(mesh, (), dtype=jnp.int32))
    assert [loop.collectives for loop in hlo.while_bodies(text)] != [()]


def test_a_host_callback_inside_the_loop_is_seen():
    mesh = mesh_of("v4-8", 1, (4,), ("data",))

    def run(x):
        def step(x):
            jax.debug.callback(lambda value: None, x.sum())
            return x * 2

        return jax.lax.while_loop(lambda x: x.sum() < 1e9, step, x)

    loop, = hlo.while_bodies(text_of(run, on(mesh, (64, D), "data", dtype=jnp.float32)))
    assert loop.host and not any(c.over_dcn for c in loop.collectives)


@pytest.mark.parametrize("collective, kind, shards", [
    (lambda x: jax.lax.all_gather(x, "slice", tiled=True), "all-gather", 3),
    (lambda x: jax.lax.psum_scatter(x, "slice", tiled=True), "reduce-scatter", 3 / 4),
    (lambda x: jax.lax.all_to_all(x, "slice", 0, 1, tiled=True), "all-to-all", 3 / 4),
    (lambda x: jax.lax.psum(x, "slice"), "all-reduce", 2 * 3 / 4),
    (lambda x: jax.lax.ppermute(x, "slice", [(0, 1), (1, 2), (2, 3), (3, 0)]),
     "collective-permute", 1),
])
def test_each_collective_between_four_slices_is_known_with_its_bytes(collective, kind, shards):
    mesh = mesh_of("v5e-4", 4, (4, 4), ("slice", "x"))
    text = text_of(
        jax.shard_map(collective, mesh=mesh, in_specs=P("slice", "x"), out_specs=P("slice", "x"),
                      check_vma=False),
        on(mesh, (1024, 4096), "slice", "x", dtype=jnp.float32),
    )
    across = [c for c in hlo.collectives(text) if c.over_dcn]
    assert [(c.kind, c.bytes, c.count) for c in across] == [(kind, shards * 256 * 1024 * 4, 1)]


def test_both_sides_of_a_branch_are_counted():
    mesh = mesh_of("v4-8", 1, (4,), ("x",))

    def branch(flag, x):
        return jax.lax.cond(
            flag, lambda x: jax.lax.psum(x, "x"),
            lambda x: jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]) + 1, x,
        )

    text = text_of(
        jax.shard_map(branch, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"),
                      check_vma=False),
        on(mesh, (), dtype=jnp.bool_), on(mesh, (64, D), "x", dtype=jnp.float32),
    )
    assert "conditional(" in text
    assert {c.kind for c in hlo.collectives(text)} == {"all-reduce", "collective-permute"}


def test_pallas_kernels_are_found_by_name():
    mesh = mesh_of("v4-8", 1, (4,), ("x",))

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def kernel(x):
        return pl.pallas_call(
            double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="double_it"
        )(x)

    each = jax.shard_map(kernel, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    text = text_of(lambda x: jax.lax.fori_loop(0, 3, lambda i, y: each(y), x),
                   on(mesh, (64, D), "x", dtype=jnp.float32))
    assert hlo.kernels(text) == {"double_it": 1}
    loop, = hlo.while_bodies(text)
    assert loop.trips == 3 and "tpu_custom_call" in loop.custom_calls
    assert hlo.kernels(TEXT) == {}
