"""Compiles Pallas kernels with Mosaic GPU, for Hopper GPUs or for an interpreter on a CPU."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pallas_kernels.devices import compiled_for, device_in_context
from pallas_kernels.dispatch import NotServed
from pallas_kernels.sharding import vary_alike

TILE = 64
"""Rows and columns of a tile: tensor cores take so many rows at a time."""

H100_MULTIPROCESSORS = 132

_REGISTERS = 64 * 1024
"""Registers of a multiprocessor, of 32 bits each."""

_MOST_BLOCKS = 16
"""Blocks of one warpgroup for which a multiprocessor has room."""

_interpreted = contextvars.ContextVar("interpreted", default=False)


def is_interpreted() -> bool:
    """Returns whether the kernel that is being traced is for the interpreter."""
    return _interpreted.get()


@contextlib.contextmanager
def _interpretation(on: bool) -> Iterator[None]:
    token = _interpreted.set(on)
    try:
        yield
    finally:
        _interpreted.reset(token)


def as_computed(x: jax.Array) -> jax.Array:
    """Copies a loaded value, so that it has the same type as computed values.

    In `jax.shard_map` the type of a loaded value varies over the mesh, and the type of a computed
    value does not. The carry of a loop must keep one type. The compiler removes the copy.
    """
    return x * 1


@dataclasses.dataclass(frozen=True)
class Target:
    """The machine that kernels are compiled for.

    Attributes:
      multiprocessors: number of multiprocessors of the GPU.
      interpret: whether kernels run in the interpreter, on a CPU. It checks for races between
        warpgroups, but computes products of tiles with `jnp.dot`.
    """

    multiprocessors: int = H100_MULTIPROCESSORS
    interpret: bool = False

    def blocks_at_once(self, registers: int) -> int:
        """Returns how many blocks of one warpgroup run at the same time.

        Args:
          registers: number of registers of a thread.
        """
        return self.multiprocessors * min(_MOST_BLOCKS, _REGISTERS // (128 * registers))

    def kernel(
        self,
        body: Callable[..., None],
        *,
        name: str,
        out_type: Any,
        grid: Mapping[str, int],
        scratch_types: Any,
        warpgroups: int = 1,
        cluster: Mapping[str, int] | None = None,
        reduction_scratch_bytes: int = 0,
    ) -> Callable[..., Any]:
        """Makes a kernel of a function.

        Args:
          body: gets references to the operands and results in global memory, then to the scratch
            memory: as keyword arguments, if `scratch_types` is a dict.
          name: of the kernel, in profiles.
          out_type: shapes and dtypes of the results, as a pytree.
          grid: the size of each axis, by its name, the fastest axis first.
          scratch_types: shared memory and barriers, as a pytree.
          warpgroups: number of warpgroups in a block, the axis "warpgroup".
          cluster: the size of each axis of blocks that run on neighbouring multiprocessors, by its
            name, for each element of the grid; None for single blocks.
          reduction_scratch_bytes: shared memory for reductions across warps. Warpgroups would
            overwrite each other's results there, so that a block with any must have one warpgroup.

        Returns:
          A function from operands to results.
        """

        def traced_body(*args: Any, **kwargs: Any) -> None:
            with _interpretation(self.interpret):
                body(*args, **kwargs)

        traced_body.__name__ = name
        kernel = plgpu.kernel(
            traced_body,
            out_type=out_type,
            scratch_types=scratch_types,
            grid=tuple(grid.values())[::-1],
            grid_names=tuple(grid)[::-1],
            num_threads=warpgroups,
            thread_name="warpgroup",
            cluster=tuple((cluster or {}).values()),
            cluster_names=tuple(cluster or {}),
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                reduction_scratch_bytes=reduction_scratch_bytes,
            ),
            interpret=plgpu.InterpretGPUParams(detect_races=True) if self.interpret else None,
        )

        def call(*operands: Any) -> Any:
            results = kernel(*(operands if self.interpret else _for_gpu(operands)))
            _, results = vary_alike(operands, results)  # inside of shard_map
            return results

        return call


def target_in_context() -> Target:
    """Returns what kernels are compiled for: the GPU in context, else an H100."""
    target = compiled_for.get()
    if target is not None:
        return target
    device = device_in_context()
    if device.is_hopper and device.multiprocessors is not None:
        return Target(multiprocessors=device.multiprocessors)
    return Target()


@contextlib.contextmanager
def compile_for(target: Target) -> Iterator[None]:
    """Compiles kernels for `target` instead of the GPU in context, as tests on a CPU do.

    A jitted function that was traced before keeps the target that it was traced for.
    """
    token = compiled_for.set(target)
    try:
        yield
    finally:
        compiled_for.reset(token)


def _for_gpu(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the operands of a kernel, and lets it be compiled for CUDA only.

    The platform is known only when a program is lowered, so that a primitive must check it. JAX's
    own error, on a CPU, names neither the implementation nor the platform.
    """
    leaves, structure = jax.tree.flatten(operands)
    index = next(i for i, x in enumerate(leaves) if not isinstance(x, jax.Ref))
    leaves[index] = _check_platform.bind(leaves[index])
    return jax.tree.unflatten(structure, leaves)


def _refuse(platform: str) -> None:
    raise NotServed(f"mosaic_gpu needs a Hopper GPU, got {platform=}")


def _run_platform_check(x: jax.Array) -> jax.Array:
    (platform,) = {device.platform for device in x.devices()}
    if platform != "gpu":
        _refuse(platform)
    return x


def _lower_platform_check(context: Any, x: Any) -> list[Any]:
    for platform in context.platforms or context.module_context.platforms:
        if platform != "cuda":
            _refuse(platform)
    return [x]


_check_platform = Primitive("check_platform")
_check_platform.def_abstract_eval(lambda x: x)
_check_platform.def_impl(_run_platform_check)
mlir.register_lowering(_check_platform, _lower_platform_check)
batching.defvectorized(_check_platform)


__all__ = [
    "TILE",
    "Target",
    "as_computed",
    "compile_for",
    "is_interpreted",
    "target_in_context",
]
