"""One optimizer step as one compiled program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from goose_jax.config import RWKV7Config
from goose_jax.data import Batch
from goose_jax.nn import RWKV7
from goose_jax.parallel import check_mesh, place_tree, tree_shardings
from goose_jax.parallel.in_model import (
    compiler_options,
    on_mesh,
    own_copies,
    sum_of_copies,
    sum_over_mesh,
    zeros_varying_as,
)
from goose_jax.parallel.placement import constrain_tree
from goose_jax.training.loss import L2WRAP, num_targets, num_tokens, sum_of_losses
from goose_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from pallas_kernels.types import Scalar

type Parameters = dict[str, Any]
"""A nested dict of arrays by name, as `nnx.to_pure_dict` makes it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The values that a training step changes.

    Attributes:
      step: int32, number of optimizer steps made.
      params: the trained parameters, in float32: all parameters of the model, or in fine-tuning
        beside a frozen model the adapters or the initial state.
      opt_state: state of the optimizer.
    """

    step: Int[Array, ""]
    params: Parameters
    opt_state: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """The measurements of one step, made before its update.

    Attributes:
      loss: mean cross entropy of the counted targets, in nats.
      gradient_norm: global norm of the gradient before clipping.
      learning_rate: learning rate of the step.
      tokens: int32, number of tokens that the model read, without padding.
      targets: int32, number of targets that the loss counts.
    """

    loss: Scalar
    gradient_norm: Scalar
    learning_rate: Scalar
    tokens: Int[Array, ""]
    targets: Int[Array, ""]


type TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
type TuningStep = Callable[[TrainState, Parameters, Batch], tuple[TrainState, Metrics]]
type Loss = Callable[[Parameters, Parameters, Batch], Scalar]
"""Returns `sum_of_losses` for trained parameters, frozen ones (or `{}`), a batch."""


def init_train_state(
    model: RWKV7, config: OptimizerConfig, *, mesh: Mesh | None = None
) -> TrainState:
    """Returns the state before the first step, with a copy of the model's parameters.

    Args:
      model: the model. If it was made by `goose_jax.parallel.create_sharded`, no device ever holds
        all of its parameters.
      config: numbers of the optimizer.
      mesh: the mesh that the state is divided over; None for one device.

    Raises:
      ValueError: if the parameters have fewer than 32 bits, in which most updates would be rounded
        away. (`compute_dtype` may be bfloat16.)
    """
    check_trainable(model.config)
    return init_tuning_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), config, mesh=mesh)


def check_trainable(config: RWKV7Config) -> None:
    """Checks the dtype of the parameters of a model that is to be trained.

    Raises:
      ValueError: if the parameters have fewer than 32 bits, in which most updates would be rounded
        away.
    """
    if jnp.finfo(config.param_dtype).bits < 32:
        raise ValueError(f"training needs param_dtype='float32', got {config.param_dtype=}")


def with_params(model: RWKV7, params: Parameters) -> RWKV7:
    """Returns a model of the same structure with other parameters; `model` does not change."""
    return nnx.merge(nnx.graphdef(model), params)


def make_train_step(
    model: RWKV7, config: OptimizerConfig, *, l2wrap: float = L2WRAP, mesh: Mesh | None = None
) -> TrainStep:
    """Returns the compiled function `state, metrics = train_step(state, batch)`.

    The step uses up the state that it is given: its buffers are donated to the new state. If the
    loss or the gradient is not finite, only the number of steps changes.

    A batch with a leading axis of microbatches is read one microbatch at a time, and makes one
    optimizer step. The step equals the step on all rows in one batch: every counted target has the
    same weight.

    Args:
      model: gives the structure; its parameters are not used.
      config: numbers of the optimizer.
      l2wrap: factor of the pull on large logits, as for `sum_of_losses`.
      mesh: the mesh that the state is divided over, from `goose_jax.parallel.make_mesh`; None for
        one device. Batches may be NumPy arrays in a run of one process; in a run of several,
        `goose_jax.parallel.place_batch` must put them on the mesh.

    Raises:
      ValueError: if the mesh does not divide the model.
    """
    if mesh is not None:
        check_mesh(mesh, model.config)
    step = _step(full_loss(model, l2wrap=l2wrap), config, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return step(state, {}, batch)

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options(mesh))


def full_loss(model: RWKV7, *, l2wrap: float = L2WRAP) -> Loss:
    """Returns the loss for training all parameters of a model.

    Args:
      model: gives the structure; its parameters are not used.
      l2wrap: factor of the pull on large logits, as for `sum_of_losses`.

    Returns:
      `loss(params, frozen, batch)`, which ignores `frozen` and returns `sum_of_losses`.
    """
    graphdef = nnx.graphdef(model)

    def loss(params: Parameters, frozen: Parameters, batch: Batch) -> Scalar:
        del frozen
        return sum_of_losses(nnx.merge(graphdef, params), batch, l2wrap=l2wrap)

    return loss


def init_tuning_state(
    trained: Parameters, config: OptimizerConfig, *, mesh: Mesh | None = None
) -> TrainState:
    """Returns the state before the first step of fine-tuning, with a copy of what is trained.

    Args:
      trained: the parameters to train, such as `init_lora` or `init_wkv` makes. Only these have a
        state of the optimizer.
      config: numbers of the optimizer.
      mesh: the mesh that the state is divided over; None for one device.
    """
    optimizer = make_optimizer(config)
    if mesh is None:
        trained = jax.tree.map(jnp.copy, trained)
        return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
    trained = place_tree(trained, mesh)

    def start(trained: Parameters) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))

    shardings = tree_shardings(jax.eval_shape(start, trained), mesh)
    return jax.jit(start, out_shardings=shardings)(trained)


def make_tuning_step(
    loss: Loss, config: OptimizerConfig, *, mesh: Mesh | None = None
) -> TuningStep:
    """Returns the compiled function `state, metrics = tuning_step(state, frozen, batch)`.

    The step uses up `state`, and reads microbatches one at a time, as the step of `make_train_step`
    does. `frozen` is an argument: it is not part of the program, its buffers are kept, and it has
    neither gradients nor a state of the optimizer.

    Args:
      loss: what to minimise the mean of, such as `lora_loss(model, config)`.
      config: numbers of the optimizer.
      mesh: the mesh that `state` and `frozen` are divided over; None for one device.
    """
    step = _step(loss, config, mesh)
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(mesh))


def _step(loss: Loss, config: OptimizerConfig, mesh: Mesh | None) -> TuningStep:
    transformation = make_optimizer(config)
    schedule = learning_rate_schedule(config)

    def differentiate(
        params: Parameters, frozen: Parameters, batch: Batch
    ) -> tuple[tuple[Scalar, Scalar], Parameters]:
        targets = sum_over_mesh(num_targets(batch))
        count = jnp.maximum(targets, 1).astype(jnp.float32)

        def share(params: Parameters, batch: Batch) -> Scalar:
            return loss(params, frozen, batch) / count  # this device's part of the mean

        if batch.inputs.ndim == 3:
            value, gradient = _sum_over_microbatches(
                jax.value_and_grad(share), own_copies(params), batch
            )
            gradient = sum_of_copies(gradient, params)
        else:
            value, gradient = jax.value_and_grad(share)(params, batch)
        return (sum_over_mesh(value), targets), gradient

    differentiate_on_mesh = on_mesh(differentiate, mesh, gradient=True)

    def step(state: TrainState, frozen: Parameters, batch: Batch) -> tuple[TrainState, Metrics]:
        (value, targets), gradient = differentiate_on_mesh(state.params, frozen, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = transformation.update(gradient, state.opt_state, state.params)
            metrics = Metrics(
                loss=value,
                gradient_norm=optax.tree.norm(gradient),
                learning_rate=schedule(state.step),
                tokens=num_tokens(batch),
                targets=targets,
            )
            params = optax.apply_updates(state.params, updates)
            is_finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.gradient_norm)
            params = _where(is_finite, params, state.params)
            opt_state = _where(is_finite, opt_state, state.opt_state)
        return constrain_tree(TrainState(state.step + 1, params, opt_state), mesh), metrics

    return step


def _where(changes: Scalar, new: Any, old: Any) -> Any:
    """Returns `new` or `old`, but always the schedule's count of `new`, which counts all steps."""

    def choose(new: Any, old: Any) -> Any:
        if isinstance(new, optax.ScaleByScheduleState):
            return new
        return jnp.where(changes, new, old)

    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(choose, new, old, is_leaf=is_schedule)


def _sum_over_microbatches(
    function: Callable[[Parameters, Batch], tuple[Scalar, Parameters]],
    params: Parameters,
    batch: Batch,
) -> tuple[Scalar, Parameters]:
    """Sums the values and gradients that a function returns for each microbatch."""

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(params, microbatch)), None

    first = jax.tree.map(lambda array: array[0], batch)
    zeros = jax.tree.map(zeros_varying_as, jax.eval_shape(function, params, first))
    return jax.lax.scan(add, zeros, batch)[0]


__all__ = [
    "Loss",
    "Metrics",
    "Parameters",
    "TrainState",
    "TrainStep",
    "TuningStep",
    "check_trainable",
    "full_loss",
    "init_train_state",
    "init_tuning_state",
    "make_train_step",
    "make_tuning_step",
    "with_params",
]
