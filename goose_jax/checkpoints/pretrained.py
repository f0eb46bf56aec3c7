"""Loads a model from a checkpoint of any layout, and saves a model in any layout."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from goose_jax.checkpoints.config_inference import ProblemsError, infer_config
from goose_jax.checkpoints.containers import (
    Container,
    belongs_to_folder,
    checkpoint_kind,
    container_to_write,
    open_tensors,
    write_tensors,
)
from goose_jax.checkpoints.conversion import build_model, check_range, split_model
from goose_jax.checkpoints.errors import CheckpointError, list_names
from goose_jax.checkpoints.folder_settings import (
    FOLDED,
    check_epsilons,
    check_sizes,
    default_value_rank,
    make_settings,
    read_epsilons,
    read_metadata,
    read_settings,
)
from goose_jax.checkpoints.layouts import LAYOUTS, OFFICIAL, Layout
from goose_jax.checkpoints.native import CheckpointMetadata, load_checkpoint, save_checkpoint
from goose_jax.checkpoints.recognition import Recognised, no_model, recognise
from goose_jax.checkpoints.stored_tensor import StoredTensor, common_dtype
from goose_jax.checkpoints.tokenizer_copy import embed_tokenizer
from goose_jax.config import (
    WORLD_VOCAB_SIZE,
    RWKV7Config,
    default_compute_dtype,
    dtype_name,
)
from goose_jax.nn import RWKV7, abstract_model
from goose_jax.parallel import check_mesh

_CHANGEABLE = (
    "compute_dtype",
    "head_norm_eps",
    "implementation",
    "norm_eps",
    "precision",
    "remat",
    "unroll_layers",
)
_MAX_SHARD_BYTES = 2 << 30
WRITTEN_LAYOUTS = ("pth", *LAYOUTS, "native")
"""What `save_pretrained` takes as a layout."""


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another program, of which no values have been read.

    Attributes:
      tensors: the model's tensors by name. Their `read` reads the file.
      states: the tensors of a trained initial state, by name; empty if the file has none.
      layout: layout of the file, which determines the names.
      container: the kind of file that holds the tensors.
      config: configuration of the model. Its `param_dtype` is the dtype of the tensors, if they all
        have the same and JAX has it enabled.
      metadata: metadata; `tokenizer` is None if it is unknown.
    """

    tensors: dict[str, StoredTensor]
    states: dict[str, StoredTensor]
    layout: Layout
    container: Container
    config: RWKV7Config
    metadata: CheckpointMetadata

    def read_states(self) -> list[np.ndarray] | None:
        """Reads the trained initial state, if there is one.

        Returns:
          `[H, V, K]` for each layer, in the dtype of the file; None if the file has no state.
        """
        if not self.states:
            return None
        assert self.layout.state is not None
        names = [self.layout.state.format(i=i) for i in range(self.config.num_layers)]
        shape = (self.config.num_heads, self.config.head_size, self.config.head_size)
        values = [self.states[name].read().reshape(shape) for name in names]
        if self.layout.state_axes == "K V":
            return [np.swapaxes(value, -1, -2) for value in values]
        return values


def load_pretrained(
    path: Path | str,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    **overrides: Any,
) -> tuple[RWKV7, CheckpointMetadata]:
    """Loads a model from a file or folder in any known layout, or a checkpoint of goose-jax.

    A trained initial state beside the weights is no part of the model: `load_state` takes it from
    the same path, and the model reads it as `state`.

    The sizes of the model are inferred from the weights. Loading needs memory for the parameters
    only; if the device is not the CPU, one parameter at a time is on the host. (Loading a
    checkpoint of goose-jax needs the memory of Orbax in addition.)

    Args:
      path: a `.pth` or safetensors file; a folder with such a file, or with shards and their index;
        or the directory of a checkpoint of goose-jax or of a training run. The layout of the names
        is found from the names (see `goose_jax.checkpoints.layouts`).
      dtype: dtype that parameters are rounded to, and that the model computes in: what JAX takes
        for a dtype, such as `jnp.bfloat16` or "bfloat16". None keeps the dtype of the parameters;
        the model then computes in the dtype that a checkpoint of goose-jax records, and, for other
        checkpoints, in `default_compute_dtype()`: float32 on CPUs, else bfloat16.
      mesh: the mesh to divide the parameters over (see `goose_jax.parallel`); None loads to JAX's
        default device. A device only receives its part. Of a checkpoint of goose-jax, each process
        reads the parts of its devices; other files it reads as a whole, one parameter at a time.
      **overrides: values for `compute_dtype`, `remat`, `unroll_layers`, `implementation`,
        `precision`, `norm_eps` or `head_norm_eps` of `RWKV7Config`. `compute_dtype` goes before the
        rule above.

    Returns:
      model: the model.
      metadata: the metadata. If the checkpoint names no tokenizer, `tokenizer` is "world" for a
        vocabulary of 65536, else None.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if it is not a checkpoint of RWKV-7, is damaged, or is refused because it may
        be malicious; if tensors are missing, unknown or of wrong shapes (the message names a few);
        if a file holds several dtypes and `dtype` is None; or if values are out of the range of
        float16.
      ValueError: if an argument is out of range, or the mesh does not divide the model.

    Example:
      >>> model, metadata = load_pretrained("RWKV-x070-World-0.4B.pth", dtype="bfloat16")
      >>> model.config.num_layers, metadata.tokenizer
      (24, 'world')
    """
    path = Path(path)
    if fixed := sorted(set(overrides) - set(_CHANGEABLE)):
        hint = "; dtype= sets the dtype of parameters" if "param_dtype" in fixed else ""
        names = f"{', '.join(fixed)} cannot be overridden, only {', '.join(_CHANGEABLE)}"
        raise ValueError(names + hint)
    dtype = None if dtype is None else dtype_name("dtype", dtype)
    is_native = checkpoint_kind(path) == "native"
    compute_dtype = default_compute_dtype() if dtype is None and not is_native else dtype
    if compute_dtype is not None:
        overrides = {"compute_dtype": compute_dtype} | overrides
    if is_native:
        model, metadata = load_checkpoint(path, mesh=mesh, **overrides)
        return (model if dtype is None else _cast(model, dtype)), metadata
    found = open_foreign(path, **overrides)
    dtype = dtype or _dtype_of(found.tensors, path)
    config = dataclasses.replace(found.config, param_dtype=dtype)
    if mesh is not None:
        check_mesh(mesh, config)
    return build_model(found.tensors, found.layout, config, mesh), found.metadata


def save_pretrained(
    model: RWKV7,
    path: Path | str,
    layout: str,
    metadata: CheckpointMetadata | None = None,
    *,
    time_states: Sequence[np.ndarray] | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Saves a model for another program, or as a checkpoint of goose-jax.

    Parameters keep their dtype and all bits. (The model does not use the value residual of the
    first layer. Some layouts have no tensors for it, and others hold it only if it is not zero.)

    Args:
      model: the model.
      path: the file or folder to create. With an end of `.pth`, `.pt` or `.bin` it is a file of
        torch, with `.safetensors` or `.st` a file of safetensors, else a folder with safetensors
        and a `config.json`.
      layout: "official" for the names of the official code, "huggingface" for FLA, "transformers",
        another name of `goose_jax.checkpoints.layouts`, or "native" for goose-jax. "pth" is the
        official file: official names in a file of torch, whatever the end of `path`.
      metadata: metadata of the model, which only a folder can hold, with a copy of the tokenizer's
        file. None records the tokenizer "world" for a vocabulary of 65536, and no tokenizer for
        others.
      time_states: a trained initial state to write beside the weights, `[H, V, K]` for each layer.
        Only "pth", "official" and "web-rwkv" have a place for it.
      max_shard_bytes: maximum size of each file of safetensors in a folder. Only a single larger
        tensor makes a larger file.

    Raises:
      FileExistsError: if `path` exists. Nothing is ever overwritten.
      OSError: if writing fails, for example on a full disk. Incomplete files are removed.
      ValueError: if an argument is out of range, or the layout cannot hold an epsilon of the
        model's configuration or an initial state.
    """
    path = Path(path)
    metadata = metadata or _metadata(model.config)
    if layout not in WRITTEN_LAYOUTS:
        raise ValueError(f"{layout=} must be one of {', '.join(WRITTEN_LAYOUTS)}")
    if path.exists():
        raise FileExistsError(f"{path} exists; a checkpoint is not written over anything")
    if max_shard_bytes < 1:
        raise ValueError(f"{max_shard_bytes=} must be at least 1")
    names = OFFICIAL if layout == "pth" else LAYOUTS.get(layout)
    if time_states is not None:
        _check_states(time_states, model.config)
        if names is None or names.state is None:
            raise ValueError(f"{layout=} has no place for an initial state beside the weights")
    if names is None:
        save_checkpoint(path, model, metadata)
        return
    kind = container_to_write(path)
    if layout == "pth":
        if kind == "safetensors":
            raise ValueError(f"{layout=} is a file of torch, and {path.name} is one of safetensors")
        kind = "pth"
    has_place = names.folded or (names.settings == "transformers" and kind == "folder")
    if not (model.config.embedding_norm or has_place):
        raise ValueError(
            f"{layout=} has no place for a model whose embedding holds the norm after it; "
            "write native, rwkv7, or transformers as a folder"
        )
    tokenizer, files = embed_tokenizer(metadata.tokenizer)
    metadata = dataclasses.replace(metadata, tokenizer=tokenizer)
    settings = make_settings(model.config, metadata, names)
    if kind != "folder":
        read = read_epsilons(path, {}, names, model.config.head_size)
        check_epsilons(model.config, read, "the official code")
    tensors = itertools.chain(split_model(model, names), _split_states(names, time_states))
    write_tensors(path, kind, tensors, settings, files, max_shard_bytes=max_shard_bytes)


def open_foreign(path: Path, **overrides: Any) -> ForeignCheckpoint:
    """Reads the names, shapes and dtypes of the tensors in a checkpoint of another program.

    Args:
      path: the file or folder.
      **overrides: values for fields of `RWKV7Config` that `load_pretrained` accepts.

    Raises:
      CheckpointError: if it is not a checkpoint of RWKV-7, is damaged, or is refused because it may
        be malicious.
    """
    folder = path if path.is_dir() else path.parent
    settings = read_settings(folder) if belongs_to_folder(path) else {}
    tensors, container = open_tensors(path)
    if isinstance(tensors, list):
        raise CheckpointError(f"{path} holds a list of tensors, as a state does, and no model")
    found = recognise(tensors)
    found = _as_folded(path, found, settings)
    try:
        config = infer_config(
            found.weights,
            found.layout,
            states=found.states,
            default_value_rank=default_value_rank(settings),
        )
    except ProblemsError as error:
        raise no_model(str(path), found, error.problems) from None
    check_sizes(folder, settings, config)
    epsilons = read_epsilons(folder, settings, found.layout, config.head_size)
    config = dataclasses.replace(config, **(epsilons | overrides))
    metadata = read_metadata(folder, settings)
    if metadata is None:
        # With a tokenizer file, the size of the vocabulary says nothing about the tokenizer.
        has_tokenizer = belongs_to_folder(path) and (folder / "tokenizer.json").exists()
        metadata = CheckpointMetadata(tokenizer=None) if has_tokenizer else _metadata(config)
    return ForeignCheckpoint(
        found.weights,
        found.states,
        found.layout,
        container,
        _with_dtype(config, found.weights),
        metadata,
    )


def _check_states(time_states: Sequence[np.ndarray], config: RWKV7Config) -> None:
    expected = [(config.num_heads, config.head_size, config.head_size)] * config.num_layers
    if (shapes := [value.shape for value in time_states]) != expected:
        raise ValueError(
            f"time_states must have {config.num_layers} arrays [H, V, K] of shape {expected[0]}, "
            f"got {list_names(shapes)}"
        )


def _as_folded(path: Path, found: Recognised, settings: Mapping[str, Any]) -> Recognised:
    """Takes the norm after the embedding out of the layout if the file has it in the embedding."""
    told = settings.get(FOLDED)
    has_norm = any(name in found.weights for name in found.layout.embedding_norms)
    if told is True and has_norm:
        raise CheckpointError(
            f"{path}: {FOLDED} is true, but the file has {list_names(found.layout.embedding_norms)}"
        )
    if has_norm or not (found.layout.folded if told is None else told is True):
        return found
    return dataclasses.replace(found, layout=found.layout.without_embedding_norm())


def _split_states(
    layout: Layout, time_states: Sequence[np.ndarray] | None
) -> Iterator[tuple[str, np.ndarray]]:
    for i, value in enumerate(time_states or ()):
        assert layout.state is not None
        swapped = layout.state_axes == "K V"
        yield layout.state.format(i=i), np.swapaxes(value, -1, -2) if swapped else value


def _metadata(config: RWKV7Config) -> CheckpointMetadata:
    # Only the World models have this size of vocabulary.
    is_world = config.vocab_size == WORLD_VOCAB_SIZE
    return CheckpointMetadata(tokenizer="world" if is_world else None)


def _with_dtype(config: RWKV7Config, tensors: dict[str, StoredTensor]) -> RWKV7Config:
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
    only = dtypes.pop() if len(dtypes) == 1 else config.param_dtype
    if only == "float64" and not jax.config.read("jax_enable_x64"):
        return config
    return dataclasses.replace(config, param_dtype=only)


def _dtype_of(tensors: dict[str, StoredTensor], path: Path) -> str:
    dtype = common_dtype(tensors, str(path))
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise CheckpointError(
            f"{path} holds float64, which JAX has not enabled; round it by dtype='float32', or set "
            "jax_enable_x64"
        )
    return dtype


def _cast(model: RWKV7, dtype: str) -> RWKV7:
    config = dataclasses.replace(model.config, param_dtype=dtype)
    graphdef, _ = nnx.split(abstract_model(config))
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for path, param in params.items():
        rounded = param[...].astype(dtype)
        check_range(".".join(map(str, path)), rounded, param[...].dtype)
        params[path] = rounded
    return nnx.merge(graphdef, nnx.to_pure_dict(nnx.from_flat_state(params)))
