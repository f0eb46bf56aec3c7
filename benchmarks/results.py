"""Files of measurements: the benchmarks write them, tables and figures are made from them.

The benchmarks of these tables take `--json FILE`. `FILE` belongs into `benchmarks/results`; `python
benchmarks/publish.py` then brings the tables of the pages and the figures up to date. A file holds

    date       day of the measurement, or of the commit that wrote it down
    hardware   the device in words
    versions   of jax, CUDA and Python; of the peers, where there are any
    commit     that was measured, with "+ changes" if files differed from it
    command    which repeats the measurement
    note       how it was measured, where the command does not say it; may be missing
    rows       objects of names and values; the name says the unit. A row of another day has a date
               and a commit of its own. Rows of lists have what was `tried`, its `result`, in
               words, and the `hardware`

What is not known is "not recorded". The environment variable `MEASURED_COMMIT` names the commit of
files that are without their repository.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().with_name("results")
NOT_RECORDED = "not recorded"
_PEERS = {
    "torch": "torch",
    "triton": "triton",
    "fla": "flash-linear-attention",
    "jla": "jax-linear-attention",
}

type Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Results:
    """The contents of a file; see the module for its fields."""

    date: str
    hardware: str
    versions: dict[str, str]
    commit: str
    command: str
    rows: list[Row]
    note: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for an empty field."""
        for name in ("date", "hardware", "versions", "commit", "command", "rows"):
            if not getattr(self, name):
                raise ValueError(f"{name} of a file of measurements is empty")
        if self.date != NOT_RECORDED:
            datetime.date.fromisoformat(self.date)


def read_results(name: str) -> Results:
    """Returns the file of a name in `benchmarks/results`, without `.json`.

    Raises:
      ValueError: the file lacks a field or has one that is not known.
    """
    return load_results(FOLDER / f"{name}.json")


def load_results(path: pathlib.Path) -> Results:
    """Returns the file at a path.

    Raises:
      ValueError: the file lacks a field or has one that is not known.
    """
    try:
        return Results(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def write_results(
    path: pathlib.Path | None, rows: Sequence[Row], revisions: Mapping[str, str] | None = None
) -> None:
    """Writes what a benchmark measured in this process, unless `path` is None.

    Rows are added to those of the file if all else is the same (day, hardware, versions, commit),
    and the file does not have this command yet. Otherwise the file is written anew.

    Args:
      path: of the file, which may exist.
      rows: what was measured.
      revisions: of checkouts of others.
    """
    if path is None:
        return
    arguments = [x for x in sys.argv[1:] if x not in ("--json", str(path), f"--json={path}")]
    script = pathlib.Path(sys.argv[0]).name
    results = Results(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        hardware=_hardware(),
        versions=_versions() | dict(revisions or {}),
        commit=_commit(),
        command=shlex.join(["python", f"benchmarks/{script}", *arguments]),
        rows=[*rows],
    )
    if path.exists():
        old = load_results(path)
        same = ("date", "hardware", "versions", "commit")
        alike = all(getattr(old, name) == getattr(results, name) for name in same)
        if alike and results.command not in old.command.split("; "):
            results = dataclasses.replace(
                results,
                rows=[*old.rows, *rows],
                command=f"{old.command}; {results.command}",
                note=old.note,
            )
    save_results(path, results)


def revisions(sources: pathlib.Path | None, names: Sequence[str]) -> dict[str, str]:
    """Returns the commits of the checkouts of these names in a folder."""
    folders = {name: sources / name for name in names} if sources else {}
    found = {name: path for name, path in folders.items() if path.exists()}
    return {name: _git(path, "rev-parse", "HEAD") or NOT_RECORDED for name, path in found.items()}


def save_results(path: pathlib.Path, results: Results) -> None:
    """Writes a file, a line for each row."""
    fields = dataclasses.asdict(results)
    rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in fields.pop("rows"))
    head = {name: value for name, value in fields.items() if value}
    text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{text},\n  "rows": [\n{rows}\n  ]\n}}\n', encoding="utf-8")


def _hardware() -> str:
    import jax

    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return f"CPU, {len(names) or 'unknown number of'} cores of {(names or ['unknown kind'])[0]}"


def _versions() -> dict[str, str]:
    import jax
    import jaxlib

    versions = {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }
    for module, package in _PEERS.items():
        if module in sys.modules:
            versions[module] = importlib.metadata.version(package)
    if jax.default_backend() == "gpu":
        runtime = jax.extend.backend.get_backend().platform_version
        versions["platform"] = " ".join(runtime.split())
    return versions


def _commit() -> str:
    if given := os.environ.get("MEASURED_COMMIT"):
        return given
    commit = _git(FOLDER, "rev-parse", "HEAD")
    if not commit:
        return NOT_RECORDED
    return f"{commit} + changes" if _git(FOLDER, "status", "--porcelain", "-uno") else commit


def _git(folder: pathlib.Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else ""
