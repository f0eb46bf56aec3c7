"""The public operator of layer norm and token shift."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.context import ContextAxis, check_context_axis, state_before
from pallas_kernels.differentiation import differentiate, run_from_inputs
from pallas_kernels.dispatch import Choice
from pallas_kernels.operators.norm_shift_mix.kernels import backward_by_kernels, mix_by_kernels
from pallas_kernels.operators.norm_shift_mix.reference import (
    LAYOUT,
    Results,
    last_token,
    norm_of_token,
    norm_shift_mix_reference,
)
from pallas_kernels.operators.norm_shift_mix.xla import norm_shift_mix_backward
from pallas_kernels.operators.token_shift.api import check_shift
from pallas_kernels.sharding import over_explicit_axes
from pallas_kernels.types import SegmentIds
from pallas_kernels.validation import check_eps, check_float


def _with_input(run: Callable[..., tuple[Any, Any]]) -> Callable[..., Results]:
    return lambda x, *inputs, **settings: (*run(x, *inputs, **settings), x)


FORWARD = {
    "mosaic_gpu": _with_input(mix_by_kernels),
    "xla": norm_shift_mix_reference,
    "reference": norm_shift_mix_reference,
}
BACKWARD = {
    "mosaic_gpu": backward_by_kernels,
    "xla": norm_shift_mix_backward,
    "reference": differentiate(norm_shift_mix_reference),
}


def norm_shift_mix(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    mixes: Float[Array, "M C"],
    *,
    eps: float = 1e-5,
    state: Float[Array, "B C"] | None = None,
    segment_ids: SegmentIds | None = None,
    context_axis: ContextAxis | None = None,
    implementation: Choice = None,
) -> Results:
    """Normalises every token, and mixes it with the norm of the one before it, M times:

        normed = layer_norm(x, scale, bias)
        mixed_m = normed + (shift(normed) - normed) * mixes[m]

    `pre_norm` and `token_shift_mix` in one pass over memory in each direction, with nothing rounded
    between them. It is computed in float32 (float64 for float64 inputs) and differentiable in all
    arrays, through all results.

    Args:
      x: `[B, T, C]`, tokens, for example a residual stream.
      scale: `[C]`, of the norm. It may have a dtype of its own.
      bias: `[C]`, of the norm. It may have a dtype of its own.
      mixes: `[M, C]`, 0 keeps a token as it is, 1 takes the one before. It may have a dtype of its
        own.
      eps: > 0, known at trace time.
      state: `[B, C]`, the norm of the token before each row's first one, in the dtype of `x`; None
        means zeros.
      segment_ids: `[B, T]` integers, several sequences in a row, as for `token_shift_mix`.
      context_axis: the mesh axis that divides the tokens of each row, as for `token_shift_mix`.
      implementation: "mosaic_gpu", kernels for bfloat16 on Hopper GPUs, with C a multiple of 64;
        "xla", whose backward needs only the inputs; "reference", the definition, which JAX
        differentiates; a pair of names, (forward, backward); or None, which chooses.

    Returns:
      mixed: M arrays `[B, T, C]` in the dtype of `x`; zero at padding.
      new_state: `[B, C]`, the norm of the last token of each row that is not padding; `state` if
        all are.
      x: `[B, T, C]`, the argument. Take it where `x` is used again: the backward then adds the
        gradients of both uses in the pass that it makes anyway.

    Raises:
      ValueError: for wrong shapes, sizes, segment ids, eps or names, with the argument and its
        value.
      TypeError: for wrong dtypes.
    """
    sizes: dict[str, int] = {}
    check_float("x", x, "B T C", sizes)
    check_float("scale", scale, "C", sizes)
    check_float("bias", bias, "C", sizes)
    check_float("mixes", mixes, "M C", sizes)
    check_eps(eps)
    check_shift(x, state, segment_ids, sizes)
    eps = float(eps)

    def run(*inputs: Any, context_axis: ContextAxis | None = context_axis) -> Results:
        x, scale, bias, mixes, state, segment_ids = inputs
        new_state = None
        if context_axis is not None:
            check_context_axis("norm_shift_mix", context_axis, x.shape)
            last = norm_of_token(last_token(x, segment_ids), scale, bias, eps)
            state, new_state = state_before(last, state, segment_ids, context_axis)
        inputs = (x, scale, bias, mixes, state, segment_ids)
        mixed, last, x = run_from_inputs(
            "norm_shift_mix", FORWARD, BACKWARD, LAYOUT, implementation, *inputs, eps=eps
        )
        return mixed, last if new_state is None else new_state, x

    arrays = (x, scale, bias, mixes, state, segment_ids)
    return over_explicit_axes(run, LAYOUT, *arrays, over_context=True, context_axis=context_axis)


__all__ = ["norm_shift_mix"]
