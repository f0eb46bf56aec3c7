"""Runs that are killed, that meet a full disk, or whose terminal is closed."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import pytest

from goose_jax.checkpoints import load_checkpoint
from goose_jax.cli.main import main
from goose_jax.training import RunDirectory
from tests.goose_jax import child_process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("module_quick_to_compile", "module_compilation_cache"),
]

ROOT = pathlib.Path(__file__).parents[2]
SMALL = [
    *("--num-layers=1", "--hidden-size=32", "--head-size=16", "--batch-size=4"),
    *("--sequence-length=12", "--steps=48", "--warmup-steps=2", "--learning-rate=1e-2"),
    *("--log-every=1", "--save-every=3", "--evaluate-every=24", "--held-out-bytes=64"),
    *("--sample-length=0", "--no-plot", "--no-tensorboard", "--keep=3"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "fox.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return file


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished")
    main(["train", *SMALL, f"--data={text}", f"--out={out}"])
    return out / "fox-1"


def saved(run):
    """Everything in the newest checkpoint but the time: arrays, and what describes them."""
    path = RunDirectory(run).newest_checkpoint
    model, metadata = load_checkpoint(path)
    names = ("params", "optimizer")
    arrays = {name: load_arrays(path / name) for name in names}
    return arrays, metadata, model.config


def load_arrays(path):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return jax.tree.leaves(checkpointer.restore(path))


def losses(run):
    lines = RunDirectory(run).metrics()
    return [(line["step"], line["loss"], line["tokens"]) for line in lines if "loss" in line]


def steps_made(run):
    lines = list(RunDirectory(run).metrics())
    return lines[-1]["step"] if lines else 0


def test_a_run_that_is_killed_ten_times(finished, text, tmp_path, module_compilation_cache):
    """At any moment of the start, of a step or of a checkpoint. No batch is made twice or lost.

    Batches are made ahead, by threads or by a process, and checkpoints are written by a thread.
    """
    moments = random.Random(0)
    run = tmp_path / "fox-1"
    start = ["train", *SMALL, f"--data={text}", f"--out={tmp_path}"]
    output = tmp_path / "output"
    ended_at: list[int] = []
    while len(ended_at) < 10:
        is_new = not run.exists()
        before = 0 if is_new else max(step for step, *_ in losses(run))
        # Half of them make batches in a process, also one that is killed while it starts.
        workers = f"--data-workers={int(len(ended_at) in (1, 3, 4, 5, 9))}"
        process = child_process.start(
            [*(start if is_new else ["train", f"--resume={run}"]), workers],
            output=output,
            cache=module_compilation_cache,
            last_step=45,  # however slowly this test sees how far it is
        )
        # Most are killed after some steps, at any moment then; some while they start.
        later = 8 if is_new else moments.randrange(1, 5) if len(ended_at) % 4 else 0
        while process.is_alive() and later and steps_made(run) < min(before + later, 45):
            time.sleep(0.002)
        process.join(timeout=moments.uniform(0, 0.2 if later else 1.0))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, output.read_text()
        ended_at.append(int(RunDirectory(run).newest_checkpoint.name))
    assert ended_at == sorted(ended_at)
    assert len(set(ended_at)) > 2
    main(["train", f"--resume={run}"])
    arrays, metadata, config = saved(run)
    expected_arrays, expected_metadata, expected_config = saved(finished)
    chex.assert_trees_all_equal(arrays, expected_arrays)
    assert (metadata, config) == (expected_metadata, expected_config)
    assert losses(run) == losses(finished)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == sorted(path.name for path in (finished / "checkpoints").iterdir())


def test_a_full_disk(finished, tmp_path, module_compilation_cache):
    """One line says it. Nothing half-written is left, and the run goes on when there is space."""
    run = pathlib.Path(shutil.copytree(finished, tmp_path / "run"))
    for path in RunDirectory(run).checkpoints[1:]:
        shutil.rmtree(path)
    (kept,) = RunDirectory(run).checkpoints
    before = saved(run)
    output = tmp_path / "output"
    process = child_process.start(
        ["train", f"--resume={run}", "--steps=52"],
        output=output,
        cache=module_compilation_cache,
        file_limit=100_000,
    )
    process.join()
    assert process.exitcode == 2
    printed = output.read_text()
    assert "Traceback" not in printed
    failed = run / "checkpoints" / f"{int(kept.name) + 3:08d}"
    assert f"goose-jax: error: could not save the checkpoint {failed}" in printed
    assert [path.name for path in (run / "checkpoints").iterdir()] == [kept.name]
    chex.assert_trees_all_equal(saved(run)[0], before[0])
    main(["train", f"--resume={run}", "--steps=48"])
    chex.assert_trees_all_equal(saved(run)[0], saved(finished)[0])


def test_a_closed_pipe_saves(text, tmp_path, module_compilation_cache):
    """As after `goose-jax train 2>&1 | head`."""
    arguments = [*SMALL, "--steps=100000", "--save-every=100000", "--evaluate-every=100000"]
    pipe, run = tmp_path / "pipe", tmp_path / "fox-1"
    os.mkfifo(pipe)
    process = child_process.start(
        ["train", *arguments, f"--data={text}", f"--out={tmp_path}"],
        output=pipe,
        cache=module_compilation_cache,
    )
    with pipe.open("rb", buffering=0) as printed:
        while steps_made(run) < 4:
            printed.read(64)
    process.join(timeout=120)
    assert process.exitcode == 141
    made = int(RunDirectory(run).newest_checkpoint.name)
    assert 4 <= made < 100000
    main(["train", f"--resume={run}", f"--steps={made + 2}"])
    assert int(RunDirectory(run).newest_checkpoint.name) == made + 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    number, status, text, tmp_path, module_compilation_cache
):
    arguments = [*SMALL, "--steps=100000", "--save-every=100000", "--evaluate-every=100000"]
    output, run = tmp_path / "output", tmp_path / "fox-1"
    process = child_process.start(
        ["train", *arguments, f"--data={text}", f"--out={tmp_path}"],
        output=output,
        cache=module_compilation_cache,
    )
    while process.is_alive() and steps_made(run) < 4:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(timeout=120)
    printed = output.read_text()
    assert process.exitcode == status, printed
    assert "Traceback" not in printed
    assert "finishing the steps under way" in printed
    step = steps_made(run)
    assert f"stopped after step {step}; to go on from there:\n" in printed
    assert f"goose-jax train --resume {run}" in printed
    assert load_checkpoint(run)[1].step == step


@pytest.fixture
def heeded_hangup():
    """Programs heed SIGHUP, also where the tests run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeded_hangup")
def test_a_closed_terminal(text, tmp_path, module_compilation_cache):
    """SIGHUP saves, although writing to the terminal is an error from then on."""
    arguments = [*SMALL, "--steps=100000", "--save-every=100000", "--evaluate-every=100000"]
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "goose_jax", "train", *arguments, f"--data={text}",
         f"--out={tmp_path}"],
        cwd=ROOT, stdout=theirs, stderr=theirs,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR":
                          module_compilation_cache},
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    metrics = tmp_path / "fox-1" / "metrics.jsonl"
    shown = b""
    deadline = time.monotonic() + 300
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert time.monotonic() < deadline
            assert process.poll() is None, shown
            try:
                shown += os.read(ours, 10_000)
            except BlockingIOError:
                time.sleep(0.05)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 129
    finally:
        process.kill()
        process.wait()
    step = max(step for step, *_ in losses(tmp_path / "fox-1"))
    assert load_checkpoint(tmp_path / "fox-1")[1].step == step
