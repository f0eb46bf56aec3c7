"""The token shift and its gradients on Hopper GPUs, each in one pass over memory.

A block works on the same channels of tokens that follow one another, in the order of `token_walk`,
so that it has the token before in registers. No warpgroup waits for another.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import token_tiles
from pallas_kernels.hopper.grid import divide
from pallas_kernels.hopper.target import TILE, target_in_context
from pallas_kernels.hopper.token_plan import MOST_REGISTERS, Plan
from pallas_kernels.hopper.token_walk import Walk, blocks_in_order, no_step, order_of
from pallas_kernels.hopper.whole_tokens import WIDTH, Tokens
from pallas_kernels.operators.token_shift.reference import (
    add_to_last_token,
    last_position,
    take_tokens,
)
from pallas_kernels.types import SegmentIds

KERNEL_UNITS = {"C": TILE}

_TOKENS_OF_CHUNK = 2
"""A block mixes so many tokens. It loads them, and one more, before it stores any mix."""

_TOKENS_OF_CHUNK_BACKWARD = 256
"""With more tokens, fewer are read twice; with fewer, what blocks write lies closer together."""

_MOST_AHEAD = 3
"""Most steps that copies are ahead of the work. Four slots take few instructions to count."""


def token_shift_mix_mosaic_gpu(
    x: Float[Array, "B T C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
) -> tuple[tuple[Float[Array, "B T C"], ...], Float[Array, "B C"]]:
    """Computes `pallas_kernels.token_shift_mix`, which documents the arguments.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64.
    """
    token_tiles.check_served(x=x)
    count, (B, T, C) = len(mixes), x.shape
    blocks = blocks_in_order(B * T, _TOKENS_OF_CHUNK)
    walk = Walk(B * T, T, blocks, _TOKENS_OF_CHUNK)
    tokens = Tokens(B * T, C, blocks, columns=-(-C // WIDTH))

    def body(x_gmem, mixes_gmem, state_gmem, order_gmem, *mixed_gmem):
        mixes = [tokens.load_parameter(mixes_gmem.at[m]) for m in range(count)]

        def mix_chunk(turn, _):
            steps = [walk.step_of_chunk(turn, n, order_gmem) for n in range(1 + walk.chunk)]
            places = [jnp.where(step.is_token, step.place, tokens.count) for step in steps]
            read = [tokens.load(x_gmem, place) for place in places]
            for before, token, step in zip(read[:-1], read[1:], steps[1:], strict=True):
                start = None if state_gmem is None else tokens.load(state_gmem, walk.state_of(step))
                difference = tokens.where(step.continues, before, start) - token
                place = jnp.where(step.is_own, step.place, tokens.count)
                for mix, gmem in zip(mixes, mixed_gmem, strict=True):
                    tokens.store(gmem, place, token + difference * mix, streams=True)

        jax.lax.fori_loop(0, walk.turns(), mix_chunk, None)

    kernel = target_in_context().kernel(
        body,
        name="token_shift_mix",
        out_type=(jax.ShapeDtypeStruct((B * T, C), x.dtype),) * count,
        grid={"column": tokens.columns, "block": walk.blocks},
        scratch_types=(),
    )
    order = None if segment_ids is None else order_of(segment_ids)
    mixed = kernel(x.reshape(B * T, C), mixes.astype(jnp.float32), state, order)
    return tuple(mix.reshape(x.shape) for mix in mixed), _new_state(x, state, segment_ids)


def _new_state(
    x: Float[Array, "B T C"], state: Float[Array, "B C"] | None, segment_ids: SegmentIds | None
) -> Float[Array, "B C"]:
    if segment_ids is None:
        return x[:, -1]
    last = last_position(segment_ids)[:, None]
    before = jnp.zeros_like(x[:, 0]) if state is None else state
    return jnp.where(last < 0, before, take_tokens(x, last)[:, 0])


def token_shift_mix_backward_mosaic_gpu(
    x: Float[Array, "B T C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    *,
    cotangents: tuple[Sequence[Float[Array, "B T C"]], Float[Array, "B C"]],
) -> tuple[Float[Array, "B T C"], Float[Array, "M C"], Float[Array, "B C"] | None, None]:
    """Returns the gradients of x, mixes and state, and None for the segment ids.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64.
    """
    token_tiles.check_served(x=x)
    dnew_state = cotangents[1]
    dmixed = tuple(gradient.astype(x.dtype) for gradient in cotangents[0])
    count, C = len(mixes), x.shape[2]
    target = target_in_context()
    plan = Plan.of(
        target,
        x,
        registers=min(MOST_REGISTERS, 56 + 26 * count),
        arrays=1 + count,
        ahead=_MOST_AHEAD,
        chunk=_TOKENS_OF_CHUNK_BACKWARD,
        after=1,
        in_columns=True,
    )
    tokens, walk, ring = plan.tokens, plan.walk, plan.ring

    def body(
        x_gmem, dmixed_gmem, mixes_gmem, state_gmem, order_gmem, dx_gmem, dmixes_gmem, **scratch
    ):
        slots, loaded = scratch["slots"], scratch["loaded"]
        mixes = [tokens.load_parameter(mixes_gmem.at[m]) for m in range(count)]
        steps = walk.steps()

        def read(number):
            return walk.step(number, steps, order_gmem)

        def fetch(number, step):
            plan.copy(number, loaded, slots, [x.at[step.to_copy] for x in (x_gmem, *dmixed_gmem)])

        def read_for(number):
            return read(number), read(number + plan.ahead)

        def read_early(number):  # what memory tells; the rest takes few instructions
            return None if order_gmem is None else read_for(number)

        plan.fill(lambda n: fetch(n, read(n)), steps)

        def add_token(number, carry):
            of_before, before, rest, dmixes, reads = carry
            step, ahead = reads or read_for(number)
            plgpu.barrier_wait(ring.loaded(loaded, number))
            plan.refill(lambda n: fetch(n, ahead), number, steps)
            slot = slots.at[ring.slot(number)]

            def load(index):
                loaded = tokens.load_shared(slot, index)
                # Whatever stands in padding.
                return loaded if order_gmem is None else tokens.where(step.is_token, loaded)

            token = load(0)
            start = None if state_gmem is None else plan.load_state(state_gmem, step)
            difference = tokens.where(step.continues, before, start) - token
            difference = tokens.where(step.is_own, difference)
            gradient = load(1)
            of_token, of_shifted = gradient, gradient * mixes[0]
            new_dmixes = [dmixes[0] + gradient * difference]
            for m in range(1, count):  # one after another, for want of registers
                gradient = load(1 + m)
                of_token, of_shifted = of_token + gradient, of_shifted + gradient * mixes[m]
                new_dmixes.append(dmixes[m] + gradient * difference)
            dx = rest + tokens.where(step.continues, of_shifted)
            row, in_row = divide(of_before.to_copy, walk.length)
            in_row = jnp.where(of_before.is_own, in_row, tokens.count)
            tokens.store(dx_gmem.at[row], in_row, dx)
            return step, token, of_token - of_shifted, new_dmixes, read_early(number + 1)

        zeros = tokens.zeros()
        carry = no_step(), zeros, zeros, [zeros] * count, read_early(jnp.int32(0))
        dmixes = jax.lax.fori_loop(0, steps, add_token, carry)[3]
        block = jax.lax.axis_index("block")
        for m, total in enumerate(dmixes):
            tokens.store_sums(dmixes_gmem.at[block, m], total)

    kernel = target.kernel(
        body,
        name="token_shift_mix_backward",
        out_type=(
            # Not flat: the compiler would copy what it reshapes, to add to single tokens of it.
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((walk.blocks, count, C), jnp.float32),
        ),
        grid=plan.grid,
        scratch_types=plan.scratch_types(),
    )
    dx, dmixes = kernel(
        plan.copyable(x),
        [plan.copyable(gradient) for gradient in dmixed],
        mixes.astype(jnp.float32),
        state,
        None if segment_ids is None else order_of(segment_ids),
    )
    dx, dstate = _add_of_states(dx, mixes, state, segment_ids, dmixed, dnew_state)
    return dx, dmixes.sum(0), dstate, None


def _add_of_states(
    dx: Float[Array, "B T C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    dmixed: Sequence[Float[Array, "B T C"]],
    dnew_state: Float[Array, "B C"],
) -> tuple[Float[Array, "B T C"], Float[Array, "B C"] | None]:
    """Adds what the new state contributes to dx, and returns the gradient of the state, too."""
    dx = add_to_last_token(dx, dnew_state, segment_ids)
    if state is None:
        return dx, None
    rows, first, empty = jnp.arange(len(dx)), jnp.zeros(len(dx), jnp.int32), None
    if segment_ids is not None:
        valid = segment_ids != 0
        first, empty = jnp.argmax(valid, axis=1), ~valid.any(1)
    dstate = jnp.zeros(state.shape, jnp.float32)
    for gradient, mix in zip(dmixed, mixes.astype(jnp.float32), strict=True):
        dstate += gradient[rows, first] * mix[None]
    if empty is not None:
        dstate = jnp.where(empty[:, None], dnew_state, dstate)
    return dx, dstate.astype(state.dtype)


__all__ = ["KERNEL_UNITS", "token_shift_mix_backward_mosaic_gpu", "token_shift_mix_mosaic_gpu"]
