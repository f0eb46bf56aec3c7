import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import norm_shift_mix
from pallas_kernels.hopper.token_walk import Step, Walk, blocks_in_order, order_of
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
C = 12
PARAMETERS = ("mixes", "scale", "bias")
INPUTS = draw(0, x=(ROWS, LENGTH, C), scale=(C,), bias=(C,), mixes=(3, C), state=(ROWS, C))
ARRAYS = {name: jnp.asarray(x, jnp.float32) for name, x in INPUTS.items()}


def formula(x, scale, bias, mixes, state, segment_ids):
    centred = x - jnp.einsum("btc->bt", x)[..., None] / x.shape[-1]
    variance = jnp.einsum("btc,btc->bt", centred, centred) / x.shape[-1]
    normed = centred / jnp.sqrt(variance + 1e-5)[..., None] * scale[None, None] + bias[None, None]
    shifted, last = shift_by_hand(normed, state, segment_ids)
    valid = jnp.asarray(segment_ids != 0)[..., None]
    mixed = ((normed * (1 - mix) + shifted * mix) * valid for mix in mixes[:, None, None])
    return *mixed, last, x


# Largest errors measured: float32 outputs 7e-8, gradients 1.6e-7;
# bfloat16 outputs 1.8e-3, gradients 2.0e-3, of parameters 1.5e-7.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_formula(implementation, packed, dtype):
    function = functools.partial(
        norm_shift_mix,
        implementation=implementation,
        segment_ids=SEGMENT_IDS if packed else None,
    )
    segment_ids = SEGMENT_IDS if packed else np.ones_like(SEGMENT_IDS)
    expected = functools.partial(formula, segment_ids=segment_ids)
    judge(function, expected, INPUTS, PARAMETERS, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_means(implementation):
    inputs = INPUTS | {"x": 1000 + np.round(10 * INPUTS["x"])}  # exact in float32
    function = functools.partial(norm_shift_mix, implementation=implementation)
    expected = functools.partial(formula, segment_ids=np.ones_like(SEGMENT_IDS))
    judge(function, expected, inputs, PARAMETERS, "float32", (1e-5, 1e-4))


@pytest.mark.parametrize("packed", [False, True])
def test_zeros_come_before_the_first_token_without_a_state(packed):
    function = functools.partial(norm_shift_mix, segment_ids=SEGMENT_IDS if packed else None)
    arrays = {name: x for name, x in ARRAYS.items() if name != "state"}
    actual = jax.jit(function)(**arrays)
    expected = jax.jit(function)(**arrays, state=jnp.zeros_like(ARRAYS["state"]))
    for x, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(x, reference, 1e-6, "without a state")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_whatever_stands_in_padding(implementation):
    valid = (SEGMENT_IDS != 0)[..., None]

    def loss(arrays):
        mixed, state, _ = norm_shift_mix(
            **arrays, segment_ids=SEGMENT_IDS, implementation=implementation
        )
        return sum(jnp.square(x).sum() for x in mixed) + jnp.square(state).sum()

    run = jax.jit(jax.value_and_grad(loss))
    expected, actual = (
        run(ARRAYS | {"x": jnp.where(valid, ARRAYS["x"], padding)}) for padding in (0, jnp.nan)
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    np.testing.assert_array_equal(np.where(valid, 0, actual[1]["x"]), 0)


@pytest.mark.parametrize("packed", [False, True])
def test_pieces_with_a_carried_state_equal_the_whole(packed):
    # A state belongs to the segment that goes on, so pieces are cut within segments.
    segment_ids = SEGMENT_IDS[[0, 1, 4]] if packed else None
    arrays = ARRAYS | {name: ARRAYS[name][:3] for name in ("x", "state")}

    def whole(arrays):
        mixed, last, x = norm_shift_mix(**arrays, segment_ids=segment_ids)
        return jnp.stack(mixed), last, x

    def pieces(arrays):
        parts, state = [], arrays["state"]
        for start, stop in ((0, 1), (1, 2), (2, 4), (4, 7), (7, 9)):
            ids = segment_ids[:, start:stop] if packed else None
            piece = arrays | {"x": arrays["x"][:, start:stop], "state": state}
            mixed, state, x = norm_shift_mix(**piece, segment_ids=ids)
            parts.append(jnp.stack([*mixed, x]))
        joined = jnp.concatenate(parts, axis=2)
        return joined[:-1], state, joined[-1]

    def evaluate(function):
        outputs, pull_back = jax.vjp(function, arrays)
        return outputs, pull_back(jax.tree.map(jnp.sin, outputs))

    actual, expected = jax.jit(lambda: (evaluate(pieces), evaluate(whole)))()
    for piece, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(piece, reference, 2e-6, "pieces")


def test_keeps_only_its_inputs():
    function = functools.partial(norm_shift_mix, segment_ids=SEGMENT_IDS)
    saved = saved_for_backward(lambda arrays: function(**arrays), ARRAYS)
    assert saved == sorted(x.shape for x in ARRAYS.values())


def test_transformations():
    check_transformations(functools.partial(norm_shift_mix, segment_ids=SEGMENT_IDS), INPUTS)


def test_shard_map():
    check_shard_map(norm_shift_mix, INPUTS, PARAMETERS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": jnp.ones((2, 12))}, ValueError, r"x must have 3 axes \[B, T, C\]"),
        ({"scale": jnp.ones(5)}, ValueError, r"scale must have shape .* with C=12"),
        ({"bias": jnp.ones(12, int)}, TypeError, r"bias must have a dtype"),
        ({"mixes": jnp.ones((3, 5))}, ValueError, r"mixes must have shape \[M, C\] with C=12"),
        ({"eps": 0.0}, ValueError, r"eps must be a number > 0 .* got 0.0"),
        ({"state": jnp.ones((3, 12))}, ValueError, r"state must have shape \[B, C\] with B=6"),
        ({"segment_ids": jnp.ones(5, int)}, ValueError, r"segment_ids must have 2 axes"),
        ({"implementation": "cuda"}, ValueError, r"implementation='cuda' is unknown"),
    ],
)
def test_wrong_calls(changes, error, message):
    with pytest.raises(error, match=message):
        norm_shift_mix(**ARRAYS | changes)


def test_blocks_read_all_tokens_in_order(monkeypatch):
    order = np.asarray(order_of(jnp.asarray(SEGMENT_IDS)))
    own = []
    for block in range(4):
        monkeypatch.setattr(jax.lax, "axis_index", lambda _, block=block: jnp.int32(block))
        walk = Walk(ROWS * LENGTH, LENGTH, 4, 6, idle=1, after=1)
        steps = walk.steps()
        read = [walk.step(jnp.int32(n), steps, order) for n in range(int(steps))]
        places = [int(step.place) for step in read]
        own += [place for place, step in zip(places, read, strict=True) if step.is_own]
        for before, step in itertools.pairwise(read):
            if step.continues and step.is_own:
                check_neighbours(int(before.place), int(step.place))
    assert sorted(own) == list(range(ROWS * LENGTH))
    ids = SEGMENT_IDS.reshape(-1)
    for step in map(Step, jnp.asarray(order)):
        assert bool(step.is_token) == (ids[int(step.place)] != 0)


@pytest.mark.parametrize(
    ("count", "blocks", "chunk"), [(7, 1, 7), (4096, 512, 8), (2**20, 2**16 - 1, 9)]
)
def test_blocks_in_order_have_room_in_a_grid(count, blocks, chunk):
    walk = Walk(count, count, blocks_in_order(count, 8), 8)
    assert (walk.blocks, walk.chunk) == (blocks, chunk)


def check_neighbours(before: int, place: int) -> None:
    """Checks that two tokens have the same id, and nothing but padding between them."""
    ids = SEGMENT_IDS.reshape(-1)
    assert before < place
    assert before // LENGTH == place // LENGTH
    assert ids[before] == ids[place]
    assert not ids[before + 1 : place].any()
