"""WKV7 token by token on Mosaic GPU: interpreted and compiled for CUDA on any machine, and run on a
Hopper GPU."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import wkv7_recurrent
from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.target import Target
from pallas_kernels.operators.wkv7.call import WKVCall
from pallas_kernels.operators.wkv7_recurrent.call import RecurrentInputs
from pallas_kernels.operators.wkv7_recurrent.mosaic_gpu.differentiable import (
    check_recurrent_served,
    wkv7_token_by_token,
)
from tests.helpers import in_mesh_of, relative_rms
from tests.pallas_kernels.operator_checks import kernels_for_cuda
from tests.pallas_kernels.transformations import by_rows, in_shard_map, row_after_row, transformed
from tests.pallas_kernels.wkv7_cases import (
    HARD,
    NAMES,
    Case,
    expected,
    make_cotangents,
    make_inputs,
)
from tests.pallas_kernels.wkv7_checks import assert_matches, run, with_gradients

LIMITS = {
    "float32": (2e-6, 2e-6),
    "float16": (4e-4, 4e-4),
    "bfloat16": (4e-3, 1e-2),
}
"""Relative RMS errors of outputs and states, and of gradients."""

pytestmark = pytest.mark.usefixtures("module_quick_to_compile", "no_races_and_no_hanging")
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs")


def token_by_token(
    r,
    log_decay,
    k,
    v,
    a=None,
    b=None,
    *,
    kk=None,
    alpha=None,
    initial_state=None,
    segment_ids=None,
    num_segments=None,
    scale=1.0,
    reverse=False,
    interpret=False,
):
    """The operator through the kernels, whatever device there is."""
    pair = (a, b) if kk is None else (kk, alpha)
    return wkv7_token_by_token(
        Target(interpret=interpret),
        RecurrentInputs(r, log_decay, k, v, *pair),
        WKVCall(
            scale=scale,
            initial_state=initial_state,
            segment_ids=segment_ids,
            num_segments=num_segments,
        ),
        fused=kk is not None,
        reverse=reverse,
    )


interpreted = functools.partial(token_by_token, interpret=True)
on_gpu = functools.partial(wkv7_recurrent, implementation="mosaic_gpu")
by_xla = functools.partial(wkv7_recurrent, implementation="xla")


def backwards(function, *, segment_ids=None, **arguments):
    """A call with `reverse` on tokens in the opposite order, which equals one without."""

    def flip(x):
        return None if x is None else jnp.flip(x, 1)

    flipped = {n: flip(x) if n in NAMES else x for n, x in arguments.items()}
    o, final = function(**flipped, segment_ids=flip(segment_ids), reverse=True)
    return flip(o), final


PACKED = (
    # Padding first, in the middle of a segment, between segments and last; segments of one token,
    # and across the edge of a block of 8; a row of one segment; only padding.
    ((0, 1), (1, 3), (2, 1), (0, 1), (3, 2), (0, 1), (3, 1), (0, 1), (4, 1), (0, 1)),
    ((7, 13),),
    ((0, 13),),
)
PER_SEGMENT = (((0, 2), (3, 6), (0, 1), (3, 2), (1, 1), (0, 1)), ((2, 8), (4, 5)))

CASES = {
    "one token": Case((2, 1, 3, 64, 64)),
    "one token, no state": Case((1, 1, 2, 64, 64), state=False),
    "five tokens, scaled": Case((2, 5, 1, 64, 64), scale=0.125),
    "twenty tokens": Case((1, 20, 1, 64, 64)),
    "repeated token": Case((1, 20, 1, 64, 64), "tiny", tokens="repeated"),
    "strong decay": Case((1, 20, 1, 64, 64), "strong"),
    "reset at every token": Case((1, 20, 1, 64, 64), "reset"),
    "mixed decay": Case((1, 20, 1, 64, 64), "mixed"),
    "packed": Case((3, 13, 1, 64, 64), lengths=PACKED),
    "packed, no state": Case((1, 13, 1, 64, 64), "mixed", lengths=PACKED[:1], state=False),
    "states per segment": Case((2, 13, 1, 64, 64), lengths=PER_SEGMENT, num_segments=5),
    "states per segment, none given": Case(
        (2, 13, 1, 64, 64), lengths=PER_SEGMENT, num_segments=5, state=False
    ),
    "K 128": Case((1, 9, 1, 128, 64)),
    "V 128": Case((1, 9, 1, 64, 128)),
    "K and V 128, packed": Case((1, 5, 1, 128, 128), lengths=(((1, 2), (0, 1), (2, 2)),)),
}
ROUNDED = {
    "bfloat16, one token": Case((2, 1, 2, 64, 64), dtype="bfloat16"),
    "bfloat16, packed": Case((1, 13, 1, 64, 64), dtype="bfloat16", lengths=PACKED[:1]),
    "float16, K 128": Case((1, 9, 1, 128, 64), dtype="float16"),
}
HARD_KINDS = {
    kind: Case((1, 20, 1, 64, 64), dtype="bfloat16", **settings) for kind, settings in HARD.items()
}


def check(function, case: Case) -> None:
    results = run(function, case, jnp.dtype(case.dtype))
    assert results["o"].dtype == results["d_a"].dtype == case.dtype
    assert_matches(results, case, *LIMITS[case.dtype])


SLOW = {
    *HARD,
    "five tokens, scaled",
    "repeated token",
    "packed, no state",
    "states per segment, none given",
    "K and V 128, packed",
}


@on_cpu
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES | ROUNDED | HARD_KINDS],
)
def test_interpreted_equals_the_definition(name):
    check(interpreted, (CASES | ROUNDED | HARD_KINDS)[name])


@on_cpu
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("five tokens, scaled", marks=pytest.mark.slow),
        "packed",
        pytest.param("states per segment", marks=pytest.mark.slow),
    ],
)
def test_interpreted_in_reverse(name):
    check(functools.partial(backwards, interpreted), CASES[name])


def with_kk_and_alpha(case: Case, dtype) -> dict:
    inputs = make_inputs(case)
    kk, alpha = -inputs["a"], inputs["b"] / -inputs["a"]
    others = {n: x for n, x in inputs.items() if n in ("r", "log_decay", "k", "v")}
    return {n: jnp.asarray(x, dtype) for n, x in (others | {"kk": kk, "alpha": alpha}).items()}


@on_cpu
@pytest.mark.parametrize("segment_ids", [None, np.array([[0, 1, 1, 2, 2, 2, 2, 0, 3]])])
def test_interpreted_kk_and_alpha(segment_ids):
    case = Case((1, 9, 1, 64, 64))
    arrays, cotangents = with_kk_and_alpha(case, jnp.float32), make_cotangents(case)
    actual, reference = (
        with_gradients(function, None, 1.0, arrays, segment_ids, *cotangents)
        for function in (interpreted, by_xla)
    )
    for name, x in actual.items():
        assert relative_rms(x, reference[name]) < 1e-6, name


@on_cpu
def test_interpreted_padding_may_hold_anything():
    case = Case((1, 13, 1, 64, 64), lengths=(((0, 2), (1, 5), (0, 2), (1, 3), (0, 1)),))
    inputs = make_inputs(case)
    padding = inputs["segment_ids"] == 0
    junk = {n: jnp.asarray(inputs[n], jnp.float32).at[padding].set(jnp.nan) for n in NAMES}
    junk["initial_state"] = jnp.asarray(inputs["initial_state"], jnp.float32)
    do, d_final = make_cotangents(case)
    do = np.where(padding[..., None, None], np.nan, do)
    results = with_gradients(interpreted, None, 1.0, junk, inputs["segment_ids"], do, d_final)
    assert_matches(results, case, *LIMITS["float32"])


@on_cpu
def test_interpreted_log_decay_of_its_own_dtype():
    case = Case((1, 5, 1, 64, 64), dtype="bfloat16")
    arrays = {n: jnp.asarray(make_inputs(case)[n], jnp.bfloat16) for n in NAMES}
    arrays["log_decay"] = arrays["log_decay"].astype(jnp.float32)
    arrays["initial_state"] = jnp.asarray(make_inputs(case)["initial_state"], jnp.bfloat16)
    results = with_gradients(interpreted, None, 1.0, arrays, None, *make_cotangents(case))
    for name in arrays:
        assert results[f"d_{name}"].dtype == arrays[name].dtype
    error = relative_rms(results["d_log_decay"], expected(case)["d_log_decay"])
    assert error < 4e-3  # of the initial state, which was rounded


@on_cpu
@pytest.mark.parametrize(
    "transformation",
    [
        pytest.param(by_rows, marks=pytest.mark.slow),
        row_after_row,
        pytest.param(in_shard_map, marks=pytest.mark.slow),
    ],
)
def test_interpreted_under_transformations(transformation):
    case = Case((2, 9, 1, 64, 64))
    check(functools.partial(transformed, transformation, interpreted), case)


KINDS = ("plain", "no state", "packed", "per segment")


def arguments_of(kind: str, K: int, V: int, dtype, T: int, *, fused: bool = False) -> dict:
    """The arguments of a call."""
    of_keys, of_values = (jax.ShapeDtypeStruct((2, T, 2, D), dtype) for D in (K, V))
    pair = ("kk", "alpha") if fused else ("a", "b")
    arguments = dict.fromkeys(("r", "log_decay", "k", *pair), of_keys) | {"v": of_values}
    if kind in ("packed", "per segment"):
        arguments["segment_ids"] = jax.ShapeDtypeStruct((2, T), jnp.int32)
    if kind != "no state":
        state_shape = (2, 3, 2, K, V) if kind == "per segment" else (2, 2, K, V)
        arguments["initial_state"] = jax.ShapeDtypeStruct(state_shape, jnp.float32)
    return arguments


def forward(function, kind, arguments):
    return function(**arguments, num_segments=3 if kind == "per segment" else None)


def gradient(function, kind, arguments):
    differentiated = {n: x for n, x in arguments.items() if n != "segment_ids"}

    def loss(differentiated):
        results = forward(function, kind, arguments | differentiated)
        return sum(x.astype(jnp.float32).sum() for x in results)

    return jax.grad(loss)(differentiated)


def names_of_kernels(function, *arguments) -> list[str]:
    """The kernels in a program for CUDA."""
    program = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    names = ("wkv7_recurrent_outputs", "wkv7_recurrent_gradients")
    assert program.count("custom_call @mosaic_gpu") == sum(program.count(n) > 0 for n in names)
    return [name for name in names if name in program]


@pytest.mark.parametrize(
    ("kind", "K", "V", "dtype"),
    [
        ("plain", 64, 64, "bfloat16"),
        ("plain", 64, 64, "float16"),
        ("plain", 128, 128, "float32"),
        ("no state", 64, 64, "float32"),
        ("no state", 128, 64, "bfloat16"),
        ("packed", 64, 64, "bfloat16"),
        ("packed", 128, 128, "float32"),
        ("per segment", 64, 64, "float32"),
        ("per segment", 128, 64, "float16"),
        ("per segment", 128, 128, "bfloat16"),
    ],
)
def test_compiles_for_cuda(kind, K, V, dtype):
    one_token = arguments_of(kind, K, V, dtype, T=1)
    kernels = names_of_kernels(functools.partial(forward, token_by_token, kind), one_token)
    assert kernels == ["wkv7_recurrent_outputs"]
    tokens = arguments_of(kind, K, V, dtype, T=33, fused=K == 64)
    kernels = names_of_kernels(functools.partial(gradient, token_by_token, kind), tokens)
    assert kernels == ["wkv7_recurrent_outputs", "wkv7_recurrent_gradients"]


@pytest.mark.parametrize(("K", "V"), [(64, 128), (128, 64)])
def test_compiles_for_cuda_in_reverse(K, V):
    arguments = arguments_of("per segment", K, V, jnp.bfloat16, T=5)
    function = functools.partial(token_by_token, reverse=True)
    names_of_kernels(functools.partial(gradient, function, "per segment"), arguments)


def test_scan_over_checkpointed_layers_compiles_for_cuda():
    def layer(v, others):
        return token_by_token(**others, v=v)[0], None

    def loss(arguments):
        v, others = arguments["v"], {n: x for n, x in arguments.items() if n != "v"}
        return jax.lax.scan(jax.checkpoint(layer), v, others)[0].astype(jnp.float32).sum()

    arguments = arguments_of("plain", 64, 64, jnp.bfloat16, T=5)
    layers = {
        n: x if n == "v" else jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
        for n, x in arguments.items()
    }
    # Outputs, outputs again, gradients.
    assert kernels_for_cuda(jax.grad(loss), layers) == 3


def test_shard_map_of_segments_compiles_for_cuda():
    mesh = jax.make_mesh((1, 1), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    arguments = arguments_of("per segment", 64, 64, jnp.bfloat16, T=5)
    specs = dict.fromkeys(arguments, PartitionSpec("batch", None, "heads"))
    specs["segment_ids"] = PartitionSpec("batch")
    sharded = jax.shard_map(
        functools.partial(gradient, token_by_token, "per segment"),
        mesh=mesh,
        in_specs=(specs,),
        out_specs={n: spec for n, spec in specs.items() if n != "segment_ids"},
    )
    assert len(names_of_kernels(sharded, arguments)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_written_over_where_that_is_safe(kind):
    def aliases(transform, *arguments):
        function = transform(functools.partial(forward, token_by_token, kind))
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("#stablehlo.output_operand_alias")

    arguments = arguments_of(kind, 64, 64, jnp.bfloat16, T=1)
    assert aliases(lambda function: function, arguments) == (kind in ("plain", "packed"))
    mapped = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), arguments)
    if "initial_state" in arguments:
        mapped["initial_state"] = arguments["initial_state"]
    axes = {name: None if name == "initial_state" else 0 for name in arguments}
    assert aliases(lambda function: jax.vmap(function, (axes,)), mapped) == 0


@on_cpu
def test_interpreted_keeps_a_state_that_is_needed_again():
    arrays = {n: jnp.asarray(make_inputs(CASES["one token"])[n], jnp.float32) for n in NAMES}
    state = jnp.asarray(make_inputs(CASES["one token"])["initial_state"], jnp.float32)
    before = np.asarray(state)

    @jax.jit
    def twice(arrays, state):
        return interpreted(**arrays, initial_state=state), by_xla(**arrays, initial_state=state)

    found, reference = twice(arrays, state)
    for x, y in zip(found, reference, strict=True):
        assert relative_rms(x, y) < 1e-6
    np.testing.assert_array_equal(state, before)

    one_state_for_all = jax.vmap(lambda r: interpreted(**arrays | {"r": r}, initial_state=state))
    o, final = one_state_for_all(jnp.stack([arrays["r"], 2 * arrays["r"]]))
    assert relative_rms(o[1], 2 * found[0]) < 1e-6
    assert relative_rms(final[1], found[1]) < 1e-6


def test_states_are_kept_for_the_backward_only():
    arguments = arguments_of("plain", 64, 64, jnp.bfloat16, T=33)
    kept = jax.ShapeDtypeStruct((2, 5, 2, 64, 64), jnp.float32)

    def shapes_made(function):
        jaxpr = jax.make_jaxpr(functools.partial(function, token_by_token, "plain"))(arguments)
        return str(jaxpr)

    name = f"f32{list(kept.shape)}".replace(" ", "")
    assert name not in shapes_made(forward)
    assert name in shapes_made(gradient)


@on_cpu
def test_other_devices_are_refused():
    arrays = dict.fromkeys(NAMES, jnp.ones((1, 4, 1, 64), jnp.bfloat16))
    with pytest.raises(NotServed, match=r"mosaic_gpu needs a Hopper GPU.*'cpu'"):
        on_gpu(**arrays)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (64, 192)])
def test_served(K, V, dtype):
    k, v = (jax.ShapeDtypeStruct((1, 4, 1, D), dtype) for D in (K, V))
    check_recurrent_served(RecurrentInputs(k, k, k, v, k, k))


@pytest.mark.parametrize(
    ("K", "V", "dtype", "decay_dtype", "message"),
    [
        (64, 64, jnp.float64, jnp.float32, r"k\.dtype=float64"),
        (64, 64, jnp.float32, jnp.float64, r"log_decay\.dtype=float64"),
        (32, 64, jnp.float32, jnp.float32, "K=32"),
        (192, 64, jnp.float32, jnp.float32, "K=192"),
        (64, 96, jnp.float32, jnp.float32, "V=96"),
    ],
)
def test_not_served(K, V, dtype, decay_dtype, message):
    with jax.enable_x64():
        k, v = (jax.ShapeDtypeStruct((1, 4, 1, D), dtype) for D in (K, V))
        log_decay = jax.ShapeDtypeStruct(k.shape, decay_dtype)
    with pytest.raises(NotServed, match=message):
        check_recurrent_served(RecurrentInputs(k, log_decay, k, v, k, k))


@pytest.mark.parametrize(("K", "chosen"), [(64, ["wkv7_recurrent_outputs"]), (32, [])])
def test_none_takes_the_kernels_that_serve(K, chosen):
    arguments = arguments_of("plain", K, K, jnp.bfloat16, T=1)
    with in_mesh_of("NVIDIA H100 80GB HBM3", 132):
        assert names_of_kernels(lambda arguments: wkv7_recurrent(**arguments), arguments) == chosen


# On a Hopper GPU. The definition is evaluated there too, in float64, by the scan that
# `test_wkv7.test_float64` holds to the definition in numpy, which would take minutes.


def assert_exact_enough(function, case: Case) -> None:
    results = run(function, case, jnp.dtype(case.dtype))
    with jax.enable_x64():
        reference = jax.device_get(run(by_xla, case, jnp.float64))
    errors = {name: relative_rms(x, reference[name]) for name, x in results.items()}
    output_limit, gradient_limit = LIMITS[case.dtype]
    limits = {n: gradient_limit if n.startswith("d_") else output_limit for n in errors}
    assert all(errors[n] <= limits[n] for n in errors), errors  # not if one is NaN


AT_SIZE = {
    "one token": Case((512, 1, 16, 64, 64)),
    "one token, bfloat16": Case((512, 1, 16, 64, 64), dtype="bfloat16"),
    "one token, K and V 128": Case((64, 1, 16, 128, 128), dtype="bfloat16"),
    "33 tokens": Case((16, 33, 16, 64, 64)),
    "33 tokens, bfloat16": Case((16, 33, 16, 64, 64), dtype="bfloat16", scale=0.125),
    "33 tokens, float16, K 128": Case((4, 33, 16, 128, 128), dtype="float16"),
    "33 tokens, mixed decay": Case((16, 33, 16, 64, 64), "mixed"),
    "500 tokens": Case((1, 500, 4, 64, 64)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", AT_SIZE)
def test_at_size(name):
    assert_exact_enough(on_gpu, AT_SIZE[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES | ROUNDED)
def test_equals_the_definition_on_the_gpu(name):
    check(on_gpu, (CASES | ROUNDED)[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["five tokens, scaled", "packed", "states per segment"])
def test_reverse_on_the_gpu(name):
    check(functools.partial(backwards, on_gpu), CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("transformation", [by_rows, row_after_row, in_shard_map])
def test_transformations_on_the_gpu(transformation):
    case = Case((2, 33, 2, 64, 64))
    check(functools.partial(transformed, transformation, on_gpu), case)


@pytest.mark.gpu
def test_states_of_a_stack_on_the_gpu():
    """A loop takes states from a stack and puts them back, as layers do, while decoding."""
    case = Case((4, 1, 2, 64, 64))
    token = {n: jnp.asarray(make_inputs(case)[n], jnp.float32) for n in NAMES}
    stack = jax.random.normal(jax.random.key(0), (3, 4, 2, 64, 64))

    @functools.partial(jax.jit, static_argnums=0)
    def read_tokens(function, stack):
        def layer(_, state):
            o, state = function(**token, initial_state=state)
            return None, (state, o)

        def step(stack, _):
            return jax.lax.scan(layer, None, stack)[1]

        return jax.lax.scan(step, stack, length=5)

    found, reference = read_tokens(on_gpu, stack), read_tokens(by_xla, stack)
    for x, y in zip(found, reference, strict=True):
        assert relative_rms(x, y) < 2e-6


@pytest.mark.gpu
def test_repeats_are_equal_on_the_gpu():
    case = Case((16, 33, 16, 128, 64), dtype="bfloat16")
    first = jax.device_get(run(on_gpu, case, jnp.bfloat16))
    for _ in range(10):
        again = jax.device_get(run(on_gpu, case, jnp.bfloat16))
        chex.assert_trees_all_equal(again, first)
