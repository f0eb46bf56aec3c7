"""The proofs learn, each in a form that is shorter still than the shortened one."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.proofs import __main__ as proofs
from examples.proofs import associative_recall, digit_reversal, passkey, state_tracking
from examples.proofs.training import correct, predict
from goose_jax import RWKV7, RWKV7Config
from goose_jax.training import OptimizerConfig


def recipe(steps: int, learning_rate: float) -> OptimizerConfig:
    return OptimizerConfig(
        total_steps=steps, learning_rate=learning_rate, final_learning_rate=learning_rate / 20
    )


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs one proof with other short settings by the command, and returns its JSON file."""

    def run(name, **changes):
        proof = proofs.PROOFS[name]
        monkeypatch.setattr(proof, "SHORT", dataclasses.replace(proof.SHORT, **changes))
        proofs.main((name,), short=True, out=tmp_path)
        plot = (tmp_path / f"{name}-short.svg").read_text()
        assert plot.startswith("<?xml")
        record = json.loads((tmp_path / f"{name}-short.json").read_text())
        assert record["hardware"].endswith("CPU cores")
        assert record["hardware"] in plot
        assert record["versions"]["jax"]
        assert record["settings"]["task"]["seed"] == 0
        return record["results"]

    return run


@pytest.mark.slow
def test_digits_are_reversed(run):
    results = run(
        "digit-reversal",
        task=digit_reversal.DigitReversal(32, 32, max_digits=6),
        recipe=recipe(150, 8e-3),
        held_out_batches=4,
    )
    assert results["accuracy_of_reversed_digits"] > 0.9  # guessing: 0.1


@pytest.mark.slow
def test_products_of_permutations_are_tracked(run):
    results = run(
        "state-tracking",
        task=state_tracking.PermutationProducts(64, 6, degree=4, factors="swaps"),
        recipe=recipe(450, 8e-3),
        hidden_size=32,
        num_layers=2,
        head_size=16,
        measured_length=12,
        held_out_rows=256,
    )
    # Guessing: 1 in 24. The four token shifts see five of the six factors, and the one before them
    # is one of 7: whose state forgets has 1 / 7.
    assert results["permutations"] == 24
    assert min(results["accuracy"][:6]) > 0.4


@pytest.mark.slow
def test_values_are_recalled(run):
    results = run(
        "associative-recall",
        task=associative_recall.AssociativeRecall(64, 16, ((16, 4),), vocab_size=64),
        recipe=recipe(250, 8e-3),
        num_layers=1,
        hidden_sizes=(32,),
        head_size=32,
        held_out_batches=4,
    )
    # Who names any of the values of the row: 1 / 4.
    assert results["accuracy"]["32"]["4"] > 0.6


@pytest.mark.slow
def test_passkeys_are_found_beyond_the_trained_length(run):
    results = run(
        "passkey",
        task=passkey.Passkey(64, 24, digits=2),
        recipe=recipe(80, 8e-3),
        num_layers=1,
        factors=(1, 2, 4),
    )
    assert results["accuracy_of_digits"]["24"] > 0.9
    assert results["accuracy_of_digits"]["96"] > 0.6  # guessing: 0.1


@pytest.mark.slow
def test_a_text_that_is_read_in_pieces_gives_what_it_gives_in_one():
    task = passkey.Passkey(16, 64, digits=2)
    config = RWKV7Config(
        vocab_size=task.vocab_size,
        hidden_size=32,
        num_layers=1,
        head_size=16,
        compute_dtype="float32",
    )
    model = RWKV7(config, rngs=nnx.Rngs(0))
    model.head[...] = jnp.asarray(np.random.default_rng(0).normal(size=model.head.shape))
    batch = task(0)
    right = correct(model, batch)[:, -2:]
    digits, keys = passkey.accuracy_at(model, task, 16)
    assert digits == right.mean()
    assert keys == right.all(axis=1).mean()
    assert predict(model, jnp.asarray(batch.inputs)).shape == (16, 64)
