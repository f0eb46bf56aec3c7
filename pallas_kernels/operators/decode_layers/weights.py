"""The weights of a stack of RWKV-7 layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.sharding import Layout
from pallas_kernels.validation import check_float

STATES = ("layers B C", "layers B H K V", "layers B C")
LAYOUT = Layout(inputs=("B C", *STATES, "B", "..."), results=("B C", *STATES), independent="B")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """The weights of all layers, stacked along the first axis.

    Matrices multiply from the right, `x @ weight`. H * K is C, F is the number of inner channels of
    the channel mix, and each low-rank pair has a rank of its own.
    """

    time_norm_scale: Float[Array, "layers C"]
    """Scale of the layer norm before the time mix."""

    time_norm_bias: Float[Array, "layers C"]
    """Bias of the layer norm before the time mix."""

    time_shift_mix: Float[Array, "layers 6 C"]
    """Shares of the previous token: for receptance, decay, key, value, alpha and gate."""

    receptance: Float[Array, "layers C C"]
    """Projection to the receptance."""

    key: Float[Array, "layers C C"]
    """Projection to the key."""

    value: Float[Array, "layers C C"]
    """Projection to the value."""

    output: Float[Array, "layers C C"]
    """Projection of the time mix's output."""

    decay_base: Float[Array, "layers C"]
    """Added to the low-rank logits of the decay."""

    decay_down: Float[Array, "layers C decay_rank"]
    """First half of the low-rank logits of the decay."""

    decay_up: Float[Array, "layers decay_rank C"]
    """Second half of the low-rank logits of the decay."""

    alpha_base: Float[Array, "layers C"]
    """Added to the low-rank logits of alpha."""

    alpha_down: Float[Array, "layers C alpha_rank"]
    """First half of the low-rank logits of alpha."""

    alpha_up: Float[Array, "layers alpha_rank C"]
    """Second half of the low-rank logits of alpha."""

    value_residual_base: Float[Array, "layers C"]
    """Added to the low-rank logits of the value residual; the first layer's is not used."""

    value_residual_down: Float[Array, "layers C value_rank"]
    """First half of the low-rank logits of the value residual."""

    value_residual_up: Float[Array, "layers value_rank C"]
    """Second half of the low-rank logits of the value residual."""

    gate_down: Float[Array, "layers C gate_rank"]
    """First half of the low-rank gate."""

    gate_up: Float[Array, "layers gate_rank C"]
    """Second half of the low-rank gate."""

    removal_scale: Float[Array, "layers H K"]
    """Scale of the key before it is normalised to the removal key."""

    replacement_mix: Float[Array, "layers H K"]
    """Share of alpha in the replacement key."""

    bonus: Float[Array, "layers H K"]
    """Weight of a token's own key in its output."""

    head_norm_scale: Float[Array, "layers H K"]
    """Scale of the norm over each head's output."""

    head_norm_bias: Float[Array, "layers H K"]
    """Bias of the norm over each head's output."""

    channel_norm_scale: Float[Array, "layers C"]
    """Scale of the layer norm before the channel mix."""

    channel_norm_bias: Float[Array, "layers C"]
    """Bias of the layer norm before the channel mix."""

    channel_shift_mix: Float[Array, "layers C"]
    """Share of the previous token in the input of the channel mix."""

    channel_key: Float[Array, "layers C F"]
    """Projection of the channel mix to its inner channels."""

    channel_value: Float[Array, "layers F C"]
    """Projection of the channel mix from its inner channels."""

    def prepared(self, dtype: Any) -> "LayerWeights":
        """Returns the weights as decoding reads them, so that no step has to change them.

        Args:
          dtype: dtype of the activations, which matrices are cast to. Other weights keep theirs.

        Returns:
          The weights, with ranks of low-rank matrices padded to multiples of 64.
        """
        return self.with_matrices_as(dtype).with_padded_ranks()

    def with_matrices_as(self, dtype: Any) -> "LayerWeights":
        """Returns the weights with all matrices cast to a dtype; other weights keep theirs."""
        matrices = {name: getattr(self, name).astype(dtype) for name in MATRICES}
        return dataclasses.replace(self, **matrices)

    def with_padded_ranks(self, multiple: int = 64) -> "LayerWeights":
        """Returns the weights with zeros added to low-rank matrices, so that ranks are multiples.

        The results stay the same: a row of zeros ignores what a column of zeros makes. A program
        that decodes many tokens should get weights that are padded already.
        """
        padded = {}
        for name in _LOW_RANK:
            down, up = getattr(self, f"{name}_down"), getattr(self, f"{name}_up")
            more = (0, -up.shape[1] % multiple)
            if more == (0, 0):  # padding with nothing would still be an operation
                continue
            padded[f"{name}_down"] = jnp.pad(down, ((0, 0), (0, 0), more))
            padded[f"{name}_up"] = jnp.pad(up, ((0, 0), more, (0, 0)))
        return dataclasses.replace(self, **padded)


_AXES = {field.name: field.type.dim_str for field in dataclasses.fields(LayerWeights)}  # type: ignore[union-attr]

_LOW_RANK = tuple(name.removesuffix("_down") for name in _AXES if name.endswith("_down"))

MATRICES = tuple(
    name
    for name, (_, *axes) in ((name, axes.split()) for name, axes in _AXES.items())
    if len(axes) == 2 and axes[0] not in ("6", "H")
)
"""Names of the weights that activations are multiplied with as matrices."""


def check_weights(weights: Any, sizes: dict[str, int]) -> None:
    """Checks the shapes of all weights against each other and against `sizes`.

    Args:
      weights: what a caller gave as `LayerWeights`.
      sizes: axis name to size; the check adds the axes that it meets for the first time.

    Raises:
      TypeError: if `weights` is not a `LayerWeights`, or a field is not a floating-point array.
      ValueError: if a shape does not fit.
    """
    if not isinstance(weights, LayerWeights):
        raise TypeError(f"weights must be a LayerWeights, got {type(weights).__name__}")
    sizes["6"] = 6
    for name, axes in _AXES.items():
        check_float(f"weights.{name}", getattr(weights, name), axes, sizes)


__all__ = ["LAYOUT", "MATRICES", "LayerWeights", "check_weights"]
