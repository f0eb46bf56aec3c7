"""Programs for a Hopper GPU are made on any machine, through public functions only."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import (
    NotServed,
    channel_mix,
    decode_layers,
    layer_norm,
    token_shift_mix,
    wkv7,
    wkv7_recurrent,
)
from tests.helpers import in_mesh_of, relative_rms
from tests.pallas_kernels.mesh_cases import (
    CASES,
    VOCAB,
    decoding_arguments,
    results_and_gradients,
)

NAMES = ("r", "log_decay", "k", "v", "a", "b")


def tokens(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    return dict.fromkeys(NAMES, jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16))


def gradient(operator):
    def loss(arguments):
        o, final_state = operator(**arguments)
        return o.astype(jnp.float32).sum() + final_state.sum()

    return jax.grad(loss)


on_kernels = {"implementation": "mosaic_gpu"}
bounded = functools.partial(wkv7, **on_kernels, min_log_decay=-0.6)
recurrent = functools.partial(wkv7_recurrent, **on_kernels)


@pytest.mark.parametrize(
    ("function", "arguments", "kernels"),
    [
        (lambda x: bounded(**x), tokens(70), 1),
        (gradient(bounded), tokens(70), 3),
        (lambda x: recurrent(**x), tokens(1), 1),
        (gradient(recurrent), tokens(9), 2),
        (lambda x: decode_layers(**x, **on_kernels), decoding_arguments(rows=3), 8),
    ],
    ids=["wkv7", "wkv7 gradient", "wkv7_recurrent", "wkv7_recurrent gradient", "decode_layers"],
)
def test_named_kernels_are_exported_on_any_machine(function, arguments, kernels):
    exported = jax.export.export(jax.jit(function), platforms=["cuda"])(arguments)
    assert exported.platforms == ("cuda",)
    assert exported.mlir_module().count("custom_call @mosaic_gpu") == kernels


def symbolic_shapes(name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a case, with symbols for the numbers of rows and tokens."""
    case = CASES[name]
    rows, tokens = jax.export.symbolic_shape("rows, tokens")
    sizes = case.sizes(tokens) | {"B": rows}
    dimensions = case.dimensions | ({"segment_ids": "B T"} if case.packed else {})
    return {
        name: jax.ShapeDtypeStruct(tuple(sizes[x] for x in dimensions[name].split()), array.dtype)
        for name, array in case.draw(1).items()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize(
    "name",
    [
        "packed wkv7",
        "packed wkv7_recurrent",
        "packed token_shift_mix",
        "packed norm_shift_mix",
        "layer_norm",
        "key_update",
        "value_residual",
        "output_correction",
        "channel_mix",
        "feed_forward",
        "cross_entropy",
        "cross_entropy_sum",
    ],
)
def test_one_program_serves_all_numbers_of_rows_and_tokens(name):
    run = jax.jit(functools.partial(results_and_gradients, CASES[name]))
    exported = jax.export.export(run)(symbolic_shapes(name))
    arrays = CASES[name].draw(40)
    for x, reference in zip(
        jax.tree.leaves(exported.call(arrays)), jax.tree.leaves(run(arrays)), strict=True
    ):
        assert relative_rms(x, reference) < 2e-6  # measured: up to 3e-7


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_sum"])
def test_chunks_of_logits_have_their_size_in_rows_of_any_number(name):
    case = CASES[name]
    exported = jax.export.export(jax.jit(lambda arrays: case.call(**arrays)))(symbolic_shapes(name))
    program = jax.jit(exported.call).lower(case.draw(6)).compile().as_text()
    rows = 4
    chunk = case.settings["chunk_size"] // rows
    assert f"f32[{rows},{chunk},{VOCAB}]" in program
    assert f"f32[{rows},6,{VOCAB}]" not in program


@pytest.mark.parametrize(
    ("operator", "names", "of_tokens"),
    [(wkv7, NAMES, (2, 64)), (token_shift_mix, ("x",), (4,)), (channel_mix, ("x",), (4,))],
)
def test_tokens_that_are_divided_over_devices_need_known_sizes(operator, names, of_tokens):
    """JAX fails at collectives of symbolic shapes, in ways that say nothing of them."""
    mesh = jax.make_mesh((8,), ("context",), axis_types=(AxisType.Auto,))
    others = {
        "token_shift_mix": {"mixes": jnp.zeros((1, 4))},
        "channel_mix": {
            "mix": jnp.zeros(4),
            "key_weight": jnp.zeros((4, 4)),
            "value_weight": jnp.zeros((4, 4)),
        },
    }.get(operator.__name__, {})

    def run(x):
        return operator(**dict.fromkeys(names, x), **others, context_axis="context")[0]

    pieces = PartitionSpec(None, "context")
    divided = jax.shard_map(run, mesh=mesh, in_specs=pieces, out_specs=pieces)
    rows, length = jax.export.symbolic_shape("rows, 8*length")
    for B, T in ((rows, 16), (2, length)):
        x = jax.ShapeDtypeStruct((B, T, *of_tokens), jnp.float32)
        with pytest.raises(ValueError, match="context_axis='context' needs sizes that are numbers"):
            jax.export.export(jax.jit(divided))(x)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_states_of_segments_in_rows_of_any_length():
    rows, length = jax.export.symbolic_shape("rows, length")

    def run(x, ids):
        decay = -jnp.abs(x).clip(0, 0.6)
        return wkv7(x, decay, x, x, x, x, segment_ids=ids, num_segments=2, min_log_decay=-0.6)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    ids = jnp.array([[1, 1, 1, 0, 2], [2, 2, 0, 0, 0]])
    x = jax.random.normal(jax.random.key(0), (2, 5, 1, 4)) / 4
    exported = jax.export.export(jax.jit(run))(
        shape(rows, length, 1, 4), shape(rows, length, dtype=jnp.int32)
    )
    for actual, expected in zip(exported.call(x, ids), jax.jit(run)(x, ids), strict=True):
        assert relative_rms(actual, expected) < 1e-6


def test_kernels_need_known_sizes():
    rows = jax.export.symbolic_shape("rows")[0]
    x = jax.ShapeDtypeStruct((rows, 3, 64), jnp.bfloat16)
    parameter = jax.ShapeDtypeStruct((64,), jnp.float32)
    with pytest.raises(
        NotServed, match=r"mosaic_gpu needs sizes that are numbers, got shape=\(rows"
    ):
        jax.export.export(jax.jit(functools.partial(layer_norm, **on_kernels)), platforms=["cuda"])(
            x, parameter, parameter
        )
    with in_mesh_of("NVIDIA H100 80GB HBM3", 132):
        exported = jax.export.export(jax.jit(layer_norm), platforms=["cuda"])(
            x, parameter, parameter
        )
    assert "mosaic" not in exported.mlir_module()
