"""The products of the channel mix that make inner channels, on Hopper GPUs.

What follows a product elementwise is part of its kernel: inner channels, the largest arrays of the
model, then pass through memory once less.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hopper.matrix_product import is_served, multiply_and_finish
from pallas_kernels.hopper.target import target_in_context
from pallas_kernels.operators.channel_mix.products import (
    KEY_GRADIENTS_LAYOUT,
    SQUARES_LAYOUT,
    key_gradients,
    squares_of_keys,
)
from pallas_kernels.partitioning import partitioned


def _squares_of_keys(
    mixed: Float[Array, "B T C"], key_weight: Float[Array, "C F"]
) -> Float[Array, "B T F"]:
    target, (B, T, C), F = target_in_context(), mixed.shape, key_weight.shape[1]
    if not is_served(target, B * T, C, F):
        return squares_of_keys(mixed, key_weight)

    def finish(keys: jax.Array) -> jax.Array:
        activation = jnp.maximum(keys, 0)
        return activation * activation

    squares = multiply_and_finish(
        target, mixed.reshape(B * T, C), key_weight, None, finish, name="squares_of_keys"
    )
    return squares.reshape(B, T, F)


def _key_gradients(
    dy: Float[Array, "B T C"],
    value_weight: Float[Array, "F C"],
    squares: Float[Array, "B T F"],
) -> Float[Array, "B T F"]:
    target, (B, T, C), F = target_in_context(), dy.shape, value_weight.shape[0]
    if not is_served(target, B * T, C, F):
        return key_gradients(dy, value_weight, squares)

    def finish(dsquares: jax.Array, squares: jax.Array) -> jax.Array:
        return dsquares * (2 * jnp.sqrt(squares))

    dkeys = multiply_and_finish(
        target,
        dy.reshape(B * T, C),
        value_weight,
        squares.reshape(B * T, F),
        finish,
        name="key_gradients",
        transposed=True,
    )
    return dkeys.reshape(B, T, F)


squares_of_keys_mosaic_gpu = partitioned(_squares_of_keys, SQUARES_LAYOUT)
"""Computes `squares_of_keys`; XLA multiplies matrices that are small or in no whole tiles."""

key_gradients_mosaic_gpu = partitioned(_key_gradients, KEY_GRADIENTS_LAYOUT)
"""Computes `key_gradients`; XLA multiplies matrices that are small or in no whole tiles."""


__all__ = ["key_gradients_mosaic_gpu", "squares_of_keys_mosaic_gpu"]
