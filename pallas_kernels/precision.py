"""The dtypes that operators compute in, and the digits of their products."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def full_products(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which products of float32 lose no digits, if that is wanted.

    Outside of it, JAX's setting counts; by default a GPU rounds operands to 10 bits (TF32).
    """
    return jax.default_matmul_precision("highest") if wanted else contextlib.nullcontext()


def accumulation_dtype(*arrays: jax.Array) -> np.dtype:
    """Returns the dtype to compute in: float32, or float64 if any of the arrays has it."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def contract(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `jnp.einsum` of two arrays, with sums and result in float32 at least."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x, y))


def per_token(parameter: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns a parameter `[...]` as `[1, 1, ...]` in `dtype`, to go with arrays `[B, T, ...]`."""
    return parameter.astype(dtype)[None, None]


__all__ = [
    "accumulation_dtype",
    "contract",
    "full_products",
    "per_token",
]
