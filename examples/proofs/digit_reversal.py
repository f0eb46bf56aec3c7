"""Digit reversal, the task of RWKV-LM's `rwkv7_train_simplified.py`, with its sizes.

A model of width 32 reads numbers of up to 60 digits, and writes each of them backwards. Sizes and
numbers of the optimizer are those of that script; initial values are those of this package.
"""

import dataclasses
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.proofs.tasks import HELD_OUT, DigitReversal
from examples.proofs.training import correct, small_model, train
from goose_jax.training import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """A digit reversal.

    Attributes:
      task: the batches to train on.
      recipe: the numbers of the optimizer.
      hidden_size: width of the model.
      num_layers: number of layers.
      head_size: channels of a head.
      held_out_batches: number of batches to measure on.
    """

    task: DigitReversal
    recipe: OptimizerConfig
    hidden_size: int = 32
    num_layers: int = 2
    head_size: int = 16
    held_out_batches: int = 16


def _recipe(steps: int) -> OptimizerConfig:
    """Returns the optimizer of the official script."""
    return OptimizerConfig(
        total_steps=steps,
        learning_rate=4e-3,
        final_learning_rate=1e-6,
        warmup_steps=0,
        beta2=0.999,
        eps=1e-8,
        decay_base_rate=1.0,
    )


FULL = Settings(DigitReversal(), _recipe(10_000))
SHORT = Settings(DigitReversal(32, 64, max_digits=12), _recipe(3000), held_out_batches=32)


def run(settings: Settings) -> dict[str, Any]:
    """Trains, and returns the accuracy of the reversed digits by the number of digits."""
    task = settings.task
    config = small_model(
        task.vocab_size,
        settings.hidden_size,
        settings.num_layers,
        settings.head_size,
        "float32",
        **dict.fromkeys(("decay_rank", "alpha_rank", "value_rank", "gate_rank"), 8),
    )
    trained = train(config, settings.recipe, task)
    held_out = dataclasses.replace(task, seed=HELD_OUT)
    right = np.zeros(task.max_digits + 1)
    count = np.zeros(task.max_digits + 1)
    for step in range(settings.held_out_batches):
        lengths = held_out.rows(step)[1][:, 1:]  # of the targets
        of_batch = correct(trained.model, held_out(step))
        right += np.bincount(lengths.ravel(), of_batch.ravel(), task.max_digits + 1)
        count += np.bincount(lengths.ravel(), minlength=task.max_digits + 1)
    return {
        "accuracy_of_reversed_digits": right[1:].sum() / count[1:].sum(),
        "accuracy_by_digits": {
            str(n): right[n] / count[n] for n in range(1, len(count)) if count[n]
        },
        "loss_curve": trained.curve,
        "training_seconds": trained.seconds,
    }


def draw(figure: Figure, results: dict[str, Any]) -> None:
    """Draws the loss and the accuracy."""
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*results["loss_curve"], strict=True))
    left.set(xlabel="step", ylabel="loss, nats per token", title="training")
    digits, accuracy = zip(*results["accuracy_by_digits"].items(), strict=True)
    right.plot([int(n) for n in digits], accuracy, ".-")
    right.set(xlabel="digits of the number", ylabel="accuracy", ylim=(0, 1.02))
    right.set_title("reversed digits of new numbers")
