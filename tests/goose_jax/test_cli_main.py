"""What all commands have in common, and `goose-jax evaluate`."""

import io
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import goose_jax
from goose_jax import RWKV7, RWKV7Config, save_pretrained
from goose_jax.checkpoints import CheckpointMetadata
from goose_jax.cli import main as command
from goose_jax.cli.flags import name_flags, typed_names, typed_values
from goose_jax.cli.main import main
from goose_jax.cli.memory import MORE_MEMORY, parameters_fit
from goose_jax.cli.prompts import join_texts, read_prompt
from goose_jax.cli.train_checks import refusals_named
from goose_jax.cli.train_settings import TrainSettings
from pallas_kernels import NotServed

pytestmark = pytest.mark.usefixtures("module_quick_to_compile")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    config = RWKV7Config(
        vocab_size=257, hidden_size=32, num_layers=1, head_size=16, compute_dtype="float32"
    )
    model = nnx.jit(lambda: RWKV7(config, rngs=nnx.Rngs(0)))()
    model.head[...] += jax.random.normal(jax.random.key(0), model.head.shape)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    save_pretrained(model, path, "native", CheckpointMetadata(tokenizer="byte"))
    return path


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"goose-jax {goose_jax.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "command"),
    [("goose_jax", "inspect"), ("goose_jax.cli.main", "inspect"), ("goose_jax", "--version")],
)
def test_a_closed_pipe_ends_the_program_silently(checkpoint, tmp_path, module, command):
    """Also: both modules are the program, which keeps compiled programs."""
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            module,
            command,
            *([str(checkpoint)] if command == "inspect" else []),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    assert (tmp_path / "goose-jax" / "compiled").is_dir()


def out_of_device_memory(_):
    jnp.zeros(1 << 50, jnp.uint8).block_until_ready()


def out_of_host_memory(_):
    np.ones(1 << 50, np.uint8)


@pytest.mark.parametrize("function", [out_of_device_memory, out_of_host_memory])
def test_memory_that_cannot_be_had_is_one_line(function, monkeypatch, capsys):
    monkeypatch.setattr(command, "train", function)
    err = fails(capsys, "train")
    assert err.startswith("goose-jax: error: out of memory: ")
    assert err.count("\n") == 1
    assert "B could not be had" in err or "bytes could not be had" in err
    for flag in ("--batch-size", "--microbatches", "--remat"):
        assert flag in err


def test_help_has_a_line_for_each_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "In use" not in printed
    names = re.findall(r"\w+", re.search(r"\{(.*?)\}", printed)[1])
    assert {"train", "chat", "inspect"} < set(names)
    for name in names:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        of_command = capsys.readouterr().out
        assert "In use" in of_command
        assert "None" not in of_command  # flags that may be left out say what happens then
        first = of_command.splitlines()[2].split()[:3]
        assert " ".join(first) in printed


@pytest.mark.parametrize("command", MORE_MEMORY)
def test_the_flags_that_save_memory_exist(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    advised = set(re.findall(r"--[a-z-]+", MORE_MEMORY[command]))
    assert advised
    assert advised <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        (TrainSettings(), "--hidden-size"),
        (TrainSettings(from_=pathlib.Path("x")), "--tune lora"),
        (TrainSettings(from_=pathlib.Path("x"), tune="state"), "--frozen-dtype"),
    ],
)
def test_parameters_that_do_not_fit(settings, flag, monkeypatch, capsys):
    def fail(_):
        with parameters_fit(settings):
            out_of_host_memory(_)

    monkeypatch.setattr(command, "train", fail)
    err = fails(capsys, "train")
    assert "PiB could not be had" in err
    assert flag in err
    assert "--batch-size" not in err


def test_an_implementation_that_does_not_serve_is_one_line(monkeypatch, capsys):
    def fail(settings):
        with refusals_named(settings):
            raise NotServed("mosaic_gpu needs inputs of 16 bits")

    monkeypatch.setattr(command, "train", fail)
    err = fails(capsys, "train", "--implementation=mosaic_gpu")
    assert err == (
        "goose-jax: error: --implementation mosaic_gpu cannot run this training: mosaic_gpu needs "
        "inputs of 16 bits\n"
    )
    with pytest.raises(NotServed), refusals_named(TrainSettings()):
        raise NotServed


def test_other_errors_of_the_device_keep_their_traceback(monkeypatch):
    def broken(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(command, "train", broken)
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(["train"])


def test_prompts_that_begin_with_a_dash():
    assert join_texts(["generate", "x", "--prompt", "-- a", "--seed", "3"]) == [
        *("generate", "x", "--prompt=-- a", "--seed", "3"),
    ]
    assert join_texts(["--prompt"]) == ["--prompt"]
    assert join_texts(["--prompt", "a", "-b"]) == ["--prompt", "a", "-b"]
    assert join_texts(["--stop", "-y", "--seed"]) == ["--stop=-y", "--seed"]
    assert join_texts(["--stop", "--seed"]) == ["--stop", "--seed"]


@pytest.mark.slow
def test_prompts_from_a_file_and_from_stdin(checkpoint, tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("- two\nlines ä")
    main(["generate", str(checkpoint), f"--prompt-file={file}", "--max-new-tokens=1"])
    assert capsys.readouterr().out.startswith("- two\nlines ä")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ö\n".encode())))
    assert read_prompt("", pathlib.Path("-")) == "ö\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    generate = ("generate", checkpoint)
    assert "stdin is not UTF-8 text: byte 1 is 0xff" in fails(capsys, *generate, "--prompt-file=-")
    assert "give either --prompt or --prompt-file" in fails(
        capsys, *generate, "--prompt", "-x", f"--prompt-file={file}"
    )
    assert "nothing.txt" in fails(capsys, *generate, f"--prompt-file={tmp_path / 'nothing.txt'}")


@pytest.mark.slow
def test_bits_per_byte_of_a_text(model, checkpoint, tmp_path, capsys):
    """They are those of the logits, window by window, with both ends of the document."""
    (tmp_path / "a.txt").write_text("the quick brown fö")
    (tmp_path / "b.md").write_text("left out")
    main([
        *("evaluate", str(checkpoint), str(tmp_path), "--pattern", "*.txt"),
        *("--sequence-length=8", "--batch-size=2"),
    ])  # fmt: skip
    out = capsys.readouterr().out
    # A token is a byte and 1; 0 ends a document.
    tokens = np.array([0, *(byte + 1 for byte in "the quick brown fö".encode()), 0])
    nats = 0.0
    for start in range(0, len(tokens) - 1, 8):
        window = tokens[start : start + 9]
        logits, _ = model(jnp.asarray(window[None, :-1]))
        logits = np.asarray(logits[0], np.float64)
        chosen = np.take_along_axis(logits, window[1:, None], -1)[:, 0]
        nats += np.sum(np.log(np.sum(np.exp(logits), -1)) - chosen)
    expected = nats / np.log(2) / 19
    assert float(out.split()[0]) == pytest.approx(expected, abs=2e-4)
    assert "1 documents, 19 bytes, 20 tokens" in out


def test_errors_name_the_flags_that_were_typed(capsys):
    generate = ("generate", "nothing.pth")
    for flag, message in (
        ("--top-p=3", "--top-p must be in [0, 1], got 3.0"),
        ("--temperature=-1", "--temperature must be in [0, 1e+30], got -1.0"),
    ):
        assert fails(capsys, *generate, flag) == f"goose-jax: error: {message}\n"
    names = typed_names(["train", "--head-size=64", "--steps", "3", "a=b"])
    assert names == {"head_size", "steps"}
    message = "self.head_size=64 must divide hidden_size=100; --steps=3, steps of head_size"
    assert name_flags(message, names) == (
        "--head-size=64 must divide hidden_size=100; --steps=3, steps of head_size"
    )


@pytest.mark.parametrize("value", ["data=x", "a/data=x", "./data=x", "data", "data must, data=3"])
def test_what_the_user_typed_is_not_changed(value):
    arguments = ["train", "--data", value, "--mesh=data=x"]
    for message in (f"mesh {value!r}: no", f"{pathlib.Path(value)} must be", f"a={value}"):
        assert name_flags(message, typed_names(arguments), typed_values(arguments)) == message


def test_what_evaluate_cannot_do(tmp_path, capsys):
    text, checkpoint = tmp_path / "text", tmp_path / "model.pth"
    assert f"there is no file or folder at {text}" in fails(capsys, "evaluate", checkpoint, text)
    text.write_text("x")
    for flag in ("--batch-size", "--sequence-length"):
        assert f"{flag} must be an integer >= 1, got 0" in fails(
            capsys, "evaluate", checkpoint, text, f"{flag}=0"
        )
    assert f"{checkpoint}" in fails(capsys, "evaluate", checkpoint, text)
    for arguments, message in (
        (["--field=foo"], "--field 'foo' is for JSONL files and data sets"),
        (["--pattern"], "--pattern needs at least one pattern"),
        ([f"--batch-size={2**31}"], f"--batch-size must be at most {2**31 - 1}, got {2**31}"),
    ):
        assert message in fails(capsys, "evaluate", checkpoint, text, *arguments)
    assert "--pattern='/x/*' must fit names in a folder" in fails(
        capsys, "evaluate", checkpoint, tmp_path, "--pattern", "/x/*"
    )
