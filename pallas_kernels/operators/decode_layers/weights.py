"""The weights of a stack of RWKV-7 layers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.types import FloatArray
from pallas_kernels.validation import check_float

_AXES = {
    "time_norm_scale": "layers C",
    "time_norm_bias": "layers C",
    "time_shift_mix": "layers 6 C",
    "receptance": "layers C C",
    "key": "layers C C",
    "value": "layers C C",
    "output": "layers C C",
    "decay_base": "layers C",
    "decay_down": "layers C decay_rank",
    "decay_up": "layers decay_rank C",
    "alpha_base": "layers C",
    "alpha_down": "layers C alpha_rank",
    "alpha_up": "layers alpha_rank C",
    "value_residual_base": "layers C",
    "value_residual_down": "layers C value_rank",
    "value_residual_up": "layers value_rank C",
    "gate_down": "layers C gate_rank",
    "gate_up": "layers gate_rank C",
    "removal_scale": "layers H K",
    "replacement_mix": "layers H K",
    "bonus": "layers H K",
    "head_norm_scale": "layers H K",
    "head_norm_bias": "layers H K",
    "channel_norm_scale": "layers C",
    "channel_norm_bias": "layers C",
    "channel_shift_mix": "layers C",
    "channel_key": "layers C F",
    "channel_value": "layers F C",
}

_LOW_RANK = ("decay", "alpha", "value_residual", "gate")

MATRICES = (
    *("receptance", "key", "value", "output", "channel_key", "channel_value"),
    *(f"{name}_{half}" for name in _LOW_RANK for half in ("down", "up")),
)
"""Names of the weights that activations are multiplied with as matrices."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """The weights of all layers, stacked; matrices multiply from the right, `x @ weight`.

    Attributes:
      time_norm_scale: `[layers, C]`, of the layer norm before the time mix.
      time_norm_bias: `[layers, C]`.
      time_shift_mix: `[layers, 6, C]`, shares of the previous token in what receptance, decay, key,
        value, alpha and gate are made of.
      receptance: `[layers, C, C]`, and so are key, value and output.
      key: as above.
      value: as above.
      output: as above.
      decay_base: `[layers, C]`, logits that a low-rank projection is added to; so are alpha_base
        and value_residual_base.
      decay_down: `[layers, C, rank]`; every down has a rank of its own.
      decay_up: `[layers, rank, C]`.
      alpha_base: as above.
      alpha_down: as above.
      alpha_up: as above.
      value_residual_base: as above; those of the first layer are not used.
      value_residual_down: as above.
      value_residual_up: as above.
      gate_down: as above.
      gate_up: as above.
      removal_scale: `[layers, H, K]`, and so are the next four.
      replacement_mix: as above.
      bonus: as above.
      head_norm_scale: as above.
      head_norm_bias: as above.
      channel_norm_scale: `[layers, C]`, of the layer norm before the channel mix.
      channel_norm_bias: `[layers, C]`.
      channel_shift_mix: `[layers, C]`.
      channel_key: `[layers, C, F]`.
      channel_value: `[layers, F, C]`.
    """

    time_norm_scale: FloatArray
    time_norm_bias: FloatArray
    time_shift_mix: FloatArray
    receptance: FloatArray
    key: FloatArray
    value: FloatArray
    output: FloatArray
    decay_base: FloatArray
    decay_down: FloatArray
    decay_up: FloatArray
    alpha_base: FloatArray
    alpha_down: FloatArray
    alpha_up: FloatArray
    value_residual_base: FloatArray
    value_residual_down: FloatArray
    value_residual_up: FloatArray
    gate_down: FloatArray
    gate_up: FloatArray
    removal_scale: FloatArray
    replacement_mix: FloatArray
    bonus: FloatArray
    head_norm_scale: FloatArray
    head_norm_bias: FloatArray
    channel_norm_scale: FloatArray
    channel_norm_bias: FloatArray
    channel_shift_mix: FloatArray
    channel_key: FloatArray
    channel_value: FloatArray

    def prepared(self, dtype: Any) -> "LayerWeights":
        """Returns the weights as decoding reads them, so that no step has to change them.

        Args:
          dtype: dtype of the activations, which matrices are cast to. Other weights keep theirs.

        Returns:
          The weights, with ranks of low-rank matrices padded to multiples of 64.
        """
        matrices = {name: getattr(self, name).astype(dtype) for name in MATRICES}
        return dataclasses.replace(self, **matrices).with_padded_ranks()

    def with_padded_ranks(self, multiple: int = 64) -> "LayerWeights":
        """The same with zeros added to the low-rank matrices, so that ranks are multiples.

        What a column of zeros makes, a row of zeros ignores. These matrices are small beside the
        others, but where many tokens are decoded in one program it is best done once, before.
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


def check_weights(weights: Any, sizes: dict[str, int]) -> None:
    """Checks all shapes against each other and against `sizes`, which gets those that are new.

    Raises:
      TypeError: if it is no `LayerWeights`, or a field is no floating-point array.
      ValueError: if a shape does not fit.
    """
    if not isinstance(weights, LayerWeights):
        raise TypeError(f"weights must be a LayerWeights, got {type(weights).__name__}")
    sizes["6"] = 6
    for name, axes in _AXES.items():
        check_float(f"weights.{name}", getattr(weights, name), axes, sizes)


__all__ = ["MATRICES", "LayerWeights", "check_weights"]
