"""Operators and kernels on meshes: each device computes its part, and activations stay there."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pallas_kernels as operators
from pallas_kernels.partitioning import partitioned
from pallas_kernels.sharding import Layout
from tests.helpers import relative_rms
from tests.pallas_kernels.mesh_cases import (
    CASES,
    DIVIDED,
    Case,
    decoding_arguments,
    mesh_of,
    moved,
    partitioned_for_cuda,
    place,
    results_and_gradients,
)

TOKENS = 6
TOKENS_OF_KERNELS = 70
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@functools.cache
def on_one_device(name: str) -> tuple[Any, Any]:
    case = CASES[name]
    return jax.jit(functools.partial(results_and_gradients, case))(case.draw(TOKENS))


def part_of_activation(case: Case, tokens: int) -> int:
    """Returns how many elements one device has of the smallest activation with channels."""
    sizes = case.sizes(tokens)
    return sizes["B"] * sizes["T"] * sizes["C"] // jax.device_count()


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("name", CASES)
def test_divided_calls_equal_whole_ones(name, axis_type):
    case, mesh = CASES[name], mesh_of(AXIS_TYPES[axis_type])
    with jax.set_mesh(mesh):
        arrays = place(case, mesh, case.draw(TOKENS))
        run = jax.jit(functools.partial(results_and_gradients, case)).lower(arrays).compile()
        actual = run(arrays)
    expected = on_one_device(name)
    for x, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_rms(x, reference) < 2e-6  # measured: up to 4e-7
    assert max(moved(run.as_text()).values(), default=0) < part_of_activation(case, TOKENS)
    result = jax.tree.leaves(actual)[0]
    assert not result.shape or result.sharding.spec[0] == DIVIDED["B"]


def test_explicit_axes_divide_results_like_arguments():
    case = CASES["value_residual"]
    mesh = mesh_of(AxisType.Explicit)
    arrays = place(case, mesh, case.draw(TOKENS))  # types say the mesh; none is in context
    result = case.call(**arrays)
    assert jax.typeof(result).sharding.spec == case.spec("v")
    np.testing.assert_allclose(result, case.call(**case.draw(TOKENS)), rtol=1e-5, atol=1e-6)


def test_vmap_over_an_axis_that_the_mesh_divides():
    case, mesh = CASES["value_residual"], mesh_of(AxisType.Explicit)
    arrays = case.draw(TOKENS)
    stacked = {name: np.stack([x, 2 * x]) for name, x in arrays.items()}
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data", "fsdp", None, "tensor")
        divided = {n: jax.device_put(x, NamedSharding(mesh, spec)) for n, x in stacked.items()}
        result = jax.jit(jax.vmap(lambda arrays: case.call(**arrays)))(divided)
    assert result.sharding.spec[:4] == tuple(spec)
    doubled = {name: 2 * x for name, x in arrays.items()}
    np.testing.assert_allclose(np.asarray(result)[1], case.call(**doubled), rtol=1e-5, atol=1e-6)


def sums(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stands for a kernel: adds the elements of each unit of three channels."""
    weight = weight[None, None]
    in_units = x.reshape(*x.shape[:-1], -1, 3).sum(-1, keepdims=True)
    y = jnp.broadcast_to(in_units, (*x.shape[:-1], x.shape[-1] // 3, 3)).reshape(x.shape) * weight
    return y, (x * weight).sum((0, 1)), x[:, -1]


SUMS = partitioned(
    sums, Layout(("B T C", "C"), ("B T C", "C", "B C"), independent="B C"), units={"C": 3}
)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def check_sums(
    function: Callable[..., Any],
    spec: PartitionSpec,
    x: np.ndarray,
    plain: Callable[..., Any] = sums,
) -> str:
    """Compares a divided call with the whole one, and returns its compiled program."""
    weight = draw(x.shape[-1])
    mesh = mesh_of(AxisType.Auto)
    divided = jax.device_put(x, NamedSharding(mesh, spec))
    everywhere = jax.device_put(weight, NamedSharding(mesh, PartitionSpec()))
    results = jax.jit(function)(divided, everywhere)
    for result, expected in zip(results, plain(x, weight), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    return jax.jit(function).lower(divided, everywhere).compile().as_text()


def test_partitioned_function_sums_over_rows_and_gathers_nothing():
    spec = PartitionSpec(("data", "fsdp"), None, "tensor")
    program = check_sums(SUMS, spec, draw(8, 4, 6))
    assert not moved(program)
    assert "f32[2,4,3]" in program


def test_tokens_that_are_gathered_for_a_kernel_are_told_of():
    with pytest.warns(UserWarning, match=r"kernels of sums need all tokens .*\('tensor',\) divide"):
        program = check_sums(SUMS, PartitionSpec("data", "tensor"), draw(8, 4, 6))
    assert moved(program).keys() == {"all-gather"}


def test_sizes_that_mesh_axes_do_not_divide_stay_whole():
    def of_some(function):
        return lambda x, weight: function(x[:6, :, :9], weight[:9])

    # Six rows can be divided by two devices, not by four. Nine channels are three units.
    spec = PartitionSpec(("data", "fsdp"), None, "tensor")
    program = check_sums(of_some(SUMS), spec, draw(8, 4, 12), plain=of_some(sums))
    assert "f32[3,4,9]" in program


def test_vmap_of_a_partitioned_function():
    def mapped(function):
        return lambda x, weight: jax.vmap(jax.vmap(function, (0, None)), (2, None))(x, weight)

    x = draw(2, 8, 4, 4, 6)
    spec = PartitionSpec("fsdp", "data", None, None, "tensor")
    program = check_sums(mapped(SUMS), spec, x, plain=mapped(sums))
    assert not moved(program)


@pytest.mark.parametrize("in_context", [False, True])
def test_partitioned_function_within_shard_map_over_some_axes(in_context):
    mesh = mesh_of(AxisType.Auto)

    def function(x, weight):
        y, total, last = SUMS(x, weight)
        return y, jax.lax.psum(total, "data"), last

    rows = PartitionSpec("data")
    run = jax.shard_map(
        function,
        mesh=None if in_context else mesh,
        in_specs=(rows, PartitionSpec()),
        out_specs=(rows, PartitionSpec(), rows),
        axis_names={"data"},
    )
    spec = PartitionSpec(("data", "fsdp"), None, "tensor")
    if in_context:
        with jax.set_mesh(mesh):
            program = check_sums(run, spec, draw(8, 4, 6))
    else:
        program = check_sums(run, spec, draw(8, 4, 6))
    assert not moved(program)
    assert "f32[2,4,3]" in program


def dtype_on_kernels(case: Case, name: str) -> Any:
    """Activations are bfloat16, parameters and states float32."""
    if name in ("segment_ids", "targets"):
        return jnp.int32
    narrow = "T" in case.dimensions[name] or name.endswith("weight") or name == "state"
    return jnp.bfloat16 if narrow else jnp.float32


def shapes_on_mesh(case: Case, tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
    mesh = mesh_of(AxisType.Auto)
    shapes = case.shapes(tokens) | ({"segment_ids": (4, tokens)} if case.packed else {})
    return {
        name: jax.ShapeDtypeStruct(
            shape, dtype_on_kernels(case, name), sharding=NamedSharding(mesh, case.spec(name))
        )
        for name, shape in shapes.items()
    }


KERNELS = {
    # how many kernels forward and backward have
    "wkv7": 3,
    "packed wkv7": 3,
    "wkv7_recurrent": 2,
    "packed wkv7_recurrent": 2,
    "token_shift_mix": 2,
    "packed token_shift_mix": 2,
    "layer_norm": 2,
    "pre_norm": 2,
    "norm_shift_mix": 2,
    "packed norm_shift_mix": 2,
    "key_update": 2,
    "wkv7_inputs": 2,
    "output_correction": 2,
    "channel_mix": 2,
    "cross_entropy": 2,
    "cross_entropy_sum": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_partitioned_for_cuda(name, tmp_path):
    case = CASES[name]
    run = functools.partial(case.function, **case.settings, implementation="mosaic_gpu")
    of_kernels = Case(run, case.dimensions, divided=case.divided, packed=case.packed)
    arguments = shapes_on_mesh(of_kernels, TOKENS_OF_KERNELS)
    program, kernels = partitioned_for_cuda(
        functools.partial(results_and_gradients, of_kernels), arguments, tmp_path
    )
    assert len(kernels) >= KERNELS[name]  # one may be there twice before the compiler merges them
    assert max(moved(program).values(), default=0) < part_of_activation(case, TOKENS_OF_KERNELS)
    # One row; one head or half of the channels, or all where the operator needs all.
    assert not any(f"[4,{TOKENS_OF_KERNELS}" in kernel for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("differentiated", [False, True])
def test_products_with_statistics_are_partitioned_for_cuda(differentiated, tmp_path):
    case, mesh = CASES["cross_entropy_sum"], mesh_of(AxisType.Auto)
    sizes = {"B": 4, "T": 1024, "C": 64, "vocab": 65536}
    arguments = {
        name: jax.ShapeDtypeStruct(
            tuple(sizes[x] for x in names.split()),
            dtype_on_kernels(case, name),
            sharding=NamedSharding(mesh, case.spec(name)),
        )
        for name, names in case.dimensions.items()
    }
    settings = {"l2wrap": 1e-4, "chunk_size": 2048, "implementation": "mosaic_gpu"}
    of_kernels = Case(functools.partial(operators.cross_entropy_sum, **settings), case.dimensions)

    def forward(arrays):
        return of_kernels.call(**arrays)

    function = functools.partial(results_and_gradients, of_kernels) if differentiated else forward
    program, (kernel,) = partitioned_for_cuda(function, arguments, tmp_path)
    # Each device has one row, or a chunk of half of it, and half of the vocabulary.
    tokens = 512 if differentiated else 1024
    assert f"bf16[{tokens},64]" in kernel
    assert "bf16[64,32768]" in kernel
    assert (f"bf16[{tokens},32768]" in kernel) == differentiated
    part_of_hidden = sizes["T"] * sizes["C"]  # sums of its gradients over the vocabulary
    assert max(moved(program).values(), default=0) <= part_of_hidden


@pytest.mark.gpu
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_on_several_gpus_equal_those_on_one(name):
    case = CASES[name]
    run = functools.partial(case.function, **case.settings, implementation="mosaic_gpu")
    count = 4 if jax.device_count() >= 4 else 2  # four rows
    on_rows = Case(run, case.dimensions, divided={"B": "data"}, packed=case.packed)
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    arrays = {
        name: jnp.asarray(x, dtype_on_kernels(case, name))
        for name, x in case.draw(TOKENS_OF_KERNELS).items()
    }
    function = jax.jit(functools.partial(results_and_gradients, on_rows))
    expected = function(arrays)
    with jax.set_mesh(mesh):
        actual = function(place(on_rows, mesh, arrays))
    for x, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # Rows are computed alike, but sums over rows and pieces of rows are rounded elsewhere.
        assert relative_rms(x, reference) < 5e-3


@pytest.mark.slow
def test_decoding_kernels_are_partitioned_for_cuda(tmp_path):
    """Without a gradient, kernels overwrite states: those of one device's rows."""
    mesh, rows = mesh_of(AxisType.Auto), 16

    def divided(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*(tuple(mesh.axis_names) if n == rows else None for n in x.shape))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    tokens = jax.ShapeDtypeStruct((rows, 1, 4, 64), jnp.bfloat16)
    recurrent = dict.fromkeys(("r", "log_decay", "k", "v", "a", "b"), tokens)
    recurrent["initial_state"] = jax.ShapeDtypeStruct((rows, 4, 64, 64), jnp.float32)
    arguments = {"layers": decoding_arguments(rows), "recurrent": recurrent}

    def run(arguments: dict[str, Any]) -> Any:
        on_kernels = {"implementation": "mosaic_gpu"}
        results = operators.decode_layers(**arguments["layers"], **on_kernels)
        return results, operators.wkv7_recurrent(**arguments["recurrent"], **on_kernels)

    program, kernels = partitioned_for_cuda(run, jax.tree.map(divided, arguments), tmp_path)
    assert len(kernels) == 8 + 1
    assert sum("output_to_operand_aliasing" in kernel for kernel in kernels) == 3 + 1
    assert not moved(program)
    assert not any(re.search(rf"\b{rows},", kernel.split("custom-call")[0]) for kernel in kernels)


@pytest.mark.slow
def test_mapped_kernels_are_partitioned_for_cuda(tmp_path):
    case = CASES["key_update"]
    run = functools.partial(operators.key_update, implementation="mosaic_gpu")
    mesh = mesh_of(AxisType.Auto)

    def mapped(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec("data", *x.sharding.spec))
        return jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=sharding)

    of_kernels = Case(run, case.dimensions, divided={"H": "tensor"})
    arguments = jax.tree.map(mapped, shapes_on_mesh(of_kernels, TOKENS_OF_KERNELS))
    program, kernels = partitioned_for_cuda(
        jax.vmap(functools.partial(results_and_gradients, of_kernels)), arguments, tmp_path
    )
    assert len(kernels) == 2
    assert all("[4,70,128]" in kernel or "[1,4,70,128]" in kernel for kernel in kernels)
    assert not moved(program)
