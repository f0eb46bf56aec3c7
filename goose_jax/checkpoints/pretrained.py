"""Loads a model from a checkpoint of any layout, and saves a model in any layout."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from flax import nnx
from jax.typing import DTypeLike

from goose_jax.checkpoints import fla_folder
from goose_jax.checkpoints.config_inference import infer_config
from goose_jax.checkpoints.conversion import build_model, check_range, split_model
from goose_jax.checkpoints.directory import CHECKSUMS
from goose_jax.checkpoints.errors import CheckpointError
from goose_jax.checkpoints.key_map import Layout
from goose_jax.checkpoints.native import (
    CheckpointMetadata,
    load_checkpoint,
    save_checkpoint,
)
from goose_jax.checkpoints.pth import read_pth
from goose_jax.checkpoints.pth_writer import write_pth
from goose_jax.checkpoints.stored_tensor import StoredTensor, common_dtype
from goose_jax.config import (
    WORLD_VOCAB_SIZE,
    RWKV7Config,
    default_compute_dtype,
    dtype_name,
)
from goose_jax.nn import RWKV7, abstract_model

type CheckpointKind = Literal["pth", "huggingface", "native"]

_OFFICIAL_EPS = {"norm_eps": 1e-5, "head_norm_eps": 64e-5}  # constants in the official code
_CHANGEABLE = ("compute_dtype", "head_norm_eps", "implementation", "norm_eps", "remat")
_MAX_SHARD_BYTES = 2 << 30


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of the official code or of FLA, of which no values have been read.

    Attributes:
      tensors: tensors by name. Their `read` reads the file.
      layout: layout of the file, which determines the names.
      config: configuration of the model. Its `param_dtype` is the dtype of the tensors, if they all
        have the same.
      metadata: metadata; `tokenizer` is None if it is unknown.
    """

    tensors: dict[str, StoredTensor]
    layout: Layout
    config: RWKV7Config
    metadata: CheckpointMetadata


def load_pretrained(
    path: Path | str, *, dtype: DTypeLike | None = None, **overrides: Any
) -> tuple[RWKV7, CheckpointMetadata]:
    """Loads a model from an official `.pth` file, a folder of FLA's, or a checkpoint of goose-jax.

    The sizes of the model are inferred from the weights. Loading needs memory for the parameters
    only; if the device is not the CPU, one parameter at a time is on the host. (Loading a
    checkpoint of goose-jax needs the memory of Orbax in addition.)

    Args:
      path: a `.pth` file; a folder with `config.json` and safetensors; or the directory of a
        checkpoint of goose-jax or of a training run.
      dtype: dtype that parameters are rounded to, and that the model computes in: what JAX takes
        for a dtype, such as `jnp.bfloat16` or "bfloat16". None keeps the dtype of the parameters;
        the model then computes in the dtype that a checkpoint of goose-jax records, and, for other
        checkpoints, in `default_compute_dtype()`: float32 on CPUs, else bfloat16.
      **overrides: values for `compute_dtype`, `remat`, `implementation`, `norm_eps` or
        `head_norm_eps` of `RWKV7Config`. `compute_dtype` goes before the rule above.

    Returns:
      model: the model, on JAX's default device.
      metadata: the metadata. If the checkpoint names no tokenizer, `tokenizer` is "world" for a
        vocabulary of 65536, else None.

    Raises:
      FileNotFoundError: if `path` does not exist.
      CheckpointError: if it is not a checkpoint of RWKV-7, is damaged, or is refused because it may
        be malicious; if tensors are missing, unknown or of wrong shapes (the message lists them);
        if a file holds several dtypes and `dtype` is None; or if values are out of the range of
        float16.
      ValueError: if an argument is out of range.

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
        model, metadata = load_checkpoint(path, **overrides)
        return (model if dtype is None else _cast(model, dtype)), metadata
    found = open_foreign(path, **overrides)
    dtype = dtype or common_dtype(found.tensors, str(path))
    config = dataclasses.replace(found.config, param_dtype=dtype)
    return build_model(found.tensors, found.layout, config), found.metadata


def save_pretrained(
    model: RWKV7,
    path: Path | str,
    layout: CheckpointKind,
    metadata: CheckpointMetadata | None = None,
    *,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Saves a model for the official code, for FLA, or as a checkpoint of goose-jax.

    Parameters keep their dtype and all bits. (The model does not use the value residual of the
    first layer. FLA's layout has no tensors for it, and a `.pth` file holds it only if it is not
    zero.)

    Args:
      model: the model.
      path: the file ("pth") or directory (other layouts) to create.
      layout: "pth" for the official code, "huggingface" for FLA, or "native" for goose-jax.
      metadata: metadata of the model, which a `.pth` file cannot hold. None records the tokenizer
        "world" for a vocabulary of 65536, and no tokenizer for others.
      max_shard_bytes: maximum size of each file of tensors in the layout "huggingface". Only a
        single larger tensor makes a larger file.

    Raises:
      FileExistsError: if `path` exists. Nothing is ever overwritten.
      OSError: if writing fails, for example on a full disk. Incomplete files are removed.
      ValueError: if an argument is out of range, or the layout cannot hold an epsilon of the
        model's configuration.
    """
    path = Path(path)
    metadata = metadata or _metadata(model.config)
    if path.exists():
        raise FileExistsError(f"{path} exists; a checkpoint is not written over anything")
    if max_shard_bytes < 1:
        raise ValueError(f"{max_shard_bytes=} must be at least 1")
    config = model.config
    match layout:
        case "native":
            save_checkpoint(path, model, metadata)
        case "pth":
            _check_epsilons(config, _OFFICIAL_EPS, "the official code")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_pth(path, split_model(model, "pth"))
        case "huggingface":
            expected = {"head_norm_eps": config.head_size * config.norm_eps}
            _check_epsilons(config, expected, f"FLA with {config.norm_eps=}")
            fla_folder.write_folder(path, model, metadata, max_shard_bytes=max_shard_bytes)
        case _:
            raise ValueError(f"{layout=} must be 'pth', 'huggingface' or 'native'")


def checkpoint_kind(path: Path) -> CheckpointKind:
    """Returns the layout of the checkpoint at `path`, judged by the files that exist.

    Raises:
      FileNotFoundError: if `path` does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.is_file():
        return "pth"
    is_ours = (path / CHECKSUMS).is_file() or (path / "checkpoints").is_dir()
    return "huggingface" if (path / fla_folder.CONFIG).is_file() and not is_ours else "native"


def open_foreign(path: Path, **overrides: Any) -> ForeignCheckpoint:
    """Reads the names, shapes and dtypes of the tensors in a `.pth` file or a folder of FLA's.

    Args:
      path: the file or folder.
      **overrides: values for fields of `RWKV7Config` that `load_pretrained` accepts.

    Raises:
      CheckpointError: if it is not a checkpoint of RWKV-7, is damaged, or is refused because it may
        be malicious.
    """
    if path.is_file():
        found = read_pth(path)
        if isinstance(found, list):
            raise CheckpointError(f"{path} holds a list of tensors, as a state does, and no model")
        config = infer_config(found, "pth", str(path), **(_OFFICIAL_EPS | overrides))
        return ForeignCheckpoint(found, "pth", _with_dtype(config, found), _metadata(config))
    settings = fla_folder.read_settings(path)
    tensors, layout = fla_folder.read_tensors(path)
    config = infer_config(
        tensors,
        layout,
        str(path),
        default_value_rank=settings.get("v_low_rank_dim"),
        **({"norm_eps": settings.get("norm_eps", 1e-5)} | overrides),
    )
    fla_folder.check_sizes(path, settings, config)
    if "head_norm_eps" not in overrides:
        config = dataclasses.replace(config, head_norm_eps=config.head_size * config.norm_eps)
    metadata = fla_folder.read_metadata(path, settings)
    if metadata is None:
        # With a tokenizer file, the size of the vocabulary says nothing about the tokenizer.
        has_tokenizer = (path / "tokenizer.json").exists()
        metadata = CheckpointMetadata(tokenizer=None) if has_tokenizer else _metadata(config)
    return ForeignCheckpoint(tensors, layout, _with_dtype(config, tensors), metadata)


def _metadata(config: RWKV7Config) -> CheckpointMetadata:
    # Only the World models have this size of vocabulary.
    is_world = config.vocab_size == WORLD_VOCAB_SIZE
    return CheckpointMetadata(tokenizer="world" if is_world else None)


def _with_dtype(config: RWKV7Config, tensors: dict[str, StoredTensor]) -> RWKV7Config:
    dtypes = {tensor.dtype.name for tensor in tensors.values()}
    only = dtypes.pop() if len(dtypes) == 1 else config.param_dtype
    return dataclasses.replace(config, param_dtype=only)


def _check_epsilons(config: RWKV7Config, expected: dict[str, float], where: str) -> None:
    for name, value in expected.items():
        if not math.isclose(getattr(config, name), value, rel_tol=1e-6):
            raise ValueError(
                f"the layout has no place for {name}={getattr(config, name)}: {where} computes "
                f"with {value}"
            )


def _cast(model: RWKV7, dtype: str) -> RWKV7:
    config = dataclasses.replace(model.config, param_dtype=dtype)
    graphdef, _ = nnx.split(abstract_model(config))
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for path, param in params.items():
        rounded = param[...].astype(dtype)
        check_range(".".join(map(str, path)), rounded, param[...].dtype)
        params[path] = rounded
    return nnx.merge(graphdef, nnx.to_pure_dict(nnx.from_flat_state(params)))
