"""Loading a model together with its tokenizer."""

import jax
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
def test_what_does_not_tell_a_compute_dtype_is_computed_in_what_suits_the_machine(name):
    assert load_pretrained(GOLDEN / name)[0].config.compute_dtype == "bfloat16"
    config = load_model_and_tokenizer(GOLDEN / name, tokenizer="byte")[0].config
    suitable = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    assert config.compute_dtype == suitable
