"""Collectives, trips and precisions read from the text of programs whose own are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pr2jax.core import hlo


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def compiled(fn, mesh, *shapes, specs=None):
    """`fn` within shard_map, every argument split over its first axis unless `specs` say."""
    rows = PartitionSpec("x")
    specs = specs or (rows,) * len(shapes)
    local = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return hlo.parse(jax.jit(local).lower(*arguments).compile().as_text())


def test_a_sum_in_a_loop_of_five_trips_within_one_of_three(mesh):
    def fn(x):  # [1, 12] a device

        def inner(_, y):
            return jnp.tanh(jax.lax.psum(y, "x"))

        def outer(_, y):
            return jax.lax.fori_loop(0, 5, inner, y)

        return jax.lax.fori_loop(0, 3, outer, x)

    found = hlo.collectives(compiled(fn, mesh, (8, 12)))
    assert found == {"all-reduce": hlo.Traffic(15, 15 * 12 * 4, "f32")}


def test_each_kind_counts_what_passes_through_a_device(mesh):
    def fn(x):  # [2, 16] a device
        gathered = jax.lax.all_gather(x, "x", axis=0, tiled=True)  # [16, 16]
        scattered = jax.lax.psum_scatter(jnp.tanh(gathered), "x", scatter_dimension=0, tiled=True)
        ring = [(i, (i + 1) % 8) for i in range(8)]
        passed = jax.lax.ppermute(jnp.sin(scattered), "x", ring)
        return jax.lax.all_to_all(jnp.cos(passed), "x", split_axis=1, concat_axis=0, tiled=True)

    found = hlo.collectives(compiled(fn, mesh, (16, 16)))
    assert {kind: (t.count, t.bytes) for kind, t in found.items()} == {
        "all-gather": (1, 16 * 16 * 4),
        "reduce-scatter": (1, 16 * 16 * 4),
        "collective-permute": (1, 2 * 16 * 4),
        "all-to-all": (1, 2 * 16 * 4),
    }


def test_a_loop_whose_trips_are_not_known_counts_as_told(mesh):
    def fn(x, n):
        body = lambda y: (y[0] + 1, jnp.tanh(jax.lax.psum(y[1], "x")))
        return jax.lax.while_loop(lambda y: y[0] < n[0], body, (jnp.float32(0), x))[1]

    specs = (PartitionSpec("x"), PartitionSpec())
    program = compiled(fn, mesh, (8, 12), (1,), specs=specs)
    assert len(hlo.executions(program)[1]) == 1
    for told in (1, 7):
        assert hlo.collectives(program, unknown=told)["all-reduce"].count == told


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_products_with_their_scope_and_precision(precision):
    def fn(x, w):
        with jax.named_scope("router"):
            y = jnp.dot(x, w, precision=None if precision == "default" else precision)
        return jnp.sum(jnp.square(y))

    # As a TPU's compiler writes it, then as this machine's does.
    text = """
ENTRY %main (x: f32[4,8], w: f32[8,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0:T(8,128)} parameter(0)
  %w = f32[8,8]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %c = f32[4,8]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf, OPERAND\
metadata={op_name="jit(fn)/transpose(jvp(router))/dot_general" stack_frame_id=5}
}
"""
    told = "operand_precision={highest,highest}, " if precision == "highest" else ""
    (product,) = hlo.products(hlo.parse(text.replace("OPERAND", told)))
    assert (product.dtypes, product.precision) == (("f32", "f32"), precision)
    assert hlo.scope_pattern("router").search(product.op_name)
    assert not hlo.scope_pattern("route").search(product.op_name)
    shapes = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
    program = hlo.parse(jax.jit(jax.grad(fn, 1)).lower(*shapes).compile().as_text())
    found = hlo.products(program)
    assert found
    assert all(hlo.scope_pattern("router").search(p.op_name) for p in found)
    assert {p.precision for p in found} == {precision}


# A collective that a TPU hides behind a product: its start, a step beside it, and its end, each
# of them a fusion that holds the collective; and a reduce-scatter, which it writes as a fusion.
STEPS = """HloModule m, is_scheduled=true

%start (p: bf16[4,8]) -> (bf16[4,8], bf16[32,8], /*index=2*/u32[]) {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, dimensions={0}
  ROOT %s = (bf16[4,8], bf16[32,8], /*index=2*/u32[]) custom-call(%all-gather.1), TARGETStart"
}

%async_collective_fusion.1 (p: bf16[4,8]) -> bf16[32,8] {
  %p.1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[32,8]{1,0} all-gather(%p.1), channel_id=3, dimensions={0}
}

%done (p: bf16[4,8]) -> bf16[32,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  %k = bf16[4,8] custom-call(%p.2), custom_call_target="tpu_custom_call", backend_config={"a": {
"block": "{128}"
}}, metadata={op_name="jit(f)/attention/kernel_of_ours/pallas_call"}
  %all-gather.3 = bf16[32,8]{1,0} all-gather(%p.2), channel_id=3, dimensions={0}
  ROOT %d = bf16[32,8]{1,0} custom-call(%p.2, %all-gather.3), TARGETDone"
}

%all-reduce-scatter.1 (p: f32[32,8]) -> f32[4,8] {
  %p.3 = f32[32,8]{1,0} parameter(0)
  %all-reduce.4 = f32[32,8]{1,0} all-reduce(%p.3), channel_id=4, to_apply=%add
  ROOT %slice = f32[4,8]{1,0} slice(%all-reduce.4), slice={[0:4], [0:8]}
}

%body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %t = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%t), index=1
  %a = (bf16[4,8], bf16[32,8], /*index=2*/u32[]{:S(2)}) fusion(%x), kind=kCustom, calls=%start
  %b = bf16[32,8]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %c = bf16[32,8]{1,0} fusion(%x), kind=kCustom, calls=%done
  %w = f32[32,8]{1,0} convert(%c)
  %e = f32[4,8]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %next = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%i, %x)
}

%condition (t: (s32[], bf16[4,8])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %t.2 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%t.2), condition=%condition, body=%body
}
""".replace("TARGET", 'custom_call_target="AsyncCollective')


def test_a_collective_in_steps_counts_once_and_a_fused_scatter_as_what_it_is():
    assert hlo.collectives(hlo.parse(STEPS)) == {
        "all-gather": hlo.Traffic(6, 6 * 32 * 8 * 2, "bf16"),
        "reduce-scatter": hlo.Traffic(6, 6 * 32 * 8 * 4, "f32"),
    }


def test_a_kernel_whose_text_spans_lines():
    assert hlo.kernels(hlo.parse(STEPS)) == {"kernel_of_ours": 6}


def test_sizes_of_types():
    assert hlo.shape_bytes("f32[]") == 4
    assert hlo.shape_bytes("(bf16[3,5]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[7], u4[3])") == 39
    assert hlo.shape_bytes("f8e4m3fn[10]") == 10
    sizes = {"s8": np.int8, "u16": np.uint16, "s64": np.int64, "c64": np.complex64}
    for name, dtype in sizes.items():
        assert hlo.shape_bytes(f"{name}[6]") == 6 * np.dtype(dtype).itemsize


def test_text_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")
