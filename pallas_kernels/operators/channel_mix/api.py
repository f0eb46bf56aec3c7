"""The public channel mix operator."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.context import ContextAxis, check_context_axis, token_before
from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.channel_mix.reference import (
    FEED_FORWARD_LAYOUT,
    LAYOUT,
    channel_mix_reference,
    feed_forward_reference,
)
from pallas_kernels.operators.channel_mix.squares_kept import channel_mix_with
from pallas_kernels.operators.token_shift.api import check_shift
from pallas_kernels.sharding import over_explicit_axes, vary_alike
from pallas_kernels.types import SegmentIds
from pallas_kernels.validation import check_float, check_same_dtype

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "mosaic_gpu": functools.partial(channel_mix_with, "mosaic_gpu"),
    "xla": functools.partial(channel_mix_with, "xla"),
    "reference": channel_mix_reference,
}


def _without_shift(
    implementation: str, x: jax.Array, key_weight: jax.Array, value_weight: jax.Array
) -> jax.Array:
    return channel_mix_with(implementation, x, None, key_weight, value_weight, None, None)[0]


FEED_FORWARD_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic_gpu": functools.partial(_without_shift, "mosaic_gpu"),
    "xla": functools.partial(_without_shift, "xla"),
    "reference": feed_forward_reference,
}


def channel_mix(
    x: Float[Array, "B T C"],
    mix: Float[Array, " C"],
    key_weight: Float[Array, "C F"],
    value_weight: Float[Array, "F C"],
    *,
    state: Float[Array, "B C"] | None = None,
    segment_ids: SegmentIds | None = None,
    context_axis: ContextAxis | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B C"]]:
    """The feed-forward network of RWKV-7:

        relu(mixed @ key_weight)^2 @ value_weight      with mixed = x + (shift(x) - x) * mix

    Operands and results of matrix products have the dtype of `x`. Sums, and everything between the
    products, are float32 (float64 for float64 inputs). It is differentiable in all arrays, through
    both results.

    Args:
      x: `[B, T, C]`, tokens.
      mix: `[C]`, 0 keeps a token as it is, 1 takes the one before. It may have a dtype of its own.
      key_weight: `[C, F]`, in the dtype of `x`; F is usually 4 C.
      value_weight: `[F, C]`, in the dtype of `x`.
      state: `[B, C]`, the token before each row's first one, in the dtype of `x`; None means
        zeros.
      segment_ids: `[B, T]` integers, several sequences in a row: 0 is padding, which is skipped,
        and consecutive equal ids are one segment (see `pallas_kernels.packing`).
      context_axis: in `jax.shard_map`, the mesh axis over which the tokens of each row are divided
        into equal pieces, in order. All arrays with tokens are this device's pieces; `state` and
        `new_state` are those of the whole row, the same on all devices. Outside, it may be an Auto
        axis of the mesh in context; arrays are then whole. Tokens that an explicit axis divides
        need no `context_axis`.
      implementation: "mosaic_gpu", for bfloat16 on Hopper GPUs, with C a multiple of 64; "xla";
        "reference", the definition; or None, which chooses. "mosaic_gpu" shifts tokens in kernels,
        and makes inner channels in kernels if B * T and F are multiples of 256. The first two keep
        the inputs and `relu(mixed @ key_weight)^2` for the backward.

    Returns:
      y: `[B, T, C]`, in the dtype of `x`; zero at padding.
      new_state: `[B, C]`, the last token of each row that is not padding; `state` if all are.

    Raises:
      ValueError: for wrong shapes, sizes, segment ids or names, with the argument and its value.
      TypeError: for wrong dtypes.
    """
    sizes: dict[str, int] = {}
    check_float("x", x, "B T C", sizes)
    check_float("mix", mix, "C", sizes)
    check_float("key_weight", key_weight, "C F", sizes)
    check_float("value_weight", value_weight, "F C", sizes)
    check_same_dtype(x=x, key_weight=key_weight, value_weight=value_weight)
    check_shift(x, state, segment_ids, sizes)

    def run(
        *arrays: Any, context_axis: ContextAxis | None = context_axis
    ) -> tuple[jax.Array, jax.Array]:
        x, *parameters, state, segment_ids = arrays
        new_state = None
        if context_axis is not None:
            check_context_axis("channel_mix", context_axis, x.shape)
            state, new_state = token_before(x, state, segment_ids, context_axis)
        varying = vary_alike(x, *parameters, state, segment_ids)
        y, last = dispatch("channel_mix", IMPLEMENTATIONS, implementation, *varying)
        return y, last if new_state is None else new_state

    arrays = (x, mix, key_weight, value_weight, state, segment_ids)
    return over_explicit_axes(run, LAYOUT, *arrays, over_context=True, context_axis=context_axis)


def feed_forward(
    x: Float[Array, "B T C"],
    key_weight: Float[Array, "C F"],
    value_weight: Float[Array, "F C"],
    *,
    implementation: str | None = None,
) -> Float[Array, "B T C"]:
    """The channel mix without its token shift, for tokens that are mixed already:

        relu(x @ key_weight)^2 @ value_weight

    Operands and results of matrix products have the dtype of `x`. Sums, and everything between the
    products, are float32 (float64 for float64 inputs). It is differentiable in all arrays.

    Args:
      x: `[B, T, C]`, mixed tokens.
      key_weight: `[C, F]`, in the dtype of `x`; F is usually 4 C.
      value_weight: `[F, C]`, in the dtype of `x`.
      implementation: "mosaic_gpu", for bfloat16 on Hopper GPUs, with C a multiple of 64, which
        makes inner channels in kernels if B * T and F are multiples of 256; "xla"; "reference", the
        definition; or None, which chooses. The first two keep the inputs and
        `relu(x @ key_weight)^2` for the backward.

    Returns:
      `[B, T, C]`, in the dtype of `x`.

    Raises:
      ValueError: for wrong shapes, sizes or names, with the argument and its value.
      TypeError: for wrong dtypes.
    """
    sizes: dict[str, int] = {}
    check_float("x", x, "B T C", sizes)
    check_float("key_weight", key_weight, "C F", sizes)
    check_float("value_weight", value_weight, "F C", sizes)
    check_same_dtype(x=x, key_weight=key_weight, value_weight=value_weight)

    def run(*arrays: Any) -> jax.Array:
        varying = vary_alike(*arrays)
        return dispatch("feed_forward", FEED_FORWARD_IMPLEMENTATIONS, implementation, *varying)

    return over_explicit_axes(run, FEED_FORWARD_LAYOUT, x, key_weight, value_weight)


__all__ = ["channel_mix", "feed_forward"]
