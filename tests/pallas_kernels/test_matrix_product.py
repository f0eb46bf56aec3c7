"""Products with an elementwise function in the same kernel, and the channel mix made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import channel_mix
from pallas_kernels.hopper.matrix_product import is_served, multiply_and_finish
from pallas_kernels.hopper.target import Target, compile_for
from tests.helpers import relative_rms
from tests.pallas_kernels import operator_checks

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter is for CPUs")


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def finish(sums, *others):
    return sums * sums + sum(others)


def judge_product(target, M, K, N, *, transposed, with_other):
    x, y = draw(0, M, K), draw(1, *((N, K) if transposed else (K, N)))
    other = draw(2, M, N) if with_other else None
    run = functools.partial(multiply_and_finish, target, name="product", transposed=transposed)
    result = jax.jit(lambda *arrays: run(*arrays, finish))(x, y, other)
    x, y = (np.asarray(array, np.float64) for array in (x, y))
    sums = x @ (y.T if transposed else y)
    expected = sums * sums + (np.asarray(other, np.float64) if with_other else 0)
    assert relative_rms(result, expected) < 2e-3  # measured: 1.7e-3, the rounding of the result


@on_cpu
@pytest.mark.slow
@pytest.mark.usefixtures("no_races_and_no_hanging")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_other", [False, True])
def test_interpreted_equals_a_product_in_float64(transposed, with_other):
    target = Target(multiprocessors=4, interpret=True)  # two clusters, with two tiles each
    judge_product(target, 512, 192, 512, transposed=transposed, with_other=with_other)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_other", [False, True])
@pytest.mark.parametrize(("M", "K", "N"), [(256, 64, 256), (8192, 768, 3072), (32768, 1024, 4096)])
def test_on_the_gpu(M, K, N, transposed, with_other):
    judge_product(Target(), M, K, N, transposed=transposed, with_other=with_other)


def inputs_of_channel_mix(B, T, C):
    shapes = {"x": (B, T, C), "mix": (C,), "state": (B, C)}
    inputs = operator_checks.draw(0, **shapes, key_weight=(C, 4 * C), value_weight=(4 * C, C))
    for weight in ("key_weight", "value_weight"):
        inputs[weight] /= np.sqrt(C)
    return inputs


def judge_channel_mix(inputs):
    kernels, reference = (
        functools.partial(channel_mix, implementation=name) for name in ("mosaic_gpu", "reference")
    )
    # Squares, the operands of the second product, are rounded, and so are their gradients.
    operator_checks.judge(kernels, reference, inputs, ("mix",), "bfloat16", (1e-2, 1e-2))


@on_cpu
@pytest.mark.slow
@pytest.mark.usefixtures("no_races_and_no_hanging")
def test_channel_mix_interpreted():
    with compile_for(Target(multiprocessors=1, interpret=True)):
        judge_channel_mix(inputs_of_channel_mix(2, 128, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("C", [1024, 2048])
def test_channel_mix_on_the_gpu(C):
    judge_channel_mix(inputs_of_channel_mix(4, 2048, C))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((32768, 1024, 4096), True),
        ((32768, 1024, 4000), False),
        ((32768, 1000, 4096), False),
        ((32768 + 128, 1024, 4096), False),
        ((1024, 1024, 4096), False),  # 128 tiles, for 132 multiprocessors
    ],
)
def test_large_products_of_whole_tiles_are_served(shape, expected):
    assert is_served(Target(), *shape) == expected


@pytest.mark.parametrize(("T", "expected"), [(4096, 5), (4095, 3)])
def test_channel_mix_compiles_for_cuda(T, expected):
    shapes = {"x": (8, T, 1024), "mix": (1024,), "key_weight": (1024, 4096)}
    shapes["value_weight"] = (4096, 1024)
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}

    def loss(arrays):
        return channel_mix(**arrays, implementation="mosaic_gpu")[0].astype(jnp.float32).sum()

    # The tokens are mixed twice, and their gradients once; large products are two kernels.
    assert operator_checks.kernels_for_cuda(jax.grad(loss), arrays) == expected
