"""Describes a checkpoint without loading its parameters."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import jax.numpy as jnp

from goose_jax.checkpoints.containers import CheckpointKind, checkpoint_kind
from goose_jax.checkpoints.key_map import axis_sizes
from goose_jax.checkpoints.layouts import OFFICIAL, Layout
from goose_jax.checkpoints.native import (
    DESCRIPTION,
    CheckpointMetadata,
    open_checkpoint,
    read_description,
)
from goose_jax.checkpoints.pretrained import open_foreign
from goose_jax.config import RWKV7Config, dtype_name


@dataclasses.dataclass(frozen=True)
class CheckpointContents:
    """The description of a checkpoint.

    Attributes:
      path: path of the checkpoint. For a training run, path of its newest checkpoint.
      layout: layout of the names; None for a checkpoint of goose-jax.
      container: kind of the file or folder; "native" for a checkpoint of goose-jax.
      config: configuration of the model.
      metadata: values that the checkpoint records.
      parameters: number of parameters for each group of parameters and dtype, such as
        ("time mix", "float32").
      has_state: whether a trained initial state lies beside the weights.
    """

    path: Path
    layout: Layout | None
    container: CheckpointKind
    config: RWKV7Config
    metadata: CheckpointMetadata
    parameters: Counter[tuple[str, str]]
    has_state: bool = False

    @property
    def num_bytes(self) -> int:
        """Size of all parameters in their dtypes."""
        counts = self.parameters.items()
        return sum(number * jnp.dtype(dtype).itemsize for (_, dtype), number in counts)


def read_contents(path: Path) -> CheckpointContents:
    """Reads the description of a checkpoint of any layout, but none of its parameters.

    Args:
      path: a path that `load_pretrained` accepts.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if it is not a checkpoint of RWKV-7, or if it is damaged as far as that can
        be seen without reading parameters.
    """
    if checkpoint_kind(path) == "native":
        path = open_checkpoint(path, only=DESCRIPTION)
        config, metadata = read_description(path)
        dtype, sizes = dtype_name("param_dtype", config.param_dtype), axis_sizes(config)
        counts: Counter[tuple[str, str]] = Counter()
        # The official layout has all parameters that our checkpoints hold.
        for entry in OFFICIAL.for_config(config).entries:
            layers = config.num_layers if entry.is_stacked else 1
            counts[_group(entry.parameter), dtype] += layers * math.prod(entry.shape(sizes))
        return CheckpointContents(path, None, "native", config, metadata, counts)
    found = open_foreign(path)
    dtypes = {name: tensor.dtype.name for name, tensor in found.tensors.items()}
    counts = _count_parameters(found.config, found.layout, dtypes)
    return CheckpointContents(
        path,
        found.layout,
        found.container,
        found.config,
        found.metadata,
        counts,
        bool(found.states),
    )


def _count_parameters(
    config: RWKV7Config, layout: Layout, dtypes: dict[str, str]
) -> Counter[tuple[str, str]]:
    """Counts the parameters in the tensors whose dtypes are given."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes = axis_sizes(config)
    for entry in layout.entries:
        for name in entry.names(config.num_layers):
            if name in dtypes:
                counts[_group(entry.parameter), dtypes[name]] += math.prod(entry.shape(sizes))
    return counts


def _group(parameter: str) -> str:
    name = parameter.removeprefix("blocks.").split(".")[0]
    return "norms" if name.endswith("norm") else name.replace("_", " ")


__all__ = ["CheckpointContents", "read_contents"]
