import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from goose_jax.training import OptimizerConfig, learning_rate_schedule, make_optimizer
from goose_jax.training.optimizer import decayed_weights
from tests.helpers import relative_rms

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

CONFIG = OptimizerConfig(total_steps=50)
DECAYED = {
    "embedding",
    "head",
    "blocks.time_mix.receptance",
    "blocks.time_mix.key",
    "blocks.time_mix.value",
    "blocks.time_mix.output",
    "blocks.channel_mix.key",
    "blocks.channel_mix.value",
}


@pytest.fixture(scope="module")
def params():
    """Shapes of a model's parameters, by name."""
    config = RWKV7Config(vocab_size=11, hidden_size=32, num_layers=2, head_size=16)
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def filled(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)


def by_name(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def test_exactly_the_official_matrices_decay(params):
    chosen = by_name(decayed_weights(params))
    assert {name for name, decays in chosen.items() if decays} == DECAYED
    assert len(chosen) > 30


def test_parameters_are_recognised_in_an_nnx_state():
    model = nnx.Dict(time_mix=nnx.Dict(value=nnx.Param(jnp.ones(3)), bonus=nnx.Param(jnp.ones(3))))
    chosen = by_name(decayed_weights(nnx.state(model)))
    assert chosen == {"time_mix.value.value": True, "time_mix.bonus.value": False}


@pytest.mark.slow
def test_updates_are_those_of_the_recipe(params):
    """Three steps, written out for each parameter in float64."""
    config = dataclasses.replace(CONFIG, warmup_steps=2, weight_decay=0.3)
    rates = [float(learning_rate_schedule(config)(step)) for step in range(3)]
    weights = filled(params, seed=0)
    gradients = [filled(params, seed=step + 1) for step in range(3)]

    transformation = make_optimizer(config)
    state = transformation.init(weights)
    updated = weights
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, updated)
        updated = optax.apply_updates(updated, updates)

    clip = [1 / math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
            for gradient in gradients]  # fmt: skip
    for name, weight in by_name(weights).items():
        w = np.float64(weight)
        m = v = np.zeros_like(w)
        for t in range(3):
            g = clip[t] * np.float64(by_name(gradients[t])[name])
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
            direction = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.99 ** (t + 1))) + 1e-18)
            rate = rates[t] * (2 if name == "blocks.time_mix.decay_base" else 1)
            w = w - rate * (direction + (0.3 * w if name in DECAYED else 0))
        change = by_name(updated)[name] - weight
        assert relative_rms(change, w - weight) < 1e-3, name  # 1.2e-4: float32 differences
    assert len(by_name(weights)) > 30


def test_short_gradients_are_not_scaled(params):
    weights = filled(params, seed=0)
    gradient = jax.tree.map(lambda leaf: leaf * 1e-6, filled(params, seed=1))
    adam = optax.scale_by_adam(b1=0.9, b2=0.99, eps=1e-18)
    expected, _ = adam.update(gradient, adam.init(weights))
    transformation = make_optimizer(dataclasses.replace(CONFIG, weight_decay=0.0))
    updates, _ = transformation.update(gradient, transformation.init(weights), weights)
    rate = float(learning_rate_schedule(CONFIG)(0))
    np.testing.assert_allclose(updates["head"], -rate * expected["head"], rtol=1e-6)


def test_the_schedule():
    """Against the official lines of code at every step, and beyond the last."""
    config = OptimizerConfig(
        total_steps=40, warmup_steps=8, learning_rate=3e-4, final_learning_rate=2e-5
    )
    schedule = jax.jit(learning_rate_schedule(config))
    for step in [*range(41), 1000]:
        progress = max(0, min(1, (step - 8) / (40 - 8)))
        factor = 2e-5 / 3e-4
        rate = 3e-4 * ((0.5 + factor / 2) + (0.5 - factor / 2) * math.cos(math.pi * progress))
        if step < 8:
            rate *= 0.01 + 0.99 * step / 8
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-5)  # 2e-6: float32 cosine


def test_a_schedule_without_warmup_begins_at_the_peak():
    config = OptimizerConfig(total_steps=1, warmup_steps=0, learning_rate=1e-3)
    assert float(learning_rate_schedule(config)(0)) == pytest.approx(1e-3)


def test_the_smallest_eps_keeps_parameters_without_gradient():
    transformation = make_optimizer(dataclasses.replace(CONFIG, eps=1.2e-38, weight_decay=0.0))
    weights = {"head": jnp.ones(3)}
    gradient = {"head": jnp.zeros(3)}
    updates, _ = jax.jit(transformation.update)(gradient, transformation.init(weights), weights)
    assert not np.asarray(updates["head"]).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("total_steps", 10),
        ("total_steps", -1),
        ("warmup_steps", 1.5),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("final_learning_rate", 1.0),
        ("final_learning_rate", math.nan),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", -1e-8),
        ("eps", 0.0),
        ("weight_decay", math.inf),
        ("weight_decay", -0.1),
        ("max_gradient_norm", 0.0),
        ("decay_base_rate", math.nan),
    ],
)
def test_wrong_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        OptimizerConfig(**({"total_steps": 50} | {name: value}))
