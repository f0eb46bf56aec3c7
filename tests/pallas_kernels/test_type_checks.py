import jax.numpy as jnp
import jaxtyping
import pytest

from pallas_kernels.operators.token_shift.reference import token_shift_mix_reference


def test_implementations_are_checked_while_tests_run():
    x = jnp.ones((2, 5, 4))
    assert token_shift_mix_reference(x, jnp.ones((3, 4)), None, None)[1].shape == (2, 4)
    for mixes, state in ((jnp.ones((3, 5)), None), (jnp.ones((3, 4)), jnp.ones((3, 4)))):
        with pytest.raises(jaxtyping.TypeCheckError):
            token_shift_mix_reference(x, mixes, state, None)
