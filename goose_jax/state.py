"""What a model remembers of the tokens it has read: a plain pytree of constant size."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from goose_jax.config import RWKV7Config
from pallas_kernels.validation import check_float, check_positive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RWKV7State:
    """The recurrent state of all layers; layers come first, rows of the batch second.

    Attributes:
      time_shift: `[layers, B, C]`, in the compute dtype: the last token's input to each time mix.
      wkv: `[layers, B, H, K, V]`, float32: what each head has learnt from the tokens so far; rows
        are key channels. (The official code stores the transpose, `[V, K]`.)
      channel_shift: `[layers, B, C]`, in the compute dtype: the last token's input to each channel
        mix.
    """

    time_shift: Float[Array, "layers B C"]
    wkv: Float[Array, "layers B H K V"]
    channel_shift: Float[Array, "layers B C"]


def state_dtypes(config: RWKV7Config) -> tuple[np.dtype, np.dtype]:
    """The dtypes of the shifts and of the wkv states."""
    compute_dtype = jnp.dtype(config.compute_dtype)
    return compute_dtype, jnp.promote_types(compute_dtype, jnp.float32)


def init_state(config: RWKV7Config, batch_size: int) -> RWKV7State:
    """The state before the first token: zeros.

    Args:
      config: of the model.
      batch_size: B, number of rows.
    """
    check_positive("batch_size", batch_size)
    shift_dtype, wkv_dtype = state_dtypes(config)
    shift_shape = (config.num_layers, batch_size, config.hidden_size)
    heads_shape = (config.num_heads, config.head_size, config.head_size)
    return RWKV7State(
        time_shift=jnp.zeros(shift_shape, shift_dtype),
        wkv=jnp.zeros((config.num_layers, batch_size, *heads_shape), wkv_dtype),
        channel_shift=jnp.zeros(shift_shape, shift_dtype),
    )


def check_state(state: Any, config: RWKV7Config, batch_size: int) -> None:
    """Checks that a state fits a model and a batch.

    Raises:
      TypeError: if it is no `RWKV7State`, or a field has another dtype than `init_state` gives.
      ValueError: if a field has another shape.
    """
    if not isinstance(state, RWKV7State):
        raise TypeError(f"state must be None or an RWKV7State, got {type(state).__name__}")
    shift_dtype, wkv_dtype = state_dtypes(config)
    sizes = {
        "layers": config.num_layers,
        "B": batch_size,
        "C": config.hidden_size,
        "H": config.num_heads,
        "K": config.head_size,
        "V": config.head_size,
    }
    check_array("state.time_shift", state.time_shift, "layers B C", sizes, shift_dtype)
    check_array("state.wkv", state.wkv, "layers B H K V", sizes, wkv_dtype)
    check_array("state.channel_shift", state.channel_shift, "layers B C", sizes, shift_dtype)


def check_array(name: str, value: Any, axes: str, sizes: dict[str, int], dtype: np.dtype) -> None:
    """Checks an array's axes (see `check_float`) and its exact dtype."""
    check_float(name, value, axes, sizes)
    if value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype.name}, got {value.dtype.name}")
