"""How every operator is judged: by an independent formula in float64, and under transformations."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from tests.helpers import count_kernels, relative_rms

type Arrays = dict[str, np.ndarray]

LIMITS = {
    # dtype of the activations: relative RMS error of outputs and of activations' gradients. An
    # output that is computed exactly and then rounded has 2e-3 in bfloat16 and 2e-4 in float16.
    "float64": (1e-14, 1e-13),
    "float32": (1e-6, 2e-6),
    "bfloat16": (3e-3, 3e-3),
    "float16": (4e-4, 4e-4),
}
PARAMETER_GRADIENT_LIMIT = 2e-6
"""For float32 parameters of 16-bit activations: sums in 16 bits have errors of 1e-3 and more."""

SEGMENT_IDS = np.array(
    [
        [1, 1, 1, 2, 2, 3, 3, 3, 3],  # no padding
        [0, 0, 1, 1, 0, 1, 2, 2, 0],  # padding first, within a segment, last
        [0, 0, 0, 0, 0, 0, 0, 0, 0],  # nothing but padding
        [1, 2, 1, 2, 0, 2, 3, 4, 5],  # segments of one token; ids that come back
        [7, 7, 7, 7, 7, 7, 7, 7, 7],  # one segment
        [0, 0, 0, 0, 5, 0, 0, 0, 0],  # one token
    ],
    np.int32,
)
"""Packed rows, `[6, 9]`."""


def kernels_for_cuda(function: Callable, *arguments: Any) -> int:
    """Returns how many kernels a program for CUDA calls, as `count_kernels` counts."""
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return count_kernels(program)


def draw(seed: int, **shapes: tuple[int, ...]) -> Arrays:
    """Normal numbers in float64 that bfloat16 and everything above represent exactly."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(size=shape).astype(jnp.bfloat16).astype(np.float64)
        for name, shape in shapes.items()
    }


@functools.cache
def _differentiate(function: Callable) -> Callable:
    @jax.jit
    def run(inputs: dict, cotangents: tuple) -> tuple:
        outputs, pull_back = jax.vjp(lambda x: tuple(jax.tree.leaves(function(**x))), inputs)
        return outputs, *pull_back(cotangents)

    return run


def evaluate(function: Callable, inputs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Outputs, as a flat tuple, and the gradients of `inputs` for cotangents drawn by position."""
    shapes = jax.tree.leaves(jax.eval_shape(lambda x: function(**x), inputs))
    cotangents = tuple(
        jnp.asarray(draw(1000 + i, x=shape.shape)["x"], shape.dtype)
        for i, shape in enumerate(shapes)
    )
    return _differentiate(function)(inputs, cotangents)


def assert_close(x: Any, reference: Any, limit: float, name: str) -> None:
    if not np.any(np.asarray(reference)):
        assert not np.any(np.asarray(x)), f"{name} must be zero"
        return
    error = relative_rms(x, reference)
    assert error <= limit, f"{name}: relative RMS {error:.2e} is above {limit:.0e}"


def judge(
    function: Callable,
    formula: Callable,
    inputs: Arrays,
    parameters: tuple[str, ...],
    dtype: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Compares outputs and all gradients of `function` with those of `formula` in float64.

    Args:
      function: called with `inputs` by name; activations in `dtype`, parameters in float32 or
        above.
      formula: the same in float64, written independently.
      inputs: from `draw`.
      parameters: names of the inputs that are parameters.
      dtype: of the activations.
      limits: of the errors of outputs and gradients; None takes those above.
    """
    with jax.enable_x64(True):
        outputs, gradients = evaluate(formula, {n: jnp.asarray(x) for n, x in inputs.items()})
        expected = jax.tree.map(np.asarray, (outputs, gradients))
    parameter_dtype = "float64" if dtype == "float64" else "float32"
    dtypes = {name: parameter_dtype if name in parameters else dtype for name in inputs}
    with jax.enable_x64(dtype == "float64"):
        arrays = {name: jnp.asarray(x, dtypes[name]) for name, x in inputs.items()}
        outputs, gradients = evaluate(function, arrays)
    output_limit, gradient_limit = limits or LIMITS[dtype]
    for i, (output, reference) in enumerate(zip(outputs, expected[0], strict=True)):
        assert_close(output, reference, output_limit, f"output {i}")
    for name, gradient in gradients.items():
        assert gradient.dtype == dtypes[name], f"gradient of {name}"
        exact = limits is None and dtypes[name] == "float32"
        limit = PARAMETER_GRADIENT_LIMIT if exact else gradient_limit
        assert_close(gradient, expected[1][name], limit, f"gradient of {name}")


def shift_by_hand(
    x: jax.Array, state: jax.Array, segment_ids: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """The token before each one, `[B, T, C]`, and the last ones, `[B, C]`, found row by row."""
    zero, carried, first = 0, 1, 2  # positions in what is taken from below
    sources, last = [], []
    for row in segment_ids:
        before, segment = carried, None
        for t, identity in enumerate(row):
            if identity == 0:
                sources.append(zero)
                continue
            sources.append(before if segment in (None, identity) else zero)
            before, segment = first + t, identity
        last.append(before)
    stacked = jnp.concatenate([jnp.zeros_like(x[:, :1]), state[:, None], x], axis=1)
    rows = np.arange(len(segment_ids))
    taken = stacked[rows[:, None], np.reshape(sources, segment_ids.shape)]
    return taken, stacked[rows, np.array(last)]


def check_transformations(function: Callable, inputs: Arrays) -> None:
    """Checks gradients through checkpoint, in vmap, in scan, against plain calls."""
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
    variants = [jax.tree.map(lambda x, i=i: x[::-1] / 2**i, inputs) for i in range(4)]

    def loss(inputs: dict) -> jax.Array:
        leaves = jax.tree.leaves(function(**inputs))
        return sum(jnp.vdot(x, jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in leaves)

    plain = jax.jit(jax.value_and_grad(loss))
    expected = jax.tree.map(lambda *x: np.stack(x), *(plain(inputs) for inputs in variants))

    mapped = jax.vmap(jax.value_and_grad(jax.checkpoint(loss)))
    stacked = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 2, *x[0].shape), *variants)
    _, actual = jax.lax.scan(lambda _, inputs: (None, mapped(inputs)), None, stacked)
    for x, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(x.reshape(reference.shape), reference, 1e-6, "transformed")


def check_shard_map(function: Callable, inputs: Arrays, parameters: tuple[str, ...]) -> None:
    """Checks gradients with rows on several devices (one, if there is but one) and parameters on
    all, with the check that values vary over the mesh as they claim."""
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in inputs.items()}
    mesh = jax.make_mesh((min(2, jax.device_count()),), ("rows",), axis_types=(AxisType.Auto,))
    specs = {n: PartitionSpec() if n in parameters else PartitionSpec("rows") for n in inputs}

    def loss(inputs: dict) -> jax.Array:
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(function(**inputs)))

    sharded = jax.shard_map(
        lambda inputs: jax.lax.psum(loss(inputs), "rows"),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        check_vma=True,
    )
    expected = jax.jit(jax.value_and_grad(loss))(inputs)
    actual = jax.jit(jax.value_and_grad(sharded))(inputs)
    for x, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(x, reference, 1e-6, "shard_map")


def saved_for_backward(function: Callable, *inputs: Any) -> list[tuple[int, ...]]:
    """Shapes of the floating-point arrays that `jax.vjp` keeps, scalars left out, sorted."""
    pull_back = jax.eval_shape(lambda *inputs: jax.vjp(function, *inputs)[1], *inputs)
    leaves = jax.tree.leaves(pull_back)
    return sorted(x.shape for x in leaves if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim)
