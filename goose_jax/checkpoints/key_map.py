"""The entries of a map between our parameters and the tensors of a file.

Parameters of `blocks` are stacked over layers, but files have separate tensors for each layer:
`{i}` in a name stands for the layer, and the listed axes are the axes of one layer.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from goose_jax.config import RWKV7Config

type Form = Literal["same", "transposed", "flat", "row"]
type Shape = tuple[int, ...]

SAME: Form = "same"
TRANSPOSED: Form = "transposed"  # matrices of torch are [out, in], ours are [in, out]
FLAT: Form = "flat"  # [C] in the file, [H, K] in the model
ROW: Form = "row"  # [1, 1, C] in the file, [C] or [H, K] in the model


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the map: one of our parameters, or a row of it, and its tensor in a layout.

    Attributes:
      parameter: path of the parameter in the model, such as "blocks.time_mix.key".
      axes: names of the parameter's axes without the layers, which are keys of `axis_sizes`.
      row: index of the row in the parameter, if the file has a tensor for each row; else None.
      name: name of the tensor, where `{i}` stands for the layer.
      form: how the tensor's axes differ from the parameter's axes.
    """

    parameter: str
    axes: tuple[str, ...]
    row: int | None
    name: str
    form: Form

    @property
    def is_stacked(self) -> bool:
        """Whether there is one tensor for each layer."""
        return "{i}" in self.name

    @property
    def is_optional(self) -> bool:
        """Whether the file may lack the tensor of the first layer, which does not use it."""
        return self.parameter.startswith("blocks.time_mix.value_residual_")

    def names(self, num_layers: int) -> list[str]:
        """Returns the names of the tensors, layer by layer."""
        return [self.name.format(i=i) for i in range(num_layers if self.is_stacked else 1)]

    def shape(self, sizes: Mapping[str, int]) -> Shape:
        """Returns the shape of the parameter, or of its row, in one layer."""
        return tuple(sizes[axis] for axis in self.axes)

    def stored_shape(self, sizes: Mapping[str, int]) -> Shape:
        """Returns the shape of the tensor in the file."""
        shape = self.shape(sizes)
        match self.form:
            case "transposed":
                return shape[::-1]
            case "flat":
                return (math.prod(shape),)
            case "row":
                return (1, 1, math.prod(shape))
            case _:
                return shape


def axis_sizes(config: RWKV7Config) -> dict[str, int]:
    """Returns the sizes of the named axes."""
    return {
        "vocab": config.vocab_size,
        "C": config.hidden_size,
        "H": config.num_heads,
        "K": config.head_size,
        "F": config.intermediate_size,
        "6": 6,
        "decay_rank": config.decay_rank,
        "alpha_rank": config.alpha_rank,
        "value_rank": config.value_rank,
        "gate_rank": config.gate_rank,
    }
