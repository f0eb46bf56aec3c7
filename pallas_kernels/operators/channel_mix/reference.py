"""The channel mix by its definition: `relu(mixed @ key_weight)^2 @ value_weight`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.operators.token_shift.reference import token_shift_mix_reference
from pallas_kernels.precision import accumulation_dtype, contract
from pallas_kernels.sharding import Layout
from pallas_kernels.types import SegmentIds

LAYOUT = Layout(
    inputs=("B T C", "C", "C F", "F C", "B C", "B T"), results=("B T C", "B C"), independent="B"
)


FEED_FORWARD_LAYOUT = Layout(inputs=("B T C", "C F", "F C"), results="B T C", independent="B T")


def project_keys(
    mixed: Float[Array, "B T C"], key_weight: Float[Array, "C F"]
) -> Float[Array, "B T F"]:
    """Returns `relu(mixed @ key_weight)` in the dtype of `mixed`."""
    return jax.nn.relu(contract("btc,cf->btf", mixed, key_weight)).astype(mixed.dtype)


def square(activation: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """Computes the square in float32 at least; returns it in the dtype of the argument."""
    return jnp.square(activation.astype(accumulation_dtype(activation))).astype(activation.dtype)


def channel_mix_reference(
    x: Float[Array, "B T C"],
    mix: Float[Array, " C"],
    key_weight: Float[Array, "C F"],
    value_weight: Float[Array, "F C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B C"]]:
    """Computes `pallas_kernels.channel_mix`, which documents the arguments."""
    (mixed,), new_state = token_shift_mix_reference(x, mix[None], state, segment_ids)
    return feed_forward_reference(mixed, key_weight, value_weight), new_state


def feed_forward_reference(
    x: Float[Array, "B T C"], key_weight: Float[Array, "C F"], value_weight: Float[Array, "F C"]
) -> Float[Array, "B T C"]:
    """Computes `pallas_kernels.feed_forward`, which documents the arguments."""
    activation = project_keys(x, key_weight)
    return contract("btf,fc->btc", square(activation), value_weight).astype(x.dtype)


__all__ = [
    "FEED_FORWARD_LAYOUT",
    "LAYOUT",
    "channel_mix_reference",
    "feed_forward_reference",
    "project_keys",
    "square",
]
