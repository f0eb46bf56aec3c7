"""What pieces of a row make of any state, in walks without outputs."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.operators.wkv7.call import WKVInputs
from pallas_kernels.operators.wkv7.mosaic_gpu.forward_walk import (
    ForwardWalk,
    Operands,
    Results,
    forward_walk,
)
from pallas_kernels.operators.wkv7.mosaic_gpu.masks import SegmentBounds


def transitions(
    target: Target,
    inputs: WKVInputs,
    X: jax.Array,
    bounds: SegmentBounds | None,
    pieces: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes P and N of each piece: a state S that enters it leaves it as `S P + N`.

    For each piece there is a walk from a state of zeros, for N, and one from the identity with
    values of zero, for P.

    Args:
      target: what the kernel is compiled for.
      inputs: `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      X: `[B, H, chunks, 64, 64]` bfloat16, of `inverses`.
      bounds: of segments that begin within chunks, or None.
      pieces: into how many pieces the chunks of a row are divided; the last one is not walked.
        There must be a multiprocessor for each walk.

    Returns:
      N, `[B, pieces - 1, H, V, K]`, and P, `[B, pieces - 1, H, K, K]`, float32.
    """
    B, _, H, K = inputs.r.shape
    V = inputs.v.shape[-1]
    begin = jnp.concatenate([jnp.zeros((V, K), jnp.float32), jnp.eye(K, dtype=jnp.float32)])
    begin = jnp.broadcast_to(begin, (B, pieces - 1, H, V + K, K))
    zeros = jnp.zeros((TILE, TILE), jnp.bfloat16)
    final = forward_walk(
        target,
        "wkv7_transitions",
        Operands(inputs, X, begin, None, bounds, None, zeros),
        Results(final=jax.ShapeDtypeStruct(begin.shape, jnp.float32)),
        _free_slots,
        scale=1.0,
        pieces=pieces,
    ).final
    return final[..., :V, :], final[..., V:, :]


def _free_slots(walk: ForwardWalk, _: Results) -> None:
    """Does the work of the last warpgroup: to fetch chunks when slots are free."""

    def free_slot(step, place, chunk, _):
        plgpu.barrier_wait(walk.barriers.carried.at[walk.ring.slot(step)])
        plgpu.commit_smem()  # so that all threads have waited
        walk.refill(step)

    walk.start_copies()
    walk.for_each_walk(lambda index: walk.for_each_chunk(index, free_slot, None))
    plgpu.wait_smem_to_gmem(0)
