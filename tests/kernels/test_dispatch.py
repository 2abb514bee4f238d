"""Who runs: the platform's order, reasons for passing one over, explicit names that never fall back."""

import contextlib
import warnings

import jax
import pytest

from kdjax.kernels import _dispatch

TPU, GPU, CPU = ("TPU v5 lite", "tpu"), ("NVIDIA H100 80GB HBM3", "cuda"), ("cpu", "cpu")
TABLE = {name: (lambda name=name: name) for name in ("reference", "xla", "pallas_tpu", "pallas_gpu")}


def never(target, *args):
    return None


def small_only(target, size):
    return None if size < 10 else f"size {size} is too large."


def no_v4(target, size):
    return "v4 has no such thing." if target.kind == "TPU v4" else None


@pytest.fixture(autouse=True)
def nothing_was_warned_of(monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())


@contextlib.contextmanager
def traced_for(kind, platform):
    """As under the mesh of a chip that is not here."""
    device = jax.sharding.AbstractDevice(kind, 1, platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def choose(name=None, size=1, table=TABLE, declines=None):
    return _dispatch.choose("some_op", table, declines or {}, name, size)()


@pytest.mark.parametrize(
    ("device", "without", "chosen"),
    [
        (CPU, (), "xla"),
        (TPU, (), "pallas_tpu"),
        (GPU, (), "pallas_gpu"),
        (("AMD Instinct MI300X", "rocm"), (), "xla"),
        (TPU, ("pallas_tpu",), "xla"),  # an op without: nothing to warn of
        (GPU, ("pallas_gpu",), "xla"),
    ],
)
def test_the_first_of_the_platform(device, without, chosen):
    table = {name: entry for name, entry in TABLE.items() if name not in without}
    with traced_for(*device):
        assert choose(table=table) == chosen


def test_the_device_of_the_process_counts_without_a_mesh():
    assert _dispatch.target().platform == "cpu"
    assert choose() == "xla"


def test_a_reason_is_warned_of_once():
    declines = {"pallas_tpu": small_only}
    with traced_for(*TPU):
        assert choose(size=9, declines=declines) == "pallas_tpu"
        message = r"^some_op: pallas_tpu is passed over on TPU v5 lite; size 10 is too large\. .*'xla'"
        with pytest.warns(UserWarning, match=message) as told:
            assert choose(size=10, declines=declines) == "xla"
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(size=10, declines=declines) == "xla"
        with pytest.warns(UserWarning, match="size 11"):
            assert choose(size=11, declines=declines) == "xla"


def test_the_generation_counts():
    declines = {"pallas_tpu": no_v4}
    with traced_for("TPU v4", "tpu"), pytest.warns(UserWarning, match="v4 has no such thing"):
        assert choose(declines=declines) == "xla"
    with traced_for(*TPU):
        assert choose(declines=declines) == "pallas_tpu"


@pytest.mark.parametrize("device", [CPU, TPU, GPU])
@pytest.mark.parametrize("name", TABLE)
def test_an_explicit_name_is_taken_anywhere(device, name):
    with traced_for(*device):
        assert choose(name, declines=dict.fromkeys(TABLE, never)) == name


def test_an_explicit_name_never_falls_back():
    message = (
        r"^implementation of some_op must be one that runs here, got 'pallas_tpu' for TPU v5 lite; "
        r"size 10 is too large\. Set it to 'xla', or leave it out\.$"
    )
    with traced_for(*TPU), pytest.raises(ValueError, match=message):
        choose("pallas_tpu", size=10, declines={"pallas_tpu": small_only})


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"implementation of some_op must be .*got 'palas_tpu'.*'pallas_tpu'"):
        choose("palas_tpu")


def test_a_setting_for_several_ops():
    """A kernel that others have leaves the choice to an op without it; what nobody has stays, to be refused."""
    table = dict.fromkeys(("reference", "xla"))
    found = {name: _dispatch.or_default(table, name) for name in ("reference", "xla", "pallas_tpu", "palas_tpu", None)}
    assert found == {"reference": "reference", "xla": "xla", "pallas_tpu": None, "palas_tpu": "palas_tpu", None: None}
