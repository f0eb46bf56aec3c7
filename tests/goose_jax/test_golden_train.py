"""The recipe against 20 steps of the official code.

    pytest -s tests/goose_jax/test_golden_train.py

prints the differences that docs/training.md lists.
"""

import numpy as np
import pytest
from flax import nnx

from goose_jax.data import next_token_batch
from goose_jax.training import OptimizerConfig, init_train_state, make_train_step, with_params
from tests.goose_jax.official_weights import GOLDEN, golden_model, golden_weights, to_official
from tests.helpers import relative_rms

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

# The rates in the file are those of a run of 50 steps that was cut off after 20.
RECIPE = OptimizerConfig(
    total_steps=50, warmup_steps=10, learning_rate=6e-4, final_learning_rate=6e-5, weight_decay=0.1
)


def assert_below(limit, name, differences):
    largest = np.max(differences)
    print(f"\n{name}: {largest:.1e}")
    assert largest < limit


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "golden_train_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def run(golden):
    """Metrics of each step, and the final weights by official name."""
    model = golden_model()
    train_step = make_train_step(model, RECIPE)
    state = init_train_state(model, RECIPE)
    reports = []
    for tokens in golden["tokens"]:
        state, metrics = train_step(state, next_token_batch(tokens))
        reports.append(metrics)
    final = to_official(nnx.state(with_params(model, state.params), nnx.Param))
    return reports, final


def test_losses(run, golden):
    losses = np.array([metrics.loss for metrics in run[0]])
    differences = np.abs(losses - golden["loss_fp64"])
    assert_below(1e-4, "loss, at any step", differences)  # 1.4e-6


def test_gradient_norms(run, golden):
    norms = np.array([metrics.gradient_norm for metrics in run[0]])
    differences = np.abs(norms / golden["grad_norm_fp64"] - 1)
    assert_below(1e-4, "gradient norm, relative", differences)  # 2.3e-6


def test_learning_rates(run, golden):
    rates = np.array([metrics.learning_rate for metrics in run[0]])
    differences = np.abs(rates / golden["lr"] - 1)
    assert_below(1e-6, "learning rate, relative", differences)  # 1.6e-7


def test_tokens(run):
    assert [int(metrics.tokens) for metrics in run[0]] == [4 * 64] * 20


def test_final_weights(run, golden):
    """Every parameter. The official layer 0 has a value residual that is never used; ours is 0."""
    official = {
        key.removeprefix("final_fp64/"): value
        for key, value in golden.items()
        if key.startswith("final_fp64/")
    }
    unused = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
    assert official.keys() == run[1].keys()
    differences = [relative_rms(run[1][name], official[name]) for name in official.keys() - unused]
    assert_below(1e-3, "final weights, relative, any parameter", differences)  # 2.9e-7
    for name in unused:
        assert not run[1][name].any(), name


def test_the_decay_base_learns_at_twice_the_rate(golden, run):
    """What the losses hardly show: its movement is compared, not its value."""
    start = golden_weights()
    for layer in range(3):
        name = f"blocks.{layer}.att.w0"
        official = golden[f"final_fp64/{name}"] - start[name]
        assert relative_rms(run[1][name] - start[name], official) < 1e-3  # 6e-5
