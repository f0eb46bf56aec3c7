"""Compares a whole model through kernels with the same model through XLA: curves and gradients.

    python benchmarks/model_numerics.py                                    # small, for a CPU
    python benchmarks/model_numerics.py --num-layers 24 --hidden-size 1024 --length 1024 --steps 100

Curves: a model is trained on the bytes of Python's standard library, twice through each
implementation, from the same parameters and on the same batches. The table has the differences of
all pairs: two trainings on a GPU differ in their bits through XLA, too, and more so two programs of
XLA that round at other places, as with another `remat`. One more training, in float32 with exact
products, tells how far each curve is from the true one.

Gradients: those of the trained model in bfloat16, beside float32 through XLA with exact products,
on text, on three tokens in turn, and on one repeated token. The error of a parameter is relative,
in root mean square.
"""

import dataclasses
import itertools
import pathlib
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from results import Row, write_results

from goose_jax import RWKV7, RWKV7Config
from goose_jax.data import Batch, next_token_batch
from goose_jax.nn import abstract_model
from goose_jax.training import OptimizerConfig, full_loss, init_train_state, make_train_step

BYTES = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compare.

    Attributes:
      num_layers: number of layers.
      hidden_size: channels of the residual stream.
      batch_size: sequences per step.
      length: tokens per sequence.
      steps: steps of each training.
      implementations: of the operators: the one to judge, and the one to judge it by.
      json: file to write the rows to, in the format of `results.py`.
    """

    num_layers: int = 2
    hidden_size: int = 64
    batch_size: int = 8
    length: int = 128
    steps: int = 20
    implementations: tuple[str, str] = ("mosaic_gpu", "xla")
    json: pathlib.Path | None = None


def main(settings: Settings) -> None:
    config = RWKV7Config(
        vocab_size=BYTES, hidden_size=settings.hidden_size, num_layers=settings.num_layers
    )
    batches = text_batches(settings)
    ours, theirs = settings.implementations
    float32 = {"implementation": theirs, "compute_dtype": "float32"}
    runs, params = {}, None
    for name, changes, precision, times in (
        (f"{theirs}, float32", float32, "highest", 1),
        (f'{theirs}, remat="none"', {"implementation": theirs, "remat": "none"}, None, 1),
        (ours, {"implementation": ours}, None, 2),
        (theirs, {"implementation": theirs}, None, 2),
    ):
        changed = dataclasses.replace(config, **changes)
        curves, params = train(changed, batches, precision, times)
        for run, curve in enumerate(curves, 1):
            runs[f"{name} {run}" if times > 1 else name] = curve
            print(f"{name}: loss {curve[0]:.4f} to {curve[-1]:.4f}", flush=True)
    rows = [
        {
            "curves": f"{one}, {other}",
            "mean_difference": float(np.abs(runs[one] - runs[other]).mean()),
            "largest_difference": float(np.abs(runs[one] - runs[other]).max()),
        }
        for one, other in itertools.combinations(runs, 2)
    ]
    for row in rows:
        print(f"{row['curves']}: {row['mean_difference']:.5f}, {row['largest_difference']:.5f}")
    rows += compare_gradients(config, params, settings, batches[0])
    write_results(settings.json, rows)


def text_batches(settings: Settings) -> list[Batch]:
    """Returns the batches of all steps: windows of the standard library's files, at random."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(x for x in folder.glob("*.py") if x.is_file())
    text = np.frombuffer(b"".join(x.read_bytes() for x in files), np.uint8).astype(np.int32)
    random = np.random.default_rng(0)
    size = (settings.steps, settings.batch_size, 1)
    starts = random.integers(0, len(text) - settings.length - 1, size)
    return [next_token_batch(text[x + np.arange(settings.length + 1)]) for x in starts]


def train(
    config: RWKV7Config, batches: list[Batch], precision: str | None, times: int
) -> tuple[list[np.ndarray], Any]:
    """Returns the losses of some trainings, and the parameters after the last one.

    Args:
      config: of the model.
      batches: of all steps.
      precision: of matrix products, a name of JAX.
      times: number of trainings, which all begin with the same parameters.
    """
    steps = len(batches)
    recipe = OptimizerConfig(total_steps=steps, warmup_steps=min(10, steps // 2))
    model = RWKV7(config, rngs=nnx.Rngs(0))
    step, curves = make_train_step(model, recipe), []
    for _ in range(times):
        state, losses = init_train_state(model, recipe), []
        with jax.default_matmul_precision(precision):
            for batch in batches:
                state, metrics = step(state, batch)
                losses.append(metrics.loss)
        curves.append(np.array([float(x) for x in losses]))
    return curves, state.params


def compare_gradients(
    config: RWKV7Config, params: Any, settings: Settings, text: Batch
) -> list[Row]:
    """Prints and returns, for each kind of tokens, the five parameters that fare worst."""
    ours, theirs = settings.implementations

    def gradient(precision: str | None, **choices: Any) -> Any:
        loss = full_loss(abstract_model(dataclasses.replace(config, **choices)))

        @jax.jit
        def function(params: Any, batch: Batch) -> Any:
            with jax.default_matmul_precision(precision):
                return jax.grad(lambda params: loss(params, {}, batch) / batch.inputs.size)(params)

        return function

    exact = gradient("highest", compute_dtype="float32", implementation="xla")
    judged = {name: gradient(None, implementation=name) for name in (ours, theirs)}
    shape = (settings.batch_size, settings.length + 1)
    tokens = {
        "text": None,
        "three tokens in turn": np.array([65, 108, 32])[np.arange(shape[1]) % 3],
        "one repeated token": np.full(shape[1], 101),
    }
    rows = []
    for kind, of_row in tokens.items():
        batch = text if of_row is None else next_token_batch(np.broadcast_to(of_row, shape))
        expected = exact(params, batch)
        errors = {name: relative_errors(f(params, batch), expected) for name, f in judged.items()}
        ratios = {name: errors[ours][name] / errors[theirs][name] for name in errors[ours]}
        median = float(np.median(list(ratios.values())))
        for name in sorted(ratios, key=lambda name: -ratios[name])[:5]:
            row = {
                "tokens": kind,
                "parameter": name,
                "error": errors[ours][name],
                "error_to_judge_by": errors[theirs][name],
                "ratio": ratios[name],
                "median_ratio": median,
            }
            rows.append(row)
            print(
                f"{kind}: {name} {row['error']:.2e} / {row['error_to_judge_by']:.2e} = "
                f"{row['ratio']:.2f}, median {median:.2f}"
            )
    return rows


def relative_errors(gradients: Any, expected: Any) -> dict[str, float]:
    """Returns the error of each parameter that has a gradient."""
    errors = {}
    for (path, value), reference in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        norm = float(jnp.linalg.norm(reference.astype(jnp.float32)))
        if norm > 0:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            errors[name] = float(jnp.linalg.norm(value.astype(jnp.float32) - reference)) / norm
    return errors


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
