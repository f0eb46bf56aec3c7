"""Folders in the layout of flash-linear-attention."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from goose_jax.checkpoints import (
    CheckpointError,
    CheckpointMetadata,
    containers,
    load_pretrained,
    save_pretrained,
)
from tests.goose_jax.official_weights import GOLDEN
from tests.goose_jax.random_parameters import assert_same_params, make_model

FLA = GOLDEN / "tiny_fla_hf"
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def golden():
    return load_pretrained(FLA)[0]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FLA, tmp_path / "model")


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder, change):
    weights = load_file(folder / MODEL)
    change(weights)
    save_file(weights, folder / MODEL)


def assert_refused(folder, *messages):
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(folder)
    for message in messages:
        assert message in str(caught.value)


def test_shards(tmp_path, golden):
    path = tmp_path / "model"
    save_pretrained(golden, path, "huggingface", max_shard_bytes=500_000)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    assert files == [f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, 8)]
    stored = [load_file(path / file) for file in files]
    assert all(sum(value.nbytes for value in shard.values()) <= 500_000 for shard in stored)
    index = json.loads((path / INDEX).read_text())
    assert index["weight_map"] == {
        name: file for file, shard in zip(files, stored, strict=True) for name in shard
    }
    assert index["metadata"] == {"total_size": sum(v.nbytes for s in stored for v in s.values())}
    assert_same_params(load_pretrained(path)[0], golden)

    (path / files[3]).unlink()
    assert_refused(path, f"{files[3]} is missing")
    shutil.copy(path / files[0], path / files[3])
    assert_refused(path, "holds tensors twice: ", "model.embeddings.weight")
    save_file({"extra": np.zeros(3, np.float32)}, path / files[3])
    assert_refused(path, f"{INDEX} and the shards differ in extra, ", next(iter(stored[3])))
    (path / files[3]).write_bytes(b"abc")
    assert_refused(path, f"{files[3]} is damaged")
    for places in ({"a": "../model.safetensors"}, {"a": 5}, [1], None):
        change_json(path / INDEX, weight_map=places)
        assert_refused(path, "weight_map names no files beside it")


def test_larger_than_a_shard(tmp_path):
    """Each tensor in a shard of its own where none fits in another's."""
    model = make_model(head_norm_eps=32e-5)
    save_pretrained(model, tmp_path / "model", "huggingface", max_shard_bytes=1)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 69  # tensors
    assert_same_params(load_pretrained(tmp_path / "model")[0], model, unused=False)


def older(weights):
    """As folders were before April 2025: one tensor of shift mixes, `[1, 1, C]` vectors."""
    for i in range(3):
        prefix = f"model.layers.{i}.attn."
        rows = [weights.pop(f"{prefix}x_{row}") for row in "rwkvag"]
        weights[f"{prefix}x_x"] = np.stack([row.reshape(-1) for row in rows])
        for name in ("k_k", "k_a"):
            weights[prefix + name] = weights[prefix + name].reshape(1, 1, -1)


def test_the_older_layout(folder, golden):
    change_weights(folder, older)
    assert_same_params(load_pretrained(folder)[0], golden)
    change_weights(folder, lambda w: w.pop("model.layers.1.attn.x_x"))
    assert_refused(folder, "missing: model.layers.1.attn.x_x")


def test_the_older_layout_with_axes_of_one(folder, golden):
    def change(weights):
        older(weights)
        for i in range(3):
            name = f"model.layers.{i}.attn.x_x"
            weights[name] = weights[name].reshape(6, 1, 1, -1)

    change_weights(folder, change)
    assert_same_params(load_pretrained(folder)[0], golden)


def test_the_unused_value_residual_of_the_first_layer_may_be_there(folder, golden):
    """As in FLA's first version."""

    def change(weights):
        for end in ("0.weight", "2.weight", "2.bias"):
            weights[f"model.layers.0.attn.v_lora.lora.{end}"] = weights[
                f"model.layers.1.attn.v_lora.lora.{end}"
            ].copy()

    change_weights(folder, change)
    loaded = load_pretrained(folder)[0]
    down = loaded.blocks.time_mix.value_residual_down
    np.testing.assert_array_equal(down[0], golden.blocks.time_mix.value_residual_down[1])


def test_what_is_wrong_is_listed(folder):
    def change(weights):
        del weights["lm_head.weight"]
        weights["model.extra"] = np.zeros(3, np.float32)
        weights["model.layers.1.ffn.x_k"] = np.zeros(64, np.float32)
        weights["model.norm.bias"] = np.zeros(128, np.uint32)

    change_weights(folder, change)
    assert_refused(folder, "model.norm.bias has dtype U32")
    change_weights(folder, lambda w: w.update({"model.norm.bias": np.zeros(128, np.int32)}))
    assert_refused(
        folder,
        "1 missing: lm_head.weight; 1 unknown: model.extra; ",
        "model.layers.1.ffn.x_k has shape [64] rather than [128]",
        "model.norm.bias has dtype int32",
    )


def test_config_of_another_model(folder):
    file = folder / "config.json"
    change_json(file, model_type="rwkv6", hidden_act="relu", attn={"layers": [1]})
    assert_refused(
        folder,
        "model_type is 'rwkv6' rather than 'rwkv7'; hidden_act is 'relu' rather than 'sqrelu'; "
        "attn is {'layers': [1]} rather than None",
    )
    file.write_text("{}")
    assert_refused(folder, "model_type is None rather than 'rwkv7'")
    file.write_text("[]")
    assert_refused(folder, "config.json is damaged: it holds no JSON object")
    file.write_text("{")
    assert_refused(folder, "config.json is damaged")


def test_config_that_does_not_fit_the_weights(folder, golden):
    file = folder / "config.json"
    change_json(file, num_heads=77, intermediate_size=None)  # stale or left open: no matter
    assert_same_params(load_pretrained(folder)[0], golden)
    change_json(file, head_dim=32, v_low_rank_dim=16)
    assert_refused(
        folder, "head_dim is 32, but 64 by the weights; v_low_rank_dim is 16, but 32 by the weights"
    )


def test_config_needs_nothing_but_the_type(folder, golden):
    (folder / "config.json").write_text('{"model_type": "rwkv7"}')
    assert load_pretrained(folder)[0].config == golden.config


def test_config_says_what_flas_does(tmp_path, golden):
    """Its class then makes the same modules, and the weights fit (which was seen, too)."""
    save_pretrained(golden, tmp_path / "model", "huggingface", CheckpointMetadata("world"))
    found = json.loads((tmp_path / "model" / "config.json").read_text())
    expected = json.loads((FLA / "config.json").read_text())
    differing = {key for key in expected if found.get(key, expected[key]) != expected[key]}
    # `num_heads` is wrong in the golden file; tokens are those of the World vocabulary in ours.
    assert differing == {"num_heads", "bos_token_id", "eos_token_id"}
    assert (found["num_heads"], found["bos_token_id"], found["eos_token_id"]) == (2, 0, 0)
    left_out = set(expected) - set(found)  # FLA's and transformers' own defaults
    assert all("size" not in key and "dim" not in key for key in left_out)


def test_tokenizer_of_the_folder(tmp_path):
    model = make_model(
        vocab_size=65536, hidden_size=64, head_size=64, num_layers=1, intermediate_size=1
    )
    save_pretrained(model, tmp_path / "model", "huggingface")
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    assert settings["goose_jax"]["tokenizer"] == "world"
    change_json(file, goose_jax={"colour": 1})
    assert_refused(tmp_path / "model", "goose_jax is damaged: it is no metadata: colour is 1")
    file.write_text('{"model_type": "rwkv7"}')
    assert load_pretrained(tmp_path / "model")[1].tokenizer == "world"
    (tmp_path / "model" / "tokenizer.json").write_text("{}")  # then its vocabulary is that one's
    assert load_pretrained(tmp_path / "model")[1].tokenizer is None


def test_nothing_is_left_half_written(tmp_path, monkeypatch, golden):
    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(containers, "write_shards", fail)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(golden, tmp_path / "model", "huggingface")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_there(folder):
    (folder / MODEL).unlink()
    assert_refused(folder, "holds no file of weights")
