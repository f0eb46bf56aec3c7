"""The metrics of a run, and the files that others read."""

import importlib.util
import resource
import struct
import time

import jax
import pytest
from flax import nnx

from goose_jax import RWKV7Config
from goose_jax.nn import abstract_model
from goose_jax.training import StepReport, TensorBoardWriter, WandbWriter
from goose_jax.training.metrics import summarise
from goose_jax.training.throughput import flops_per_token, peak_flops


def report(step, loss, targets, seconds, norm=2.0):
    return StepReport(
        step=step,
        loss=loss,
        gradient_norm=norm,
        learning_rate=step / 10,
        tokens=50,
        targets=targets,
        seconds=seconds,
    )


def test_means_weigh_targets_and_leave_out_what_is_not_finite():
    nan = float("nan")
    steps = [
        *(report(4, 1.0, 10, 0.5), report(5, 4.0, 20, 1.0, norm=5.0)),
        *(report(6, nan, 30, 0.5), report(7, 1.0, 40, 1.0, norm=float("inf"))),
    ]
    values = summarise(steps, bytes_per_token=2.0, flops_per_token=6e3, peak_flops=1e6)
    assert values == pytest.approx(
        {
            "step": 7,
            "loss": 3.0,  # (10 + 80) / 30
            "bits_per_byte": 3.0 * 1.4426950408889634 / 2,
            "gradient_norm": 3.5,
            "learning_rate": 0.7,
            "tokens": 200,
            "targets": 100,
            "seconds": 3.0,
            "tokens_per_second": 67,
            "mfu": 200 / 3 * 6e3 / 1e6,
            "skipped": 2,
        }
    )
    only = summarise(steps[2:], bytes_per_token=2.0, flops_per_token=6e3)
    assert only.keys() == {
        *("step", "learning_rate", "tokens", "targets", "seconds", "tokens_per_second"),
        "skipped",
    }


def test_operations_are_those_of_the_matrices():
    """6 for each entry of a matrix that a token is multiplied with, and 27 for one of the state."""
    config = RWKV7Config(vocab_size=65536, hidden_size=768, num_layers=12)
    params = nnx.to_pure_dict(nnx.state(abstract_model(config), nnx.Param))
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    matrices = {
        name: leaf.size
        for name, leaf in leaves.items()
        if leaf.ndim == 3 and min(leaf.shape[1:]) > 16 and name != "blocks.time_mix.bonus"
    }
    unused = 2 * 768 * 32  # of the value residual of the first layer
    used = sum(matrices.values()) - unused + leaves["head"].size
    state = 12 * 12 * 64 * 64
    assert flops_per_token(config) == 6 * used + 27 * state
    assert flops_per_token(config, all_trained=False) == 4 * used + 27 * state
    assert used == pytest.approx(191e6 - 50.3e6, rel=0.01)  # all parameters, less the embedding


def test_peaks_of_devices():
    class Device:
        def __init__(self, device_kind):
            self.device_kind = device_kind

    assert peak_flops(Device("NVIDIA H100 80GB HBM3"), "bfloat16") == 989.4e12
    assert peak_flops(Device("NVIDIA H100 PCIe"), "bfloat16") == 756e12
    assert peak_flops(Device("NVIDIA H100 NVL"), "bfloat16") == 835.5e12
    assert peak_flops(Device("NVIDIA L4"), "bfloat16") == 121e12
    for other in ("NVIDIA L40", "NVIDIA GB200", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert peak_flops(Device(other), "bfloat16") is None
    assert peak_flops(Device("NVIDIA H100 80GB HBM3"), "float32") is None
    assert peak_flops(jax.devices("cpu")[0], "bfloat16") is None


def events_in(folder):
    """The events in event files: records of length, checksum, message, checksum (TFRecord)."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4


def read_events(folder):
    """The scalars of event files."""
    return {
        (value.tag, event.step): value.simple_value
        for event in events_in(folder)
        for value in event.summary.value
    }


def test_tensorboard_gets_the_values(tmp_path):
    writer = TensorBoardWriter(tmp_path / "tensorboard")
    writer.write(10, {"loss": 2.5, "tokens": 80})
    writer.write(20, {"loss": 1.25})
    writer.close()
    assert read_events(tmp_path / "tensorboard") == {
        ("loss", 10): 2.5,
        ("tokens", 10): 80.0,
        ("loss", 20): 1.25,
    }


def test_tensorboard_hides_what_a_resumed_run_makes_again(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    TensorBoardWriter(tmp_path, first_step=20).close()
    (_, start) = events_in(tmp_path)
    assert (start.step, start.session_log.status) == (21, SessionLog.START)


def test_tensorboard_tells_of_a_full_disk(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))  # SIGXFSZ is ignored in Python
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}'"):
            [writer.write(step, {"loss": 1.0}) for step in range(1000)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    writer.close()
    assert 0 < len(read_events(tmp_path)) < 1000


def read_records(file):
    """The records of a file of wandb: the format of LevelDB's logs, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no header fits into the rest of a block
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def read_finished(file):
    """The records of a run that has ended. wandb's process may still write the last ones."""
    deadline = time.monotonic() + 300
    while True:
        records = list(read_records(file))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_weights_and_biases_gets_the_values(tmp_path, monkeypatch):
    """Also of a step before the last one, as after resuming. A resumed run keeps its identity."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "fox-1"
    folder.mkdir()
    for steps in ((10, 20), (15,)):
        writer = WandbWriter("geese", folder, {"seed": 3})
        for step in steps:
            writer.write(step, {"loss": step / 8})
        writer.close()
        time.sleep(1)  # wandb names files by the second
    files = sorted(folder.rglob("offline-run-*/*.wandb"))
    records = [record for file in files for record in read_finished(file)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.display_name, run.project) for run in runs} == {
        ((folder / "wandb-id").read_text().strip(), "fox-1", "geese"),
    }
    assert {"seed": "3"}.items() <= {c.key: c.value_json for c in runs[0].config.update}.items()
    lines = [
        {item.nested_key[0]: float(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 1.25), (20, 2.5), (15, 1.875)]


@pytest.mark.slow
def test_what_wandb_refuses_is_an_error_that_names_the_flag(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"--wandb geese: No API key configured\."):
        WandbWriter("geese", tmp_path, {})
    assert not (tmp_path / "wandb-id").exists()


def test_wandb_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--wandb needs wandb: pip install 'goose-jax\[wandb\]'"):
        WandbWriter("geese", tmp_path, {})
