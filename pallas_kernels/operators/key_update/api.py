"""The public key update operator."""

from jaxtyping import Array, Float

from pallas_kernels.differentiation import differentiate, run_from_inputs
from pallas_kernels.dispatch import Choice
from pallas_kernels.operators.key_update.mosaic_gpu import (
    key_update_backward_mosaic_gpu,
    key_update_mosaic_gpu,
)
from pallas_kernels.operators.key_update.reference import LAYOUT, key_update_reference
from pallas_kernels.operators.key_update.xla import key_update_backward
from pallas_kernels.partitioning import partitioned, partitioned_backward
from pallas_kernels.validation import check_float

FORWARD = {
    "mosaic_gpu": partitioned(key_update_mosaic_gpu, LAYOUT),
    "xla": key_update_reference,
    "reference": key_update_reference,
}
BACKWARD = {
    "mosaic_gpu": partitioned_backward(key_update_backward_mosaic_gpu, LAYOUT),
    "xla": key_update_backward,
    "reference": differentiate(key_update_reference),
}


def key_update(
    k: Float[Array, "B T H K"],
    alpha: Float[Array, "B T H K"],
    removal_scale: Float[Array, "H K"],
    replacement_mix: Float[Array, "H K"],
    *,
    implementation: Choice = None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """The three keys that `wkv7` takes, from the projected key and the in-context learning rate:

        kk = k * removal_scale / max(norm(k * removal_scale), 1e-12)
        new_k = k * (1 + (alpha - 1) * replacement_mix)
        a = -kk
        b = kk * alpha

    with the Euclidean norm over each head; as in the official training code of RWKV-7, where
    `removal_scale` is `k_k` and `replacement_mix` is `k_a`. It is computed in float32 (float64 for
    float64 inputs) and differentiable in all arrays. Where the norm is below 1e-12 the divisor
    counts as a constant, so that the gradient of a zero key is finite (but large).

    Kernels round the results up or down by the token's position, so that the state of `wkv7` does
    not add up the same error for each of many equal tokens.

    Args:
      k: `[B, T, H, K]`, projected keys.
      alpha: `[B, T, H, K]`, in-context learning rates, in (0, 1). It may have a dtype of its own.
      removal_scale: `[H, K]`, weights of the removal key's channels. It may have a dtype of its
        own.
      replacement_mix: `[H, K]`, how much `alpha` scales the replacement key. It may have a dtype
        of its own.
      implementation: "mosaic_gpu", kernels for bfloat16 on Hopper GPUs, with K of 64;
        "xla", whose backward needs only the inputs; "reference", the definition, which JAX
        differentiates; a pair of names, (forward, backward); or None, which chooses.

    Returns:
      new_k: `[B, T, H, K]`, the replacement key, in the dtype of `k`.
      a: `[B, T, H, K]`, minus the removal key, in the dtype of `k`.
      b: `[B, T, H, K]`, the removal key times the learning rate, in the dtype of `k`.

    Raises:
      ValueError: for wrong shapes, sizes or names, with the argument and its value.
      TypeError: for wrong dtypes.
    """
    sizes: dict[str, int] = {}
    check_float("k", k, "B T H K", sizes)
    check_float("alpha", alpha, "B T H K", sizes)
    check_float("removal_scale", removal_scale, "H K", sizes)
    check_float("replacement_mix", replacement_mix, "H K", sizes)
    inputs = (k, alpha, removal_scale, replacement_mix)
    return run_from_inputs("key_update", FORWARD, BACKWARD, LAYOUT, implementation, *inputs)
