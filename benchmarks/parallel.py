"""Measures training on several devices, each time beside one device, in one call.

    python benchmarks/parallel.py --case data --case fsdp        # on all GPUs of this host
    python benchmarks/parallel.py --case context --row 524288    # a million tokens on 2 GPUs
    python benchmarks/parallel.py --case tensor
    JAX_NUM_CPU_DEVICES=2 python benchmarks/parallel.py --small  # to try it on a CPU

Cases, each on 1 device and on all N of them:

    data, fsdp   24 x 1024, 8 x 4096 tokens for each device: tokens/s and the ratio to 1 device
    overlap      the same with fsdp=N in seven ways: the layers in a loop or one after another in
                 the program; one collective under way at a time, XLA's default, where training
                 steps have two; nothing beside collectives; NCCL with at most 8 channels, each of
                 which takes a multiprocessor
    fsdp2048     24 x 2048, 16 x 4096 tokens for each device, remat="projections"
    context      24 x 1024: one row, 65,536 tokens for each device, with context=N, beside rows of
                 4,096 tokens on 1 device, as many tokens for each device: tokens/s for each GPU.
                 Then the loss of the last 4,096 tokens with the parameters of the last step, beside
                 that on 1 device, which reads the row in pieces and carries the state
    tensor       32 x 4096, tensor=N, 1 row of 4096: forward and backward, beside 1 device with one
                 N-th of the layers (the whole model may not fit), whose speed is divided by N

First all programs of the cases are compiled, several at a time; a program that two cases need is
compiled and measured once. With `JAX_COMPILATION_CACHE_DIR` set, a second call finds them there.

A time is the median of some rounds of asynchronous steps, after two steps that warm up. The share
of time in collectives is read from a profile of one step: the time of NCCL's kernels of a device
during which no other kernel runs on it (exposed), and all of it.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from results import Row, write_results

from goose_jax import RWKV7, RWKV7Config, init_state
from goose_jax.data import NOT_COUNTED, Batch, next_token_batch
from goose_jax.parallel import (
    batch_spec,
    describe_mesh,
    make_mesh,
    parse_mesh,
    place_batch,
    tree_shardings,
)
from goose_jax.parallel.in_model import on_mesh, sum_over_mesh
from goose_jax.parallel.placement import creation
from goose_jax.training import (
    OptimizerConfig,
    full_loss,
    init_train_state,
    make_train_step,
    sum_of_losses,
)

type Case = Literal["data", "fsdp", "overlap", "fsdp2048", "context", "tensor"]

OPTIONS: dict[str, dict[str, Any]] = {
    # by name: options of XLA that a program is compiled with besides those of training steps
    "": {},
    "one collective at a time": {"xla_gpu_experimental_parallel_collective_overlap_limit": 1},
    "nothing beside collectives": {
        "xla_gpu_disable_async_collectives": "ALLGATHER,REDUCESCATTER,ALLREDUCE"
    },
    "8 channels": {"xla_gpu_nccl_collective_max_nchannels": 8},
}
RECIPE = OptimizerConfig(total_steps=1000)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      case: cases to measure; may be given several times. All by default.
      rounds: rounds whose median is reported.
      steps: steps of a round.
      row: tokens of the row in the case context, for each device.
      remat: what the backward computes again in the cases data, fsdp and overlap.
      unroll_layers: whether the cases data and fsdp have the layers one after another in the
        program, not in a loop.
      compilations: programs that are compiled at the same time.
      small: tiny sizes, to try the script.
      json: file to write the rows to, in the format of `results.py`.
    """

    case: Annotated[tuple[Case, ...], tyro.conf.UseAppendAction] = ()
    rounds: int = 3
    steps: int = 4
    row: int = 65536
    remat: str = "dots"
    unroll_layers: bool = False
    compilations: int = 4
    small: bool = False
    json: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile and to time.

    Attributes:
      layers: number of layers.
      width: channels of the residual stream.
      rows: rows of the batch, on all devices together.
      length: tokens of a row.
      remat: what the backward computes again.
      mesh: the mesh, as `parse_mesh` reads it; "data=1" is one device.
      optimizer: whether it is a training step; else it is a forward and a backward.
      unroll: whether the layers come one after another in the program, not in a loop.
      options: a name in `OPTIONS`.
    """

    layers: int
    width: int
    rows: int
    length: int
    remat: str = "dots"
    mesh: str = "data=1"
    optimizer: bool = True
    unroll: bool = False
    options: str = ""

    def on(self, mesh: str, **changes: Any) -> "Program":
        """Returns the program on another mesh."""
        return dataclasses.replace(self, mesh=mesh, **changes)

    def config(self, small: bool) -> RWKV7Config:
        """Returns the configuration, or a tiny one."""
        return RWKV7Config(
            vocab_size=256 if small else 65536,
            hidden_size=128 if small else self.width,
            num_layers=min(self.layers, 2) if small else self.layers,
            head_size=32 if small else 64,
            compute_dtype="float32" if small else "bfloat16",
            remat=self.remat,
            unroll_layers=self.unroll,
        )

    def device_mesh(self) -> Mesh:
        """Returns the mesh of devices."""
        sizes: dict[str, Any] = {"data": 1} | parse_mesh(self.mesh)
        return make_mesh(**sizes)

    def batch(self, vocab_size: int) -> Batch:
        """Returns random tokens, on the host."""
        shape = (self.rows, self.length + 1)
        return next_token_batch(np.random.default_rng(0).integers(0, vocab_size, shape, np.int32))


@dataclasses.dataclass(frozen=True)
class Lowered:
    """The two parts of a program before they are compiled.

    Attributes:
      start: makes what the steps begin with: a training state, or parameters.
      step: from that and a batch to a new state and a result, or to the gradient.
    """

    start: Any
    step: Any


def lower(program: Program, small: bool) -> Lowered:
    """Traces a program. Nothing is computed and nothing is placed on a device."""
    config, mesh = program.config(small), program.device_mesh()
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))

    def start() -> Any:
        made = RWKV7(config, rngs=nnx.Rngs(0))
        if program.optimizer:
            return init_train_state(made, RECIPE)
        return nnx.to_pure_dict(nnx.state(made, nnx.Param))

    def placed(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    state = jax.eval_shape(start)
    state = jax.tree.map(placed, state, tree_shardings(state, mesh))
    divided = NamedSharding(mesh, batch_spec(2))
    batch = jax.tree.map(lambda x: placed(x, divided), program.batch(config.vocab_size))
    if program.optimizer:
        step = make_train_step(model, RECIPE, mesh=mesh).lower(state, batch)
    else:
        step = jax.jit(_gradient(model, mesh)).lower(state, batch)
    return Lowered(creation(start, mesh).lower(), step)


def _gradient(model: RWKV7, mesh: Mesh) -> Callable[[Any, Any], Any]:
    loss = full_loss(model)

    def of_device(params: Any, frozen: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: sum_over_mesh(loss(p, frozen, batch)))(params)

    return lambda params, batch: on_mesh(of_device, mesh, gradient=True)(params, {}, batch)


def compile_all(settings: Settings, programs: Sequence[Program]) -> dict[Program, Lowered]:
    """Returns the compiled parts of each program."""
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(settings.compilations) as pool:
        pending = {}
        for program in programs:
            lowered = lower(program, settings.small)
            options = OPTIONS[program.options]
            step = functools.partial(lowered.step.compile, compiler_options=options)
            pending[program] = pool.submit(step), pool.submit(lowered.start.compile)
        compiled = {
            program: Lowered(start.result(), step.result())
            for program, (step, start) in pending.items()
        }
    seconds = time.perf_counter() - begin
    print(f"{len(programs)} programs compiled in {seconds:.0f} s", flush=True)
    return compiled


def measure(settings: Settings, program: Program, compiled: Lowered) -> tuple[Row, Any]:
    """Prints the speed of a program. Returns its row, and the state after its last step."""
    config, mesh = program.config(settings.small), program.device_mesh()
    batch = place_batch(program.batch(config.vocab_size), mesh)
    holder = [compiled.start()]

    def run() -> Any:
        if not program.optimizer:
            return compiled.step(holder[0], batch)
        holder[0], metrics = compiled.step(holder[0], batch)
        return metrics.loss

    for _ in range(2):
        jax.block_until_ready(run())
    seconds = []
    for _ in range(settings.rounds):
        begin = time.perf_counter()
        for _ in range(settings.steps):
            result = run()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - begin) / settings.steps)
    per_step, count = float(np.median(seconds)), mesh.size
    speed = program.rows * program.length / per_step
    plan = compiled.step.memory_analysis()
    gib = (plan.argument_size_in_bytes + plan.temp_size_in_bytes) / 2**30
    size = f"{config.num_layers} x {config.hidden_size}, {program.rows} x {program.length}"
    unrolled = "layers unrolled" if program.unroll else ""
    parts = (size, f"remat {config.remat}", describe_mesh(mesh), unrolled, program.options)
    name = ", ".join(part for part in parts if part)
    row = {
        "case": name,
        "devices": count,
        "tokens_per_s": round(speed),
        "tokens_per_s_per_device": round(speed / count),
        "ms_per_step": round(1e3 * per_step, 2),
        "planned_gib": round(gib, 2),
    }
    line = (
        f"{name}: {speed:,.0f} tokens/s, {speed / count:,.0f} for each device, "
        f"{1e3 * per_step:.1f} ms, {gib:.1f} GiB planned"
    )
    if count > 1:
        everything, exposed = time_in_collectives(run)
        row["collectives_ms"] = round(1e3 * everything, 2)
        row["exposed_percent"] = round(100 * exposed / per_step, 2)
        line += f"; collectives {row['collectives_ms']} ms, {row['exposed_percent']} % exposed"
    print(line, flush=True)
    return row, holder[0]


def losses_of_last_tokens(
    settings: Settings, program: Program, params: Any, last: int
) -> tuple[float, float, float]:
    """Returns the mean loss of the last tokens of a row, read in three ways.

    Returns:
      the loss on the mesh of the program; on one device that reads the row in pieces and carries
      the state; on one device that reads the last tokens alone.
    """
    config, mesh = program.config(settings.small), program.device_mesh()
    model = nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))
    loss, graphdef = full_loss(model), nnx.graphdef(model)
    batch = program.batch(config.vocab_size)
    counted = np.where(
        np.arange(program.length) < program.length - last, NOT_COUNTED, batch.targets
    )

    def of_mesh(params: Any, frozen: Any, batch: Batch) -> Any:
        return sum_over_mesh(loss(params, frozen, batch)) / last

    divided = place_batch(dataclasses.replace(batch, targets=counted), mesh)
    together = jax.jit(on_mesh(of_mesh, mesh, gradient=False))(params, {}, divided)

    alone = jax.device_put(params, jax.devices()[0])

    @jax.jit
    def read(params: Any, state: Any, tokens: Any) -> Any:
        return nnx.merge(graphdef, params).hidden(tokens, state)[1]

    @jax.jit
    def of_last(params: Any, state: Any, batch: Batch) -> Any:
        return sum_of_losses(nnx.merge(graphdef, params), batch, state=state) / last

    start = state = init_state(config, 1)
    read_before, piece = batch.inputs[:, :-last], min(settings.row, program.length // 2)
    for first in range(0, program.length - last, piece):
        state = read(alone, state, read_before[:, first : first + piece])
    end = Batch(batch.inputs[:, -last:], batch.targets[:, -last:])
    return float(together), float(of_last(alone, state, end)), float(of_last(alone, start, end))


def time_in_collectives(run: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds of collectives of the first GPU in one run, and those exposed."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    collectives, others = [], []
    for plane in data.planes:
        if plane.name != "/device:GPU:0":
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                spans = collectives if "nccl" in event.name.lower() else others
                spans.append((event.start_ns, event.start_ns + event.duration_ns))
    union = _length(collectives + others)
    return _length(collectives) / 1e9, (union - _length(others)) / 1e9


def _length(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of spans of time."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def programs_of(settings: Settings, case: Case, n: int) -> list[tuple[Program, Program]]:
    """Returns the programs of a case, each with the one on one device that it is compared with."""
    length = 128 if settings.small else 4096
    alone = Program(24, 1024, 8, length, settings.remat, unroll=settings.unroll_layers)
    together = dataclasses.replace(alone, rows=8 * n)
    match case:
        case "data" | "fsdp":
            return [(together.on(f"{case}={n}"), alone)]
        case "overlap":
            ways = [(False, options) for options in OPTIONS]
            ways += [(True, ""), (True, "nothing beside collectives"), (True, "8 channels")]
            return [
                (
                    together.on(f"fsdp={n}", unroll=unroll, options=options),
                    dataclasses.replace(alone, unroll=unroll),
                )
                for unroll, options in ways
            ]
        case "fsdp2048":
            wide = Program(24, 2048, 16, length, "projections")
            return [(dataclasses.replace(wide, rows=16 * n, mesh=f"fsdp={n}"), wide)]
        case "context":
            row = 2 * length if settings.small else settings.row
            short = Program(24, 1024, row // length, length, "full")
            return [(Program(24, 1024, 1, row * n, "full", f"context={n}"), short)]
        case "tensor":
            part = Program(max(32 // n, 1), 4096, 1, length, "full", optimizer=False)
            return [(dataclasses.replace(part, layers=32, mesh=f"tensor={n}"), part)]


def compare(case: Case, together: Row, alone: Row) -> str:
    """Returns what a case is measured for, in words."""
    n = together["devices"]
    ratio = together["tokens_per_s"] / alone["tokens_per_s"]
    match case:
        case "context":
            return f"{ratio / n:.3f} of the tokens/s of short rows, for each device"
        case "tensor":
            return f"{ratio * n:.3f} times one device, by layers"
        case _:
            return f"{ratio:.3f} times one device"


def main(settings: Settings) -> None:
    n = jax.device_count()
    print(f"{n} x {jax.devices()[0].device_kind}")
    cases = settings.case or get_args(Case.__value__)
    pairs = [(case, *pair) for case in cases for pair in programs_of(settings, case, n)]
    needed = [program for _, *pair in pairs for program in reversed(pair)]
    compiled = compile_all(settings, list(dict.fromkeys(needed)))
    rows: dict[Program, Row] = {}
    for case, together, alone in pairs:
        print(f"\n{case}")
        for program in (alone, together):
            if program not in rows:
                rows[program], state = measure(settings, program, compiled.pop(program))
                if case == "context" and program is together:
                    last = program.length // (4 * n) if settings.small else 4096
                    losses = losses_of_last_tokens(settings, program, state.params, last)
                    names = ("together", "in_pieces", "alone")
                    rows[program] |= {
                        f"loss_{name}": round(x, 6) for name, x in zip(names, losses, strict=True)
                    }
                    print(
                        "loss of the last {:,} tokens: {:.6f}, {:.6f} in pieces on one device, "
                        "{:.6f} without the tokens before".format(last, *losses)
                    )
                del state
                gc.collect()
        print(compare(case, rows[together], rows[alone]), flush=True)
    write_results(settings.json, list(rows.values()))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
