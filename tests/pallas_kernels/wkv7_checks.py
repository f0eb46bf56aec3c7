"""Runs implementations of WKV7 on cases, and compares results with the definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import relative_rms
from tests.pallas_kernels.wkv7_cases import NAMES, Case, expected, make_cotangents, make_inputs


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def with_gradients(function, num_segments, scale, arrays, segment_ids, do, d_final):
    """Returns outputs, final state and gradients, named as in `expected`.

    Cases that differ in values only share one compiled program, if `function` is the same object.
    """

    def call(arrays):
        return function(**arrays, segment_ids=segment_ids, num_segments=num_segments, scale=scale)

    (o, final), backward = jax.vjp(call, arrays)
    (gradients,) = backward((do.astype(o.dtype), d_final.astype(final.dtype)))
    return {"o": o, "final_state": final} | {f"d_{n}": g for n, g in gradients.items()}


def run(function, case: Case, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Returns outputs, final state and gradients of one call, named as in `expected`."""
    inputs = make_inputs(case)
    arrays = {n: jnp.asarray(inputs[n], dtype) for n in NAMES}
    if inputs["initial_state"] is not None:
        state_dtype = jnp.promote_types(dtype, jnp.float32)
        arrays["initial_state"] = jnp.asarray(inputs["initial_state"], state_dtype)
    segment_ids, cotangents = inputs.get("segment_ids"), make_cotangents(case)
    return with_gradients(function, case.num_segments, case.scale, arrays, segment_ids, *cotangents)


def assert_matches(results, case: Case, forward_limit: float, gradient_limit: float) -> None:
    """Asserts that relative RMS errors against the definition in float64 keep to limits."""
    reference = expected(case)
    assert results.keys() == reference.keys()
    for name, x in results.items():
        limit = gradient_limit if name.startswith("d_") else forward_limit
        if not reference[name].any():
            assert not np.any(x), f"{name} must be zero"
            continue
        error = relative_rms(x, reference[name])
        assert error <= limit, f"{name}: relative RMS {error:.1e} is above {limit:.0e}"
