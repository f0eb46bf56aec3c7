"""Products of permutations: after each permutation, the model names the product of all so far.

No order of the factors may be lost, so the model must keep the product as its state. For five
elements (S5), a transformer of a fixed depth cannot do that at every length, unless TC0 = NC1
(https://arxiv.org/abs/2404.08819). The factors are swaps of two elements. A step of RWKV-7 changes
its state by a matrix of rank 1, and so does a swap; other permutations would need several steps.
"""

import dataclasses
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.proofs.tasks import HELD_OUT, PermutationProducts
from examples.proofs.training import correct, small_model, train
from goose_jax.training import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """Products of permutations.

    Attributes:
      task: the batches to train on.
      recipe: the numbers of the optimizer.
      hidden_size: width of the model.
      num_layers: number of layers.
      head_size: channels of a head.
      measured_length: number of permutations to measure on, also beyond those trained on.
      held_out_rows: number of rows to measure on.
    """

    task: PermutationProducts
    recipe: OptimizerConfig
    hidden_size: int
    num_layers: int
    head_size: int
    measured_length: int
    held_out_rows: int = 1024


FULL = Settings(
    PermutationProducts(512, 32, factors="swaps"),
    OptimizerConfig(
        total_steps=20_000, learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=200
    ),
    hidden_size=128,
    num_layers=4,
    head_size=32,
    measured_length=128,
)
SHORT = Settings(
    PermutationProducts(64, 8, factors="swaps"),
    OptimizerConfig(total_steps=1200, learning_rate=4e-3, final_learning_rate=2e-4),
    hidden_size=64,
    num_layers=4,
    head_size=32,
    measured_length=32,
)


def run(settings: Settings) -> dict[str, Any]:
    """Trains, and returns the accuracy by the number of permutations."""
    task = settings.task
    config = small_model(
        task.vocab_size,
        settings.hidden_size,
        settings.num_layers,
        settings.head_size,
        "float32",
        precision="high",  # what is lost of a product is missing in all later ones
    )
    trained = train(config, settings.recipe, task)
    held_out = dataclasses.replace(
        task,
        batch_size=settings.held_out_rows,
        sequence_length=settings.measured_length,
        seed=HELD_OUT,
    )
    accuracy = correct(trained.model, held_out(0)).mean(axis=0)
    T = task.sequence_length
    return {
        "permutations": task.vocab_size,
        "trained_length": T,
        "accuracy_at_trained_length": accuracy[T - 1],
        "accuracy_at_twice_that": accuracy[2 * T - 1],
        "longest_above_90_percent": int(np.argmin(np.append(accuracy > 0.9, False))),
        "accuracy": accuracy.tolist(),
        "loss_curve": trained.curve,
        "training_seconds": trained.seconds,
    }


def draw(figure: Figure, results: dict[str, Any]) -> None:
    """Draws the accuracy, with what guessing gives."""
    axes = figure.subplots()
    accuracy = results["accuracy"]
    axes.plot(range(1, len(accuracy) + 1), accuracy, label="RWKV-7")
    axes.axhline(1 / results["permutations"], color="0.6", linestyle="--", label="guessing")
    axes.axvline(results["trained_length"], color="0.6", label="length of training")
    axes.set(xlabel="number of permutations", ylabel="accuracy of the product", ylim=(0, 1.02))
    axes.set_title(f"products of swaps, {results['permutations']} permutations")
    axes.legend()
