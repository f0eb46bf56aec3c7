"""A passkey in a text far longer than those of the training.

The model reads noise with a key of digits somewhere in it, and repeats the key at the end. It is
trained on short texts. Longer ones are read in pieces, from the state of the piece before.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int
from matplotlib.figure import Figure

from examples.proofs.tasks import HELD_OUT, Passkey
from examples.proofs.training import small_model, train
from goose_jax import RWKV7, RWKV7State, init_state
from goose_jax.config import default_compute_dtype
from goose_jax.training import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """A passkey.

    Attributes:
      task: the batches to train on; its length is the longest one of the training.
      recipe: the numbers of the optimizer.
      hidden_size: width of the model.
      num_layers: number of layers.
      head_size: channels of a head.
      factors: lengths to measure at, as multiples of the trained length.
      held_out_rows: number of rows to measure on.
    """

    task: Passkey
    recipe: OptimizerConfig
    hidden_size: int
    num_layers: int
    head_size: int
    factors: tuple[int, ...]
    held_out_rows: int = 64


FULL = Settings(
    Passkey(64, 512),
    OptimizerConfig(
        total_steps=2000, learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=100
    ),
    hidden_size=128,
    num_layers=2,
    head_size=64,
    factors=(1, 2, 4, 8, 16, 32, 64, 128),
)
SHORT = Settings(
    Passkey(32, 64, digits=3),
    OptimizerConfig(total_steps=500, learning_rate=8e-3, final_learning_rate=4e-4),
    hidden_size=32,
    num_layers=2,
    head_size=16,
    factors=(1, 2, 4, 8, 16, 32, 64),
)


@nnx.jit
def _read(
    model: RWKV7, tokens: Int[Array, "B T"], state: RWKV7State
) -> tuple[Int[Array, "B T"], RWKV7State]:
    logits, state = model(tokens, state)
    return jnp.argmax(logits, axis=-1), state


def accuracy_at(model: RWKV7, task: Passkey, piece: int) -> tuple[float, float]:
    """Returns the share of right digits, and of rows in which all digits are right.

    Each row is read `piece` tokens at a time, so the memory does not grow with the length.
    """
    batch = task(0)
    state = init_state(model.config, task.batch_size)
    for begin in range(0, task.sequence_length, piece):
        tokens = jnp.asarray(batch.inputs[:, begin : begin + piece])
        predictions, state = _read(model, tokens, state)
    right = np.asarray(predictions)[:, -task.digits :] == batch.targets[:, -task.digits :]
    return float(right.mean()), float(right.all(axis=1).mean())


def run(settings: Settings) -> dict[str, Any]:
    """Trains, and returns the accuracy by the length of the text."""
    task = settings.task
    config = small_model(
        task.vocab_size,
        settings.hidden_size,
        settings.num_layers,
        settings.head_size,
        default_compute_dtype(),
    )
    trained = train(config, settings.recipe, task)
    digits, keys = {}, {}
    for factor in settings.factors:
        length = factor * task.sequence_length
        held_out = dataclasses.replace(
            task, batch_size=settings.held_out_rows, sequence_length=length, seed=HELD_OUT
        )
        digits[str(length)], keys[str(length)] = accuracy_at(
            trained.model, held_out, task.sequence_length
        )
        print(f"  {length} tokens: {keys[str(length)]:.3f} of the keys")
    return {
        "trained_length": task.sequence_length,
        "accuracy_of_digits": digits,
        "accuracy_of_keys": keys,
        "loss_curve": trained.curve,
        "training_seconds": trained.seconds,
    }


def draw(figure: Figure, results: dict[str, Any]) -> None:
    """Draws the accuracy over the length."""
    axes = figure.subplots()
    for name, label in (("accuracy_of_digits", "digits"), ("accuracy_of_keys", "whole keys")):
        lengths = [int(n) for n in results[name]]
        axes.plot(lengths, list(results[name].values()), "o-", label=label)
    axes.axvline(results["trained_length"], color="0.6", label="length of training")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of the text", ylabel="accuracy", ylim=(0, 1.02))
    axes.set_title("passkey in noise")
    axes.legend()
