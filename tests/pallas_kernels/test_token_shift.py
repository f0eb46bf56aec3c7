import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import token_shift_mix
from tests.pallas_kernels.operator_checks import (
    LIMITS,
    SEGMENT_IDS,
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
ROWS, LENGTH = SEGMENT_IDS.shape
CHANNELS = 6
PARAMETERS = ("mixes",)
INPUTS = draw(0, x=(ROWS, LENGTH, CHANNELS), mixes=(3, CHANNELS), state=(ROWS, CHANNELS))


def formula(x, mixes, state, segment_ids):
    shifted, last = shift_by_hand(x, state, segment_ids)
    valid = jnp.asarray(segment_ids != 0)[..., None]
    return *((x * (1 - mix) + shifted * mix) * valid for mix in mixes[:, None, None]), last


plain_formula = functools.partial(formula, segment_ids=np.ones_like(SEGMENT_IDS))
packed_formula = functools.partial(formula, segment_ids=SEGMENT_IDS)


# Largest errors measured: float32 outputs 0 (exact), gradients 6e-8;
# bfloat16 outputs 1.8e-3, gradients 2.7e-3, of the mixes 6e-8.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_formula(implementation, packed, dtype):
    function = functools.partial(
        token_shift_mix,
        implementation=implementation,
        segment_ids=SEGMENT_IDS if packed else None,
    )
    judge(function, packed_formula if packed else plain_formula, INPUTS, PARAMETERS, dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_zeros_come_before_the_first_token_without_a_state(packed):
    segment_ids = SEGMENT_IDS if packed else None
    x, mixes = jnp.asarray(INPUTS["x"]), jnp.asarray(INPUTS["mixes"])
    function = jax.jit(functools.partial(token_shift_mix, segment_ids=segment_ids))
    actual = function(x, mixes)
    expected = function(x, mixes, state=jnp.zeros_like(x[:, 0]))
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_counts_as_absent(implementation):
    x, mixes, state = (jnp.asarray(INPUTS[name]) for name in ("x", "mixes", "state"))
    row = 1
    kept = np.flatnonzero(SEGMENT_IDS[row])
    padded = jnp.where((SEGMENT_IDS[row] != 0)[None, :, None], x[row : row + 1], jnp.nan)

    def loss(x, mixes, state, segment_ids):
        mixed, last = token_shift_mix(
            x, mixes, state=state, segment_ids=segment_ids, implementation=implementation
        )
        weights = jnp.cumsum(jnp.where(segment_ids != 0, 1.0, 0.0), axis=1)[..., None]
        return sum((jnp.square(m) * weights).sum() for m in mixed) + last.sum(), (mixed, last)

    differentiate = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    rest = (mixes, state[row : row + 1])
    gradients, (mixed, last) = differentiate(padded, *rest, SEGMENT_IDS[row : row + 1])
    short_gradients, (short_mixed, short_last) = differentiate(
        padded[:, kept], *rest, SEGMENT_IDS[row : row + 1, kept]
    )
    np.testing.assert_array_equal(last, short_last)
    gaps = np.flatnonzero(SEGMENT_IDS[row] == 0)
    for long, short in [*zip(mixed, short_mixed, strict=True), (gradients[0], short_gradients[0])]:
        np.testing.assert_array_equal(long[:, kept], short)
        np.testing.assert_array_equal(long[:, gaps], 0)
    assert_close(gradients[1], short_gradients[1], 1e-6, "mixes")
    np.testing.assert_array_equal(gradients[2], short_gradients[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_crosses_segments(implementation):
    x, mixes, state = (jnp.asarray(INPUTS[name]) for name in ("x", "mixes", "state"))
    second = (SEGMENT_IDS == 2)[..., None]

    def loss(x, state):
        mixed, _ = token_shift_mix(
            x, mixes, state=state, segment_ids=SEGMENT_IDS, implementation=implementation
        )
        return sum(jnp.where(second, m, 0).sum() for m in mixed)

    dx, dstate = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, state)
    assert np.any(np.asarray(dx)[second[..., 0]])
    np.testing.assert_array_equal(jnp.where(second, 0, dx), 0)
    np.testing.assert_array_equal(dstate, 0)


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_with_a_carried_state_equal_the_whole(packed):
    # A state belongs to the segment that goes on, so pieces are cut within segments.
    segment_ids = SEGMENT_IDS[[0, 1, 4]] if packed else None
    x, mixes, state = (jnp.asarray(INPUTS[name]) for name in ("x", "mixes", "state"))
    x, state = x[:3], state[:3]

    def whole(x, mixes, state):
        mixed, last = token_shift_mix(x, mixes, state=state, segment_ids=segment_ids)
        return jnp.stack(mixed), last

    def pieces(x, mixes, state):
        parts = []
        for start, stop in ((0, 1), (1, 2), (2, 4), (4, 7), (7, 9)):
            ids = segment_ids[:, start:stop] if packed else None
            mixed, state = token_shift_mix(x[:, start:stop], mixes, state=state, segment_ids=ids)
            parts.append(jnp.stack(mixed))
        return jnp.concatenate(parts, axis=2), state

    def evaluate(function):
        outputs, pull_back = jax.vjp(function, x, mixes, state)
        return outputs, pull_back(jax.tree.map(jnp.sin, outputs))

    actual, expected = jax.jit(lambda: (evaluate(pieces), evaluate(whole)))()
    for piece, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(piece, reference, 1e-6, "pieces")


def test_keeps_only_its_inputs():
    x, mixes, state = (jnp.asarray(INPUTS[name]) for name in ("x", "mixes", "state"))
    function = functools.partial(token_shift_mix, segment_ids=SEGMENT_IDS)
    saved = saved_for_backward(lambda x, m, s: function(x, m, state=s), x, mixes, state)
    assert saved == sorted([x.shape, mixes.shape, state.shape])


def test_backward_gathers_and_does_not_scatter():
    x, mixes = jnp.asarray(INPUTS["x"]), jnp.asarray(INPUTS["mixes"])

    def operations(implementation, segment_ids):
        def loss(x, mixes):
            mixed, last = token_shift_mix(
                x, mixes, segment_ids=segment_ids, implementation=implementation
            )
            return sum(map(jnp.sum, mixed)) + last.sum()

        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, mixes))

    assert "scatter" in operations("reference", SEGMENT_IDS)
    packed = operations("xla", SEGMENT_IDS)
    assert "gather" in packed
    assert "scatter" not in packed
    assert "gather" not in operations("xla", None)


def test_transformations():
    function = functools.partial(token_shift_mix, segment_ids=SEGMENT_IDS)
    check_transformations(function, INPUTS)


def test_shard_map():
    check_shard_map(token_shift_mix, INPUTS, PARAMETERS)


X = jnp.ones((2, 5, 4))
MIXES = jnp.ones((3, 4))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": jnp.ones((2, 5))}, ValueError, r"x must have 3 axes"),
        ({"x": jnp.ones((2, 0, 4))}, ValueError, r"x must not be empty along T"),
        ({"x": X.astype(int)}, TypeError, r"x must have a dtype"),
        ({"x": [[1.0]]}, TypeError, r"x must be an array"),
        ({"mixes": jnp.ones((3, 5))}, ValueError, r"mixes must have shape \[M, C\] with C=4"),
        ({"state": jnp.ones((3, 4))}, ValueError, r"state must have shape \[B, C\] with B=2"),
        ({"state": jnp.ones((2, 4), jnp.bfloat16)}, TypeError, r"state must have the dtype of x"),
        ({"segment_ids": jnp.ones(5, int)}, ValueError, r"segment_ids must have 2 axes"),
        ({"segment_ids": jnp.ones((2, 5))}, TypeError, r"segment_ids must have an integer dtype"),
        ({"segment_ids": -jnp.ones((2, 5), int)}, ValueError, r"segment_ids must be >= 0"),
        ({"implementation": "cuda"}, ValueError, r"implementation='cuda' is unknown"),
    ],
)
def test_wrong_calls(changes, error, message):
    with pytest.raises(error, match=message):
        token_shift_mix(**{"x": X, "mixes": MIXES, **changes})
