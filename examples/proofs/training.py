"""What all proofs share: one training loop, and the predictions of a trained model."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from goose_jax import RWKV7, RWKV7Config
from goose_jax.data import Batch
from goose_jax.training import (
    OptimizerConfig,
    StepReport,
    init_train_state,
    make_train_step,
    train_steps,
    with_params,
)

REPORTS = 100  # points of a curve of the loss


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, and how it came about.

    Attributes:
      model: the model.
      curve: number of steps, and the mean loss of the steps since the point before, in nats.
      seconds: wall time of the training, with the time to compile.
    """

    model: RWKV7
    curve: list[tuple[int, float]]
    seconds: float


def small_model(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    head_size: int,
    compute_dtype: str,
    **others: Any,
) -> RWKV7Config:
    """Returns the configuration of a model that keeps all values for its backward.

    Args:
      vocab_size: number of token ids.
      hidden_size: width.
      num_layers: number of layers.
      head_size: channels of a head.
      compute_dtype: dtype of activations.
      **others: other fields of `RWKV7Config`.
    """
    return RWKV7Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        head_size=head_size,
        compute_dtype=compute_dtype,
        remat="none",
        unroll_layers=True,
        **others,
    )


def train(
    config: RWKV7Config,
    recipe: OptimizerConfig,
    batches: Callable[[int], Batch],
    *,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> Trained:
    """Trains a new model, and tells how it goes on."""
    model = RWKV7(config, rngs=nnx.Rngs(seed))
    width = max(1, recipe.total_steps // REPORTS)
    start = time.perf_counter()
    losses: list[float] = []
    curve: list[tuple[int, float]] = []

    def note(step: StepReport) -> None:
        losses.append(step.loss)
        if step.step % width == 0:
            curve.append((step.step, float(np.mean(losses[-width:]))))
        if step.step % (10 * width) == 0:
            seconds = time.perf_counter() - start
            report(f"  step {step.step}: loss {curve[-1][1]:.4f} after {seconds:.0f} s")

    steps = train_steps(
        make_train_step(model, recipe, l2wrap=0.0),
        init_train_state(model, recipe),
        batches,
        steps=recipe.total_steps,
        on_report=note,
    )
    for _, state in steps:
        params = state.params
    trained = with_params(model, jax.block_until_ready(params))
    return Trained(trained, curve, time.perf_counter() - start)


@nnx.jit
def predict(model: RWKV7, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the most probable next token at each place."""
    logits, _ = model(tokens)
    return jnp.argmax(logits, axis=-1)


def correct(model: RWKV7, batch: Batch) -> Float[np.ndarray, "B T"]:
    """Returns 1 where the model predicts the target, 0 where not, NaN where there is none."""
    right = np.asarray(predict(model, jnp.asarray(batch.inputs))) == batch.targets
    return np.where(batch.targets >= 0, right, np.nan)
