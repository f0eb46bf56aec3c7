"""Outputs of few long rows, whose walks would leave most multiprocessors idle.

A row is divided into pieces, which are walked at the same time. The state that a piece starts from
is not known then, but what the piece makes of it is: a state S becomes `S P + N`. So there are
three steps:

    transitions    P and N of all pieces but the last, at once
    states         S_1 = S_0 P_0 + N_0, and so on: small products
    outputs        all pieces at once, each from its own state

That is twice the work in a fraction of the time.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.hopper.target import TILE, Target
from pallas_kernels.operators.wkv7.call import WKVInputs
from pallas_kernels.operators.wkv7.chunk_alignment import Transfers
from pallas_kernels.operators.wkv7.mosaic_gpu.chunk import number_of_chunks
from pallas_kernels.operators.wkv7.mosaic_gpu.forward_walk import Results
from pallas_kernels.operators.wkv7.mosaic_gpu.inverse import inverses
from pallas_kernels.operators.wkv7.mosaic_gpu.masks import SegmentBounds
from pallas_kernels.operators.wkv7.mosaic_gpu.outputs import outputs
from pallas_kernels.operators.wkv7.mosaic_gpu.transitions import transitions

_MOST_PIECES = 8
"""Each piece adds a step to the chain of states."""

_COST = 12
"""The kernels that pieces need beside `outputs` take as long as a walk over so many chunks."""


def number_of_pieces(target: Target, rows: int, K: int, V: int, chunks: int) -> int:
    """Returns the number of pieces to divide rows into; 1 if dividing them is not worth it.

    With 128 keys the walks of transitions need more registers than there are, and take too long.

    Args:
      target: tells how many walks there can be at once.
      rows: number of rows times heads.
      K: key channels.
      V: value channels.
      chunks: number of chunks in a row.
    """
    of_transitions, of_outputs = rows * (K + V) // TILE, rows * V // TILE
    at_once = target.multiprocessors
    pieces = min(1 + at_once // of_transitions, at_once // of_outputs, _MOST_PIECES)
    if K > TILE or pieces < 3 or chunks - 2 * -(-chunks // pieces) < _COST:
        return 1
    return pieces


def outputs_in_pieces(
    inputs: WKVInputs,
    initial_state: jax.Array | None,
    bounds: SegmentBounds | None,
    transfers: Transfers | None,
    *,
    target: Target,
    scale: float,
    save: bool,
) -> Results:
    """Computes what `outputs` does, for rows of any number and length.

    Args:
      inputs: `[B, T, H, K or V]` bfloat16, T a multiple of 64.
      initial_state: `[B, N, H, V, K]` float32; None for zeros, if N is 1.
      bounds: of segments that begin within chunks, or None.
      transfers: which of the N states a chunk starts from and which one it ends, `[B, chunks]`
        int32; None if N is 1.
      target: what the kernels are compiled for.
      scale: factor on the outputs.
      save: whether to return what the backward needs: `entries`, `U` and `X`.
    """
    B, T, H, K = inputs.r.shape
    V = inputs.v.shape[-1]
    pieces = number_of_pieces(target, B * H, K, V, number_of_chunks(T))
    in_pieces = pieces > 1 and transfers is None
    if K == V == TILE and not in_pieces:
        return outputs(
            target, inputs, None, initial_state, bounds, transfers, scale=scale, save=save
        )
    X = inverses(target, inputs.log_decay, inputs.a, inputs.b, bounds)
    if in_pieces:
        begins = _states_between(target, inputs, X, initial_state, bounds, pieces)
        results = outputs(
            target, inputs, X, begins, bounds, None, scale=scale, save=save, pieces=pieces
        )
        results = results._replace(final=results.final[:, -1:])
    else:
        results = outputs(
            target, inputs, X, initial_state, bounds, transfers, scale=scale, save=save
        )
    return results._replace(X=X) if save else results


def _states_between(
    target: Target,
    inputs: WKVInputs,
    X: jax.Array,
    initial_state: jax.Array | None,
    bounds: SegmentBounds | None,
    pieces: int,
) -> jax.Array:
    """Returns the state that each piece starts from, `[B, pieces, H, V, K]`."""
    N, P = transitions(target, inputs, X, bounds, pieces)
    states = [jnp.zeros_like(N[:, 0]) if initial_state is None else initial_state[:, 0]]
    for i in range(pieces - 1):
        passed = jnp.einsum("bhvk,bhkl->bhvl", states[-1], P[:, i], precision="highest")
        states.append(passed + N[:, i])
    return jnp.stack(states, axis=1)


__all__ = ["number_of_pieces", "outputs_in_pieces"]
