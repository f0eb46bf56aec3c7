"""Multi-query associative recall: how many pairs of key and value models of some widths keep.

The keys come again later in random order, and the model must name the value of each. Models learn
that on few pairs first: rows of many pairs alone leave them at guessing for thousands of steps.
Source: "Zoology", https://arxiv.org/abs/2312.04927.
"""

import dataclasses
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.proofs.tasks import HELD_OUT, AssociativeRecall
from examples.proofs.training import correct, small_model, train
from goose_jax.config import default_compute_dtype
from goose_jax.training import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """Associative recall.

    Attributes:
      task: the batches to train on. Models are measured on its examples that fill a row.
      recipe: the numbers of the optimizer.
      hidden_sizes: widths of the models.
      num_layers: number of layers of each.
      head_size: channels of a head.
      held_out_batches: number of batches to measure on, for each number of pairs.
    """

    task: AssociativeRecall
    recipe: OptimizerConfig
    hidden_sizes: tuple[int, ...]
    num_layers: int = 2
    head_size: int = 64
    held_out_batches: int = 4


FULL = Settings(
    AssociativeRecall(
        64,
        512,
        examples=(
            (64, 4),
            (64, 8),
            (64, 16),
            (128, 32),
            (512, 8),
            (512, 16),
            (512, 32),
            (512, 64),
            (512, 128),
        ),
        curriculum=6000,
    ),
    OptimizerConfig(
        total_steps=8000, learning_rate=4e-3, final_learning_rate=1e-4, warmup_steps=100
    ),
    hidden_sizes=(64, 128, 256),
)
SHORT = Settings(
    AssociativeRecall(64, 32, examples=((32, 2), (32, 4), (32, 8)), vocab_size=256),
    OptimizerConfig(total_steps=1000, learning_rate=6e-3, final_learning_rate=3e-4),
    hidden_sizes=(16, 32, 64),
    head_size=16,
)


def run(settings: Settings) -> dict[str, Any]:
    """Trains a model of each width, and returns its accuracy by the number of pairs."""
    task = settings.task
    accuracy, curves, seconds = {}, {}, {}
    for width in settings.hidden_sizes:
        print(f"width {width}")
        config = small_model(
            task.vocab_size,
            width,
            settings.num_layers,
            settings.head_size,
            default_compute_dtype(),
        )
        trained = train(config, settings.recipe, task)
        accuracy[str(width)] = {
            str(pairs): _accuracy(trained.model, task, pairs, settings.held_out_batches)
            for tokens, pairs in task.examples
            if tokens == task.sequence_length
        }
        curves[str(width)] = trained.curve
        seconds[str(width)] = trained.seconds
    return {
        "accuracy": accuracy,
        "chance": 2 / task.vocab_size,  # half of all tokens are values
        "loss_curve": curves,
        "training_seconds": seconds,
    }


def _accuracy(model: Any, task: AssociativeRecall, pairs: int, batches: int) -> float:
    example = task.sequence_length, pairs
    held_out = dataclasses.replace(task, examples=(example,), curriculum=0, seed=HELD_OUT)
    return float(np.nanmean([correct(model, held_out(step)) for step in range(batches)]))


def draw(figure: Figure, results: dict[str, Any]) -> None:
    """Draws the accuracy of each width."""
    axes = figure.subplots()
    for width, accuracy in results["accuracy"].items():
        pairs = [int(n) for n in accuracy]
        axes.plot(pairs, list(accuracy.values()), "o-", label=f"width {width}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="pairs of key and value", ylabel="accuracy of the values", ylim=(0, 1.02))
    axes.set_xticks(pairs, [str(n) for n in pairs])
    axes.set_title("multi-query associative recall")
    axes.legend(loc="lower left")
