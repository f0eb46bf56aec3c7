import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import key_update
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
PARAMETERS = ("removal_scale", "replacement_mix")
SHAPE = (2, 5, 3, 8)
INPUTS = draw(0, k=SHAPE, alpha=SHAPE, removal_scale=SHAPE[2:], replacement_mix=SHAPE[2:])


def formula(k, alpha, removal_scale, replacement_mix):
    removal_scale, replacement_mix = removal_scale[None, None], replacement_mix[None, None]
    scaled = k * removal_scale
    norm = jnp.sqrt(jnp.einsum("bthk,bthk->bth", scaled, scaled))
    kk = scaled / jnp.where(norm > 1e-12, norm, 1e-12)[..., None]
    return k * (1 - replacement_mix + alpha * replacement_mix), -kk, kk * alpha


# Largest errors measured: float32 outputs 5.2e-8, gradients 1.1e-7;
# bfloat16 outputs 1.6e-3, gradients 1.5e-3, of parameters 1.1e-7.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_formula(implementation, dtype):
    function = functools.partial(key_update, implementation=implementation)
    judge(function, formula, INPUTS, PARAMETERS, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("norm", [1e-6, 3e-12, 3e-13, 1e-18])
def test_small_norms(implementation, norm):
    # float32 represents no norm below 1e-19 by its square, but there the divisor is a constant.
    size = norm / np.sqrt(SHAPE[-1])
    inputs = INPUTS | {"k": np.sign(INPUTS["k"]) * float(jnp.bfloat16(size))}
    inputs["removal_scale"] = np.ones(SHAPE[2:])
    function = functools.partial(key_update, implementation=implementation)
    judge(function, formula, inputs, PARAMETERS, "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_key(implementation, dtype):
    arrays = {name: jnp.asarray(x, dtype) for name, x in INPUTS.items()}
    k = arrays["k"].at[1, 2].set(0)

    def loss(k, alpha, removal_scale, replacement_mix):
        new_k, a, b = key_update(
            k, alpha, removal_scale, replacement_mix, implementation=implementation
        )
        return (new_k + 2 * a + 3 * b).astype(jnp.float32).sum()

    names = ("alpha", "removal_scale", "replacement_mix")
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(k, *(arrays[name] for name in names))
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)
    alpha, scale, mix = (np.asarray(arrays[name], np.float64) for name in names)
    # The divisor is the constant 1e-12 there: kk = 1e12 * k * removal_scale.
    expected = (3 * alpha[1, 2] - 2) * 1e12 * scale + 1 + (alpha[1, 2] - 1) * mix
    assert_close(gradients[0][1, 2], expected, LIMITS[dtype][1], "k")


def test_removal_key_has_norm_one():
    _, a, _ = key_update(**{name: jnp.asarray(x) for name, x in INPUTS.items()})
    np.testing.assert_allclose(jnp.linalg.norm(a, axis=-1), 1, rtol=1e-6)


def test_keeps_only_its_inputs():
    inputs = [jnp.asarray(x) for x in INPUTS.values()]
    assert saved_for_backward(key_update, *inputs) == sorted(x.shape for x in inputs)


def test_transformations():
    check_transformations(key_update, INPUTS)


def test_shard_map():
    check_shard_map(key_update, INPUTS, PARAMETERS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": jnp.ones((2, 5, 24))}, ValueError, r"k must have 4 axes \[B, T, H, K\]"),
        ({"alpha": jnp.ones((2, 5, 3, 4))}, ValueError, r"alpha must have shape .* with K=8"),
        ({"removal_scale": jnp.ones(24)}, ValueError, r"removal_scale must have 2 axes"),
        ({"replacement_mix": jnp.ones((2, 8))}, ValueError, r"replacement_mix .* with H=3"),
        ({"alpha": jnp.ones(SHAPE, int)}, TypeError, r"alpha must have a dtype"),
        ({"implementation": ""}, ValueError, r"implementation='' is unknown"),
    ],
)
def test_wrong_calls(changes, error, message):
    inputs = {name: jnp.asarray(x) for name, x in INPUTS.items()}
    with pytest.raises(error, match=message):
        key_update(**inputs | changes)
