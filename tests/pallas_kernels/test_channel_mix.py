import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import channel_mix, feed_forward
from tests.pallas_kernels.operator_checks import (
    assert_close,
    check_shard_map,
    check_transformations,
    draw,
    judge,
    saved_for_backward,
    shift_by_hand,
)

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

IMPLEMENTATIONS = ("xla", "reference")
SEGMENT_IDS = np.array(
    [[1, 1, 2, 2, 2, 3], [0, 1, 0, 1, 2, 0], [0, 0, 0, 0, 0, 0], [1, 2, 1, 0, 1, 1]], np.int32
)
ROWS, LENGTH = SEGMENT_IDS.shape
CHANNELS, INNER = 8, 24
PARAMETERS = ("mix", "key_weight", "value_weight")
INPUTS = draw(
    0,
    x=(ROWS, LENGTH, CHANNELS),
    mix=(CHANNELS,),
    key_weight=(CHANNELS, INNER),
    value_weight=(INNER, CHANNELS),
    state=(ROWS, CHANNELS),
)


def formula(x, mix, key_weight, value_weight, state, segment_ids):
    shifted, last = shift_by_hand(x, state, segment_ids)
    mix = mix[None, None]
    key = (x * (1 - mix) + shifted * mix) @ key_weight
    y = (key * key * (key > 0)) @ value_weight
    return y * jnp.asarray(segment_ids != 0)[..., None], last


plain_formula = functools.partial(formula, segment_ids=np.ones_like(SEGMENT_IDS))
packed_formula = functools.partial(formula, segment_ids=SEGMENT_IDS)

# Errors of one rounding each of the mixed tokens, the activation and its square.
LIMITS = {
    "float64": (1e-14, 1e-13),
    "float32": (1e-6, 2e-6),
    "bfloat16": (8e-3, 8e-3),
    "float16": (1e-3, 1e-3),
}


# Largest errors measured: float32 outputs 1.1e-7, gradients 1.4e-7;
# bfloat16 outputs 4.7e-3, gradients 5.2e-3.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_formula(implementation, packed, dtype):
    segment_ids = SEGMENT_IDS if packed else None
    function = functools.partial(
        channel_mix, implementation=implementation, segment_ids=segment_ids
    )
    judge(
        function,
        packed_formula if packed else plain_formula,
        INPUTS,
        ("mix",),
        dtype,
        LIMITS[dtype],
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_counts_as_absent(implementation):
    arrays = {name: jnp.asarray(x) for name, x in INPUTS.items()}
    row, segment_ids = slice(1, 2), SEGMENT_IDS[1:2]
    kept, gaps = np.flatnonzero(segment_ids), np.flatnonzero(segment_ids == 0)
    arrays["state"] = arrays["state"][row]
    arrays["x"] = jnp.where(segment_ids[..., None] != 0, arrays["x"][row], jnp.nan)

    @jax.jit
    def evaluate(arrays, segment_ids):
        function = functools.partial(
            channel_mix, segment_ids=segment_ids, implementation=implementation
        )
        outputs, pull_back = jax.vjp(lambda x: function(**x), arrays)
        weights = jnp.cumsum(segment_ids != 0, axis=1)[..., None] * jnp.ones_like(outputs[0])
        return *outputs, pull_back((weights, jnp.ones_like(outputs[1])))[0]

    y, last, gradients = evaluate(arrays, segment_ids)
    short = evaluate(arrays | {"x": arrays["x"][:, kept]}, segment_ids[:, kept])
    np.testing.assert_array_equal(y[:, gaps], 0)
    np.testing.assert_array_equal(gradients["x"][:, gaps], 0)
    gradients["x"] = gradients["x"][:, kept]
    for x, reference in zip(
        jax.tree.leaves((y[:, kept], last, gradients)), jax.tree.leaves(short), strict=True
    ):
        assert_close(x, reference, 1e-6, "without padding")


def test_pieces_with_a_carried_state_equal_the_whole():
    arrays = {name: jnp.asarray(x) for name, x in INPUTS.items()}

    def pieces(x, state, **weights):
        parts = []
        for start, stop in ((0, 1), (1, 4), (4, 6)):
            y, state = channel_mix(x[:, start:stop], state=state, **weights)
            parts.append(y)
        return jnp.concatenate(parts, axis=1), state

    def evaluate(function):
        outputs, pull_back = jax.vjp(lambda x: function(**x), arrays)
        return outputs, pull_back(jax.tree.map(jnp.sin, outputs))

    actual, expected = jax.jit(lambda: (evaluate(pieces), evaluate(channel_mix)))()
    for x, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(x, reference, 1e-6, "pieces")


def test_keeps_its_inputs_and_one_activation():
    inputs = [jnp.asarray(x) for x in INPUTS.values()]
    function = functools.partial(channel_mix, segment_ids=SEGMENT_IDS)
    saved = saved_for_backward(lambda *x: function(*x[:4], state=x[4]), *inputs)
    shapes = [x.shape for x in inputs] + [(ROWS, LENGTH, INNER)]
    assert saved == sorted(shapes)


def test_transformations():
    check_transformations(functools.partial(channel_mix, segment_ids=SEGMENT_IDS), INPUTS)


def test_shard_map():
    inputs = INPUTS | {"ids": SEGMENT_IDS.astype(np.float64)}

    def function(ids, **arrays):
        return channel_mix(**arrays, segment_ids=ids.astype(int))

    check_shard_map(function, inputs, PARAMETERS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": jnp.ones((4, 8))}, ValueError, r"x must have 3 axes \[B, T, C\]"),
        ({"mix": jnp.ones((1, 1, 8))}, ValueError, r"mix must have 1 axes"),
        ({"key_weight": jnp.ones((24, 8))}, ValueError, r"key_weight must have .* with C=8"),
        ({"value_weight": jnp.ones((8, 24))}, ValueError, r"value_weight must have .* with F=24"),
        (
            {"key_weight": jnp.ones((8, 24), jnp.bfloat16)},
            TypeError,
            r"key_weight must have the dtype of x",
        ),
        ({"state": jnp.ones((4, 1, 8))}, ValueError, r"state must have 2 axes"),
        ({"segment_ids": jnp.ones((4, 5), int)}, ValueError, r"segment_ids must have .* with T=6"),
        ({"implementation": "gpu"}, ValueError, r"implementation='gpu' is unknown"),
    ],
)
def test_wrong_calls(changes, error, message):
    inputs = {name: jnp.asarray(x) for name, x in INPUTS.items()}
    with pytest.raises(error, match=message):
        channel_mix(**inputs | changes)


WEIGHTS = ("key_weight", "value_weight")


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_feed_forward_equals_the_formula(implementation, dtype):
    inputs = {name: INPUTS[name] for name in ("x", *WEIGHTS)}
    function = functools.partial(feed_forward, implementation=implementation)

    def expected(x, key_weight, value_weight):
        key = x @ key_weight
        return (key * key * (key > 0)) @ value_weight

    judge(function, expected, inputs, (), dtype, LIMITS[dtype])


def test_feed_forward_under_transformations():
    inputs = {name: INPUTS[name] for name in ("x", *WEIGHTS)}
    check_transformations(feed_forward, inputs)
    check_shard_map(feed_forward, inputs, WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.ones((2, 8), np.float32)}, ValueError, r"x must have 3 axes"),
        ({"value_weight": jnp.ones((5, 8))}, ValueError, r"value_weight must have shape .* F=24"),
        ({"implementation": "cuda"}, ValueError, r"implementation='cuda' is unknown"),
    ],
)
def test_wrong_calls_of_feed_forward(changes, error, message):
    arrays = {name: jnp.asarray(INPUTS[name], jnp.float32) for name in ("x", *WEIGHTS)}
    with pytest.raises(error, match=message):
        feed_forward(**arrays | changes)
