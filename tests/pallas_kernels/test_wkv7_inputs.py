import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import wkv7_inputs
from tests.pallas_kernels.operator_checks import (
    LIMITS,
    check_shard_map,
    check_transformations,
    draw,
    judge,
    saved_for_backward,
)

IMPLEMENTATIONS = ("xla", "reference")
TOKENS, HEADS = (2, 5, 3, 8), (3, 8)
RESIDUAL = ("v_first", "value_residual_logits", "value_residual_base")
PARAMETERS = (
    *("decay_base", "alpha_base", "value_residual_base"),
    *("removal_scale", "replacement_mix"),
)
INPUTS = draw(
    0,
    **dict.fromkeys(
        ("k", "v", "v_first", "decay_logits", "alpha_logits", "value_residual_logits"), TOKENS
    ),
    **dict.fromkeys(PARAMETERS, HEADS),
)
FIRST_LAYER = {name: x for name, x in INPUTS.items() if name not in RESIDUAL}
NO_RESIDUAL = dict.fromkeys(RESIDUAL)


def formula(
    k,
    v,
    decay_logits,
    alpha_logits,
    decay_base,
    alpha_base,
    removal_scale,
    replacement_mix,
    v_first=None,
    value_residual_logits=None,
    value_residual_base=None,
):
    decay_base, alpha_base, removal_scale, replacement_mix = (
        x[None, None] for x in (decay_base, alpha_base, removal_scale, replacement_mix)
    )
    alpha = 1 / (1 + jnp.exp(-alpha_logits - alpha_base))
    scaled = k * removal_scale
    kk = scaled / jnp.sqrt((scaled**2).sum(-1, keepdims=True))
    if v_first is not None:
        odds = jnp.exp(value_residual_logits + value_residual_base[None, None])
        v = (v + odds * v_first) / (1 + odds)
    log_decay = -1 / (np.exp(0.5) * (1 + jnp.exp(-decay_logits - decay_base)))
    new_k = k + k * (alpha - 1) * replacement_mix
    return log_decay, new_k, v, -kk, kk * alpha, new_k, v, v if v_first is None else v_first


# Largest errors measured: float32 outputs 1.3e-7, gradients 2.0e-7;
# bfloat16 outputs 1.8e-3, gradients 1.8e-3.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_formula(implementation, dtype):
    function = functools.partial(wkv7_inputs, implementation=implementation)
    judge(function, formula, INPUTS, PARAMETERS, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_first_layer_keeps_its_values(implementation):
    function = functools.partial(wkv7_inputs, **NO_RESIDUAL, implementation=implementation)
    judge(function, formula, FIRST_LAYER, PARAMETERS, "bfloat16")
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in FIRST_LAYER.items()}
    np.testing.assert_array_equal(function(**arrays).v, arrays["v"])


@pytest.mark.slow
def test_keeps_only_its_inputs():
    inputs = {name: jnp.asarray(x) for name, x in INPUTS.items()}
    saved = saved_for_backward(
        lambda *x: wkv7_inputs(**dict(zip(inputs, x, strict=True))), *inputs.values()
    )
    assert saved == sorted(x.shape for x in inputs.values())


@pytest.mark.slow
def test_transformations():
    check_transformations(wkv7_inputs, INPUTS)


@pytest.mark.slow
def test_shard_map():
    check_shard_map(wkv7_inputs, INPUTS, PARAMETERS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": jnp.ones((2, 5, 24))}, ValueError, r"k must have 4 axes \[B, T, H, K\]"),
        ({"v": jnp.ones((2, 4, 3, 8))}, ValueError, r"v must have .* with .*T=5"),
        ({"v": jnp.ones(TOKENS, jnp.bfloat16)}, TypeError, r"v must have the dtype of k"),
        ({"v_first": None}, ValueError, r"must all be given or all be None, got None for v_first"),
        ({"alpha_base": jnp.ones(3)}, ValueError, r"alpha_base must have 2 axes \[H, K\]"),
        ({"decay_logits": jnp.ones(TOKENS, int)}, TypeError, r"decay_logits must have a dtype of"),
        ({"implementation": "triton"}, ValueError, r"implementation='triton' is unknown"),
    ],
)
def test_wrong_calls(changes, error, message):
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in INPUTS.items()}
    with pytest.raises(error, match=message):
        wkv7_inputs(**inputs | changes)
