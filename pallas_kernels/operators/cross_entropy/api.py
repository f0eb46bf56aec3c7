"""The public cross entropy operators: of each token, and their weighted sum."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import dispatch
from pallas_kernels.operators.cross_entropy.losses import cross_entropy_xla
from pallas_kernels.operators.cross_entropy.mosaic_gpu import (
    cross_entropy_mosaic_gpu,
    cross_entropy_sum_mosaic_gpu,
)
from pallas_kernels.operators.cross_entropy.reference import (
    LAYOUT,
    SUM_LAYOUT,
    cross_entropy_reference,
    cross_entropy_sum_reference,
)
from pallas_kernels.operators.cross_entropy.sum import cross_entropy_sum_xla
from pallas_kernels.sharding import over_explicit_axes, vary_alike
from pallas_kernels.validation import check_float, check_int, check_positive, check_same_dtype

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic_gpu": cross_entropy_mosaic_gpu,
    "xla": cross_entropy_xla,
    "reference": cross_entropy_reference,
}
SUM_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "mosaic_gpu": cross_entropy_sum_mosaic_gpu,
    "xla": cross_entropy_sum_xla,
    "reference": cross_entropy_sum_reference,
}


def cross_entropy(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    *,
    l2wrap: float = 0.0,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T"]:
    """The cross entropy of every token under a language model's head, without its full logits:

        logits = hidden @ weight
        loss[b, t] = logsumexp(logits[b, t]) - logits[b, t, targets[b, t]]

    Logits are computed for `chunk_size` tokens at a time, in the forward and again in the
    backward. Logits and the gradient of the weight are sums in float32 (float64 for float64
    inputs). It is differentiable in `hidden` and `weight`.

    Args:
      hidden: `[B, T, C]`, what the model's head reads.
      weight: `[C, vocab]`, in the dtype of `hidden`.
      targets: `[B, T]` integers from 0 to vocab - 1. A token that shall not count needs a target
        too; leave out its loss, with `jnp.where` for example.
      l2wrap: >= 0 and known at trace time. The gradient of each loss adds `l2wrap` times a token's
        largest logit (the first of equals) to the gradient of that logit, which draws large logits
        towards zero; the loss itself stays as it is. With 1e-4 and the mean over all tokens this
        is the `L2Wrap` of the official training code.
      chunk_size: how many tokens have logits at once, at most, but at least one of each row; known
        at trace time. None takes 1024, or up to 8192 where a kernel stores 16 bits for each logit.
        "reference" ignores it.
      implementation: "xla", which works in chunks and keeps its inputs and two numbers for each
        token for the backward; "mosaic_gpu", the same with the kernels of `cross_entropy_sum`, for
        a vocabulary in multiples of 64; "reference", the definition, with full logits; or None,
        which chooses.

    Returns:
      losses: `[B, T]` float32 (float64 for float64 inputs), in nats. Where a target is out of range
        that could not be checked, for example under jit, the loss is nan, and so is the gradient.

    Raises:
      ValueError: for wrong shapes, sizes, numbers or names, with the argument and its value; for
        targets out of range where their values are known, which is not so under jit.
      TypeError: for wrong dtypes.
    """
    _check(hidden, weight, targets, l2wrap, chunk_size)

    def run(*arrays: jax.Array) -> jax.Array:
        settings = (float(l2wrap), chunk_size)
        arrays = vary_alike(*arrays)
        return dispatch("cross_entropy", IMPLEMENTATIONS, implementation, *arrays, *settings)

    return over_explicit_axes(run, LAYOUT, hidden, weight, targets)


def cross_entropy_sum(
    hidden: Float[Array, "B T C"],
    weight: Float[Array, "C vocab"],
    targets: Int[Array, "B T"],
    token_weights: Float[Array, "B T"],
    *,
    l2wrap: float = 0.0,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, ""]:
    """The weighted sum of the cross entropies of all tokens, the loss of a training step:

        sum over b and t of token_weights[b, t] * cross_entropy(hidden, weight, targets)[b, t]

    With weights of one divided by the number of tokens it is their mean. It gives the gradients
    that `cross_entropy` gives, in three matrix products instead of four: because the weights are
    known in the forward, each chunk of logits turns into losses and gradients at once, and is not
    computed again. So differentiate it, and use `cross_entropy` where only losses are needed. It is
    differentiable in `hidden`, `weight` and `token_weights`.

    Args:
      hidden: `[B, T, C]`, what the model's head reads.
      weight: `[C, vocab]`, in the dtype of `hidden`.
      targets: `[B, T]` integers from 0 to vocab - 1. Tokens of weight 0 need one, too.
      token_weights: `[B, T]`, the weight of each token's loss, in a dtype of its own; 0 for a token
        that shall not count.
      l2wrap: as in `cross_entropy`; a token's weight multiplies this part of its gradient, too.
      chunk_size: how many tokens have logits at once, at most, but at least one of each row; known
        at trace time. None takes 2048, or up to 8192 where a kernel stores 16 bits for each logit.
        "reference" ignores it.
      implementation: "xla", which works in chunks and keeps the gradients for the backward, an
        array like `hidden` and one like `weight` in float32; "mosaic_gpu", the same with kernels
        for Hopper GPUs that find the statistics of float32 logits, for a vocabulary in multiples
        of 64; "reference", the definition, with full logits; or None, which chooses. "mosaic_gpu"
        finds statistics in the kernel of the logits' product, for bfloat16, where C is a multiple
        of 64, and the tokens of a chunk and the vocabulary are multiples of 256: without gradients
        no logits are stored, and for gradients 16 bits of each, its exponential relative to the
        largest one of 256. In other calls a kernel passes over them once.

    Returns:
      A scalar, float32 (float64 for float64 inputs), in nats; nan where a target out of range has a
      weight and could not be checked, for example under jit. In `jax.shard_map` it is the sum over
      the tokens of this device.

    Raises:
      ValueError: for wrong shapes, sizes, numbers or names, with the argument and its value; for
        targets out of range where their values are known, which is not so under jit.
      TypeError: for wrong dtypes.
    """
    sizes = _check(hidden, weight, targets, l2wrap, chunk_size)
    check_float("token_weights", token_weights, "B T", sizes)

    def run(*arrays: jax.Array) -> jax.Array:
        settings = (float(l2wrap), chunk_size)
        arrays = vary_alike(*arrays)
        return dispatch(
            "cross_entropy_sum", SUM_IMPLEMENTATIONS, implementation, *arrays, *settings
        )

    return over_explicit_axes(run, SUM_LAYOUT, hidden, weight, targets, token_weights)


def _check(hidden: Any, weight: Any, targets: Any, l2wrap: Any, chunk_size: Any) -> dict[str, int]:
    """Checks the arguments that both operators have; returns axis names to sizes."""
    sizes: dict[str, int] = {}
    check_float("hidden", hidden, "B T C", sizes)
    check_float("weight", weight, "C vocab", sizes)
    check_same_dtype(hidden=hidden, weight=weight)
    _check_targets(targets, sizes)
    if not isinstance(l2wrap, (int, float)) or not (math.isfinite(l2wrap) and l2wrap >= 0):
        raise ValueError(f"l2wrap must be a number >= 0 known at trace time, got {l2wrap!r}")
    if chunk_size is not None:
        check_positive("chunk_size", chunk_size)
    return sizes


def _check_targets(targets: Any, sizes: dict[str, int]) -> None:
    check_int("targets", targets, "B T", sizes)
    if isinstance(targets, jax.core.Tracer):
        return
    values = np.asarray(targets)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= sizes["vocab"]:
        raise ValueError(
            f"targets must be in 0..{sizes['vocab'] - 1}, got values from {low} to {high}"
        )
