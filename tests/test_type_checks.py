import jax.numpy as jnp
import jaxtyping
import pytest

from goose_jax import RWKV7Config
from goose_jax.nn import LayerNorm
from pallas_kernels.operators.token_shift.reference import token_shift_mix_reference


def test_implementations_are_checked_while_tests_run():
    x = jnp.ones((2, 5, 4))
    assert token_shift_mix_reference(x, jnp.ones((3, 4)), None, None)[1].shape == (2, 4)
    for mixes, state in ((jnp.ones((3, 5)), None), (jnp.ones((3, 4)), jnp.ones((3, 4)))):
        with pytest.raises(jaxtyping.TypeCheckError):
            token_shift_mix_reference(x, mixes, state, None)


def test_modules_are_checked_while_tests_run():
    norm = LayerNorm(RWKV7Config(vocab_size=9, hidden_size=128, num_layers=2))
    assert norm(jnp.ones((2, 3, 128))).shape == (2, 3, 128)
    with pytest.raises(jaxtyping.TypeCheckError):
        norm(jnp.ones((3, 128)))
