"""The reader of compiled programs against programs whose collectives are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from uoe_jax.config import MeshConfig
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.plan.hlo import Array, Collective, collectives

SHAPE = dict(replica=1, data=2, fsdp=2, expert=2)


def compiled(f, *shapes, in_specs, out_specs, check_vma=True):
    """Collectives of f as one manual region on 2 x 2 x 2 devices; arguments float32."""
    mesh = mesh_lib.make_mesh(MeshConfig(**SHAPE))
    with jax.set_mesh(mesh):
        region = jax.jit(
            jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
        )
        text = (
            region.lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
            .compile()
            .as_text()
        )
    return collectives(text, dict(mesh.shape))


KINDS = {
    "psum": (lambda x: jax.lax.psum(x, "expert"), ("all-reduce", "f32[8,4]", "f32[8,4]", ("expert",), 2, 128)),
    "psum over two axes": (lambda x: jax.lax.psum(x, ("data", "fsdp")), ("all-reduce", "f32[8,4]", "f32[8,4]", ("data", "fsdp"), 4, 192)),
    "outermost and innermost": (lambda x: jax.lax.psum(x, ("data", "expert")), ("all-reduce", "f32[8,4]", "f32[8,4]", ("data", "expert"), 4, 192)),
    "gather": (lambda x: jax.lax.all_gather(x, "fsdp", axis=1, tiled=True), ("all-gather", "f32[8,4]", "f32[8,8]", ("fsdp",), 2, 128)),
    "scatter": (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), ("reduce-scatter", "f32[8,4]", "f32[4,4]", ("data",), 2, 64)),
    "permute": (lambda x: jax.lax.ppermute(x, "expert", [(0, 1), (1, 0)]), ("collective-permute", "f32[8,4]", "f32[8,4]", ("expert",), 2, 128)),
    "exchange": (lambda x: jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True), ("all-to-all", 32, 32, ("fsdp",), 2, 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_over_its_axes(name):
    f, (kind, operand, result, axes, group, sent) = KINDS[name]
    (c,) = compiled(
        f, (8, 4), in_specs=P(), out_specs=P(("replica", "data", "fsdp", "expert")), check_vma=False
    )

    def same(array, wanted):
        return array.size == wanted if isinstance(wanted, int) else str(array) == wanted

    assert (c.kind, c.axes, c.group, c.times, c.counted) == (kind, axes, group, 1, True)
    assert same(c.operand, operand) and same(c.result, result) and c.sent == sent, c


def test_loops_multiply_and_the_backward_pass_is_told_apart():
    """Weights gathered over fsdp in a loop of 3 around one of 5: gathered again, and their gradient scattered, in the backward."""

    def loss(w, x):
        def layer(x, w):
            whole = jax.lax.all_gather(
                jax.lax.pcast(w, ("data",), to="varying"), "fsdp", tiled=True
            )
            hidden = jnp.tanh(jax.lax.pcast(x, "expert", to="varying") @ whole)
            return jax.lax.psum(hidden @ whole.T, "expert"), None

        def layers(x, w):
            return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, w)[0], None

        x = jax.lax.scan(layers, x, w)[0]
        return jax.lax.psum(x.sum(), ("data", "fsdp"))

    specs = (P(None, None, "fsdp", "expert"), P(("data", "fsdp")))
    found = compiled(
        lambda w, x: jax.grad(loss)(w, x), (3, 5, 8, 8), (16, 8), in_specs=specs, out_specs=specs[0]
    )
    gathers = [c for c in found if c.kind == "all-gather"]
    assert {(str(c.result), c.axes, c.times) for c in gathers} == {("f32[8,4]", ("fsdp",), 15)}
    assert {("transpose(" in c.op_name, "rematted_computation" in c.op_name) for c in gathers} == {
        (False, False),
        (True, True),
    }
    scattered = [
        (str(c.result), c.axes, c.times, "transpose(" in c.op_name)
        for c in found
        if c.kind == "reduce-scatter"
    ]
    assert scattered == [("f32[4,4]", ("fsdp",), 15, True)]
    reduced = [
        (str(c.operand), c.times, "transpose(" in c.op_name) for c in found if c.axes == ("expert",)
    ]
    assert reduced == [("f32[4,8]", 15, False), ("f32[4,8]", 15, True)]


def test_a_combined_collective_gives_an_entry_for_each_array():
    def f(x, y):
        return jax.lax.psum((x, y), "expert")

    found = compiled(f, (8, 4), (3,), in_specs=(P(), P()), out_specs=(P(), P()), check_vma=False)
    assert sorted(str(c.result) for c in found) == ["f32[3]", "f32[8,4]"]
    assert {(c.kind, c.axes) for c in found} == {("all-reduce", ("expert",))}


MODULE = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {{
  %p = (s32[], bf16[8,4]{{1,0:T(8,128)}}) parameter(0)
  %x = bf16[8,4]{{1,0:T(8,128)(2,1)}} get-tuple-element(%p), index=1
  {collective}, metadata={{op_name="jit(f)/while/body/psum"}}
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %t = (s32[], bf16[8,4]{{1,0}}) tuple(%i, %x)
}}

%condition (q: (s32[], bf16[8,4])) -> pred[] {{
  ROOT %true = pred[] constant(true)
}}

ENTRY %main (x0: bf16[8,4]) -> bf16[8,4] {{
  %x0 = bf16[8,4]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,4]{{1,0}}) tuple(%zero, %x0)
  %loop = (s32[], bf16[8,4]{{1,0}}) while(%start), condition=%condition, body=%body{trips}
  ROOT %y = bf16[8,4]{{1,0}} get-tuple-element(%loop), index=1
}}
"""
TRIPS = ', backend_config={"known_trip_count":{"n":"7"}}'
WRITTEN = {
    "{{0,2},{1,3},{4,6},{5,7}}": ("fsdp",),
    "{{0},{1},{2},{3},{4},{5},{6},{7}}": (),
    "{}": ("data", "fsdp", "expert"),
    "[4,2]<=[8]": ("expert",),
    "[2,4]<=[4,2]T(1,0)": ("data", "fsdp"),
    "mesh['replica'=1,'data'=2,'fsdp'=2,'expert'=2] {'data','expert'}": ("data", "expert"),
    "mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}": ("fsdp",),
    "mesh['a'=8] {'a':(2)2}": ("fsdp",),
    "mesh['a'=8] {'a':(1)4}": ("data", "fsdp"),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_every_way_to_write_groups(written):
    line = f"%r = bf16[8,4]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={written}, use_global_device_ids=true, to_apply=%add"
    (c,) = collectives(MODULE.format(collective=line, trips=TRIPS), SHAPE)
    group = 2 ** len(WRITTEN[written])
    array = Array("bf16", (8, 4))
    assert c == Collective(
        "all-reduce", array, array, WRITTEN[written], group, 7, True, "jit(f)/while/body/psum", "r"
    )
    assert c.bytes == 64 and c.sent == 2 * 64 * (group - 1) / group


def test_started_collectives_and_loops_of_unknown_length():
    """As accelerators print them: a started gather gives its operand too."""
    line = "%r = (bf16[8,4]{1,0}, bf16[8,8]{1,0:T(8,128)}) all-gather-start(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={1}"
    (c,) = collectives(MODULE.format(collective=line, trips=""), SHAPE)
    assert (str(c.operand), str(c.result), c.times, c.counted) == (
        "bf16[8,4]",
        "bf16[8,8]",
        1,
        False,
    )
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("module @jit_f {}", SHAPE)
