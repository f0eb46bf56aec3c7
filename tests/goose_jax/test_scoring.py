"""Log-likelihoods of continuations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from goose_jax import generate, init_state, prefill
from goose_jax.evaluation import prefix_states, score_continuations, scoring
from goose_jax.evaluation.prefix_plan import START, plan_prefixes
from goose_jax.generation import NonFiniteLogitsError, decoding
from goose_jax.nn import prepare_decoding
from tests.goose_jax.official_weights import GOLDEN, golden_model

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")


@pytest.fixture(scope="module")
def weights():
    return prepare_decoding(golden_model())


def log_softmax(logits):
    exact = np.asarray(logits, np.float64)
    shifted = exact - exact.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.slow
def test_scores_are_those_of_the_official_code_in_float64(weights):
    with np.load(GOLDEN / "logits_17_tokens.npz") as arrays:
        tokens, logits = arrays["tokens"].tolist(), arrays["logits_np64"]
    probable = logits.argmax(-1).tolist()  # after the token at the same place
    pairs = [(tokens[:i], tokens[i:j]) for i in range(1, 17) for j in (i + 1, 17)]
    pairs += [(tokens[:i], [probable[i - 1]]) for i in (1, 5, 17)]
    pairs += [(tokens[:9], [])]
    log_p = log_softmax(logits)
    scores = score_continuations(weights, pairs, batch_size=64)
    for (context, continuation), score in zip(pairs, scores, strict=True):
        places = range(len(context) - 1, len(context) - 1 + len(continuation))
        expected = sum(log_p[i, t] for i, t in zip(places, continuation, strict=True))
        assert score.log_likelihood == pytest.approx(expected, abs=2e-5)  # measured: 1.8e-6
        assert score.is_greedy == ([probable[i] for i in places] == continuation)
    assert {score.is_greedy for score in scores} == {False, True}


def random_texts(num_texts, rng, *, shared):
    """Texts of which each begins like an earlier one, up to any place."""
    texts = [rng.integers(1, 320, 90)]
    while len(texts) < num_texts:
        start = texts[rng.integers(len(texts))]
        kept = start[: rng.integers(len(start) + 1)] if shared else start[:0]
        texts.append(np.concatenate([kept, rng.integers(1, 320, rng.integers(1, 60))]))
    return [text.astype(np.int32) for text in texts]


@pytest.mark.parametrize(("batch_size", "num_texts"), [(1, 60), (2, 200), (8, 200), (64, 200)])
def test_a_plan_reads_every_text_whole_and_each_slot_when_it_holds_the_state(batch_size, num_texts):
    rng = np.random.default_rng(batch_size)
    texts = random_texts(num_texts, rng, shared=True)
    texts += [texts[3], texts[3][:40], texts[3][:40]]
    plan = plan_prefixes(texts, batch_size)
    held = {START: ()}  # the tokens that the state in a slot has read
    depths, done, num_read = {START: 0}, [], 0
    for group in plan.groups:
        for level in group.levels:
            assert 1 <= len(level) <= batch_size
            before = dict(held)
            for r in level:
                assert 0 < r.target < plan.num_slots
                num_read += r.end - r.begin
                depths[r.target] = depths[r.source] + 1
                held[r.target] = (*before[r.source], *texts[r.text][r.begin : r.end])
        for r in group.rests:
            assert (*held[r.source], *texts[r.text][r.begin :]) == tuple(texts[r.text])
            assert r.end == len(texts[r.text])
            num_read += r.end - r.begin
            done.append(r.text)
    assert sorted(done) == list(range(len(texts)))
    everything = sum(map(len, texts))
    assert num_read < 0.8 * everything  # measured: 0.48 to 0.71
    assert plan.num_slots <= 1 + max(depths.values()) * (batch_size + 1)


def test_examples_and_questions_are_read_once():
    rng = np.random.default_rng(0)
    examples = rng.integers(1, 320, 100)
    questions = [np.concatenate([examples, [i], rng.integers(1, 320, 30)]) for i in range(9)]
    texts = [np.append(q, i).astype(np.int32) for q in questions for i in (5, 6, 7, 8)]
    plan = plan_prefixes(texts, 4)
    read = [r for group in plan.groups for level in group.levels for r in level]
    assert sorted(r.end - r.begin for r in read) == [31] * 9 + [100]
    assert all(r.end - r.begin == 1 for group in plan.groups for r in group.rests)
    assert [len(group.rests) for group in plan.groups] == [16, 16, 4]


def test_texts_that_share_nothing_are_read_in_batches():
    texts = random_texts(40, np.random.default_rng(0), shared=False)
    plan = plan_prefixes(texts, 2)
    assert [len(group.rests) for group in plan.groups] == [32, 8]
    assert all(not group.levels for group in plan.groups)
    assert plan_prefixes([], 4).groups == []
    chain = [np.arange(n, dtype=np.int32) for n in range(1, 1500)]  # deeper than Python recurses
    assert sum(len(group.rests) for group in plan_prefixes(chain, 8).groups) == len(chain)


@pytest.mark.slow
def test_shared_beginnings_batches_and_pieces_change_nothing(weights, monkeypatch):
    """Pieces of 32 tokens, so that texts need several, and slots of a few states."""
    for module in (decoding, prefix_states, scoring):
        monkeypatch.setattr(module, "MAX_PIECE", 32)
    rng = np.random.default_rng(1)
    contexts = random_texts(24, rng, shared=True)
    pairs = [(c.tolist(), rng.integers(0, 320, n).tolist()) for c in contexts for n in (1, 3, 70)]
    start = prefill(weights, [[5, 6, 7]])
    progress = []
    scores = score_continuations(
        weights, pairs, batch_size=4, state=start, on_scored=progress.append
    )
    assert sum(progress) == len(pairs)
    assert max(progress) == 4
    forward = jax.jit(lambda weights, tokens: weights.model()(tokens)[0])
    length = max(len(c) + len(x) for c, x in pairs) + 3
    for (context, continuation), score in zip(pairs[::7], scores[::7], strict=True):
        text = [5, 6, 7, *context, *continuation]
        logits = forward(weights, jnp.array([text + [0] * (length - len(text))]))[0]
        predicted = log_softmax(logits)[len(text) - len(continuation) - 1 : len(text) - 1]
        expected = predicted[np.arange(len(continuation)), continuation].sum()
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5)  # measured: 4e-7


@pytest.mark.slow
def test_greedy_texts_are_greedy(weights):
    prompts = [[1, 2, 3], [1, 2, 4, 5]]
    texts = generate(weights, prompts, max_new_tokens=8).sequences
    greedy = generate(
        weights, prompts, max_new_tokens=8, sampling=decoding.SamplingConfig(temperature=0)
    ).sequences
    for continuation, expected in ((greedy, True), (texts, False)):
        scores = score_continuations(weights, list(zip(prompts, continuation, strict=True)))
        assert [score.is_greedy for score in scores] == [expected, expected]


def test_bad_arguments(weights):
    for pairs, message in (
        ([([], [1])], r"pairs\[0\]\[0\] must hold at least one token"),
        ([([1], [2]), ([1], [320])], r"pairs\[1\]\[1\] must hold ids in 0\.\.319, got 320"),
        ([("text", [1])], r"pairs\[0\]\[0\] must be a sequence of token ids"),
    ):
        with pytest.raises(ValueError, match=message):
            score_continuations(weights, pairs)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        score_continuations(weights, [], batch_size=0)
    with pytest.raises(ValueError, match=r"state.time_shift must have shape .* with B=1"):
        score_continuations(weights, [], state=init_state(weights.config, 2))
    assert score_continuations(weights, []) == []


@pytest.mark.slow
def test_logits_that_are_not_finite_are_an_error(weights):
    head = weights.params["head"].at[3, 7].set(jnp.nan)
    broken = dataclasses.replace(weights, params=weights.params | {"head": head})
    with pytest.raises(
        NonFiniteLogitsError, match=r"NaN .* for pair 0, 1, .* the parameter head holds"
    ):
        # A batch of 64 rows, too, so that the program is compiled.
        score_continuations(broken, [([1], [2])] * 33, batch_size=64)
