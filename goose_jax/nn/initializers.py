"""Initial values of the parameters, as the official RWKV-7 training code (x070) sets them.

For layer i of n and channel c of C, the formulas use

    r01 = i / (n - 1)  (0 if n = 1)        r10 = 1 - i / n
    ramp = c / (C - 1), from 0 to 1        zigzag = z |z|, z from -1 to 1 over each head

Each function computes in float32. Its argument `layer` may be a traced integer, so that one
compiled program makes all layers. Matrices are `[in, out]`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from goose_jax.config import RWKV7Config

type Layer = int | Int[Array, ""]
type Channels = Float[Array, " C"]

SHIFT_MIX_NAMES = ("receptance", "decay", "key", "value", "alpha", "gate")
"""The input of the time mix that each row of its shift mixes makes."""

_SHIFT_MIX_POWERS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)


def _from_first(config: RWKV7Config, layer: Layer) -> Float[Array, ""]:
    return jnp.float32(layer) / max(config.num_layers - 1, 1)


def _to_end(config: RWKV7Config, layer: Layer) -> Float[Array, ""]:
    return 1.0 - jnp.float32(layer) / config.num_layers


def _ramp(config: RWKV7Config) -> Channels:
    return jnp.arange(config.hidden_size, dtype=jnp.float32) / (config.hidden_size - 1)


def _zigzag(config: RWKV7Config) -> Channels:
    half = (config.head_size - 1) / 2
    z = (jnp.arange(config.hidden_size) % config.head_size - half) / half
    return z * jnp.abs(z)


def _shift_mix(config: RWKV7Config, power: Float[Array, ""]) -> Channels:
    return 1.0 - (jnp.arange(config.hidden_size) / config.hidden_size) ** power


def time_shift_mix(config: RWKV7Config, layer: Layer) -> Float[Array, "6 C"]:
    """Returns shares of the previous token, `1 - (c/C)^(power r10)`, ordered as SHIFT_MIX_NAMES."""
    to_end = _to_end(config, layer)
    return jnp.stack([_shift_mix(config, power * to_end) for power in _SHIFT_MIX_POWERS])


def channel_shift_mix(config: RWKV7Config, layer: Layer) -> Channels:
    """Returns the share of the previous token in the channel mix, `1 - (c/C)^(r10^4)`."""
    return _shift_mix(config, _to_end(config, layer) ** 4)


def decay_base(config: RWKV7Config, layer: Layer) -> Channels:
    """Returns a logit of the decay, `-6 + 6 ramp^(1 + r01^0.3) + 0.5 + 2.5 zigzag`."""
    curve = _ramp(config) ** (1.0 + _from_first(config, layer) ** 0.3)
    return -6.0 + 6.0 * curve + 0.5 + 2.5 * _zigzag(config)


def alpha_base(config: RWKV7Config) -> Channels:
    """Returns a logit of the in-context learning rate, `-0.19 + 0.3 zigzag + 0.4 (ramp - 1/2)`."""
    return -0.19 + 0.3 * _zigzag(config) + 0.4 * (_ramp(config) - 0.5)


def value_residual_base(config: RWKV7Config) -> Channels:
    """Returns a logit of the share of the first layer's value, `0.73 - 0.4 (ramp - 1/2)`."""
    return 0.73 - 0.4 * (_ramp(config) - 0.5)


def removal_scale(config: RWKV7Config) -> Channels:
    """Returns the scale that makes removal keys of keys, `0.71 - 0.1 (ramp - 1/2)`."""
    return 0.71 - 0.1 * (_ramp(config) - 0.5)


def head_norm_scale(config: RWKV7Config, layer: Layer) -> Channels:
    """Returns the scale of the norm over each head's output, `((1 + i) / n)^0.7` everywhere."""
    scale = ((1.0 + jnp.float32(layer)) / config.num_layers) ** 0.7
    return jnp.full(config.hidden_size, scale)


def orthogonal(key: jax.Array, shape: tuple[int, int], gain: float) -> Float[Array, "rows columns"]:
    """Returns a random matrix whose rows or columns are orthogonal, each with the norm `gain`.

    These are the rows if there are fewer rows than columns, else the columns. The transpose has the
    same distribution, so this is `torch.nn.init.orthogonal_` for either order of axes.
    """
    short, long = sorted(shape)
    if long < 4 * short:
        return jax.nn.initializers.orthogonal(gain)(key, shape, jnp.float32)
    # A QR decomposition takes long. The columns of a tall random matrix are nearly orthogonal, so
    # that Cholesky's factor of their products gives the same values, but for rounding.
    x = jax.random.normal(key, (long, short), jnp.float32)
    factor = jnp.linalg.cholesky(jnp.matmul(x.T, x, precision="highest"))
    rows = gain * jax.scipy.linalg.solve_triangular(factor, x.T, lower=True)
    return rows if shape[0] < shape[1] else rows.T


def low_rank_up(key: jax.Array, rank: int, hidden_size: int) -> Float[Array, "rank C"]:
    """Returns the second matrix of a low-rank projection.

    It is orthogonal with gain `0.1 max(1, sqrt(rank / C))`.
    """
    return orthogonal(key, (rank, hidden_size), 0.1 * max(1.0, math.sqrt(rank / hidden_size)))


def embedding(key: jax.Array, config: RWKV7Config) -> Float[Array, "vocab C"]:
    """Returns an embedding, uniform between -1e-4 and 1e-4."""
    shape = (config.vocab_size, config.hidden_size)
    return jax.random.uniform(key, shape, jnp.float32, minval=-1e-4, maxval=1e-4)


def head(key: jax.Array, config: RWKV7Config) -> Float[Array, "C vocab"]:
    """Returns a head, orthogonal with gain `0.5 max(1, sqrt(vocab / C))`."""
    ratio = config.vocab_size / config.hidden_size
    shape = (config.hidden_size, config.vocab_size)
    return orthogonal(key, shape, 0.5 * max(1.0, math.sqrt(ratio)))
