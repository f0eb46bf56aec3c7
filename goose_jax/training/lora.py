"""LoRA: low-rank adapters of the projection matrices ("LoRA", arXiv:2106.09685).

An adapter replaces a matrix `W` (`[in, out]`, as in `x @ W`) by `W + alpha / rank * down @ up`,
where `down` (`[in, rank]`, the paper's A) starts at random and `up` (`[rank, out]`, its B) at zero.
The matrices are made before the model runs, from parameters and adapters, so that what is trained
is what `merge_lora` writes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from goose_jax.checkpoints.conversion import check_range
from goose_jax.data import Batch
from goose_jax.nn import RWKV7
from goose_jax.training.loss import L2WRAP, token_losses
from goose_jax.training.step import Losses, Parameters
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
      rank: of the products that are added.
      alpha: the products are scaled by `alpha / rank`.

    Raises:
      ValueError: at construction, naming the number that is out of range.
    """

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        check_positive("rank", self.rank)
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a number > 0, got {self.alpha!r}")


def init_lora(params: Parameters, config: LoraConfig, key: Key[Array, ""]) -> Parameters:
    """New adapters, which do not change the model yet.

    Entries of `down` are uniform in `+-1 / sqrt(in)`, as in the PEFT library.

    Args:
      params: of the model; only shapes count.
      config: of the adapters.
      key: for `down`.

    Returns:
      By names as in `LORA_WEIGHTS`: `{"down": [layers, in, rank], "up": [layers, rank, out]}`, in
      float32.
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
    """The parameters of the model with adapters: a pure function of both.

    Args:
      params: of the model.
      lora: as `init_lora` makes it.
      config: of the adapters.
      dtype: that the changed matrices are rounded to, after a sum in float32 at least; None takes
        their own.
    """
    blocks = dict(params["blocks"])
    for module, adapters in lora.items():
        changed = {
            name: _adapted(blocks[module][name], pair, config, dtype)
            for name, pair in adapters.items()
        }
        blocks[module] = blocks[module] | changed
    return params | {"blocks": blocks}


def lora_losses(model: RWKV7, config: LoraConfig, *, l2wrap: float = L2WRAP) -> Losses:
    """The losses of a model with adapters: those are trained, all its parameters are frozen.

    The changed matrices are formed in the model's compute dtype, to which the model would round
    them anyway; so they and their gradient each take as much memory as the model's own do in it.

    Args:
      model: gives the structure; its parameters are not used.
      config: of the adapters.
      l2wrap: see `token_losses`.
    """
    graphdef, dtype = nnx.graphdef(model), model.config.compute_dtype

    def losses(lora: Parameters, frozen: Parameters | None, batch: Batch) -> Float[Array, "B T"]:
        assert frozen is not None
        params = apply_lora(frozen, lora, config, dtype)
        return token_losses(nnx.merge(graphdef, params), batch, l2wrap=l2wrap)

    return losses


def merge_lora(
    model: RWKV7, lora: Parameters, config: LoraConfig, *, dtype: str | None = None
) -> RWKV7:
    """The model with its adapters made part of its matrices; `model` is left as it is.

    Args:
      model: that the adapters were trained on.
      lora: the adapters.
      config: of the adapters.
      dtype: name of the dtype of all parameters of the result; None keeps the model's. In fewer
        bits than the adapters were trained with, a small change may be rounded away.

    Raises:
      CheckpointError: if values are beyond the range of float16.
      ValueError: if `dtype` is unknown.
    """
    merged = dataclasses.replace(model.config, param_dtype=dtype or model.config.param_dtype)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    exact = jnp.promote_types(merged.param_dtype, jnp.float32)

    def rounded(path: Any, array: jax.Array) -> jax.Array:
        result = array.astype(merged.param_dtype)
        check_range(jax.tree_util.keystr(path, simple=True, separator="."), result, array.dtype)
        return result

    params = jax.tree.map_with_path(rounded, apply_lora(params, lora, config, exact))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: RWKV7(merged, rngs=nnx.Rngs(0))))
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
    "lora_losses",
    "merge_lora",
]
