"""What the two kernels of the recurrent form share: tokens, and segments.

A block of the grid has one warpgroup and works on a row, a head and 64 values: it carries the state
`[K, 64]` in registers, in float32, through all tokens, laid out as `hopper.state_vectors` says. A
token is six vectors: those over keys have an entry for each row of the state, those over values one
for each column.

Each step has a code, which says what its token does to the state (`enter`):

    n >= 0     it begins a segment whose state is number n of those stored
    KEEP       it goes on with the state before
    ZERO       it begins a segment that starts from zero
    PADDING    it is none: it reads nothing, changes nothing and outputs zero

Steps count tokens in the order of reading, which `reverse` turns round.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import Place
from pallas_kernels.hopper.state_vectors import (
    KEYS,
    STATE,
    VALUES,
    along_keys,
    along_values,
    read,
)
from pallas_kernels.hopper.target import TILE, Target, as_computed
from pallas_kernels.hopper.tiles import LOG2E, choose

CHECKPOINT = 8
"""Tokens between two states that are kept for the backward."""

KEEP, ZERO, PADDING = -1, -2, -3


@dataclasses.dataclass(frozen=True)
class Form:
    """Which form of the operator is compiled.

    Attributes:
      target: what the kernels are compiled for.
      scale: factor on the outputs.
      fused: whether kk and alpha are given, from which a and b are to be made.
      reverse: whether the last token is read first.
    """

    target: Target
    scale: float = 1.0
    fused: bool = False
    reverse: bool = False

    def position(self, step: Any, T: int) -> Any:
        """Which of T tokens a step reads."""
        return T - 1 - step if self.reverse else step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """Segments, as the kernels need them.

    Attributes:
      enter: `[B, T]` int32, one of the codes for each step; None if all are KEEP.
      leave: `[B, T]` int32, in which stored state the one after a step belongs, or KEEP; None if
        there is one stored state for each row: the first step starts from it, the last makes it.
    """

    enter: jax.Array | None = None
    leave: jax.Array | None = None


class Token(NamedTuple):
    """What a step reads, in registers.

    Attributes:
      r: `[K]`.
      log_decay: likewise.
      k: likewise.
      v: `[64]`.
      x: `[K]`, a, or kk.
      y: `[K]`, b, or alpha.
      code: what it does to the state; None for KEEP.
    """

    r: jax.Array
    log_decay: jax.Array
    k: jax.Array
    v: jax.Array
    x: jax.Array
    y: jax.Array
    code: jax.Array | None


class Factors(NamedTuple):
    """A token as the recurrence has it, in float32.

    Attributes:
      r: `[K]`.
      decay: likewise.
      k: likewise.
      v: `[64]`.
      a: `[K]`.
      b: `[K]`.
    """

    r: jax.Array
    decay: jax.Array
    k: jax.Array
    v: jax.Array
    a: jax.Array
    b: jax.Array


@dataclasses.dataclass(frozen=True)
class Memory:
    """Loads and stores of a block of the grid.

    Attributes:
      place: row, head and which 64 of the values.
    """

    place: Place

    def state_of(self, states: Any, index: Any) -> Any:
        """A state among those of a row and head in global memory, `[B, N, H, K, V]`."""
        row, head, part = self.place
        return states.at[row, index, head, :, pl.ds(part * TILE, TILE)]

    def load_state(self, state: Any) -> jax.Array:
        """A state `[K, 64]` from global or shared memory."""
        return _load(state, STATE)

    def keys_of(self, array: Any, position: Any) -> Any:
        """The keys of a token in an array `[B, T, H, K]`."""
        row, head, _ = self.place
        return array.at[row, position, head]

    def values_of(self, array: Any, position: Any) -> Any:
        """The values of a token in an array `[B, T, H, V]`."""
        row, head, part = self.place
        return array.at[row, position, head, pl.ds(part * TILE, TILE)]

    def load_values(self, array: Any, position: Any) -> jax.Array:
        """A vector `[64]`."""
        return _load(self.values_of(array, position), VALUES)

    def load_token(self, inputs: Sequence[Any], codes: Codes, form: Form, step: Any) -> Token:
        """Starts the loads of what a step reads from r, log_decay, k, v, x, y."""
        r, log_decay, k, v, x, y = inputs
        position = form.position(step, r.shape[1])

        def load_keys(array):
            return _load(self.keys_of(array, position), KEYS)

        return Token(
            r=load_keys(r),
            log_decay=load_keys(log_decay),
            k=load_keys(k),
            v=self.load_values(v, position),
            x=load_keys(x),
            y=load_keys(y),
            code=None if codes.enter is None else as_computed(codes.enter[self.place[0], step]),
        )

    def zero_state(self, K: int) -> jax.Array:
        """Zeros `[K, 64]`."""
        return plgpu.layout_cast(jnp.zeros((K, TILE), jnp.float32), STATE)

    def zero_keys(self, K: int) -> jax.Array:
        """Zeros `[K]`."""
        return plgpu.layout_cast(jnp.zeros(K, jnp.float32), KEYS)

    def zero_values(self) -> jax.Array:
        """Zeros `[64]`."""
        return plgpu.layout_cast(jnp.zeros(TILE, jnp.float32), VALUES)

    def enter(self, state: jax.Array, token: Token, codes: Codes, initial: Any) -> jax.Array:
        """The state that a token reads, given the one before, if it is none of padding."""
        code = token.code
        if code is None:
            return state
        if codes.leave is None:
            return choose(code == ZERO, jnp.zeros_like(state), state)
        return jax.lax.cond(
            code >= 0,
            lambda: self.load_state(self.state_of(initial, jnp.maximum(code, 0))),
            lambda: state,
        )


def _load(ref: Any, layout: Any) -> jax.Array:
    return as_computed(plgpu.load(ref, layout=layout, optimized=False))


def factors_of(token: Token, form: Form) -> Factors:
    """What the recurrence has of a token."""
    r, log_decay, k, v, x, y = (array.astype(jnp.float32) for array in token[:6])
    a, b = (-x, x * y) if form.fused else (x, y)
    return Factors(r, jnp.exp2(log_decay * LOG2E), k, v, a, b)


def update(state: jax.Array, token: Factors) -> tuple[jax.Array, jax.Array]:
    """The state after a token, and `state^T a` of the one before."""
    removed = read(state, token.a)
    state = (
        along_keys(token.decay, state) * state
        + along_keys(token.b, state) * along_values(removed, state)
        + along_keys(token.k, state) * along_values(token.v, state)
    )
    return state, removed


def unless_padding[State](
    token: Token,
    work: Callable[[State], State],
    skip: Callable[[State], State],
    state: State,
) -> State:
    """Does the work of a step, or what is left of it if its token is padding."""
    if token.code is None:
        return work(state)
    return jax.lax.cond(token.code == PADDING, skip, work, state)
