import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NotServed, cross_entropy, cross_entropy_sum
from pallas_kernels.hopper.target import Target, compile_for
from pallas_kernels.operators.cross_entropy import mosaic_gpu as cross_entropy_kernels
from pallas_kernels.operators.cross_entropy.logits_product import statistics_of_product
from pallas_kernels.operators.cross_entropy.statistics import (
    gradients_of_logits,
    statistics_xla,
)
from pallas_kernels.precision import contract
from tests.pallas_kernels.operator_checks import (
    assert_close,
    check_shard_map,
    check_transformations,
    count_kernels,
    draw,
    evaluate,
    kernels_for_cuda,
    saved_for_backward,
)

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

IMPLEMENTATIONS = ("xla", "reference")
ROWS, LENGTH, CHANNELS, VOCAB = 2, 7, 8, 50
INPUTS = draw(0, hidden=(ROWS, LENGTH, CHANNELS), weight=(CHANNELS, VOCAB))
TARGETS = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
TARGETS[0, 0], TARGETS[1, 6] = 0, VOCAB - 1
DLOSSES = draw(1000, x=(ROWS, LENGTH))["x"]  # the cotangent that `evaluate` draws

# dtype: relative RMS errors of losses and gradients. The probabilities are rounded to 16 bits
# before the products that give the gradients.
LIMITS = {
    "float64": (1e-14, 1e-13),
    "float32": (1e-6, 2e-6),
    "bfloat16": (1e-6, 5e-3),
    "float16": (1e-6, 7e-4),
}


def formula(hidden, weight, l2wrap, dlosses=DLOSSES):
    """Losses and gradients in float64, written out; the first of equal logits is the largest."""
    logits = hidden @ weight
    exponentials = np.exp(logits)
    normalizer = exponentials.sum(-1)
    rows, positions = np.indices(TARGETS.shape)
    losses = np.log(normalizer) - logits[rows, positions, TARGETS]
    dlogits = exponentials / normalizer[..., None]
    dlogits[rows, positions, TARGETS] -= 1
    dlogits[rows, positions, logits.argmax(-1)] += l2wrap * logits.max(-1)
    dlogits *= dlosses[..., None]
    return losses, {
        "hidden": dlogits @ weight.T,
        "weight": np.einsum("btc,btv->cv", hidden, dlogits),
    }


def judge(inputs, dtype="float32", l2wrap=0.3, **options):
    expected_losses, expected_gradients = formula(**inputs, l2wrap=l2wrap)
    with jax.enable_x64(dtype == "float64"):
        arrays = {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
        function = functools.partial(cross_entropy, targets=TARGETS, l2wrap=l2wrap, **options)
        (losses,), gradients = evaluate(function, arrays)
    assert losses.dtype == ("float64" if dtype == "float64" else "float32")
    assert_close(losses, expected_losses, LIMITS[dtype][0], "losses")
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_close(gradient, expected_gradients[name], LIMITS[dtype][1], name)


def judge_sum(inputs, dtype="float32", l2wrap=0.3, token_weights=DLOSSES, **options):
    losses, expected = formula(**inputs, l2wrap=l2wrap, dlosses=token_weights)
    with jax.enable_x64(dtype == "float64"):
        sums = "float64" if dtype == "float64" else "float32"
        arrays = {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
        arrays["token_weights"] = jnp.asarray(token_weights, sums)

        def function(arrays):
            return cross_entropy_sum(**arrays, targets=TARGETS, l2wrap=l2wrap, **options)

        value, gradients = jax.jit(jax.value_and_grad(function))(arrays)
        undifferentiated = jax.jit(function)(arrays)
    assert value.dtype == sums
    weighted = token_weights * losses
    for found in (value, undifferentiated):  # relative to the sum of magnitudes, as terms cancel
        assert abs(float(found) - weighted.sum()) <= LIMITS[dtype][0] * abs(weighted).sum()
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype
        limit = LIMITS[dtype][name != "token_weights"]
        assert_close(gradient, (expected | {"token_weights": losses})[name], limit, name)


# Largest errors measured: float32 losses 3.3e-8, gradients 1.0e-7;
# bfloat16 losses 3.3e-8, gradients 2.5e-3.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("l2wrap", [0, 0.3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_formula(implementation, l2wrap, dtype):
    judge(INPUTS, dtype, l2wrap, implementation=implementation, chunk_size=4)


# Largest errors measured: bfloat16 2.4e-3, float16 3.0e-4, float32 1.1e-7.
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_sum_equals_the_formula(implementation, dtype):
    judge_sum(INPUTS, dtype, implementation=implementation, chunk_size=4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_sum_with_the_weights_of_a_mean_over_many_tokens(dtype):
    judge_sum(INPUTS, dtype, l2wrap=0, token_weights=np.full(TARGETS.shape, 2.0**-12))


def large_inputs(vocab, tokens=TARGETS.shape, channels=CHANNELS):
    """Inputs whose logits go up and down, some of them equal."""
    inputs = draw(3, hidden=(*tokens, channels), weight=(channels, vocab))
    inputs["weight"][:, vocab // 2 :] = inputs["weight"][:, : vocab - vocab // 2]
    return inputs


# A part of the vocabulary has 8 logits; or a loop of one turn, a vector more, and one of 8 logits.
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter is for CPUs")
@pytest.mark.usefixtures("no_races_and_no_hanging")
@pytest.mark.slow
@pytest.mark.parametrize("vocab", [64, 8 * (5 * 1024 + 8)])
def test_interpreted_statistics_of_logits(vocab):
    inputs, targets = large_inputs(vocab), TARGETS.copy()
    targets[0, :3] = vocab - 1, vocab // 8, vocab // 8 - 1
    logits = jnp.asarray(inputs["hidden"] @ inputs["weight"], jnp.float32)
    with compile_for(Target(multiprocessors=3, interpret=True)):
        found = cross_entropy_kernels._statistics(logits, jnp.asarray(targets))
    expected = statistics_xla(logits, jnp.asarray(targets))
    for name, limit in (("largest", 0), ("log_total", 1e-6), ("first", 0), ("of_target", 0)):
        x, y = (np.asarray(getattr(statistics, name)) for statistics in (found, expected))
        np.testing.assert_allclose(x, y, rtol=limit, atol=limit, err_msg=name)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter is for CPUs")
@pytest.mark.usefixtures("no_races_and_no_hanging")
@pytest.mark.slow
@pytest.mark.parametrize("with_exponentials", [False, True])
def test_interpreted_product_with_statistics(with_exponentials):
    x, y = (jnp.asarray(x, jnp.bfloat16) for x in draw(5, x=(512, 192), y=(192, 512)).values())
    x /= 4  # so that all bases are 0
    y = y.at[:, 256:].set(y[:, :256])  # each row has its largest logit in both tiles
    targets = np.random.default_rng(6).integers(-2, 514, 512).astype(np.int32)
    target = Target(multiprocessors=4, interpret=True)  # two clusters, with two tiles each
    run = functools.partial(statistics_of_product, target, with_exponentials=with_exponentials)
    exponentials, found = jax.jit(run)(x, y, jnp.asarray(targets))
    exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    largest = exact[:, :256].max(-1)
    assert (exponentials is not None) == (found.first is not None) == with_exponentials
    if with_exponentials:
        assert exponentials.dtype == jnp.bfloat16
        assert 15 < abs(exact).max() < 50
        np.testing.assert_allclose(np.asarray(exponentials, float), np.exp(exact), rtol=4e-3)
        np.testing.assert_array_equal(found.first, np.stack([exact[:, :256].argmax(-1)] * 2))
    total = np.exp(exact[:, :256] - largest[:, None]).sum(-1)
    is_target = np.arange(512) == targets[:, None]
    of_target = np.where(is_target, exact, 0).reshape(512, 2, 256).sum(-1)
    assert_close(found.largest, np.stack([largest] * 2), 1e-6, "largest")
    assert_close(found.total, np.stack([total] * 2), 1e-6, "total")
    assert_close(found.of_target, of_target.T, 1e-6, "of_target")


def tied_inputs(vocab, tokens, size):
    """Tokens and head whose logits are exact in float32, and the largest ones equal, in two tiles.

    So few digits have no rounded sums, in whatever order they are added. A size of 0 stands for all
    `SIZES`, one for each token in turn.
    """
    inputs = large_inputs(vocab, tokens)
    inputs = {name: jnp.asarray(np.round(x * 8) / 8, jnp.bfloat16) for name, x in inputs.items()}
    hidden = jnp.concatenate([inputs["hidden"]] * 8, axis=2)
    sizes = jnp.asarray(SIZES if size == 0 else [size], hidden.dtype)
    sizes = jnp.resize(sizes, tokens)[..., None]
    return hidden * sizes, jnp.concatenate([inputs["weight"]] * 8, axis=0)


SIZES = (2.0**-10, 2.0**-3, 1, 2.0**17)
"""Of logits: their exponentials may round alike though they differ, or be zero but for one. The
largest logits of all tokens, of some or of none are below 50."""


def judge_finder(hidden, weight, targets, chunk_size):
    """Compares statistics and gradients from the kernel of a product with those of XLA's logits."""
    finder = cross_entropy_kernels._IN_PRODUCT
    counts = jnp.arange(targets.shape[1])[None] + jnp.zeros_like(targets) != 9

    @functools.partial(jax.jit, static_argnums=3)
    def run(hidden, weight, targets, l2wrap):
        find_gradients, found = finder.gradients(hidden, weight, targets)
        gradients = find_gradients(found, l2wrap, counts)
        logits = contract("btc,cv->btv", hidden, weight)
        expected = gradients_of_logits(logits, targets, found, l2wrap)
        return gradients, jnp.where(counts[..., None], expected, 0), found

    expected = statistics_xla(contract("btc,cv->btv", hidden, weight), targets)
    for_losses = jax.jit(finder.statistics, static_argnums=3)(hidden, weight, targets, chunk_size)
    assert for_losses.first is None
    for l2wrap in (0.0, 0.3):
        gradients, reference, found = run(hidden, weight, targets, l2wrap)
        assert gradients.dlogits.dtype == jnp.bfloat16
        gradient = np.asarray(gradients.dlogits, float) * np.asarray(gradients.factors)[..., None]
        # Measured, interpreted: 1.7e-3.
        assert_close(gradient, np.asarray(reference, float), 3e-3, "gradient")
    for statistics in (found, for_losses._replace(first=found.first)):
        for name, limit in (("largest", 0), ("log_total", 2e-6), ("first", 0), ("of_target", 0)):
            x, y = (np.asarray(getattr(z, name)) for z in (statistics, expected))
            np.testing.assert_allclose(x, y, rtol=limit, atol=limit, err_msg=name)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter is for CPUs")
@pytest.mark.usefixtures("no_races_and_no_hanging")
@pytest.mark.slow
@pytest.mark.parametrize("size", [0, *SIZES])
def test_interpreted_statistics_from_the_product(size):
    hidden, weight = tied_inputs(512, (2, 128), size)
    targets = np.random.default_rng(7).integers(0, 512, (2, 128)).astype(np.int32)
    targets[0, :6] = 0, 255, 256, 511, -1, 512
    with compile_for(Target(multiprocessors=1, interpret=True)):
        judge_finder(hidden, weight, jnp.asarray(targets), chunk_size=64)


# All logits of one token are above 50, or below -50, or none of any token. Tokens that do not count
# have a nan, or targets out of range.
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter is for CPUs")
@pytest.mark.usefixtures("no_races_and_no_hanging")
@pytest.mark.slow
@pytest.mark.parametrize("added", [0, 100, -100])
def test_interpreted_sum_with_the_kernel_of_the_product(added):
    arrays = draw(8, hidden=(2, 128, 64), weight=(64, 512))
    arrays["hidden"] /= 4
    arrays["hidden"][..., 0], arrays["weight"][0] = 0, 1
    arrays["hidden"][1, 3, 0] = added
    logits = arrays["hidden"] @ arrays["weight"]
    assert (abs(logits) > 50).all(-1).sum() == (added != 0)
    assert (abs(logits) > 50).sum() == 512 * (added != 0)
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
    targets = np.random.default_rng(9).integers(0, 512, (2, 128)).astype(np.int32)
    counts = np.ones((2, 128), bool)
    counts[0, :3] = False

    def run(arrays, targets, counts, implementation):
        options = {"l2wrap": 1e-3, "implementation": implementation}

        def loss(arrays, targets):
            weights = jnp.asarray(counts, jnp.float32)
            return cross_entropy_sum(**arrays, targets=targets, token_weights=weights, **options)

        def sum_of_losses(arrays, targets):
            return cross_entropy(**arrays, targets=targets, **options).sum()

        functions = (loss, sum_of_losses) if counts.all() else (loss,)
        return [jax.jit(jax.value_and_grad(f))(arrays, targets) for f in functions]

    damaged = targets.copy()
    damaged[0, :2] = -1, 512
    with_nan = arrays | {"hidden": arrays["hidden"].at[0, 2].set(jnp.nan)}
    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    with compile_for(Target(multiprocessors=1, interpret=True)):
        found = run(arrays, targets, counts | True, "mosaic_gpu")
        found += run(with_nan, damaged, counts, "mosaic_gpu")
    expected = run(exact, targets, counts | True, "reference")
    expected += run(exact, targets, counts, "reference")
    for (value, gradients), (exact_value, exact_gradients) in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, exact_value, rtol=2e-6)
        for name, gradient in gradients.items():
            limit = LIMITS["bfloat16"][1]  # measured: 2.9e-3
            assert_close(gradient, np.asarray(exact_gradients[name], float), limit, name)


# A kernel multiplies 256 tokens, XLA 26. Eight parts of 768 columns end within tiles of 256.
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter is for CPUs")
@pytest.mark.usefixtures("no_races_and_no_hanging")
@pytest.mark.slow
@pytest.mark.parametrize("tokens", [128, 13])
def test_interpreted_exponentials_of_parts(tokens):
    hidden, weight = tied_inputs(768, (2, tokens), 1)
    targets = jnp.zeros((2, tokens, 8), jnp.int32)
    parts = weight.reshape(64, 8, 96)
    with compile_for(Target(multiprocessors=1, interpret=True)):
        results = jax.jit(cross_entropy_kernels._exponentials_of_parts)(hidden, parts, targets)
    found, bases = (np.asarray(x, float) for x in results[:2])
    assert results[0].dtype == jnp.bfloat16
    logits = np.asarray(hidden, float) @ np.asarray(weight, float)
    by_tile, found = (x.reshape(2, tokens, 24, 32) for x in (logits, found))
    expected = np.exp(by_tile - bases.reshape(2, tokens, 24, 1))
    # What is e^-87 of the largest one, at most e^50, is zero.
    np.testing.assert_allclose(found, expected, rtol=4e-3, atol=1e-15)


@pytest.mark.parametrize(
    ("tokens", "vocab", "chunk_size"),
    [
        ((8, 4096), 65536, 8192),
        ((16, 512), 65536, 4096),  # never all logits at once
        ((2, 256), 65536, 2048),
        ((8, 4096), 64, 2048),  # logits in float32
    ],
)
def test_chunks_are_longer_where_numbers_are_shorter(tokens, vocab, chunk_size):
    weight, targets = jnp.zeros((64, vocab), jnp.bfloat16), jnp.zeros(tokens, jnp.int32)
    with compile_for(Target()):
        finder = cross_entropy_kernels._finder(weight)
        chosen = cross_entropy_kernels._chunk_size(finder, weight, targets, in_float32=2048)
    assert chosen == chunk_size


@pytest.mark.parametrize("vocab", [64, 65536, 128256])
def test_the_sum_compiles_for_cuda(vocab):
    shapes = {"hidden": (2, 9, 64), "weight": (64, vocab)}
    arrays = {n: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for n, shape in shapes.items()}
    integers = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    weights = jax.ShapeDtypeStruct((2, 9), jnp.float32)

    def loss(arrays, targets, token_weights):
        return cross_entropy_sum(
            **arrays, targets=targets, token_weights=token_weights, implementation="mosaic_gpu"
        )

    for function in (loss, jax.value_and_grad(loss)):
        assert kernels_for_cuda(function, arrays, integers, weights) == 1


def test_the_sum_multiplies_in_the_kernel_for_cuda():
    shapes = {"hidden": (2, 256, 128), "weight": (128, 65536)}
    arrays = {n: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for n, shape in shapes.items()}
    integers = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    weights = jax.ShapeDtypeStruct((2, 256), jnp.float32)

    def loss(arrays, targets, token_weights):
        options = {"chunk_size": 256, "l2wrap": 1e-4, "implementation": "mosaic_gpu"}
        return cross_entropy_sum(**arrays, targets=targets, token_weights=token_weights, **options)

    for function, products in ((loss, 0), (jax.value_and_grad(loss), 2)):
        traced = jax.jit(function).trace(arrays, integers, weights)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert count_kernels(program) == 1
        assert program.count("stablehlo.dot_general") == products


@pytest.mark.parametrize(
    ("implementation", "channels", "chunk"),
    [
        ("mosaic_gpu", 64, "tensor<8192x65536xbf16>"),
        ("mosaic_gpu", 72, "tensor<2x1024x65536xf32>"),
        ("xla", 64, "tensor<2x1024x65536xf32>"),
    ],
)
def test_chunks_of_the_sum_for_cuda(implementation, channels, chunk):
    hidden = jax.ShapeDtypeStruct((2, 8192, channels), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((channels, 65536), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((2, 8192), jnp.int32)
    weights = jax.ShapeDtypeStruct((2, 8192), jnp.float32)
    loss = functools.partial(cross_entropy_sum, implementation=implementation)
    traced = jax.jit(jax.value_and_grad(loss)).trace(hidden, weight, targets, weights)
    assert chunk in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("tokens", "products"), [(9, (1, 4)), (256, (0, 2))])
def test_losses_compile_for_cuda(tokens, products):
    shapes = {"hidden": (2, tokens, 64), "weight": (64, 65536)}
    arrays = {n: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for n, shape in shapes.items()}
    targets = jax.ShapeDtypeStruct((2, tokens), jnp.int32)

    def loss(arrays, targets):
        options = {"l2wrap": 1e-4, "implementation": "mosaic_gpu"}
        return cross_entropy(**arrays, targets=targets, **options).sum()

    for function, kernels, expected in zip(
        (loss, jax.value_and_grad(loss)), (1, 2), products, strict=True
    ):
        traced = jax.jit(function).trace(arrays, targets)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert count_kernels(program) == kernels
        assert program.count("stablehlo.dot_general") == expected


def test_a_vocabulary_in_no_multiple_of_64_is_refused():
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in INPUTS.items()}
    weights = jnp.ones(TARGETS.shape)
    for function in (
        cross_entropy,
        functools.partial(cross_entropy_sum, token_weights=weights),
    ):
        with pytest.raises(NotServed, match=r"multiples of 64, got .*vocab=50"):
            function(**arrays, targets=TARGETS, implementation="mosaic_gpu")


# Of (2, 300) tokens XLA computes logits, over which a kernel passes; of (2, 1024) tokens with
# channels in multiples of 64 a kernel computes logits with their statistics.
@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [64, 65536, 128256])
@pytest.mark.parametrize(("shape", "channels"), [((2, 300), CHANNELS), ((2, 1024), 128)])
def test_the_sum_on_the_gpu(vocab, shape, channels):
    inputs = large_inputs(vocab, shape, channels)
    inputs["weight"] *= (CHANNELS / channels) ** 0.5
    targets = np.random.default_rng(5).integers(0, vocab, shape)
    weights = np.random.default_rng(6).integers(0, 3, shape) / math.prod(shape)
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}

    def run(arrays, implementation):
        def function(arrays):
            options = {"l2wrap": 0.3, "chunk_size": 256, "implementation": implementation}
            weight = jnp.asarray(weights, jnp.float32)
            return cross_entropy_sum(**arrays, targets=targets, token_weights=weight, **options)

        return jax.jit(jax.value_and_grad(function))(arrays)

    def run_losses(arrays, implementation):
        def function(arrays):
            options = {"l2wrap": 0.3, "chunk_size": 256, "implementation": implementation}
            losses = cross_entropy(**arrays, targets=targets, **options)
            return (losses * weights.astype(np.float32)).sum(), losses

        (_, losses), gradients = jax.jit(jax.value_and_grad(function, has_aux=True))(arrays)
        return losses, gradients

    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    for of in (run, run_losses):
        value, gradients = of(arrays, "mosaic_gpu")
        expected, expected_gradients = of(exact, "xla")
        assert_close(value, np.asarray(expected, float), 1e-6, "losses")
        for name, gradient in gradients.items():
            limit = LIMITS["bfloat16"][1]
            assert_close(gradient, np.asarray(expected_gradients[name], float), limit, name)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [65536, 128256])
@pytest.mark.parametrize("size", [0, *SIZES])
def test_statistics_from_the_product_on_the_gpu(vocab, size):
    hidden, weight = tied_inputs(vocab, (8, 512), size)
    targets = np.random.default_rng(7).integers(0, vocab, hidden.shape[:2]).astype(np.int32)
    judge_finder(hidden, weight, jnp.asarray(targets), chunk_size=2048)


def test_the_sum_leaves_out_tokens_without_weight():
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in INPUTS.items()}
    wrong = np.arange(LENGTH) % 2 == 0
    targets = jnp.where(wrong, VOCAB, TARGETS)
    weights = jnp.where(wrong, 0.0, jnp.ones(TARGETS.shape))

    @functools.partial(jax.jit, static_argnums=2)
    def run(targets, weights, implementation):
        def function(arrays):
            return cross_entropy_sum(
                **arrays, targets=targets, token_weights=weights, implementation=implementation
            )

        return jax.value_and_grad(function)(arrays)

    value, gradients = run(targets, weights, "xla")
    losses, expected = formula(**INPUTS, l2wrap=0, dlosses=np.asarray(weights, float))
    np.testing.assert_allclose(value, (losses * weights).sum(), rtol=1e-6)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], 2e-6, name)
    assert float(run(targets, jnp.zeros_like(weights), "xla")[0]) == 0
    assert jnp.isnan(run(targets, jnp.ones_like(weights), "xla")[0])


@pytest.mark.parametrize("chunk_size", [1, 6, 14, 1000])
def test_any_chunk_size(chunk_size):
    judge(INPUTS, chunk_size=chunk_size)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_of_equal_logits_is_the_largest(implementation):
    # Every logit occurs twice, the second time far enough away to be in another vector register.
    weight = np.concatenate([INPUTS["weight"][:, : VOCAB // 2]] * 2, axis=1)
    judge(INPUTS | {"weight": weight}, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits(implementation):
    arrays = {name: jnp.asarray(x) for name, x in INPUTS.items()}
    arrays["hidden"] *= 1e4

    def loss(arrays):
        return cross_entropy(**arrays, targets=TARGETS, implementation=implementation).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(arrays)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, gradients)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1.0, 1e5, 1e30])
def test_equal_logits_share_the_probability(implementation, size):
    hidden, weight = jnp.full((1, 1, 1), size), jnp.array([[1.0, 1.0, -1.0]])

    def loss(weight):
        targets = jnp.zeros((1, 1), int)
        return cross_entropy(hidden, weight, targets, implementation=implementation).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(weight)
    third = np.exp(-2 * size)
    probabilities = np.array([1, 1, third]) / (2 + third)
    np.testing.assert_allclose(value, -np.log(probabilities[0]), rtol=1e-6)
    expected = size * (probabilities - [1, 0, 0])
    np.testing.assert_allclose(gradient[0], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float16_gradients_of_a_mean_over_many_tokens(implementation):
    # A gradient of 1 / 65536 times a small probability is no float16 number.
    arrays = {name: jnp.asarray(x, jnp.float16) for name, x in INPUTS.items()}

    @jax.jit
    def gradient(scale):
        def loss(weight):
            losses = cross_entropy(arrays["hidden"], weight, TARGETS, implementation=implementation)
            return scale * losses.sum()

        return jax.grad(loss)(arrays["weight"]).astype(jnp.float32) / scale

    assert_close(gradient(2.0**-10), gradient(1.0), 1e-3, "weight")  # measured: 2e-5


@pytest.mark.slow
def test_l2wrap_leaves_the_loss_alone():
    arrays = {name: jnp.asarray(x) for name, x in INPUTS.items()}
    for implementation in IMPLEMENTATIONS:
        function = functools.partial(
            cross_entropy, **arrays, targets=TARGETS, implementation=implementation
        )
        np.testing.assert_array_equal(function(l2wrap=0.5), function())


def test_keeps_no_logits():
    inputs = [jnp.asarray(x, jnp.float32) for x in INPUTS.values()]
    function = functools.partial(cross_entropy, targets=TARGETS, chunk_size=2)
    saved = saved_for_backward(function, *inputs)
    assert saved == sorted([TARGETS.shape, TARGETS.shape, *(x.shape for x in inputs)])


def test_the_sum_computes_logits_once():
    hidden, weight = (jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in INPUTS.values())

    def loss(function, hidden, weight):
        return function(hidden, weight, TARGETS).sum()

    def products(function):
        gradient = jax.grad(functools.partial(loss, function), argnums=(0, 1))
        return jax.jit(gradient).lower(hidden, weight).as_text().count("stablehlo.dot_general")

    unweighted = functools.partial(cross_entropy_sum, token_weights=jnp.ones(TARGETS.shape))
    assert (products(unweighted), products(cross_entropy)) == (3, 4)


def test_memory_is_far_below_full_logits():
    rows, length, channels, vocab = 2, 2048, 16, 2048
    hidden = jax.ShapeDtypeStruct((rows, length, channels), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((channels, vocab), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def temporary_bytes(implementation):
        def loss(hidden, weight, targets):
            losses = cross_entropy(
                hidden,
                weight,
                targets,
                l2wrap=1e-4,
                chunk_size=128,
                implementation=implementation,
            )
            return losses.mean()

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return step.lower(hidden, weight, targets).compile().memory_analysis().temp_size_in_bytes

    full_logits = rows * length * vocab * 4  # 32 MiB
    assert temporary_bytes("reference") >= full_logits
    assert temporary_bytes("xla") < full_logits / 10  # measured: 2.4 MiB


def test_targets_out_of_range_give_nan_where_they_cannot_be_checked():
    arrays = {name: jnp.asarray(x) for name, x in INPUTS.items()}
    targets = jnp.asarray(TARGETS).at[0, 1].set(-1).at[1, 2].set(VOCAB)
    wrong = np.zeros(TARGETS.shape, bool)
    wrong[0, 1] = wrong[1, 2] = True
    for implementation in IMPLEMENTATIONS:

        def losses(hidden, weight, targets, implementation=implementation):
            values = cross_entropy(hidden, weight, targets, implementation=implementation)
            return values.sum(), values

        function = jax.jit(jax.grad(losses, argnums=(0, 1), has_aux=True))
        (dhidden, dweight), values = function(arrays["hidden"], arrays["weight"], targets)
        np.testing.assert_array_equal(jnp.isnan(values), wrong)
        np.testing.assert_array_equal(jnp.isnan(dhidden).any(-1), wrong)
        assert jnp.isnan(dweight).all()


def test_transformations():
    function = functools.partial(cross_entropy, targets=TARGETS, l2wrap=0.3, chunk_size=4)
    check_transformations(function, INPUTS)


def test_shard_map():
    def function(targets, **arrays):
        return cross_entropy(**arrays, targets=targets.astype(int), l2wrap=0.3, chunk_size=3)

    check_shard_map(function, INPUTS | {"targets": TARGETS.astype(float)}, ("weight",))


@pytest.mark.slow
def test_shard_map_of_the_sum():
    def function(targets, **arrays):  # the sum of each row
        weights = jnp.broadcast_to(jnp.float32(0.5), targets.shape)
        targets = targets.astype(int)
        total = cross_entropy_sum(**arrays, targets=targets, token_weights=weights, chunk_size=3)
        return jnp.broadcast_to(total / len(targets), targets.shape[:1])

    targets = np.repeat(TARGETS[:1], ROWS, axis=0).astype(float)  # equal rows have equal sums
    hidden = np.repeat(INPUTS["hidden"][:1], ROWS, axis=0)
    check_shard_map(function, INPUTS | {"hidden": hidden, "targets": targets}, ("weight",))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": jnp.ones((7, 8))}, ValueError, r"hidden must have 3 axes \[B, T, C\]"),
        ({"weight": jnp.ones((50, 8))}, ValueError, r"weight must have .* with C=8"),
        ({"weight": jnp.ones((8, 0))}, ValueError, r"weight must not be empty along vocab"),
        (
            {"weight": jnp.ones((8, 50), jnp.bfloat16)},
            TypeError,
            r"weight must have the dtype of hidden",
        ),
        ({"targets": TARGETS[0]}, ValueError, r"targets must have 2 axes"),
        ({"targets": TARGETS * 1.0}, TypeError, r"targets must have an integer dtype"),
        ({"targets": TARGETS - 1}, ValueError, r"targets must be in 0..49, got .* from -1"),
        ({"targets": jnp.asarray(TARGETS) + 1}, ValueError, r"targets must be in .* to 50"),
        ({"l2wrap": -1e-4}, ValueError, r"l2wrap must be a number >= 0 .* got -0.0001"),
        ({"l2wrap": float("nan")}, ValueError, r"l2wrap must be a number >= 0"),
        ({"chunk_size": 0}, ValueError, r"chunk_size must be an integer >= 1, got 0"),
        ({"implementation": "triton"}, ValueError, r"implementation='triton' is unknown"),
    ],
)
def test_wrong_calls(changes, error, message):
    inputs = {name: jnp.asarray(x) for name, x in INPUTS.items()} | {"targets": TARGETS}
    with pytest.raises(error, match=message):
        cross_entropy(**inputs | changes)
    with pytest.raises(error, match=message):
        cross_entropy_sum(**inputs | changes, token_weights=jnp.ones(TARGETS.shape))


def test_wrong_token_weights():
    inputs = {name: jnp.asarray(x) for name, x in INPUTS.items()} | {"targets": TARGETS}
    with pytest.raises(ValueError, match=r"token_weights must have .* with B=2"):
        cross_entropy_sum(**inputs, token_weights=jnp.ones((3, LENGTH)))
    with pytest.raises(TypeError, match=r"token_weights must have a dtype of .* got int32"):
        cross_entropy_sum(**inputs, token_weights=TARGETS)
