"""The dimension legend and the few array names that every operator shares.

One letter, one meaning, everywhere in this package:

    B  batch rows
    T  tokens in a row
    H  heads
    K  key channels of a head (receptance, decay, removal and replacement keys too)
    V  value channels of a head
    C  channels of the residual stream, C = H * K
    F  channels inside the channel mix
    N  packed segments in a row
    L  tokens in a chunk
    G  chunks that are worked on at once

The recurrent state of one head is a `[K, V]` matrix: rows are key channels, columns value
channels. (The official RWKV code stores the transpose, `[V, K]`.)
"""

from typing import Any, Literal

from jaxtyping import Array, Bool, Float, Int

type Size = Any
"""An integer; or the symbol of one, while `jax.export` traces a program for any size."""

type FloatArray = Float[Array, "..."]
"""Any floating-point array; the docstring of the function gives its shape."""

type Scalar = Float[Array, ""]
"""A floating-point array without axes."""

type SegmentIds = Int[Array, "B T"]
"""0 is padding; consecutive equal ids, padding left out, are one segment."""

type Mask = Bool[Array, "..."]
"""A boolean array; the docstring of the function gives its shape."""

type Precision = Literal["high"] | None
"""Precision of products. None: kernels may round operands to 16 bits. "high": full float32."""

__all__ = ["FloatArray", "Mask", "Precision", "Scalar", "SegmentIds", "Size"]
