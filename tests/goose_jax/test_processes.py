"""Two processes of 4 devices each on loopback train as one process of 8 devices does."""

import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from goose_jax.checkpoints import load_checkpoint
from goose_jax.parallel.processes import LostProcessError, start_processes
from tests.goose_jax.random_parameters import flat_params

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = (
    *("--num-layers", "1", "--hidden-size", "32", "--head-size", "8", "--held-out-bytes", "300"),
    *("--batch-size", "8", "--sequence-length", "16", "--evaluate-every", "4", "--log-every", "1"),
    *("--save-every", "2", "--no-plot", "--sample-length", "0", "--no-tensorboard"),
    *("--compute-dtype", "float32", "--mesh", "data=4,fsdp=2"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text(" ".join(f"{n:03d}" for n in rng.integers(0, 999, 2000)))
    return folder


def start(folder, devices, *arguments, killed=False):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "KILLED": "yes" if killed else "no",
    }
    command = [sys.executable, "-m", "tests.goose_jax.train_process", "train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


def free_port():
    """A port that nobody listens on. The system gives none of these to clients meanwhile."""
    ports = random.SystemRandom().sample(range(20_000, 30_000), 100)
    for port in ports:
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
    raise AssertionError("100 ports are in use")


def start_two(folder, *arguments, kill=None):
    coordinator = f"127.0.0.1:{free_port()}"
    flags = ("--coordinator", coordinator, "--num-processes", "2", "--process-id")
    return [
        start(folder, 4, *arguments, *flags, str(number), killed=number == kill)
        for number in range(2)
    ]


def new_run(folder, name, steps="6"):
    text = ("--data", str(folder / "text.txt"), "--out", str(folder / name), "--steps", steps)
    return (*text, *SETTINGS)


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "gradient_norm", "held_out_bits_per_byte")
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


def parameters(checkpoint):
    model, _ = load_checkpoint(checkpoint)
    return flat_params(model)


@pytest.fixture(scope="module")
def of_two(folder):
    """The folder of a run of two processes, and what they printed."""
    outputs = [finish(process) for process in start_two(folder, *new_run(folder, "two"))]
    return folder / "two" / "text-1", outputs


@pytest.mark.slow
def test_two_processes_train_as_one_and_the_first_one_speaks(folder, of_two):
    run, (first, second) = of_two
    finish(start(folder, 8, *new_run(folder, "one")))
    found, expected = metrics(run), metrics(folder / "one" / "text-1")
    assert len(found) == 2 * 6 + 3  # losses and norms, and held-out text at 0, 4 and 6
    assert found == pytest.approx(expected, rel=1e-5)
    assert "mesh data=4 x fsdp=2" in first
    assert "8 x cpu (cpu) of 2 processes" in first
    assert "held out" not in second


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one_on_another_mesh(folder, of_two):
    run, _ = of_two
    out = finish(start(folder, 8, "--resume", str(run), "--steps", "7", "--mesh", "tensor=4"))
    assert "mesh data=2 x tensor=4" in out
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-1] == "00000007"


@pytest.mark.slow
def test_a_process_killed_while_saving_ends_the_other_and_loses_nothing(folder, of_two):
    complete = parameters(of_two[0] / "checkpoints" / "00000006")
    survivor, victim = start_two(folder, *new_run(folder, "killed"), kill=1)
    victim.communicate(timeout=300)
    assert victim.returncode == -signal.SIGKILL
    _, error = survivor.communicate(timeout=300)  # it ends by itself
    assert survivor.returncode != 0
    # Which of the two comes first, the error of Python or that of JAX's runtime, is open.
    assert "another process of this run was lost" in error or "another task died" in error

    run = folder / "killed" / "text-1"
    assert [path.name for path in run.glob("checkpoints/[0-9]*")] == ["00000002"]
    for process in start_two(folder, "--resume", str(run)):
        finish(process)
    resumed = parameters(run / "checkpoints" / "00000006")
    assert resumed.keys() == complete.keys()
    for name, value in complete.items():
        assert resumed[name].tobytes() == value.tobytes(), name


def test_wrong_processes_are_named():
    with pytest.raises(ValueError, match="coordinator must be HOST:PORT, got 'host'"):
        start_processes(coordinator="host", num_processes=2, process_id=0)
    with pytest.raises(ValueError, match=r"process_id must be in 0..1, got 2"):
        start_processes(coordinator="host:1", num_processes=2, process_id=2)
    assert issubclass(LostProcessError, OSError)
