"""Training through the kernels for Hopper GPUs."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from goose_jax import RWKV7, RWKV7Config, init_state
from goose_jax.data import next_token_batch
from goose_jax.nn.model import abstract_model
from goose_jax.training import OptimizerConfig, init_train_state, make_train_step
from pallas_kernels import cross_entropy, dispatch
from pallas_kernels.devices import Device, assume_device
from pallas_kernels.hopper.target import Target, compile_for
from tests.goose_jax.official_weights import GOLDEN_CONFIG, golden_model, to_official
from tests.helpers import relative_rms
from tests.pallas_kernels.mesh_cases import moved, partitioned_for_cuda

CONFIG = RWKV7Config(
    vocab_size=64, hidden_size=256, num_layers=2, head_size=64, compute_dtype="bfloat16"
)
RECIPE = OptimizerConfig(total_steps=40, warmup_steps=5, learning_rate=5e-4)

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for CPUs")


TEXTS = {"random": 2, "one token": 3, "three tokens in turn": 2, "nearly parallel keys": 5}
"""How often the error of the gradient through XLA a gradient of one draw may have, by text.

Measured, interpreted: 1.2, 1.9 and 1.5. Parallel keys: below 3 on one CPU, 3.5 on another, for
`removal_scale` of the first layer. Single draws say little: an operator in float32 that adds in
another order is up to 2.9 times as far from the exact gradient of some parameter as XLA.
"""
DRAWS = 12
"""Draws of a text. Their geometric mean is the error of a typical one."""
OF_DRAWS = 1.5
"""How often the typical error of the gradient through XLA that through kernels may be."""


HOPPER = Device(kind="NVIDIA H100", platform="gpu", is_hopper=True, multiprocessors=132)


@functools.cache
def gradient_function(implementation: str, compute_dtype: str, device: Device | None):
    """The configuration, and a gradient that is compiled once for all texts on a device."""
    config = dataclasses.replace(
        GOLDEN_CONFIG,
        implementation=implementation,
        compute_dtype=compute_dtype,
        remat="none",  # JAX cannot differentiate an interpreted kernel within jax.checkpoint
    )

    @jax.jit
    @jax.grad
    def gradient(model, tokens, state):
        hidden, _ = model.hidden(tokens[:, :-1], state)
        head = model.head[...].astype(hidden.dtype)
        return cross_entropy(hidden, head, tokens[:, 1:]).mean()

    return config, gradient


def gradients(
    implementation: str, compute_dtype: str, text: str, draw: int, device: Device | None = None
) -> dict[str, np.ndarray]:
    """Of a loss of the golden model with respect to each parameter, by its official name.

    Texts begin with a state: without one the first outputs are tiny, and the norm of each head
    makes their rounding as large as others' outputs. Keys are nearly parallel where all embeddings
    are one direction with 5 % of noise.
    """
    config, gradient = gradient_function(implementation, compute_dtype, device)
    model, rng = golden_model(config), np.random.default_rng(draw)
    tokens = rng.integers(0, config.vocab_size, (1, 71), np.int32)
    state = init_state(config, 1)
    state = dataclasses.replace(
        state, wkv=jnp.asarray(rng.normal(size=state.wkv.shape), jnp.float32)
    )
    if text in ("one token", "three tokens in turn"):
        tokens = tokens[:, np.arange(71) % (1 if text == "one token" else 3)]
    elif text == "nearly parallel keys":
        shape = (config.vocab_size, config.hidden_size)
        embedding = rng.normal(size=shape[1:]) + 0.05 * rng.normal(size=shape)
        model.embedding[...] = jnp.asarray(embedding, config.param_dtype)
    with assume_device(device) if device else contextlib.nullcontext():
        return to_official(nnx.state(gradient(model, jnp.asarray(tokens), state)))


def errors_of_gradients(
    text: str, draw: int, target: Target | None = None, device: Device | None = None
) -> dict[str, tuple[float, float]]:
    """Returns the errors through kernels and through XLA, for each parameter that has a gradient.

    Args:
      text: a key of `TEXTS`.
      draw: number of the draw.
      target: what to compile the kernels for; None takes the GPU.
      device: whose kernels to take around those of `wkv7`; None takes JAX's default device.
    """
    exact = gradients("xla", "float32", text, draw)
    by_xla = gradients("xla", "bfloat16", text, draw)
    with compile_for(target) if target else contextlib.nullcontext():
        by_kernels = gradients("mosaic_gpu", "bfloat16", text, draw, device)
    errors = {}
    for name, gradient in exact.items():
        assert by_kernels[name].any() == gradient.any(), name
        if gradient.any():
            errors[name] = tuple(relative_rms(x[name], gradient) for x in (by_kernels, by_xla))
    return errors


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.usefixtures("quick_to_compile")
def test_gradients_are_about_as_exact_as_those_of_xla(text):
    for name, (error, of_xla) in errors_of_gradients(text, 0, Target(interpret=True)).items():
        assert error < TEXTS[text] * of_xla, (name, error, of_xla)


@on_cpu
@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_one_token_through_all_kernels_is_as_exact_as_through_xla():
    """With k, a and b rounded to nearest, not by position, the largest ratio would be 2.2."""
    errors = errors_of_gradients("one token", 0, Target(interpret=True), HOPPER)
    for name, (error, of_xla) in errors.items():
        assert error < OF_DRAWS * of_xla, (name, error, of_xla)  # measured: 1.1


@pytest.mark.gpu
@pytest.mark.parametrize("text", TEXTS)
def test_typical_gradients_are_as_exact_as_those_of_xla(text):
    draws = [errors_of_gradients(text, draw) for draw in range(DRAWS)]
    for name in draws[0]:
        error, of_xla = np.exp(np.log([draw[name] for draw in draws]).mean(axis=0))
        assert error < OF_DRAWS * of_xla, (name, error, of_xla)


def losses(implementation: str | None) -> np.ndarray:
    """The loss at every step, of 40 steps on one batch of random tokens."""
    model = RWKV7(dataclasses.replace(CONFIG, implementation=implementation), rngs=nnx.Rngs(0))
    state, step = init_train_state(model, RECIPE), make_train_step(model, RECIPE)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 257), np.int32)
    batch, curve = next_token_batch(tokens), []
    for _ in range(RECIPE.total_steps):
        state, metrics = step(state, batch)
        curve.append(float(metrics.loss))
    return np.array(curve)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", None])
def test_the_loss_falls_as_it_does_through_xla(implementation):
    curve, by_xla = losses(implementation), losses("xla")
    assert np.isfinite(curve).all()
    assert curve[-1] < curve[0] - 0.5
    # Training amplifies rounding: with parameters that differ by 1e-7 at first, XLA's curves on a
    # CPU differ from each other by 0.011 (median of 276 pairs), and by 0.028 at most.
    np.testing.assert_allclose(curve, by_xla, rtol=0, atol=0.06)


@on_cpu
@pytest.mark.slow
def test_a_step_on_eight_gpus_gathers_no_activation(tmp_path, monkeypatch):
    monkeypatch.setitem(dispatch.DEVICE_CHECKS, "mosaic_gpu", lambda: None)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def shapes(make, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(make),
        )

    step = make_train_step(abstract_model(CONFIG), RECIPE)
    rows, tokens = 16, 128
    ids = np.zeros((rows, tokens + 1), np.int32)
    arguments = {
        "state": shapes(lambda: init_train_state(RWKV7(CONFIG, rngs=nnx.Rngs(0)), RECIPE)),
        "batch": shapes(lambda: jax.tree.map(jnp.asarray, next_token_batch(ids)), "data"),
    }
    program, kernels = partitioned_for_cuda(lambda x: step(**x), arguments, tmp_path)
    assert len(kernels) >= 13  # in forward and backward of a layer
    assert not any(f"[{rows},{tokens}" in kernel for kernel in kernels)
    assert max(moved(program).values(), default=0) < rows * tokens * CONFIG.hidden_size // 8
