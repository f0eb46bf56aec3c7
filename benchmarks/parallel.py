"""Measures training on several devices, each time beside one device, in one call.

    python benchmarks/parallel.py --case data --case fsdp        # on all GPUs of this host
    python benchmarks/parallel.py --case context --case tensor
    JAX_NUM_CPU_DEVICES=2 python benchmarks/parallel.py --small  # to try it on a CPU

Cases, each on 1 device and on all N of them, unless a device cannot hold it:

    data, fsdp   24 x 1024, 8 x 4096 tokens for each device: tokens/s and the ratio to 1 device
    fsdp2048     24 x 2048, 4 x 4096 tokens for each device, with fsdp=N only
    context      24 x 1024: one row of 65,536 tokens for each device, with context=N, beside rows of
                 4,096 tokens on 1 device, as many tokens for each device: tokens/s for each GPU
    tensor       32 x 4096, tensor=N, 1 row of 4096: forward and backward, beside 1 device with one
                 N-th of the layers (the whole model does not fit), whose speed is divided by N

A time is the median of some rounds of asynchronous steps, after a warm-up. The share of time in
collectives is read from a profile of one step: the time of NCCL's kernels of a device during which
no other kernel runs on it (exposed), and all of it.
"""

import dataclasses
import gc
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh
from results import Row, write_results

from goose_jax import RWKV7, RWKV7Config
from goose_jax.data import next_token_batch
from goose_jax.parallel import create_sharded, describe_mesh, make_mesh, place_batch
from goose_jax.parallel.in_model import on_mesh, sum_over_mesh
from goose_jax.training import (
    OptimizerConfig,
    full_loss,
    init_train_state,
    make_train_step,
)

type Case = Literal["data", "fsdp", "fsdp2048", "context", "tensor"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      case: cases to measure; may be given several times. All by default.
      rounds: rounds whose median is reported.
      steps: steps of a round.
      row: tokens of the row in the case context, for each device.
      remat: what the backward computes again in the cases data and fsdp.
      small: tiny sizes, to try the script.
      json: file to write the rows to, in the format of `results.py`.
    """

    case: Annotated[tuple[Case, ...], tyro.conf.UseAppendAction] = ()
    rounds: int = 3
    steps: int = 4
    row: int = 65536
    remat: str = "dots"
    small: bool = False
    json: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a model and of its batch."""

    layers: int
    width: int
    rows: int
    length: int
    remat: str = "dots"

    def config(self, small: bool) -> RWKV7Config:
        """Returns the configuration, or a tiny one."""
        return RWKV7Config(
            vocab_size=256 if small else 65536,
            hidden_size=128 if small else self.width,
            num_layers=min(self.layers, 2) if small else self.layers,
            head_size=32 if small else 64,
            compute_dtype="float32" if small else "bfloat16",
            remat=self.remat,
        )


def batch_of(model: Model, config: RWKV7Config, mesh: Mesh) -> Any:
    tokens = np.random.default_rng(0).integers(
        0, config.vocab_size, (model.rows, model.length + 1), np.int32
    )
    return place_batch(next_token_batch(tokens), mesh)


def measure_step(settings: Settings, model: Model, mesh: Mesh) -> Row:
    """Prints the speed of a whole training step, and returns its row."""
    config, recipe = model.config(settings.small), OptimizerConfig(total_steps=1000)
    made = create_sharded(lambda: RWKV7(config, rngs=nnx.Rngs(0)), mesh)
    state = init_train_state(made, recipe, mesh=mesh)
    del made
    batch = batch_of(model, config, mesh)
    step = make_train_step(RWKV7_of(config), recipe, mesh=mesh).lower(state, batch).compile()
    holder = [state]
    del state

    def run() -> Any:
        holder[0], metrics = step(holder[0], batch)
        return metrics.loss

    return report(settings, config, model, mesh, step, run)


def measure_gradient(settings: Settings, model: Model, mesh: Mesh) -> Row:
    """Prints the speed of forward and backward without an optimizer, and returns its row."""
    config = model.config(settings.small)
    made = create_sharded(lambda: RWKV7(config, rngs=nnx.Rngs(0)), mesh)
    params = nnx.to_pure_dict(nnx.state(made, nnx.Param))
    loss = full_loss(RWKV7_of(config))

    def of_device(params: Any, frozen: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: sum_over_mesh(loss(p, frozen, batch)))(params)

    batch = batch_of(model, config, mesh)
    program = jax.jit(on_mesh(of_device, mesh, gradient=True)).lower(params, {}, batch).compile()
    return report(settings, config, model, mesh, program, lambda: program(params, {}, batch))


def RWKV7_of(config: RWKV7Config) -> RWKV7:  # noqa: N802
    return nnx.eval_shape(lambda: RWKV7(config, rngs=nnx.Rngs(0)))


def report(
    settings: Settings,
    config: RWKV7Config,
    model: Model,
    mesh: Mesh,
    program: Any,
    run: Callable[[], Any],
) -> Row:
    seconds = []
    for _ in range(settings.rounds + 1):
        start = time.perf_counter()
        for _ in range(settings.steps):
            result = run()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - start) / settings.steps)
    per_step = float(np.median(seconds[1:]))  # the first warms up
    count = mesh.devices.size
    speed = model.rows * model.length / per_step
    plan = program.memory_analysis()
    gib = (plan.argument_size_in_bytes + plan.temp_size_in_bytes) / 2**30
    everything, exposed = time_in_collectives(run)
    case = (
        f"{config.num_layers} x {config.hidden_size}, {model.rows} x {model.length}, remat "
        f"{config.remat}, {describe_mesh(mesh)}"
    )
    print(
        f"{case}: {speed:,.0f} tokens/s, {speed / count:,.0f} for "
        f"each device, {1e3 * per_step:.1f} ms, {gib:.1f} GiB planned; collectives "
        f"{1e3 * everything:.1f} ms, {100 * exposed / per_step:.1f}% of the step exposed",
        flush=True,
    )
    row = {
        "case": case,
        "devices": count,
        "tokens_per_s": round(speed),
        "tokens_per_s_per_device": round(speed / count),
        "ms_per_step": round(1e3 * per_step, 2),
        "planned_gib": round(gib, 2),
    }
    if count > 1:
        row |= {
            "collectives_ms": round(1e3 * everything, 2),
            "exposed_percent": round(100 * exposed / per_step, 2),
        }
    return row


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


def main(settings: Settings) -> None:
    n, devices = jax.device_count(), jax.devices()
    one = make_mesh(data=1, devices=devices[:1])
    print(f"{n} x {devices[0].device_kind}")
    length = 128 if settings.small else 4096
    row = 256 if settings.small else settings.row
    measured: list[Row] = []
    for case in settings.case or ("data", "fsdp", "fsdp2048", "context", "tensor"):
        gc.collect()
        print(f"\n{case}")
        match case:
            case "data" | "fsdp":
                remat = settings.remat
                alone = measure_step(settings, Model(24, 1024, 8, length, remat), one)
                mesh = make_mesh(**({"data": n} if case == "data" else {"fsdp": n}))
                together = measure_step(settings, Model(24, 1024, 8 * n, length, remat), mesh)
                print(f"{together['tokens_per_s'] / alone['tokens_per_s']:.3f} times one device")
                measured += [alone, together]
            case "fsdp2048":
                model = Model(24, 2048, 4 * n, length, settings.remat)
                measured.append(measure_step(settings, model, make_mesh(fsdp=n)))
            case "context":
                rows = row // length
                alone = measure_step(settings, Model(24, 1024, rows, length, "full"), one)
                mesh = make_mesh(data=1, context=n)
                together = measure_step(settings, Model(24, 1024, 1, row * n, "full"), mesh)
                ratio = together["tokens_per_s_per_device"] / alone["tokens_per_s_per_device"]
                print(f"{ratio:.3f} of the tokens/s of short rows, for each device")
                measured += [alone, together]
            case "tensor":
                part = measure_gradient(
                    settings, Model(max(32 // n, 1), 4096, 1, length, "full"), one
                )
                mesh = make_mesh(data=1, tensor=n)
                whole = measure_gradient(settings, Model(32, 4096, 1, length, "full"), mesh)
                ratio = whole["tokens_per_s"] / (part["tokens_per_s"] / n)
                print(f"{ratio:.3f} times one device, by layers")
                measured += [part, whole]
    write_results(settings.json, measured)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
