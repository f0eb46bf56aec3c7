"""One token through all layers: interpreted and compiled for CUDA on any machine, and on a GPU.

The model's own tests compare the definition with the modules.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    LayerWeights,
    decode_layers,
    key_update,
    log_decay_from_logits,
    output_correction,
    value_residual,
    wkv7_recurrent,
)
from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.target import Target
from pallas_kernels.operators.decode_layers.mosaic_gpu.heads import HeadWeights, Vectors, heads
from pallas_kernels.operators.decode_layers.mosaic_gpu.layers import check_served, run_layers
from pallas_kernels.operators.decode_layers.mosaic_gpu.norm_mix import NormWeights, norm_mix
from pallas_kernels.operators.decode_layers.mosaic_gpu.projections import (
    Product,
    padded_rows,
    projections,
    split_projection,
    splits_of,
)
from pallas_kernels.operators.decode_layers.reference import (
    decode_layers_reference,
    layer_norm,
)
from pallas_kernels.operators.decode_layers.weights import MATRICES
from tests.helpers import relative_rms

EPS = {"norm_eps": 1e-5, "head_norm_eps": 64e-5}

# Relative RMS against the definition in float32.
LIMIT = 1.2e-2  # of two layers; measured 7.6e-3 in x, 6.3e-3 in states
ROUNDING = 3e-3  # of results that are rounded to bfloat16 once or twice; measured 2.4e-3

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs")
interpreted = Target(interpret=True)


def shapes(layers: int, B: int, C: int, F: int, ranks: tuple[int, ...]) -> tuple:
    """The arguments of a call but for `active`, as shapes."""

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((layers, *shape), dtype)

    weights = {f.name: of(C) for f in dataclasses.fields(LayerWeights)}
    weights["time_shift_mix"] = of(6, C)
    weights |= dict.fromkeys(("receptance", "key", "value", "output"), of(C, C))
    for name, rank in zip(("decay", "alpha", "value_residual", "gate"), ranks, strict=True):
        weights |= {f"{name}_down": of(C, rank), f"{name}_up": of(rank, C)}
    of_heads = ("removal_scale", "replacement_mix", "bonus", "head_norm_scale", "head_norm_bias")
    weights |= dict.fromkeys(of_heads, of(C // 64, 64))
    weights |= {"channel_key": of(C, F), "channel_value": of(F, C)}
    x = jax.ShapeDtypeStruct((B, C), jnp.bfloat16)
    shift, wkv = of(B, C), of(B, C // 64, 64, 64, dtype=jnp.float32)
    return x, (shift, wkv, shift), LayerWeights(**weights)


def make(*sizes, seed: int = 0) -> tuple:
    """Random arguments of a call."""
    x, (time_shift, wkv, channel_shift), weights = shapes(*sizes)
    rng = np.random.default_rng(seed)

    def normal(like, scale=1.0, mean=0.0):
        return jnp.asarray(mean + scale * rng.normal(size=like.shape), like.dtype)

    def weight(name, like):
        if name in MATRICES:
            return normal(like, like.shape[1] ** -0.5)
        if name.endswith("shift_mix"):
            return normal(like, 0.3, 0.5)
        around_one = name.endswith("scale") or name == "replacement_mix"
        return normal(like, 0.5, float(around_one))

    named = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights)}
    weights = LayerWeights(**{name: weight(name, like) for name, like in named.items()})
    states = (normal(time_shift), normal(wkv, 0.3), normal(channel_shift))
    return normal(x), states, weights


def in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize(("layers", "B"), [(1, 1), (2, 3)])
def test_interpreted_equals_the_definition(layers, B):
    x, states, weights = make(layers, B, 256, 256, (32, 64, 96, 128))
    active = None if B == 1 else jnp.array([True, False, True])
    found = run_layers(interpreted, x, states, active, weights, *EPS.values())
    arguments = in_float32((x, *states)), active, in_float32(weights)
    expected = decode_layers_reference(*arguments[0], *arguments[1:], **EPS)
    rows = slice(None) if active is None else np.asarray(active)
    assert relative_rms(found[0][rows], expected[0][rows]) < LIMIT
    for new, reference, old in zip(found[1:], expected[1:], states, strict=True):
        assert relative_rms(new[:, rows], reference[:, rows]) < LIMIT
        if active is not None:
            assert (new[:, 1] == old[:, 1]).all()  # the row that rests


@on_cpu
@pytest.mark.parametrize("rows", [1, 8, 130])
def test_projections(rows):
    """Several products, more tiles than the ring has room for, and rows in two blocks."""
    rng = np.random.default_rng(0)
    R = padded_rows(rows)
    assert R % 8 == 0
    assert R - rows < 16

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    layer = jnp.ones(1, jnp.int32)
    products = [
        Product(normal(R, 64), normal(2, 64, 128), jnp.tanh),
        Product(normal(R, 1024), normal(2, 1024, 64) / 32),
    ]
    for y, product in zip(projections(interpreted, layer, products, rows), products, strict=True):
        x, weight = in_float32((product.x, product.weights[1]))
        expected = (product.activation or (lambda x: x))(x @ weight)
        assert y.dtype == jnp.bfloat16
        assert relative_rms(y[:rows], expected[:rows]) < ROUNDING

    few = dataclasses.replace(interpreted, multiprocessors=3)
    parts = split_projection(few, layer, products[1], rows)
    assert parts.shape == (2, R, 64)  # of three multiprocessors, as 16 steps divide by 2 only
    assert relative_rms(parts.sum(0)[:rows], expected[:rows]) < 1e-6


def test_mapped_calls_follow_one_another():
    """At once, they could write over one state."""
    x, states, weights = shapes(1, 1, 256, 256, (64,) * 4)

    def run(xs, states, weights):
        return jax.vmap(lambda x: call(x, states, weights, implementation="mosaic_gpu"))(xs)

    xs = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    traced = jax.jit(run).trace(xs, states, weights)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.while") == 1
    assert program.count("custom_call @mosaic_gpu") == 8


def test_splits_give_most_multiprocessors_a_part():
    target = Target(multiprocessors=132)
    assert splits_of(target, 1024, 1024) == 8
    assert splits_of(target, 4096, 1024) == 8
    assert splits_of(target, 768, 768) == 6
    assert splits_of(target, 4096, 4096) == 2
    assert splits_of(target, 1024, 65536) == 1


@on_cpu
def test_norm_mix():
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(rng.normal(size=shape), dtype)

    B, C = 3, 768
    x, parts = normal(B, C) + 100, normal(2, 8, C, dtype=jnp.float32)  # cancels in the norm
    weights, shift = NormWeights(normal(2, C), normal(2, C), normal(2, 2, C)), normal(2, B, C)
    new_x, mixed, new_shift = norm_mix(
        interpreted, jnp.ones(1, jnp.int32), x, parts, weights, shift, None, 1e-5
    )
    expected_x = (x.astype(jnp.float32) + parts.sum(0)[:B]).astype(jnp.bfloat16)
    assert (new_x == expected_x).all()
    token = layer_norm(expected_x, weights.scale[1], weights.bias[1], 1e-5)
    assert relative_rms(new_shift[1], token) < ROUNDING
    assert (new_shift[0] == shift[0]).all()
    for m, y in enumerate(mixed):
        expected = token + (shift[1] - token).astype(jnp.float32) * weights.mixes[1, m][None]
        assert relative_rms(y[:B], expected) < ROUNDING


@on_cpu
@pytest.mark.parametrize(
    "kind",
    ["random", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("repeated", "no key"))],
)
def test_heads_over_many_tokens(kind):
    """States do not drift: tokens that repeat with next to no decay, or have no removal key."""
    rng = np.random.default_rng(0)
    T, C = 24, 64

    def normal(*shape, scale=1.0, mean=0.0):
        return jnp.asarray(mean + scale * rng.normal(size=shape), jnp.bfloat16)

    tokens = Vectors(*(normal(T, 8, C) for _ in Vectors._fields))
    weights = HeadWeights(*(normal(1, C, mean=1.0) for _ in HeadWeights._fields))
    if kind == "repeated":
        tokens = jax.tree.map(lambda x: jnp.repeat(x[:1], T, axis=0), tokens)
        tokens = tokens._replace(decay=tokens.decay - 20, alpha=tokens.alpha + 20)
    if kind == "no key":
        tokens = tokens._replace(k=tokens.k * 0)
    layer = jnp.zeros(1, jnp.int32)

    def run(step, wkv):
        def body(wkv, token):
            y, wkv = step(token, wkv)
            return wkv, y[:2]

        return jax.lax.scan(body, wkv, tokens)

    def kernel(token, wkv):
        return heads(interpreted, layer, token, weights, wkv, None, EPS["head_norm_eps"])

    wkv = jnp.asarray(0.3 * rng.normal(size=(1, 2, 1, 64, 64)), jnp.float32)
    found, expected = run(kernel, wkv), run(functools.partial(heads_by_definition, weights), wkv)
    assert relative_rms(found[0], expected[0]) < 1e-5  # measured 2.7e-7
    assert relative_rms(found[1], expected[1]) < ROUNDING


def heads_by_definition(weights, token, wkv):
    """Through the operators it is made of."""
    r, k, v, v_first, decay, alpha, residual, gate = (
        x[:2].astype(jnp.float32)[:, None, None] for x in token
    )
    w = jax.tree.map(lambda x: x[0].astype(jnp.float32)[None], weights)

    def base(x):
        return x[None, None]

    v = value_residual(v, v_first, residual + base(w.value_residual_base))
    alpha = jax.nn.sigmoid(alpha + base(w.alpha_base))
    k, a, b = key_update(k, alpha, w.removal_scale, w.replacement_mix)
    log_decay = log_decay_from_logits(decay + base(w.decay_base))
    o, new = wkv7_recurrent(r, log_decay, k, v, a, b, initial_state=wkv[0])
    corrected = (gate, w.bonus, w.norm_scale, w.norm_bias)
    y = output_correction(o, r, k, v, *corrected, eps=EPS["head_norm_eps"])
    return y[:, 0, 0], new[None]


@on_cpu
@pytest.mark.parametrize(("B", "C", "F"), [(3, 768, 3072), (130, 1024, 4096), (1, 4096, 16384)])
def test_compiles_for_cuda(B, C, F):
    x, states, weights = shapes(2, B, C, F, (64, 96, 32, 480))
    active = jax.ShapeDtypeStruct((B,), jnp.bool_)

    def run(x, states, active, weights):
        return run_layers(Target(), x, states, active, weights, *EPS.values())

    traced = jax.jit(run).trace(x, states, active, weights)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @mosaic_gpu") == 8  # one layer, called twice
    assert program.count("#stablehlo.output_operand_alias") == 3  # states stay where they are


def call(x, states, weights, **settings):
    return decode_layers(x, *states, weights, **settings)


def test_wrong_arguments_are_named():
    x, states, weights = make(1, 2, 64, 64, (32,) * 4)
    assert call(x, states, weights)[0].shape == (2, 64)
    with pytest.raises(TypeError, match="weights must be a LayerWeights, got dict"):
        call(x, states, {})
    with pytest.raises(ValueError, match=r"weights\.gate_up must have shape .*gate_rank=32"):
        call(x, states, dataclasses.replace(weights, gate_up=weights.gate_up[:, 1:]))
    with pytest.raises(ValueError, match=r"wkv must have shape .*B=2, got shape=\(1, 1, 1"):
        call(x, (states[0], states[1][:, :1], states[2]), weights)
    with pytest.raises(TypeError, match="channel_shift must have the dtype of x, bfloat16"):
        call(x, (*states[:2], in_float32(states[2])), weights)
    with pytest.raises(TypeError, match="active must have dtype bool, got int32"):
        call(x, states, weights, active=jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="implementation='triton' is unknown"):
        call(x, states, weights, implementation="triton")
    wide = dataclasses.replace(weights, **{n: jnp.ones((1, 32, 2)) for n in ("removal_scale",)})
    with pytest.raises(ValueError, match=r"weights\.replacement_mix must have shape"):
        call(x, states, wide)


def test_what_kernels_do_not_serve_is_refused():
    x, (_, wkv, _), weights = make(1, 1, 256, 256, (64,) * 4)
    check_served(x, wkv, weights)
    for change, message in (
        ({"x": x.astype(jnp.float32)}, "bfloat16 inputs, got x.dtype=dtype.'float32'"),
        ({"wkv": wkv[..., :32]}, "heads of 64"),
        ({"wkv": wkv.astype(jnp.bfloat16)}, "states in float32, got wkv.dtype=dtype.bfloat16"),
        ({"x": x[:, :64]}, "C to be a multiple of 256"),
        ({"weights": in_float32(weights)}, "got weights.receptance in float32"),
        (
            {"weights": dataclasses.replace(weights, channel_key=weights.channel_key[..., :32])},
            "F to be a multiple of 64, got F=32",
        ),
    ):
        with pytest.raises(NotServed, match=message):
            check_served(**({"x": x, "wkv": wkv, "weights": weights} | change))
    if jax.default_backend() == "cpu":
        with pytest.raises(NotServed, match="needs a Hopper GPU"):
            call(x, (x[None], wkv, x[None]), weights, implementation="mosaic_gpu")


@pytest.mark.gpu
def test_arguments_from_a_stack_on_the_gpu():
    """Loops take tokens, states and weights from stacks, and put states back."""
    stacks = [make(2, 3, 256, 256, (64,) * 4, seed=seed) for seed in range(3)]
    x, states, weights = jax.tree.map(lambda *stack: jnp.stack(stack), *stacks)

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(x, states, weights, **settings):
        def one(_, arguments):
            x, states, weights = arguments
            x, *states = call(x, states, weights, **settings)
            return None, (x, tuple(states))

        def step(states, _):
            x_of_all, states = jax.lax.scan(one, None, (x, states, weights))[1]
            return states, x_of_all

        return jax.lax.scan(step, states, length=3)

    found = run(x, states, weights, implementation="mosaic_gpu")
    exact = run(*in_float32((x, states, weights)), implementation="reference")
    for x, reference in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert relative_rms(x, reference) < 2 * LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 7, 128, 200])
def test_on_the_gpu_equals_the_definition(B):
    x, states, weights = make(4, B, 1024, 4096, (64, 64, 32, 128))
    found = call(x, states, weights, implementation="mosaic_gpu")
    exact = in_float32((x, states, weights))
    expected = call(*exact, implementation="reference")
    in_bfloat16 = call(x, states, weights, implementation="reference")
    for x, reference, rounded in zip(found, expected, in_bfloat16, strict=True):
        assert relative_rms(x, reference) < 1.2 * relative_rms(rounded, reference)
    again = call(*make(4, B, 1024, 4096, (64, 64, 32, 128)), implementation="mosaic_gpu")
    chex.assert_trees_all_equal(found, again)
