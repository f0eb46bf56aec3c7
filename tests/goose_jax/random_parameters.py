"""A model with random parameters, and the comparison of two models' parameters bit by bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from goose_jax import RWKV7, RWKV7Config

UNUSED = {f"blocks.time_mix.value_residual_{name}" for name in ("base", "down", "up")}
# All sizes differ, and the ranks are not the official ones.
CONFIG = RWKV7Config(
    vocab_size=13,
    hidden_size=96,
    num_layers=2,
    head_size=32,
    intermediate_size=40,
    decay_rank=5,
    alpha_rank=6,
    value_rank=7,
    gate_rank=8,
    head_norm_eps=64e-5,
)


def make_model(**settings):
    """A model without its initialisation, filled with random numbers: cheaper."""
    config = dataclasses.replace(CONFIG, **settings)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
    return nnx.merge(graphdef, params)


def flat_params(model):
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(path): np.asarray(param[...]) for path, param in params}


def assert_same_params(model, expected, *, unused=True):
    found, expected = flat_params(model), flat_params(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        actual = found[name]
        if name in UNUSED and not unused:
            assert not actual[0].any(), name
            actual, value = actual[1:], value[1:]
        assert actual.dtype == value.dtype, name
        assert actual.tobytes() == value.tobytes(), name
