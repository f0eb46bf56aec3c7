"""`goose-jax inspect`: prints what a checkpoint holds, without loading it."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import tyro

from goose_jax.checkpoints import CheckpointContents, read_contents
from goose_jax.cli.sizes import format_bytes
from goose_jax.config import RWKV7Config
from goose_jax.state import init_state

_CONTAINERS = {
    "pth": ".pth file",
    "safetensors": "safetensors",
    "folder": "folder",
}
_RUN_DTYPES = ("float32", "bfloat16", "float16")


def inspect(checkpoint: Annotated[Path, tyro.conf.Positional]) -> None:
    """Says what a checkpoint holds and what memory it takes to run, without loading it.

    In use:
      goose-jax inspect rwkv7.pth
      goose-jax inspect runs/stdlib-1

    Args:
      checkpoint: A .pth or safetensors file, a folder of Hugging Face, a checkpoint of goose-jax,
        or the folder of a training run (then its newest intact one).

    Raises:
      ValueError: if it is not a checkpoint, or is damaged as far as that can be seen without
        reading the parameters.
      OSError: if it does not exist or cannot be read.
    """
    contents = read_contents(checkpoint)
    lines = [
        f"checkpoint  {contents.path}",
        f"layout      {_layout(contents)}",
        *_model_lines(contents),
        *(["state       a trained initial state, with which texts begin"] * contents.has_state),
        "",
        *_parameter_lines(contents),
        "",
        *_memory_lines(contents),
    ]
    print("\n".join(lines))


def _layout(contents: CheckpointContents) -> str:
    if contents.layout is None:
        return "checkpoint of goose-jax (native)"
    container = _CONTAINERS[contents.container]
    folded = "" if contents.config.embedding_norm else ", norm folded into the embedding"
    return f"{contents.layout.description} ({contents.layout.name}), {container}{folded}"


def _model_lines(contents: CheckpointContents) -> list[str]:
    config, metadata = contents.config, contents.metadata
    return [
        f"model       {config.num_layers} layers, width {config.hidden_size}, "
        f"{config.num_heads} heads of {config.head_size}, channel mix {config.intermediate_size}",
        f"low ranks   decay {config.decay_rank}, alpha {config.alpha_rank}, "
        f"value {config.value_rank}, gate {config.gate_rank}",
        f"vocabulary  {config.vocab_size} ids, tokenizer: {metadata.tokenizer or 'unknown'}",
        f"trained     {f'{metadata.step} steps' if metadata.step else 'unknown'}",
    ]


def _parameter_lines(contents: CheckpointContents) -> list[str]:
    lines = [f"{'parameters':14}{'dtype':>10}{'number':>18}{'size':>12}"]
    for (group, dtype), number in contents.parameters.items():
        size = format_bytes(number * jnp.dtype(dtype).itemsize)
        lines.append(f"  {group:12}{dtype:>10}{number:>18,}{size:>12}")
    total, size = contents.parameters.total(), format_bytes(contents.num_bytes)
    lines.append(f"  {'all':12}{'':>10}{total:>18,}{size:>12}")
    return lines


def _memory_lines(contents: CheckpointContents) -> list[str]:
    lines = [f"{'memory to run':14}{'parameters':>18}{'state per text':>18}"]
    for dtype in _RUN_DTYPES:
        parameters = format_bytes(contents.parameters.total() * jnp.dtype(dtype).itemsize)
        state = format_bytes(_state_size(contents.config, dtype))
        lines.append(f"  {dtype:12}{parameters:>18}{state:>18}")
    return [*lines, "  (and what is computed in between: little when decoding)"]


def _state_size(config: RWKV7Config, dtype: str) -> int:
    config = dataclasses.replace(config, compute_dtype=dtype)
    state = jax.eval_shape(lambda: init_state(config, 1))
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(state))


__all__ = ["inspect"]
