"""The products of the channel mix that make inner channels, and what follows them elementwise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.operators.channel_mix.reference import square
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.sharding import Layout

SQUARES_LAYOUT = Layout(inputs=("B T C", "C F"), results="B T F", independent="B T F")
KEY_GRADIENTS_LAYOUT = Layout(
    inputs=("B T C", "F C", "B T F"), results="B T F", independent="B T F"
)


def squares_of_keys(
    mixed: Float[Array, "B T C"], key_weight: Float[Array, "C F"]
) -> Float[Array, "B T F"]:
    """Returns `relu(mixed @ key_weight)^2` in the dtype of `mixed`."""
    return square(jax.nn.relu(jnp.einsum("btc,cf->btf", mixed, key_weight)))


def key_gradients(
    dy: Float[Array, "B T C"],
    value_weight: Float[Array, "F C"],
    squares: Float[Array, "B T F"],
) -> Float[Array, "B T F"]:
    """Returns the gradient of `mixed @ key_weight`, in the dtype of `dy`.

    Args:
      dy: the gradient of `squares @ value_weight`.
      value_weight: carries it to the squares.
      squares: results of `squares_of_keys`. Where relu is flat they are zero, and so is this.
    """
    dsquares = jnp.einsum("btc,fc->btf", dy, value_weight)
    activation = jnp.sqrt(squares.astype(accumulation_dtype(squares)))
    return (2 * activation * dsquares).astype(dy.dtype)


__all__ = ["KEY_GRADIENTS_LAYOUT", "SQUARES_LAYOUT", "key_gradients", "squares_of_keys"]
