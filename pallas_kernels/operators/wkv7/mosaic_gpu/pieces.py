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
from pallas_kernels.operators.wkv7.mosaic_gpu.chunk import number_of_chunks
from pallas_kernels.operators.wkv7.mosaic_gpu.forward import outputs, transitions
from pallas_kernels.operators.wkv7.mosaic_gpu.inverse import inverses

_MOST = 8
"""Each piece adds a step to the chain of states."""

_COST = 12
"""The additional kernels take about as long as so many chunks."""


def number_of_pieces(target: Target, rows: int, K: int, V: int, chunks: int) -> int:
    """Into how many pieces rows are best divided; 1 if that is not worth it.

    With 128 keys, transitions need more registers than there are, and take too long.

    Args:
      target: tells how many walks there can be at once.
      rows: number of rows and heads.
      K: keys.
      V: values.
      chunks: of each row.
    """
    of_transitions, of_outputs = rows * (K + V) // TILE, rows * V // TILE
    at_once = target.multiprocessors
    pieces = min(1 + at_once // of_transitions, at_once // of_outputs, _MOST)
    if K > TILE or pieces < 3 or chunks - 2 * -(-chunks // pieces) < _COST:
        return 1
    return pieces


def outputs_in_pieces(
    target: Target,
    inputs: tuple[jax.Array, ...],
    initial_state: jax.Array | None,
    bounds: tuple[jax.Array, ...],
    transfers: tuple[jax.Array, ...],
    *,
    scale: float,
    save: bool,
) -> tuple[jax.Array, ...]:
    """As `outputs`, for rows of any number and length.

    Returns:
      What it returns, and X too if the rest is to be saved.
    """
    B, T, H, K = inputs[0].shape
    V = inputs[3].shape[-1]
    pieces = number_of_pieces(target, B * H, K, V, number_of_chunks(T))
    in_pieces = pieces > 1 and not transfers
    if K == V == TILE and not in_pieces:
        return outputs(
            target, inputs, None, initial_state, bounds, transfers, scale=scale, save=save
        )
    _, log_decay, _, _, a, b = inputs
    X = inverses(target, log_decay, a, b, bounds)
    given = (X,) if save else ()
    if not in_pieces:
        return *outputs(
            target, inputs, X, initial_state, bounds, transfers, scale=scale, save=save
        ), *given
    N, P = transitions(target, inputs, X, bounds, pieces)
    states = [jnp.zeros_like(N[:, 0]) if initial_state is None else initial_state[:, 0]]
    for i in range(pieces - 1):
        passed = jnp.einsum("bhvk,bhkl->bhvl", states[-1], P[:, i], precision="highest")
        states.append(passed + N[:, i])
    begins = jnp.stack(states, axis=1)
    o, final, *saved = outputs(
        target, inputs, X, begins, bounds, (), scale=scale, save=save, pieces=pieces
    )
    return o, final[:, -1:], *saved, *given


__all__ = ["number_of_pieces", "outputs_in_pieces"]
