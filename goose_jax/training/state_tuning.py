"""State tuning: only the state that a text begins with is trained, one `[K, V]` for each head.

The tuned state does what a long prompt does, but the model does not have to read it. Token shifts
stay zero, as in the files of the official ecosystem (`save_state` with "time_state").
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from goose_jax.config import RWKV7Config
from goose_jax.data import Batch
from goose_jax.nn import RWKV7
from goose_jax.state import RWKV7State, init_state
from goose_jax.training.loss import L2WRAP, sum_of_losses
from goose_jax.training.step import Loss, Parameters
from pallas_kernels.types import Scalar


def init_wkv(config: RWKV7Config) -> Parameters:
    """Returns the parameters before the first step: `{"wkv": [layers, H, K, V]}`, float32 zeros."""
    return {"wkv": init_state(config, 1).wkv[:, 0].astype(jnp.float32)}


def wkv_of(state: RWKV7State) -> Parameters:
    """Returns the parameters with which state tuning continues from a given state.

    Args:
      state: a state of one row, such as `load_state` returns.

    Returns:
      `{"wkv": [layers, H, K, V]}`, float32.

    Raises:
      ValueError: if the state has several rows, or a token shift is not zero.
    """
    if state.wkv.shape[1] != 1:
        raise ValueError(f"state must have one row, got {state.wkv.shape=}")
    if jnp.any(state.time_shift != 0) or jnp.any(state.channel_shift != 0):
        raise ValueError("state has token shifts that are not zero: it is no initial state")
    return {"wkv": state.wkv[:, 0].astype(jnp.float32)}


def tuned_state(tuned: Parameters, config: RWKV7Config, batch_size: int = 1) -> RWKV7State:
    """Returns the state that texts begin with.

    Args:
      tuned: the tuned parameters, `{"wkv": [layers, H, K, V]}`.
      config: configuration of the model.
      batch_size: B, number of rows; all rows begin with the same state.
    """
    state = init_state(config, batch_size)
    wkv = tuned["wkv"][:, None]
    wkv = jnp.broadcast_to(wkv, (wkv.shape[0], batch_size, *wkv.shape[2:])).astype(state.wkv.dtype)
    return dataclasses.replace(state, wkv=wkv)


def state_loss(model: RWKV7, *, l2wrap: float = L2WRAP) -> Loss:
    """Returns the loss for training the initial state while all parameters of the model are frozen.

    Every row of a batch begins with the state. The loss raises `ValueError` for a batch with
    segment ids, because only the first segment of a row would begin with the state.

    Args:
      model: gives the structure; its parameters are not used.
      l2wrap: factor of the pull on large logits, as for `sum_of_losses`.

    Returns:
      `loss(tuned, params, batch)`, which returns `sum_of_losses`.
    """
    graphdef, config = nnx.graphdef(model), model.config

    def loss(tuned: Parameters, frozen: Parameters, batch: Batch) -> Scalar:
        if batch.segment_ids is not None:
            raise ValueError("state tuning needs rows of one sequence, and batch has segment_ids")
        state = tuned_state(tuned, config, batch.inputs.shape[0])
        return sum_of_losses(nnx.merge(graphdef, frozen), batch, l2wrap=l2wrap, state=state)

    return loss


__all__ = ["init_wkv", "state_loss", "tuned_state", "wkv_of"]
