"""Programs of deeper models are not larger."""

import jax
import jax.numpy as jnp
from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from pallas_kernels import cross_entropy


def config_of(num_layers):
    return RWKV7Config(vocab_size=50, hidden_size=64, num_layers=num_layers)


def lower_gradient(num_layers):
    """Lowers the gradient of the loss of a freshly traced model."""

    def loss(model, tokens):
        hidden, _ = model.hidden(tokens[:, :-1])
        head = model.head[...].astype(hidden.dtype)
        return cross_entropy(hidden, head, tokens[:, 1:]).mean()

    config = config_of(num_layers)
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((1, 33), jnp.int32)
    return jax.jit(jax.value_and_grad(loss)).lower(model, tokens)


def lower_initialisation(num_layers):
    config = config_of(num_layers)
    return jax.jit(lambda key: nnx.state(RWKV7(config, rngs=nnx.Rngs(key)))).lower(
        jax.random.key(0)
    )


def lines(lowered):
    return lowered.as_text().count("\n")


def test_gradient():
    assert lines(lower_gradient(24)) == lines(lower_gradient(6))  # the same program but for sizes


def test_initial_values():
    assert lines(lower_initialisation(24)) == lines(lower_initialisation(6))
