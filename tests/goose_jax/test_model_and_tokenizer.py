"""Loading a model together with its tokenizer."""

import json
import shutil

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
from goose_jax.cli.main import main
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


def test_the_precision_that_is_given_or_recorded(checkpoint, tmp_path):
    model = load_model_and_tokenizer(checkpoint, precision="high")[0]
    assert model.config.precision == "high"
    assert load_model_and_tokenizer(checkpoint)[0].config.precision is None
    save_checkpoint(tmp_path / "high", model, CheckpointMetadata(tokenizer="byte"))
    assert load_model_and_tokenizer(tmp_path / "high")[0].config.precision == "high"


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


def as_vocabulary(folder, vocabulary):
    file = folder / "words.txt"
    lines = [f"{i} {token!r} {len(token)}\n" for i, token in vocabulary.items()]
    file.write_text("".join(lines))
    return file, {"rwkv_vocab.txt"}


def as_ids(folder, vocabulary):
    file = folder / "words.json"
    file.write_text(json.dumps({str(i): list(token) for i, token in vocabulary.items()}))
    return file, {"rwkv_vocab.json"}


def as_two_files(folder, vocabulary):
    """The tokenizer.json names the file that holds the vocabulary."""
    ids = {token.decode("latin-1"): i for i, token in vocabulary.items()}
    (folder / "ids.json").write_text(json.dumps(ids))
    file = folder / "of-another-name.json"
    model = {"type": "RWKV7LongestMatch", "vocab_file": "ids.json"}
    file.write_text(json.dumps({"model": model}))
    return file, {"tokenizer.json", "ids.json"}


@pytest.mark.slow
@pytest.mark.parametrize("write", [as_vocabulary, as_ids, as_two_files])
def test_a_checkpoint_holds_its_tokenizer(tmp_path, write):
    """It is found when all is in another place and the file it came from is gone."""
    source = tmp_path / "source"
    source.mkdir()
    vocabulary = {1: b"a", 2: b"ab", 3: b"\n"}
    file, copies = write(source, vocabulary)
    model = golden_model()
    save_pretrained(model, tmp_path / "native", "native", CheckpointMetadata(str(file), 3))
    save_pretrained(model, tmp_path / "fla", "huggingface", CheckpointMetadata(str(file), 3))
    shutil.rmtree(source)
    for name in ("native", "fla"):
        moved = tmp_path / "moved" / name
        shutil.move(tmp_path / name, moved)
        assert copies <= {path.name for path in moved.iterdir()}
        assert load_pretrained(moved)[1].step == 3
        _, tokenizer = load_model_and_tokenizer(moved)
        assert tokenizer.encode("aab\n") == [1, 2, 3]
    main(["convert", str(tmp_path / "moved/fla"), str(tmp_path / "back"), "--layout=native"])
    assert load_model_and_tokenizer(tmp_path / "back")[1].encode("aab\n") == [1, 2, 3]


def test_a_tokenizer_without_a_file_is_recorded_by_its_name(tmp_path):
    model = golden_model()
    save_pretrained(model, tmp_path / "native", "native", CheckpointMetadata("byte"))
    assert load_pretrained(tmp_path / "native")[1].tokenizer == "byte"
    save_pretrained(model, tmp_path / "other", "native", CheckpointMetadata("of somebody"))
    assert load_pretrained(tmp_path / "other")[1].tokenizer == "of somebody"
