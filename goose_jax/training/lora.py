"""LoRA: low-rank adapters of the projection matrices ("LoRA", arXiv:2106.09685).

An adapter replaces a matrix `W` (`[in, out]`, as in `x @ W`) by `W + alpha / rank * down @ up`,
where `down` (`[in, rank]`, A in the paper) starts at random values, and `up` (`[rank, out]`, B in
the paper) at zero. The sum is formed before the model runs, so training sees the matrices that
`merge_lora` writes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from goose_jax.checkpoints.conversion import check_range
from goose_jax.config import dtype_name
from goose_jax.data import Batch
from goose_jax.nn import RWKV7, abstract_model
from goose_jax.training.loss import L2WRAP, sum_of_losses
from goose_jax.training.step import Loss, Parameters
from pallas_kernels.types import Scalar
from pallas_kernels.validation import check_positive

LORA_WEIGHTS = {
    "time_mix": ("receptance", "key", "value", "output"),
    "channel_mix": ("key", "value"),
}
"""The matrices of each block that get an adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The size and the weight of adapters.

    Attributes:
      rank: rank of the product that is added to each matrix.
      alpha: the product is scaled by `alpha / rank`.

    Raises:
      ValueError: if a number is out of range; the message names it.
    """

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        check_positive("rank", self.rank)
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a number > 0, got {self.alpha!r}")


def init_lora(params: Parameters, config: LoraConfig, key: Key[Array, ""]) -> Parameters:
    """Makes new adapters, which do not change the model yet.

    Entries of `down` are uniform between `-1 / sqrt(in)` and `1 / sqrt(in)`, as in PEFT.

    Args:
      params: parameters of the model, as `nnx.to_pure_dict` makes them; only shapes are used.
      config: size of the adapters.
      key: random key for `down`.

    Returns:
      A dict by module and name of the matrix, as in `LORA_WEIGHTS`, that holds
      `{"down": [layers, in, rank], "up": [layers, rank, out]}` in float32.
    """
    names = [(module, name) for module, names in LORA_WEIGHTS.items() for name in names]
    lora: Parameters = {module: {} for module in LORA_WEIGHTS}
    keys = jax.random.split(key, len(names))
    for (module, name), down_key in zip(names, keys, strict=True):
        layers, rows, columns = params["blocks"][module][name].shape
        bound = 1 / math.sqrt(rows)
        shape = (layers, rows, config.rank)
        lora[module][name] = {
            "down": jax.random.uniform(down_key, shape, jnp.float32, -bound, bound),
            "up": jnp.zeros((layers, config.rank, columns), jnp.float32),
        }
    return lora


def apply_lora(
    params: Parameters, lora: Parameters, config: LoraConfig, dtype: Any = None
) -> Parameters:
    """Adds adapters to the parameters of a model. This is a pure function of both.

    Args:
      params: parameters of the model.
      lora: adapters, as `init_lora` makes them.
      config: configuration of the adapters.
      dtype: dtype of the changed matrices, which are summed in float32 at least and then rounded;
        None keeps the dtype of each matrix.

    Returns:
      A tree like `params`. Parameters without an adapter are shared with it.
    """
    blocks = dict(params["blocks"])
    for module, adapters in lora.items():
        changed = {
            name: _adapted(blocks[module][name], pair, config, dtype)
            for name, pair in adapters.items()
        }
        blocks[module] = blocks[module] | changed
    return params | {"blocks": blocks}


def lora_loss(model: RWKV7, config: LoraConfig, *, l2wrap: float = L2WRAP) -> Loss:
    """Returns the loss for training adapters while all parameters of the model are frozen.

    The changed matrices are formed in the compute dtype, to which the model would round them
    anyway. During a step, they and their gradients need the memory of two sets of these matrices in
    that dtype.

    Args:
      model: gives the structure; its parameters are not used.
      config: configuration of the adapters.
      l2wrap: factor of the pull on large logits, as for `sum_of_losses`.

    Returns:
      `loss(lora, params, batch)`, which returns `sum_of_losses`.
    """
    graphdef, dtype = nnx.graphdef(model), model.config.compute_dtype

    def loss(lora: Parameters, frozen: Parameters, batch: Batch) -> Scalar:
        params = apply_lora(frozen, lora, config, dtype)
        return sum_of_losses(nnx.merge(graphdef, params), batch, l2wrap=l2wrap)

    return loss


def merge_lora(
    model: RWKV7, lora: Parameters, config: LoraConfig, *, dtype: DTypeLike | None = None
) -> RWKV7:
    """Returns a model whose matrices include the adapters; `model` does not change.

    Args:
      model: the model that the adapters were trained beside.
      lora: the adapters.
      config: configuration of the adapters.
      dtype: dtype of all parameters of the result; None keeps the model's. A small change may be
        rounded away in a dtype with fewer bits than the adapters were trained with.

    Raises:
      CheckpointError: if a value is beyond the range of float16.
      ValueError: if `dtype` is unknown.
    """
    param_dtype = model.config.param_dtype if dtype is None else dtype_name("dtype", dtype)
    merged = dataclasses.replace(model.config, param_dtype=param_dtype)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    exact = jnp.promote_types(merged.param_dtype, jnp.float32)

    def rounded(path: Any, array: jax.Array) -> jax.Array:
        result = array.astype(merged.param_dtype)
        check_range(jax.tree_util.keystr(path, simple=True, separator="."), result, array.dtype)
        return result

    params = jax.tree.map_with_path(rounded, apply_lora(params, lora, config, exact))
    graphdef = nnx.graphdef(abstract_model(merged))
    return nnx.merge(graphdef, params)


def _adapted(weight: jax.Array, pair: Parameters, config: LoraConfig, dtype: Any) -> jax.Array:
    # In full float32 on every machine: the rank is small, so this costs little.
    product = jnp.matmul(pair["down"], pair["up"], precision="highest")
    exact = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    return (exact + config.alpha / config.rank * product).astype(dtype or weight.dtype)


__all__ = [
    "LORA_WEIGHTS",
    "LoraConfig",
    "apply_lora",
    "init_lora",
    "lora_loss",
    "merge_lora",
]
