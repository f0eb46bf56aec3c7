"""The layouts: what the tensors of a model are called in a file, and how their axes lie.

A layout says nothing about the container, a `.pth` or safetensors file or a folder of them: each
layout can lie in each container. One table has the official names. All other layouts are renamings
of it. Their sources are

- "huggingface" and "huggingface-x-x": `fla/models/rwkv7` of flash-linear-attention (FLA);
- "transformers": the model of `transformers` itself (pull request 47787) and the repositories
  `RWKV/RWKV7-*`, which vLLM reads, too (pull request 48686);
- "transformers-raw", "transformers-emb", "rwkv7" and "rwkv7-emb": earlier drafts and converters of
  that model;
- "rwkv-rs": the repository `rwkv-rs/rwkv7-g1-st`;
- "web-rwkv": `assets/scripts/convert_safetensors.py` of web-rwkv, for ai00.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from goose_jax.checkpoints.key_map import FLAT, ROW, SAME, TRANSPOSED, Entry, Form
from goose_jax.config import RWKV7Config

type SettingsForm = Literal["fla", "transformers"]

STATE_NAME = "blocks.{i}.att.time_state"
"""Official name of a trained initial state, `[H, V, K]`."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and forms of a model's tensors in a file.

    Attributes:
      name: name of the layout.
      description: what `goose-jax inspect` calls it.
      entries: the map, in the order in which a file is written.
      settings: keys of `config.json` in a folder of this layout.
      folded: whether the norm after the embedding may be folded into the embedding, so that files
        have no tensors for it, also where no `config.json` says so.
      unused: whether files may hold the value residual of the first layer, which has no effect.
      state: name of a trained initial state, where `{i}` stands for the layer; None if the layout
        has no place for one.
      state_axes: axes of that state in the file.
    """

    name: str
    description: str
    entries: tuple[Entry, ...]
    settings: SettingsForm = "transformers"
    unused: bool = True
    folded: bool = False
    state: str | None = None
    state_axes: Literal["V K", "K V"] = "V K"

    def general_names(self) -> frozenset[str]:
        """Returns the names of all tensors as `general_name` writes them."""
        names = [entry.name for entry in self.entries]
        names += [self.state] if self.state else []
        return frozenset(general_name(name) for name in names)

    def for_config(self, config: RWKV7Config) -> "Layout":
        """Returns the layout without the norm after the embedding, if the model has none."""
        return self if config.embedding_norm else self.without_embedding_norm()

    def without_embedding_norm(self) -> "Layout":
        """Returns the layout of files in which that norm is folded into the embedding."""
        entries = [x for x in self.entries if not x.parameter.startswith("embedding_norm.")]
        return dataclasses.replace(self, entries=tuple(entries))

    @property
    def embedding_norms(self) -> tuple[str, ...]:
        """Names of the tensors of the norm after the embedding."""
        return tuple(x.name for x in self.entries if x.parameter.startswith("embedding_norm."))

    @property
    def embedding(self) -> str:
        """Name of the embedding's tensor."""
        return next(entry.name for entry in self.entries if entry.parameter == "embedding")


def general_name(name: str) -> str:
    """Returns a tensor's name with `*` in place of the number of its layer."""
    return re.sub(r"\.(\d+|\{i\})\.", ".*.", name, count=1)


# Prefixes of our names and of the official names; then our name, its axes, the official name and
# the form.
type _Line = tuple[str, str, str, Form]
_GROUPS: tuple[tuple[str, str, tuple[_Line, ...]], ...] = (
    (
        "", "",
        (
            ("embedding", "vocab C", "emb.weight", SAME),
        ),
    ),
    (
        "embedding_norm.", "blocks.0.ln0.",
        (
            ("scale", "C", "weight", SAME),
            ("bias", "C", "bias", SAME),
        ),
    ),
    (
        "blocks.", "blocks.{i}.",
        (
            ("time_mix_norm.scale", "C", "ln1.weight", SAME),
            ("time_mix_norm.bias", "C", "ln1.bias", SAME),
            ("channel_mix_norm.scale", "C", "ln2.weight", SAME),
            ("channel_mix_norm.bias", "C", "ln2.bias", SAME),
        ),
    ),
    (
        "blocks.time_mix.", "blocks.{i}.att.",
        (
            ("shift_mix", "6 C", "x_*", ROW),
            ("decay_base", "C", "w0", ROW),
            ("decay_down", "C decay_rank", "w1", SAME),
            ("decay_up", "decay_rank C", "w2", SAME),
            ("alpha_base", "C", "a0", ROW),
            ("alpha_down", "C alpha_rank", "a1", SAME),
            ("alpha_up", "alpha_rank C", "a2", SAME),
            ("value_residual_base", "C", "v0", ROW),
            ("value_residual_down", "C value_rank", "v1", SAME),
            ("value_residual_up", "value_rank C", "v2", SAME),
            ("gate_down", "C gate_rank", "g1", SAME),
            ("gate_up", "gate_rank C", "g2", SAME),
            ("removal_scale", "H K", "k_k", ROW),
            ("replacement_mix", "H K", "k_a", ROW),
            ("bonus", "H K", "r_k", SAME),
            ("receptance", "C C", "receptance.weight", TRANSPOSED),
            ("key", "C C", "key.weight", TRANSPOSED),
            ("value", "C C", "value.weight", TRANSPOSED),
            ("output", "C C", "output.weight", TRANSPOSED),
            ("head_norm_scale", "H K", "ln_x.weight", FLAT),
            ("head_norm_bias", "H K", "ln_x.bias", FLAT),
        ),
    ),
    (
        "blocks.channel_mix.", "blocks.{i}.ffn.",
        (
            ("shift_mix", "C", "x_k", ROW),
            ("key", "C F", "key.weight", TRANSPOSED),
            ("value", "F C", "value.weight", TRANSPOSED),
        ),
    ),
    (
        "", "",
        (
            ("final_norm.scale", "C", "ln_out.weight", SAME),
            ("final_norm.bias", "C", "ln_out.bias", SAME),
            ("head", "C vocab", "head.weight", TRANSPOSED),
        ),
    ),
)  # fmt: skip
_ROWS = "rwkvag"  # x_r, x_w, ...: in the order of SHIFT_MIX_NAMES


def _official_entries() -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for ours, official, lines in _GROUPS:
        for parameter, dimensions, name, form in lines:
            axes = tuple(dimensions.split())
            if not name.endswith("*"):
                entries.append(Entry(ours + parameter, axes, None, official + name, form))
                continue
            for row, letter in enumerate(_ROWS):
                row_name = official + name[:-1] + letter
                entries.append(Entry(ours + parameter, axes[1:], row, row_name, form))
    return tuple(entries)


def _renamed(
    entries: Iterable[Entry], names: Mapping[str, str], forms: Mapping[str, Form] | None = None
) -> tuple[Entry, ...]:
    """Returns entries with other names and forms.

    Args:
      entries: the entries.
      names: parts of official names and what takes their place, one after another.
      forms: new forms by the last parts of official names.
    """
    renamed = []
    for entry in entries:
        name = entry.name
        for old, new in names.items():
            name = name.replace(old, new)
        ends = [end for end in forms or {} if entry.name.endswith(end)]
        form = forms[ends[0]] if forms and ends else entry.form
        renamed.append(dataclasses.replace(entry, name=name, form=form))
    return tuple(renamed)


def _with_joined_rows(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Replaces the tensors of the six shift mixes by one, `x_x`."""
    joined = []
    for entry in entries:
        if entry.row is None:
            joined.append(entry)
        elif entry.row == 0:
            name = entry.name.removesuffix("x_r") + "x_x"
            joined.append(Entry(entry.parameter, ("6", *entry.axes), None, name, SAME))
    return tuple(joined)


_MATRICES = [f"att.{name}{k}" for name in "wavg" for k in (1, 2)]  # of low rank
_FLA_MATRICES = {f"attn.{x}{k}": f"attn.{x}_lora.lora.{2 * k - 2}.weight" for x in "wavg"
                 for k in (1, 2)}  # fmt: skip
_FLA_NAMES = {
    "emb.": "model.embeddings.",
    "blocks.0.ln0.": "model.layers.0.pre_norm.",
    "blocks.": "model.layers.",
    ".ln1.": ".attn_norm.",
    ".ln2.": ".ffn_norm.",
    ".att.": ".attn.",
    **_FLA_MATRICES,
    **{f"attn.{x}0": f"attn.{x}_lora.lora.2.bias" for x in "wav"},
    "receptance.": "r_proj.",
    "attn.key.": "attn.k_proj.",
    "attn.value.": "attn.v_proj.",
    "attn.output.": "attn.o_proj.",
    "ln_x.": "g_norm.",
    "ln_out.": "model.norm.",
    "head.": "lm_head.",
}
_FLA_FORMS: dict[str, Form] = {
    **dict.fromkeys(_MATRICES, TRANSPOSED),
    **dict.fromkeys(("att.w0", "att.a0", "att.v0", "ffn.x_k"), SAME),
    **dict.fromkeys(("k_k", "k_a"), FLAT),
}
_PREFIXED = {"blocks.": "model.blocks.", "ln_out.": "model.ln_out."}
_RWKV_RS_NAMES = {
    "emb.": "model.embed_tokens.",
    "blocks.0.ln0.": "model.embedding_norm.",
    "blocks.": "model.layers.",
    ".ln1.": ".input_layernorm.",
    ".ln2.": ".post_attention_layernorm.",
    ".att.": ".linear_attn.",
    ".ffn.": ".mlp.",
    "receptance.": "r_proj.",
    "attn.key.": "attn.k_proj.",
    "attn.value.": "attn.v_proj.",
    "attn.output.": "attn.o_proj.",
    "ln_x.": "g_norm.",
    "ln_out.": "model.norm.",
    "head.": "lm_head.",
}
_RWKV_RS_FORMS: dict[str, Form] = {  # vectors are [C]
    **dict.fromkeys([f"att.x_{x}" for x in _ROWS] + ["ffn.x_k"], SAME),
    **dict.fromkeys(("att.w0", "att.a0", "att.v0"), SAME),
    **dict.fromkeys(("k_k", "k_a"), FLAT),
}

_OFFICIAL_ENTRIES = _official_entries()
_FLA_ENTRIES = _renamed(_OFFICIAL_ENTRIES, _FLA_NAMES, _FLA_FORMS)
OFFICIAL = Layout("official", "official names", _OFFICIAL_ENTRIES, state=STATE_NAME)
WEB_RWKV = Layout(
    "web-rwkv",
    "official names with transposed low-rank matrices (web-rwkv, ai00)",
    _renamed(_OFFICIAL_ENTRIES, {}, dict.fromkeys(_MATRICES, TRANSPOSED)),
    state=STATE_NAME,
    state_axes="K V",
)
FLA = Layout(
    "huggingface",
    "Hugging Face layout of flash-linear-attention",
    _FLA_ENTRIES,
    settings="fla",
    unused=False,
)
FLA_X_X = Layout(
    "huggingface-x-x",
    "Hugging Face layout of flash-linear-attention, older (x_x)",
    _with_joined_rows(_FLA_ENTRIES),
    settings="fla",
    unused=False,
)
TRANSFORMERS = Layout(
    "transformers",
    "transformers",
    _renamed(
        _OFFICIAL_ENTRIES,
        {"emb.": "model.embeddings.", **_PREFIXED, **{x: f"{x}.weight" for x in _MATRICES}},
        dict.fromkeys(_MATRICES, TRANSPOSED),
    ),
)
TRANSFORMERS_RAW = Layout(
    "transformers-raw",
    "transformers, low-rank matrices as in the official code",
    _renamed(_OFFICIAL_ENTRIES, {"emb.": "model.embeddings.", **_PREFIXED}),
)
TRANSFORMERS_EMB = Layout(
    "transformers-emb",
    "transformers, official names behind model.",
    _renamed(_OFFICIAL_ENTRIES, {"emb.": "model.emb.", **_PREFIXED}),
)
_RWKV7_PREFIX = {"blocks.": "rwkv7.blocks.", "ln_out.": "rwkv7.ln_out."}
RWKV7_EMBEDDINGS = Layout(
    "rwkv7",
    "transformers, older (rwkv7.)",
    _renamed(_OFFICIAL_ENTRIES, {"emb.": "rwkv7.embeddings.", **_RWKV7_PREFIX}),
    folded=True,
)
RWKV7_EMB = Layout(
    "rwkv7-emb",
    "transformers, older (rwkv7.emb)",
    _renamed(_OFFICIAL_ENTRIES, {"emb.": "rwkv7.emb.", **_RWKV7_PREFIX}),
    folded=True,
)
RWKV_RS = Layout(
    "rwkv-rs",
    "rwkv-rs (linear_attn)",
    _renamed(_OFFICIAL_ENTRIES, _RWKV_RS_NAMES, _RWKV_RS_FORMS),
    unused=False,
)
LAYOUTS = {
    layout.name: layout
    for layout in (
        *(OFFICIAL, WEB_RWKV, FLA, FLA_X_X, TRANSFORMERS, TRANSFORMERS_RAW, TRANSFORMERS_EMB),
        *(RWKV7_EMBEDDINGS, RWKV7_EMB, RWKV_RS),
    )
}
"""All layouts by name. Of several that fit a file equally well, the first is taken."""
