"""Every implementation of WKV7 against the float64 definition, and under JAX's transformations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import wkv7, wkv7_recurrent
from tests.helpers import relative_rms
from tests.pallas_kernels.wkv7_cases import (
    NAMES,
    RWKV7_BOUND,
    Case,
    expected,
    make_cotangents,
    make_inputs,
)
from tests.pallas_kernels.wkv7_checks import assert_matches, run, with_gradients

FORWARD_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4  # float32, relative RMS

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="measures CPUs")

IMPLEMENTATIONS = {
    "reference": functools.partial(wkv7, implementation="reference"),
    "xla": functools.partial(wkv7, implementation="xla"),
    "xla bounded": functools.partial(wkv7, implementation="xla", min_log_decay=RWKV7_BOUND),
    "recurrent": functools.partial(wkv7_recurrent, implementation="xla"),
}


def slow_if(condition: bool, *values):
    """Returns a case that is marked slow on a condition."""
    return pytest.param(*values, marks=[pytest.mark.slow] if condition else [])


# The form without a bound of the decay takes longest to compile. Its rarer programs run in CI only.
ALL_WITH_XLA_SLOW = [slow_if(name == "xla", name) for name in IMPLEMENTATIONS]

PACKED = (
    # Boundaries before, at and after the edge of a chunk of 64, one-token segments, padding first,
    # in the middle of a segment, between segments and last; a row of one segment; only padding.
    ((0, 3), (1, 60), (2, 1), (3, 1), (4, 64), (0, 5), (4, 2), (0, 1), (5, 50), (0, 13)),
    ((7, 64), (3, 64), (2, 72)),
    ((1, 200),),
    ((0, 200),),
)
PER_SEGMENT = (
    ((0, 2), (3, 61), (1, 1), (0, 4), (1, 2), (5, 66)),
    ((2, 64), (4, 64), (5, 1), (0, 7)),
)

CASES = {
    "one token": Case((2, 1, 2, 64, 64)),
    "15 tokens, K 32": Case((1, 15, 2, 32, 32), scale=0.5),
    "64 tokens, V 32": Case((1, 64, 2, 64, 32), state=False),
    "65 tokens, V 96": Case((2, 65, 1, 32, 96)),
    "200 tokens, K 128": Case((1, 200, 1, 128, 128)),
    "K 256, V 8": Case((1, 70, 1, 256, 8)),
    "packed": Case((4, 200, 1, 64, 32), lengths=PACKED),
    "packed, mixed decay": Case((4, 200, 1, 64, 32), "mixed", lengths=PACKED),
    "state per segment": Case((2, 136, 1, 64, 32), lengths=PER_SEGMENT, num_segments=6),
    "state per segment, mixed decay": Case(
        (2, 136, 1, 64, 32), "mixed", lengths=PER_SEGMENT, num_segments=6
    ),
    "strong decay in later chunks": Case((1, 600, 4, 16, 16), "late"),
    "tiny decay": Case((1, 200, 1, 64, 64), "tiny"),
    "decay at the bound": Case((1, 200, 1, 64, 64), "bound"),
    "strong decay": Case((1, 200, 1, 64, 64), "strong"),
    "reset at every token": Case((1, 200, 1, 64, 64), "reset"),
    "mixed decay": Case((1, 200, 1, 64, 64), "mixed"),
    "repeated token": Case((1, 200, 1, 64, 64), "tiny", tokens="repeated"),
    "repeated token, decaying": Case((1, 200, 1, 64, 64), tokens="repeated"),
    "nearly repeated token": Case((1, 200, 1, 64, 64), "tiny", tokens="near"),
    "periodic tokens": Case((1, 200, 1, 64, 64), "tiny", tokens="periodic"),
}
SLOW_BY_XLA = {
    "15 tokens, K 32",
    "64 tokens, V 32",
    "65 tokens, V 96",
    "200 tokens, K 128",
    "K 256, V 8",
    "packed",
    "packed, mixed decay",
    "tiny decay",
    "decay at the bound",
    "state per segment",
    "state per segment, mixed decay",
    "strong decay in later chunks",
}
"""Cases whose chunked program without a bound is marked slow: each compiles for seconds."""

# The largest relative RMS errors measured in float32: 1.6e-6 in outputs and states (the scans, on
# repeated tokens); of the chunked form 3.5e-7, and 1.3e-6 in gradients (that of a, same tokens).


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        slow_if(implementation == "xla" and name in SLOW_BY_XLA, name, implementation)
        for name, case in CASES.items()
        for implementation in IMPLEMENTATIONS
        if implementation != "xla bounded" or case.min_log_decay is not None
    ],
)
@pytest.mark.usefixtures("quick_to_compile")
def test_equals_the_definition(name, implementation):
    case = CASES[name]
    results = run(IMPLEMENTATIONS[implementation], case)
    assert_matches(results, case, FORWARD_LIMIT, GRADIENT_LIMIT)


@pytest.mark.parametrize("implementation", ["xla bounded", slow_if(True, "xla")])
@pytest.mark.parametrize("tokens", ["random", "repeated"])
@pytest.mark.usefixtures("quick_to_compile")
def test_long_sequences(tokens, implementation):
    # Measured: 3.4e-7 forward and 5.7e-7 in gradients.
    case = Case((1, 8192, 1, 32, 32), tokens=tokens)
    results = run(IMPLEMENTATIONS[implementation], case)
    assert_matches(results, case, FORWARD_LIMIT, GRADIENT_LIMIT)


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(function, arrays, do):
    o, backward = jax.vjp(lambda x: function(**x)[0], arrays)
    return o, *backward(do)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        slow_if(name == "xla", name, dtype)
        for name in IMPLEMENTATIONS
        for dtype in (jnp.bfloat16, jnp.float16)
    ],
)
@pytest.mark.usefixtures("quick_to_compile")
def test_16_bit_inputs_lose_only_their_own_rounding(implementation, dtype):
    case = Case((1, 130, 2, 64, 64))
    rounded = {
        n: np.asarray(jnp.asarray(x, dtype), np.float32) for n, x in make_inputs(case).items()
    }
    do = make_cotangents(case)[0].astype(jnp.bfloat16)

    def call(implementation, dtype):
        arrays = {n: jnp.asarray(rounded[n], dtype) for n in NAMES}
        return output_and_gradients(IMPLEMENTATIONS[implementation], arrays, do.astype(dtype))

    o, gradients = call(implementation, dtype)
    o32, gradients32 = call("reference", jnp.float32)
    limit = 3e-3 if dtype == jnp.bfloat16 else 4e-4  # rounding alone: 1.7e-3 and 2.1e-4
    assert o.dtype == dtype
    assert relative_rms(o, o32) < limit
    for name in NAMES:
        assert gradients[name].dtype == dtype
        assert relative_rms(gradients[name], gradients32[name]) < limit


@pytest.mark.parametrize("implementation", ALL_WITH_XLA_SLOW)
@pytest.mark.usefixtures("quick_to_compile")
def test_float64(implementation):
    case = Case((1, 70, 1, 32, 32))
    with jax.enable_x64():
        results = run(IMPLEMENTATIONS[implementation], case, jnp.float64)
        assert results["o"].dtype == results["final_state"].dtype == jnp.float64
        assert_matches(results, case, 1e-13, 1e-12)  # measured: 3e-16 and 2.4e-15


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.slow
def test_log_decay_may_have_a_dtype_of_its_own():
    case = Case((1, 20, 1, 16, 16))
    inputs = make_inputs(case)
    arrays = {
        n: jnp.asarray(inputs[n], jnp.float32 if n == "log_decay" else jnp.bfloat16) for n in NAMES
    }
    function = IMPLEMENTATIONS["xla bounded"]
    gradients = jax.grad(lambda x: function(**x)[0].astype(jnp.float32).sum())(arrays)
    assert gradients["log_decay"].dtype == jnp.float32
    assert gradients["r"].dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation", ALL_WITH_XLA_SLOW)
@pytest.mark.usefixtures("quick_to_compile")
def test_pieces_with_carried_state_equal_the_whole(implementation):
    case = Case((1, 100, 1, 32, 16))
    function = IMPLEMENTATIONS[implementation]
    arrays = {n: jnp.asarray(make_inputs(case)[n], jnp.float32) for n in NAMES}
    state, pieces = jnp.asarray(make_inputs(case)["initial_state"], jnp.float32), []
    for start, stop in ((0, 1), (1, 70), (70, 100)):
        piece = {n: x[:, start:stop] for n, x in arrays.items()}
        o, state = jax.jit(function)(**piece, initial_state=state)
        pieces.append(o)
    assert relative_rms(jnp.concatenate(pieces, axis=1), expected(case)["o"]) < FORWARD_LIMIT
    assert relative_rms(state, expected(case)["final_state"]) < FORWARD_LIMIT


@pytest.mark.parametrize("implementation", ALL_WITH_XLA_SLOW)
@pytest.mark.usefixtures("quick_to_compile")
def test_padding_may_hold_anything(implementation):
    case = Case((1, 40, 1, 16, 16), lengths=(((0, 3), (1, 20), (0, 7), (1, 10)),))
    inputs = make_inputs(case)
    padding = inputs["segment_ids"] == 0
    junk = {n: jnp.asarray(inputs[n], jnp.float32).at[padding].set(jnp.nan) for n in NAMES}
    junk["initial_state"] = jnp.asarray(inputs["initial_state"], jnp.float32)
    function, ids = IMPLEMENTATIONS[implementation], inputs["segment_ids"]
    results = with_gradients(function, None, case.scale, junk, ids, *make_cotangents(case))
    reference = expected(case)
    for name, x in results.items():
        assert relative_rms(x, reference[name]) < GRADIENT_LIMIT, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("quick_to_compile")
def test_gradients_do_not_leak_across_segments(implementation):
    lengths = (((1, 30), (2, 1), (3, 20), (0, 2), (4, 17)),)
    case = Case((1, 70, 1, 16, 16), lengths=lengths)
    arrays = {n: jnp.asarray(make_inputs(case)[n], jnp.float32) for n in NAMES}
    ids = make_inputs(case)["segment_ids"]
    function = IMPLEMENTATIONS[implementation]

    @jax.jit
    def gradients_of(tokens):
        o, backward = jax.vjp(lambda x: function(**x, segment_ids=ids)[0], arrays)
        return backward(jnp.where(tokens[..., None, None], jnp.ones_like(o), 0))

    for segment in (1, 2, 3, 4):
        of_segment = ids == segment
        (gradients,) = gradients_of(of_segment)
        for name, gradient in gradients.items():
            assert not gradient[~of_segment].any(), name


@pytest.mark.parametrize("implementation", ALL_WITH_XLA_SLOW)
@pytest.mark.usefixtures("quick_to_compile")
def test_vmap_scan_and_checkpoint(implementation):
    case = Case((2, 24, 1, 16, 16))
    arrays = {n: jnp.asarray(make_inputs(case)[n], jnp.float32) for n in NAMES}

    def loss(function, x):
        return jnp.sum(jnp.sin(function(**x)[0]))

    own_loss = functools.partial(loss, IMPLEMENTATIONS[implementation])
    gradient, remade = jax.grad(own_loss), jax.grad(jax.checkpoint(own_loss))
    rows = {n: x[:, None] for n, x in arrays.items()}
    mapped = jax.jit(jax.vmap(remade))(rows)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda _, row: (None, gradient(row)), None, x)[1])(
        rows
    )
    direct = jax.jit(jax.grad(functools.partial(loss, IMPLEMENTATIONS["reference"])))(arrays)
    for name in NAMES:
        assert relative_rms(mapped[name][:, 0], direct[name]) < GRADIENT_LIMIT
        assert relative_rms(scanned[name][:, 0], direct[name]) < GRADIENT_LIMIT


@pytest.mark.parametrize("segmented", [slow_if(True, False), True])
@pytest.mark.parametrize(
    "implementation", [slow_if(name != "xla bounded", name) for name in IMPLEMENTATIONS]
)
@pytest.mark.usefixtures("quick_to_compile")
def test_shard_map(implementation, segmented):
    case = Case((2, 24, 2, 16, 16))
    arrays = {n: jnp.asarray(make_inputs(case)[n], jnp.float32) for n in NAMES}
    ids = jnp.asarray([[1] * 20 + [2] * 4, [0] * 2 + [1] * 22]) if segmented else None
    state = jnp.ones((2, 2, 16, 16)) if segmented else jnp.ones((2, 16, 16))  # shared by all rows
    mesh = jax.make_mesh((1, 1), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    by_head = PartitionSpec("batch", None, "heads")

    def loss(function, arrays, state, ids):
        state = jnp.broadcast_to(state, (len(arrays["r"]), *state.shape))
        segments = {"segment_ids": ids, "num_segments": 2 if segmented else None}
        o, final = function(**arrays, initial_state=state, **segments)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final))

    def sharded_loss(arrays, state, ids):
        total = loss(IMPLEMENTATIONS[implementation], arrays, state, ids)
        return jax.lax.psum(total, ("batch", "heads"))

    sharded = jax.shard_map(
        sharded_loss,
        mesh=mesh,
        in_specs=(
            by_head,
            PartitionSpec(*([None] * (state.ndim - 3)), "heads"),
            PartitionSpec("batch"),
        ),
        out_specs=PartitionSpec(),
    )
    unsharded = functools.partial(loss, IMPLEMENTATIONS["reference"])
    gradients, direct = (
        jax.jit(jax.grad(function, argnums=(0, 1)))(arrays, state, ids)
        for function in (sharded, unsharded)
    )
    chex.assert_trees_all_close(gradients, direct, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("quick_to_compile")
def test_kk_and_alpha_instead_of_a_and_b():
    case = Case((2, 20, 1, 16, 16))
    arrays = {n: jnp.asarray(make_inputs(case)[n], jnp.float32) for n in NAMES}
    r, w, k, v, a, b = arrays.values()
    kk, alpha = -a, b / -a

    def fused(kk, alpha):
        return wkv7_recurrent(r, w, k, v, kk=kk, alpha=alpha)[0]

    def plain(kk, alpha):
        return wkv7_recurrent(r, w, k, v, -kk, kk * alpha)[0]

    def with_gradients(function):
        loss = lambda *x: jnp.sin(function(*x)).sum()  # noqa: E731
        return function(kk, alpha), *jax.grad(loss, argnums=(0, 1))(kk, alpha)

    for x, y in zip(with_gradients(fused), with_gradients(plain), strict=True):
        assert relative_rms(x, y) < 1e-6


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.usefixtures("quick_to_compile")
def test_reverse_reads_from_the_end(implementation):
    ids = np.array([[0] * 3 + [1] * 10 + [2] * 7])
    case = Case((1, 20, 1, 16, 16))
    arrays = {n: jnp.asarray(make_inputs(case)[n], jnp.float32) for n in NAMES}
    state = jnp.asarray(make_inputs(case)["initial_state"], jnp.float32)
    flipped = {n: x[:, ::-1] for n, x in arrays.items()}
    o, final = wkv7_recurrent(
        **arrays, initial_state=state, segment_ids=ids, reverse=True, implementation=implementation
    )
    o_flipped, final_flipped = wkv7(
        **flipped, initial_state=state, segment_ids=ids[:, ::-1], implementation="reference"
    )
    assert relative_rms(o, o_flipped[:, ::-1]) < 1e-6
    assert relative_rms(final, final_flipped) < 1e-6


def bytes_of_gradient(function, T: int) -> int:
    """Returns the bytes of temporaries of a gradient by all inputs, besides inputs and results."""
    arguments = dict.fromkeys(NAMES, jax.ShapeDtypeStruct((1, T, 4, 64), jnp.float32))
    gradient = jax.jit(jax.grad(lambda x: function(**x)[0].sum()))
    return gradient.lower(arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@on_cpu  # elsewhere more chunks are worked on at once
def test_memory_of_gradients():
    scan = bytes_of_gradient(IMPLEMENTATIONS["reference"], 2048)
    bounded = bytes_of_gradient(IMPLEMENTATIONS["xla bounded"], 2048)
    assert bounded <= scan / 10  # measured: 12 MiB of 280 MiB
    assert bytes_of_gradient(IMPLEMENTATIONS["xla"], 2048) <= scan / 10  # measured: 24 MiB
    assert bytes_of_gradient(IMPLEMENTATIONS["xla bounded"], 16384) <= 8.4 * bounded


def valid_arguments() -> dict:
    x = jnp.ones((1, 4, 2, 8))
    return dict.fromkeys(NAMES, x)


WRONG_CALLS = {
    "r not an array": ({"r": [1.0]}, TypeError, "r must be an array"),
    "r of rank 3": ({"r": jnp.ones((4, 2, 8))}, ValueError, r"r must have 4 axes .*\(4, 2, 8\)"),
    "k of another length": ({"k": jnp.ones((1, 5, 2, 8))}, ValueError, "k must have .*T=4.*5"),
    "v of other heads": ({"v": jnp.ones((1, 4, 3, 8))}, ValueError, "v must have .*H=2.*3"),
    "no tokens": ({n: jnp.ones((1, 0, 2, 8)) for n in NAMES}, ValueError, "empty along T"),
    "integers": ({"r": jnp.ones((1, 4, 2, 8), int)}, TypeError, "r must have a dtype.*int32"),
    "mixed dtypes": (
        {"b": jnp.ones((1, 4, 2, 8), jnp.bfloat16)},
        TypeError,
        "b must have the dtype",
    ),
    "state of wrong shape": (
        {"initial_state": jnp.ones((1, 2, 8, 9))},
        ValueError,
        "initial_state must have .*V=8",
    ),
    "segment ids of rank 1": (
        {"segment_ids": jnp.ones(4, int)},
        ValueError,
        "segment_ids must have 2 axes",
    ),
    "float segment ids": (
        {"segment_ids": jnp.ones((1, 4))},
        TypeError,
        "segment_ids must have an integer dtype, got float32",
    ),
    "negative segment id": (
        {"segment_ids": jnp.array([[1, -2, 0, 0]])},
        ValueError,
        "segment_ids must be >= 0.*-2",
    ),
    "segment id too large": (
        {"segment_ids": jnp.array([[1, 1, 3, 0]]), "num_segments": 2},
        ValueError,
        "at most num_segments=2, got 3",
    ),
    "segment id in two runs": (
        {"segment_ids": jnp.array([[1, 2, 1, 0]]), "num_segments": 2},
        ValueError,
        "one run of a row .*id 1 in row 0",
    ),
    "num_segments alone": ({"num_segments": 2}, ValueError, "num_segments=2 needs segment_ids"),
    "num_segments 0": (
        {"num_segments": 0, "segment_ids": jnp.ones((1, 4), int)},
        ValueError,
        "num_segments must be an integer >= 1, got 0",
    ),
    "scale an array": ({"scale": jnp.ones(2)}, ValueError, "scale must be a finite number"),
    "unknown name": ({"implementation": "cuda"}, ValueError, "implementation='cuda' is unknown"),
}


@pytest.mark.parametrize("function", [wkv7, wkv7_recurrent])
@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_name_the_argument(name, function):
    wrong, error, message = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        function(**valid_arguments() | wrong)


def test_wrong_bound():
    with pytest.raises(ValueError, match=r"min_log_decay must be None or a number <= 0, got 0\.5"):
        wkv7(**valid_arguments(), min_log_decay=0.5)


@pytest.mark.parametrize("precision", ["highest", jax.lax.Precision.HIGH, 1])
def test_wrong_precision(precision):
    with pytest.raises(
        ValueError, match=r"precision must be None or 'high', got .*(highest|HIGH|1)"
    ):
        wkv7(**valid_arguments(), precision=precision)


def test_recurrent_needs_one_pair():
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="a and b, or kk and alpha, got a and kk"):
        wkv7_recurrent(x, x, x, x, x, kk=x)
