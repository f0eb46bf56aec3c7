"""The adapter for the evaluation harness, with a stand-in for the harness."""

import importlib
import sys
import types

import jax.numpy as jnp
import pytest

from goose_jax.generation import SamplingConfig
from goose_jax.text import ByteTokenizer, VocabularyTokenizer
from tests.goose_jax.harness_tasks import (
    CHOICES,
    QUESTIONS,
    Instance,
    expected_score,
    expected_text,
)
from tests.goose_jax.official_weights import GOLDEN, golden_model

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")


class RecordingHook:
    """The part of the harness's cache that a model calls."""

    def __init__(self):
        self.results = {}

    def add_partial(self, method, args, result):
        self.results[method, str(args)] = result


class StandIn:
    """What the documentation of `lm_eval.api.model.LM` promises to its subclasses."""

    def __init__(self):
        self.cache_hook = RecordingHook()


@pytest.fixture(scope="module")
def harness():
    """The module of the adapter, with the stand-in in place of `lm_eval`."""
    registered = {}

    def register_model(*names):
        return lambda cls: registered.update(dict.fromkeys(names, cls)) or cls

    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    modules = {name: types.ModuleType(name) for name in names}
    modules["lm_eval.api.model"].LM = StandIn
    modules["lm_eval.api.registry"].register_model = register_model
    ours = "goose_jax.evaluation.harness"
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, ours, raising=False)
        module = importlib.import_module(ours)
        del sys.modules[ours]
    assert registered == {"goose-jax": module.GooseLM}
    return module


@pytest.fixture(scope="module")
def lm(harness):
    return harness.GooseLM(golden_model(), tokenizer=ByteTokenizer(), batch_size=4, max_gen_toks=9)


@pytest.mark.slow
def test_log_likelihoods(lm):
    pairs = [
        (q, choice) for q, choices in zip(QUESTIONS, CHOICES, strict=True) for choice in choices
    ]
    pairs += [("", "Whole"), ("A context. ", "B"), ("  ", "C"), ("D", "")]
    moved = [*pairs[:13], ("A context.", " B"), ("", "  C"), ("D", "")]
    results = lm.loglikelihood([Instance(pair) for pair in pairs], disable_tqdm=True)
    for pair, (log_likelihood, greedy), split in zip(pairs, results, moved, strict=True):
        expected = expected_score(*split) if split[1] else (0.0, True)
        assert log_likelihood == pytest.approx(expected[0], abs=1e-4), pair  # measured: 5e-6
        assert greedy == expected[1], pair
        assert lm.cache_hook.results["loglikelihood", str(pair)] == (log_likelihood, greedy)


@pytest.mark.slow
def test_log_likelihoods_of_whole_texts(lm):
    texts = ["The number 0 has a successor.", "The number 1 has none", "é"]
    results = lm.loglikelihood_rolling([Instance((text,)) for text in texts], disable_tqdm=True)
    for text, result in zip(texts, results, strict=True):
        assert result == pytest.approx(expected_score("", text)[0], abs=1e-4)
        assert lm.cache_hook.results["loglikelihood_rolling", str((text,))] == result
    assert lm.loglikelihood_rolling([], disable_tqdm=True) == []


@pytest.mark.slow
def test_generated_texts(lm):
    stops = [expected_text(q, 9, stop="\0\0")[4:6] for q in QUESTIONS]  # what is surely met
    settings = [{"until": [stop, "\0\0"], "do_sample": False} for stop in stops]
    settings[0] = {"until": "\0\0", "max_gen_toks": 3}
    settings[1] = {}
    requests = [Instance(pair) for pair in zip(QUESTIONS, settings, strict=True)]
    texts = lm.generate_until([*requests, Instance(("", {}))], disable_tqdm=True)
    assert texts[0] == expected_text(QUESTIONS[0], 3, stop="\0\0")
    assert texts[1] == expected_text(QUESTIONS[1], 9, stop="\0\0")
    for question, stop, text in list(zip(QUESTIONS, stops, texts, strict=False))[2:]:
        assert text == expected_text(question, 9, stop=stop)
        assert len(text) <= 4
    assert texts[6] == expected_text("", 9, stop="\0\0")
    for request, text in zip(requests, texts, strict=False):
        assert lm.cache_hook.results["generate_until", str(request.args)] == text


def test_settings_of_generation(lm):
    greedy = SamplingConfig(temperature=0, temperature_first=True)
    drawn = SamplingConfig(temperature=0.7, top_k=3, top_p=0.9, temperature_first=True)
    for given, expected in (
        ({}, ([], 9, greedy)),
        ({"until": "\n", "max_new_tokens": 5}, (["\n"], 5, greedy)),
        ({"until": ["a", ""], "do_sample": True, "top_p": 0.5}, (["a"], 9, greedy)),
        ({"until": None, "do_sample": False, "temperature": 0.7}, ([], 9, greedy)),
        ({"temperature": 0.7, "top_k": 3, "top_p": 0.9}, ([], 9, drawn)),
    ):
        assert lm._generation_settings(given) == expected
    for given, message in (
        ({"min_p": 0.1, "colour": 1}, "generation settings colour, min_p are unknown"),
        ({"num_beams": 4}, "num_beams=4 must be 1"),
        ({"temperature": 1, "top_p": 3}, "top_p"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate_until([Instance(("a", given))])


def test_tokens_over_the_border_of_context_and_continuation(harness):
    tokenizer = VocabularyTokenizer({1: b"a", 2: b"b", 3: b"ab", 4: b"c", 5: b" c"})
    lm = harness.GooseLM(golden_model(), tokenizer=tokenizer)
    for pair, expected in (
        (("b", "ab"), ([2], [3])),
        (("a", "b"), ([1], [2])),  # not [3] without its last token
        (("a ", "c"), ([1], [5])),
        (("ba", "bc"), ([2, 1], [2, 4])),
        (("", "ab"), ([0], [3])),
    ):
        assert lm._encode_pair(*pair) == expected
    lm = harness.GooseLM(golden_model(), tokenizer=tokenizer, add_bos_token=True)
    assert lm._encode_pair("b", "a") == ([0, 2], [1])
    assert lm._encode_pair("", "a") == ([0], [1])


def test_a_checkpoint_by_its_arguments(harness):
    # As the harness's command gives them.
    path = str(GOLDEN / "tiny_official.pth")
    lm = harness.GooseLM(path, tokenizer="byte", dtype="float32", batch_size="4", device="cuda:0")
    assert lm._batch_size == 4
    assert lm._weights.params["head"].dtype == jnp.float32
    assert harness.GooseLM(path, tokenizer="byte", batch_size="auto")._batch_size == 32
    lm = harness.GooseLM(path, tokenizer="byte", batch_size="auto", max_batch_size=5)
    assert lm._batch_size == 5


def test_bad_arguments(harness):
    model, tokenizer = golden_model(), ByteTokenizer()
    path = str(GOLDEN / "tiny_official.pth")
    for arguments, error, message in (
        ({"pretrained": model}, TypeError, "tokenizer=None must be a tokenizer if"),
        ({"pretrained": model, "tokenizer": "byte"}, TypeError, "'byte' must be a tokenizer if"),
        ({"pretrained": model, "tokenizer": tokenizer, "dtype": "float32"}, ValueError, "dtype="),
        ({"pretrained": model, "tokenizer": tokenizer, "state": "x.pth"}, TypeError, "state="),
        ({"pretrained": path, "tokenizer": tokenizer}, TypeError, "must be a name or path"),
        ({"pretrained": path}, ValueError, "does not tell its tokenizer"),
        ({"pretrained": path, "batch_size": 0}, ValueError, "batch_size must be an integer >= 1"),
        ({"pretrained": path, "batch_size": "many"}, ValueError, "batch_size must be .* 'many'"),
        ({"pretrained": path, "max_gen_toks": 0}, ValueError, "max_gen_toks must be"),
        ({"pretrained": path, "seed": -1}, ValueError, "seed must lie in"),
    ):
        with pytest.raises(error, match=message):
            harness.GooseLM(**arguments)


def test_a_tokenizer_without_an_end_of_documents(harness):
    class Endless(ByteTokenizer):
        end_of_document = None

    lm = harness.GooseLM(golden_model(), tokenizer=Endless())
    assert lm._encode_pair("a", "b") == ([98], [99])
    with pytest.raises(ValueError, match="no token that ends documents"):
        lm.loglikelihood_rolling([Instance(("text",))])
    with pytest.raises(ValueError, match="no token that ends documents"):
        harness.GooseLM(golden_model(), tokenizer=Endless(), add_bos_token=True)


@pytest.mark.parametrize("module", ["harness", "__main__"])
def test_without_the_harness_the_error_names_the_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "goose_jax.evaluation.harness", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'goose-jax\[lm-eval\]'"):
        importlib.import_module(f"goose_jax.evaluation.{module}")
