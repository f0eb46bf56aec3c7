"""Measures the memory that reading official checkpoints takes, on Linux and a CPU.

    python benchmarks/checkpoint_memory.py                  # 16 GB of memory, 15 GB of disk
    python benchmarks/checkpoint_memory.py --models 0.4B 1.5B

The files are synthetic: bfloat16 ones, in the shapes of the official models. Each is read in a
process of its own, which has read a tiny file before. Numbers are in addition to what it used
then: anonymous memory (RssAnon of /proc/self/status, sampled every 20 ms), and all memory, with
mapped pages of the file (VmHWM).
"""

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
import tyro
from flax import nnx
from results import Row, write_results

from goose_jax import RWKV7Config, load_pretrained, save_pretrained
from goose_jax.checkpoints.key_map import axis_sizes
from goose_jax.checkpoints.layouts import OFFICIAL
from goose_jax.checkpoints.pth_writer import write_pth

PROCESS = pathlib.Path("/proc/self")
CASES = (
    ("0.4B", ".pth", None),
    ("0.4B", ".pth", "float32"),
    ("0.4B", "folder", None),
    ("0.4B", "folder", "float32"),
    ("1.5B", ".pth", None),
    ("7.2B", ".pth", None),
)
"""Preset, kind of file, and `dtype`."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      models: presets of `CASES`.
      scratch: folder for the files, which are removed again; None takes that of the system.
      json: file to write the rows to, in the format of `results.py`.
    """

    models: tuple[str, ...] = ("0.4B", "1.5B", "7.2B")
    scratch: pathlib.Path | None = None
    json: pathlib.Path | None = None


def tensors(config: RWKV7Config) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors that a release has, by official names."""
    sizes = axis_sizes(config)
    for entry in OFFICIAL.entries:
        for i, name in enumerate(entry.names(config.num_layers)):
            if i or not entry.is_optional:
                yield name, np.ones(entry.stored_shape(sizes), "bfloat16")


def memory(field: str) -> float:
    """Returns a field of Linux's account of this process, in MiB."""
    lines = (PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024


def measure(tiny: pathlib.Path, path: pathlib.Path, dtype: str | None) -> dict[str, int]:
    """Reads a file and returns the MiB of its parameters and of the peaks."""
    load_pretrained(tiny)  # what is loaded once
    (PROCESS / "clear_refs").write_text("5", encoding="utf-8")  # begins VmHWM anew
    before, all_before = memory("RssAnon"), memory("VmRSS")
    anonymous = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(load_pretrained, path, dtype=dtype)
        while concurrent.futures.wait([reading], 0.02).not_done:
            anonymous.append(memory("RssAnon"))
    model, _ = reading.result()
    anonymous.append(memory("RssAnon"))
    parameters = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return {
        "parameters_mib": round(parameters / 2**20),
        "anonymous_mib": round(max(anonymous) - before),
        "mapped_mib": round(memory("VmHWM") - all_before),
    }


def measure_case(folder: pathlib.Path, model: str, kind: str, dtype: str | None) -> Row:
    """Writes a file into an empty folder, and measures in a new process how it is read."""
    tiny, path = folder / "tiny.pth", folder / "model.pth"
    write_pth(tiny, tensors(RWKV7Config(vocab_size=257, hidden_size=64, num_layers=2)))
    write_pth(path, tensors(RWKV7Config.preset(model)))
    if kind == "folder":
        path = folder / "model"
        save_pretrained(load_pretrained(folder / "model.pth")[0], path, "huggingface")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        found = pool.submit(measure, tiny, path, dtype).result()
    described = f"{model} {kind}" if kind == "folder" else f"{model} `{kind}`"
    return {"model": described + (f', `dtype="{dtype}"`' if dtype else "")} | found


def main(settings: Settings) -> None:
    rows = []
    print("| model | parameters, MiB | anonymous, MiB | with mapped pages, MiB |")
    print("| --- | --- | --- | --- |")
    for model, kind, dtype in CASES:
        if model in settings.models:
            with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
                row = measure_case(pathlib.Path(folder), model, kind, dtype)
            print("|", " | ".join(map(str, row.values())), "|", flush=True)
            rows.append(row)
    write_results(settings.json, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
