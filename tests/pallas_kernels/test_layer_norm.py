import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layer_norm, pre_norm
from tests.pallas_kernels.operator_checks import (
    LIMITS,
    check_shard_map,
    check_transformations,
    draw,
    judge,
    saved_for_backward,
)

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

IMPLEMENTATIONS = ("xla", "reference")
PARAMETERS = ("scale", "bias")
SHAPE = (2, 5, 12)
INPUTS = draw(0, x=SHAPE, scale=SHAPE[2:], bias=SHAPE[2:])


def formula(x, scale, bias):
    centred = x - jnp.einsum("btc->bt", x)[..., None] / x.shape[-1]
    variance = jnp.einsum("btc,btc->bt", centred, centred) / x.shape[-1]
    return centred / jnp.sqrt(variance + 1e-5)[..., None] * scale[None, None] + bias[None, None]


# Largest errors measured: float32 outputs 7e-8, gradients 1.4e-7;
# bfloat16 outputs 1.6e-3, gradients 1.6e-3, of parameters 1.1e-7.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_formula(implementation, dtype):
    function = functools.partial(layer_norm, implementation=implementation)
    judge(function, formula, INPUTS, PARAMETERS, dtype)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pre_norm_adds_the_gradient_of_its_input(implementation, dtype):
    function = functools.partial(pre_norm, implementation=implementation)

    def expected(x, **parameters):
        return formula(x, **parameters), x

    judge(function, expected, INPUTS, PARAMETERS, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_means(implementation):
    inputs = INPUTS | {"x": 1000 + np.round(10 * INPUTS["x"])}  # exact in float32
    function = functools.partial(layer_norm, implementation=implementation)
    judge(function, formula, inputs, PARAMETERS, "float32", (1e-5, 1e-4))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_constant_tokens_give_the_bias(implementation):
    x, scale, bias = (jnp.asarray(INPUTS[name]) for name in ("x", "scale", "bias"))
    y = layer_norm(jnp.full_like(x, 3.0), scale, bias, implementation=implementation)
    np.testing.assert_allclose(y, jnp.broadcast_to(bias, y.shape), atol=1e-6)


@pytest.mark.parametrize("norm", [layer_norm, pre_norm])
def test_keeps_only_its_inputs(norm):
    inputs = [jnp.asarray(x) for x in INPUTS.values()]
    assert saved_for_backward(norm, *inputs) == sorted(x.shape for x in inputs)


@pytest.mark.parametrize("norm", [layer_norm, pre_norm])
def test_transformations(norm):
    check_transformations(norm, INPUTS)


@pytest.mark.parametrize("norm", [layer_norm, pre_norm])
def test_shard_map(norm):
    check_shard_map(norm, INPUTS, PARAMETERS)


@pytest.mark.parametrize("norm", [layer_norm, pre_norm])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": jnp.ones((2, 12))}, ValueError, r"x must have 3 axes \[B, T, C\]"),
        ({"scale": jnp.ones(5)}, ValueError, r"scale must have shape .* with C=12"),
        ({"bias": jnp.ones((2, 12))}, ValueError, r"bias must have 1 axes"),
        ({"bias": jnp.ones(12, int)}, TypeError, r"bias must have a dtype"),
        ({"eps": 0.0}, ValueError, r"eps must be a number > 0 .* got 0.0"),
        ({"implementation": "triton"}, ValueError, r"implementation='triton' is unknown"),
    ],
)
def test_wrong_calls(norm, changes, error, message):
    inputs = {name: jnp.asarray(x) for name, x in INPUTS.items()}
    with pytest.raises(error, match=message):
        norm(**inputs | changes)
