"""What every operator does to its arrays around the computation."""

import jax
import jax.numpy as jnp
import numpy as np


def accumulation_dtype(*arrays: jax.Array) -> np.dtype:
    """The dtype to compute in: float32, or float64 if any of the arrays has it."""
    return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


def contract(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An `einsum` that sums, and gives its result, in float32 at least."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x, y))


def per_token(parameter: jax.Array, dtype: np.dtype) -> jax.Array:
    """A parameter `[...]` as `[1, 1, ...]` in the given dtype, to go with arrays `[B, T, ...]`."""
    return parameter.astype(dtype)[None, None]


def vary_alike[*Arrays](*arrays: *Arrays) -> tuple[*Arrays]:
    """Makes all arrays vary over the same mesh axes; does nothing outside `jax.shard_map`.

    The backward of a `jax.custom_vjp` must return gradients that vary as the arguments do, but
    the gradient of a replicated parameter varies with the data. After this cast it may, and JAX
    transposes the cast to the sum over devices.

    Args:
      *arrays: arrays or None.
    """
    leaves = jax.tree.leaves(arrays)
    axes = frozenset[str]().union(*(jax.typeof(leaf).mat.varying for leaf in leaves))
    if not axes:
        return arrays

    def vary(leaf: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(leaf).mat.varying
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying")

    return jax.tree.map(vary, arrays)


__all__ = ["accumulation_dtype", "contract", "per_token", "vary_alike"]
