import jax
import pytest

from pallas_kernels.devices import device_in_context
from pallas_kernels.dispatch import NotServed, dispatch
from tests.helpers import in_mesh_of


def refuse(x: int) -> str:
    raise NotServed(f"not for {x=}")


def accept(x: int) -> str:
    return f"took {x}"


def fail(x: int) -> str:
    raise ValueError(f"{x=} is wrong")


def test_none_takes_the_first_that_can():
    assert dispatch("op", {"fast": refuse, "plain": accept}, None, 1) == "took 1"
    assert dispatch("op", {"plain": accept, "fast": fail}, None, x=2) == "took 2"


def test_a_named_implementation_never_falls_back():
    with pytest.raises(NotServed, match="not for x=1"):
        dispatch("op", {"fast": refuse, "plain": accept}, "fast", 1)


def test_errors_of_the_caller_are_not_swallowed():
    with pytest.raises(ValueError, match="x=1 is wrong"):
        dispatch("op", {"fast": fail, "plain": accept}, None, 1)


def test_all_refusals_are_told():
    with pytest.raises(ExceptionGroup, match="op: no implementation serves this call") as error:
        dispatch("op", {"fast": refuse, "faster": refuse}, None, 1)
    notes = [note for refusal in error.value.exceptions for note in refusal.__notes__]
    assert notes == [f"while trying op with implementation={n!r}" for n in ("fast", "faster")]


def test_unknown_name():
    with pytest.raises(ValueError, match=r"op: implementation='fastest' is unknown.*\['fast'\]"):
        dispatch("op", {"fast": accept}, "fastest", 1)


def test_an_error_of_jax_is_no_refusal():
    def fail_to_trace(x: int) -> str:
        raise NotImplementedError("no rule for this primitive")

    with pytest.raises(NotImplementedError, match="no rule for this primitive"):
        dispatch("op", {"fast": fail_to_trace, "plain": accept}, None, 1)


@pytest.mark.parametrize(
    ("kind", "multiprocessors", "chosen"),
    [
        ("NVIDIA H100 80GB HBM3", 132, "kernels"),
        ("NVIDIA H100 PCIe", 114, "kernels"),
        ("NVIDIA GH200 480GB", 132, "kernels"),
        ("NVIDIA A100-SXM4-80GB", 108, "plain"),
        ("TPU v5e", 1, "plain"),
    ],
)
def test_none_asks_the_device_of_the_mesh(kind, multiprocessors, chosen):
    implementations = {"mosaic_gpu": lambda: "kernels", "xla": lambda: "plain"}
    with in_mesh_of(kind, multiprocessors):
        assert device_in_context().multiprocessors == multiprocessors
        assert dispatch("op", implementations, None) == chosen
        assert dispatch("op", implementations, "mosaic_gpu") == "kernels"


def test_without_a_mesh_the_default_device_is_asked():
    def refuse_anywhere() -> str:
        raise AssertionError("called for a CPU")

    cpu = jax.devices("cpu")[0]
    for default in (cpu, "cpu"):
        with jax.default_device(default):
            assert device_in_context().kind == "cpu"
            assert dispatch("op", {"mosaic_gpu": refuse_anywhere, "xla": lambda: 1}, None) == 1


def test_the_mesh_of_shard_map_is_asked():
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    kinds = []

    def record(x):
        kinds.append(device_in_context().kind)
        return x

    spec = jax.sharding.PartitionSpec("batch")
    jax.shard_map(record, mesh=mesh, in_specs=spec, out_specs=spec)(jax.numpy.ones(1))
    assert set(kinds) == {jax.devices()[0].device_kind}
