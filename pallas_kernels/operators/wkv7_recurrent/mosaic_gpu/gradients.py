"""Gradients of the recurrent form, token by token, from the last step to the first.

The forward kept the state before every eighth step. The kernel computes the states between them
again, eight steps at a time, into shared memory. Then each step turns the gradient of the state
after it into the gradient of the state before it, and into the gradients of its token. With S the
state before, S' the state after, and dS' the gradient of S',

    dS' += r (scale do)^T        d = dS'^T b         d is the gradient of what was removed, a^T S
    dr  = scale S' do            dlog_decay = decay rowsum(S dS')
    dk  = dS' v    dv = dS'^T k    da = S d    db = dS' (S^T a)
    dS  = diag(decay) dS' + a d^T

Sums over values cross warps, which have to wait for each other. The chain from step to step has
only sums over keys, which stay within a warp.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import grid_place
from pallas_kernels.hopper.state_vectors import along_keys, along_values, read
from pallas_kernels.hopper.target import TILE
from pallas_kernels.hopper.tiles import choose
from pallas_kernels.operators.wkv7_recurrent.call import RecurrentInputs
from pallas_kernels.operators.wkv7_recurrent.mosaic_gpu.recurrence import (
    CHECKPOINT,
    KEEP,
    Codes,
    Factors,
    Form,
    Memory,
    Token,
    factors_of,
    unless_padding,
    update,
)

_REDUCTION_SCRATCH_BYTES = 2048


class KeyGradients(NamedTuple):
    """Gradients of one token, each `[K]`; or the arrays in global memory that hold them.

    Those arrays are `[V / 64, B, T, H, K]` float32: each block of 64 values adds its part.
    """

    r: Any
    log_decay: Any
    k: Any
    removal: Any
    replacement: Any


@dataclasses.dataclass(frozen=True)
class _StepsBack:
    """The steps of one block of the grid, from the last to the first.

    Attributes:
      form: which form of the operator is compiled.
      memory: loads and stores of this block of the grid.
      inputs: references to the inputs.
      initial: reference to the initial states, or None.
      codes: references to the codes of the steps.
      entries: reference to the states before every eighth step.
      do: reference to the gradients of the outputs.
      dfinal: reference to the gradients of the final states.
      dkeys: references to the gradients over keys.
      dv: reference to the gradient of v.
      dinitial: reference to the gradients of the initial states.
      states_smem: `[7, K, 64]`, the states after the first seven steps of the current eight.
    """

    form: Form
    memory: Memory
    inputs: RecurrentInputs
    initial: Any | None
    codes: Codes
    entries: Any
    do: Any
    dfinal: Any
    dkeys: KeyGradients
    dv: Any
    dinitial: Any
    states_smem: Any

    def run(self) -> None:
        """Takes all steps."""
        _, T, _, K = self.inputs.r.shape
        blocks = -(-T // CHECKPOINT)
        if self.codes.leave is None:
            dstate = self._load(self.dfinal, 0)
        else:
            dstate = self.memory.zero_state(K)
        dstate = jax.lax.fori_loop(
            0, blocks, lambda i, dstate: self._steps_back(blocks - 1 - i, dstate), dstate
        )
        if self.codes.leave is None:
            self.memory.state_of(self.dinitial, 0)[...] = dstate

    def _steps_back(self, block: Any, dstate: jax.Array) -> jax.Array:
        """Takes eight steps, or as many as there are: once forward for the states, then back."""
        T = self.inputs.r.shape[1]
        steps = jnp.minimum(T - block * CHECKPOINT, CHECKPOINT)
        jax.lax.fori_loop(
            0,
            steps - 1,
            lambda i, state: self._advance(block, i, state),
            self._load(self.entries, block),
        )
        return jax.lax.fori_loop(
            0, steps, lambda i, dstate: self._step_back(block, steps - 1 - i, dstate), dstate
        )

    def _load(self, states: Any, index: Any) -> jax.Array:
        return self.memory.load_state_columns(self.memory.state_of(states, index))

    def _load_token(self, step: Any) -> Token:
        return self.memory.load_token(self.inputs, self.codes, self.form, step)

    def _advance(self, block: Any, i: Any, state: jax.Array) -> jax.Array:
        """Computes the state after step i of a block, and keeps it in shared memory."""
        token = self._load_token(block * CHECKPOINT + i)

        def read_token(state):
            state = self.memory.enter(state, token, self.codes, self.initial)
            return update(state, factors_of(token, self.form))[0]

        state = unless_padding(token, read_token, lambda state: state, state)
        self.states_smem.at[i][...] = state
        return state

    def _state_before(self, block: Any, i: Any) -> jax.Array:
        """Returns the state before step i of a block."""
        return jax.lax.cond(
            i == 0,
            lambda: self._load(self.entries, block),
            lambda: self.memory.load_state_columns(self.states_smem.at[jnp.maximum(i - 1, 0)]),
        )

    def _step_back(self, block: Any, i: Any, dstate: jax.Array) -> jax.Array:
        """Writes the gradients of a token; returns the gradient of the state before it."""
        step = block * CHECKPOINT + i
        T, K = self.inputs.r.shape[1], self.inputs.r.shape[-1]
        position = self.form.position(step, T)
        token = self._load_token(step)

        def read_token_back(dstate):
            state = self._state_before(block, i)
            before = self.memory.enter(state, token, self.codes, self.initial)
            factors = factors_of(token, self.form)
            do = self.form.scale * self.memory.load_values(self.do, position).astype(jnp.float32)
            dstate, dkeys, dv = transpose_update(before, dstate, factors, do)
            if self.form.fused:
                kk, alpha = (x.astype(jnp.float32) for x in (token.removal, token.replacement))
                da, db = dkeys.removal, dkeys.replacement
                dkeys = dkeys._replace(removal=alpha * db - da, replacement=kk * db)
            self._write(position, dkeys, dv)
            return self._restart(dstate, token.code)

        def skip_token_back(dstate):
            zeros = [self.memory.zero_keys(K)] * len(self.dkeys)
            self._write(position, zeros, self.memory.zero_values())
            return dstate

        dstate = self._add_stored(dstate, step)
        return unless_padding(token, read_token_back, skip_token_back, dstate)

    def _write(self, position: Any, dkeys: Sequence[jax.Array], dv: jax.Array) -> None:
        row, head, value_block = self.memory.place
        for array, value in zip(self.dkeys, dkeys, strict=True):
            array.at[value_block, row, position, head][...] = value
        self.memory.values_of(self.dv, position)[...] = dv

    def _add_stored(self, dstate: jax.Array, step: Any) -> jax.Array:
        """Adds the gradient of the final state that a step stored, if it stored one."""
        if self.codes.leave is None:
            return dstate
        slot = self.codes.leave[self.memory.place.row, step]
        return jax.lax.cond(
            slot != KEEP,
            lambda: dstate + self._load(self.dfinal, jnp.maximum(slot, 0)),
            lambda: dstate,
        )

    def _restart(self, dstate: jax.Array, code: jax.Array | None) -> jax.Array:
        """Stores the gradient of an initial state, if the step began a segment.

        Returns:
          The gradient to carry to the step before: zero, if the step began a segment.
        """
        if code is None:
            return dstate
        if self.codes.leave is not None:

            @pl.when(code >= 0)
            def _():
                self.memory.state_of(self.dinitial, code)[...] = dstate

        return choose(code == KEEP, dstate, jnp.zeros_like(dstate))


def recurrent_gradients(
    form: Form,
    inputs: RecurrentInputs,
    initial_state: jax.Array | None,
    codes: Codes,
    entries: jax.Array,
    do: jax.Array,
    dfinal: jax.Array,
) -> tuple[RecurrentInputs, jax.Array]:
    """Computes the gradients of the inputs and of the initial states.

    Args:
      form: which form of the operator to compile.
      inputs: the inputs of `recurrent_outputs`.
      initial_state: `[B, N, H, K, V]` float32, or None for zeros.
      codes: the codes of the steps.
      entries: `[B, ceil(T / 8), H, K, V]` float32, the states before every eighth step.
      do: `[B, T, H, V]`, the gradient of the outputs.
      dfinal: `[B, N, H, K, V]` float32, the gradients of the final states.

    Returns:
      The gradients of the inputs, in their dtypes. The gradients of the initial states, like
      `dfinal`; they are not written for a state that no step enters.
    """
    (B, T, H, K), V = inputs.r.shape, inputs.v.shape[-1]
    value_blocks = V // TILE

    def body(inputs, initial, codes, entries, do, dfinal, dkeys, dv, dinitial, states_smem):
        memory = Memory(grid_place())
        _StepsBack(
            form, memory, inputs, initial, codes, entries, do, dfinal, dkeys, dv, dinitial,
            states_smem,
        ).run()  # fmt: skip

    over_keys = jax.ShapeDtypeStruct((value_blocks, B, T, H, K), jnp.float32)
    kernel = form.target.kernel(
        body,
        name="wkv7_recurrent_gradients",
        out_type=(
            KeyGradients(*(over_keys,) * 5),
            jax.ShapeDtypeStruct(inputs.v.shape, jnp.float32),
            jax.ShapeDtypeStruct(dfinal.shape, jnp.float32),
        ),
        grid={"value_block": value_blocks, "head": H, "row": B},
        scratch_types=[plgpu.SMEM((CHECKPOINT - 1, K, TILE), jnp.float32)],
        reduction_scratch_bytes=_REDUCTION_SCRATCH_BYTES,
    )
    dkeys, dv, dinitial = kernel(inputs, initial_state, codes, entries, do, dfinal)
    over_blocks = KeyGradients(*(x.sum(axis=0) for x in dkeys))
    gradients = RecurrentInputs(**over_blocks._asdict(), v=dv)
    return jax.tree.map(lambda d, x: d.astype(x.dtype), gradients, inputs), dinitial


def transpose_update(
    before: jax.Array, dstate: jax.Array, token: Factors, do: jax.Array
) -> tuple[jax.Array, KeyGradients, jax.Array]:
    """Transposes `update` and the reading of the state after it.

    Args:
      before: `[K, 64]`, the state that the token read.
      dstate: `[K, 64]`, the gradient of the state after it.
      token: `[K]` or `[64]`, in float32.
      do: `[64]`, the gradient of `after^T r`.

    Returns:
      The gradient of `before`; the gradients over keys, of a and b as removal and replacement; the
      gradient of v.
    """

    def over_keys(state, values):
        return jnp.sum(state * along_values(values, state), axis=1)

    after, removed = update(before, token)
    dstate = dstate + along_keys(token.r, dstate) * along_values(do, dstate)
    dremoved = read(dstate, token.b)
    dkeys = KeyGradients(
        r=over_keys(after, do),
        log_decay=token.decay * jnp.sum(before * dstate, axis=1),
        k=over_keys(dstate, token.v),
        removal=over_keys(before, dremoved),
        replacement=over_keys(dstate, removed),
    )
    dv = read(dstate, token.k)
    dbefore = along_keys(token.decay, dstate) * dstate
    dbefore += along_keys(token.a, dstate) * along_values(dremoved, dstate)
    return dbefore, dkeys, dv


__all__ = ["recurrent_gradients"]
