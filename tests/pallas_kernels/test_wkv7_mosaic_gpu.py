"""WKV7 on Mosaic GPU: interpreted and compiled for CUDA on any machine, at size on a Hopper GPU."""

import functools
from unittest.mock import Mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import wkv7, wkv7_recurrent
from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.operators.wkv7.call import WKVCall, WKVInputs
from pallas_kernels.operators.wkv7.mosaic_gpu import differentiable, pieces
from pallas_kernels.operators.wkv7.mosaic_gpu.diagonal_blocks import invert_diagonal
from pallas_kernels.operators.wkv7.mosaic_gpu.differentiable import check_served, wkv7_in_chunks
from pallas_kernels.operators.wkv7.mosaic_gpu.formats import BFLOAT16, FLOAT16, FLOAT16_BUT_STATE
from pallas_kernels.operators.wkv7.mosaic_gpu.outputs import outputs
from pallas_kernels.operators.wkv7.mosaic_gpu.state_gradients import state_gradients
from tests.helpers import relative_rms
from tests.pallas_kernels.operator_checks import kernels_for_cuda
from tests.pallas_kernels.tile_kernels import apply, on_each_device
from tests.pallas_kernels.transformations import by_rows, in_shard_map, row_after_row, transformed
from tests.pallas_kernels.wkv7_cases import NAMES, RWKV7_BOUND, Case, make_cotangents, make_inputs
from tests.pallas_kernels.wkv7_checks import assert_matches, run

# Relative RMS. The largest errors measured by interpretation: 3.6e-3 in outputs, 2.3e-3 in states,
# 5.9e-3 in gradients (that of b where the state grows fast). Rounding exact outputs to bfloat16
# costs 1.7e-3.
OUTPUT_LIMIT, GRADIENT_LIMIT = 4e-3, 1e-2

pytestmark = pytest.mark.usefixtures("module_quick_to_compile", "no_races_and_no_hanging")
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs")


def in_chunks(
    r,
    log_decay,
    k,
    v,
    a,
    b,
    *,
    initial_state=None,
    segment_ids=None,
    num_segments=None,
    scale=1.0,
    interpret=False,
    multiprocessors=132,
):
    """The operator through the kernels, whatever device there is."""
    target = Target(interpret=interpret, multiprocessors=multiprocessors)
    call = WKVCall(
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        num_segments=num_segments,
    )
    return wkv7_in_chunks(target, WKVInputs(r, log_decay, k, v, a, b), call)


interpreted = functools.partial(in_chunks, interpret=True)

bfloat16_case = functools.partial(Case, dtype="bfloat16")

PACKED = (
    # Padding first, in the middle of a segment, between segments and last; segments of one token,
    # and one that ends with a chunk; a row of two; only padding.
    ((0, 3), (1, 57), (2, 1), (3, 3), (4, 50), (0, 5), (4, 10), (5, 1)),
    ((7, 70), (3, 60)),
    ((0, 130),),
)
PER_SEGMENT = (((0, 2), (3, 66), (0, 1), (1, 1), (0, 2)), ((2, 64), (3, 8)))

INTERPRETED = {
    "random": bfloat16_case((1, 130, 1, 64, 64)),
    "decay at the bound": bfloat16_case((1, 130, 1, 64, 64), "bound"),
    "tiny decay": bfloat16_case((1, 130, 1, 64, 64), "tiny"),
    "repeated token": bfloat16_case((1, 130, 1, 64, 64), "tiny", tokens="repeated"),
    "repeated token, decaying": bfloat16_case((1, 130, 1, 64, 64), tokens="repeated"),
    "repeated token, decaying slowly": bfloat16_case(
        (1, 130, 1, 64, 64), "slow", tokens="repeated"
    ),
    "nearly repeated token": bfloat16_case((1, 130, 1, 64, 64), "tiny", tokens="near"),
    "periodic tokens": bfloat16_case((1, 130, 1, 64, 64), "tiny", tokens="periodic"),
    "packed": bfloat16_case((3, 130, 1, 64, 64), lengths=PACKED),
    "states per segment": bfloat16_case((2, 72, 1, 64, 64), lengths=PER_SEGMENT, num_segments=3),
    "K 128, packed, scaled": bfloat16_case(
        (1, 65, 1, 128, 64), lengths=(((1, 40), (2, 25)),), scale=0.5
    ),
    "V 128, no state": bfloat16_case((1, 65, 1, 64, 128), state=False),
}
SLOW = {
    "repeated token, decaying slowly",
    "states per segment",
    "K 128, packed, scaled",
    "V 128, no state",
}


@on_cpu
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in INTERPRETED]
)
def test_interpreted_equals_the_definition(name):
    case = INTERPRETED[name]
    results = run(interpreted, case, jnp.bfloat16)
    assert_matches(results, case, OUTPUT_LIMIT, GRADIENT_LIMIT)


def _tiny_decay(tokens: str = "random", **factors: float) -> Case:
    return bfloat16_case((1, 130, 1, 64, 64), "tiny", tokens, factors=tuple(factors.items()))


# Chunks that forget little, some of whose numbers are out of the range of float16. Otherwise the
# kernels would use it, for all of a chunk or for all but what the state is read and written with.
OUT_OF_RANGE = {
    "large values": _tiny_decay(v=1e6),
    "small values": _tiny_decay(v=1e-30),
    "large state": _tiny_decay(initial_state=1e6),
    "small state, no values": _tiny_decay(initial_state=1e-6, v=0.0),
    "all small": _tiny_decay(initial_state=1e-30, v=1e-30),
    "large r": _tiny_decay(r=1e3),
    "large k": _tiny_decay(k=1e5),
    "large k, small values": _tiny_decay(k=1e20, v=1e-20),
    "small b": _tiny_decay(b=1e-6),
    "growing state": _tiny_decay(a=-1.0),
    "fast growing state": _tiny_decay("repeated", a=-1.0, b=0.2),
    "no gradients of outputs": _tiny_decay(do=0.0),
    "small gradients of outputs": _tiny_decay(do=1e-6),
    "large gradients of outputs": _tiny_decay(d_final=1e-6),
    "all gradients tiny": _tiny_decay(do=1e-25, d_final=1e-25),
    "all gradients huge": _tiny_decay(do=1e25, d_final=1e25),
}


# In float16, next to nothing is lost but by rounding the results to bfloat16. Largest errors
# measured by interpretation: 1.7e-3 in outputs, 1.8e-3 in gradients, 2.4e-4 in states.
IN_FLOAT16 = {
    "little decay": bfloat16_case((1, 130, 1, 64, 64), "little"),
    "small gradients": bfloat16_case(
        (1, 130, 1, 64, 64), "little", factors=(("do", 1e-7), ("d_final", 1e-7))
    ),
    "packed": bfloat16_case(
        (3, 130, 1, 64, 64), "little", lengths=PACKED, factors=(("d_final", 0.1),)
    ),
}


@on_cpu
@pytest.mark.parametrize("name", IN_FLOAT16)
def test_interpreted_in_float16(name):
    case = IN_FLOAT16[name]
    assert_matches(run(interpreted, case, jnp.bfloat16), case, 2.5e-3, 2.5e-3)


@on_cpu
@pytest.mark.parametrize(
    ("case", "of_outputs", "of_gradients"),
    [
        (_tiny_decay(), FLOAT16, FLOAT16),
        (bfloat16_case((1, 130, 1, 64, 64)), BFLOAT16, BFLOAT16),
        (OUT_OF_RANGE["large values"], BFLOAT16, BFLOAT16),
        (OUT_OF_RANGE["large state"], FLOAT16_BUT_STATE, BFLOAT16),
        (OUT_OF_RANGE["no gradients of outputs"], FLOAT16, FLOAT16_BUT_STATE),
        (OUT_OF_RANGE["small gradients of outputs"], FLOAT16, FLOAT16_BUT_STATE),
        (OUT_OF_RANGE["all gradients tiny"], FLOAT16, FLOAT16_BUT_STATE),
    ],
)
def test_formats_of_chunks(case, of_outputs, of_gradients):
    arrays, target = arrays_of(case), Target(interpret=True)
    # Rows are filled up to whole chunks as `wkv7_in_chunks` does.
    inputs = WKVInputs(*(jnp.pad(arrays[n], ((0, 0), (0, 62), (0, 0), (0, 0))) for n in NAMES))
    state = arrays["initial_state"].mT[:, None]
    found = outputs(target, inputs, None, state, None, None, scale=1.0, save=True)
    assert found.formats[0, 0, 0, 0, 0] == of_outputs
    do, d_final = make_cotangents(case)
    do = jnp.pad(jnp.asarray(do, jnp.bfloat16), ((0, 0), (0, 62), (0, 0), (0, 0)))
    d_final = jnp.asarray(d_final, jnp.float32).mT[:, None]
    of_states = state_gradients(
        target,
        inputs,
        found.X,
        found.formats,
        do,
        d_final,
        None,
        None,
        scale=1.0,
        from_zero=False,
    )
    assert of_states.formats[0, 0, 0, 0, 0] == of_gradients


@pytest.mark.gpu
@pytest.mark.parametrize("name", IN_FLOAT16)
def test_in_float16_on_the_gpu(name):
    case = IN_FLOAT16[name]
    assert_matches(run(on_gpu, case, jnp.bfloat16), case, 2.5e-3, 2.5e-3)


@on_cpu
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_interpreted_out_of_the_range_of_float16(name):
    case = OUT_OF_RANGE[name]
    results = run(interpreted, case, jnp.bfloat16)
    assert_matches(results, case, OUTPUT_LIMIT, GRADIENT_LIMIT)


@on_cpu
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            bfloat16_case((1, 250, 1, 64, 64), "tiny", tokens="repeated"), marks=pytest.mark.slow
        ),
        pytest.param(
            bfloat16_case((1, 190, 1, 64, 64), lengths=(((1, 100), (0, 10), (2, 60), (3, 20)),)),
            marks=pytest.mark.slow,
        ),
        # Each piece has more chunks than there are slots.
        pytest.param(bfloat16_case((1, 1000, 1, 64, 64), "little"), marks=pytest.mark.slow),
    ],
)
def test_interpreted_in_pieces(case, monkeypatch):
    monkeypatch.setattr(pieces, "number_of_pieces", lambda *_: 3)
    results = run(interpreted, case, jnp.bfloat16)
    assert_matches(results, case, OUTPUT_LIMIT, GRADIENT_LIMIT)


@pytest.mark.slow
@on_cpu
def test_interpreted_with_more_walks_than_multiprocessors():
    case = bfloat16_case((1, 70, 3, 64, 64))
    results = run(functools.partial(interpreted, multiprocessors=2), case, jnp.bfloat16)
    assert_matches(results, case, OUTPUT_LIMIT, GRADIENT_LIMIT)


def gradient_of_one_result(function, used, arguments, num_segments, weight):
    """The gradient of the outputs, 0, or of the final states, 1."""

    def result(arrays):
        return function(**arguments | arrays, num_segments=num_segments)[used]

    return jax.vjp(result, {name: arguments[name] for name in NAMES})[1](weight)[0]


@pytest.mark.slow
@on_cpu
@pytest.mark.parametrize(("used", "num_segments"), [(0, None), (1, 2)])
def test_interpreted_gradient_of_one_result(used, num_segments):
    lengths = None if num_segments is None else (((1, 30), (2, 40)),)
    case = bfloat16_case((1, 70, 1, 64, 64), lengths=lengths, num_segments=num_segments)
    arguments = arrays_of(case)
    if num_segments is not None:
        arguments["segment_ids"] = jnp.asarray(make_inputs(case)["segment_ids"])

    def with_zeros(arguments, weights):
        def results(arrays):
            return interpreted(**arguments | arrays, num_segments=num_segments)

        return jax.vjp(results, {name: arguments[name] for name in NAMES})[1](weights)[0]

    shapes = jax.eval_shape(lambda: interpreted(**arguments, num_segments=num_segments))
    weights = [jnp.zeros(x.shape, x.dtype) for x in shapes]
    weight = jax.random.normal(jax.random.key(0), weights[used].shape).astype(weights[used].dtype)
    weights[used] = weight
    chex.assert_trees_all_equal(
        jax.jit(gradient_of_one_result, static_argnums=(0, 1, 3))(
            interpreted, used, arguments, num_segments, weight
        ),
        jax.jit(with_zeros)(arguments, tuple(weights)),
    )


@pytest.mark.parametrize(
    ("used", "kind", "reads_zeros"),
    [(0, "plain", False), (0, "packed", False), (1, "plain", True), (0, "per segment", True)],
)
def test_unused_final_states_need_no_zeros(used, kind, reads_zeros, monkeypatch):
    gradients = Mock(wraps=differentiable._partitioned_gradients)
    monkeypatch.setattr(differentiable, "_partitioned_gradients", gradients)
    arguments, num_segments = shapes(kind, 64, 64, jnp.bfloat16), 3 if "per" in kind else None
    result = jax.eval_shape(
        lambda arguments: in_chunks(**arguments, num_segments=num_segments)[used], arguments
    )
    jax.eval_shape(
        lambda arguments, weight: gradient_of_one_result(
            in_chunks, used, arguments, num_segments, weight
        ),
        arguments,
        result,
    )
    *_, d_final = gradients.call_args.args
    assert (d_final is not None) == reads_zeros


def test_number_of_pieces():
    def number(rows, chunks, K=64, V=64):
        return pieces.number_of_pieces(Target(multiprocessors=132), rows, K, V, chunks)

    assert number(rows=32, chunks=512) == 3
    assert number(rows=16, chunks=512) == 5
    assert number(rows=8, chunks=512, V=128) == 6
    assert number(rows=1, chunks=512) == 8
    assert number(rows=64, chunks=512) == number(rows=512, chunks=512) == 1
    assert number(rows=32, chunks=30) == number(rows=1, chunks=1) == 1
    assert number(rows=1, chunks=512, K=128) == 1


@on_cpu
@pytest.mark.parametrize(
    "transformation",
    [
        pytest.param(by_rows, marks=pytest.mark.slow),
        pytest.param(row_after_row, marks=pytest.mark.slow),
        pytest.param(in_shard_map, marks=pytest.mark.slow),
    ],
)
def test_interpreted_under_transformations(transformation):
    case = bfloat16_case((2, 20, 1, 64, 64))
    results = run(functools.partial(transformed, transformation, interpreted), case, jnp.bfloat16)
    assert_matches(results, case, OUTPUT_LIMIT, GRADIENT_LIMIT)


@on_cpu
def test_interpretation_detects_races(capfd):
    def race(x_gmem, o_gmem, tile):
        @pl.when(jax.lax.axis_index("warpgroup") == 0)
        def _():
            tile[...] = plgpu.load(x_gmem)

        @pl.when(jax.lax.axis_index("warpgroup") == 1)
        def _():
            o_gmem[...] = tile[...]

    kernel = Target(interpret=True).kernel(
        race,
        name="race",
        out_type=jax.ShapeDtypeStruct((64,), jnp.float32),
        grid={"block": 1},
        scratch_types=[plgpu.SMEM((64,), jnp.float32)],
        warpgroups=2,
    )
    message = ""
    try:
        jax.block_until_ready(kernel(jnp.ones(64)))
    except jax.errors.JaxRuntimeError as error:  # from jax 0.12 on
        message = str(error)
    assert "RACE DETECTED" in message + "".join(capfd.readouterr())


def blocks_of_16(x: np.ndarray) -> np.ndarray:
    """X with zeros outside of the blocks of 16 rows on its diagonal."""
    return x * np.kron(np.eye(TILE // 16), np.ones((16, 16)))


@on_each_device
@pytest.mark.parametrize("tokens", ["random", "repeated"])
def test_diagonal_blocks_are_inverted(tokens, interpret):
    rng = np.random.default_rng(0)
    A = -np.ones((TILE, TILE)) if tokens == "repeated" else 0.3 * rng.normal(size=(TILE, TILE))
    A = jnp.asarray(np.tril(A, -1), jnp.bfloat16)
    D, N = apply(invert_diagonal, A, 2, interpret)
    A = np.asarray(A, np.float64)
    exact = np.linalg.inv(np.eye(TILE) - blocks_of_16(A))
    # Measured by interpretation: 1.7e-3 and 1.6e-3 for random A, 0 for repeated tokens.
    assert relative_rms(D, exact) <= 3e-3
    np.testing.assert_array_equal(D, blocks_of_16(D))
    assert relative_rms(N, D @ (A - blocks_of_16(A))) <= 2e-3


def shapes(kind: str, K: int, V: int, dtype, T: int = 130) -> dict:
    """The arguments of a call: "plain", "packed" with a state, or with states "per segment"."""
    of_keys, of_values = (jax.ShapeDtypeStruct((2, T, 2, D), dtype) for D in (K, V))
    arguments = dict.fromkeys(NAMES, of_keys) | {"v": of_values}
    if kind == "plain":
        return arguments
    arguments["segment_ids"] = jax.ShapeDtypeStruct((2, T), jnp.int32)
    state_shape = (2, 3, 2, K, V) if kind == "per segment" else (2, 2, K, V)
    return arguments | {"initial_state": jax.ShapeDtypeStruct(state_shape, jnp.float32)}


def forward(function, arguments):
    per_segment = "initial_state" in arguments and arguments["initial_state"].ndim == 5
    num_segments = 3 if per_segment else None
    return function(**arguments, num_segments=num_segments)


def gradient(function, arguments, used=slice(None)):
    differentiated = {n: x for n, x in arguments.items() if n != "segment_ids"}

    def loss(differentiated):
        results = forward(function, arguments | differentiated)
        return sum(x.astype(jnp.float32).sum() for x in results[used])

    return jax.grad(loss)(differentiated)


@pytest.mark.parametrize(
    ("what", "kind", "K", "V", "dtype", "T"),
    [
        (forward, "plain", 64, 64, jnp.bfloat16, 1),
        (forward, "packed", 128, 64, jnp.float16, 130),
        (forward, "per segment", 64, 128, jnp.bfloat16, 130),
        (gradient, "plain", 64, 64, jnp.bfloat16, 65536),
        pytest.param(gradient, "packed", 128, 128, jnp.float16, 130, marks=pytest.mark.slow),
        (gradient, "packed", 64, 64, jnp.bfloat16, 130),
        (forward, "packed", 64, 128, jnp.bfloat16, 65536),
        pytest.param(gradient, "per segment", 128, 64, jnp.float16, 130, marks=pytest.mark.slow),
    ],
)
def test_compiles_for_cuda(what, kind, K, V, dtype, T):
    arguments = shapes(kind, K, V, dtype, T)
    kernels = kernels_for_cuda(functools.partial(what, in_chunks), arguments)
    in_pieces = T == 65536
    inverses = in_pieces or (K, V) != (64, 64)  # in a kernel of their own
    assert kernels == (1 if what is forward else 3) + inverses + in_pieces


@pytest.mark.slow
def test_scan_over_checkpointed_layers_compiles_for_cuda():
    def layer(v, others):
        return in_chunks(**others, v=v)[0], None

    def loss(arguments):
        v, others = arguments["v"], {n: x for n, x in arguments.items() if n != "v"}
        return jax.lax.scan(jax.checkpoint(layer), v, others)[0].astype(jnp.float32).sum()

    arguments = shapes("plain", 64, 64, jnp.bfloat16)
    layers = {
        n: x if n == "v" else jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
        for n, x in arguments.items()
    }
    assert kernels_for_cuda(jax.grad(loss), layers) == 4  # one of them again in the backward


@pytest.mark.parametrize(
    ("kind", "used"),
    [
        ("plain", slice(None)),
        ("per segment", slice(None)),
        ("per segment", slice(0, 1)),
        ("plain", slice(1, 2)),
    ],
)
def test_shard_map_compiles_for_cuda(kind, used):
    mesh = jax.make_mesh((1, 1), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    arguments = shapes(kind, 64, 64, jnp.bfloat16)
    specs = dict.fromkeys(NAMES, PartitionSpec("batch", None, "heads"))
    if kind != "plain":
        specs["segment_ids"] = PartitionSpec("batch")
        specs["initial_state"] = PartitionSpec("batch", None, "heads")
    sharded = jax.shard_map(
        functools.partial(gradient, in_chunks, used=used),
        mesh=mesh,
        in_specs=(specs,),
        out_specs={n: spec for n, spec in specs.items() if n != "segment_ids"},
    )
    assert kernels_for_cuda(sharded, arguments) == 3


@on_cpu
def test_other_devices_are_refused():
    arrays = dict.fromkeys(NAMES, jnp.ones((1, 4, 1, 64), jnp.bfloat16))
    with pytest.raises(NotServed, match=r"mosaic_gpu needs a Hopper GPU.*'cpu'"):
        wkv7(**arrays, min_log_decay=RWKV7_BOUND, implementation="mosaic_gpu")
    with pytest.raises(NotServed, match=r"mosaic_gpu needs a Hopper GPU.*'cpu'"):
        jax.jit(functools.partial(wkv7, min_log_decay=RWKV7_BOUND, implementation="mosaic_gpu"))(
            **arrays
        )
    chosen = wkv7(**arrays, min_log_decay=RWKV7_BOUND)
    by_xla = wkv7(**arrays, min_log_decay=RWKV7_BOUND, implementation="xla")
    chex.assert_trees_all_equal(chosen, by_xla)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (64, 192)])
def test_served(K, V, dtype):
    k, v = (jax.ShapeDtypeStruct((1, 4, 1, D), dtype) for D in (K, V))
    check_served(k, v, RWKV7_BOUND)
    check_served(k, v, -1.0)


@pytest.mark.parametrize(
    ("K", "V", "dtype", "min_log_decay", "message"),
    [
        (64, 64, jnp.float32, -0.6, "16 bits.*float32"),
        (32, 64, jnp.bfloat16, -0.6, "K=32"),
        (192, 64, jnp.bfloat16, -0.6, "K=192"),
        (64, 96, jnp.bfloat16, -0.6, "V=96"),
        (64, 64, jnp.bfloat16, None, "min_log_decay.*None"),
        (64, 64, jnp.bfloat16, -1.1, r"min_log_decay.*-1\.1"),
    ],
)
def test_not_served(K, V, dtype, min_log_decay, message):
    k, v = (jax.ShapeDtypeStruct((1, 4, 1, D), dtype) for D in (K, V))
    with pytest.raises(NotServed, match=message):
        check_served(k, v, min_log_decay)


# On a Hopper GPU. The definition is evaluated there too, in float64, by the scan that
# `test_wkv7.test_float64` holds to the definition in numpy, which would take minutes.

on_gpu = functools.partial(wkv7, implementation="mosaic_gpu", min_log_decay=RWKV7_BOUND)
exact = functools.partial(wkv7_recurrent, implementation="xla")


def assert_exact_enough(results, case: Case, output_limit: float = OUTPUT_LIMIT) -> None:
    with jax.enable_x64():
        reference = jax.device_get(run(exact, case, jnp.float64))
    errors = {name: relative_rms(x, reference[name]) for name, x in results.items()}
    limits = {n: GRADIENT_LIMIT if n.startswith("d_") else output_limit for n in errors}
    assert all(errors[n] <= limits[n] for n in errors), errors  # not if one is NaN


def arrays_of(case: Case) -> dict:
    inputs = make_inputs(case)
    arrays = {n: jnp.asarray(inputs[n], case.dtype) for n in NAMES}
    return arrays | {"initial_state": jnp.asarray(inputs["initial_state"], jnp.float32)}


def segments(T: int, num_segments: int, seed: int) -> tuple[tuple[int, int], ...]:
    """A row of segments with random lengths, and padding at its end."""
    cuts = np.sort(np.random.default_rng(seed).choice(T, num_segments, replace=False))
    lengths = np.diff(cuts, prepend=0)
    return (*((i + 1, int(n)) for i, n in enumerate(lengths) if n), (0, T - int(cuts[-1])))


TOKENS = 4096
ROWS_OF_SEGMENTS = tuple(segments(TOKENS, 40, seed) for seed in range(2))

AT_SIZE = {
    "random": bfloat16_case((2, TOKENS, 4, 64, 64)),
    "decay at the bound": bfloat16_case((2, TOKENS, 4, 64, 64), "bound"),
    "tiny decay": bfloat16_case((2, TOKENS, 4, 64, 64), "tiny"),
    "repeated token": bfloat16_case((2, TOKENS, 4, 64, 64), "tiny", tokens="repeated"),
    "repeated token, decaying": bfloat16_case((2, TOKENS, 4, 64, 64), tokens="repeated"),
    "nearly repeated token": bfloat16_case((2, TOKENS, 4, 64, 64), "tiny", tokens="near"),
    "periodic tokens": bfloat16_case((2, TOKENS, 4, 64, 64), "tiny", tokens="periodic"),
    "repeated token, decaying slowly": bfloat16_case(
        (2, TOKENS, 4, 64, 64), "slow", tokens="repeated"
    ),
    "more blocks than multiprocessors": bfloat16_case((3, 200, 67, 64, 64), scale=0.125),
    "one token": bfloat16_case((2, 1, 3, 64, 64)),
    "K 128": bfloat16_case((2, 1000, 4, 128, 64)),
    "K 128, repeated token": bfloat16_case((2, 1000, 4, 128, 128), "tiny", tokens="repeated"),
    "V 192, no state": bfloat16_case((2, 1000, 4, 64, 192), state=False),
    "packed": bfloat16_case((2, TOKENS, 4, 64, 64), lengths=ROWS_OF_SEGMENTS),
    "K 128, packed": bfloat16_case((2, TOKENS, 2, 128, 128), lengths=ROWS_OF_SEGMENTS),
    "states per segment": bfloat16_case(
        (2, TOKENS, 4, 64, 64), lengths=ROWS_OF_SEGMENTS, num_segments=41
    ),
    "K 128, states per segment": bfloat16_case(
        (2, TOKENS, 2, 128, 64), lengths=ROWS_OF_SEGMENTS, num_segments=41
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", AT_SIZE)
def test_at_size(name):
    case = AT_SIZE[name]
    assert_exact_enough(run(on_gpu, case, jnp.bfloat16), case)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_out_of_the_range_of_float16_on_the_gpu(name):
    case = OUT_OF_RANGE[name]
    results = run(on_gpu, case, jnp.bfloat16)
    assert_matches(results, case, OUTPUT_LIMIT, GRADIENT_LIMIT)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["packed", "states per segment"])
def test_small_segments_on_the_gpu(name):
    case = INTERPRETED[name]
    assert_matches(run(on_gpu, case, jnp.bfloat16), case, OUTPUT_LIMIT, GRADIENT_LIMIT)


@pytest.mark.gpu
@pytest.mark.parametrize("transformation", [by_rows, row_after_row, in_shard_map])
def test_transformations_on_the_gpu(transformation):
    case = bfloat16_case((2, 200, 2, 64, 64))
    function = functools.partial(transformed, transformation, on_gpu)
    assert_matches(run(function, case, jnp.bfloat16), case, OUTPUT_LIMIT, GRADIENT_LIMIT)


@pytest.mark.gpu
def test_a_scan_over_layers_calls_each_kernel_once():
    def layer(arrays, v):
        o, _ = on_gpu(**arrays | {"v": v})
        return v + o * o  # needs o now, and in the backward

    def scanned(arrays):
        return jax.lax.scan(lambda v, _: (layer(arrays, v), None), arrays["v"], length=3)[0]

    def unrolled(arrays):
        return layer(arrays, layer(arrays, layer(arrays, arrays["v"])))

    arrays = arrays_of(bfloat16_case((2, 200, 4, 64, 64)))
    of_scan, of_layers = (
        jax.jit(jax.grad(lambda x, f=f: f(x).astype(jnp.float32).sum())).lower(arrays).compile()
        for f in (scanned, unrolled)
    )
    assert of_scan.as_text().count('custom_call_target="mosaic_gpu') == 3
    for x, y in zip(of_scan(arrays).values(), of_layers(arrays).values(), strict=True):
        assert relative_rms(x, y) < GRADIENT_LIMIT


@pytest.mark.gpu
def test_float16_on_the_gpu():
    case = Case((2, 1000, 4, 64, 64), dtype="float16")
    results = run(on_gpu, case, jnp.float16)
    assert results["o"].dtype == results["d_r"].dtype == jnp.float16
    # Inputs are rounded to bfloat16 first, which costs as much as all else together.
    assert_exact_enough(results, case, output_limit=GRADIENT_LIMIT)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", ["random", "near"])
def test_a_long_sequence_and_its_halves(tokens, monkeypatch):
    case = bfloat16_case((1, 65536, 2, 64, 64), "tiny", tokens=tokens)
    assert_exact_enough(run(on_gpu, case, jnp.bfloat16), case)
    monkeypatch.setattr(pieces, "number_of_pieces", lambda *_: 1)  # others would round elsewhere
    arrays = arrays_of(case)
    o, final = on_gpu(**arrays)
    state, halves = arrays.pop("initial_state"), []
    for piece in (slice(None, 32768), slice(32768, None)):
        half, state = on_gpu(**{n: x[:, piece] for n, x in arrays.items()}, initial_state=state)
        halves.append(half)
    assert relative_rms(jnp.concatenate(halves, axis=1), o) < 1e-5
    assert relative_rms(state, final) < 1e-5


@pytest.mark.gpu
def test_bits_are_the_same_in_twenty_runs():
    case = AT_SIZE["random"]
    first = jax.device_get(run(on_gpu, case, jnp.bfloat16))
    for _ in range(19):
        again = jax.device_get(run(on_gpu, case, jnp.bfloat16))
        chex.assert_trees_all_equal(again, first)


@pytest.mark.gpu
def test_none_takes_the_kernels():
    arrays = arrays_of(bfloat16_case((2, 200, 4, 64, 64)))
    chosen = functools.partial(wkv7, min_log_decay=RWKV7_BOUND)
    assert kernels_for_cuda(lambda arrays: chosen(**arrays), arrays) == 1
    chex.assert_trees_all_equal(chosen(**arrays), on_gpu(**arrays))


@pytest.mark.gpu
def test_memory_at_size():
    tokens = jax.ShapeDtypeStruct((8, 4096, 64, 64), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((8, 64, 64, 64), jnp.float32)
    arguments = dict.fromkeys(NAMES, tokens) | {"initial_state": state}

    def forward_and_backward(arguments, gradients):
        results, backward = jax.vjp(functools.partial(forward, on_gpu), arguments)
        return results, backward(gradients)

    program = jax.jit(forward_and_backward).lower(arguments, (tokens, state)).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 1.2 * 2**30
