"""Compares a whole model through kernels with the same model through XLA: curves and gradients.

    python benchmarks/model_numerics.py                                    # small, for a CPU
    python benchmarks/model_numerics.py --num-layers 24 --hidden-size 1024 --length 1024 --steps 100

Curves: a model is trained on the bytes of Python's standard library, twice through each
implementation, from the same parameters and on the same batches. The table has the differences of
all pairs: two trainings on a GPU differ in their bits through XLA, too, and more so two programs of
XLA that round at other places. One more training, in float32 with exact products, tells how far
each curve is from the true one.

Gradients: those in bfloat16 of trained models beside float32 through XLA with exact products, on
text, on three tokens in turn, and on one repeated token. The error of a parameter is relative, in
root mean square. A ratio is the geometric mean over models and batches. In a run of equal tokens
each one is rounded alike, and most of an error can come from few such runs. So the ratio at one
model is mostly chance, and more batches do not help. Each implementation trains models from several
seeds, and the standard error is that of the mean over models.

The other program of XLA is the same one without excess precision. XLA leaves out the rounding
between operations that it fuses, unless it is told to round wherever the program does.

All programs are compiled before the first one runs.
"""

import concurrent.futures
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
from goose_jax.training import (
    OptimizerConfig,
    TrainState,
    full_loss,
    init_train_state,
    make_train_step,
)

BYTES = 256
EXACT = "float32"
"""The way of the true curve and gradients: through XLA, with exact products."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compare.

    Attributes:
      num_layers: number of layers.
      hidden_size: channels of the residual stream.
      batch_size: sequences per step.
      length: tokens per sequence.
      steps: steps of each training.
      seeds: of initial parameters; each implementation trains a model from each of them.
      gradients: batches of text on which gradients of each model are compared.
      implementations: of the operators: the one to judge, and the one to judge it by.
      json: file to write the rows to, in the format of `results.py`.
    """

    num_layers: int = 2
    hidden_size: int = 64
    batch_size: int = 8
    length: int = 128
    steps: int = 20
    seeds: int = 2
    gradients: int = 2
    implementations: tuple[str, str] = ("mosaic_gpu", "xla")
    json: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to compute the model.

    Attributes:
      config: of the model.
      precision: of matrix products, a name of JAX; None for that of the operands.
      excess_precision: whether XLA may leave out roundings between operations that it fuses.
    """

    config: RWKV7Config
    precision: str | None = None
    excess_precision: bool = True

    def compile_step(self, recipe: OptimizerConfig, batch: Batch) -> Any:
        """Returns the compiled training step."""
        step = make_train_step(abstract_model(self.config), recipe)
        return self._compile(step, jax.eval_shape(lambda: self.start(recipe, 0)), batch)

    def compile_gradient(self, recipe: OptimizerConfig, batch: Batch) -> Any:
        """Returns the compiled gradient of the mean loss."""
        loss = full_loss(abstract_model(self.config))

        def mean(params: Any, batch: Batch) -> jax.Array:
            return loss(params, {}, batch) / batch.inputs.size

        params = jax.eval_shape(lambda: self.start(recipe, 0)).params
        return self._compile(jax.jit(jax.grad(mean)), params, batch)

    def start(self, recipe: OptimizerConfig, seed: int) -> TrainState:
        """Returns the state before the first step, the same one for all ways."""
        return init_train_state(RWKV7(self.config, rngs=nnx.Rngs(seed)), recipe)

    def _compile(self, program: Any, *args: Any) -> Any:
        with jax.default_matmul_precision(self.precision):
            lowered = program.lower(*args)
        return lowered.compile({"xla_allow_excess_precision": self.excess_precision})


def main(settings: Settings) -> None:
    ours, theirs = settings.implementations
    other = f"{theirs} without excess precision"
    config = RWKV7Config(
        vocab_size=BYTES, hidden_size=settings.hidden_size, num_layers=settings.num_layers
    )
    by_theirs = dataclasses.replace(config, implementation=theirs)
    ways = {
        EXACT: Way(dataclasses.replace(by_theirs, compute_dtype="float32"), "highest"),
        other: Way(by_theirs, excess_precision=False),
        ours: Way(dataclasses.replace(config, implementation=ours)),
        theirs: Way(by_theirs),
    }
    recipe = OptimizerConfig(total_steps=settings.steps, warmup_steps=min(10, settings.steps // 2))
    batches = text_batches(settings)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pending = {
            name: [pool.submit(f, recipe, batches[0]) for f in (w.compile_step, w.compile_gradient)]
            for name, w in ways.items()
        }
        compiled = {name: [part.result() for part in parts] for name, parts in pending.items()}
    trained: list[Any] = []

    def train(name: str, seed: int, *, keep: bool) -> np.ndarray:
        state = ways[name].start(recipe, seed)
        curve, params = run_steps(compiled[name][0], state, batches[: settings.steps])
        print(f"{name}, seed {seed}: loss {curve[0]:.4f} to {curve[-1]:.4f}", flush=True)
        if keep:
            trained.append(params)
        return curve

    curves = {name: train(name, 0, keep=False) for name in (EXACT, other)}
    for name in (ours, theirs):
        curves[f"{name} 1"] = train(name, 0, keep=True)
        curves[f"{name} 2"] = train(name, 0, keep=False)
        for seed in range(1, settings.seeds):
            train(name, seed, keep=True)
    rows = [
        {
            "curves": f"{one}, {another}",
            "mean_difference": float(np.abs(curves[one] - curves[another]).mean()),
            "largest_difference": float(np.abs(curves[one] - curves[another]).max()),
        }
        for one, another in itertools.combinations(curves, 2)
    ]
    for row in rows:
        print(f"{row['curves']}: {row['mean_difference']:.5f}, {row['largest_difference']:.5f}")
    shape = (settings.batch_size, settings.length + 1)
    turns = np.array([65, 108, 32])[np.arange(shape[1]) % 3]
    tokens = {
        "text": batches[settings.steps :],
        "three tokens in turn": [next_token_batch(np.broadcast_to(turns, shape))],
        "one repeated token": [next_token_batch(np.full(shape, 101))],
    }
    gradients = {name: parts[1] for name, parts in compiled.items()}
    for kind, batches_of_kind in tokens.items():
        rows += compare_gradients(kind, batches_of_kind, trained, gradients, (ours, theirs, other))
    write_results(settings.json, rows)


def text_batches(settings: Settings) -> list[Batch]:
    """Returns the batches of all steps and gradients: windows of files of the standard library."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(x for x in folder.glob("*.py") if x.is_file())
    text = np.frombuffer(b"".join(x.read_bytes() for x in files), np.uint8).astype(np.int32)
    random = np.random.default_rng(0)
    size = (settings.steps + settings.gradients, settings.batch_size, 1)
    starts = random.integers(0, len(text) - settings.length - 1, size)
    return [next_token_batch(text[x + np.arange(settings.length + 1)]) for x in starts]


def run_steps(step: Any, state: TrainState, batches: list[Batch]) -> tuple[np.ndarray, Any]:
    """Returns the losses of a training, and the parameters after it."""
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(metrics.loss)
    return np.array([float(x) for x in losses]), state.params


def compare_gradients(
    kind: str,
    batches: list[Batch],
    trained: list[Any],
    gradients: dict[str, Any],
    judged: tuple[str, str, str],
) -> list[Row]:
    """Prints and returns the five parameters whose gradients fare worst.

    Args:
      kind: what the tokens are.
      batches: to compare on.
      trained: parameters of the trained models.
      gradients: the compiled gradient of each way.
      judged: the ways to judge, to judge it by, and to compare the latter with.
    """
    logs: dict[str, dict[str, list[float]]] = {name: {} for name in judged}
    for params, batch in itertools.product(trained, batches):
        expected = gradients[EXACT](params, batch)
        for name in judged:
            errors = relative_errors(gradients[name](params, batch), expected)
            for parameter, error in errors.items():
                logs[name].setdefault(parameter, []).append(np.log(error))
    ours, theirs, other = (
        {parameter: np.reshape(x, (len(trained), len(batches))) for parameter, x in of_way.items()}
        for of_way in logs.values()
    )
    ratios = {name: geometric_mean(ours[name] - theirs[name]) for name in ours}
    of_other = {name: geometric_mean(other[name] - theirs[name]) for name in ours}
    median = float(np.median(list(ratios.values())))
    rows = []
    for name in sorted(ratios, key=lambda name: -ratios[name])[:5]:
        of_models = (ours[name] - theirs[name]).mean(1)
        row = {
            "tokens": kind,
            "parameter": name,
            "models": len(trained),
            "batches": len(batches),
            "error": geometric_mean(ours[name]),
            "error_to_judge_by": geometric_mean(theirs[name]),
            "ratio": ratios[name],
            "ratio_standard_error": ratios[name] * standard_error(of_models),
            "smallest_ratio": float(np.exp(of_models.min())),
            "largest_ratio": float(np.exp(of_models.max())),
            "median_ratio": median,
            "ratio_of_other": of_other[name],
            "ratio_of_other_standard_error": of_other[name]
            * standard_error((other[name] - theirs[name]).mean(1)),
        }
        rows.append(row)
        print(
            f"{kind}: {name} {row['error']:.2e} / {row['error_to_judge_by']:.2e} = "
            f"{row['ratio']:.2f} +- {row['ratio_standard_error']:.2f}, of models "
            f"{row['smallest_ratio']:.2f} to {row['largest_ratio']:.2f}, median {median:.2f}; "
            f"of the other program {row['ratio_of_other']:.2f} "
            f"+- {row['ratio_of_other_standard_error']:.2f}"
        )
    largest = max(of_other, key=lambda name: of_other[name])
    print(
        f"{kind}: the other program's largest ratio is {of_other[largest]:.2f}, of {largest}",
        flush=True,
    )
    return rows


def geometric_mean(logs: np.ndarray) -> float:
    """Returns the geometric mean of numbers whose logarithms are given."""
    return float(np.exp(np.mean(logs)))


def standard_error(values: np.ndarray) -> float:
    """Returns the standard error of the mean of at least two values."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


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
