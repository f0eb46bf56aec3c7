"""Loading a model together with its tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from goose_jax.checkpoints import (
    CheckpointMetadata,
    load_model_and_tokenizer,
    load_pretrained,
    save_checkpoint,
    save_pretrained,
)
from goose_jax.text import VocabularyTokenizer
from tests.goose_jax.official_weights import GOLDEN, golden_model
from tests.goose_jax.random_parameters import make_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint"
    save_checkpoint(path, golden_model(), CheckpointMetadata(tokenizer="byte"))
    return path


def test_a_tokenizer_can_be_given_or_lie_in_the_folder(checkpoint, tmp_path):
    file = tmp_path / "rwkv_vocab_test.txt"
    file.write_text("1 'a' 1\n2 'ab' 2\n")
    assert load_model_and_tokenizer(checkpoint, tokenizer=str(file))[1].encode("aab") == [1, 2]
    save_pretrained(golden_model(), tmp_path / "folder", "huggingface")
    file.rename(tmp_path / "folder" / file.name)
    _, tokenizer = load_model_and_tokenizer(tmp_path / "folder")
    assert isinstance(tokenizer, VocabularyTokenizer)
    assert tokenizer.encode("aab") == [1, 2]
    with pytest.raises(ValueError, match=r"'world' has 65536 ids, .* model's vocabulary is 320"):
        load_model_and_tokenizer(checkpoint, tokenizer="world")


def test_the_dtype_is_that_of_parameters_and_computation(checkpoint):
    config = load_model_and_tokenizer(checkpoint, dtype="bfloat16")[0].config
    assert (config.param_dtype, config.compute_dtype) == ("bfloat16", "bfloat16")
    config = load_model_and_tokenizer(checkpoint)[0].config
    assert (config.param_dtype, config.compute_dtype) == ("float32", "float32")


@pytest.mark.parametrize("name", ["tiny_official.pth", "tiny_fla_hf"])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_one_rule_of_dtypes_for_foreign_checkpoints(name, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    expected = "float32" if backend == "cpu" else "bfloat16"

    def dtypes(**arguments):
        alone = load_pretrained(GOLDEN / name, **arguments)[0].config
        if "compute_dtype" not in arguments:  # the command line does not take it
            found, _ = load_model_and_tokenizer(GOLDEN / name, tokenizer="byte", **arguments)
            assert found.config == alone
        return alone.param_dtype, alone.compute_dtype

    assert dtypes() == ("float32", expected)
    assert dtypes(dtype=jnp.bfloat16) == ("bfloat16", "bfloat16")
    assert dtypes(dtype=np.dtype("float32")) == ("float32", "float32")
    assert dtypes(compute_dtype=jnp.float16) == ("float32", "float16")
    assert dtypes(dtype="bfloat16", compute_dtype="float32") == ("bfloat16", "float32")


@pytest.mark.slow
def test_one_rule_of_dtypes_for_our_checkpoints(tmp_path):
    model = make_model(compute_dtype="bfloat16")
    save_pretrained(model, tmp_path / "x", "native")

    def dtypes(**arguments):
        config = load_pretrained(tmp_path / "x", **arguments)[0].config
        return config.param_dtype, config.compute_dtype

    assert dtypes() == ("float32", "bfloat16")  # as recorded, on every machine
    assert dtypes(dtype=jnp.float16) == ("float16", "float16")
    assert dtypes(compute_dtype=jnp.float32) == ("float32", "float32")
