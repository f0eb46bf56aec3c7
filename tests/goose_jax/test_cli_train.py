"""The command line, on a model and a text of the smallest size."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
import sys
import zlib

import chex
import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from goose_jax.checkpoints import load_checkpoint
from goose_jax.cli import main as command
from goose_jax.cli.main import main
from goose_jax.cli.train_progress import Progress
from goose_jax.cli.unused_run import removed_if_unused
from goose_jax.training import RunDirectory, StepReport

pytestmark = pytest.mark.usefixtures("module_quick_to_compile", "module_compilation_cache")

ROOT = pathlib.Path(__file__).parents[2]
TEXT = "the quick brown fox jumps over the lazy dog. " * 40
SMALL = [
    *("--num-layers=1", "--hidden-size=32", "--head-size=16", "--batch-size=4"),
    *("--sequence-length=12", "--steps=8", "--warmup-steps=2", "--learning-rate=1e-2"),
    *("--log-every=1", "--save-every=4", "--evaluate-every=4", "--held-out-bytes=64"),
    *("--sample-length=8", "--prompt=the"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "fox.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def finished(folder, capture):
    """A finished run: its folder and what was printed."""
    with capture() as printed:
        main(["train", *SMALL, f"--data={folder / 'fox.txt'}", f"--out={folder / 'runs'}"])
    return folder / "runs" / "fox-1", printed


@pytest.fixture(scope="module")
def capture():
    """Like `capsys`, for a whole module."""

    @contextlib.contextmanager
    def captured():
        out, err = io.StringIO(), io.StringIO()
        printed = {}
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield printed
        printed.update(out=out.getvalue(), err=err.getvalue())

    return captured


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run):
    return {line["step"]: line["loss"] for line in lines_of(run) if "loss" in line}


def params_of(path):
    return nnx.to_pure_dict(nnx.state(load_checkpoint(path)[0]))


def fails(capsys, *arguments):
    """The one line on stderr, after a progress bar if there was one, with which a command fails."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    before, error, line = capsys.readouterr().err.rpartition("goose-jax: error: ")
    assert error
    assert "Traceback" not in before
    assert line.count("\n") == 1
    return line


def test_a_run_leaves_what_it_should(finished):
    run, printed = finished
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"00000004", "00000008"}
    assert yaml.safe_load((run / "settings.yaml").read_text())["num_layers"] == 1

    steps = [line for line in lines_of(run) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert steps[0]["tokens"] == 4 * 12
    assert steps[-1]["loss"] < steps[0]["loss"]
    held_out = {line["step"]: line["held_out_bits_per_byte"] for line in lines_of(run)
                if "held_out_bits_per_byte" in line}  # fmt: skip
    assert list(held_out) == [0, 4, 8]
    assert 7.5 < held_out[0] < 9  # 8 bits per byte, and a little
    assert held_out[8] < held_out[0] - 1

    out = printed["out"]
    assert f"held out: {held_out[0]:.3f} bits per byte before training, {held_out[8]:.3f}" in out
    assert "computing in float32" in out
    assert "\nthe" in out
    assert f"goose-jax generate {run} --prompt=the" in out
    for word in ("loss", "tokens/s", "ETA", "step 8/8"):
        assert word in printed["err"]


def test_the_checkpoint_can_be_used(finished, capsys):
    model, metadata = load_checkpoint(finished[0])
    assert (metadata.step, metadata.tokenizer) == (8, "byte")
    assert model.config.num_layers == 1
    main(["generate", str(finished[0]), "--prompt=the", "--max-new-tokens=4"])
    assert capsys.readouterr().out.startswith("the")


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    run = pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "00000008")  # as if it had been killed in step 8
    main(["train", "--resume", str(run)])
    assert losses_of(run) == losses_of(finished[0])
    assert [line["step"] for line in lines_of(run)] == [
        line["step"] for line in lines_of(finished[0])
    ]
    chex.assert_trees_all_equal(params_of(run), params_of(finished[0]))


def test_a_run_is_not_written_over(finished, folder, monkeypatch):
    monkeypatch.setattr("goose_jax.training.Trainer.fit", lambda *_, **__: sys.exit(9))
    for number in (2, 3):
        with pytest.raises(SystemExit):
            main(["train", *SMALL, f"--data={folder / 'fox.txt'}", f"--out={folder / 'runs'}"])
        assert (folder / "runs" / f"fox-{number}" / "settings.yaml").is_file()
    assert len(losses_of(finished[0])) == 8


def test_what_is_not_finite_stops_the_run(folder, capsys):
    err = fails(
        capsys,
        "train",
        *SMALL,
        "--learning-rate=1e30",
        "--save-every=1",
        f"--data={folder / 'fox.txt'}",
        f"--out={folder / 'wild'}",
        "--no-plot",
    )
    run = folder / "wild" / "fox-1"
    bad_step = max(losses_of(run)) + 1
    assert f"step {bad_step}: the loss is nan" in err
    saved = run / "checkpoints" / f"{bad_step - 1:08d}"
    assert f"{saved} is from before" in err
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params_of(saved)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file or folder at {path}"),
        (b"\x89PNG\r\n\x1a\n\0\0", "{path} is not a text file: byte 8 is zero"),
        (b"text in \xe4 latin-1", "{path} is not a UTF-8 text file: byte 8 is 0xe4"),
        (b"", "{path} does not hold any text"),
        (b"a text", "{path} is too short"),
        (b"a text that is too short", "{path} is too short: 23 tokens to train on"),
    ],
)
def test_a_text_that_cannot_be_used(tmp_path, capsys, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    err = fails(capsys, "train", f"--data={path}", f"--out={tmp_path / 'runs'}", "--no-plot")
    assert message.format(path=path) in err
    assert not list((tmp_path / "runs").glob("[!.]*"))  # no run


def test_an_empty_folder(tmp_path, capsys):
    err = fails(capsys, "train", f"--data={tmp_path}", f"--out={tmp_path / 'runs'}", "--no-plot")
    assert f"{tmp_path} does not hold a file with text" in err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--hidden-size=100", "--head-size=64 must be at least 2 and divide --hidden-size=1"),
        ("--num-layers=0", "--num-layers must be an integer >= 1, got 0"),
        ("--gate-rank=0", "--gate-rank must be an integer >= 1, got 0"),
        ("--vocab-size=7", "--vocab-size must be at least the 257 ids of the tokenizer, got 7"),
        ("--steps=0", "--steps must be an integer >= 1, got 0"),
        ("--warmup-steps=1200", "--steps=1200 must be more than --warmup-steps=1200"),
        ("--batch-size=0", "--batch-size must be an integer >= 1, got 0"),
        ("--sequence-length=-3", "--sequence-length must be an integer >= 1, got -3"),
        ("--learning-rate=-1", "--learning-rate must lie in [0.0, inf), got -1.0"),
        ("--beta2=2", "--beta2 must lie in [0.0, 1.0), got 2.0"),
        ("--held-out-bytes=0", "--held-out-bytes must be an integer >= 1, got 0"),
        ("--prompt=", "--prompt must not be empty"),
        ("--seed=-1", "--seed must be at least 0, got -1"),
        ("--l2wrap=inf", "--l2wrap must be a finite number >= 0, got inf"),
        ("--from=x --preset=minipile-12x768", "--preset cannot be given with --from"),
        ("--mesh=data=x", "--mesh 'data=x': the size of 'data' must be an integer >= 1"),
        ("--mesh foo=2", "--mesh 'foo=2' has 'foo=2', but each part must be AXIS=SIZE"),
        ("--seed=4294967296", "--seed must lie in 0..2**32-1, got 4294967296"),
        (f"--seed={2**80}", f"--seed must lie in 0..2**32-1, got {2**80}"),
        ("--steps=3000000000", "--steps must be at most 2147483647, got 3000000000"),
        ("--vocab-size=0", "--vocab-size must be an integer >= 1, got 0"),
        ("--hidden-size=2147483584", "--hidden-size=2147483584 make 1.1e+20 parameters, more"),
        (
            "--batch-size=2147483647 --microbatches=2147483647",
            "--microbatches=2147483647, --sequence-length=128 make 5.9e+20 tokens of a step",
        ),
        (
            "--implementation=mosaic_gpu",
            "--implementation mosaic_gpu cannot run this training: mosaic_gpu needs a Hopper GPU",
        ),
        ("--tokenizer=", "--tokenizer must be a name or a path, got ''"),
        ("--field=foo", "--field 'foo' is for JSONL files and data sets, and "),
    ],
)
def test_a_wrong_setting(folder, tmp_path, capsys, argument, message):
    out = tmp_path / "runs"
    data = folder / "fox.txt"
    assert message in fails(
        capsys, "train", *argument.split(), f"--data={data}", f"--out={out}", "--no-plot"
    )
    assert not out.exists()


def test_a_file_where_runs_should_be(folder, capsys):
    file = folder / "fox.txt"
    assert f"--out {file}: {file} is a file" in fails(capsys, "train", f"--out={file}", "--no-plot")
    tokenize = ("tokenize", f"--data={file}", f"--out={file / 'tokens'}")
    assert f"--out {file / 'tokens'}: {file} is a file" in fails(capsys, *tokenize)


@pytest.mark.parametrize(
    ("file", "content", "stays"),
    [
        ("tokenizer.json", "{}", False),
        ("metrics.jsonl", '{"step": 0, "held_out_bits_per_byte": 8.0}\n', False),
        ("metrics.jsonl", '{"step": 1, "loss": 5.0}\n', True),
        ("checkpoints/00000001/metadata.json", "{}", True),
        ("non_finite/00000001.npz", "", True),
        ("notes.txt", "mine", True),
    ],
)
def test_a_run_that_fails_before_its_first_step_is_removed(tmp_path, file, content, stays):
    run = RunDirectory.create(tmp_path / "runs", "fox", {"steps": 3})
    with (  # noqa: PT012
        pytest.raises(MemoryError),
        run.lock(),
        removed_if_unused(run, ["tokenizer.json"]),
    ):
        (run.path / file).parent.mkdir(parents=True, exist_ok=True)
        (run.path / file).write_text(content)
        raise MemoryError
    assert run.path.exists() == stays
    assert (tmp_path / "runs").exists()


def test_a_run_that_is_interrupted_stays(tmp_path):
    run = RunDirectory.create(tmp_path, "fox", {"steps": 3})
    with pytest.raises(KeyboardInterrupt), removed_if_unused(run, []):
        raise KeyboardInterrupt
    assert run.settings_file.exists()


def test_what_cannot_be_parsed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--steps=many"])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_matplotlib_is_missing(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    err = fails(capsys, "train", f"--out={tmp_path / 'runs'}")
    assert "pip install 'goose-jax[plots]', or give --no-plot" in err
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def run(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_a_run_that_cannot_be_resumed(run, capsys):
    def resume(*arguments):
        return fails(capsys, "train", f"--resume={run}", *arguments)

    assert "keeps its settings; leave out --batch-size, --seed" in resume(
        "--batch-size=3", "--seed=9"
    )
    assert f"{run} has made all of its 8 steps" in resume()
    newest = run / "checkpoints" / "00000008"
    assert f"--steps=3 must be more than the 8 steps of {newest}" in resume("--steps=3")
    assert f"--steps=2 must be more than the 2 steps of warm-up in {run}\n" in resume("--steps=2")

    file = run / "settings.yaml"
    settings = file.read_text()
    file.write_text(settings + "unheard_of: 1\n")
    assert f"{file}: 'unheard_of' is unknown here" in resume()
    file.write_text(settings + "]")
    assert f"{file} is damaged" in resume()
    file.write_text(settings)

    shutil.rmtree(run / "checkpoints")
    assert f"{run} has no checkpoint" in resume()
    file.unlink()
    assert f"there is no training run at {run}" in resume()


def test_a_text_that_has_changed(run, folder, tmp_path, capsys):
    other = tmp_path / "fox.txt"
    other.write_text(TEXT + "more")
    err = fails(capsys, "train", f"--resume={run}", f"--data={other}")
    assert f"was trained on another text than is in {other} now" in err


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder that is the working directory; commands end before they train."""
    monkeypatch.setattr(
        "goose_jax.cli.train._train_in", lambda _run, _settings, prepared, _: prepared.close()
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_a_run_that_is_resumed_from_another_folder(run, finished, elsewhere):
    """Its tokens are those beside it, wherever it was begun and whatever its folder is called."""
    settings = yaml.safe_load((run / "settings.yaml").read_text()) | {"out": "runs"}
    (run / "settings.yaml").write_text(yaml.safe_dump(settings))
    shutil.copytree(finished[0].parent / ".tokens", run.parent / ".tokens")
    (kept,) = (run.parent / ".tokens").iterdir()
    before = (kept / "tokens.bin").stat().st_ino
    for name in (run, pathlib.Path("..", run.name)):
        main(["train", f"--resume={name}", "--steps=9"])
    os.chdir(run)
    main(["train", "--resume=.", "--steps=9"])
    os.chdir("checkpoints")
    main(["train", "--resume=..", "--steps=9"])
    assert list(elsewhere.iterdir()) == []
    assert [path.name for path in (run.parent / ".tokens").iterdir()] == [kept.name]
    assert (kept / "tokens.bin").stat().st_ino == before
    assert not (run / "runs").exists()
    assert yaml.safe_load((run / "settings.yaml").read_text()) == settings


@pytest.mark.slow
def test_recorded_settings_can_be_used_from_any_folder(tmp_path, elsewhere):
    """All paths are absolute in them, the tokenizer's, too, but for the folder of the runs."""
    (elsewhere / "fox.txt").write_text(TEXT)
    letters = sorted(set(TEXT))
    lines = "".join(f"{token} {letter!r} 1\n" for token, letter in enumerate(letters, start=1))
    (elsewhere / "letters.txt").write_text(lines)
    files = ["--data=fox.txt", "--held-out=fox.txt", "--tokenizer=letters.txt"]
    main(["train", *SMALL, *files])
    recorded = yaml.safe_load((elsewhere / "runs" / "fox-1" / "settings.yaml").read_text())
    assert recorded["data"] == recorded["held_out"] == str(elsewhere / "fox.txt")
    assert recorded["tokenizer"] == str(elsewhere / "letters.txt")
    os.chdir(tmp_path)
    main(["train", f"--config={elsewhere / 'runs' / 'fox-1' / 'settings.yaml'}"])
    again = yaml.safe_load((tmp_path / "runs" / "fox-1" / "settings.yaml").read_text())
    assert again == recorded


def test_the_time_that_is_left_is_told_without_compilation(capsys):
    """The bar begins at the first report, and its rate is that of the steps after it."""
    with Progress(10, on_closed_pipe=pytest.fail) as progress:
        for step in range(3, 6):
            seconds = 100.0 if step == 3 else 0.5  # the first step compiles
            progress.add(StepReport(step, 1.0, 1.0, 0.1, tokens=60, targets=30, seconds=seconds))
        bar = progress._bar
        assert (bar.n, bar.initial) == (5, 3)
        assert bar.format_dict["elapsed"] < 100
        assert "120 tokens/s" in bar.postfix
    capsys.readouterr()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(run, finished, capsys):
    """It is kept apart, and training arrives at the same parameters from the one before."""
    newest = run / "checkpoints" / "00000008"
    file = next(path for path in (newest / "optimizer").rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes()[:-1])
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "lo')  # a disk was full
    main(["train", f"--resume={run}"])
    printed = capsys.readouterr()
    assert f"warning: {newest} is damaged" in printed.err
    assert f"going on from {run / 'checkpoints' / '00000004'}" in printed.err
    assert f"later checkpoints and a copy of the metrics are in {run / 'set_aside' / '1'}" in (
        printed.out
    )
    assert {path.name for path in (run / "set_aside" / "1").iterdir()} == {
        *("00000008", "metrics.jsonl"),
    }
    assert losses_of(run) == losses_of(finished[0])
    chex.assert_trees_all_equal(params_of(run), params_of(finished[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "RUN", "--prompt=the", "--max-new-tokens=2"],
        ["chat", "RUN", "--max-new-tokens=2"],
        ["evaluate", "RUN", "fox.txt", "--batch-size=2", "--sequence-length=12"],
        ["convert", "RUN", "copy", "--layout=native"],
        ["inspect", "RUN"],
        ["train", "--from=RUN", "--data=fox.txt"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_passes_over_damaged_checkpoints(
    run, command, elsewhere, monkeypatch, capsys
):
    newest, older = run / "checkpoints" / "00000008", run / "checkpoints" / "00000004"
    (newest / "metadata.json").write_text("{}")
    (elsewhere / "fox.txt").write_text(TEXT)
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    command = [argument.replace("RUN", str(run)) for argument in command]
    main(command)
    err = capsys.readouterr().err
    warning = f"goose-jax: warning: {newest} is damaged: metadata.json is not what was written; "
    assert err.count(f"{warning}going on from {older}\n") == 1
    (older / "config.json").write_text("{}")
    shutil.rmtree("copy", ignore_errors=True)  # what convert has made
    line = fails(capsys, *command)
    assert f"all checkpoints of {run} are damaged: {newest} is damaged: metadata.json" in line
    assert f"; {older} is damaged: config.json is not what was written" in line


@pytest.mark.slow
@pytest.mark.parametrize("total", [6, 10])
def test_a_run_is_trained_to_another_end_and_from_any_checkpoint(run, finished, capsys, total):
    """From step 4 on, the run of 8 steps follows the schedule of a shorter or longer one."""
    older = run / "checkpoints" / "00000004"
    main(["train", f"--resume={older}", f"--steps={total}", "--save-every=1", "--keep=9"])
    rates = {line["step"]: line["learning_rate"] for line in lines_of(run) if "loss" in line}
    progress = (np.arange(4, total) - 2) / (total - 2)
    cosine = 2e-4 + (1e-2 - 2e-4) * (1 + np.cos(np.pi * progress)) / 2
    np.testing.assert_allclose([rates[step] for step in range(5, total + 1)], cosine, rtol=1e-5)
    assert list(rates) == list(range(1, total + 1))
    assert [rates[step] for step in range(1, 5)] == [
        line["learning_rate"] for line in lines_of(finished[0]) if "loss" in line
    ][:4]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"{step:08d}" for step in range(4, total + 1)]
    assert (run / "set_aside" / "1" / "00000008").is_dir()
    assert yaml.safe_load((run / "settings.yaml").read_text())["steps"] == total
    capsys.readouterr()
    assert f"{run} has made all of its {total} steps" in fails(capsys, "train", f"--resume={run}")
    shutil.rmtree(older / "params")
    assert f"{older} is damaged" in fails(capsys, "train", f"--resume={older}")


def test_two_processes_do_not_train_in_one_folder(run, capsys):
    with RunDirectory(run).lock():
        assert f"{run} is in use by process {os.getpid()} on" in fails(
            capsys, "train", f"--resume={run}", "--steps=9"
        )
    with RunDirectory(run).lock():
        pass


def test_other_held_out_text_is_noticed(run, capsys):
    """Its bytes are given by the settings, so only a change of the text or the code can do it."""
    file = run / "checkpoints" / "00000008" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata["extra"]["held_out_text"] = "0" * 64
    file.write_text(json.dumps(metadata))
    checksums = file.with_name("checksums.json")
    sums = json.loads(checksums.read_text())
    data = file.read_bytes()
    sums["metadata.json"] = [len(data), zlib.crc32(data)]
    checksums.write_text(json.dumps(sums))
    err = fails(capsys, "train", f"--resume={run}", "--steps=9")
    assert f"{run} cannot be resumed: the held-out text is not the one it measured before" in err


def raise_bug(arguments):
    return {}[arguments]


def raise_in_a_library(arguments):
    return np.zeros(3).reshape(2)


@pytest.mark.parametrize(("bug", "kind"), [(raise_bug, KeyError), (raise_in_a_library, ValueError)])
def test_a_bug_keeps_its_traceback(monkeypatch, bug, kind):
    monkeypatch.setattr(command, "train", lambda _: bug("x"))
    with pytest.raises(kind):
        main(["train"])


def test_ctrl_c_outside_of_training(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "goose-jax: interrupted\n"
