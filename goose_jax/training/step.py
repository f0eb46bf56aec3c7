"""One optimizer step as one compiled program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from goose_jax.data import Batch
from goose_jax.nn import RWKV7
from goose_jax.training.loss import L2WRAP, num_targets, token_losses
from goose_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, optimizer
from pallas_kernels.types import Scalar

type Parameters = dict[str, Any]
"""A nested dict of arrays by attribute name, as `nnx.to_pure_dict` makes it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What changes from step to step.

    Attributes:
      step: int32, optimizer steps made.
      params: what is trained, in float32: the parameters of the model, or in fine-tuning what is
        put beside them.
      opt_state: of the optimizer.
    """

    step: Int[Array, ""]
    params: Parameters
    opt_state: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """What one step reports, before its update.

    Attributes:
      loss: mean cross entropy of the counted targets, in nats.
      gradient_norm: global norm of the gradient, before clipping.
      learning_rate: of this step.
      tokens: int32, how many targets were counted.
    """

    loss: Scalar
    gradient_norm: Scalar
    learning_rate: Scalar
    tokens: Int[Array, ""]


type TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
type TuningStep = Callable[[TrainState, Parameters | None, Batch], tuple[TrainState, Metrics]]
type Losses = Callable[[Parameters, Parameters | None, Batch], Float[Array, "B T"]]
"""`token_losses` of what is trained, what is frozen, and a batch."""


def init_train_state(model: RWKV7, config: OptimizerConfig) -> TrainState:
    """The state before the first step, with a copy of the model's parameters.

    Raises:
      ValueError: if the parameters are stored in fewer than 32 bits, where most updates would be
        rounded away. (`compute_dtype` may be bfloat16.)
    """
    params: Parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if jnp.finfo(model.config.param_dtype).bits < 32:
        raise ValueError(f"training needs param_dtype='float32', got {model.config.param_dtype=}")
    params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer(config).init(params))


def with_params(model: RWKV7, params: Parameters) -> RWKV7:
    """A model of the same structure with the given parameters; `model` is left as it is."""
    return nnx.merge(nnx.graphdef(model), params)


def make_train_step(model: RWKV7, config: OptimizerConfig, *, l2wrap: float = L2WRAP) -> TrainStep:
    """Compiles `state, metrics = train_step(state, batch)`.

    The state that goes in is used up: its buffers become those of the state that comes out.

    A batch with a leading axis of microbatches is worked off one microbatch at a time and makes one
    optimizer step, the same as with all rows in one batch: every counted target has equal weight.

    Args:
      model: gives the structure; its parameters are not used.
      config: of the optimizer.
      l2wrap: see `token_losses`.
    """
    step = _step(full_losses(model, l2wrap=l2wrap), config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return step(state, None, batch)

    return jax.jit(train_step, donate_argnums=0)


def full_losses(model: RWKV7, *, l2wrap: float = L2WRAP) -> Losses:
    """The losses of a model all of whose parameters are trained: nothing is frozen.

    Args:
      model: gives the structure; its parameters are not used.
      l2wrap: see `token_losses`.
    """
    graphdef = nnx.graphdef(model)

    def losses(params: Parameters, frozen: Parameters | None, batch: Batch) -> Float[Array, "B T"]:
        del frozen
        return token_losses(nnx.merge(graphdef, params), batch, l2wrap=l2wrap)

    return losses


def init_tuning_state(trained: Parameters, config: OptimizerConfig) -> TrainState:
    """The state before the first step of fine-tuning, with a copy of what is trained.

    The optimizer's state is that of `trained` alone.

    Args:
      trained: as `init_lora` or `init_wkv` makes it.
      config: of the optimizer.
    """
    trained = jax.tree.map(jnp.copy, trained)
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer(config).init(trained))


def make_tuning_step(losses: Losses, config: OptimizerConfig) -> TuningStep:
    """Compiles `state, metrics = tuning_step(state, frozen, batch)`.

    As `make_train_step`, but what is frozen is an argument: it is neither used up nor part of the
    program, has no state of the optimizer, and no gradient of it is asked for.

    Args:
      losses: from `lora_losses` or `state_losses`.
      config: of the optimizer.
    """
    return jax.jit(_step(losses, config), donate_argnums=0)


def _step(losses: Losses, config: OptimizerConfig) -> TuningStep:
    transformation = optimizer(config)
    schedule = learning_rate_schedule(config)

    def loss(trained: Parameters, frozen: Parameters | None, batch: Batch, count: Scalar) -> Scalar:
        return jnp.sum(losses(trained, frozen, batch)) / count

    def step(
        state: TrainState, frozen: Parameters | None, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        tokens = num_targets(batch)
        count = jnp.maximum(tokens, 1).astype(jnp.float32)

        def of_microbatch(batch: Batch) -> tuple[Scalar, Parameters]:
            return jax.value_and_grad(loss)(state.params, frozen, batch, count)

        if batch.inputs.ndim == 3:
            value, gradient = _sum_over_microbatches(of_microbatch, batch)
        else:
            value, gradient = of_microbatch(batch)
        updates, opt_state = transformation.update(gradient, state.opt_state, state.params)
        metrics = Metrics(value, optax.tree.norm(gradient), schedule(state.step), tokens)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def _sum_over_microbatches(function: Callable[[Batch], Any], batch: Batch) -> Any:
    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda array: array[0], batch))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zeros, batch)[0]


__all__ = [
    "Losses",
    "Metrics",
    "Parameters",
    "TrainState",
    "TrainStep",
    "TuningStep",
    "full_losses",
    "init_train_state",
    "init_tuning_state",
    "make_train_step",
    "make_tuning_step",
    "with_params",
]
