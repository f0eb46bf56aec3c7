import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import output_correction
from tests.pallas_kernels.operator_checks import (
    LIMITS,
    assert_close,
    check_shard_map,
    check_transformations,
    draw,
    judge,
    saved_for_backward,
)

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

IMPLEMENTATIONS = ("xla", "reference")
PARAMETERS = ("bonus", "norm_scale", "norm_bias")
KEYS, VALUES, HEADS = (2, 5, 3, 4), (2, 5, 3, 8), 3
INPUTS = draw(
    0,
    o=VALUES,
    r=KEYS,
    k=KEYS,
    v=VALUES,
    gate=VALUES,
    bonus=KEYS[2:],
    norm_scale=VALUES[2:],
    norm_bias=VALUES[2:],
)


def formula(o, r, k, v, gate, bonus, norm_scale, norm_bias, eps=64e-5):
    heads = []
    for h in range(HEADS):
        x = o[:, :, h]
        mean = x.mean(-1, keepdims=True)
        variance = (x * x).mean(-1, keepdims=True) - mean * mean
        normed = (x - mean) / jnp.sqrt(variance + eps) * norm_scale[None, None, h] + norm_bias[
            None, None, h
        ]
        weight = jnp.einsum("btk,btk,k->bt", r[:, :, h], k[:, :, h], bonus[h])
        heads.append((normed + weight[..., None] * v[:, :, h]) * gate[:, :, h])
    return jnp.stack(heads, axis=2)


# Largest errors measured: float32 outputs 5.6e-8, gradients 1.1e-7;
# bfloat16 outputs 1.6e-3, gradients 1.9e-3, of parameters 1.1e-7.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_formula(implementation, dtype):
    function = functools.partial(output_correction, implementation=implementation)
    judge(function, formula, INPUTS, PARAMETERS, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_eps(implementation):
    function = functools.partial(output_correction, implementation=implementation, eps=0.5)
    judge(function, functools.partial(formula, eps=0.5), INPUTS, PARAMETERS, "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_variance_is_stable_far_from_zero(implementation):
    # In float32 the squares of these numbers agree to their last digit: mean(o^2) - mean(o)^2
    # would have an error above the variance, which is 1.
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in INPUTS.items()}
    near = jnp.round(arrays.pop("o") * 8) / 8
    function = functools.partial(output_correction, implementation=implementation, **arrays)
    assert_close(function(near + 8192), function(near), 1e-6, "y")  # measured: 0


def test_equal_channels_do_not_divide_by_zero():
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in INPUTS.items()}
    arrays["o"] = jnp.ones_like(arrays["o"])
    gradients = jax.jit(jax.grad(lambda x: output_correction(**x).sum()))(arrays)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients.values())


def test_keeps_only_its_inputs():
    inputs = [jnp.asarray(x) for x in INPUTS.values()]
    assert saved_for_backward(output_correction, *inputs) == sorted(x.shape for x in inputs)


def test_transformations():
    check_transformations(output_correction, INPUTS)


def test_shard_map():
    check_shard_map(output_correction, INPUTS, PARAMETERS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"o": jnp.ones((2, 5, 24))}, ValueError, r"o must have 4 axes \[B, T, H, V\]"),
        ({"r": jnp.ones((1, *KEYS[1:]))}, ValueError, r"r must have shape .* with B=2"),
        ({"k": jnp.ones(VALUES)}, ValueError, r"k must have shape .* with K=4"),
        ({"v": jnp.ones(KEYS)}, ValueError, r"v must have shape .* with V=8"),
        ({"gate": jnp.ones(VALUES, jnp.bfloat16)}, TypeError, r"gate must have the dtype of o"),
        ({"bonus": jnp.ones((1, 1, 3, 4))}, ValueError, r"bonus must have 2 axes"),
        ({"norm_scale": jnp.ones((3, 4))}, ValueError, r"norm_scale must have .* with V=8"),
        ({"norm_bias": np.ones((3, 8), int)}, TypeError, r"norm_bias must have a dtype"),
        ({"eps": 0.0}, ValueError, r"eps must be a number > 0 .* got 0.0"),
        ({"eps": jnp.ones(())}, ValueError, r"eps must be a number > 0"),
        ({"implementation": 3}, ValueError, r"implementation=3 is unknown"),
    ],
)
def test_wrong_calls(changes, error, message):
    inputs = {name: jnp.asarray(x) for name, x in INPUTS.items()}
    with pytest.raises(error, match=message):
        output_correction(**inputs | changes)
