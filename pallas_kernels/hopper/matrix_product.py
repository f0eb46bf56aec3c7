"""Products of large matrices, each tile of which goes through an epilogue in the same kernel.

A block of the grid computes tiles of 128 x 256 results, one after another. Two warpgroups multiply,
64 rows each. A third copies operands into a ring of slots ahead of them, and goes on to the next
tile while the epilogue works on this one:

    copies of step s -> `loaded` -> both warpgroups multiply -> `used` -> copies of step s + slots

Two blocks form a cluster. Their tiles lie below each other, so each block copies half of the
columns that both multiply by.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper.grid import divide
from pallas_kernels.hopper.registers import TRANSFORMS
from pallas_kernels.hopper.target import TILE, Target

ROWS = 128
"""Rows of a block's tile."""

COLUMNS = 256
"""Columns of a block's tile."""

_SLOTS = 3
_WORKERS = 2
_IN_CLUSTER = 2
_ROWS_OF_GROUP = 8
"""Tiles below each other, of clusters, that are worked on before the tiles beside them.

All blocks then read about as many rows as columns at a time, and find most of them in the cache.
"""

_REGISTERS_OF_WORKER = 232
_REGISTERS_OF_COPIER = 40


def is_served(target: Target, rows: int, depth: int, columns: int) -> bool:
    """Returns whether `multiply` takes matrices of this size, and keeps the GPU busy.

    Args:
      target: the GPU.
      rows: rows of x and of the result.
      depth: columns of x.
      columns: columns of the result.
    """
    whole = rows % (ROWS * _IN_CLUSTER) == depth % TILE == columns % COLUMNS == 0
    return whole and rows * columns >= target.multiprocessors * ROWS * COLUMNS


@dataclasses.dataclass(frozen=True)
class Memory:
    """What an epilogue reads and writes.

    Attributes:
      operands: references to its operands, in global memory.
      results: references to its results, in global memory.
      scratch: shared memory and barriers of the block, by their names.
    """

    operands: tuple[Any, ...]
    results: tuple[Any, ...]
    scratch: Mapping[str, Any]


class Epilogue:
    """What becomes of the sums of a tile, in the kernel of their product.

    Attributes:
      operands: arrays that it reads besides the sums.
      results: types of the arrays that it writes.
      scratch_types: of shared memory and barriers, by their names; 64 KiB at most.
    """

    operands: tuple[jax.Array, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    scratch_types: Mapping[str, Any]

    def copy(self, memory: Memory, turn: jax.Array, row: jax.Array, column: jax.Array) -> None:
        """Copies what it reads of a tile to shared memory.

        The warpgroup that copies operands calls it, after it has copied those of the tile.

        Args:
          memory: of the block.
          turn: how many tiles the block has had before this one.
          row: first row of the tile.
          column: first column of the tile.
        """

    def end(self, memory: Memory) -> None:
        """Waits, in the warpgroup that copies, for what the last call of `copy` would wait for."""

    def store(
        self, memory: Memory, worker: jax.Array, row: jax.Array, column: jax.Array, sums: jax.Array
    ) -> None:
        """Works on the half of a tile that a warpgroup has multiplied.

        Args:
          memory: of the block.
          worker: which half of the block's tile it is.
          row: first of its 64 rows.
          column: first of its 256 columns.
          sums: `[64, 256]` float32, in registers.
        """
        raise NotImplementedError


def multiply(
    target: Target,
    x: Float[Array, "M K"],
    y: Float[Array, "K N"],
    epilogue: Epilogue,
    *,
    name: str,
    transposed: bool = False,
) -> tuple[jax.Array, ...]:
    """Computes `x @ y`, and hands each tile of it to an epilogue.

    Args:
      target: the GPU.
      x: `[M, K]` bfloat16.
      y: `[K, N]` bfloat16, or `[N, K]` if `transposed`.
      epilogue: works on tiles; nothing else is stored.
      name: of the kernel, in profiles.
      transposed: whether to multiply by the transpose of y.

    Returns:
      The results of the epilogue.
    """
    (M, K), N = x.shape, y.shape[0 if transposed else 1]
    tiles_below, tiles_beside, steps = M // (ROWS * _IN_CLUSTER), N // COLUMNS, K // TILE
    group = next(size for size in range(_ROWS_OF_GROUP, 0, -1) if tiles_below % size == 0)
    tiles = tiles_below * tiles_beside
    clusters = min(max(1, target.multiprocessors // _IN_CLUSTER), tiles)

    def body(x_gmem, y_gmem, operands_gmem, *results_gmem, ring, scratch):
        warpgroup, cluster = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("cluster")
        turns = jax.lax.div(tiles - 1 - cluster, jnp.int32(clusters)) + 1

        def place(turn):
            """Returns the first row and the first column of this block's tile."""
            of_group, index = divide(cluster + turn * clusters, group * tiles_beside)
            beside, below = divide(index, group)
            row = (of_group * group + below) * _IN_CLUSTER + jax.lax.axis_index("in_cluster")
            return row * ROWS, beside * COLUMNS

        block = _Block(x_gmem, y_gmem, steps, transposed, **ring)
        memory = Memory(operands_gmem, results_gmem, scratch)

        @pl.when(warpgroup == _WORKERS)
        def _():
            plgpu.set_max_registers(_REGISTERS_OF_COPIER, action="decrease")

            def copy(turn, _):
                block.copy(turn, *place(turn))
                epilogue.copy(memory, turn, *place(turn))

            jax.lax.fori_loop(0, turns, copy, None)
            block.wait_for_workers(turns)
            epilogue.end(memory)

        @pl.when(warpgroup < _WORKERS)
        def _():
            plgpu.set_max_registers(_REGISTERS_OF_WORKER, action="increase")

            def compute(turn, _):
                row, column = place(turn)
                sums = block.compute(warpgroup, turn)
                epilogue.store(memory, warpgroup, row + warpgroup * TILE, column, sums)

            jax.lax.fori_loop(0, turns, compute, None)
            plgpu.wait_smem_to_gmem(0)

    def smem(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=TRANSFORMS)

    kernel = target.kernel(
        body,
        name=name,
        out_type=epilogue.results,
        grid={"cluster": clusters},
        cluster={"in_cluster": _IN_CLUSTER},
        scratch_types={
            "ring": {
                "x_smem": smem(_SLOTS, ROWS, TILE),
                "y_smem": smem(_SLOTS, *((COLUMNS, TILE) if transposed else (TILE, COLUMNS))),
                "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
                "used": plgpu.ClusterBarrier(
                    collective_axes=("in_cluster",), num_arrivals=_WORKERS, num_barriers=_SLOTS
                ),
            },
            "scratch": dict(epilogue.scratch_types),
        },
        warpgroups=_WORKERS + 1,
    )
    return kernel(x, y, epilogue.operands)


def multiply_and_finish(
    target: Target,
    x: Float[Array, "M K"],
    y: Float[Array, "K N"],
    other: Float[Array, "M N"] | None,
    finish: Callable[..., jax.Array],
    *,
    name: str,
    transposed: bool = False,
) -> Float[Array, "M N"]:
    """Computes `finish(x @ y)`, or `finish(x @ y, other)`, in one kernel.

    Args:
      target: the GPU.
      x: `[M, K]` bfloat16.
      y: `[K, N]` bfloat16, or `[N, K]` if `transposed`.
      other: `[M, N]` bfloat16, or None.
      finish: elementwise, from float32 tiles to a float32 tile.
      name: of the kernel, in profiles.
      transposed: whether to multiply by the transpose of y.

    Returns:
      `[M, N]` bfloat16.
    """
    shape = len(x), y.shape[0 if transposed else 1]
    epilogue = _Elementwise(shape, other, finish)
    (result,) = multiply(target, x, y, epilogue, name=name, transposed=transposed)
    return result


class _Elementwise(Epilogue):
    """Stores `finish(sums)` or `finish(sums, other)` in bfloat16.

    In shared memory a half of a tile of the result, for each worker, takes the place of that of
    `other`. Barriers: `other_loaded` completes when the tile of `other` has arrived; `stored`, when
    the tile of the result has left.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        other: Float[Array, "M N"] | None,
        finish: Callable[..., jax.Array],
    ):
        self.finish = finish
        self.operands = () if other is None else (other,)
        self.results = (jax.ShapeDtypeStruct(shape, jnp.bfloat16),)
        self.scratch_types = {
            "result_smem": plgpu.SMEM(
                (_WORKERS, TILE, COLUMNS), jnp.bfloat16, transforms=TRANSFORMS
            ),
            "other_loaded": plgpu.Barrier(num_arrivals=_WORKERS),
            "stored": plgpu.Barrier(num_arrivals=_WORKERS),
        }

    def copy(self, memory: Memory, turn: jax.Array, row: jax.Array, column: jax.Array) -> None:
        for other_gmem in memory.operands:
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(memory.scratch["stored"]))
            for worker in range(_WORKERS):
                plgpu.copy_gmem_to_smem(
                    other_gmem.at[pl.ds(row + worker * TILE, TILE), pl.ds(column, COLUMNS)],
                    memory.scratch["result_smem"].at[worker],
                    memory.scratch["other_loaded"],
                )

    def end(self, memory: Memory) -> None:
        if memory.operands:
            plgpu.barrier_wait(memory.scratch["stored"])

    def store(
        self, memory: Memory, worker: jax.Array, row: jax.Array, column: jax.Array, sums: jax.Array
    ) -> None:
        result_smem = memory.scratch["result_smem"].at[worker]
        if memory.operands:
            plgpu.barrier_wait(memory.scratch["other_loaded"])
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            plgpu.commit_smem()
        for first in range(0, COLUMNS, TILE):
            of_part = pl.ds(first, TILE)
            others = (result_smem[:, of_part],) if memory.operands else ()
            part = self.finish(
                sums[:, first : first + TILE], *(x.astype(jnp.float32) for x in others)
            )
            result_smem[:, of_part] = part.astype(jnp.bfloat16)
        plgpu.commit_smem()
        rows, columns = pl.ds(row, TILE), pl.ds(column, COLUMNS)
        plgpu.copy_smem_to_gmem(result_smem, memory.results[0].at[rows, columns])
        if memory.operands:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(memory.scratch["stored"])


@dataclasses.dataclass(frozen=True)
class _Block:
    """How the warpgroups of a block multiply, with references to its memory and barriers.

    Attributes:
      x_gmem: `[M, K]`.
      y_gmem: `[K, N]`, or `[N, K]` if `transposed`.
      steps: number of steps of a tile, of 64 columns of x each.
      transposed: whether to multiply by the transpose of y.
      x_smem: the ring's slots for x.
      y_smem: the ring's slots for y.
      loaded: of each slot, completes when a step's operands have arrived.
      used: of each slot, completes when all workers of the cluster are done with it.
    """

    x_gmem: Any
    y_gmem: Any
    steps: int
    transposed: bool
    x_smem: Any
    y_smem: Any
    loaded: Any
    used: Any

    def copy(self, turn: jax.Array, row: jax.Array, column: jax.Array) -> None:
        """Copies what a tile is made of, as soon as there is room for it."""
        columns = pl.ds(column, COLUMNS)

        def copy_step(k: jax.Array, _: None) -> None:
            step, along = turn * self.steps + k, pl.ds(k * TILE, TILE)
            slot = _slot(step)
            pl.when(step >= _SLOTS)(lambda: plgpu.barrier_wait(self.used.at[slot]))
            plgpu.copy_gmem_to_smem(
                self.x_gmem.at[pl.ds(row, ROWS), along], self.x_smem.at[slot], self.loaded.at[slot]
            )
            plgpu.copy_gmem_to_smem(
                self.y_gmem.at[(columns, along) if self.transposed else (along, columns)],
                self.y_smem.at[slot],
                self.loaded.at[slot],
                collective_axes="in_cluster",
            )

        jax.lax.fori_loop(0, self.steps, copy_step, None)

    def wait_for_workers(self, turns: jax.Array) -> None:
        """Waits until the cluster's workers are done: no block may end while another needs it."""

        def wait(step: jax.Array, _: None) -> None:
            pl.when(step >= 0)(lambda: plgpu.barrier_wait(self.used.at[_slot(step)]))

        steps = turns * self.steps
        jax.lax.fori_loop(steps - _SLOTS, steps, wait, None)

    def compute(self, worker: jax.Array, turn: jax.Array) -> jax.Array:
        """Returns the sums of a worker's half of a tile, in registers."""
        return pl.run_scoped(
            lambda sums: self._multiply(worker, turn * self.steps, sums),
            plgpu.ACC((TILE, COLUMNS), jnp.float32),
        )

    def _multiply(self, worker: jax.Array, first: jax.Array, sums: Any) -> jax.Array:
        """Returns 64 rows of x times the columns; `first` is the first step of the tile."""

        def add(k: jax.Array, _: None) -> None:
            slot = _slot(first + k)
            plgpu.barrier_wait(self.loaded.at[slot])
            y_smem = self.y_smem.at[slot]
            plgpu.wgmma(
                sums,
                self.x_smem.at[slot, pl.ds(worker * TILE, TILE)],
                y_smem.transpose((1, 0)) if self.transposed else y_smem,
            )
            plgpu.wgmma_wait(1)  # the product before is done
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(self.used.at[_slot(first + k - 1)]))

        jax.lax.fori_loop(0, self.steps, add, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(self.used.at[_slot(first + self.steps - 1)])
        return sums[...]


def _slot(step: jax.Array) -> jax.Array:
    return jax.lax.rem(step, jnp.int32(_SLOTS))


__all__ = [
    "COLUMNS",
    "ROWS",
    "Epilogue",
    "Memory",
    "is_served",
    "multiply",
    "multiply_and_finish",
]
