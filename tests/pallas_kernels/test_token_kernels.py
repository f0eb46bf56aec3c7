"""The kernels that pass over tokens once, interpreted, lowered for CUDA, and on a Hopper GPU.

They are judged by the references in float64, which the tests of each operator hold to formulas.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import (
    NotServed,
    channel_mix,
    feed_forward,
    key_update,
    layer_norm,
    norm_shift_mix,
    output_correction,
    pre_norm,
    token_shift_mix,
    wkv7_inputs,
)
from pallas_kernels.hopper.target import Target, compile_for
from tests.helpers import count_kernels, relative_rms
from tests.pallas_kernels.operator_checks import Arrays, draw, judge, kernels_for_cuda
from tests.pallas_kernels.tile_kernels import on_each_device

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter is for CPUs")
PARAMETERS = (
    *("mixes", "mix", "scale", "bias", "removal_scale", "replacement_mix"),
    *("bonus", "norm_scale", "norm_bias"),
    *("decay_base", "alpha_base", "value_residual_base"),
)
SEGMENT_IDS = np.array(
    [
        [1, 1, 1, 2, 2, 3, 3, 3, 3],  # no padding
        [0, 0, 1, 1, 0, 1, 2, 2, 0],  # padding first, within a segment, last
        [0, 0, 0, 0, 0, 0, 0, 0, 0],  # nothing but padding
        [0, 0, 0, 0, 5, 0, 0, 0, 0],  # one token
    ],
    np.int32,
)
B, T = SEGMENT_IDS.shape


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
      function: the operator with all arguments but arrays.
      shapes: of the arrays by name, for B, T and C.
    """

    function: Callable
    shapes: Callable[[int, int, int], dict[str, tuple[int, ...]]]

    def inputs(self, B: int, T: int, C: int) -> Arrays:
        return draw(0, **self.shapes(B, T, C))


def shift_shapes(count):
    def shapes(B, T, C):
        return {"x": (B, T, C), "mixes": (count, C), "state": (B, C)}

    return shapes


def norm_shift_shapes(count):
    def shapes(B, T, C):
        return shift_shapes(count)(B, T, C) | {"scale": (C,), "bias": (C,)}

    return shapes


def heads(names, parameters):
    def shapes(B, T, C):
        of_tokens, of_heads = (B, T, C // 64, 64), (C // 64, 64)
        return dict.fromkeys(names, of_tokens) | dict.fromkeys(parameters, of_heads)

    return shapes


def channel_mix_shapes(B, T, C):
    weights = {"key_weight": (C, 2 * C), "value_weight": (2 * C, C)}
    return {"x": (B, T, C), "mix": (C,), "state": (B, C)} | weights


def feed_forward_shapes(B, T, C):
    return {"x": (B, T, C), "key_weight": (C, 2 * C), "value_weight": (2 * C, C)}


CALLS = {
    "six mixes": Call(token_shift_mix, shift_shapes(6)),
    "packed mix": Call(
        functools.partial(token_shift_mix, segment_ids=SEGMENT_IDS), shift_shapes(1)
    ),
    "layer norm": Call(layer_norm, lambda B, T, C: {"x": (B, T, C), "scale": (C,), "bias": (C,)}),
    "pre-norm": Call(pre_norm, lambda B, T, C: {"x": (B, T, C), "scale": (C,), "bias": (C,)}),
    "norm and six mixes": Call(norm_shift_mix, norm_shift_shapes(6)),
    "norm and mix, no state": Call(
        functools.partial(norm_shift_mix, state=None),
        lambda B, T, C: {"x": (B, T, C), "scale": (C,), "bias": (C,), "mixes": (1, C)},
    ),
    "norm and packed mix": Call(
        functools.partial(norm_shift_mix, segment_ids=SEGMENT_IDS), norm_shift_shapes(1)
    ),
    "norm and packed six mixes": Call(
        functools.partial(norm_shift_mix, segment_ids=SEGMENT_IDS), norm_shift_shapes(6)
    ),
    "key update": Call(key_update, heads(("k", "alpha"), PARAMETERS[4:6])),
    "output correction": Call(
        output_correction, heads(("o", "r", "k", "v", "gate"), PARAMETERS[6:9])
    ),
    "channel mix": Call(channel_mix, channel_mix_shapes),
    "inputs of wkv7": Call(
        wkv7_inputs,
        heads(
            ("k", "v", "v_first", "decay_logits", "alpha_logits", "value_residual_logits"),
            PARAMETERS[4:6] + PARAMETERS[9:],
        ),
    ),
    "inputs of wkv7, first layer": Call(
        functools.partial(
            wkv7_inputs, v_first=None, value_residual_logits=None, value_residual_base=None
        ),
        heads(("k", "v", "decay_logits", "alpha_logits"), PARAMETERS[4:6] + PARAMETERS[9:11]),
    ),
}


def judge_kernels(call: Call, inputs: Arrays, limits: tuple[float, float] | None = None) -> None:
    kernels, reference = (
        functools.partial(call.function, implementation=name)
        for name in ("mosaic_gpu", "reference")
    )
    judge(kernels, reference, inputs, PARAMETERS, "bfloat16", limits)


# Channels of tiles of 256, 128 and 64; tiles that are not full; fewer channels than threads have,
# and more than a warpgroup has.
# Largest errors measured: outputs 1.8e-3, and keys, which are rounded by position, 2.7e-3;
# gradients 2.4e-3, of parameters 2e-7; for the channel mix 4.6e-3, because the squares, the
# operands of its second product, are rounded.
@on_cpu
@pytest.mark.usefixtures("no_races_and_no_hanging")
@pytest.mark.parametrize(
    ("name", "C"),
    [
        pytest.param("six mixes", 256, marks=pytest.mark.slow),
        ("packed mix", 128),
        pytest.param("packed mix", 1088, marks=pytest.mark.slow),
        pytest.param("six mixes", 2048, marks=pytest.mark.slow),
        ("layer norm", 64),
        ("pre-norm", 64),
        ("norm and packed mix", 64),
        pytest.param("norm and mix, no state", 128, marks=pytest.mark.slow),
        pytest.param("norm and six mixes", 64, marks=pytest.mark.slow),
        pytest.param("norm and packed mix", 1088, marks=pytest.mark.slow),
        pytest.param("layer norm", 1088, marks=pytest.mark.slow),
        pytest.param("key update", 64, marks=pytest.mark.slow),
        ("output correction", 128),
        pytest.param("output correction", 320, marks=pytest.mark.slow),
        pytest.param("channel mix", 64, marks=pytest.mark.slow),
        pytest.param("inputs of wkv7", 64, marks=pytest.mark.slow),
        pytest.param("inputs of wkv7, first layer", 320, marks=pytest.mark.slow),
    ],
)
def test_interpreted_equals_the_reference(name, C):
    limits = (1e-2, 1e-2) if name == "channel mix" else None
    with compile_for(Target(multiprocessors=1, interpret=True)):
        judge_kernels(CALLS[name], CALLS[name].inputs(B, T, C), limits)


@pytest.mark.usefixtures("no_races_and_no_hanging")
@on_each_device
@pytest.mark.parametrize(
    ("name", "period"),
    [
        ("key update", 1),
        pytest.param("key update", 3, marks=pytest.mark.slow),
        pytest.param("inputs of wkv7", 1, marks=pytest.mark.slow),
    ],
)
def test_errors_of_equal_tokens_cancel(name, period, interpret):
    """A single token errs by up to a unit in the last place, the mean of equal tokens hardly."""
    call, tokens = CALLS[name], 63
    arrays = {
        n: jnp.asarray(x, jnp.float32)
        if n in PARAMETERS
        else jnp.asarray(x[:, np.arange(tokens) % period], jnp.bfloat16)
        for n, x in call.inputs(1, period, 64).items()
    }

    def keys(implementation, arrays):
        results = jax.jit(functools.partial(call.function, implementation=implementation))(**arrays)
        return results if name == "key update" else (results.k, results.a, results.b)

    with compile_for(Target(multiprocessors=1, interpret=interpret)):
        actual = keys("mosaic_gpu", arrays)
    exact = keys("reference", jax.tree.map(lambda x: x.astype("float32"), arrays))
    for found, expected in zip(actual, exact, strict=True):
        found, expected = (
            np.asarray(x, np.float64).reshape(-1, period, 64) for x in (found, expected)
        )
        assert (np.abs(found - expected) <= 2**-7 * np.abs(expected)).all()
        assert relative_rms(found, expected) > 1.9e-3  # to nearest: 1.7e-3
        assert relative_rms(found.mean(0), expected.mean(0)) < 2e-4


@pytest.mark.usefixtures("no_races_and_no_hanging")
@on_each_device
def test_dithering_keeps_what_is_exact(interpret):
    """Numbers of bfloat16, zeros, infinities, and NaN."""
    k = np.random.default_rng(0).normal(size=(1, 9, 1, 64))
    k[0, 2], k[0, 4, 0, 3], k[0, 5, 0, 4], k[0, 6, 0, 5] = 0, np.inf, -np.inf, np.nan
    k, ones = jnp.asarray(k, jnp.bfloat16), jnp.ones((1, 64))
    with compile_for(Target(multiprocessors=1, interpret=interpret)):
        results = key_update(k, jnp.ones_like(k), ones, ones, implementation="mosaic_gpu")
    new_k, a, b = (np.asarray(x, np.float32) for x in results)
    np.testing.assert_array_equal(new_k, np.asarray(k, np.float32))
    for x in (a, b):
        np.testing.assert_array_equal(x[0, 2], 0)
        assert np.isfinite(x[0, [0, 1, 2, 3, 7, 8]]).all()
        assert np.isnan(x[0, 6]).all()


def bfloat16_shapes(call: Call, B: int, T: int, C: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name in PARAMETERS else jnp.bfloat16)
        for name, shape in call.shapes(B, T, C).items()
    }


def gradient(call: Call) -> Callable:
    def loss(arrays):
        results = call.function(**arrays, implementation="mosaic_gpu")
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(results))

    return jax.value_and_grad(loss)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("C", [192, 2048])
def test_compiles_for_cuda(name, C):
    call = CALLS[name]
    found = kernels_for_cuda(gradient(call), bfloat16_shapes(call, B, T, C))
    assert found == (3 if name == "channel mix" else 2)  # it mixes the tokens again


def test_shard_map_compiles_for_cuda():
    mesh = jax.make_mesh((1, 1), ("rows", "channels"), axis_types=(AxisType.Auto,) * 2)
    call, tokens = CALLS["six mixes"], PartitionSpec("rows", None, "channels")
    specs = {"x": tokens, "mixes": PartitionSpec(None, "channels")}
    specs["state"] = PartitionSpec("rows", "channels")

    def sharded_gradient(arrays):
        total, gradients = gradient(call)(arrays)
        return jax.lax.psum(total, ("rows", "channels")), gradients

    sharded = jax.shard_map(
        sharded_gradient, mesh=mesh, in_specs=(specs,), out_specs=(PartitionSpec(), specs)
    )
    assert kernels_for_cuda(sharded, bfloat16_shapes(call, B, T, 256)) == 2


@pytest.mark.parametrize("name", ["six mixes", "layer norm", "key update"])
def test_other_dtypes_and_channels_are_refused(name):
    call = CALLS[name]
    arrays = {n: jnp.zeros(shape) for n, shape in call.shapes(B, T, 64).items()}
    with pytest.raises(NotServed, match=r"needs bfloat16.*dtype=float32"):
        call.function(**arrays, implementation="mosaic_gpu")


def test_channels_in_no_multiple_of_64_are_refused():
    x, parameter = jnp.zeros((B, T, 96), jnp.bfloat16), jnp.zeros(96)
    with pytest.raises(NotServed, match=r"multiples of 64, got x.*\(4, 9, 96\)"):
        layer_norm(x, parameter, parameter, implementation="mosaic_gpu")


def test_calls_that_are_alike_share_a_kernel():
    parameter = jax.ShapeDtypeStruct((64,), jnp.float32)

    def three_norms(x, scale, bias):
        for eps in (1e-5, 1e-5, 1e-6):
            x = layer_norm(x, scale, bias, eps=eps, implementation="mosaic_gpu")
        return x

    arguments = jax.ShapeDtypeStruct((1, 5, 64), jnp.bfloat16), parameter, parameter
    program = jax.jit(three_norms).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @mosaic_gpu") == 2
    assert count_kernels(program) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("C", [64, 320, 768, 1088, 2048, 4096])
def test_on_the_gpu(name, C):
    call = CALLS[name]
    inputs = call.inputs(B, T, C) if "packed" in name else call.inputs(3, 341, C)
    if name == "channel mix":
        for weight in ("key_weight", "value_weight"):
            inputs[weight] /= 32
    limits = (1e-2, 1e-2) if name == "channel mix" else None
    if C > 2048 and "norm and" in name and "six" in name:
        limits = (3e-3, 4e-3)  # two kernels, with rounded gradients of the norm between them
    judge_kernels(call, inputs, limits)


@pytest.mark.parametrize("C", [2112, 5120])
def test_norm_and_mixes_of_many_channels_take_the_kernels_of_two_operators_for_cuda(C):
    call = CALLS["norm and packed six mixes"]
    arrays = bfloat16_shapes(call, B, T, C)
    expected = 5 if C == 5120 else 4  # two in the forward, or one; three in the backward
    assert kernels_for_cuda(gradient(call), arrays) == expected


@pytest.mark.gpu
def test_feed_forward_on_the_gpu():
    call = Call(feed_forward, feed_forward_shapes)
    inputs = call.inputs(2, 8448, 256)
    for weight in ("key_weight", "value_weight"):
        inputs[weight] /= 16
    judge_kernels(call, inputs, (1e-2, 1e-2))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("function", "shapes"), [(token_shift_mix, shift_shapes), (norm_shift_mix, norm_shift_shapes)]
)
def test_long_rows_on_the_gpu(function, shapes, packed):
    ids = np.sort(np.random.default_rng(1).integers(0, 9, (2, 3000), np.int32), axis=1)
    segment_ids = np.roll(ids, 700, axis=1) if packed else None  # padding within rows
    call = Call(functools.partial(function, segment_ids=segment_ids), shapes(6))
    judge_kernels(call, call.inputs(2, 3000, 1024))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["six mixes", "output correction", "norm and six mixes"])
def test_sums_are_the_same_in_twenty_runs(name):
    call = CALLS[name]
    arrays = {
        n: jnp.asarray(x, jnp.float32 if n in PARAMETERS else jnp.bfloat16)
        for n, x in call.inputs(3, 1000, 512).items()
    }
    run = jax.jit(gradient(call))
    first = jax.device_get(run(arrays))
    for _ in range(19):
        for x, y in zip(jax.tree.leaves(run(arrays)), jax.tree.leaves(first), strict=True):
            np.testing.assert_array_equal(x, y)
