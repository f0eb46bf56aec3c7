"""The program that makes a deeper model is not larger; `test_train_step.py` says it of the step."""

import jax
from flax import nnx

from goose_jax import RWKV7, RWKV7Config


def lower_initialisation(num_layers):
    config = RWKV7Config(vocab_size=50, hidden_size=64, num_layers=num_layers)
    return jax.jit(lambda key: nnx.state(RWKV7(config, rngs=nnx.Rngs(key)))).lower(
        jax.random.key(0)
    )


def lines(lowered):
    return lowered.as_text().count("\n")


def test_initial_values():
    assert lines(lower_initialisation(24)) == lines(lower_initialisation(6))
