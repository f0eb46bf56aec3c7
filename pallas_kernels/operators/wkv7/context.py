"""WKV7 on rows whose tokens are divided over the devices of a mesh axis.

A piece of a row turns the state S before it into `P S + N` after it. So there are three steps:

    maps      P and N of all pieces at once
    states    S_1 = P_0 S_0 + N_0, and so on: small products, first within each device, then over
              the devices' maps, which all devices gather
    outputs   all pieces at once, each from its own state

P is what the operator makes of the identity with values of zero, and N what it makes of zero. The
backward has the same form: the gradient g of the state after a piece becomes `P^T g + d` before it,
where d is what the outputs of the piece contribute.

A device divides its tokens into several pieces where its rows and heads alone would leave most
multiprocessors idle.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.context import ContextAxis, find_entries, from_device, is_device, own
from pallas_kernels.devices import device_in_context
from pallas_kernels.differentiation import KEPT_STATES
from pallas_kernels.operators.wkv7.call import Implementation, Results, WKVCall, WKVInputs
from pallas_kernels.precision import accumulation_dtype
from pallas_kernels.sharding import vary_alike
from pallas_kernels.types import Mask, SegmentIds

type Pair = tuple[jax.Array, jax.Array]
"""Outputs of pieces `[B m, T / m, H, V]`; and states, of pieces `[B m, H, K, V]` or of rows
`[B, H, K, V]`."""

_SHORTEST_PIECE = 512
"""Tokens of a piece, at least: every piece adds a step to the chain of states."""

_CHUNK = 64
"""Tokens; a piece is a multiple of it, and so has whole chunks in every implementation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs.

    Attributes:
      pull_back: from gradients of outputs and states after the pieces, to those of inputs and
        states before them.
      P: `[m, B, H, K, K]` float32 of this device's pieces; zero where the state does not enter.
      enters: `[m, B, 1, 1, 1]`, whether the state before a piece enters it.
    """

    pull_back: Callable[..., Any]
    P: jax.Array
    enters: jax.Array


def number_of_pieces(rows: int, length: int) -> int:
    """Returns into how many pieces a device divides its tokens.

    Args:
      rows: number of rows times heads.
      length: tokens of each row on this device.
    """
    at_once = device_in_context().multiprocessors or 1
    pieces = 1
    while 2 * pieces * rows <= at_once and length % (2 * pieces * _CHUNK) == 0:
        if length < 2 * pieces * _SHORTEST_PIECE:
            break
        pieces *= 2
    return pieces


def _multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest")


def _apply(maps: Float[Array, "*n B H K L"], state: jax.Array) -> jax.Array:
    """Returns `P state + N`. The last axis of `maps` has the K columns of P, then those of N."""
    K = state.shape[-2]
    return _multiply(maps[..., :K], state) + maps[..., K:]


def _chain(
    P: Float[Array, "m B H K K"],
    N: Float[Array, "m B H K V"],
    first: Float[Array, "B H K V"],
    axis: ContextAxis,
    *,
    reverse: bool = False,
) -> tuple[Float[Array, "B H K V"], Float[Array, "m B H K V"]]:
    """Applies the maps of the pieces of all devices, one after another.

    Args:
      P: of this device's pieces.
      N: of this device's pieces.
      first: the state before the first piece; the one after the last, if reverse.
      axis: the mesh axis.
      reverse: whether the last piece is first.

    Returns:
      The state after all pieces, and the one that each piece of this device is applied to.
    """
    identity = jnp.zeros_like(P[0]) + jnp.eye(P.shape[-1], dtype=P.dtype)[None, None]
    nothing = jnp.concatenate([identity, jnp.zeros_like(N[0])], axis=-1)
    N = jnp.concatenate([jnp.zeros_like(P), N], axis=-1)

    def add_piece(total: jax.Array, piece: tuple[jax.Array, jax.Array]) -> Any:
        P, N = piece
        return _multiply(P, total) + N, total

    total, before = jax.lax.scan(add_piece, nothing, (P, N), reverse=reverse)

    def add_device(state: jax.Array, total: jax.Array) -> Any:
        return _apply(total, state), state

    totals = jax.lax.all_gather(total, axis)
    last, states = jax.lax.scan(add_device, first, totals, reverse=reverse)
    return last, _apply(before, own(states, axis)[None])


class _Pieces:
    """Divides rows `[B, T, ...]` into m pieces each, which then count as rows, and joins them."""

    def __init__(self, rows: int, count: int):
        self.rows, self.count = rows, count

    def divide(self, x: jax.Array) -> jax.Array:
        """Returns `[B m, T / m, ...]`, given `[B, T, ...]`."""
        return x.reshape(self.rows * self.count, x.shape[1] // self.count, *x.shape[2:])

    def join(self, x: jax.Array) -> jax.Array:
        """Returns `[B, T, ...]`, given `[B m, T / m, ...]`."""
        return x.reshape(self.rows, x.shape[1] * self.count, *x.shape[2:])

    def states(self, x: jax.Array) -> jax.Array:
        """Returns `[m, B, ...]`, given one value for each piece, `[B m, ...]`."""
        return jnp.swapaxes(x.reshape(self.rows, self.count, *x.shape[1:]), 0, 1)

    def of_states(self, x: jax.Array) -> jax.Array:
        """Returns `[B m, ...]`, given `[m, B, ...]`: the inverse of `states`."""
        return jnp.swapaxes(x, 0, 1).reshape(self.rows * self.count, *x.shape[2:])


def _maps_of_pieces(
    run: Implementation, inputs: WKVInputs, call: WKVCall
) -> tuple[Float[Array, "pieces H K K"], Float[Array, "pieces H K V"]]:
    """Returns P and N of pieces that count as rows."""
    (rows, _, H, K), V = inputs.k.shape, inputs.v.shape[-1]
    dtype = accumulation_dtype(*inputs)
    begin = jnp.concatenate([jnp.zeros((K, V), dtype), jnp.eye(K, dtype=dtype)], axis=1)
    begin = jnp.broadcast_to(begin, (rows, H, K, V + K))
    v = jnp.concatenate([inputs.v, jnp.zeros_like(inputs.k, inputs.v.dtype)], axis=-1)
    _, final = run(inputs._replace(v=v), call.with_arrays(begin, call.segment_ids))
    return final[..., V:], final[..., :V]


def wkv7_over_context(
    run: Implementation,
    inputs: WKVInputs,
    call: WKVCall,
    axis: ContextAxis,
) -> Results:
    """Computes `pallas_kernels.wkv7`, which documents `context_axis`.

    Args:
      run: computes a call for pieces that count as rows.
      inputs: this device's tokens.
      call: what else the call asks for; its `num_segments` is None.
      axis: the mesh axis that divides the tokens.
    """
    (B, T, H, K), V = inputs.k.shape, inputs.v.shape[-1]
    of = _Pieces(B, number_of_pieces(B * H, T))
    initial = jnp.zeros((B, H, K, V)) if call.initial_state is None else call.initial_state
    initial = initial.astype(accumulation_dtype(*inputs))
    inputs, initial, segment_ids = vary_alike(inputs, initial, call.segment_ids)
    (inputs, segment_ids) = jax.tree.map(of.divide, (inputs, segment_ids))
    enters = jnp.ones((of.count, B), bool)
    if segment_ids is not None:
        enters = find_entries(of.states(segment_ids), axis)
    _, enters = vary_alike(inputs, enters[..., None, None, None])
    o, final = _run_pieces(run, of, axis, call.with_arrays(None, None))(
        inputs, initial, segment_ids, enters
    )
    return of.join(o), from_device(final, -1, axis)


def _run_pieces(
    run: Implementation, of: _Pieces, axis: ContextAxis, call: WKVCall
) -> Callable[[WKVInputs, jax.Array, SegmentIds | None, Mask], Pair]:
    """Returns the function of pieces, with its gradient.

    It returns the outputs, and the state after the last piece of this device.
    """

    @jax.custom_vjp
    def run_pieces(
        inputs: WKVInputs, initial: jax.Array, segment_ids: SegmentIds | None, enters: Mask
    ) -> Pair:
        return forward(inputs, initial, segment_ids, enters)[0]

    def forward(
        inputs: WKVInputs, initial: jax.Array, segment_ids: SegmentIds | None, enters: Mask
    ) -> tuple[Pair, Residuals]:
        maps = _maps_of_pieces(run, inputs, call.with_arrays(None, segment_ids))
        P, N = map(of.states, maps)
        P = checkpoint_name(jnp.where(enters, P, 0), KEPT_STATES)
        _, states = _chain(P, N, initial, axis)

        def outputs(inputs: WKVInputs, states: jax.Array) -> Pair:
            return run(inputs, call.with_arrays(states, segment_ids))

        states = checkpoint_name(of.of_states(jnp.where(enters, states, 0)), KEPT_STATES)
        (o, after), pull_back = jax.vjp(outputs, inputs, states)
        return (o, of.states(after)[-1]), Residuals(pull_back, P, enters)

    def backward(residuals: Residuals, gradients: Pair) -> tuple[Any, ...]:
        do, dfinal = gradients
        P, enters = residuals.P, residuals.enters
        own_part = jnp.zeros_like(P, shape=(of.count, *dfinal.shape)).at[-1].set(dfinal)
        # Of this call only the gradient of the states is used, which costs half a backward.
        _, dstates = residuals.pull_back((do, of.of_states(own_part)))
        dstates = jnp.where(enters, of.states(dstates), 0)
        zeros = jnp.zeros_like(dfinal)
        dinitial, later = _chain(jnp.swapaxes(P, -1, -2), dstates, zeros, axis, reverse=True)
        dinputs, _ = residuals.pull_back((do, of.of_states(own_part + later)))
        dinitial = jnp.where(is_device(0, axis), dinitial, 0)  # it is the same on each device
        return dinputs, dinitial, None, None

    run_pieces.defvjp(forward, backward)
    return run_pieces


__all__ = ["number_of_pieces", "wkv7_over_context"]
