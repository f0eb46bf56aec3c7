"""Neither the forward and backward pass nor the initial values cost more to compile with depth."""

import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from pallas_kernels import cross_entropy


def config_of(num_layers):
    return RWKV7Config(vocab_size=50, hidden_size=64, num_layers=num_layers)


def lower_gradient(num_layers):
    """The gradient of the loss of a freshly traced model."""

    def loss(model, tokens):
        hidden, _ = model.hidden(tokens[:, :-1])
        head = model.head[...].astype(hidden.dtype)
        return cross_entropy(hidden, head, tokens[:, 1:]).mean()

    config = config_of(num_layers)
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((1, 33), jnp.int32)
    return jax.jit(jax.value_and_grad(loss)).lower(model, tokens)


def compile_gradient(num_layers):
    """The seconds that it takes, and the number of lines of what is compiled."""
    start = time.process_time()  # of this process, so that others disturb it less
    lowered = lower_gradient(num_layers)
    lowered.compile()
    return time.process_time() - start, lowered.as_text().count("\n")


@pytest.mark.usefixtures("quick_to_compile")
def test_gradient():
    ratios = []
    while len(ratios) < 3:  # one undisturbed measurement suffices
        (shallow, lines_of_shallow), (deep, lines_of_deep) = map(compile_gradient, (6, 24))
        assert lines_of_deep == lines_of_shallow  # the same program but for sizes
        ratios.append(deep / shallow)
        if ratios[-1] <= 1.5:  # measured: 1.0
            return
    raise AssertionError(f"24 layers take longer to compile than 6: {ratios=}")


def test_initial_values():
    def lower(num_layers):
        config = config_of(num_layers)
        return jax.jit(lambda key: nnx.state(RWKV7(config, rngs=nnx.Rngs(key)))).lower(
            jax.random.key(0)
        )

    assert lower(24).as_text().count("\n") == lower(6).as_text().count("\n")
