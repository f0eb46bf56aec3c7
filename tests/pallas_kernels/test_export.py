"""Programs for a Hopper GPU are made on any machine, through public functions only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import LayerWeights, decode_layers, wkv7, wkv7_recurrent

NAMES = ("r", "log_decay", "k", "v", "a", "b")


def tokens(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    return dict.fromkeys(NAMES, jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16))


def layers() -> dict:
    C, H, K, F = 256, 4, 64, 512

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    shapes = {field.name: of(C) for field in dataclasses.fields(LayerWeights)}
    shapes |= {"time_shift_mix": of(6, C), "channel_key": of(C, F), "channel_value": of(F, C)}
    shapes |= dict.fromkeys(("receptance", "key", "value", "output"), of(C, C))
    for name in ("decay", "alpha", "value_residual", "gate"):
        shapes |= {f"{name}_down": of(C, 64), f"{name}_up": of(64, C)}
    of_heads = ("removal_scale", "replacement_mix", "bonus", "head_norm_scale", "head_norm_bias")
    shapes |= dict.fromkeys(of_heads, of(H, K))
    states = {"time_shift": of(3, C), "wkv": of(3, H, K, K, dtype=jnp.float32)}
    states["channel_shift"] = states["time_shift"]
    return {"x": jax.ShapeDtypeStruct((3, C), jnp.bfloat16), "weights": LayerWeights(**shapes)} | (
        states
    )


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
        (lambda x: decode_layers(**x, **on_kernels), layers(), 8),
    ],
    ids=["wkv7", "wkv7 gradient", "wkv7_recurrent", "wkv7_recurrent gradient", "decode_layers"],
)
def test_named_kernels_are_exported_on_any_machine(function, arguments, kernels):
    exported = jax.export.export(jax.jit(function), platforms=["cuda"])(arguments)
    assert exported.platforms == ("cuda",)
    assert exported.mlir_module().count("custom_call @mosaic_gpu") == kernels
