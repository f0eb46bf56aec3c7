"""Compiles Pallas kernels with Mosaic GPU, for Hopper GPUs or for an interpreter on a CPU."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import vary_alike

TILE = 64
"""Rows and columns of a tile: tensor cores take so many rows at a time."""

_interpreted = contextvars.ContextVar("interpreted", default=False)


def hopper_gpu() -> Any:
    """The first device, if it can run the kernels; raises NotImplementedError otherwise."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"mosaic_gpu needs a GPU, got {jax.default_backend()=}")
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        raise NotImplementedError(f"mosaic_gpu needs compute capability 9.0, got {capability}")
    return device


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
    """Copies a loaded value, so that its type is that of computed values.

    In `jax.shard_map` the type of a loaded value varies over the mesh, that of a computed one does
    not, and the carry of a loop has one type. The compiler removes the copy.
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

    multiprocessors: int = 132
    interpret: bool = False

    def kernel(
        self,
        body: Callable[..., None],
        *,
        name: str,
        out_type: Any,
        grid: Mapping[str, int],
        scratch_types: Any,
        warpgroups: int = 1,
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
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                reduction_scratch_bytes=reduction_scratch_bytes,
            ),
            interpret=plgpu.InterpretGPUParams(detect_races=True) if self.interpret else None,
        )

        def call(*operands: jax.Array) -> Any:
            results = kernel(*operands)
            _, results = vary_alike(operands, results)  # inside of shard_map
            return results

        return call


__all__ = ["TILE", "Target", "as_computed", "hopper_gpu", "is_interpreted"]
