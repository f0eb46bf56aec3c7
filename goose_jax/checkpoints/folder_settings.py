"""The file `config.json` of folders in the layouts of Hugging Face.

Two forms are known: that of flash-linear-attention (FLA), and that of `transformers` itself, which
rwkv-rs uses, too. They name the same sizes, some by other keys.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from goose_jax.checkpoints.directory import read_json
from goose_jax.checkpoints.errors import CheckpointError, shorten_name
from goose_jax.checkpoints.layouts import Layout
from goose_jax.checkpoints.native import CheckpointMetadata
from goose_jax.checkpoints.tokenizer_copy import locate_tokenizer
from goose_jax.config import RWKV7Config

CONFIG = "config.json"
OFFICIAL_EPS = {"norm_eps": 1e-5, "head_norm_eps": 64e-5}
"""Constants of the official code, and defaults of `transformers`."""

FOLDED = "embedding_layer_norm_fused"
"""The key of `transformers` for a norm that is folded into the embedding."""

_LARGEST_EPS = 1e6
_OURS = "goose_jax"  # the key of config.json for our metadata
_FIXED = {  # the settings of RWKV-7; FLA's class has other variants, too
    "hidden_act": "sqrelu",
    "norm_first": True,
    "norm_bias": True,
    "attn": None,
    "tie_word_embeddings": False,
    "quantization_config": None,
}
# Keys of config.json: our field. Without num_heads, which FLA ignores and is often wrong.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "head_dim": "head_size",
    "head_size": "head_size",
    "intermediate_size": "intermediate_size",
    "decay_low_rank_dim": "decay_rank",
    "a_low_rank_dim": "alpha_rank",
    "v_low_rank_dim": "value_rank",
    "gate_low_rank_dim": "gate_rank",
}


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads `config.json`; a folder without one gives no settings.

    Raises:
      CheckpointError: if it is damaged or does not describe an RWKV-7 model.
    """
    if not (folder / CONFIG).exists():
        return {}
    settings = read_json(folder / CONFIG)
    wrong = [
        f"{key} is {shorten_name(repr(settings[key]))} rather than {value!r}"
        for key, value in _FIXED.items()
        if settings.get(key, value) != value
    ]
    model = settings.get("model_type")
    if not (model == "rwkv7" or (model == "rwkv" and settings.get("architecture_version"))):
        wrong.insert(0, f"model_type is {shorten_name(repr(model))} rather than 'rwkv7'")
    version = settings.get("architecture_version", "rwkv7")
    if version != "rwkv7":
        wrong.append(f"architecture_version is {shorten_name(repr(version))} rather than 'rwkv7'")
    if wrong:
        raise CheckpointError(f"{folder} is no RWKV-7 model: " + "; ".join(wrong))
    return settings


def read_epsilons(
    folder: Path, settings: Mapping[str, Any], layout: Layout, head_size: int
) -> dict[str, float]:
    """Returns the epsilons of the norms in `config.json`, or the defaults of the layout's code.

    Raises:
      CheckpointError: if a value is no positive number.
    """
    norm_eps: Any = settings.get("layer_norm_epsilon", settings.get("norm_eps"))
    eps: Any = OFFICIAL_EPS["norm_eps"] if norm_eps is None else norm_eps
    head_eps: Any = settings.get("group_norm_epsilon")
    for key, value in (("norm_eps", eps), ("group_norm_epsilon", head_eps)):
        is_number = type(value) in (int, float) and 0 < value < _LARGEST_EPS
        if not is_number and not (value is None and key == "group_norm_epsilon"):
            shown = shorten_name(repr(value))
            raise CheckpointError(f"{folder / CONFIG}: {key} is {shown}, no positive number")
    if head_eps is None and layout.settings == "fla":
        head_eps = head_size * eps
    return {
        "norm_eps": float(eps),
        "head_norm_eps": float(OFFICIAL_EPS["head_norm_eps"] if head_eps is None else head_eps),
    }


def check_sizes(folder: Path, settings: Mapping[str, Any], config: RWKV7Config) -> None:
    """Checks the sizes in `config.json` against the sizes that were inferred from the weights.

    Raises:
      CheckpointError: if they differ. The message lists all differences.
    """
    told = {key: getattr(config, field) for key, field in _SIZES.items()}
    wrong = [
        f"{key} is {shorten_name(repr(settings[key]))}, but {value} by the weights"
        for key, value in told.items()
        if settings.get(key) not in (None, value)
    ]
    if wrong:
        raise CheckpointError(f"{folder / CONFIG} does not fit the weights: " + "; ".join(wrong))


def read_metadata(folder: Path, settings: Mapping[str, Any]) -> CheckpointMetadata | None:
    """Returns the metadata that we recorded, or None if another program wrote the folder.

    Raises:
      CheckpointError: if the metadata are damaged.
    """
    if _OURS not in settings:
        return None
    metadata = CheckpointMetadata.from_json(settings[_OURS], f"{folder / CONFIG}: {_OURS}")
    tokenizer = locate_tokenizer(metadata.tokenizer, folder)
    return dataclasses.replace(metadata, tokenizer=tokenizer)


def default_value_rank(settings: Mapping[str, Any]) -> int | None:
    """Returns the rank that nothing tells but `config.json`, in a model of one layer."""
    rank = settings.get("v_low_rank_dim")
    return rank if type(rank) is int and rank > 0 else None


def make_settings(
    config: RWKV7Config, metadata: CheckpointMetadata, layout: Layout
) -> dict[str, Any]:
    """Returns the contents of `config.json` for a model.

    Raises:
      ValueError: if the layout's code would compute with another epsilon.
    """
    tokenizer = metadata.tokenizer or ""
    # In files of vocabularies, too, id 0 ends a document.
    end_of_document = 0 if tokenizer == "world" or tokenizer.startswith("rwkv_vocab") else None
    sizes = {key: getattr(config, field) for key, field in _SIZES.items()}
    tokens = {
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "pad_token_id": None,
    }
    ours = {"torch_dtype": config.param_dtype, _OURS: dataclasses.asdict(metadata)}
    if layout.settings == "fla":
        expected = {"head_norm_eps": config.head_size * config.norm_eps}
        check_epsilons(config, expected, f"FLA with {config.norm_eps=}")
        del sizes["head_size"]
        return {
            "architectures": ["RWKV7ForCausalLM"],
            "model_type": "rwkv7",
            **{key: _FIXED[key] for key in _FIXED if key != "quantization_config"},
            **sizes,
            "attn_mode": "chunk",
            "hidden_ratio": config.intermediate_size / config.hidden_size,
            "num_heads": config.num_heads,
            "value_dim": [config.hidden_size] * config.num_layers,
            "norm_eps": config.norm_eps,
            **(tokens | ours),
        }
    del sizes["head_dim"]
    is_rwkv_rs = layout.name == "rwkv-rs"
    return {
        "architectures": ["RwkvForCausalLM" if is_rwkv_rs else "Rwkv7ForCausalLM"],
        "model_type": "rwkv" if is_rwkv_rs else "rwkv7",
        "architecture_version": "rwkv7",
        **sizes,
        "num_attention_heads": config.num_heads,
        "layer_norm_epsilon": config.norm_eps,
        "group_norm_epsilon": config.head_norm_eps,
        FOLDED: not config.embedding_norm,
        "tie_word_embeddings": False,
        **(tokens | ours),
    }


def check_epsilons(config: RWKV7Config, expected: Mapping[str, float], where: str) -> None:
    """Checks that code with fixed epsilons computes what the model computes.

    Raises:
      ValueError: if an epsilon differs.
    """
    for name, value in expected.items():
        if not math.isclose(getattr(config, name), value, rel_tol=1e-6):
            raise ValueError(
                f"the layout has no place for {name}={getattr(config, name)}: {where} computes "
                f"with {value}"
            )


__all__ = [
    "CONFIG",
    "FOLDED",
    "OFFICIAL_EPS",
    "check_epsilons",
    "check_sizes",
    "default_value_rank",
    "make_settings",
    "read_epsilons",
    "read_metadata",
    "read_settings",
]
