"""`goose-jax convert` and `goose-jax inspect`."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from goose_jax.checkpoints import load_pretrained
from goose_jax.checkpoints.conversion import build_model
from goose_jax.cli.main import main
from goose_jax.cli.sizes import format_bytes
from goose_jax.state import init_state
from tests.goose_jax.official_weights import GOLDEN
from tests.goose_jax.random_parameters import assert_same_params

OFFICIAL, FLA = str(GOLDEN / "tiny_official.pth"), str(GOLDEN / "tiny_fla_hf")


def inspect(capsys, path):
    main(["inspect", str(path)])
    return capsys.readouterr().out


@pytest.mark.slow
def test_there_and_back(tmp_path, capsys):
    native, pth, folder = (str(tmp_path / name) for name in ("native", "x.pth", "folder"))
    main(["convert", OFFICIAL, native, "--layout", "native", "--tokenizer", "byte"])
    assert re.search(r"native: 802,432 parameters in float32, 3\.06 MiB", capsys.readouterr().out)
    assert load_pretrained(native)[1].tokenizer == "byte"
    main(["convert", native, folder, "--layout", "huggingface"])
    assert load_pretrained(folder)[1].tokenizer == "byte"
    main(["convert", native, pth, "--layout", "pth"])
    expected = load_pretrained(OFFICIAL)[0]
    assert_same_params(load_pretrained(pth)[0], expected)
    assert_same_params(load_pretrained(folder)[0], expected, unused=False)


def test_to_another_dtype(tmp_path, capsys):
    target = tmp_path / "x.pth"
    main(["convert", FLA, str(target), "--layout", "pth", "--dtype", "bfloat16"])
    assert "in bfloat16, 1.53 MiB" in capsys.readouterr().out
    assert_same_params(load_pretrained(target)[0], load_pretrained(FLA, dtype="bfloat16")[0])


@pytest.mark.slow
def test_the_compute_dtype_of_a_new_checkpoint_does_not_depend_on_the_machine(
    tmp_path, monkeypatch
):
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        target = str(tmp_path / backend)
        main(["convert", OFFICIAL, target, "--layout", "native"])
        assert load_pretrained(target)[0].config.compute_dtype == "float32"
    low, native = str(tmp_path / "low"), str(tmp_path / "native")
    main(["convert", OFFICIAL, low, "--layout", "huggingface", "--dtype", "float16"])
    main(["convert", low, native, "--layout", "native"])
    config = load_pretrained(native)[0].config
    assert (config.param_dtype, config.compute_dtype) == ("float16", "bfloat16")


def test_errors_end_with_one_line(tmp_path, capsys):
    (tmp_path / "x").write_text("mine")
    for arguments, message in (
        (["convert", OFFICIAL, str(tmp_path / "x"), "--layout", "pth"], "x exists"),
        (["convert", str(tmp_path / "y"), str(tmp_path / "z"), "--layout", "pth"], "no checkpoint"),
        (
            ["inspect", str(tmp_path / "x")],
            "is neither a .pth nor a safetensors file: it begins with b'mine'",
        ),
        (["inspect", str(tmp_path)], "neither a checkpoint"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("goose-jax: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert (tmp_path / "x").read_text() == "mine"


def test_inspect_says_what_there_is(tmp_path, capsys):
    native = str(tmp_path / "native")
    main(["convert", FLA, native, "--layout", "native", "--tokenizer", "byte"])
    capsys.readouterr()
    for path, kind, count in (
        (OFFICIAL, "official names (official), .pth file", 802_432),
        (FLA, "Hugging Face layout of flash-linear-attention (huggingface), folder", 794_112),
        (native, "checkpoint of goose-jax (native)", 802_432),
    ):
        text = inspect(capsys, path)
        assert f"layout      {kind}\n" in text
        assert "3 layers, width 128, 2 heads of 64, channel mix 512\n" in text
        assert "decay 32, alpha 32, value 32, gate 64\n" in text
        tokenizer = "byte" if path == native else "unknown"
        assert f"320 ids, tokenizer: {tokenizer}\n" in text
        groups = re.findall(r"^  ([a-z ]+?) +float32 +([\d,]+) ", text, re.MULTILINE)
        assert [name for name, _ in groups] == [
            *("embedding", "norms", "time mix", "channel mix", "head")
        ]
        assert sum(int(number.replace(",", "")) for _, number in groups) == count
        assert re.search(rf"^  all +{count:,} ", text, re.MULTILINE)


def test_inspect_measures_the_state(capsys):
    config = load_pretrained(FLA)[0].config
    text = inspect(capsys, FLA)
    for dtype in ("float32", "bfloat16", "float16"):
        state = init_state(dataclasses.replace(config, compute_dtype=dtype), 1)
        arrays = (state.time_shift, state.wkv, state.channel_shift)
        size = format_bytes(sum(array.nbytes for array in arrays))
        parameters = format_bytes(794_112 * jnp.dtype(dtype).itemsize)
        assert re.search(rf"^  {dtype} +{parameters} +{size}$", text, re.MULTILINE)


def test_inspect_reads_no_weights(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("goose_jax.checkpoints.safetensors_files.map_file", fail)
    monkeypatch.setattr("goose_jax.checkpoints.pth.map_file", fail)
    assert [inspect(capsys, path).count("3.06 MiB") for path in (OFFICIAL,)] == [2]
    assert "794,112" in inspect(capsys, FLA)
    with pytest.raises(AssertionError, match="weights were read"):
        build_model(*fla_tensors())


def fla_tensors():
    from goose_jax.checkpoints.pretrained import open_foreign

    found = open_foreign(GOLDEN / "tiny_fla_hf")
    return found.tensors, found.layout, found.config


def test_sizes_are_readable():
    sizes = [0, 1023, 1024, 1536, 5 << 20, 14 << 30, 3 << 40]
    expected = ["0 bytes", "1023 bytes", "1 KiB", "1.5 KiB", "5 MiB", "14 GiB", "3 TiB"]
    for size, text in itertools.zip_longest(sizes, expected):
        assert format_bytes(size) == text
