"""`goose-jax inspect`: says what a checkpoint holds, without loading it."""

import math
from collections import Counter
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import tyro

from goose_jax.checkpoints.key_map import Layout, axis_sizes, key_map
from goose_jax.checkpoints.native import CheckpointMetadata, find_checkpoint, read_description
from goose_jax.checkpoints.pretrained import checkpoint_kind, open_foreign
from goose_jax.config import RWKV7Config

_KINDS = {
    "pth": "official .pth",
    "huggingface": "Hugging Face layout of flash-linear-attention",
    "huggingface_x_x": "Hugging Face layout of flash-linear-attention, older (x_x)",
    "native": "checkpoint of goose-jax",
}
_UNITS = ("KiB", "MiB", "GiB", "TiB")
_RUN_DTYPES = ("float32", "bfloat16", "float16")
type _Counts = Counter[tuple[str, str]]  # numbers in the file, by group and dtype


def inspect(checkpoint: Annotated[Path, tyro.conf.Positional]) -> None:
    """Says what a checkpoint holds and what memory it takes to run, without loading it.

    In use:
      goose-jax inspect rwkv7.pth
      goose-jax inspect runs/stdlib-1

    Args:
      checkpoint: An official .pth, a folder in the Hugging Face layout, a checkpoint of goose-jax,
        or the folder of a training run (then its newest checkpoint).

    Raises:
      ValueError: if it is no checkpoint, or damaged as far as can be seen without reading all.
      OSError: if there is none, or it cannot be read.
    """
    print(_describe(checkpoint))


def format_bytes(size: int) -> str:
    """A size as a person reads it, as in "1.4 GiB"."""
    if size < 1024:
        return f"{size} bytes"
    power = min(int(math.log(size, 1024)), 4)
    return f"{size / 1024**power:.3g} {_UNITS[power - 1]}"


def _describe(path: Path) -> str:
    if checkpoint_kind(path) == "native":
        path = find_checkpoint(path)
        config, metadata = read_description(path)
        kind, counts = "native", _count(config)
    else:
        found = open_foreign(path)
        config, metadata, kind = found.config, found.metadata, found.layout
        dtypes = {name: tensor.dtype.name for name, tensor in found.tensors.items()}
        counts = _count(config, found.layout, dtypes)
    lines = [f"checkpoint  {path}", f"layout      {_KINDS[kind]}", *_of_model(config, metadata)]
    return "\n".join([*lines, "", *_of_parameters(counts), "", *_of_memory(config, counts)])


def _count(
    config: RWKV7Config, layout: Layout = "pth", dtypes: dict[str, str] | None = None
) -> _Counts:
    """Counts the tensors that are in `dtypes`; None stands for all, in the dtype of `config`."""
    counts: _Counts = Counter()
    sizes = axis_sizes(config)
    for entry in key_map(layout):
        for name in entry.names(config.num_layers):
            if dtypes is None or name in dtypes:
                dtype = config.param_dtype if dtypes is None else dtypes[name]
                counts[_group(entry.parameter), dtype] += math.prod(entry.shape(sizes))
    return counts


def _group(parameter: str) -> str:
    name = parameter.removeprefix("blocks.").split(".")[0]
    return "norms" if name.endswith("norm") else name.replace("_", " ")


def _of_model(config: RWKV7Config, metadata: CheckpointMetadata) -> list[str]:
    return [
        f"model       {config.num_layers} layers, width {config.hidden_size}, "
        f"{config.num_heads} heads of {config.head_size}, channel mix {config.intermediate_size}",
        f"low ranks   decay {config.decay_rank}, alpha {config.alpha_rank}, "
        f"value {config.value_rank}, gate {config.gate_rank}",
        f"vocabulary  {config.vocab_size} ids, tokenizer: {metadata.tokenizer or 'unknown'}",
        f"trained     {f'{metadata.step} steps' if metadata.step else 'unknown'}",
    ]


def _of_parameters(counts: _Counts) -> list[str]:
    lines = [f"{'parameters':14}{'dtype':>10}{'number':>18}{'size':>12}"]
    for (group, dtype), number in counts.items():
        size = format_bytes(number * jnp.dtype(dtype).itemsize)
        lines.append(f"  {group:12}{dtype:>10}{number:>18,}{size:>12}")
    total = sum(number * jnp.dtype(dtype).itemsize for (_, dtype), number in counts.items())
    lines.append(f"  {'all':12}{'':>10}{counts.total():>18,}{format_bytes(total):>12}")
    return lines


def _of_memory(config: RWKV7Config, counts: _Counts) -> list[str]:
    lines = [f"{'memory to run':14}{'parameters':>18}{'state per text':>18}"]
    for dtype in _RUN_DTYPES:
        parameters = format_bytes(counts.total() * jnp.dtype(dtype).itemsize)
        lines.append(f"  {dtype:12}{parameters:>18}{format_bytes(_state_size(config, dtype)):>18}")
    return [*lines, "  (and what is computed in between: little when decoding)"]


def _state_size(config: RWKV7Config, dtype: str) -> int:
    wkv_size = jnp.promote_types(dtype, jnp.float32).itemsize
    shifts = 2 * config.hidden_size * jnp.dtype(dtype).itemsize
    return config.num_layers * (shifts + config.hidden_size * config.head_size * wkv_size)


__all__ = ["format_bytes", "inspect"]
