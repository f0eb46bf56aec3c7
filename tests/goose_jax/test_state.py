import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from goose_jax.config import RWKV7Config
from goose_jax.state import RWKV7State, init_state, join_states, take_rows
from tests.goose_jax.decoding import CONFIG


def numbered_state(batch_size, first=0):
    """Rows that are filled with their number."""
    numbers = jnp.arange(first, first + batch_size, dtype=jnp.float32)

    def fill(x):
        shape = (1, batch_size) + (1,) * (x.ndim - 2)
        return jnp.broadcast_to(numbers.reshape(shape), x.shape).astype(x.dtype)

    return jax.tree.map(fill, init_state(CONFIG, batch_size))


def assert_rows(state, numbers):
    for x in jax.tree.leaves(state):
        assert x.shape[:2] == (CONFIG.num_layers, len(numbers))
        for row, number in enumerate(numbers):
            assert (x[:, row] == number).all()


def test_rows_are_taken_in_order_and_as_often_as_asked():
    state = numbered_state(4)
    for rows in ([2], [0, 0, 0], [3, 1], range(4), np.array([1, 1])):
        assert_rows(take_rows(state, rows), list(rows))
    of_numpy = jax.tree.map(np.asarray, state)
    assert_rows(take_rows(of_numpy, [3]), [3])
    assert_rows(jax.jit(lambda state: take_rows(state, [1, 0]))(state), [1, 0])


def test_states_are_joined_in_order():
    states = [numbered_state(2, 5), numbered_state(1, 9), numbered_state(3)]
    assert_rows(join_states(states), [5, 6, 9, 0, 1, 2])
    assert_rows(join_states(states[1:2]), [9])
    low = init_state(RWKV7Config(vocab_size=1, hidden_size=64, num_layers=1), 1)
    joined = join_states([low, low])
    assert joined.time_shift.dtype == jnp.bfloat16
    assert joined.wkv.dtype == jnp.float32


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows must be a sequence of at least one row, got []"),
        (1, "rows must be a sequence of at least one row, got 1"),
        ([0, 4], "rows must hold integers in 0..3, got 4"),
        ([-1], "rows must hold integers in 0..3, got -1"),
        ([1.0], "rows must hold integers in 0..3, got 1.0"),
        ([True], "rows must hold integers in 0..3, got True"),
    ],
)
def test_wrong_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        take_rows(numbered_state(4), rows)


def test_what_is_no_state_is_named():
    state = numbered_state(1)
    with pytest.raises(TypeError, match="state must be an RWKV7State, got dict"):
        take_rows({}, [0])
    with pytest.raises(ValueError, match=r"state\.wkv must have shape .* B=1, got shape=\(2, 2,"):
        take_rows(dataclasses.replace(state, wkv=numbered_state(2).wkv), [0])
    with pytest.raises(TypeError, match=r"states\[1\] must be an RWKV7State, got NoneType"):
        join_states([state, None])
    for nothing in ([], state):
        with pytest.raises(ValueError, match="states must be a sequence of at least one state"):
            join_states(nothing)


def test_states_of_different_models_are_not_joined():
    state = numbered_state(1)
    other = init_state(RWKV7Config(vocab_size=1, hidden_size=64, num_layers=2, head_size=16), 2)
    with pytest.raises(ValueError, match=r"states\[2\]\.time_shift must have .* C=32, got shape="):
        join_states([state, state, other])
    low = RWKV7State(*(x.astype(jnp.bfloat16) for x in jax.tree.leaves(state)))
    with pytest.raises(TypeError, match=r"states\[1\]\.time_shift must have the dtype of"):
        join_states([state, low])
