"""The parts of the model used alone."""

import dataclasses
import doctest
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from goose_jax import Block, ChannelMix, RWKV7Config, TimeMix
from goose_jax.nn import LayerNorm
from tests.goose_jax.official_weights import golden_model
from tests.helpers import relative_rms

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

CONFIG = RWKV7Config(vocab_size=9, hidden_size=128, num_layers=2, compute_dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["config", "nn.time_mix", "nn.channel_mix", "nn.block", "nn.model"]
)
def test_docstring_examples(module):
    module = importlib.import_module(f"goose_jax.{module}")
    names = vars(importlib.import_module("goose_jax")) | {"jnp": jnp, "nnx": nnx}
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(module, extraglobs=names):
        runner.run(test)
    assert runner.failures == 0
    assert runner.tries > 0


@pytest.mark.slow
def test_blocks_one_by_one_equal_the_scan():
    """Layer 0 of the stack by `is_first`, alone by leaving out `v_first`: the same results."""
    model = golden_model()
    graphdef, params = nnx.split(model.blocks)
    x = jax.random.normal(jax.random.key(0), (2, 18, 128))

    @jax.jit
    def one_by_one(params, x):
        v_first, states = None, []
        for i in range(3):
            block = nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], params))
            x, v_first, state = block(x, v_first)
            states.append(state)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    @jax.jit
    def scanned(params, x):
        def body(carry, of_layer):
            i, params = of_layer
            x, v_first, state = nnx.merge(graphdef, params)(*carry, is_first=i == 0)
            return (x, v_first), state

        v_first = jnp.full((2, 18, 2, 64), jnp.inf)  # ignored
        (x, _), states = jax.lax.scan(body, (x, v_first), (jnp.arange(3), params))
        return x, states

    x_expected, expected = one_by_one(params, x)
    x_actual, actual = scanned(params, x)
    assert relative_rms(x_actual, x_expected) < 1e-5  # measured: 0
    for field in dataclasses.fields(expected):
        assert relative_rms(getattr(actual, field.name), getattr(expected, field.name)) < 1e-5


def test_layer_norm():
    x = 100 + 3 * jax.random.normal(jax.random.key(0), (2, 3, 128))
    norm = LayerNorm(CONFIG)
    norm.scale[...] = jnp.linspace(0.5, 2, 128)
    norm.bias[...] = jnp.linspace(-1, 1, 128)
    exact = np.asarray(x, np.float64)
    exact = exact - exact.mean(-1, keepdims=True)
    exact /= np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-5)
    exact = exact * np.linspace(0.5, 2, 128) + np.linspace(-1, 1, 128)
    assert relative_rms(norm(x), exact) < 1e-5  # measured: 1.8e-6
    low = LayerNorm(dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    assert low(x.astype("bfloat16")).dtype == jnp.bfloat16


def test_mixes_after_a_norm_equal_those_of_the_norm():
    keys = jax.random.split(jax.random.key(1), 4)
    x, v_first = jax.random.normal(keys[0], (2, 5, 128)), jax.random.normal(keys[1], (2, 5, 2, 64))
    segment_ids = jnp.array([[1, 1, 2, 2, 2], [0, 3, 3, 0, 3]])
    shift = jax.random.normal(keys[2], (2, 128))
    state = (shift, jax.random.normal(keys[3], (2, 2, 64, 64)))
    norm = LayerNorm(CONFIG)
    norm.scale[...] = jnp.linspace(0.5, 2, 128)
    norm.bias[...] = jnp.linspace(-1, 1, 128)
    time_mix, channel_mix = (m(CONFIG, layer=1, rngs=nnx.Rngs(0)) for m in (TimeMix, ChannelMix))
    time_mix.output[...] = jnp.eye(128)
    channel_mix.value[...] = jnp.eye(CONFIG.intermediate_size, 128)
    pairs = [
        (time_mix(norm(x), v_first, state, segment_ids), (v_first, state), time_mix),
        (channel_mix(norm(x), shift, segment_ids), (shift,), channel_mix),
    ]
    for expected, arguments, mix in pairs:
        *actual, handed_on = mix.after_norm(norm, x, *arguments, segment_ids)
        assert handed_on is x or relative_rms(handed_on, x) == 0
        for found, of_call in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert relative_rms(found, of_call) < 1e-5


def test_a_block_rounds_the_residual_stream_once():
    """In bfloat16. Gradients do not depend on the dtype, so tests in float32 judge them."""
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    graphdef, params = nnx.split(nnx.jit(lambda: Block(config, layer=0, rngs=nnx.Rngs(0)))())
    params.time_mix.output[...] = params.time_mix.receptance[...]  # initially zero
    params.channel_mix.value[...] = params.channel_mix.key[...].T

    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def run(params, x):
        block = nnx.merge(graphdef, params)
        y = block.time_mix.after_norm(block.time_mix_norm, x)[0]
        z = block.channel_mix.after_norm(block.channel_mix_norm, x + y)[0]
        exact = sum(term.astype("float32") for term in (x, y, z))
        return block(x)[0], exact.astype(x.dtype), x + y + z

    x = jax.random.normal(jax.random.key(1), (2, 20, 128)).astype("bfloat16")
    actual, once, twice = run(params, x)
    np.testing.assert_array_equal(actual, once)
    assert np.mean(np.asarray(actual != twice)) > 0.1


X = jnp.ones((2, 3, 128))
V_FIRST = jnp.ones((2, 3, 2, 64))
SHIFT, WKV = jnp.ones((2, 128)), jnp.ones((2, 2, 64, 64))


def outputs(module, config, layer, *arrays, **options):
    """The shapes and dtypes that a new module returns. Nothing is computed."""

    def run(*arrays):
        return module(config, layer=layer, rngs=nnx.Rngs(0))(*arrays, **options)

    return jax.eval_shape(run, *arrays)


@pytest.fixture(scope="module")
def block():
    """The structure alone, which is enough for what is checked before anything is computed."""
    return nnx.eval_shape(lambda: Block(CONFIG, layer=1, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.astype("bfloat16"),), TypeError, "x must have dtype float32, got bfloat16"),
        ((X, None), ValueError, "v_first must be given, the values of the first layer"),
        ((X[0],), ValueError, r"x must have 3 axes \[B, T, C\]"),
        ((X[..., :64],), ValueError, "x must have shape .* with C=128"),
        ((X, V_FIRST[:, :2]), ValueError, "v_first must have shape .* with T=3"),
        ((X, V_FIRST.astype("float16")), TypeError, "v_first must have dtype float32"),
        ((X, V_FIRST, (SHIFT[:1], WKV)), ValueError, r"state\[0\] must have shape .* with B=2"),
        ((X, V_FIRST, (SHIFT, WKV[:, :1])), ValueError, r"state\[1\] must have shape .* with H=2"),
        ((X, V_FIRST, (SHIFT, WKV.astype("bfloat16"))), TypeError, r"state\[1\] must have dtype"),
        ((X, V_FIRST, None, jnp.zeros((2, 4), int)), ValueError, "segment_ids .* with T=3"),
    ],
)
@pytest.mark.usefixtures("only_own_checks")
def test_wrong_calls_of_the_time_mix(block, arguments, error, message):
    with pytest.raises(error, match=message):
        block.time_mix(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.astype("bfloat16"),), TypeError, "x must have dtype float32, got bfloat16"),
        ((X[..., :64],), ValueError, "x must have shape .* with C=128"),
        ((X, SHIFT[:1]), ValueError, "state must have shape .* with B=2"),
        ((X, None, jnp.zeros((2, 3))), TypeError, "segment_ids must have an integer dtype"),
    ],
)
@pytest.mark.usefixtures("only_own_checks")
def test_wrong_calls_of_the_channel_mix(block, arguments, error, message):
    with pytest.raises(error, match=message):
        block.channel_mix(*arguments)


@pytest.mark.parametrize("module", [TimeMix, ChannelMix, Block])
@pytest.mark.usefixtures("only_own_checks")
def test_wrong_layer(module):
    with pytest.raises(ValueError, match=r"layer=2 must be at least 0 and less than .*=2"):
        module(CONFIG, layer=2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("module", [TimeMix, ChannelMix, Block])
@pytest.mark.usefixtures("only_own_checks")
def test_inputs_have_the_compute_dtype(module):
    """And the error for another dtype tells both ways out of it."""
    config = dataclasses.replace(CONFIG, compute_dtype=jnp.bfloat16)
    message = "x must have dtype bfloat16, got float32: .* compute_dtype='float32'"
    with pytest.raises(TypeError, match=message):
        outputs(module, config, 0, X)
    assert outputs(module, config, 0, X.astype("bfloat16"))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("module", [TimeMix, Block])
def test_only_the_first_layer_does_without_the_values_of_the_first(module):
    _, v_first, _ = outputs(module, CONFIG, 0, X)
    outputs(module, CONFIG, 1, X, v_first)
    for is_first in (False, jnp.array(True)):
        with pytest.raises(ValueError, match=r"v_first must be given, .*is_first=True"):
            outputs(module, CONFIG, 1, X, is_first=is_first)


def test_is_first_lets_any_time_mix_be_the_first():
    time_mix = nnx.jit(lambda: TimeMix(CONFIG, layer=1, rngs=nnx.Rngs(0)))()
    time_mix.output[...] = time_mix.receptance[...]  # initially zero

    @jax.jit
    def read(x):
        alone = time_mix(x, is_first=True)[:2]
        return alone, time_mix(x, 7 * V_FIRST, is_first=True)[:2], time_mix(x, 7 * V_FIRST)[0]

    (y, v_first), (same, ignored), other = read(jax.random.normal(jax.random.key(1), X.shape))
    np.testing.assert_array_equal(ignored, v_first)
    assert relative_rms(same, y) < 1e-6  # measured: 0
    assert relative_rms(other, y) > 0.1  # measured: 0.3
