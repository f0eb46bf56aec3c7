"""Programs for a Hopper GPU are made on any machine, through public functions only."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import decode_layers, wkv7, wkv7_recurrent
from tests.pallas_kernels.mesh_cases import decoding_arguments

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
