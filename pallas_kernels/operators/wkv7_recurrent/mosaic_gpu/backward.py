"""Gradients of the recurrent form, token by token, from the last step to the first.

The forward kept the state before every eighth step. Those between are computed again, eight steps
at a time, into shared memory. Then each step takes the gradient of the state after it to that of
the state before, and to those of its token. With S before, S' after, dS' the gradient of S',

    dS' += r (scale do)^T        d = dS'^T b                     what was removed, a^T S, gets d
    dr  = scale S' do            dlog_decay = decay rowsum(S dS')
    dk  = dS' v    dv = dS'^T k    da = S d    db = dS' (S^T a)
    dS  = diag(decay) dS' + a d^T

The sums over values cross warps, which have to wait for each other; the chain from step to step has
sums over keys only, which do not.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.grid import grid_place
from pallas_kernels.hopper.state_vectors import along_keys, along_values, read
from pallas_kernels.hopper.target import TILE
from pallas_kernels.hopper.tiles import choose
from pallas_kernels.operators.wkv7_recurrent.mosaic_gpu.recurrence import (
    CHECKPOINT,
    KEEP,
    Codes,
    Factors,
    Form,
    Memory,
    factors_of,
    unless_padding,
    update,
)

_REDUCTION_SCRATCH_BYTES = 2048


def recurrent_gradients(
    form: Form,
    inputs: tuple[jax.Array, ...],
    initial_state: jax.Array | None,
    codes: Codes,
    entries: jax.Array,
    do: jax.Array,
    d_final: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Gradients of the inputs and of the initial states.

    Args:
      form: what to compile.
      inputs: of `recurrent_outputs`.
      initial_state: likewise.
      codes: likewise.
      entries: its last result.
      do: like v, gradients of its outputs.
      d_final: `[B, N, H, K, V]` float32, those of the final states.

    Returns:
      The gradients of the inputs, in their dtypes; those of the initial states, like `d_final`, not
      written where no step enters one.
    """
    r, _, _, v, _, _ = inputs
    (B, T, H, K), V = r.shape, v.shape[-1]
    blocks, parts = -(-T // CHECKPOINT), V // TILE

    def body(inputs, initial, codes, entries, do, d_final, d_keys, dv, d_initial, states):
        memory = Memory(grid_place())
        row, head, part = memory.place

        def state_before(block, i):
            """The state that step i of a block comes upon."""
            return jax.lax.cond(
                i == 0,
                lambda: memory.load_state(memory.state_of(entries, block)),
                lambda: memory.load_state(states.at[jnp.maximum(i - 1, 0)]),
            )

        def advance(block, i, state):
            token = memory.load_token(inputs, codes, form, block * CHECKPOINT + i)

            def read_token(state):
                state = memory.enter(state, token, codes, initial)
                return update(state, factors_of(token, form))[0]

            state = unless_padding(token, read_token, lambda state: state, state)
            states.at[i][...] = state
            return state

        def step_back(block, i, d_state):
            step = block * CHECKPOINT + i
            position = form.position(step, T)
            token = memory.load_token(inputs, codes, form, step)

            def write(d_of_keys, dv_value):
                for array, value in zip(d_keys, d_of_keys, strict=True):
                    array.at[part, row, position, head][...] = value
                memory.values_of(dv, position)[...] = dv_value

            def read_token_back(d_state):
                before = memory.enter(state_before(block, i), token, codes, initial)
                t = factors_of(token, form)
                do_value = form.scale * memory.load_values(do, position).astype(jnp.float32)
                d_state, d_of_keys, dv_value = transpose_update(before, d_state, t, do_value)
                if form.fused:
                    kk, alpha = token.x.astype(jnp.float32), token.y.astype(jnp.float32)
                    *others, da, db = d_of_keys
                    d_of_keys = (*others, alpha * db - da, kk * db)
                write(d_of_keys, dv_value)
                return entered(d_state, token.code)

            def skip_token_back(d_state):
                write([memory.zero_keys(K)] * len(d_keys), memory.zero_values())
                return d_state

            d_state = left(d_state, step)
            return unless_padding(token, read_token_back, skip_token_back, d_state)

        def left(d_state, step):
            """Adds the gradient of the stored state that a step left, if it left one."""
            if codes.leave is None:
                return d_state
            slot = codes.leave[row, step]
            return jax.lax.cond(
                slot != KEEP,
                lambda: d_state + memory.load_state(memory.state_of(d_final, jnp.maximum(slot, 0))),
                lambda: d_state,
            )

        def entered(d_state, code):
            """The gradient of the state that the step before left, given that of what was read."""
            if code is None:
                return d_state
            if codes.leave is not None:

                @pl.when(code >= 0)
                def _():
                    memory.state_of(d_initial, code)[...] = d_state

            return choose(code == KEEP, d_state, jnp.zeros_like(d_state))

        def block_back(index, d_state):
            block = blocks - 1 - index
            steps = jnp.minimum(T - block * CHECKPOINT, CHECKPOINT)
            jax.lax.fori_loop(
                0,
                steps - 1,
                lambda i, state: advance(block, i, state),
                memory.load_state(memory.state_of(entries, block)),
            )
            return jax.lax.fori_loop(
                0, steps, lambda j, d_state: step_back(block, steps - 1 - j, d_state), d_state
            )

        if codes.leave is None:
            d_state = memory.load_state(memory.state_of(d_final, 0))
        else:
            d_state = memory.zero_state(K)
        d_state = jax.lax.fori_loop(0, blocks, block_back, d_state)
        if codes.leave is None:
            memory.state_of(d_initial, 0)[...] = d_state

    of_keys = jax.ShapeDtypeStruct((parts, B, T, H, K), jnp.float32)
    kernel = form.target.kernel(
        body,
        name="wkv7_recurrent_gradients",
        out_type=(
            (of_keys,) * 5,
            jax.ShapeDtypeStruct(v.shape, jnp.float32),
            jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        ),
        grid={"value_block": parts, "head": H, "row": B},
        scratch_types=[plgpu.SMEM((CHECKPOINT - 1, K, TILE), jnp.float32)],
        reduction_scratch_bytes=_REDUCTION_SCRATCH_BYTES,
    )
    d_keys, dv, d_initial = kernel(inputs, initial_state, codes, entries, do, d_final)
    dr, dw, dk, dx, dy = (x.sum(axis=0) for x in d_keys)
    gradients = (dr, dw, dk, dv, dx, dy)
    return tuple(d.astype(x.dtype) for d, x in zip(gradients, inputs, strict=True)), d_initial


def transpose_update(
    before: jax.Array, d_state: jax.Array, token: Factors, do: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """The transpose of `update` and of reading what it made.

    Args:
      before: `[K, 64]`, the state that the token read.
      d_state: `[K, 64]`, the gradient of the state after it.
      token: as the recurrence has it.
      do: `[64]`, the gradient of `after^T r`.

    Returns:
      The gradient of `before`; those of r, log_decay, k, a, b, `[K]`, of these values; that of v.
    """

    def of_keys(state, values):
        return jnp.sum(state * along_values(values, state), axis=1)

    after, removed = update(before, token)
    d_state = d_state + along_keys(token.r, d_state) * along_values(do, d_state)
    d_removed = read(d_state, token.b)
    d_of_keys = (
        of_keys(after, do),
        token.decay * jnp.sum(before * d_state, axis=1),
        of_keys(d_state, token.v),
        of_keys(before, d_removed),
        of_keys(d_state, removed),
    )
    dv = read(d_state, token.k)
    d_before = along_keys(token.decay, d_state) * d_state
    d_before += along_keys(token.a, d_state) * along_values(d_removed, d_state)
    return d_before, d_of_keys, dv
