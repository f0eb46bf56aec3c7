"""Draws the next token from logits, as the official `rwkv` package does.

The order of operations differs from most libraries: first softmax, then top-p, then top-k, and only
then the temperature, as a power of the probabilities that are left. The order of `transformers` and
vLLM is an option: first the temperature, then top-k, then top-p.
"""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

_TINY = float(jnp.finfo(jnp.float32).tiny)
_MAX = float(jnp.finfo(jnp.float32).max)
_INT32_MAX = 2**31 - 1
_RANGES = (
    ("temperature", 0.0, 1e30),
    ("top_p", 0.0, 1.0),
    ("presence_penalty", -_MAX, _MAX),
    ("frequency_penalty", -_MAX, _MAX),
    ("penalty_decay", 0.0, 1.0),
)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn. The defaults draw from the model's own distribution.

    An instance is a pytree with the seven values as leaves, so that a jitted function that takes it
    as an argument is not compiled anew for other values. Only `greedy` and `filters` are static:
    greedy decoding needs no random numbers, and sorting the vocabulary for filters costs time.
    `stack_sampling` makes an instance with different settings for each row of a batch.

    Attributes:
      temperature: 0 always takes the most probable token (the lowest id of equal ones). Otherwise
        the probabilities that filters leave are raised to the power 1 / temperature: higher values
        give more varied text.
      top_k: draw from this many of the most probable tokens only (lower ids first among equal
        ones); 0 is off.
      top_p: draw from the most probable tokens that together reach this probability, and from
        tokens as probable as the last of them; 1 is off.
      presence_penalty: subtracted from the logit of each token that was generated before.
      frequency_penalty: subtracted from a token's logit, times the number of times that the token
        was generated.
      penalty_decay: each new token multiplies these numbers by this factor.
      temperature_first: whether the filters act on the probabilities at this temperature, first
        `top_k` and then `top_p` on what it leaves, as in `transformers` and vLLM. By default they
        act on the probabilities at temperature 1, first `top_p`, as in the package `rwkv`.

    Raises:
      ValueError: if a value has the wrong type or is not in its range. The message names it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996
    temperature_first: bool = False

    # Not fields: `__post_init__` derives them from the fields and sets them on the instance.
    _greedy = False
    _filters = False

    def __post_init__(self) -> None:
        # All instances get the same types, so that they can be leaves of the same program.
        for name, low, high in _RANGES:
            _set(self, name, _check_number(name, getattr(self, name), low, high))
        if 0 < self.temperature < 1e-30:  # whose reciprocal could overflow
            raise ValueError(f"temperature must be 0 or at least 1e-30, got {self.temperature}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, numbers.Integral):
            raise ValueError(f"top_k must be an integer, got {self.top_k!r}")
        _set(self, "top_k", int(_check_number("top_k", self.top_k, 0, _INT32_MAX)))
        if not isinstance(self.temperature_first, bool):
            raise ValueError(f"temperature_first must be a bool, got {self.temperature_first!r}")
        _set(self, "_greedy", self.temperature == 0)
        _set(self, "_filters", self.top_k > 0 or self.top_p < 1)

    @property
    def greedy(self) -> bool:
        """Whether `temperature` is 0 in all rows."""
        return self._greedy

    @property
    def filters(self) -> bool:
        """Whether `top_k` or `top_p` is on in any row that is not greedy."""
        return self._filters

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[bool, bool]]:
        """Returns the values as leaves, and the two static facts."""
        return tuple(getattr(self, name) for name in _VALUES), (self.greedy, self.filters)

    @classmethod
    def tree_unflatten(cls, static: tuple[bool, bool], leaves: tuple[Any, ...]) -> Self:
        """Makes an instance of values that may be traced, and therefore cannot be checked."""
        config = object.__new__(cls)
        names = (*_VALUES, "_greedy", "_filters")
        for name, value in zip(names, (*leaves, *static), strict=True):
            _set(config, name, value)
        return config


_VALUES = tuple(field.name for field in dataclasses.fields(SamplingConfig))


def stack_sampling(configs: Sequence[SamplingConfig]) -> SamplingConfig:
    """Combines the settings of the rows of a batch.

    Args:
      configs: B settings, one for each row.

    Returns:
      Settings whose values are arrays `[B]`, for the functions of this module.

    Raises:
      TypeError: if one of `configs` is not a `SamplingConfig`.
      ValueError: if `configs` is empty.
    """
    if not len(configs):
        raise ValueError(f"configs must hold at least one SamplingConfig, got {configs!r}")
    for i, config in enumerate(configs):
        check_sampling(f"configs[{i}]", config)
    stacked = [np.array([getattr(config, name) for config in configs]) for name in _VALUES]
    greedy = all(config.greedy for config in configs)
    filters = any(config.filters and not config.greedy for config in configs)
    return SamplingConfig.tree_unflatten((greedy, filters), tuple(stacked))


def check_sampling(name: str, value: Any) -> None:
    """Raises a TypeError if a value is not a `SamplingConfig`."""
    if not isinstance(value, SamplingConfig):
        raise TypeError(f"{name} must be a SamplingConfig, got {value!r}")


def _set(config: SamplingConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


def _check_number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not low <= number <= high:  # true for NaN
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")
    return number


def token_probabilities(
    logits: Float[Array, "B V"], counts: Float[Array, "B V"], config: SamplingConfig
) -> Float[Array, "B V"]:
    """Returns the distribution that `sample_token` draws from.

    Args:
      logits: `[B, V]`, logits of the next token, where V is the size of the vocabulary.
      counts: `[B, V]`, decayed counts of the tokens generated so far, as `count_token` keeps them.
      config: settings for all rows, or settings from `stack_sampling` for each row.

    Returns:
      `[B, V]` float32 (float64 for float64 logits), zero for tokens that cannot be drawn.
    """
    logits = _penalized(logits, counts, config)
    most_probable = jax.nn.one_hot(
        jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype
    )
    if config.greedy:
        return most_probable
    drawn = jax.nn.softmax(_filtered(logits, config), axis=-1)
    return jnp.where(_column(config.temperature, logits.dtype) > 0, drawn, most_probable)


def sample_token(
    keys: Key[Array, " B"],
    logits: Float[Array, "B V"],
    counts: Float[Array, "B V"],
    config: SamplingConfig,
) -> Int[Array, " B"]:
    """Draws one token for each row from `token_probabilities`, with the row's own key.

    Args:
      keys: `[B]` random keys; unused if `config.greedy`.
      logits: `[B, V]`, logits of the next token.
      counts: `[B, V]`, decayed counts of the tokens generated so far, as `count_token` keeps them.
      config: settings for all rows, or settings from `stack_sampling` for each row.

    Returns:
      `[B]` int32 token ids.
    """
    logits = _penalized(logits, counts, config)
    if config.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # As `jax.random.categorical` draws: the largest sum of logit and noise. No noise if greedy.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], logits.dtype))(keys)
    drawn_from = _column(config.temperature, logits.dtype) > 0
    scores = jnp.where(drawn_from, _filtered(logits, config) + noise, logits)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def count_token(
    counts: Float[Array, "B V"], tokens: Int[Array, " B"], config: SamplingConfig
) -> Float[Array, "B V"]:
    """Decays the counts `[B, V]` of generated tokens, and counts the new tokens `[B]`.

    A count never decays to 0, so that `counts > 0` stays true for every generated token.
    """
    decay = _column(config.penalty_decay, counts.dtype)
    decayed = jnp.where(counts > 0, jnp.maximum(counts * decay, _TINY), 0.0)
    return decayed + jax.nn.one_hot(tokens, counts.shape[-1], dtype=counts.dtype)


def _column(values: Any, dtype: Any) -> Array:
    """Returns one value for all rows as a scalar, and one value for each row as `[B, 1]`."""
    array = jnp.asarray(values, dtype)
    return array if array.ndim == 0 else array[:, None]


def _penalized(
    logits: Float[Array, "B V"], counts: Float[Array, "B V"], config: SamplingConfig
) -> Float[Array, "B V"]:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    presence = jnp.where(counts > 0, _column(config.presence_penalty, logits.dtype), 0.0)
    penalized = logits - presence - counts * _column(config.frequency_penalty, logits.dtype)
    # Huge penalties may overflow. An infinite logit would make all probabilities NaN.
    largest = jnp.finfo(logits.dtype).max
    return jnp.clip(penalized, -largest, largest)


def _filtered(logits: Float[Array, "B V"], config: SamplingConfig) -> Float[Array, "B V"]:
    """Returns logits whose softmax is the distribution after filters and temperature.

    The values of greedy rows have no meaning.
    """
    temperature = _column(config.temperature, logits.dtype)
    temperature = jnp.where(temperature > 0, temperature, 1.0)
    # Relative to the maximum, so that a tiny temperature cannot overflow to -inf everywhere. The
    # maximum is kept by all filters.
    relative = logits - logits.max(axis=-1, keepdims=True)
    if not config.filters:
        return relative / temperature
    first = _column(config.temperature_first, bool)
    filtered = jax.nn.softmax(relative / jnp.where(first, temperature, 1.0), axis=-1)
    return jnp.where(_kept(filtered, config), relative / temperature, -jnp.inf)


def _kept(probabilities: Float[Array, "B V"], config: SamplingConfig) -> Bool[Array, "B V"]:
    """Returns which tokens top-p and top-k keep: always at least the most probable one.

    If the temperature came first, top-p counts only the probability that top-k leaves.
    """
    size = probabilities.shape[-1]
    token = jnp.broadcast_to(jnp.arange(size), probabilities.shape)
    # A stable sort: of equally probable tokens the one with the lower id comes first.
    negated, order = jax.lax.sort((-probabilities, token), dimension=-1, num_keys=1)
    ordered = -negated

    top_k = _column(config.top_k, jnp.int32)
    last = jnp.where((top_k > 0) & (top_k < size), top_k, size) - 1
    last = jnp.broadcast_to(last, (*probabilities.shape[:-1], 1))
    least, least_token = (jnp.take_along_axis(x, last, axis=-1) for x in (ordered, order))
    in_top_k = (probabilities > least) | ((probabilities == least) & (token <= least_token))

    # The first position at which the sum reaches top_p. If rounding keeps the sum below top_p, that
    # is the last position, and top_p = 1 drops nothing even where the sum reaches 1 early.
    top_p = _column(config.top_p, probabilities.dtype)
    sums = jnp.cumsum(ordered, axis=-1)
    of_top_k = jnp.take_along_axis(sums, last, axis=-1)
    total = jnp.where(_column(config.temperature_first, bool), of_top_k, 1.0)
    below = (sums < top_p * total).sum(axis=-1, keepdims=True)
    cutoff = jnp.take_along_axis(ordered, jnp.minimum(below, size - 1), axis=-1)
    in_top_p = (probabilities >= cutoff) | (top_p >= 1)
    return in_top_p & in_top_k
