"""Models with a trained initial state beside their weights, in files by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from goose_jax import load_pretrained, load_state, save_pretrained
from goose_jax.checkpoints import CheckpointError, load_merged_state, read_contents
from goose_jax.checkpoints.containers import open_tensors
from goose_jax.cli.main import main
from tests.goose_jax import safetensors_by_hand, torch_files
from tests.goose_jax.layouts_by_hand import error_of, released
from tests.goose_jax.official_weights import GOLDEN, GOLDEN_CONFIG
from tests.goose_jax.random_parameters import assert_same_params

NAME = "blocks.{i}.att.time_state"


@pytest.fixture(scope="module")
def wkv():
    """A state of the official code, `[layers, H, V, K]`, in bfloat16."""
    with np.load(GOLDEN / "logits_17_tokens.npz") as official:
        return np.asarray(jnp.asarray(official["state_wkv_np64"], jnp.bfloat16))


@pytest.fixture
def merged(tmp_path, wkv):
    states = {NAME.format(i=i): value for i, value in enumerate(wkv)}
    return torch_files.write_arrays(tmp_path / "merged.pth", released("official") | states)


def test_weights_and_state_are_read(tmp_path, merged, wkv):
    golden = load_pretrained(GOLDEN / "tiny_fla_hf")[0]
    states = {NAME.format(i=i): value for i, value in enumerate(wkv)}
    turned = {name: np.swapaxes(value, -1, -2).copy() for name, value in states.items()}
    official = safetensors_by_hand.write(tmp_path / "x.st", released("official") | states)
    web_rwkv = safetensors_by_hand.write(tmp_path / "y.st", released("web-rwkv") | turned)
    for path in (merged, official, web_rwkv):
        assert_same_params(load_pretrained(path)[0], golden)
        assert read_contents(path).has_state
        for state in (load_state(path, GOLDEN_CONFIG), load_merged_state(path, GOLDEN_CONFIG)):
            np.testing.assert_array_equal(
                state.wkv[:, 0], np.swapaxes(wkv, -1, -2).astype(np.float32)
            )
            assert not np.any(state.time_shift)
            assert not np.any(state.channel_shift)
    assert load_merged_state(GOLDEN / "tiny_official.pth", GOLDEN_CONFIG) is None
    assert load_state(merged, GOLDEN_CONFIG, batch_size=3).wkv.shape == (3, 3, 2, 64, 64)
    alone = safetensors_by_hand.write(tmp_path / "alone.st", turned)  # as web-rwkv converts them
    np.testing.assert_array_equal(
        load_state(alone, GOLDEN_CONFIG).wkv, load_state(merged, GOLDEN_CONFIG).wkv
    )


def test_a_state_that_lacks_a_layer_is_refused(tmp_path, wkv):
    arrays = released("official") | {NAME.format(i=1): wkv[1], NAME.format(i=2): wkv[2][:1]}
    path = torch_files.write_arrays(tmp_path / "x.pth", arrays)
    with pytest.raises(
        CheckpointError,
        match=r"1 missing: blocks.0.att.time_state; "
        r"blocks.2.att.time_state has shape \[1, 64, 64\] rather than \[2, 64, 64\]",
    ):
        load_pretrained(path)


def bits(path):
    return {name: tensor.read().tobytes() for name, tensor in open_tensors(path)[0].items()}


def test_conversion_keeps_the_state(tmp_path, merged, capsys):
    first, second = tmp_path / "x.st", tmp_path / "y.pth"
    main(["convert", str(merged), str(first), "--layout", "web-rwkv"])
    main(["convert", str(first), str(second), "--layout", "pth"])
    assert bits(second) == bits(merged)
    main(["inspect", str(second)])
    assert "a trained initial state, with which texts begin" in capsys.readouterr().out
    for layout in ("transformers", "native"):
        error = error_of(["convert", str(merged), str(tmp_path / "z"), "--layout", layout])
        assert f"layout='{layout}' has no place for an initial state" in error
        assert not (tmp_path / "z").exists()
    alone = tmp_path / "state.pth"
    arguments = ["--layout", "transformers", "--state", str(alone)]
    main(["convert", str(merged), str(tmp_path / "z"), *arguments])
    assert bits(alone) == {k: v for k, v in bits(merged).items() if "time_state" in k}
    arguments = ["convert", str(tmp_path / "z"), str(tmp_path / "w"), *arguments]
    assert "exists" in error_of(arguments)
    alone.unlink()
    (tmp_path / "v").write_text("in the way of a folder")
    assert error_of(["convert", str(merged), str(tmp_path / "v" / "x"), *arguments[3:]])
    assert not alone.exists()  # both files or none
    assert "has no initial state" in error_of(arguments)


def test_training_of_weights_refuses_the_state(tmp_path, merged):
    arguments = ["train", "--from", str(merged), "--tokenizer", "byte", "--tune", "lora"]
    error = error_of([*arguments, "--out", str(tmp_path / "runs")])
    assert "begins with a trained initial state, which this training would not use" in error


@pytest.mark.slow
def test_texts_begin_with_the_state(tmp_path, merged, wkv, capsys):
    state = {NAME.format(i=i): value for i, value in enumerate(wkv)}
    file = torch_files.write_arrays(tmp_path / "state.pth", state)
    plain = torch_files.write_arrays(tmp_path / "plain.pth", released("official"))

    def write(path, *arguments):
        main(["generate", str(path), "--tokenizer", "byte", "--prompt", "ab", "--temperature", "0",
              "--max-new-tokens", "12", *arguments])  # fmt: skip
        return capsys.readouterr().out

    assert write(merged) == write(plain, "--state", str(file))
    assert write(merged) != write(plain)


def test_states_that_do_not_fit_are_not_written(tmp_path, wkv):
    model = load_pretrained(GOLDEN / "tiny_official.pth")[0]
    for states in (wkv[:2], wkv[:, :1]):
        with pytest.raises(ValueError, match=r"time_states must have 3 arrays .*\(2, 64, 64\)"):
            save_pretrained(model, tmp_path / "x.pth", "pth", time_states=states)
    with pytest.raises(ValueError, match="is a file of torch, and x"):
        save_pretrained(model, tmp_path / "x.st", "pth")
    assert not list(tmp_path.iterdir())
