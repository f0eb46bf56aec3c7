"""`goose-jax train` on every kind of data, with a model of the smallest size."""

import json
from pathlib import Path

import pytest

from goose_jax.cli.main import main
from goose_jax.cli.train_settings import TrainSettings
from tests.goose_jax.binidx_by_hand import write_by_hand

pytestmark = pytest.mark.usefixtures("module_quick_to_compile", "module_compilation_cache")

SMALL = [
    *("--num-layers=1", "--hidden-size=32", "--head-size=16", "--batch-size=4"),
    *("--sequence-length=12", "--steps=4", "--warmup-steps=2", "--learning-rate=1e-2"),
    *("--save-every=2", "--evaluate-every=4", "--held-out-bytes=64", "--log-every=1"),
    *("--sample-length=0", "--no-plot", "--no-tensorboard"),
]
TEXTS = [f"The quick brown fox number {i} jumps over the lazy dog." for i in range(40)]
NUM_TOKENS = sum(len(text) + 1 for text in TEXTS)
NUM_HELD_OUT = len(TEXTS[-1])  # two do not fit into 64 bytes


def write_binidx(folder):
    items = [[byte + 1 for byte in text.encode()] + [0] for text in TEXTS]
    return write_by_hand(folder / "tokens", items).with_suffix(".bin")


def write_conversations(folder):
    lines = []
    for i, text in enumerate(TEXTS):
        chat = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": text}]
        lines.append(json.dumps({"messages": chat}) + "\n")
    file = folder / "chat.jsonl"
    file.write_text("".join(lines))
    return file


def train(out, *arguments):
    main(["train", *SMALL, f"--out={out}", *map(str, arguments)])


def losses_of(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_the_official_order_of_tokens(tmp_path, capsys):
    tokens = write_binidx(tmp_path)
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("The lazy dog sleeps.")
    out = tmp_path / "runs"
    official = (f"--data={tokens}", "--sampling=magic-prime", f"--held-out={held_out}")
    train(out, *official)
    assert f"{NUM_TOKENS} tokens to train on, 20 bytes held out" in capsys.readouterr().out
    train(out, *official, "--prefetch=0")
    first, second = (losses_of(out / f"tokens-{i}") for i in (1, 2))
    assert len(first) == 4
    assert first == second
    assert not (out / ".tokens").exists()


@pytest.mark.slow
def test_packed_conversations_and_data_that_changes_or_vanishes(tmp_path, capsys):
    file = write_conversations(tmp_path)
    out = tmp_path / "runs"
    train(out, f"--data={file}", "--sampling=packed", "--pattern", "*.jsonl", "*.txt")
    run = out / "chat-1"
    whole = losses_of(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens" in line]
    assert [line["tokens"] for line in steps] == [48] * 4
    assert 0.5 < sum(line["targets"] for line in steps) / (4 * 48) < 0.95  # 54 of 74 tokens
    assert len(list((out / ".tokens").iterdir())) == 1

    content = file.read_text()
    resume = ["train", f"--resume={run}", "--steps=6", "--no-tensorboard", "--no-plot"]
    file.write_text(content.replace("lazy", "busy"))
    with pytest.raises(SystemExit, match="2"):
        main(resume)
    assert f"was trained on another text than is in {file} now" in capsys.readouterr().err
    file.unlink()
    with pytest.raises(SystemExit, match="2"):
        main(resume)
    assert f"there is no file or folder at {file}" in capsys.readouterr().err
    assert losses_of(run) == whole

    moved = tmp_path / "moved" / "chat.jsonl"
    moved.parent.mkdir()
    moved.write_text(content)
    main([*resume, f"--data={moved}", "--prefetch=0", "--sample-length=0"])
    assert sorted(losses_of(run)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_tokens_that_change_or_vanish_are_named(tmp_path, capsys):
    file = write_binidx(tmp_path)
    out = tmp_path / "runs"
    train(out, f"--data={file}")
    assert (
        f"{NUM_TOKENS - NUM_HELD_OUT - 1} tokens to train on, {NUM_HELD_OUT} bytes held out"
        in capsys.readouterr().out
    )
    run = out / "tokens-1"
    resume = ["train", f"--resume={run}", "--steps=6", "--no-tensorboard", "--no-plot"]

    def fails():
        with pytest.raises(SystemExit, match="2"):
            main(resume)
        return capsys.readouterr().err

    content, index = file.read_bytes(), file.with_suffix(".idx").read_bytes()
    file.write_bytes(content[:100] + b"\7\0" + content[102:])
    assert f"was trained on another text than is in {file} now" in fails()
    file.write_bytes(content[:-2])
    assert f"points past the end of {file}" in fails()
    file.write_bytes(content)
    file.with_suffix(".idx").write_bytes(index[:-1])
    assert f"{file.with_suffix('.idx')} is truncated" in fails()
    file.unlink()
    file.with_suffix(".idx").write_bytes(index)
    assert f"No such file or directory: '{file}'" in fails()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sampling=magic-prime", "--sampling magic-prime trains on all of the data: give --held"),
        ("--magic-prime=29", "--magic-prime needs --sampling magic-prime"),
        ("--prefetch=-1", "--prefetch must be at least 0, got -1"),
        ("--data-workers=-1", "--data-workers must be at least 0, got -1"),
        ("--data-workers=1 --prefetch=0", "--data-workers needs --prefetch of at least 1, got 0"),
        ("--data={folder}/nothing.bin", "No such file or directory: '{folder}/nothing.idx'"),
        ("--held-out={folder}/nothing", "there is no file or folder at {folder}/nothing"),
        (
            "--sampling=magic-prime --held-out={folder}/held-out.txt --magic-prime=30",
            "--magic-prime must be a prime of the form 3 k + 2, got 30",
        ),
        ("--sequence-length=5000", "tokens.bin is too short: 2135 tokens to train on"),
        ("--data={folder} --strict", "tokens.bin is not a text file: byte 1 is zero"),
    ],
)
def test_wrong_data_is_named(tmp_path, capsys, arguments, message):
    file = write_binidx(tmp_path)
    (tmp_path / "held-out.txt").write_text("The lazy dog sleeps.")
    arguments = arguments.format(folder=tmp_path).split()
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path / "runs", f"--data={file}", *arguments)
    assert message.format(folder=tmp_path) in capsys.readouterr().err


def test_states_are_not_tuned_on_packed_documents():
    with pytest.raises(ValueError, match="--sampling packed cannot be given with --tune state"):
        TrainSettings(from_=Path("x"), tune="state", sampling="packed")
