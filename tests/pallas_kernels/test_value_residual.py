import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import value_residual
from tests.pallas_kernels.operator_checks import (
    LIMITS,
    check_shard_map,
    check_transformations,
    draw,
    judge,
    saved_for_backward,
)

IMPLEMENTATIONS = ("xla", "reference")
SHAPE = (2, 5, 3, 8)
INPUTS = draw(0, v=SHAPE, v_first=SHAPE, logits=SHAPE)


def formula(v, v_first, logits):
    return (v * jnp.exp(-logits) + v_first) / (1 + jnp.exp(-logits))


# Largest errors measured: float32 outputs 4.3e-8, gradients 5.4e-8;
# bfloat16 outputs 1.6e-3, gradients 1.6e-3.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_formula(implementation, dtype):
    judge(
        functools.partial(value_residual, implementation=implementation), formula, INPUTS, (), dtype
    )


def test_logits_of_another_dtype_keep_it():
    inputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in INPUTS.items()}
    inputs["logits"] = inputs["logits"].astype(jnp.float32)
    output, pull_back = jax.vjp(value_residual, *inputs.values())
    assert output.dtype == jnp.bfloat16
    assert [x.dtype for x in pull_back(output)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_logits(implementation):
    v, v_first = (jnp.asarray(INPUTS[name]) for name in ("v", "v_first"))
    function = functools.partial(value_residual, implementation=implementation)
    np.testing.assert_array_equal(function(v, v_first, jnp.full(SHAPE, -1e4)), v)
    np.testing.assert_allclose(function(v, v_first, jnp.full(SHAPE, 1e4)), v_first, rtol=1e-5)
    gradients = jax.grad(lambda *x: function(*x).sum(), (0, 1, 2))(v, v_first, jnp.full(SHAPE, 1e4))
    for gradient, expected in zip(gradients, (0, 1, 0), strict=True):
        np.testing.assert_array_equal(gradient, expected)


def test_keeps_only_its_inputs():
    inputs = [jnp.asarray(x) for x in INPUTS.values()]
    assert saved_for_backward(value_residual, *inputs) == [SHAPE] * 3


def test_transformations():
    check_transformations(value_residual, INPUTS)


def test_shard_map():
    check_shard_map(value_residual, INPUTS, ())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v": jnp.ones((2, 5, 24))}, ValueError, r"v must have 4 axes \[B, T, H, V\]"),
        ({"v_first": jnp.ones((2, 4, 3, 8))}, ValueError, r"v_first must have shape .* with T=5"),
        ({"v_first": jnp.ones(SHAPE, jnp.float16)}, TypeError, r"v_first must have the dtype of v"),
        ({"logits": jnp.ones((5, 3, 8))}, ValueError, r"logits must have 4 axes"),
        ({"logits": None}, TypeError, r"logits must be an array, got NoneType"),
        ({"implementation": "XLA"}, ValueError, r"implementation='XLA' is unknown"),
    ],
)
def test_wrong_calls(changes, error, message):
    inputs = {name: jnp.asarray(x) for name, x in INPUTS.items()}
    with pytest.raises(error, match=message):
        value_residual(**inputs | changes)
