"""Operators whose backward keeps only their inputs, and recomputes what else it needs.

Because all implementations keep the same, the forward and the backward are chosen separately. An
operator has two tables, `FORWARD` and `BACKWARD`, from names to functions:

    results = forward(*inputs, **settings)
    gradients = backward(*inputs, cotangents=cotangents, **settings)

Inputs are arrays, or None for those that were not given; settings are known at trace time. A
backward returns one gradient for each input: None for those that are None or integers. It may
return gradients in the dtype that it computes in.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Choice, dispatch
from pallas_kernels.sharding import Layout, over_explicit_axes, vary_alike

KEPT = "pallas_kernels.kept"
"""Name of results that take long to compute and that the backward needs, of kernels for example.

A policy like `jax.checkpoint_policies.save_only_these_names(KEPT)` lets `jax.checkpoint` keep them.
"""

KEPT_STATES = "pallas_kernels.kept_states"
"""Name of states that take long to compute and are small: those between the pieces of rows that
`wkv7` divides over the devices of a `context_axis`. Any policy may keep them.
"""

type Forward[R] = Callable[..., R]
type Backward = Callable[..., tuple[Any, ...]]


def run_from_inputs[R](
    operator: str,
    forward: Mapping[str, Forward[R]],
    backward: Mapping[str, Backward],
    layout: Layout,
    implementation: Choice,
    *inputs: jax.Array | None,
    **settings: Any,
) -> R:
    """Runs an operator whose backward needs its inputs only.

    Args:
      operator: the operator's public name, for messages.
      forward: name to function, the preferred ones first.
      backward: the same for the gradients.
      layout: of inputs and results.
      implementation: one name for both directions, a pair of names, (forward, backward), or None,
        which takes in each direction the first that serves the call. "reference" for both leaves
        the gradient to JAX, which then also knows the derivatives of it.
      *inputs: of the operator.
      **settings: hashable, handed to both directions.

    Raises:
      ValueError: if a name is unknown.
      NotServed: if a named implementation does not serve this call. That of the backward is called
        when the gradient is traced.
      ExceptionGroup: of `NotServed`, if None was given and no implementation serves this call.
    """
    names = _split(operator, forward, backward, implementation)
    directions = (
        _Direction(operator, tuple(table.items()), name, tuple(settings.items()))
        for table, name in zip((forward, backward), names, strict=True)
    )

    def run(*inputs: jax.Array | None) -> R:
        inputs = vary_alike(*inputs)
        with jax.named_scope(operator):
            if names == ("reference", "reference"):
                return forward["reference"](*inputs, **settings)
            return _run(*directions, inputs)

    return over_explicit_axes(run, layout, *inputs)


def differentiate[R](reference: Forward[R]) -> Backward:
    """Returns the backward that JAX derives from a definition, computed from the inputs."""

    def backward(*inputs: Any, cotangents: Any, **settings: Any) -> tuple[Any, ...]:
        def run(*inputs: Any) -> R:
            inputs = jax.tree.map(jnp.asarray, inputs)  # JAX passes constants as NumPy arrays
            return reference(*inputs, **settings)

        _, pull_back = jax.vjp(run, *inputs)
        return pull_back(cotangents)

    return backward


def _split(
    operator: str, forward: Mapping[str, Any], backward: Mapping[str, Any], implementation: Choice
) -> tuple[str | None, str | None]:
    pair = implementation if isinstance(implementation, tuple) else (implementation,) * 2
    if len(pair) != 2:
        raise ValueError(f"{operator}: {implementation=} must have a forward and a backward")
    for direction, table, name in zip(
        ("forward", "backward"), (forward, backward), pair, strict=True
    ):
        if name is not None and (not isinstance(name, str) or name not in table):
            raise ValueError(
                f"{operator}: {implementation=} is unknown for the {direction}; give None or one "
                f"of {list(table)}, or a pair for forward and backward"
            )
    return pair


@dataclasses.dataclass(frozen=True)
class _Direction:
    """The chosen forward or backward; equal ones let JAX find what it traced before."""

    operator: str
    implementations: tuple[tuple[str, Callable[..., Any]], ...]
    name: str | None
    settings: tuple[tuple[str, Any], ...]

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        table, settings = dict(self.implementations), dict(self.settings)
        return dispatch(self.operator, table, self.name, *inputs, **more, **settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(forward: _Direction, backward: _Direction, inputs: tuple[Any, ...]) -> Any:
    del backward
    return forward(*inputs)


def _run_forward(
    forward: _Direction, backward: _Direction, inputs: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...]]:
    del backward
    return forward(*inputs), inputs


def _run_backward(
    forward: _Direction, backward: _Direction, inputs: tuple[Any, ...], cotangents: Any
) -> tuple[tuple[Any, ...]]:
    del forward
    gradients = backward(*inputs, cotangents=cotangents)
    # Round gradients of parameters only here, after they have been summed over all devices.
    return (
        tuple(
            gradient if x is None or not _is_float(x) else gradient.astype(x.dtype)
            for gradient, x in zip(gradients, inputs, strict=True)
        ),
    )


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


_run.defvjp(_run_forward, _run_backward)


__all__ = ["KEPT", "KEPT_STATES", "differentiate", "run_from_inputs"]
