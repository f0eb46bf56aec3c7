"""Outputs and states of the recurrent form, token by token.

For one token the kernel does little but copy the state: for each head it reads and writes 16 KiB of
state and 1 KiB of vectors. So all loads of a step are under way before the first number is used,
the loads of the next token are under way while a token is worked on, and several blocks of the grid
share a multiprocessor.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.hopper.grid import grid_place
from pallas_kernels.hopper.state_vectors import read
from pallas_kernels.hopper.target import TILE
from pallas_kernels.operators.wkv7_recurrent.call import RecurrentInputs
from pallas_kernels.operators.wkv7_recurrent.mosaic_gpu.recurrence import (
    CHECKPOINT,
    KEEP,
    Codes,
    Form,
    Memory,
    factors_of,
    unless_padding,
    update,
)


def recurrent_outputs(
    form: Form,
    inputs: RecurrentInputs,
    initial_state: jax.Array | jax.Ref | None,
    codes: Codes,
    *,
    save: bool,
) -> tuple[jax.Array, ...]:
    """Computes outputs and final states, and what the backward needs.

    Args:
      form: which form of the operator to compile.
      inputs: of the operator.
      initial_state: `[B, N, H, K, V]` float32. Where each row has one state, it may be None for
        zeros, or a reference, which the kernel then overwrites with the final state.
      codes: the codes of the steps.
      save: whether to return the states before every eighth step.

    Returns:
      The outputs, `[B, T, H, V]` in the dtype of v.
      The final states, `[B, N, H, K, V]` float32, not written for a state that no step leaves;
      None if they are in the reference.
      The states before every eighth step, `[B, ceil(T / 8), H, K, V]` float32; None without `save`.
    """
    v = inputs.v
    (B, T, H, K), V = inputs.r.shape, v.shape[-1]
    N = 1 if initial_state is None else initial_state.shape[1]
    in_place = initial_state is not None and isinstance(initial_state, jax.Ref)

    def body(inputs, initial, codes, o, final, entries):
        memory = Memory(grid_place())
        final = initial if in_place else final

        def load_token(step):
            return memory.load_token(inputs, codes, form, step)

        def write_output(step, values):
            memory.values_of(o, form.position(step, T))[...] = values.astype(v.dtype)

        def advance(step, token, state):
            if save:

                @pl.when(jax.lax.rem(step, jnp.int32(CHECKPOINT)) == 0)
                def _():
                    memory.state_of(entries, step // CHECKPOINT)[...] = state

            def read_token(state):
                state = memory.enter(state, token, codes, initial)
                factors = factors_of(token, form)
                state, _ = update(state, factors)
                write_output(step, form.scale * read(state, factors.r))
                return state

            def skip_token(state):
                write_output(step, memory.zero_values())
                return state

            state = unless_padding(token, read_token, skip_token, state)
            if codes.leave is not None:
                slot = codes.leave[memory.place.row, step]

                @pl.when(slot != KEEP)
                def _():
                    memory.state_of(final, slot)[...] = state

            return state

        def advance_and_load(step, carry):
            token, state = carry
            following = load_token(step + 1)
            return following, advance(step, token, state)

        token = load_token(jnp.int32(0))
        if initial is None or codes.leave is not None:
            state = memory.zero_state(K)
        else:
            state = memory.load_state_columns(memory.state_of(initial, 0))
        token, state = jax.lax.fori_loop(0, T - 1, advance_and_load, (token, state))
        state = advance(jnp.int32(T - 1), token, state)
        if codes.leave is None:
            memory.state_of(final, 0)[...] = state

    states = jax.ShapeDtypeStruct((B, N, H, K, V), jnp.float32)
    entries = jax.ShapeDtypeStruct((B, -(-T // CHECKPOINT), H, K, V), jnp.float32)
    outputs = (
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        None if in_place else states,
        entries if save else None,
    )
    kernel = form.target.kernel(
        body,
        name="wkv7_recurrent_outputs",
        out_type=outputs,
        grid={"value_block": V // TILE, "head": H, "row": B},
        scratch_types=[],
    )
    return kernel(inputs, initial_state, codes)


__all__ = ["recurrent_outputs"]
