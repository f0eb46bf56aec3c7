"""Models in the layouts and containers of others, written by hand."""

import io
import json
import re
import shutil
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from goose_jax import load_pretrained, save_pretrained
from goose_jax.checkpoints import CheckpointError, read_contents
from goose_jax.checkpoints.layouts import LAYOUTS
from goose_jax.checkpoints.pretrained import WRITTEN_LAYOUTS
from goose_jax.cli.convert import convert
from goose_jax.cli.main import main
from tests.goose_jax import safetensors_by_hand, torch_files
from tests.goose_jax.layouts_by_hand import (
    CONFIG,
    RENAME,
    WRAPPED,
    error_of,
    released,
    write_folder,
)
from tests.goose_jax.official_weights import GOLDEN, golden_weights
from tests.goose_jax.random_parameters import assert_same_params, make_model

RWKV_RS_CONFIG = CONFIG | {"model_type": "rwkv", "architecture_version": "rwkv7"}
pytestmark = pytest.mark.usefixtures("module_quick_to_compile")
forward = jax.jit(lambda model, tokens: model(tokens)[0])


@pytest.fixture(scope="module")
def golden():
    return load_pretrained(GOLDEN / "tiny_fla_hf")[0]


@pytest.mark.parametrize("layout", RENAME)
def test_each_layout_in_each_container(tmp_path, golden, layout):
    arrays = released(layout)
    folder = tmp_path / "folder"
    config = RWKV_RS_CONFIG if layout == "rwkv-rs" else CONFIG
    paths = [
        safetensors_by_hand.write(tmp_path / "x.safetensors", arrays),
        shutil.copy(tmp_path / "x.safetensors", tmp_path / "x.st"),
        torch_files.write_arrays(tmp_path / "x.pth", arrays),
        write_folder(folder, arrays, config),
        folder / "model.safetensors.index.json",
    ]
    for path in paths:
        assert_same_params(load_pretrained(path)[0], golden)
        contents = read_contents(path)
        assert contents.layout.name == layout
        assert (contents.config.norm_eps, contents.config.head_norm_eps) == (1e-5, 64e-5)
    (folder / "config.json").unlink()
    assert_same_params(load_pretrained(folder)[0], golden)


@pytest.mark.parametrize("layout", RENAME)
def test_logits_are_those_of_the_official_code(tmp_path, layout):
    folder = write_folder(
        tmp_path / "x", released(layout), RWKV_RS_CONFIG if layout == "rwkv-rs" else CONFIG
    )
    with np.load(GOLDEN / "logits_17_tokens.npz") as official:
        tokens, expected = official["tokens"], official["logits_np64"]
    model, _ = load_pretrained(folder, compute_dtype="float32")
    logits = forward(model, jnp.asarray(tokens, jnp.int32)[None])[0]
    assert np.abs(logits - expected).max() < 1e-4  # measured: 1.6e-6


def test_each_layout_can_be_chosen_and_is_tested():
    choices = typing.get_type_hints(convert)["layout"]
    assert set(typing.get_args(choices)) == set(WRITTEN_LAYOUTS)
    assert {*RENAME, "huggingface", "huggingface-x-x"} == set(LAYOUTS)  # see test_fla_folder.py


def test_folders_without_an_index(tmp_path, golden):
    arrays = released("official")
    for name in ("model.safetensors", "rwkv.st", "rwkv7-g1.pth", "pytorch_model.bin"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        is_pth = name.endswith((".pth", ".bin"))
        (torch_files.write_arrays if is_pth else safetensors_by_hand.write)(folder / name, arrays)
        torch_files.write_arrays(folder / "optimizer.pt", {"x": np.zeros(1, np.float32)})
        if name == "rwkv7-g1.pth":
            with pytest.raises(CheckpointError, match=r"several files .* optimizer.pt, rwkv7-g1"):
                load_pretrained(folder)
            (folder / "optimizer.pt").unlink()
        assert_same_params(load_pretrained(folder)[0], golden)


def test_config_of_transformers(tmp_path):
    folder = write_folder(tmp_path / "x", released("transformers"), CONFIG)

    def change(**changes):
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))

    change(layer_norm_epsilon=1e-6, group_norm_epsilon=2e-4)
    for path in (folder, folder / "model.safetensors.index.json"):
        config = load_pretrained(path)[0].config
        assert (config.norm_eps, config.head_norm_eps) == (1e-6, 2e-4)
    for changes, message in (
        ({"head_size": 32}, "head_size is 32, but 64 by the weights"),
        ({"model_type": "llama"}, "model_type is 'llama' rather than 'rwkv7'"),
        ({"model_type": "rwkv"}, "model_type is 'rwkv' rather than 'rwkv7'"),
        ({"architecture_version": "rwkv6"}, "architecture_version is 'rwkv6' rather"),
        ({"group_norm_epsilon": "x"}, "group_norm_epsilon is 'x', no positive number"),
        ({"layer_norm_epsilon": -1}, "norm_eps is -1, no positive number"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4} rather"),
    ):
        change(**changes)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load_pretrained(folder)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrapped_files(tmp_path, golden, wrapped, protocol):
    path = torch_files.write_arrays(
        tmp_path / "x.pth", released("official"), protocol, wrap_all=WRAPPED[wrapped]
    )
    assert_same_params(load_pretrained(path)[0], golden)


def test_files_with_several_models_are_refused(tmp_path):
    path = torch_files.write_arrays(
        tmp_path / "x.pth", released("official"), wrap_all=lambda x: {"ema": x, "net": dict(x)}
    )
    with pytest.raises(CheckpointError, match=r"several models, and no rule .*: 'ema', 'net'"):
        load_pretrained(path)


def test_the_format_before_torch_1_6(tmp_path, golden):
    path = torch_files.write_before_1_6(tmp_path / "x.pth", released("official"))
    assert_same_params(load_pretrained(path)[0], golden)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="is damaged: it is cut off"):
        load_pretrained(path)
    path.write_bytes(torch_files.dumps({"emb.weight": 1}))
    with pytest.raises(CheckpointError, match=r"damaged|is a pickle, but none"):
        load_pretrained(path)


@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_float64_is_rounded(tmp_path, golden, layout):
    arrays = released(layout, "float64")
    for path in (
        safetensors_by_hand.write(tmp_path / "x.st", arrays),
        torch_files.write_arrays(tmp_path / "x.pth", arrays),
    ):
        assert_same_params(load_pretrained(path, dtype="float32")[0], golden)
        assert read_contents(path).num_bytes == 8 * sum(x.size for x in arrays.values())
        with pytest.raises(CheckpointError, match=r"holds float64, .* dtype='float32'"):
            load_pretrained(path)


def names_of(text, layers=24):
    names = ["emb.weight", "head.weight", "ln_out.weight"]
    return names + [f"blocks.{i}.{name}" for i in range(layers) for name in text.split()]


LOOKS = {  # names in a file, and what the error says that it is
    "RWKV-4": names_of("att.time_first att.time_decay att.time_mix_k att.key.weight"),
    "RWKV-5": names_of("att.time_faaaa att.time_decay att.gate.weight att.ln_x.weight"),
    "RWKV-6": names_of("att.time_maa_x att.time_maa_w1 att.time_decay att.gate.weight"),
    "RWKV-7a or 7b (DeepEmbed), experimental": names_of("att.r_k ffn.s_emb.weight ffn.s1"),
    "adapters of LoRA": [f"blocks.{i}.att.key.lora_A" for i in range(24)],
    "an initial state without its model": [f"blocks.{i}.att.time_state" for i in range(24)],
    "quantized weights": names_of("att.key.weight_packed att.key.weight_scale"),
    "another architecture": [
        f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(24) for x in "qkvo"
    ],
    "Mamba": [f"backbone.layers.{i}.mixer.A_log" for i in range(24)],
}


@pytest.mark.parametrize("kind", LOOKS)
def test_errors_fit_a_screen_and_say_what_a_file_is(tmp_path, kind):
    arrays = {name: np.zeros((4, 4), np.float32) for name in LOOKS[kind]}
    for path in (
        torch_files.write_arrays(tmp_path / "x.pth", arrays),
        safetensors_by_hand.write(tmp_path / "x.safetensors", arrays),
    ):
        error = error_of(["inspect", str(path)])
        assert f"(it looks like {kind}" in error
        assert len(error) < 15 * 80
        assert error.count("\n") == 1


def test_one_shard_and_other_formats(tmp_path):
    arrays = released("transformers")
    folder = write_folder(tmp_path / "x", arrays, CONFIG)
    shard = next(folder.glob("*-00002-of-*"))
    assert "one of several shards; give their folder" in error_of(["inspect", str(shard)])
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0\0\0\0\0")
    assert "is a GGUF file" in error_of(["inspect", str(tmp_path / "x.gguf")])


def test_a_header_that_claims_too_many_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert "header has more than 8,388,608 bytes" in error_of(["inspect", str(path)])


def test_names_in_errors_are_short_and_printable(tmp_path):
    arrays = released("official") | {"x" * 5000 + "\x1b[31m": np.zeros(1, np.float32)}
    error = error_of(["inspect", str(torch_files.write_arrays(tmp_path / "x.pth", arrays))])
    assert "1 unknown: 'xxxx" in error
    assert len(error) < 400
    assert "\x1b" not in error


def raw(path):
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_and_back_keeps_every_bit(tmp_path, capsys, layout):
    """From a file by hand to our checkpoint, and from there to the layout and back."""
    eps = 32e-5 if layout.startswith("huggingface") else 64e-5
    model = make_model(param_dtype="bfloat16", head_norm_eps=eps)
    unused = LAYOUTS[layout].unused
    for name in ("x", "x.st", "x.pth"):
        first, native, second = (tmp_path / part / name for part in ("1", "native", "2"))
        save_pretrained(model, first, layout)
        main(["convert", str(first), str(native), "--layout", "native"])
        main(["convert", str(native), str(second), "--layout", layout])
        assert_same_params(load_pretrained(second)[0], model, unused=unused)
        assert raw(second) == raw(first)
        capsys.readouterr()
        main(["inspect", str(second)])
        assert f"({layout}), " in capsys.readouterr().out


@pytest.mark.parametrize("layout", RENAME)
def test_what_is_written_is_what_others_write(tmp_path, layout):
    """All names, shapes, dtypes and bits of a file by hand."""
    arrays = released(layout)
    source = safetensors_by_hand.write(tmp_path / "x.safetensors", arrays)
    target = tmp_path / "y.pth"
    main(["convert", str(source), str(target), "--layout", layout])
    found = read_arrays(target)
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
        assert found[name].tobytes() == value.tobytes(), name


def read_arrays(path):
    from goose_jax.checkpoints.pth import read_pth

    return {name: tensor.read() for name, tensor in read_pth(path).items()}


@pytest.mark.slow
def test_commands_on_each_layout(tmp_path, capsys, monkeypatch):
    """`inspect`, `generate` and `chat` say the same of the same weights."""
    settings = ["--tokenizer", "byte", "--temperature", "0", "--max-new-tokens", "8"]
    said = set()
    for layout in RENAME:
        config = RWKV_RS_CONFIG if layout == "rwkv-rs" else CONFIG
        folder = write_folder(tmp_path / layout, released(layout), config)
        file = safetensors_by_hand.write(tmp_path / f"{layout}.st", released(layout))
        for path in (folder, file):
            main(["inspect", str(path)])
            found = capsys.readouterr().out
            assert f"({layout}), {'folder' if path is folder else 'safetensors'}" in found
            assert "3 layers, width 128, 2 heads of 64" in found
            main(["generate", str(path), "--prompt", "The", *settings])
            text = capsys.readouterr().out
            monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/quit\n"))
            main(["chat", str(path), *settings])
            said.add((text, capsys.readouterr().out))
    assert len(said) == 1
    assert all(said.pop())


def folded(layout):
    """The weights with the norm after the embedding in the embedding, computed in float64."""
    weights = golden_weights()
    rows = weights["emb.weight"].astype(np.float64)
    centred = rows - rows.mean(1, keepdims=True)
    normalised = centred / np.sqrt(rows.var(1, keepdims=True) + 1e-5)
    scale, bias = weights["blocks.0.ln0.weight"], weights["blocks.0.ln0.bias"]
    arrays = released(layout)
    embedding, _ = RENAME[layout]("emb.weight", rows)
    arrays[embedding] = (normalised * scale + bias).astype(np.float32)
    for name in ("blocks.0.ln0.weight", "blocks.0.ln0.bias"):
        del arrays[RENAME[layout](name, scale)[0]]
    return arrays


FUSED = "embedding_layer_norm_fused"


@pytest.mark.slow
def test_a_norm_folded_into_the_embedding(tmp_path, capsys):
    with np.load(GOLDEN / "logits_17_tokens.npz") as official:
        tokens, expected = official["tokens"], official["logits_np64"]
    paths = [
        safetensors_by_hand.write(tmp_path / "x.safetensors", folded("rwkv7")),
        torch_files.write_arrays(tmp_path / "x.pth", folded("rwkv7-emb")),
        write_folder(tmp_path / "x", folded("transformers"), CONFIG | {FUSED: True}),
    ]
    for path in paths:
        model, _ = load_pretrained(path, compute_dtype="float32")
        assert not model.config.embedding_norm
        logits = forward(model, jnp.asarray(tokens, jnp.int32)[None])[0]
        assert np.abs(logits - expected).max() < 1e-4
        main(["inspect", str(path)])
        assert ", norm folded into the embedding\n" in capsys.readouterr().out


def test_conversion_of_a_folded_norm(tmp_path):
    source = safetensors_by_hand.write(tmp_path / "x.safetensors", folded("rwkv7"))
    native, target = tmp_path / "native", tmp_path / "y.pth"
    main(["convert", str(source), str(native), "--layout", "native"])
    main(["convert", str(native), str(target), "--layout", "rwkv7"])
    found = read_arrays(target)
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in folded("rwkv7").items()
    }
    main(["convert", str(native), str(tmp_path / "folder"), "--layout", "transformers"])
    assert json.loads((tmp_path / "folder" / "config.json").read_text())[FUSED] is True
    assert_same_params(load_pretrained(tmp_path / "folder")[0], load_pretrained(source)[0])
    for layout in ("pth", "huggingface"):
        error = error_of(["convert", str(native), str(tmp_path / "z"), "--layout", layout])
        assert f"layout='{layout}' has no place for a model whose embedding holds" in error


def test_a_norm_is_not_missed_where_nothing_says_that_it_is_folded(tmp_path):
    path = safetensors_by_hand.write(tmp_path / "x.st", folded("transformers"))
    missing = "2 missing: model.blocks.0.ln0.bias, model.blocks.0.ln0.weight"
    with pytest.raises(CheckpointError, match=missing):
        load_pretrained(path)
    folder = write_folder(tmp_path / "x", folded("rwkv7"), CONFIG)
    with pytest.raises(CheckpointError, match=r"2 missing: rwkv7\.blocks\.0\.ln0\.bias"):
        load_pretrained(folder)
    folder = write_folder(tmp_path / "y", released("rwkv7"), CONFIG | {FUSED: True})
    with pytest.raises(CheckpointError, match=f"{FUSED} is true, but the file has rwkv7.blocks.0"):
        load_pretrained(folder)
