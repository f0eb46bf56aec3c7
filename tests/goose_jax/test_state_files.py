"""States in files of the official ecosystem."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from goose_jax import init_state, load_state, save_state
from goose_jax.checkpoints import CheckpointError
from goose_jax.checkpoints.pth import read_pth
from tests.goose_jax import torch_files
from tests.goose_jax.official_weights import GOLDEN, GOLDEN_CONFIG

HEADS = (2, 64, 64)


@pytest.fixture(scope="module")
def official():
    """The state after 17 tokens, as the official code computed it; heads are `[V, K]`."""
    with np.load(GOLDEN / "logits_17_tokens.npz") as arrays:
        names = {"time_shift": "att_x", "wkv": "wkv", "channel_shift": "ffn_x"}
        return {ours: arrays[f"state_{name}_np64"] for ours, name in names.items()}


@pytest.fixture(scope="module")
def state(official):
    values = {name: jnp.asarray(value[:, None], jnp.float32) for name, value in official.items()}
    values["wkv"] = jnp.swapaxes(values["wkv"], -1, -2)
    return dataclasses.replace(init_state(GOLDEN_CONFIG, 1), **values)


def rwkv_list(official, dtype=np.float32):
    layers = zip(official["time_shift"], official["wkv"], official["channel_shift"], strict=True)
    return [
        tensor.astype(dtype if tensor.ndim == 1 else np.float32)
        for layer in layers
        for tensor in layer
    ]


def time_states(official):
    return {
        f"blocks.{i}.att.time_state": value.astype(np.float32)
        for i, value in enumerate(official["wkv"])
    }


def assert_equal(found, expected):
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, expected)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, expected))


def test_the_list_of_the_rwkv_package(tmp_path, official, state):
    path = torch_files.write_arrays(tmp_path / "x.pth", rwkv_list(official))
    assert_equal(load_state(path, GOLDEN_CONFIG), state)
    assert not np.array_equal(state.wkv, jnp.swapaxes(state.wkv, -1, -2))  # the axes matter
    low = dataclasses.replace(GOLDEN_CONFIG, compute_dtype="bfloat16")
    for dtype in ("float16", "bfloat16"):  # of the shifts in a file of a model in that dtype
        torch_files.write_arrays(path, rwkv_list(official, dtype))
        found = load_state(path, low)
        assert_equal(found.wkv, state.wkv)
        expected = state.time_shift.astype(dtype).astype("bfloat16")
        assert_equal(found.time_shift, expected)


def test_trained_initial_states(tmp_path, official, state):
    path = torch_files.write_arrays(
        tmp_path / "x.pth", time_states(official), wrap=torch_files.parameter
    )
    found = load_state(path, GOLDEN_CONFIG, batch_size=3)
    zeros = init_state(GOLDEN_CONFIG, 3)
    assert_equal(found.wkv, jnp.repeat(state.wkv, 3, axis=1))
    assert_equal(found.time_shift, zeros.time_shift)
    assert_equal(found.channel_shift, zeros.channel_shift)


def test_what_is_saved_is_loaded(tmp_path, state, official):
    save_state(tmp_path / "list.pth", state, GOLDEN_CONFIG, "rwkv")
    assert_equal(load_state(tmp_path / "list.pth", GOLDEN_CONFIG), state)
    expected = rwkv_list(official)
    for found, value in zip(read_pth(tmp_path / "list.pth"), expected, strict=True):
        np.testing.assert_array_equal(found.read(), value)

    initial = dataclasses.replace(init_state(GOLDEN_CONFIG, 1), wkv=state.wkv)
    save_state(tmp_path / "initial.pth", initial, GOLDEN_CONFIG, "time_state")
    assert_equal(load_state(tmp_path / "initial.pth", GOLDEN_CONFIG), initial)
    found = {name: tensor.read() for name, tensor in read_pth(tmp_path / "initial.pth").items()}
    assert list(found) == list(time_states(official))
    for name, value in time_states(official).items():
        np.testing.assert_array_equal(found[name], value)


def test_states_that_cannot_be_saved(tmp_path, state):
    path = tmp_path / "x.pth"
    with pytest.raises(ValueError, match="'time_state' has no place for token shifts"):
        save_state(path, state, GOLDEN_CONFIG, "time_state")
    with pytest.raises(ValueError, match="layout='zip' must be"):
        save_state(path, state, GOLDEN_CONFIG, "zip")
    with pytest.raises(ValueError, match=r"state\.time_shift"):
        save_state(path, init_state(GOLDEN_CONFIG, 2), GOLDEN_CONFIG, "rwkv")
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="exists"):
        save_state(path, state, GOLDEN_CONFIG, "rwkv")


def test_files_that_are_no_states_of_the_model(tmp_path, official):
    path = tmp_path / "x.pth"

    def assert_refused(arrays, *messages):
        torch_files.write_arrays(path, arrays)
        with pytest.raises(CheckpointError) as caught:
            load_state(path, GOLDEN_CONFIG)
        for message in messages:
            assert message in str(caught.value)

    tensors = rwkv_list(official)
    assert_refused(tensors[:-1], "1 missing: layer 2: channel shift")
    assert_refused([*tensors, tensors[0]], "1 unknown: layer 3: time shift")
    assert_refused(
        [tensors[1], *tensors[1:]],
        "layer 0: time shift is float32[2, 64, 64] rather than floating point [128]",
    )
    named = time_states(official)
    del named["blocks.1.att.time_state"]
    named["blocks.7.att.time_state"] = np.zeros(HEADS, np.float32)
    named["blocks.0.att.time_state"] = np.zeros(HEADS, np.int64)
    assert_refused(
        named,
        "1 missing: blocks.1.att.time_state",
        "1 unknown: blocks.7.att.time_state",
        "blocks.0.att.time_state is int64[2, 64, 64] rather than floating point [2, 64, 64]",
    )
    assert_refused({"emb.weight": np.zeros((2, 2), np.float32)}, "holds no state: emb.weight")
    with pytest.raises(ValueError, match="batch_size"):
        load_state(path, GOLDEN_CONFIG, batch_size=0)
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "missing.pth", GOLDEN_CONFIG)
