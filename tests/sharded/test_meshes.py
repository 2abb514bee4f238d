"""mesh.shape and what presets do with it: sizes, where a parameter is split, and what is refused."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from kdjax import models
from kdjax.config import Mesh
from kdjax.models import ModelConfig
from kdjax.sharding import make_rules

MODEL = ModelConfig("llama", 96, 32, layers=2, heads=8, kv_heads=4, head_dim=8, mlp=48, tied=False)


@pytest.mark.parametrize(
    ("mesh", "shape", "rows"),
    [
        (Mesh("dp"), {"data": 8}, 8),
        (Mesh("tp"), {"model": 8}, 1),
        (Mesh("tp", "data:-1,model:2"), {"data": 4, "model": 2}, 4),
        (Mesh("fsdp_tp", "replica:2,data:2,model:-1"), {"replica": 2, "data": 2, "model": 2}, 4),
        (Mesh("fsdp", "data:2,model:4"), {"data": 2, "model": 4}, 8),
        (Mesh("fsdp", "data:3"), {"data": 3}, 3),
    ],
)
def test_shapes(mesh, shape, rows):
    rules = make_rules(mesh)
    assert dict(rules.mesh.shape) == shape
    assert rules.batch_shards == rows
    assert rules.batch(2).mesh.axis_types == (jax.sharding.AxisType.Explicit,) * len(shape)


def test_a_mesh_is_made_of_the_devices_that_are_given():
    devices = jax.devices()[4:]
    assert list(make_rules(Mesh("fsdp"), devices).mesh.devices.flat) == devices
    with pytest.raises(
        ValueError, match=r"^mesh\.shape must be made of the 4 devices that are there, got 'data:2' with"
    ):
        make_rules(Mesh("fsdp", "data:2"), devices)


@pytest.mark.parametrize(
    ("mesh", "specs"),
    [
        (Mesh("dp"), {}),
        (
            Mesh("fsdp"),
            {"embed": P("data", None), "head": P("data", None), "wq": P(None, "data", None, None), "w_down": 1},
        ),
        (
            Mesh("fsdp", "replica:2,data:2,model:2"),  # model is an axis of data here, replica repeats
            {"embed": P(("data", "model"), None), "wk": P(None, ("data", "model"), None, None)},
        ),
        (
            Mesh("tp", "model:4"),
            {"embed": P("model", None), "head": P(None, "model"), "wk": P(None, None, "model", None), "w_down": 1},
        ),
        (
            Mesh("fsdp_tp", "data:2,model:4"),
            {
                "embed": P("model", "data"),
                "head": P("data", "model"),
                "wq": P(None, "data", "model", None),
                "wo": P(None, "model", None, "data"),
                "w_down": P(None, "model", "data"),
                "attn_norm": P(None, None),
            },
        ),
    ],
    ids=lambda value: f"{value.preset} {value.shape}" if isinstance(value, Mesh) else "",
)
def test_where_parameters_rest(mesh, specs):
    rules, declared = make_rules(mesh), models.param_specs(MODEL)
    found = {
        name: rules.storage_spec(s.axes, s.shape)
        for name, s in (declared | declared["layers"]).items()
        if name != "layers"
    }
    if not specs:
        assert all(part is None for spec in found.values() for part in spec)
    split = P(None, (mesh.shape and "model") or "data", None)
    assert {name: found[name] for name in specs} == {name: split if spec == 1 else spec for name, spec in specs.items()}


REFUSED = [
    (Mesh("single", "data:2"), "mesh.shape must be '' with mesh.preset='single', got 'data:2'."),
    (
        Mesh("fsdp_tp"),
        "mesh.shape must be set with mesh.preset='fsdp_tp', got ''. Set for example 'data:4,model:2' on 8",
    ),
    (Mesh("tp", "data:8"), "mesh.shape must have a model axis with mesh.preset='tp', got 'data:8'. Add 'model:2',"),
    (Mesh("dp", "data:9"), "mesh.shape must be made of the 8 devices that are there, got 'data:9' with 9."),
    (
        Mesh("dp", "batch:8"),
        "mesh.shape must be sizes of replica, data, model, each once, such as 'data:4,model:4', got",
    ),
    (Mesh("dp", "data:2,data:4"), "; 'data:4' is none."),
    (Mesh("dp", "data:0"), "; 'data:0' is none."),
    (Mesh("dp", "data:x"), "; 'data:x' is none."),
    (Mesh("dp", "data"), "; 'data' is none."),
    (
        Mesh("tp", "data:-1,model:-1"),
        "mesh.shape must have one -1 at most, and its other sizes must divide the 8 devices",
    ),
    (
        Mesh("tp", "data:-1,model:3"),
        "mesh.shape must have one -1 at most, and its other sizes must divide the 8 devices",
    ),
    (Mesh("ddp"), "mesh.preset must be a known name or 'package.module:attribute', got 'ddp'. Did you mean 'dp'?"),
]


@pytest.mark.parametrize(("mesh", "message"), REFUSED)
def test_what_is_refused(mesh, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_rules(mesh)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 12, "kv_heads": 3}, "divides the 3 of 'kv_heads', got model:4; .* Set model to one of 1, 3."),
        ({"kv_heads": 2}, "divides the 2 of 'kv_heads', got model:4; .* Set model to one of 1, 2."),
        ({"mlp": 42}, "divides the 42 of 'mlp', got model:4;"),
        ({"vocab_size": 97}, "divides the 97 of 'vocab', got model:4;"),
    ],
)
def test_a_model_that_tensor_parallelism_does_not_divide(change, said):
    cfg = ModelConfig(**{**{f: getattr(MODEL, f) for f in MODEL.__dataclass_fields__}, **change})
    with pytest.raises(ValueError, match=r"^mesh\.shape must have a model axis that " + said):
        models.abstract_params(cfg, make_rules(Mesh("tp", "data:2,model:4")))
