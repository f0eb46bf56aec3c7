"""The inputs of `wkv7` and their gradients on Hopper GPUs, each in one pass over memory."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import token_tiles
from pallas_kernels.hopper.target import target_in_context
from pallas_kernels.hopper.token_tiles import HEAD, sum_over_heads
from pallas_kernels.operators.key_update.reference import MIN_NORM, inverse_norm, replacement_key
from pallas_kernels.operators.value_residual.reference import move_to_first
from pallas_kernels.operators.wkv7.log_decay import MIN_LOG_DECAY, log_decay_from_logits
from pallas_kernels.operators.wkv7_inputs.reference import Inputs, WKV7Inputs

_TOKENS = Inputs._fields[:6]
_PARAMETERS = Inputs._fields[6:]
_MADE = ("a", "b", "k", "v", "log_decay")
"""What the kernel writes. Other orders need more registers."""

_DITHERED = ("a", "b", "k")
"""Errors of these, if equal tokens have them in common, add up in the state."""


def wkv7_inputs_mosaic_gpu(*inputs: jax.Array | None) -> WKV7Inputs:
    """Computes `pallas_kernels.wkv7_inputs`, which documents the arguments.

    The log decay is bfloat16, in which the kernels of `wkv7` read it.

    Raises:
      NotServed: for other dtypes than bfloat16, and other heads than those of 64 channels.
    """
    given = Inputs(*inputs)
    x = _flatten(given)
    has_residual = x.v_first is not None
    # Without a residual v stays as it is, and is neither read nor written.
    x_read = x if has_residual else x._replace(v=None)
    target = target_in_context()
    tiles = token_tiles.tiles_of(target, x.k, registers=128)
    written = tuple(name for name in _MADE if has_residual or name != "v")

    def body(x_gmem, *results_gmem):
        channels = tiles.channels_of_block()
        parameters = _load_parameters(tiles, x_gmem, channels)

        def compute(row, positions, _):
            tokens = _load_tokens(x_gmem, row, positions, channels)
            results = _results(Inputs(**tokens, **parameters))
            for name, gmem in zip(written, results_gmem, strict=True):
                dithered = name in _DITHERED
                token_tiles.store(
                    gmem.at[row, :, channels], positions, results[name], dithered=dithered
                )

        tiles.for_each(compute, None)

    kernel = target.kernel(
        body,
        name="wkv7_inputs",
        out_type=(jax.ShapeDtypeStruct(x.k.shape, x.k.dtype),) * len(written),
        grid=tiles.grid,
        scratch_types=(),
    )
    results = dict(zip(written, kernel(x_read), strict=True))
    shaped = {name: result.reshape(given.k.shape) for name, result in results.items()}
    return WKV7Inputs.of(given, **{"v": given.v} | shaped)


def wkv7_inputs_backward_mosaic_gpu(
    *inputs: jax.Array | None, cotangents: WKV7Inputs
) -> tuple[jax.Array | None, ...]:
    """Returns the gradients of all inputs; None for those that were not given.

    Raises:
      NotServed: for other dtypes than bfloat16, and other heads than those of 64 channels.
    """
    given = Inputs(*inputs)
    x = _flatten(given)
    dresults = WKV7Inputs(*(d.astype(x.k.dtype).reshape(x.k.shape) for d in cotangents))
    has_residual = x.v_first is not None
    if not has_residual:
        x, dresults = x._replace(v=None), dresults._replace(v=None, bonus_v=None, v_first=None)
    tokens_of = tuple(name for name in _TOKENS if getattr(x, name) is not None)
    parameters_of = tuple(name for name in _PARAMETERS if getattr(x, name) is not None)
    target = target_in_context()
    tiles = token_tiles.tiles_of(target, x.k, registers=248)

    def body(x_gmem, dresults_gmem, *gradients_gmem):
        tokens_gmem, sums_gmem = gradients_gmem[: len(tokens_of)], gradients_gmem[len(tokens_of) :]
        channels = tiles.channels_of_block()
        parameters = _load_parameters(tiles, x_gmem, channels)

        def add_tokens(row, positions, totals):
            tokens = _load_tokens(x_gmem, row, positions, channels)
            dresults = (
                None if gmem is None else token_tiles.load(gmem.at[row, :, channels], positions)
                for gmem in dresults_gmem
            )
            gradients = _gradients(Inputs(**tokens, **parameters), WKV7Inputs(*dresults))
            for name, gmem in zip(tokens_of, tokens_gmem, strict=True):
                gradient = getattr(gradients, name)
                token_tiles.store(gmem.at[row, :, channels], positions, gradient)
            terms = (getattr(gradients, name) for name in parameters_of)
            return tuple(total + term for total, term in zip(totals, terms, strict=True))

        totals = tiles.for_each(add_tokens, (tiles.zeros(),) * len(parameters_of))
        split = jax.lax.axis_index("split")
        for gmem, total in zip(sums_gmem, totals, strict=True):
            token_tiles.store_sums(gmem.at[split, :, channels], total)

    kernel = target.kernel(
        body,
        name="wkv7_inputs_backward",
        out_type=(
            *(jax.ShapeDtypeStruct(x.k.shape, x.k.dtype) for _ in tokens_of),
            *(tiles.partial_sums() for _ in parameters_of),
        ),
        grid=tiles.grid,
        scratch_types=(),
    )
    results = kernel(x, dresults)
    of_tokens, sums = results[: len(tokens_of)], results[len(tokens_of) :]
    gradients = dict(zip(tokens_of, of_tokens, strict=True))
    gradients |= {n: total.sum((0, 1)) for n, total in zip(parameters_of, sums, strict=True)}
    if not has_residual:
        gradients["v"] = cotangents.v + cotangents.bonus_v + cotangents.v_first
    return tuple(
        None if of is None else gradients[name].reshape(of.shape)
        for name, of in given._asdict().items()
    )


def _flatten(x: Inputs) -> Inputs:
    """Returns the inputs with heads and channels in one axis, the parameters in float32."""
    tokens = {name: getattr(x, name) for name in _TOKENS}
    token_tiles.check_heads(**{name: of for name, of in tokens.items() if of is not None})
    B, T, H, _ = x.k.shape
    return Inputs(
        *(None if of is None else of.reshape(B, T, H * HEAD) for of in tokens.values()),
        *(None if of is None else of.astype(jnp.float32).reshape(-1) for of in x[len(tokens) :]),
    )


def _load_tokens(x_gmem: Inputs, row: jax.Array, positions: jax.Array, channels: Any) -> Any:
    """Returns tiles of the inputs with tokens, by name."""
    return {
        name: None if gmem is None else token_tiles.load(gmem.at[row, :, channels], positions)
        for name, gmem in ((name, getattr(x_gmem, name)) for name in _TOKENS)
    }


def _load_parameters(tiles: token_tiles.Tiles, x_gmem: Inputs, channels: Any) -> Any:
    """Returns tiles of the inputs without tokens, by name."""
    return {
        name: None if gmem is None else tiles.load_parameter(gmem.at[channels])
        for name, gmem in ((name, getattr(x_gmem, name)) for name in _PARAMETERS)
    }


def _results(x: Inputs) -> dict[str, Any]:
    """Returns the results as tiles, by name; no v if there is no residual."""
    alpha = jax.nn.sigmoid(x.alpha_logits + x.alpha_base)
    scaled = x.k * x.removal_scale
    kk = scaled * inverse_norm(sum_over_heads(scaled * scaled))
    v = None
    if x.v_first is not None:
        v = move_to_first(x.v, x.v_first, x.value_residual_logits + x.value_residual_base)
    return {
        "log_decay": log_decay_from_logits(x.decay_logits + x.decay_base),
        "k": replacement_key(x.k, alpha, x.replacement_mix),
        "v": v,
        "a": -kk,
        "b": kk * alpha,
    }


def _gradients(x: Inputs, d: WKV7Inputs) -> Inputs:
    """Returns the gradients as tiles; those of the parameters are not summed over tokens yet."""
    alpha, alpha_slope = _sigmoid(x.alpha_logits + x.alpha_base)
    _, decay_slope = _sigmoid(x.decay_logits + x.decay_base)
    ddecay = (MIN_LOG_DECAY * decay_slope) * d.log_decay

    scaled = x.k * x.removal_scale
    square = sum_over_heads(scaled * scaled)
    inverse = inverse_norm(square)
    kk = scaled * inverse
    dkk = alpha * d.b - d.a
    along = sum_over_heads(kk * dkk)  # changes of the norm do not change kk,
    along = jnp.where(square > MIN_NORM**2, along, jnp.zeros_like(along))  # unless it is constant
    dscaled = inverse * (dkk - kk * along)
    dk = d.k + d.bonus_k
    replaced = dk * x.k
    dalpha = (kk * d.b + replaced * x.replacement_mix) * alpha_slope

    dv, dv_first, dresidual = None, None, None
    if x.v_first is not None:
        share, slope = _sigmoid(x.value_residual_logits + x.value_residual_base)
        dnew_v = d.v + d.bonus_v
        dmoved = dnew_v * share
        dv, dv_first = dnew_v - dmoved, dmoved + d.v_first
        dresidual = dnew_v * (x.v_first - x.v) * slope
    return Inputs(
        k=dscaled * x.removal_scale + replacement_key(dk, alpha, x.replacement_mix),
        v=dv,
        v_first=dv_first,
        decay_logits=ddecay,
        alpha_logits=dalpha,
        value_residual_logits=dresidual,
        decay_base=ddecay,
        alpha_base=dalpha,
        value_residual_base=dresidual,
        removal_scale=dscaled * x.k,
        replacement_mix=replaced * (alpha - 1),
    )


def _sigmoid(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sigmoid of a tile and its derivative, which stays exact where it is small."""
    small = jnp.exp(-jnp.abs(logits))
    factor = 1 / (1 + small)
    share = small * factor
    return jnp.where(logits >= 0, factor, share), share * factor


__all__ = ["wkv7_inputs_backward_mosaic_gpu", "wkv7_inputs_mosaic_gpu"]
