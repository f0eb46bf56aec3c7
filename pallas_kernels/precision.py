"""The dtypes that operators compute in."""

import jax
import jax.numpy as jnp
import numpy as np


def accumulation_dtype(*arrays: jax.Array) -> np.dtype:
    """Returns the dtype to compute in: float32, or float64 if any of the arrays has it."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def contract(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `jnp.einsum` of two arrays, with sums and result in float32 at least."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x, y))


def per_token(parameter: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns a parameter `[...]` as `[1, 1, ...]` in `dtype`, to go with arrays `[B, T, ...]`."""
    return parameter.astype(dtype)[None, None]


__all__ = ["accumulation_dtype", "contract", "per_token"]
