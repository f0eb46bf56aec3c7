import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from goose_jax.generation.sampling import (
    SamplingConfig,
    count_token,
    sample_token,
    stack_sampling,
    token_probabilities,
)

TOLERANCE = 2e-6  # fp32 against float64; measured 6.7e-7


def official_probabilities(logits, counts, config):
    """One row, in float64, step by step as the recipe says."""
    logits = logits.astype(np.float64)
    for token in range(len(logits)):
        if counts[token] > 0:
            logits[token] -= config.presence_penalty + counts[token] * config.frequency_penalty
    if config.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    if config.top_p < 1:
        total = 0.0
        for token in order:
            total += probabilities[token]
            if total >= config.top_p:
                break
        cutoff = probabilities[token]
        probabilities = np.where(probabilities >= cutoff, probabilities, 0)
    if 0 < config.top_k < len(probabilities):
        probabilities[order[config.top_k :]] = 0
    probabilities = probabilities ** (1 / config.temperature)
    return probabilities / probabilities.sum()


def common_probabilities(logits, counts, config):
    """One row, in float64, in the order of most libraries: temperature, top-k, top-p."""
    neutral = {"top_k": 0, "top_p": 1.0, "temperature_first": False}
    probabilities = official_probabilities(logits, counts, dataclasses.replace(config, **neutral))
    order = np.argsort(-probabilities, kind="stable")
    if 0 < config.top_k < len(probabilities):
        probabilities[order[config.top_k :]] = 0
    probabilities /= probabilities.sum()
    if config.top_p < 1:
        kept = np.cumsum(probabilities[order]) - probabilities[order] < config.top_p
        cutoff = probabilities[order][max(kept.sum() - 1, 0)]
        probabilities[probabilities < cutoff] = 0
    return probabilities / probabilities.sum()


def reference_probabilities(logits, counts, config):
    reference = common_probabilities if config.temperature_first else official_probabilities
    return reference(logits, counts, config)


PROBABILITIES = jax.jit(token_probabilities)
DRAW = jax.jit(sample_token)


def check(logits, counts, config, probabilities=PROBABILITIES):
    rows = zip(logits, counts, strict=True)
    expected = np.stack([reference_probabilities(*row, config) for row in rows])
    got = np.asarray(probabilities(jnp.float32(logits), jnp.float32(counts), config))
    np.testing.assert_array_equal(got > 0, expected > 1e-37)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    return got


CONFIGS = [
    SamplingConfig(temperature=t, top_k=k, top_p=p, presence_penalty=presence, frequency_penalty=f)
    for t, k, p, (presence, f) in itertools.product(
        (0, 0.3, 1, 2.5), (0, 1, 5, 49, 50, 1000), (0, 0.3, 0.9, 1), ((0, 0), (0.4, 0.2), (-1, 0))
    )
]


def test_probabilities_agree_with_the_official_order_of_operations():
    generator = np.random.default_rng(0)
    for config in CONFIGS:
        logits = generator.normal(size=(4, 50)) * generator.uniform(0.1, 5, size=(4, 1))
        logits[2:] = np.round(logits[2:] * 2) / 2  # many ties
        logits = logits.astype(np.float32)
        counts = (generator.integers(0, 4, size=(4, 50)) * 0.75).astype(np.float32)
        check(logits, counts, config)


def test_probabilities_agree_with_the_common_order_of_operations():
    generator = np.random.default_rng(5)
    differ = 0
    for config in CONFIGS:
        config = dataclasses.replace(config, temperature_first=True)
        logits = generator.normal(size=(4, 50)) * generator.uniform(0.1, 5, size=(4, 1))
        logits = logits.astype(np.float32)
        counts = (generator.integers(0, 4, size=(4, 50)) * 0.75).astype(np.float32)
        got = check(logits, counts, config)
        official = PROBABILITIES(
            logits, counts, dataclasses.replace(config, temperature_first=False)
        )
        differ += ((got > 0) != (official > 0)).any()
    assert differ > 50


def test_ties_stay_together_in_top_p_and_break_by_id_in_top_k():
    logits, counts = np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)
    logits[0, 0] = -1e9  # the other three share the probability evenly
    third = [0, 1 / 3, 1 / 3, 1 / 3]
    for top_p in (0, 0.3, 0.6):
        assert check(logits, counts, SamplingConfig(top_p=top_p))[0] == pytest.approx(third)
    two = check(logits, counts, SamplingConfig(top_k=2))
    assert two[0] == pytest.approx([0, 0.5, 0.5, 0])
    both = check(logits, counts, SamplingConfig(top_k=2, top_p=0.1))
    assert both[0] == pytest.approx([0, 0.5, 0.5, 0])
    assert check(logits, counts, SamplingConfig(top_k=1))[0].tolist() == [0, 1, 0, 0]
    assert check(logits, counts, SamplingConfig(temperature=0))[0].tolist() == [0, 1, 0, 0]


@pytest.mark.slow
def test_top_p_1_keeps_all_tokens_however_the_sum_rounds():
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(32, 20_000)).astype(np.float32) * 2
    counts = np.zeros_like(logits)
    sums = np.cumsum(-np.sort(-np.asarray(jax.nn.softmax(logits))), axis=-1)
    # The trap: the sum of some rows never reaches 1, that of others does before the last token.
    assert (sums[:, -1] < 1).any()
    assert (sums[:, -2] >= 1).any()
    for top_p, top_k in ((1.0, 20_000), (1.0, 19_999), (1 - 2**-30, 0)):
        config = SamplingConfig(top_p=top_p, top_k=top_k)
        assert config.filters
        kept = (token_probabilities(logits, counts, config) > 0).sum(axis=-1)
        assert (kept == min(top_k or 20_000, 20_000)).all()
    nearly = token_probabilities(logits, counts, SamplingConfig(top_p=1 - 2**-24))
    assert ((nearly > 0).sum(axis=-1) > 10_000).all()


def test_extreme_logits_and_temperatures_stay_finite():
    logits = np.array([[0, 1e4, 1e4 - 1, -np.inf, -1e20]], np.float32)
    counts = np.zeros_like(logits)
    one_hot = [0, 1, 0, 0, 0]
    for temperature in (1e-3, 1e-30):
        config = SamplingConfig(temperature=temperature)
        assert token_probabilities(logits, counts, config)[0].tolist() == one_hot
    hot = token_probabilities(logits, counts, SamplingConfig(temperature=1e30))[0]
    assert hot[3] == 0
    assert hot == pytest.approx([1 / 4, 1 / 4, 1 / 4, 0, 1 / 4], abs=1e-6)
    check(logits[:, :3], counts[:, :3], SamplingConfig(temperature=1.5, top_p=0.9))


def test_counts_decay_before_the_new_token_is_added():
    config = SamplingConfig(penalty_decay=0.5)
    counts = jnp.zeros((2, 3))
    for tokens in ([0, 1], [0, 2], [1, 2]):
        counts = count_token(counts, jnp.array(tokens), config)
    assert counts.tolist() == [[0.75, 1, 0], [0, 0.25, 1.5]]
    # A token once seen stays seen, even when its count has decayed away.
    forget = SamplingConfig(penalty_decay=0, presence_penalty=50)
    counts = jnp.zeros((1, 3))
    for token in (0, 1):
        counts = count_token(counts, jnp.array([token]), forget)
    probabilities = token_probabilities(jnp.zeros((1, 3)), counts, forget)
    assert probabilities[0] == pytest.approx([0, 0, 1], abs=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.6, top_p=0.9),
        SamplingConfig(temperature=2.0, top_k=7, presence_penalty=0.3, frequency_penalty=0.1),
    ],
)
def test_draws_follow_the_probabilities(config):
    generator = np.random.default_rng(2)
    rows = 40_000
    logits = generator.normal(size=12).astype(np.float32)
    counts = generator.integers(0, 3, size=12).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), rows)
    tokens = DRAW(keys, jnp.tile(logits, (rows, 1)), jnp.tile(counts, (rows, 1)), config)
    assert tokens.dtype == jnp.int32
    drawn = np.bincount(tokens, minlength=12)
    expected = official_probabilities(logits, counts, config) * rows
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    chi_square = ((drawn - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    # 4 standard deviations above the mean of a chi-square distribution; measured -0.9 at most.
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.slow
def test_a_row_depends_on_its_own_key_only():
    generator = np.random.default_rng(4)
    logits = generator.normal(size=(8, 30)).astype(np.float32)
    counts = np.zeros_like(logits)
    keys = jax.random.split(jax.random.key(5), 8)
    config = SamplingConfig(top_p=0.95)
    together = DRAW(keys, logits, counts, config)
    for row in (0, 5):
        alone = DRAW(*(x[row : row + 1] for x in (keys, logits, counts)), config)
        assert alone[0] == together[row]


def test_temperature_0_and_top_k_1_are_greedy():
    generator = np.random.default_rng(6)
    logits = generator.normal(size=(16, 30)).astype(np.float32)
    logits[:, 20:] = logits[:, :10]  # ties
    counts = np.zeros_like(logits)
    keys = jax.random.split(jax.random.key(7), 16)
    for config in (SamplingConfig(temperature=0), SamplingConfig(top_k=1)):
        assert (DRAW(keys, logits, counts, config) == logits.argmax(axis=-1)).all()


def test_other_numbers_do_not_compile_anew():
    traces = []

    def traced(logits, counts, config):
        traces.append((config.greedy, config.filters))
        return token_probabilities(logits, counts, config)

    probabilities = jax.jit(traced)
    logits, counts = np.ones((1, 5), np.float32), np.ones((1, 5), np.float32)
    for temperature, top_k, top_p in itertools.product((0.5, 1, 2), (0, 2, 3), (0, 0.5, 1)):
        config = SamplingConfig(
            temperature=temperature, top_k=top_k, top_p=top_p, presence_penalty=1
        )
        check(logits, counts, config, probabilities)
    assert traces == [(False, True), (False, False)]


@pytest.mark.slow
def test_each_row_can_have_settings_of_its_own():
    generator = np.random.default_rng(8)
    configs = [
        dataclasses.replace(c, penalty_decay=i % 7 / 7, temperature_first=i % 5 < 2)
        for i, c in enumerate(CONFIGS)
    ]
    rows = len(configs)
    logits = generator.normal(size=(rows, 50)).astype(np.float32) * 3
    logits[::2] = np.round(logits[::2])  # ties
    counts = (generator.integers(0, 4, size=(rows, 50)) * 0.75).astype(np.float32)
    keys = jax.random.split(jax.random.key(9), rows)
    stacked = stack_sampling(configs)
    assert (stacked.greedy, stacked.filters) == (False, True)
    probabilities = PROBABILITIES(logits, counts, stacked)
    drawn = DRAW(keys, logits, counts, stacked)
    counted = count_token(counts, drawn, stacked)
    for i, config in enumerate(configs):
        row = slice(i, i + 1)
        expected = reference_probabilities(logits[i], counts[i], config)
        np.testing.assert_allclose(probabilities[i], expected, atol=TOLERANCE)
        assert drawn[i] == DRAW(keys[row], logits[row], counts[row], config)[0]
        np.testing.assert_array_equal(counted[i], count_token(counts[row], drawn[row], config)[0])


def test_a_stack_is_greedy_if_all_rows_are_and_sorts_if_a_row_must():
    greedy = SamplingConfig(temperature=0, top_k=5)
    plain, filtered = SamplingConfig(), SamplingConfig(top_p=0.5)
    for configs, expected in (
        ([greedy, greedy], (True, False)),
        ([greedy, plain], (False, False)),
        ([plain, filtered], (False, True)),
        ([filtered, greedy], (False, True)),
    ):
        stacked = stack_sampling(configs)
        assert (stacked.greedy, stacked.filters) == expected
        assert stacked.temperature.tolist() == [config.temperature for config in configs]
    with pytest.raises(
        ValueError, match=r"configs must hold at least one SamplingConfig, got \[\]"
    ):
        stack_sampling([])
    with pytest.raises(TypeError, match=r"configs\[1\] must be a SamplingConfig, got 0\.5"):
        stack_sampling([plain, 0.5])


def test_config_is_frozen_and_comparable():
    config = SamplingConfig(temperature=1, top_k=3)
    assert config == SamplingConfig(temperature=1.0, top_k=np.int64(3))
    assert config == jax.tree.unflatten(jax.tree.structure(config), jax.tree.leaves(config))
    assert dataclasses.replace(config, temperature=0).greedy
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 2


def test_penalties_that_overflow_leave_a_distribution():
    counts = jnp.array([[0.0, 2.0, 2.0, 0.0]])
    logits = jnp.array([[3.0, 1.0, 2.0, 3.0]])
    for penalty, expected in ((3e38, [0.5, 0, 0, 0.5]), (-3e38, [0, 0.5, 0.5, 0])):
        config = SamplingConfig(frequency_penalty=penalty, presence_penalty=penalty)
        np.testing.assert_allclose(token_probabilities(logits, counts, config)[0], expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-31),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_k", 2**31),
        ("top_p", -0.01),
        ("top_p", 1.01),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("penalty_decay", 1.1),
        ("penalty_decay", -0.5),
        ("temperature_first", 1),
    ],
)
def test_wrong_numbers_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .*got {value!r}$"):
        SamplingConfig(**{name: value})
