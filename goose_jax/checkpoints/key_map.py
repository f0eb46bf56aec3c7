"""Maps our parameters to the tensors of official `.pth` files and of FLA's layout.

One table serves both directions. Parameters of `blocks` are stacked over layers, but files have
separate tensors for each layer: `{i}` in a name stands for the layer, and the listed axes are the
axes of one layer.

FLA is flash-linear-attention, whose models are Hugging Face `transformers` models.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from goose_jax.config import RWKV7Config

type Layout = Literal["pth", "huggingface", "huggingface_x_x"]
"""`huggingface_x_x` is FLA's older layout, which has one tensor for the six shift mixes."""
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


def key_map(layout: Layout) -> tuple[Entry, ...]:
    """Returns the entries of a layout, in the order in which a file is written."""
    return _ENTRIES[layout]


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


# A group begins with the prefixes of our names, of the official names and of FLA's names. Its lines
# have our name and axes, the official name and form, and FLA's name and form.
type _Names = tuple[str, str, str]
type _Line = tuple[str, str, str, Form, str, Form]
_GROUPS: tuple[tuple[_Names, tuple[_Line, ...]], ...] = (
    (
        ("", "", ""),
        (
            ("embedding", "vocab C", "emb.weight", SAME, "model.embeddings.weight", SAME),
        ),
    ),
    (
        ("embedding_norm.", "blocks.0.ln0.", "model.layers.0.pre_norm."),
        (
            ("scale", "C", "weight", SAME, "weight", SAME),
            ("bias", "C", "bias", SAME, "bias", SAME),
        ),
    ),
    (
        ("blocks.", "blocks.{i}.", "model.layers.{i}."),
        (
            ("time_mix_norm.scale", "C", "ln1.weight", SAME, "attn_norm.weight", SAME),
            ("time_mix_norm.bias", "C", "ln1.bias", SAME, "attn_norm.bias", SAME),
            ("channel_mix_norm.scale", "C", "ln2.weight", SAME, "ffn_norm.weight", SAME),
            ("channel_mix_norm.bias", "C", "ln2.bias", SAME, "ffn_norm.bias", SAME),
        ),
    ),
    (
        ("blocks.time_mix.", "blocks.{i}.att.", "model.layers.{i}.attn."),
        (
            ("shift_mix", "6 C", "x_*", ROW, "x_*", ROW),
            ("decay_base", "C", "w0", ROW, "w_lora.lora.2.bias", SAME),
            ("decay_down", "C decay_rank", "w1", SAME, "w_lora.lora.0.weight", TRANSPOSED),
            ("decay_up", "decay_rank C", "w2", SAME, "w_lora.lora.2.weight", TRANSPOSED),
            ("alpha_base", "C", "a0", ROW, "a_lora.lora.2.bias", SAME),
            ("alpha_down", "C alpha_rank", "a1", SAME, "a_lora.lora.0.weight", TRANSPOSED),
            ("alpha_up", "alpha_rank C", "a2", SAME, "a_lora.lora.2.weight", TRANSPOSED),
            ("value_residual_base", "C", "v0", ROW, "v_lora.lora.2.bias", SAME),
            ("value_residual_down", "C value_rank", "v1", SAME, "v_lora.lora.0.weight", TRANSPOSED),
            ("value_residual_up", "value_rank C", "v2", SAME, "v_lora.lora.2.weight", TRANSPOSED),
            ("gate_down", "C gate_rank", "g1", SAME, "g_lora.lora.0.weight", TRANSPOSED),
            ("gate_up", "gate_rank C", "g2", SAME, "g_lora.lora.2.weight", TRANSPOSED),
            ("removal_scale", "H K", "k_k", ROW, "k_k", FLAT),
            ("replacement_mix", "H K", "k_a", ROW, "k_a", FLAT),
            ("bonus", "H K", "r_k", SAME, "r_k", SAME),
            ("receptance", "C C", "receptance.weight", TRANSPOSED, "r_proj.weight", TRANSPOSED),
            ("key", "C C", "key.weight", TRANSPOSED, "k_proj.weight", TRANSPOSED),
            ("value", "C C", "value.weight", TRANSPOSED, "v_proj.weight", TRANSPOSED),
            ("output", "C C", "output.weight", TRANSPOSED, "o_proj.weight", TRANSPOSED),
            ("head_norm_scale", "H K", "ln_x.weight", FLAT, "g_norm.weight", FLAT),
            ("head_norm_bias", "H K", "ln_x.bias", FLAT, "g_norm.bias", FLAT),
        ),
    ),
    (
        ("blocks.channel_mix.", "blocks.{i}.ffn.", "model.layers.{i}.ffn."),
        (
            ("shift_mix", "C", "x_k", ROW, "x_k", SAME),
            ("key", "C F", "key.weight", TRANSPOSED, "key.weight", TRANSPOSED),
            ("value", "F C", "value.weight", TRANSPOSED, "value.weight", TRANSPOSED),
        ),
    ),
    (
        ("", "", ""),
        (
            ("final_norm.scale", "C", "ln_out.weight", SAME, "model.norm.weight", SAME),
            ("final_norm.bias", "C", "ln_out.bias", SAME, "model.norm.bias", SAME),
            ("head", "C vocab", "head.weight", TRANSPOSED, "lm_head.weight", TRANSPOSED),
        ),
    ),
)  # fmt: skip
_ROWS = "rwkvag"  # x_r, x_w, ...: in the order of SHIFT_MIX_NAMES


def _entries(layout: Layout) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for (ours, official, fla), lines in _GROUPS:
        for parameter, dimensions, official_name, official_form, fla_name, fla_form in lines:
            parameter, axes = ours + parameter, tuple(dimensions.split())
            name, form = fla + fla_name, fla_form
            if layout == "pth":
                name, form = official + official_name, official_form
            if not name.endswith("*"):
                entries.append(Entry(parameter, axes, None, name, form))
            elif layout == "huggingface_x_x":
                entries.append(Entry(parameter, axes, None, name[:-1] + "x", SAME))
            else:
                rows = enumerate(_ROWS)
                entries += [Entry(parameter, axes[1:], k, name[:-1] + x, form) for k, x in rows]
    return tuple(entries)


_LAYOUTS: tuple[Layout, ...] = ("pth", "huggingface", "huggingface_x_x")
_ENTRIES = {layout: _entries(layout) for layout in _LAYOUTS}
