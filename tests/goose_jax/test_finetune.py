"""LoRA and state tuning, on a model small enough to compile in a moment."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from goose_jax import RWKV7, RWKV7Config, load_pretrained, load_state, save_pretrained, save_state
from goose_jax.checkpoints import CheckpointError, CheckpointMetadata, load_checkpoint
from goose_jax.checkpoints.fingerprint import fingerprint
from goose_jax.data import next_token_batch
from goose_jax.training import (
    LoraConfig,
    OptimizerConfig,
    TuningCheckpoint,
    apply_lora,
    check_base,
    full_loss,
    init_lora,
    init_tuning_state,
    init_wkv,
    load_tuning_checkpoint,
    lora_loss,
    make_tuning_step,
    merge_lora,
    save_tuning_checkpoint,
    state_loss,
    tuned_state,
    with_params,
    wkv_of,
)
from tests.helpers import relative_rms

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

CONFIG = RWKV7Config(
    vocab_size=16,
    hidden_size=32,
    num_layers=2,
    head_size=16,
    head_norm_eps=64e-5,
    compute_dtype="float32",
)
LORA = LoraConfig(rank=3, alpha=6.0)
RECIPE = OptimizerConfig(
    total_steps=30, warmup_steps=0, learning_rate=3e-2, final_learning_rate=3e-2
)
T = 12  # short enough for the token by token operator, which compiles fastest
BATCH = next_token_batch(np.random.default_rng(1).integers(0, 16, (4, T + 1)))


def noisy(tree, seed, scale=0.1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (leaf + scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), tree
    )


@pytest.fixture(scope="module")
def model():
    """Away from initial values, where many parameters are zero; and with nothing to compile."""
    graphdef, shapes = nnx.split(with_settings())
    rng = np.random.default_rng(0)

    def value(path, shape):
        is_scale = jax.tree_util.keystr(path, simple=True).endswith("scale")
        return jnp.asarray(is_scale + 0.2 * rng.normal(size=shape.shape), jnp.float32)

    return nnx.merge(graphdef, jax.tree.map_with_path(value, nnx.to_pure_dict(shapes)))


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.fixture(scope="module")
def params(model):
    return params_of(model)


@pytest.fixture(scope="module")
def adapters(params):
    """As after training: both factors are away from zero."""
    return noisy(init_lora(params, LORA, jax.random.key(0)), 1)


@pytest.fixture(scope="module")
def forward():
    return nnx.jit(lambda model, state=None: model(jnp.asarray(BATCH.inputs), state)[0])


@pytest.mark.slow
def test_the_gradient_is_that_of_a_dense_model_projected(model, params, adapters):
    def gradient(loss):
        return jax.jit(jax.grad(lambda *trees: loss(*trees, BATCH) / BATCH.targets.size))

    found = gradient(lora_loss(model, LORA))(adapters, params)
    dense = gradient(full_loss(model))(apply_lora(params, adapters, LORA), {})["blocks"]
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    for module, pairs in adapters.items():
        for name, pair in pairs.items():
            dW = 2.0 * np.asarray(dense[module][name], np.float64)  # alpha / rank
            down, up = np.float64(pair["down"]), np.float64(pair["up"])
            gradients = found[module][name]
            # Measured: 2.2e-7 at most.
            assert relative_rms(gradients["down"], dW @ up.swapaxes(1, 2)) < 1e-5
            assert relative_rms(gradients["up"], down.swapaxes(1, 2) @ dW) < 1e-5


def test_new_adapters_change_nothing(model, params, forward):
    new = init_lora(params, LORA, jax.random.key(0))
    assert all(np.any(pair["down"]) for pairs in new.values() for pair in pairs.values())
    adapted = with_params(model, apply_lora(params, new, LORA))
    np.testing.assert_array_equal(forward(adapted), forward(model))
    low = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    chex.assert_trees_all_equal(apply_lora(low, new, LORA), low)


def test_the_merged_model_is_the_base_with_its_adapters(model, params, adapters, forward):
    graphdef = nnx.graphdef(model)

    @jax.jit
    def with_adapters(params, adapters):
        changed = apply_lora(params, adapters, LORA, CONFIG.compute_dtype)
        return nnx.merge(graphdef, changed)(jnp.asarray(BATCH.inputs))[0]

    merged = merge_lora(model, adapters, LORA)
    expected = forward(model)
    found = forward(merged)
    assert relative_rms(found, expected) > 0.1  # measured: 0.68
    assert relative_rms(found, with_adapters(params, adapters)) < 1e-5  # measured: 0

    pair = adapters["channel_mix"]["value"]
    key = merged.blocks.channel_mix.value[...]
    exact = np.float64(params["blocks"]["channel_mix"]["value"])
    exact = exact + 2 * (np.float64(pair["down"]) @ np.float64(pair["up"]))
    assert relative_rms(key, exact) < 1e-6  # measured: 2.8e-8

    low = merge_lora(model, adapters, LORA, dtype="bfloat16")
    assert low.config.param_dtype == low.head[...].dtype.name == "bfloat16"
    np.testing.assert_array_equal(low.blocks.channel_mix.value[...], key.astype("bfloat16"))


def with_settings(**changes):
    """A model of which only the structure counts."""
    config = dataclasses.replace(CONFIG, **changes)
    return nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))


def train(loss, initial, frozen, steps=30):
    step = make_tuning_step(loss, RECIPE)
    state = init_tuning_state(initial, RECIPE)
    values = []
    for _ in range(steps):
        state, metrics = step(state, frozen, BATCH)
        values.append(float(metrics.loss))
    return state, values


@pytest.mark.slow
def test_only_adapters_are_trained(params):
    """Beside a model in bfloat16, with remat."""
    low = with_settings(param_dtype="bfloat16", compute_dtype="bfloat16", remat="full")
    frozen = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    before = jax.tree.map(np.array, frozen)
    initial = init_lora(params, LORA, jax.random.key(0))
    state, losses = train(lora_loss(low, LORA), initial, frozen)
    assert losses[-1] < losses[0] - 1  # measured: from 3.42 to 0.19
    chex.assert_trees_all_equal(frozen, before)

    trained = sum(leaf.size for leaf in jax.tree.leaves(initial))
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert kept <= 2 * trained + 8  # two moments of Adam, and counters
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.params))


def test_what_is_frozen_is_no_part_of_the_program(model, params):
    """The program is made where nothing is known of it but shapes."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    for loss, initial in (
        (lora_loss(model, LORA), init_lora(params, LORA, jax.random.key(0))),
        (state_loss(model), init_wkv(CONFIG)),
    ):
        state = init_tuning_state(initial, RECIPE)
        program = make_tuning_step(loss, RECIPE).lower(state, shapes, BATCH)
        assert 'dense<"0x' not in program.as_text()  # as a constant array would be written


@pytest.mark.slow
def test_initial_states_are_trained_and_exported(model, params, forward, tmp_path):
    before = jax.tree.map(np.array, params)
    state, losses = train(state_loss(model), init_wkv(CONFIG), params)
    assert losses[-1] < losses[0] - 0.15  # measured: from 3.42 to 3.16
    chex.assert_trees_all_equal(params, before)
    assert state.params["wkv"].shape == (2, 2, 16, 16)

    start = tuned_state(state.params, CONFIG)
    save_state(tmp_path / "state.pth", start, CONFIG, "time_state")
    loaded = load_state(tmp_path / "state.pth", CONFIG, batch_size=4)
    tuned = forward(model, tuned_state(state.params, CONFIG, 4))
    np.testing.assert_array_equal(forward(model, loaded), tuned)
    assert relative_rms(tuned, forward(model)) > 0.1  # measured: 0.27
    again = wkv_of(load_state(tmp_path / "state.pth", CONFIG))
    np.testing.assert_array_equal(again["wkv"], state.params["wkv"])


def test_states_that_cannot_be_tuned(model, params):
    packed = next_token_batch(np.ones((2, 5), int), np.ones((2, 5), int))
    with pytest.raises(ValueError, match="batch has segment_ids"):
        state_loss(model)(init_wkv(CONFIG), params, packed)
    with pytest.raises(ValueError, match="must have one row"):
        wkv_of(tuned_state(init_wkv(CONFIG), CONFIG, 2))
    start = tuned_state(init_wkv(CONFIG), CONFIG)
    with pytest.raises(ValueError, match="token shifts"):
        wkv_of(dataclasses.replace(start, time_shift=start.time_shift + 1))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"alpha": 0.0}, "alpha must be a number > 0, got 0.0"),
        ({"alpha": float("nan")}, "alpha must be a number > 0, got nan"),
    ],
)
def test_adapters_that_make_no_sense(numbers, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**numbers)


@pytest.fixture
def adapter(model, adapters):
    return TuningCheckpoint(
        params=adapters,
        lora=LORA,
        base_config=model.config,
        base_fingerprint=fingerprint(model),
        base_path="/a/model",
        metadata=CheckpointMetadata("byte", 3, {"text": "x"}),
    )


def test_what_is_saved_is_loaded(tmp_path, model, adapter):
    save_tuning_checkpoint(tmp_path / "lora", adapter)
    loaded = load_tuning_checkpoint(tmp_path / "lora")
    chex.assert_trees_all_equal(loaded.params, adapter.params)
    for field in ("lora", "base_config", "base_fingerprint", "base_path", "metadata", "kind"):
        assert getattr(loaded, field) == getattr(adapter, field)
    states = dataclasses.replace(adapter, lora=None, params=noisy(init_wkv(CONFIG), 2))
    save_tuning_checkpoint(tmp_path / "state", states)
    loaded = load_tuning_checkpoint(tmp_path / "state")
    assert loaded.kind == "state"
    np.testing.assert_array_equal(loaded.params["wkv"], states.params["wkv"])

    with pytest.raises(FileExistsError):
        save_tuning_checkpoint(tmp_path / "lora", adapter)
    with pytest.raises(CheckpointError, match="and not the model: for adapters use goose-jax mer"):
        load_checkpoint(tmp_path / "lora")
    save_pretrained(model, tmp_path / "model", "native")
    with pytest.raises(CheckpointError, match="holds a model, and nothing that was tuned"):
        load_tuning_checkpoint(tmp_path / "model")
    file = tmp_path / "lora" / "adapter.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"kind": "state"}))
    with pytest.raises(CheckpointError, match=r"damaged: adapter\.json is not what was written"):
        load_tuning_checkpoint(tmp_path / "lora")


def test_the_base_is_known_by_all_of_its_weights(tmp_path, model, adapter):
    for layout in ("native", "pth"):
        save_pretrained(model, tmp_path / layout, layout)
        check_base(adapter, load_pretrained(tmp_path / layout)[0], layout)

    changed = params_of(model)
    changed["blocks"]["channel_mix"]["key"] = (
        changed["blocks"]["channel_mix"]["key"].at[1, 5, 7].add(1e-3)
    )
    with pytest.raises(CheckpointError, match=r"x is not the model .* same sizes, but other weig"):
        check_base(adapter, with_params(model, changed), "x")
    low, _ = load_pretrained(tmp_path / "native", dtype="bfloat16")
    with pytest.raises(CheckpointError, match="param_dtype is 'bfloat16' rather than 'float32'"):
        check_base(adapter, low, "x")

    # The first layer's value residual, which is not used, is absent from most files.
    unused = params_of(model)
    residual = unused["blocks"]["time_mix"]["value_residual_base"]
    unused["blocks"]["time_mix"]["value_residual_base"] = residual.at[0].set(0)
    check_base(adapter, with_params(model, unused), "x")
    used = params_of(model)
    used["blocks"]["time_mix"]["value_residual_base"] = residual.at[1].set(0)
    with pytest.raises(CheckpointError, match="other weights"):
        check_base(adapter, with_params(model, used), "x")
