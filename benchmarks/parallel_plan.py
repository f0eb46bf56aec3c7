"""Plans a training step for many H100s on a machine that has none, and forecasts its time.

    pip install "jax[cuda13]"                 # in an environment that need not see a GPU
    python benchmarks/parallel_plan.py --num-layers 24 --hidden-size 1024 --rows-per-device 8 \
        --mesh data=8 --mesh fsdp=8 --mesh data=8,fsdp=8

XLA compiles the program for the devices of a topology. From the compiled program this reads the
memory that is planned for each GPU, and every collective: its kind, the bytes that each GPU sends,
and whether they stay in one host. A collective in a loop counts once for each turn of the loop.

The forecast is the time that the bytes need at the rate of the links, as if nothing overlapped: 450
GB/s in each direction over NVLink 4 inside a host of 8 GPUs, 50 GB/s (400 Gb/s) for each GPU
between hosts. It leaves out latencies.
"""

import collections
import dataclasses
import os
import pathlib
import re
import time
from typing import Annotated, Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver whose version to check

import jax
import numpy as np
import tyro
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from results import Row, write_results

from goose_jax import RWKV7, RWKV7Config
from goose_jax.data import next_token_batch
from goose_jax.parallel import batch_spec, make_mesh, parse_mesh, tree_shardings
from goose_jax.training import OptimizerConfig, init_train_state, make_train_step

NVLINK, INFINIBAND = 450e9, 50e9  # bytes per second and GPU, in each direction
GPUS_PER_HOST = 8

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  device_memory_size: 80000000000 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The step to plan.

    Attributes:
      mesh: meshes to plan for, such as data=2,fsdp=4; may be given several times.
      num_layers: number of layers.
      hidden_size: channels of the residual stream.
      vocab_size: size of the vocabulary.
      rows_per_device: rows for each device of the axes data and fsdp.
      sequence_length: tokens of a row, on all devices of the axis context together.
      remat: what the backward computes again.
      implementation: implementation of the operators.
      list_collectives: print every collective, too.
      json: file to write the rows to, in the format of `results.py`.
    """

    mesh: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    num_layers: int = 24
    hidden_size: int = 1024
    vocab_size: int = 65536
    rows_per_device: int = 8
    sequence_length: int = 4096
    remat: str = "dots"
    implementation: str | None = None
    list_collectives: bool = False
    json: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the compiled program.

    Attributes:
      kind: such as "all-gather".
      shape: its result, such as "bf16[1024,1024]".
      sent: bytes that each GPU sends each time.
      times: how often it runs in a step.
      across_hosts: whether some of its groups span hosts.
    """

    kind: str
    shape: str
    sent: float
    times: int
    across_hosts: bool

    @property
    def seconds(self) -> float:
        """The time that the bytes of all runs need at the rate of the links."""
        return self.times * self.sent / (INFINIBAND if self.across_hosts else NVLINK)


def devices_of_h100s(count: int) -> list[Any]:
    """Returns descriptions of GPUs in hosts of 8."""
    hosts, in_host = (
        (1, count) if count <= GPUS_PER_HOST else (count // GPUS_PER_HOST, GPUS_PER_HOST)
    )
    return topologies.get_topology_desc(
        topology_name="h100", platform="cuda", topology=f"1x{hosts}x{in_host}", target_config=_H100
    ).devices


def compile_step(settings: Settings, sizes: dict[str, int]) -> tuple[Any, float]:
    """Returns the compiled step, and the seconds it took to compile."""
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(**({"data": 1} | sizes), devices=devices_of_h100s(count))
    config = RWKV7Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        compute_dtype="bfloat16",
        remat=settings.remat,
        implementation=settings.implementation,
    )
    recipe = OptimizerConfig(total_steps=1000)
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(lambda: init_train_state(RWKV7(config, rngs=nnx.Rngs(0)), recipe))
    rows = settings.rows_per_device * mesh.shape["data"] * mesh.shape["fsdp"]
    batch = next_token_batch(np.zeros((rows, settings.sequence_length + 1), np.int32))

    def with_sharding(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    state = jax.tree.map(with_sharding, state, tree_shardings(state, mesh))
    divided = NamedSharding(mesh, batch_spec(2))
    batch = jax.tree.map(lambda array: with_sharding(array, divided), batch)
    start = time.perf_counter()
    traced = make_train_step(model, recipe, mesh=mesh).trace(state, batch)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile(
        compiler_options={"xla_gpu_autotune_level": 0, "xla_gpu_enable_command_buffer": ""}
    )
    return compiled, time.perf_counter() - start


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a program in HLO."""
    text = re.sub(r"/\*.*?\*/", "", text)
    runs = _runs_of_computations(text)
    found = []
    pattern = rf"= ([^=\n]*?) ({'|'.join(_KINDS)})(-start)?\((.*)$"
    for name, body in _computations(text):
        for shape, kind, started, rest in re.findall(pattern, body, flags=re.MULTILINE):
            parts = re.findall(r"(\w+)\[([\d,]*)\]", shape)
            if started:  # it returns its operands, its results and for one kind two numbers
                parts = parts[1:2] if kind == "collective-permute" else parts[len(parts) // 2 :]
            groups = _groups(rest)
            size = len(groups[0])
            if size == 1:
                continue
            total = sum(
                _BYTES.get(t, 1) * int(np.prod([int(n) for n in d.split(",") if n]))
                for t, d in parts
            )
            factor = {
                "all-gather": (size - 1) / size,  # of the result
                "all-reduce": 2 * (size - 1) / size,
                "reduce-scatter": size - 1,  # of the result
                "all-to-all": (size - 1) / size,
                "collective-permute": 1,
            }[kind]
            label = " ".join(f"{t}[{d}]" for t, d in parts[:3]) + (" ..." if len(parts) > 3 else "")
            across = any(len({i // GPUS_PER_HOST for i in group}) > 1 for group in groups)
            found.append(Collective(kind, label, factor * total, runs.get(name, 1), across))
    return found


def _computations(text: str) -> list[tuple[str, str]]:
    found = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, flags=re.M | re.S)
    return [(name, body) for name, body in found]


def _runs_of_computations(text: str) -> dict[str, int]:
    """Returns how often each computation runs, by the known trip counts of loops."""
    callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for name, body in _computations(text):
        for line in body.splitlines():
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            turns = int(trips[1]) if trips else 1
            for called in re.findall(r"(?:body|calls|to_apply|condition)=%?([\w.\-]+)", line):
                callers[called].append((name, turns))

    def runs(name: str) -> int:
        of_callers = callers.get(name)
        return max(turns * runs(caller) for caller, turns in of_callers) if of_callers else 1

    return {name: runs(name) for name, _ in _computations(text)}


def _groups(line: str) -> list[list[int]]:
    """Returns the groups of devices of a collective, in any of the notations of HLO."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        names, axes = list(sizes), re.findall(r"'(\w+)'", named[2])
        ids = np.arange(np.prod([int(n) for n in sizes.values()]))
        ids = ids.reshape([int(n) for n in sizes.values()])
        last = [names.index(axis) for axis in axes]
        first = [i for i in range(len(names)) if i not in last]
        members = int(np.prod([ids.shape[i] for i in last]))
        return ids.transpose(first + last).reshape(-1, members).tolist()
    if iota is None:
        raise ValueError(f"no groups of devices in {line[:200]!r}")
    shape, dims, order = ([int(n) for n in (part or "").split(",") if n] for part in iota.groups())
    ids = np.arange(np.prod(dims)).reshape(dims)
    return (ids.transpose(order) if order else ids).reshape(shape).tolist()


def report(settings: Settings, text_of_mesh: str) -> Row:
    """Prints a line of the table for one mesh, and returns its row."""
    sizes = parse_mesh(text_of_mesh)
    compiled, seconds = compile_step(settings, sizes)
    plan, found = compiled.memory_analysis(), collectives(compiled.as_text())
    gib = (plan.argument_size_in_bytes + plan.temp_size_in_bytes) / 2**30
    moved = collections.Counter()
    for collective in found:
        moved[collective.kind] += collective.times * collective.sent
    cells = ", ".join(f"{kind} {moved[kind] / 1e9:.2f}" for kind in _KINDS if moved[kind] > 5e6)
    forecast = sum(collective.seconds for collective in found)
    print(
        f"| {text_of_mesh} | {gib:.1f} | {cells or 'none'} | {1e3 * forecast:.1f} |  compiled in "
        f"{seconds:.0f} s",
        flush=True,
    )
    if settings.list_collectives:
        seen = collections.Counter(
            (c.kind, c.shape, c.times, c.across_hosts, c.sent) for c in found
        )
        for (kind, shape, times, across, sent), count in sorted(
            seen.items(), key=lambda item: -item[0][4] * item[0][2] * item[1]
        ):
            where = "between hosts" if across else "in a host"
            print(f"  {count} x {times} {kind} {shape}: {sent / 1e6:.3f} MB sent, {where}")
    return {
        "model": f"{settings.num_layers} x {settings.hidden_size}, "
        f"{settings.rows_per_device} x {settings.sequence_length}, {settings.remat}",
        "gpus": int(np.prod(list(sizes.values()))),
        "mesh": text_of_mesh,
        "planned_gib": round(gib, 2),
        "sent_gb": {kind: round(moved[kind] / 1e9, 3) for kind in _KINDS if moved[kind] > 5e6},
        "forecast_ms": round(1e3 * forecast, 2),
    }


def main(settings: Settings) -> None:
    print("| mesh | GiB per GPU | GB that each GPU sends per step | ms at the links' rate |")
    print("| --- | --- | --- | --- |")
    write_results(settings.json, [report(settings, mesh) for mesh in settings.mesh or ("data=1",)])


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
