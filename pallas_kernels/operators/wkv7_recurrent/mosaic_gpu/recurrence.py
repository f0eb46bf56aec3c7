"""Tokens, segments and the update of the state, for both kernels of the recurrent form.

A block of the grid has one warpgroup and works on one row, one head and 64 values. It carries the
state `[K, 64]` through all tokens, in registers, in float32; `hopper.state_vectors` explains the
layout. A token is six vectors: a vector over keys has an entry for each row of the state, a vector
over values has one for each column.

Each step has a code that says what its token does to the state:

    n >= 0     it begins a segment, which starts from stored state number n
    KEEP       it goes on with the state before
    ZERO       it begins a segment, which starts from zero
    PADDING    it is padding: it reads nothing, changes nothing and outputs zero

Steps count tokens in the order of reading; in a reversed call the first step reads the last token.
"""

import dataclasses
from collections.abc import Callable
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
from pallas_kernels.operators.wkv7_recurrent.call import RecurrentInputs, removal_pair

CHECKPOINT = 8
"""Number of tokens between two states that the forward keeps for the backward."""

KEEP, ZERO, PADDING = -1, -2, -3


@dataclasses.dataclass(frozen=True)
class Form:
    """Which form of the operator is compiled.

    Attributes:
      target: what the kernels are compiled for.
      scale: factor on the outputs.
      fused: whether kk and alpha are given instead of a and b.
      reverse: whether the last token is read first.
    """

    target: Target
    scale: float = 1.0
    fused: bool = False
    reverse: bool = False

    def position(self, step: Any, T: int) -> Any:
        """Returns the position of the token that a step reads, in a row of T."""
        return T - 1 - step if self.reverse else step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """What each step does to the state, and where it stores the state.

    Attributes:
      enter: `[B, T]` int32, the code of each step; None if all are KEEP.
      leave: `[B, T]` int32, the number of the stored state that a step's state replaces, or KEEP.
        None if each row has one stored state: the first step starts from it, the last replaces it.
    """

    enter: jax.Array | None = None
    leave: jax.Array | None = None


class Token(NamedTuple):
    """What a step reads, in registers, in the dtypes of the inputs.

    Attributes:
      r: `[K]`.
      log_decay: `[K]`.
      k: `[K]`.
      v: `[64]`.
      removal: `[K]`, a; or kk, in the fused form.
      replacement: `[K]`, b; or alpha, in the fused form.
      code: the code of the step; None for KEEP.
    """

    r: jax.Array
    log_decay: jax.Array
    k: jax.Array
    v: jax.Array
    removal: jax.Array
    replacement: jax.Array
    code: jax.Array | None


class Factors(NamedTuple):
    """A token in float32, with the decay itself, and a and b in every form.

    Attributes:
      r: `[K]`.
      decay: `[K]`.
      k: `[K]`.
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
      place: the row, the head and the block of 64 values that the block of the grid works on.
    """

    place: Place

    def state_of(self, states: Any, index: Any) -> Any:
        """Returns a reference to state `index`, `[K, 64]`, in an array `[B, N, H, K, V]`."""
        row, head, value_block = self.place
        return states.at[row, index, head, :, pl.ds(value_block * TILE, TILE)]

    def load_state_columns(self, state: Any) -> jax.Array:
        """Loads 64 columns of a state, `[K, 64]`, from global or shared memory."""
        return _load(state, STATE)

    def keys_of(self, array: Any, position: Any) -> Any:
        """Returns a reference to the keys of a token, `[K]`, in an array `[B, T, H, K]`."""
        row, head, _ = self.place
        return array.at[row, position, head]

    def values_of(self, array: Any, position: Any) -> Any:
        """Returns a reference to the values of a token, `[64]`, in an array `[B, T, H, V]`."""
        row, head, value_block = self.place
        return array.at[row, position, head, pl.ds(value_block * TILE, TILE)]

    def load_values(self, array: Any, position: Any) -> jax.Array:
        """Loads the values of a token, `[64]`, from an array `[B, T, H, V]`."""
        return _load(self.values_of(array, position), VALUES)

    def load_token(self, inputs: RecurrentInputs, codes: Codes, form: Form, step: Any) -> Token:
        """Starts to load what a step reads."""
        position = form.position(step, inputs.r.shape[1])

        def load_keys(array):
            return _load(self.keys_of(array, position), KEYS)

        return Token(
            r=load_keys(inputs.r),
            log_decay=load_keys(inputs.log_decay),
            k=load_keys(inputs.k),
            v=self.load_values(inputs.v, position),
            removal=load_keys(inputs.removal),
            replacement=load_keys(inputs.replacement),
            code=None if codes.enter is None else as_computed(codes.enter[self.place.row, step]),
        )

    def zero_state(self, K: int) -> jax.Array:
        """Returns zeros `[K, 64]`."""
        return plgpu.layout_cast(jnp.zeros((K, TILE), jnp.float32), STATE)

    def zero_keys(self, K: int) -> jax.Array:
        """Returns zeros `[K]`."""
        return plgpu.layout_cast(jnp.zeros(K, jnp.float32), KEYS)

    def zero_values(self) -> jax.Array:
        """Returns zeros `[64]`."""
        return plgpu.layout_cast(jnp.zeros(TILE, jnp.float32), VALUES)

    def enter(self, state: jax.Array, token: Token, codes: Codes, initial: Any) -> jax.Array:
        """Returns the state that a token reads, given the state before it; not for padding."""
        code = token.code
        if code is None:
            return state
        if codes.leave is None:
            return choose(code == ZERO, jnp.zeros_like(state), state)
        return jax.lax.cond(
            code >= 0,
            lambda: self.load_state_columns(self.state_of(initial, jnp.maximum(code, 0))),
            lambda: state,
        )


def _load(ref: Any, layout: Any) -> jax.Array:
    return as_computed(plgpu.load(ref, layout=layout, optimized=False))


def factors_of(token: Token, form: Form) -> Factors:
    """Converts a loaded token to the numbers that the recurrence computes with."""
    r, log_decay, k, v, *pair = (array.astype(jnp.float32) for array in token[:6])
    a, b = removal_pair(*pair, fused=form.fused)
    return Factors(r, jnp.exp2(log_decay * LOG2E), k, v, a, b)


def update(state: jax.Array, token: Factors) -> tuple[jax.Array, jax.Array]:
    """Returns the state after a token, and `state^T a` of the state before."""
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
    """Runs `work` on the state, or `skip` if the token is padding."""
    if token.code is None:
        return work(state)
    return jax.lax.cond(token.code == PADDING, skip, work, state)
