"""mesh.shape="" on slices of TPUs and on GPUs that are not here: the axes, and which chips stand along them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kdjax import aot
from kdjax.analysis import plan_hlo
from kdjax.config import Mesh
from kdjax.sharding import make_rules


def devices(topology):
    parsed = aot.parse_topology(topology)
    reason = aot.unavailable(parsed.chip)
    if reason is not None:
        pytest.skip(reason)
    return list(aot.topology_devices(parsed))


def shape(preset, topology):
    return dict(make_rules(Mesh(preset), devices(topology)).mesh.shape)


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5e:1x1", {"data": 1}),
        ("v5e:2x2", {"data": 4}),
        ("v6e:2x4", {"data": 8}),
        ("v5e:4x4", {"data": 4, "model": 4}),
        ("v6e:4x8", {"data": 4, "model": 8}),
        ("v5e:16x16", {"data": 16, "model": 16}),
        ("v5p:2x2x1", {"data": 4}),
        ("v5p:2x2x2", {"data": 4, "model": 2}),
        ("v5p:2x2x4", {"data": 4, "model": 4}),
        ("v4:2x4x4", {"data": 8, "model": 4}),
        ("v5p:4x4x4", {"data": 16, "model": 4}),
        ("tpu7x:2x2x1", {"data": 4, "model": 2}),  # two devices a chip
        ("tpu7x:2x2x4", {"data": 4, "model": 8}),
        ("v5e:4x4:2", {"replica": 2, "data": 4, "model": 4}),
        ("v5e:2x2:4", {"replica": 4, "data": 4}),
        ("h100:8", {"data": 8}),
        ("h100:16", {"data": 16}),
    ],
)
def test_fsdp_follows_the_torus(topology, expected):
    assert shape("fsdp", topology) == expected


@pytest.mark.parametrize(
    ("preset", "topology", "expected"),
    [
        ("dp", "v5e:4x4", {"data": 16}),
        ("tp", "v5e:4x4", {"model": 16}),
        ("dp", "v5e:2x2:2", {"replica": 2, "data": 4}),
        ("tp", "v5e:2x2:2", {"replica": 2, "model": 4}),
    ],
)
def test_what_gathers_nothing_keeps_one_axis_in_a_slice(preset, topology, expected):
    assert shape(preset, topology) == expected


def places(grid):
    return np.array([(*device.coords, device.core_on_chip) for device in grid.flat]).reshape(*grid.shape, 4)


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4", "v5p:4x4x4", "v6e:4x8", "v5e:4x4:2"])
def test_an_axis_is_made_of_whole_dimensions(topology):
    """Chips along `model` have one place in the dimensions of `data`, and the other way round."""
    grid = make_rules(Mesh("fsdp"), devices(topology)).mesh.devices
    for one in grid if grid.ndim == 3 else [grid]:
        found = places(one)
        along_model = (found != found[:, :1]).any(axis=(0, 1))
        along_data = (found != found[:1]).any(axis=(0, 1))
        assert along_model.any()
        assert along_data.any()
        assert not (along_model & along_data).any()
    if grid.ndim == 3:
        slices = [{device.slice_index for device in one.flat} for one in grid]
        assert slices == [{0}, {1}]


def test_a_shape_may_cut_a_dimension():
    rules = make_rules(Mesh("fsdp", "data:2,model:8"), devices("v6e:4x4"))
    assert len({device.id for device in rules.mesh.devices.flat}) == 16
    rules = make_rules(Mesh("fsdp", "replica:2,data:2,model:8"), devices("v6e:4x4:2"))
    assert [len({device.slice_index for device in one.flat}) for one in rules.mesh.devices] == [1, 1]


def test_chips_that_fill_no_box_are_taken_as_they_come():
    some = devices("v5e:4x4")[:7]
    rules = make_rules(Mesh("fsdp"), some)
    assert dict(rules.mesh.shape) == {"data": 7}
    assert list(rules.mesh.devices) == some


@pytest.mark.parametrize(
    ("wanted", "many", "message"),
    [
        ("data:3", 3, "mesh.shape must have a first axis that the 2 slices divide, got data:3;"),
        ("data:6", 6, "mesh.shape must take as many devices of each slice, got 4, 2; the first axis"),
        ("", 6, "mesh.shape must take as many devices of each slice, got 4, 2; the first axis"),
    ],
)
def test_slices_in_part(wanted, many, message):
    two = devices("v5e:2x2:2")
    some = two[:many] if many == 6 else [two[0], two[1], two[4]]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make_rules(Mesh("fsdp", wanted), some)


def scattered(rules):
    """The collectives of summing a matrix over the chips of a mesh and splitting it, one axis at a time."""
    x = jax.ShapeDtypeStruct((8 * rules.mesh.size, 2048), jnp.bfloat16, sharding=rules.batch(2))

    def summed(x, y):
        part = x.T @ y
        for axis in rules.batch_axes:
            part = jax.lax.psum_scatter(part, axis, scatter_dimension=0, tiled=True)
        return part

    with jax.set_mesh(rules.mesh):
        whole = jax.shard_map(summed, in_specs=rules.batch_spec(2), out_specs=rules.batch_spec(2), check_vma=False)
        text = jax.jit(whole).lower(x, x).compile().as_text()
    found = plan_hlo.traffic(text, rules.mesh.size)
    return {one.kind for one in found.collectives}, found.sent / (2 * 2048 * 2048 * (1 - 1 / rules.mesh.size))


@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4", "v5p:2x2x2", "v5p:2x2x4"])
def test_the_reason(topology):
    """Over one axis the compiler makes an all-reduce; if it no longer does, `sharding._default` can go."""
    kinds, sent = scattered(make_rules(Mesh("fsdp", "data:-1"), devices(topology)))
    assert "all-reduce" in kinds
    assert sent == pytest.approx(2)
    kinds, sent = scattered(make_rules(Mesh("fsdp"), devices(topology)))
    assert "all-reduce" not in kinds
    assert sent < 1.06  # of so small a matrix; some are filled up


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:2x2"])
def test_one_axis_is_as_good_on_few_chips(topology):
    kinds, sent = scattered(make_rules(Mesh("fsdp"), devices(topology)))
    assert "all-reduce" not in kinds
    assert sent < 1.07


def test_slices_reduce_what_one_chip_holds_of_it():
    """What a slice has reduced and scattered goes over the network once; the rest stays inside."""
    rules = make_rules(Mesh("fsdp"), devices("v5e:2x2:2"))
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16, sharding=rules.batch(2))

    def summed(x, y):
        return jax.lax.psum(jax.lax.psum_scatter(x.T @ y, "data", scatter_dimension=0, tiled=True), "replica")

    with jax.set_mesh(rules.mesh):
        whole = jax.shard_map(summed, in_specs=rules.batch_spec(2), out_specs=P("data"), check_vma=False)
        text = jax.jit(whole).lower(x, x).compile().as_text()
    found = [one for one in plan_hlo.traffic(text, 8).collectives if one.network]
    assert [(one.kind, one.bytes, one.group) for one in found] == [("all-reduce", 512 * 512 * 2 // 4, 2)]
