"""Decoding of a trained model, whose logits are as decided as those of real ones."""

import dataclasses
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from goose_jax import (
    RWKV7,
    RWKV7Config,
    SamplingConfig,
    generate,
    init_state,
    load_state,
    prefill,
    save_state,
    take_rows,
)
from goose_jax.data import random_batch
from goose_jax.training import OptimizerConfig, init_train_state, make_train_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("module_quick_to_compile")]

TEXT = np.frombuffer((Path(__file__).parents[2] / "LICENSE").read_bytes(), np.uint8)
TOKENS = TEXT.astype(np.int32)
READ = TOKENS[1000:2000]
CONFIG = RWKV7Config(
    vocab_size=256,
    hidden_size=64,
    num_layers=2,
    head_size=32,
    decay_rank=8,
    alpha_rank=8,
    value_rank=8,
    gate_rank=8,
    compute_dtype="float32",
)
STEPS = 200
LOGITS_TOLERANCE = 1e-4  # absolute, of logits up to 11; measured 5e-6
LEAST_AGREEMENT = 0.99  # of the most probable tokens in bfloat16; measured 0.999
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def params():
    model = RWKV7(CONFIG, rngs=nnx.Rngs(0))
    recipe = OptimizerConfig(
        total_steps=STEPS, learning_rate=5e-3, final_learning_rate=5e-4, warmup_steps=10
    )
    train_step, state = make_train_step(model, recipe), init_train_state(model, recipe)
    for step in range(STEPS):
        batch = random_batch(TOKENS, step, batch_size=8, sequence_length=64, seed=0)
        state, metrics = train_step(state, batch)
    assert metrics.loss < 1.2  # nats; measured 0.95, and 5.7 before training
    return state.params


def model_of(params, compute_dtype):
    config = dataclasses.replace(CONFIG, compute_dtype=compute_dtype)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, params)


@jax.jit
def parallel_logits(model, tokens):
    return model(tokens[None])[0][0]


@jax.jit
def decoded_logits(model, tokens):
    """Of the same tokens, read one by one with the state carried over."""

    def step(state, token):
        logits, state = model(token[None, None], state)
        return state, logits[0, 0]

    return jax.lax.scan(step, init_state(model.config, 1), tokens)[1]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_decoding_agrees_with_the_parallel_forward(params, compute_dtype):
    model = model_of(params, compute_dtype)
    parallel = np.asarray(parallel_logits(model, READ))
    decoded = np.asarray(decoded_logits(model, READ))
    same = parallel.argmax(axis=-1) == decoded.argmax(axis=-1)
    if compute_dtype == "float32":
        assert np.abs(parallel - decoded).max() < LOGITS_TOLERANCE
        assert same.all()
    assert same.mean() >= LEAST_AGREEMENT
    # It has learnt something: most letters are guessed.
    assert (parallel[:-1].argmax(axis=-1) == READ[1:]).mean() > 0.6  # measured 0.70


def test_greedy_text_is_that_of_the_parallel_forward_in_bfloat16(params):
    model = model_of(params, "bfloat16")
    prompt = READ[:16].tolist()
    new = generate(model, [prompt], max_new_tokens=984, sampling=GREEDY).sequences[0]
    logits = np.asarray(parallel_logits(model, np.array(prompt + new, np.int32)))[15:-1]
    chosen = np.take_along_axis(logits, np.array(new)[:, None], axis=-1)
    # Where two tokens are as good as equal, and the text repeats them, either may be chosen.
    assert (logits.max(axis=-1, keepdims=True) - chosen).max() < 0.05  # logits are up to 10.4


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_saved_state_resumes_exactly(params, tmp_path, compute_dtype):
    model = model_of(params, compute_dtype)
    state = prefill(model, [READ[:16].tolist()])
    save_state(tmp_path / "state.pth", state, model.config, "rwkv")
    loaded = load_state(tmp_path / "state.pth", model.config)
    chex.assert_trees_all_equal(loaded, state)
    forks = load_state(tmp_path / "state.pth", model.config, batch_size=3)
    chex.assert_trees_all_equal(forks, take_rows(state, [0] * 3))

    rest, settings = READ[16:18].tolist(), {"max_new_tokens": 50, "sampling": GREEDY}
    expected = generate(model, [rest], state=state, **settings)
    resumed = generate(model, [rest], state=loaded, **settings)
    assert resumed.sequences == expected.sequences
    chex.assert_trees_all_equal(resumed.state, expected.state)
