"""The error of logits that are NaN or infinite, from which no token can be drawn."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from goose_jax.nn import DecodingWeights


class NonFiniteLogitsError(FloatingPointError):
    """The model gave NaN or infinite logits. The message names the likely cause.

    Attributes:
      failed: rows of the batch (`generate`), or ids of the requests (`ContinuousBatch`).
    """

    def __init__(self, message: str, failed: Sequence[int]):
        super().__init__(message)
        self.failed = tuple(failed)


def non_finite_logits(
    weights: DecodingWeights, kind: str, failed: Sequence[int]
) -> NonFiniteLogitsError:
    """Returns the error of logits that are NaN or infinite.

    Args:
      weights: the model.
      kind: "row" or "request".
      failed: rows of the batch, or ids of the requests.
    """
    names = ", ".join(str(number) for number in failed)
    return NonFiniteLogitsError(
        f"the model gave NaN or infinite logits for {kind} {names}: {_cause(weights)}", failed
    )


def _cause(weights: DecodingWeights) -> str:
    config = weights.config
    if "float16" in (config.compute_dtype, config.param_dtype):
        return (
            "float16, whose largest number is 65504, is likely to have overflowed; "
            "choose the dtype bfloat16 or float32"
        )
    for path, parameter in jax.tree.leaves_with_path(weights.params):
        if not jnp.isfinite(parameter).all():
            name = ".".join(str(key.key) for key in path)
            return (
                f"the parameter {name} holds such values, so the checkpoint is damaged "
                "or its training diverged"
            )
    return (
        "all parameters are finite, so the state that the text continues from holds such values, "
        f"or a number exceeded the range of {config.compute_dtype}"
    )


__all__ = ["NonFiniteLogitsError", "non_finite_logits"]
