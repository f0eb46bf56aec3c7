"""WKV7 token by token on Hopper GPUs: which calls are served, segments, and the gradient.

`recurrence` explains what the kernels in `outputs` and `gradients` share. The forward keeps states
for the backward only where a gradient is asked for.

Without a gradient, the kernel overwrites the state in place: a loop that carries the state, or a
step to which it is donated, moves it once each way. Three cases need a new array for the state:
`jax.shard_map`, whose types such kernels do not have; `jax.vmap`, where all calls might be given
one state; and states of segments, because not all of them are written.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import NotServed
from pallas_kernels.hopper.target import TILE, Target, target_in_context
from pallas_kernels.operators.wkv7.call import WKVCall
from pallas_kernels.operators.wkv7_recurrent.call import RecurrentInputs
from pallas_kernels.operators.wkv7_recurrent.mosaic_gpu.gradients import recurrent_gradients
from pallas_kernels.operators.wkv7_recurrent.mosaic_gpu.outputs import recurrent_outputs
from pallas_kernels.operators.wkv7_recurrent.mosaic_gpu.recurrence import (
    KEEP,
    PADDING,
    ZERO,
    Codes,
    Form,
)
from pallas_kernels.packing import find_segments
from pallas_kernels.partitioning import partitioned
from pallas_kernels.sharding import Layout, vary_alike
from pallas_kernels.types import FloatArray, SegmentIds

MAX_K = 128
"""The most keys for which registers and shared memory have room."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward needs.

    Attributes:
      inputs: of the operator.
      initial: `[B, N, H, K, V]` float32, the initial states; None means zeros.
      codes: what each step does to the state.
      entries: `[B, ceil(T / 8), H, K, V]` float32, the states before every eighth step.
    """

    inputs: RecurrentInputs
    initial: jax.Array | None
    codes: Codes
    entries: jax.Array


_INPUTS = RecurrentInputs(*("B T H K",) * 3, "B T H V", *("B T H K",) * 2)
_ARGUMENTS = (_INPUTS, "B N H K V", "B T")
_RESULTS = ("B T H V", "B N H K V", "B entry H K V")


def _outputs_of_form(*arguments, form, save):
    return recurrent_outputs(form, *arguments, save=save)


def _gradients_of_form(*arguments, form):
    return recurrent_gradients(form, *arguments)


_outputs = partitioned(_outputs_of_form, Layout(_ARGUMENTS, _RESULTS, independent="B H"))
_gradients = partitioned(
    _gradients_of_form,
    Layout((*_ARGUMENTS, _RESULTS[2], *_RESULTS[:2]), (_INPUTS, "B N H K V"), independent="B H"),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(
    form: Form, inputs: RecurrentInputs, initial: jax.Array | None, codes: Codes
) -> tuple[jax.Array, jax.Array]:
    """Returns outputs `[B, T, H, V]` and final states `[B, N, H, K, V]`."""
    if initial is None or codes.leave is not None or jax.typeof(initial).mat.varying:
        return _outputs_and_states(form, inputs, initial, codes)

    return _partitioned_in_place(inputs, initial, codes, form=form)


def _in_place(
    inputs: RecurrentInputs, initial: jax.Array, codes: Codes, *, form: Form
) -> tuple[jax.Array, jax.Array]:
    """Returns what `_recur` does; writes the final states over the initial ones."""

    @jax.custom_batching.custom_vmap
    def run(inputs, initial, codes):
        # Where a loop takes operands of the kernel from a stack, XLA (of jax 0.11.2) lets the
        # kernel read them there, and forgets that it overwrites the state. Barriers prevent this.
        inputs, initial, codes = jax.lax.optimization_barrier((inputs, initial, codes))
        reference = jax.new_ref(initial)
        o, _, _ = recurrent_outputs(form, inputs, reference, codes, save=False)
        return jax.lax.optimization_barrier((o, jax.freeze(reference)))

    @run.def_vmap
    def _(axis_size, is_mapped, *arguments):
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, tuple(is_mapped))
        function = functools.partial(_outputs_and_states, form)
        results = jax.vmap(function, axes, axis_size=axis_size)(*arguments)
        return results, jax.tree.map(lambda _: True, results)

    return run(inputs, initial, codes)


_partitioned_in_place = partitioned(_in_place, Layout(_ARGUMENTS, _RESULTS[:2], independent="B H"))


def _outputs_and_states(
    form: Form, inputs: RecurrentInputs, initial: jax.Array | None, codes: Codes
) -> tuple[jax.Array, jax.Array]:
    o, final, _ = _outputs(inputs, initial, codes, form=form, save=False)
    return o, final


def _recur_forward(form, inputs, initial, codes):
    o, final, entries = _outputs(inputs, initial, codes, form=form, save=True)
    return (o, final), Residuals(inputs, initial, codes, entries)


def _recur_backward(form, residuals, gradients):
    inputs, initial, codes = residuals.inputs, residuals.initial, residuals.codes
    dinputs, dinitial = _gradients(inputs, initial, codes, residuals.entries, *gradients, form=form)
    if initial is None:
        return dinputs, None, None
    if codes.leave is not None:  # gradients of states that no step entered were not written
        entered = _occur(codes.enter, initial.shape[1])
        dinitial = jnp.where(entered, dinitial, 0)
    return dinputs, dinitial, None


_recur.defvjp(_recur_forward, _recur_backward)


def _occur(codes: jax.Array | None, num_segments: int) -> jax.Array:
    """Returns `[B, N, 1, 1, 1]`, true for each of the N states that the codes `[B, T]` name."""
    assert codes is not None
    occur = (codes[:, :, None] == jnp.arange(num_segments)[None, None]).any(axis=1)
    return occur[:, :, None, None, None]


def _find_codes(segment_ids: SegmentIds, num_segments: int | None) -> Codes:
    """Returns the codes of the steps, for segment ids `[B, T]` in the order of reading."""
    segments = find_segments(segment_ids)
    slot = segment_ids.astype(jnp.int32) - 1
    if num_segments is None:
        enter = jnp.where(segments.start & (segments.index > 0), ZERO, KEEP)
    else:
        enter = jnp.where(segments.start, slot, KEEP)
    return Codes(
        enter=jnp.where(segments.valid, enter, PADDING),
        leave=None if num_segments is None else jnp.where(segments.end, slot, KEEP),
    )


def wkv7_token_by_token(
    target: Target,
    inputs: RecurrentInputs,
    call: WKVCall,
    *,
    fused: bool = False,
    reverse: bool = False,
) -> tuple[FloatArray, FloatArray]:
    """Computes `pallas_kernels.wkv7_recurrent`, for a call that the kernels serve.

    Args:
      target: what the kernels are compiled for.
      inputs: of the operator.
      call: what else the call asks for.
      fused: whether kk and alpha are given instead of a and b.
      reverse: whether to read from the last token to the first.
    """
    num_segments = call.num_segments
    form = Form(target, scale=call.scale, fused=fused, reverse=reverse)
    inputs, initial, segment_ids = vary_alike(inputs, call.initial_state, call.segment_ids)
    if segment_ids is not None and reverse:
        segment_ids = jnp.flip(segment_ids, 1)
    codes = Codes() if segment_ids is None else _find_codes(segment_ids, num_segments)
    if initial is not None:
        initial = initial.astype(jnp.float32)
    if num_segments is None:
        o, final = _recur(form, inputs, None if initial is None else initial[:, None], codes)
        return o, final[:, 0]
    (B, _, H, K), V = inputs.r.shape, inputs.v.shape[-1]
    states = jnp.zeros((B, num_segments, H, K, V), jnp.float32) if initial is None else initial
    _, states = vary_alike(inputs, states)
    o, final = _recur(form, inputs, states, codes)
    return o, jnp.where(_occur(codes.leave, num_segments), final, states)


def wkv7_recurrent_mosaic_gpu(
    inputs: RecurrentInputs, call: WKVCall, *, fused: bool, reverse: bool
) -> tuple[FloatArray, FloatArray]:
    """Computes `pallas_kernels.wkv7_recurrent` on Hopper GPUs, in float32 inside.

    Args:
      inputs: of the operator.
      call: what else the call asks for.
      fused: whether kk and alpha are given instead of a and b.
      reverse: whether to read from the last token to the first.

    Raises:
      NotServed: for other dtypes and head sizes.
    """
    check_recurrent_served(inputs)
    return wkv7_token_by_token(target_in_context(), inputs, call, fused=fused, reverse=reverse)


def check_recurrent_served(inputs: RecurrentInputs) -> None:
    """Raises NotServed for calls that the kernels do not serve on any device."""
    for name, x in (("k", inputs.k), ("log_decay", inputs.log_decay)):
        if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            raise NotServed(f"mosaic_gpu needs inputs of 16 or 32 bits, got {name}.dtype={x.dtype}")
    K, V = inputs.k.shape[-1], inputs.v.shape[-1]
    if K % TILE or K > MAX_K or V % TILE:
        raise NotServed(f"mosaic_gpu needs K of 64 or 128, V of 64 n, got {K=}, {V=}")


__all__ = ["check_recurrent_served", "wkv7_recurrent_mosaic_gpu", "wkv7_token_by_token"]
