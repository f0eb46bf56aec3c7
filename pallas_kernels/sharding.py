"""Operators over the mesh in context."""

import jax
import jax.numpy as jnp
import numpy as np


def vary_alike[*Arrays](*arrays: *Arrays) -> tuple[*Arrays]:
    """Makes all arrays vary over the same mesh axes, in `jax.shard_map`; numpy's become JAX's.

    The backward of a `jax.custom_vjp` must return gradients that vary as the arguments do, but
    the gradient of a replicated parameter varies with the data. After this cast it may, and JAX
    transposes the cast to the sum over devices.

    Args:
      *arrays: pytrees of arrays; None is one without any.
    """
    arrays = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, arrays)
    leaves = jax.tree.leaves(arrays)
    axes = frozenset[str]().union(*(jax.typeof(leaf).mat.varying for leaf in leaves))
    if not axes:
        return arrays

    def vary(leaf: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(leaf).mat.varying
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying")

    return jax.tree.map(vary, arrays)


__all__ = ["vary_alike"]
