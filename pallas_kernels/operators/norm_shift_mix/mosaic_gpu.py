"""The layer norm, token shift and mixes, and their gradients, on Hopper GPUs.

Each direction is one kernel, which passes over memory once. A block reads token after token, in the
order of `token_walk`, so that it has the norm of the token before in registers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.hopper import token_tiles
from pallas_kernels.hopper.grid import divide
from pallas_kernels.hopper.target import target_in_context
from pallas_kernels.hopper.token_plan import MOST_REGISTERS, MOST_WARPGROUPS, Plan
from pallas_kernels.hopper.token_walk import order_of
from pallas_kernels.hopper.whole_tokens import WIDTH
from pallas_kernels.operators.layer_norm.xla import layer_norm_backward
from pallas_kernels.operators.norm_shift_mix.reference import (
    Mixed,
    last_token,
    norm_of_token,
    state_after,
)
from pallas_kernels.operators.token_shift.reference import add_to_last_token
from pallas_kernels.types import SegmentIds

_MOST_AHEAD = 7
_MOST_AHEAD_BACKWARD = 5
"""Most steps that copies are ahead of the work. Eight slots take few instructions to count."""

_TOKENS_OF_CHUNK = 8
_TOKENS_OF_CHUNK_BACKWARD = 64
"""With more tokens, fewer are read twice; with fewer, what blocks write lies closer together."""


def norm_shift_mix_mosaic_gpu(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    *,
    eps: float,
) -> tuple[Mixed, Float[Array, "B C"]]:
    """Computes the first two results of `pallas_kernels.norm_shift_mix`, which documents them.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64, or so many that
        shared memory has no room for them.
    """
    token_tiles.check_served(x=x)
    count, C = len(mixes), x.shape[2]
    target, packed = target_in_context(), segment_ids is not None
    plan = Plan.of(
        target,
        x,
        registers=64 + (16 if packed else 10) * count,
        arrays=1,
        ahead=_MOST_AHEAD,
        chunk=_TOKENS_OF_CHUNK,
        in_order=True,
    )
    tokens, walk, ring = plan.tokens, plan.walk, plan.ring

    def body(x_gmem, norm_gmem, mixes_gmem, state_gmem, order_gmem, *mixed_gmem, **scratch):
        slots, loaded, summed = scratch["slots"], scratch["loaded"], scratch["summed"]
        sums = scratch["sums"]
        scale, bias = (tokens.load_parameter(gmem) for gmem in norm_gmem)
        mixes = [tokens.load_parameter(mixes_gmem.at[m]) for m in range(count)]
        steps = walk.steps()

        def read(number):
            return walk.step(number, steps, order_gmem)

        def read_for(number):
            return read(number), read(number + plan.ahead)

        def read_early(number):  # what memory tells; the rest takes few instructions
            return None if order_gmem is None else read_for(number)

        def fetch(number, step):
            plan.copy(number, loaded, slots, [x_gmem.at[step.to_copy]])

        plan.fill(lambda n: fetch(n, read(n)), steps)

        def mix_token(number, carry):
            before, reads = carry
            step, ahead = reads or read_for(number)
            plgpu.barrier_wait(ring.loaded(loaded, number))
            x = tokens.load_shared(slots.at[ring.slot(number)], 0)
            (total,) = tokens.sum_channels(sums[0], [x], summed)
            plan.refill(lambda n: fetch(n, ahead), number, steps)
            centered = tokens.mask(x - total * (1 / C))
            (square,) = tokens.sum_channels(sums[1], [centered * centered], summed)
            token = centered * jax.lax.rsqrt(square * (1 / C) + eps) * scale + bias
            if order_gmem is not None:
                token = tokens.where(step.is_token, token)
            start = None if state_gmem is None else plan.load_state(state_gmem, step)
            difference = tokens.where(step.continues, before, start) - token

            @pl.when(step.is_own)
            def _():
                for mix, gmem in zip(mixes, mixed_gmem, strict=True):
                    tokens.store(gmem, step.place, token + difference * mix, streams=True)

            return token, read_early(number + 1)

        carry = tokens.zeros(), read_early(jnp.int32(0))
        jax.lax.fori_loop(0, steps, mix_token, carry)

    kernel = target.kernel(
        body,
        name="norm_shift_mix",
        out_type=(plan.flat(x.dtype),) * count,
        grid=plan.grid,
        scratch_types=plan.scratch_types(1, 1),
        warpgroups=tokens.warpgroups,
    )
    order = None if segment_ids is None else order_of(segment_ids)
    parameters = [x.astype(jnp.float32) for x in (scale, bias)], mixes.astype(jnp.float32)
    mixed = kernel(plan.copyable(x), *parameters, state, order)
    normed = norm_of_token(last_token(x, segment_ids), scale, bias, eps)
    new_state = state_after(normed, state, segment_ids)
    return tuple(mix.reshape(x.shape) for mix in mixed), new_state


def has_registers(channels: int) -> bool:
    """Returns whether the parameters of the forward fit into the registers of a block."""
    return channels <= MOST_WARPGROUPS * WIDTH


def has_registers_for_gradients(channels: int, mixes: int) -> bool:
    """Returns whether the sums of the backward fit into the registers of a block."""
    warpgroups = -(-channels // WIDTH)
    return warpgroups * min(MOST_REGISTERS, 96 + 24 * mixes) <= 2 * MOST_REGISTERS


def norm_shift_mix_backward_mosaic_gpu(
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    *,
    cotangents: tuple[Sequence[Float[Array, "B T C"]], Float[Array, "B C"], Float[Array, "B T C"]],
    eps: float,
) -> tuple[
    Float[Array, "B T C"],
    Float[Array, " C"],
    Float[Array, " C"],
    Float[Array, "M C"],
    Float[Array, "B C"] | None,
    None,
]:
    """Returns the gradients of all inputs, and None for the segment ids.

    In a step a block has three tokens: it normalises the following one, reads the gradients of
    mixes of the current one, and finishes the gradient of the one before, to which the current one
    has added its part.

    Raises:
      NotServed: for other dtypes than bfloat16, and channels in no multiple of 64, or so many that
        shared memory has no room for them.
    """
    token_tiles.check_served(x=x)
    dmixed = [gradient.astype(x.dtype) for gradient in cotangents[0]]
    dinput = cotangents[2].astype(x.dtype)
    count, C = len(mixes), x.shape[2]
    target = target_in_context()
    plan = Plan.of(
        target,
        x,
        registers=min(MOST_REGISTERS, 136 + 24 * count),  # more than it needs at least
        arrays=2 + count,
        ahead=_MOST_AHEAD_BACKWARD,
        chunk=_TOKENS_OF_CHUNK_BACKWARD,
        idle=1,
        after=1,
    )
    tokens, walk, ring = plan.tokens, plan.walk, plan.ring

    def body(
        x_gmem,
        gradients_gmem,
        parameters_gmem,
        state_gmem,
        order_gmem,
        dx_gmem,
        sums_gmem,
        **scratch,
    ):
        slots, loaded, summed = scratch["slots"], scratch["loaded"], scratch["summed"]
        sums = scratch["sums"]
        scale, *mixes = (
            tokens.load_parameter(parameters_gmem.at[i]) for i in (0, *range(2, 2 + count))
        )
        dinput_gmem, *dmixed_gmem = gradients_gmem
        steps = walk.steps()

        def read(number):
            return walk.step(number, steps, order_gmem)

        def fetch(number, before, current, following):
            of_current = (gmem.at[current.to_copy] for gmem in dmixed_gmem)
            sources = x_gmem.at[following.to_copy], dinput_gmem.at[before.to_copy], *of_current
            plan.copy(number, loaded, slots, sources)

        def read_three(number):
            return read(number - 1), read(number), read(number + 1)

        def read_for(number):
            return *read_three(number), *read_three(number + plan.ahead)

        def read_early(number):  # what memory tells; the rest takes few instructions
            return None if order_gmem is None else read_for(number)

        plan.fill(lambda n: fetch(n, *read_three(n)), steps)

        def add_token(number, carry):
            before, current, rest, totals, reads = carry
            of_before, of_current, of_following, *ahead = reads or read_for(number)
            (dscale, dbias), dmixes = totals

            plgpu.barrier_wait(ring.loaded(loaded, number))
            slot = slots.at[ring.slot(number)]
            # Both norms have the bias. It counts only where no token comes before.
            counts = of_current.is_own & of_current.is_token
            starts = counts & ~of_current.continues
            start = tokens.load_parameter(parameters_gmem.at[1], starts)
            if state_gmem is not None:
                start = start + plan.load_state(state_gmem, of_current)
            shifted = tokens.where(of_current.continues, before.normed * scale, start)
            difference = tokens.where(counts, shifted - current.normed * scale)
            gradient = tokens.load_shared(slot, 2)
            of_token, of_shifted = gradient, gradient * mixes[0]
            new_dmixes = [dmixes[0] + gradient * difference]
            for m in range(1, count):  # one after another, for want of registers
                gradient = tokens.load_shared(slot, 2 + m)
                of_token, of_shifted = of_token + gradient, of_shifted + gradient * mixes[m]
                new_dmixes.append(dmixes[m] + gradient * difference)
            dnormed = rest + tokens.where(of_current.continues, of_shifted)
            dnormed = tokens.where(of_before.is_own & of_before.is_token, dnormed)
            along = dnormed * before.normed
            totals = (dscale + along, dbias + dnormed), tuple(new_dmixes)
            dnormed *= scale
            x = tokens.load_shared(slot, 0)
            if order_gmem is not None:
                x = tokens.where(of_following.is_token, x)  # whatever stands in padding
            x_total, mean, share = tokens.sum_channels(sums[0], [x, dnormed, along * scale], summed)
            plan.refill(lambda n: fetch(n, *ahead), number, steps)
            centered = tokens.mask(x - x_total * (1 / C))
            (square,) = tokens.sum_channels(sums[1], [centered * centered], summed)
            factor = jax.lax.rsqrt(square * (1 / C) + eps)
            dinput = tokens.load_shared(slot, 1)
            # The gradient of x has neither a mean nor a part along x.
            dx = dnormed - mean * (1 / C) - before.normed * (share * (1 / C))
            row, in_row = divide(of_before.to_copy, walk.length)
            in_row = jnp.where(of_before.is_own, in_row, tokens.count)
            tokens.store(dx_gmem.at[row], in_row, before.factor * dx + dinput)
            return (
                current,
                _Normed(centered * factor, factor),
                of_token - of_shifted,
                totals,
                read_early(number + 1),
            )

        zeros, nothing = tokens.zeros(), _Normed(tokens.zeros(), tokens.zeros())
        carry = (
            nothing,
            nothing,
            zeros,
            ((zeros, zeros), (zeros,) * count),
            read_early(jnp.int32(0)),
        )
        (dscale, dbias), dmixes = jax.lax.fori_loop(0, steps, add_token, carry)[3]
        block = jax.lax.axis_index("block")
        for i, total in enumerate((dscale, dbias, *dmixes)):
            tokens.store_sums(sums_gmem.at[block, i], total)

    kernel = target.kernel(
        body,
        name="norm_shift_mix_backward",
        out_type=(
            # Not flat: the compiler would copy what it reshapes, to add to single tokens of it.
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((walk.blocks, 2 + count, C), jnp.float32),
        ),
        grid=plan.grid,
        scratch_types=plan.scratch_types(3, 1),
        warpgroups=tokens.warpgroups,
    )
    dx, sums = kernel(
        plan.copyable(x),
        [plan.copyable(gradient) for gradient in (dinput, *dmixed)],
        _parameters(scale, -bias, mixes),
        state,
        None if segment_ids is None else order_of(segment_ids),
    )
    dscale, dbias, *dmixes = sums.sum(0)
    dx, of_state = _add_of_states(dx, x, scale, bias, segment_ids, cotangents[1], eps)
    dstate = _gradient_of_state(mixes, state, segment_ids, dmixed, cotangents[1])
    return (
        dx,
        dscale + of_state[0],
        dbias + of_state[1],
        jnp.stack(dmixes),
        dstate,
        None,
    )


class _Normed(NamedTuple):
    """A token with mean 0 and variance 1, and the factor of it."""

    normed: jax.Array
    factor: jax.Array


def _parameters(
    scale: Float[Array, " C"], bias: Float[Array, " C"], mixes: Float[Array, "M C"]
) -> Float[Array, "M+2 C"]:
    return jnp.concatenate([x.astype(jnp.float32) for x in (scale[None], bias[None], mixes)])


def _add_of_states(
    dx: Float[Array, "B T C"],
    x: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    segment_ids: SegmentIds | None,
    dnew_state: Float[Array, "B C"],
    eps: float,
) -> tuple[Float[Array, "B T C"], tuple[Float[Array, " C"], Float[Array, " C"]]]:
    """Adds what the new state contributes to dx, and returns what it adds to dscale and dbias."""
    token = last_token(x, segment_ids)
    dtoken, dscale, dbias = layer_norm_backward(
        token[:, None].astype(jnp.float32),
        scale.astype(jnp.float32),
        bias.astype(jnp.float32),
        cotangents=_of_tokens(dnew_state, segment_ids)[:, None],
        eps=eps,
    )
    return add_to_last_token(dx, dtoken[:, 0], segment_ids), (dscale, dbias)


def _of_tokens(
    dnew_state: Float[Array, "B C"], segment_ids: SegmentIds | None
) -> Float[Array, "B C"]:
    """Returns the gradient of the new state of rows with tokens, and zeros for others."""
    if segment_ids is None:
        return dnew_state
    return jnp.where((segment_ids != 0).any(1, keepdims=True), dnew_state, 0)


def _gradient_of_state(
    mixes: Float[Array, "M C"],
    state: Float[Array, "B C"] | None,
    segment_ids: SegmentIds | None,
    dmixed: Sequence[Float[Array, "B T C"]],
    dnew_state: Float[Array, "B C"],
) -> Float[Array, "B C"] | None:
    if state is None:
        return None
    rows, first = jnp.arange(len(state)), jnp.zeros(len(state), jnp.int32)
    if segment_ids is not None:
        first = jnp.argmax(segment_ids != 0, axis=1)
    dstate = jnp.zeros(state.shape, jnp.float32)
    for gradient, mix in zip(dmixed, mixes.astype(jnp.float32), strict=True):
        dstate += gradient[rows, first] * mix[None]
    if segment_ids is not None:
        has_tokens = (segment_ids != 0).any(1, keepdims=True)
        dstate = jnp.where(has_tokens, dstate, dnew_state)
    return dstate.astype(state.dtype)


__all__ = [
    "has_registers",
    "has_registers_for_gradients",
    "norm_shift_mix_backward_mosaic_gpu",
    "norm_shift_mix_mosaic_gpu",
]
