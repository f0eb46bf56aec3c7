"""The optimizer of the official recipe: AdamW with two groups, a schedule and clipping.

Source: the x070 training code of RWKV-LM. Two rules depend on the parameter:

- Weight decay applies to the embedding, the head and the projection matrices. It does not apply to
  low-rank matrices, mixes, norms and biases.
- The base of the log decay (the official `w0`) learns at twice the rate of all other parameters.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pallas_kernels.types import Scalar

DECAYED_WEIGHTS = (
    "embedding",
    "head",
    "time_mix.receptance",
    "time_mix.key",
    "time_mix.value",
    "time_mix.output",
    "channel_mix.key",
    "channel_mix.value",
)
"""Ends of the paths of the parameters that weight decay applies to."""

FASTER_PARAMETERS = ("time_mix.decay_base",)
"""Ends of the paths of the parameters with a learning rate of their own."""

_SMALLEST_EPS = 1.2e-38  # rounded to 0 in float32, less would divide 0 by 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The numbers of the recipe.

    Attributes:
      total_steps: number of optimizer steps after which the learning rate is at its end.
      learning_rate: the learning rate at its peak. The official runs used 6e-4 (12 layers, width
        768), 4e-4 (24 layers, width 1024) and 3e-4 (24 layers, width 2048).
      final_learning_rate: the learning rate at the end of the cosine.
      warmup_steps: number of steps over which the rate climbs from 1% of the cosine to all of it.
      beta1: decay of Adam's first moment.
      beta2: decay of Adam's second moment.
      eps: added to the square root of the second moment; more than 0.
      weight_decay: each step takes this share, times the learning rate, off the decayed parameters.
        The official recipe has 0.1 for large corpora and 0.001 for small ones.
      max_gradient_norm: a gradient with a larger global norm is scaled down to this norm.
      decay_base_rate: factor on the learning rate of the base of the log decay.

    Raises:
      ValueError: if a number is out of range; the message names it.
    """

    total_steps: int
    learning_rate: float = 6e-4
    final_learning_rate: float = 6e-5
    warmup_steps: int = 10
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-18
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    decay_base_rate: float = 2.0

    def __post_init__(self) -> None:
        for name in ("total_steps", "warmup_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
        for name, low, high in (
            ("learning_rate", 0.0, math.inf),
            ("beta1", 0.0, 1.0),
            ("beta2", 0.0, 1.0),
            ("eps", _SMALLEST_EPS, math.inf),
            ("weight_decay", 0.0, math.inf),
            ("decay_base_rate", 0.0, math.inf),
        ):
            if not low <= getattr(self, name) < high:
                raise ValueError(f"{name} must lie in [{low}, {high}), got {getattr(self, name)!r}")
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                f"final_learning_rate must lie in [0, {self.learning_rate}], up to the learning "
                f"rate at the peak, got {self.final_learning_rate!r}"
            )
        if self.total_steps <= self.warmup_steps:
            raise ValueError(f"{self.total_steps=} must be more than {self.warmup_steps=}")
        if not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be > 0, got {self.max_gradient_norm!r}")


def learning_rate_schedule(config: OptimizerConfig) -> Callable[[Any], Scalar]:
    """Returns the learning rate as a function of the step, which counts from 0.

    The rate follows a cosine, which is scaled up linearly during the warm-up.
    """
    warmup, total = config.warmup_steps, config.total_steps
    end = config.final_learning_rate / config.learning_rate if config.learning_rate else 0.0

    def schedule(step: Any) -> Scalar:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / (total - warmup), 0, 1)
        factor = (0.5 + end / 2) + (0.5 - end / 2) * jnp.cos(jnp.pi * progress)
        if warmup:
            factor *= jnp.where(step < warmup, 0.01 + 0.99 * step / warmup, 1.0)
        return config.learning_rate * factor

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns the recipe as an optax transformation.

    The parameters may be the nested dict of `nnx.to_pure_dict` or an `nnx.State`, of an `RWKV7` or
    of a part of one. The end of a parameter's path tells which rules apply to it.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed_weights),
        _scale_named(FASTER_PARAMETERS, config.decay_base_rate),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )


def decayed_weights(params: Any) -> Any:
    """Returns a tree like `params` that is True for each parameter with weight decay."""
    return jax.tree.map_with_path(lambda path, _: _ends_with(path, DECAYED_WEIGHTS), params)


def _scale_named(names: tuple[str, ...], factor: float) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map_with_path(
            lambda path, update: update * factor if _ends_with(path, names) else update, updates
        )

    return optax.stateless(scale)


def _ends_with(path: Any, names: tuple[str, ...]) -> bool:
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey):  # the path goes into the nnx.Param
        path = path[:-1]
    full = "." + jax.tree_util.keystr(path, simple=True, separator=".")
    return full.endswith(tuple("." + name for name in names))


__all__ = [
    "DECAYED_WEIGHTS",
    "FASTER_PARAMETERS",
    "OptimizerConfig",
    "decayed_weights",
    "learning_rate_schedule",
    "make_optimizer",
]
