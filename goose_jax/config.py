"""The sizes and numerical choices of a model, in one frozen, validated object."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

import jax
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import WKV7_IMPLEMENTATIONS
from pallas_kernels.validation import FLOAT_DTYPES, check_positive

type Remat = Literal["none", "dots", "full"]
type Dtype = Literal["float32", "bfloat16", "float16"]
"""The dtypes that the command line offers for parameters and computation."""

PRESETS = {  # name: (layers, hidden size) of the released models; head size 64
    "0.1B": (12, 768),
    "0.4B": (24, 1024),
    "1.5B": (24, 2048),
    "2.9B": (32, 2560),
    "7.2B": (32, 4096),
    "13.3B": (61, 4096),
}
WORLD_VOCAB_SIZE = 65536

_REMAT = ("none", "full", "dots")
_DERIVED = cast(int, None)  # __post_init__ puts a number in its place


def default_compute_dtype() -> Dtype:
    """Returns the dtype that is fastest on this machine: float32 on CPUs, else bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def dtype_name(argument: str, value: DTypeLike) -> str:
    """Returns the name of a floating-point dtype, the one form in which configurations keep it.

    Args:
      argument: name of the argument that the user gave, for the error.
      value: what JAX takes for a dtype: `jnp.bfloat16`, `np.dtype("float32")`, `np.float32`,
        "float32", or `float`, which is JAX's default float.

    Returns:
      "bfloat16", "float16", "float32" or "float64".

    Raises:
      ValueError: if it is another dtype or none, or float64 without `jax_enable_x64`.

    Example:
      >>> dtype_name("dtype", jnp.bfloat16)
      'bfloat16'
    """
    if value is float:
        return jax.dtypes.canonicalize_dtype(float).name
    try:
        name = None if value is None else np.dtype(value).name  # numpy takes None for float64
    except TypeError:
        name = None
    if name not in FLOAT_DTYPES:
        raise ValueError(f"{argument} must be one of {FLOAT_DTYPES}, got {value!r}")
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(f"{argument}='float64' needs jax.config.update('jax_enable_x64', True)")
    return name


def low_rank(factor: float, hidden_size: int) -> int:
    """Returns the rank of a low-rank projection as in the official training code.

    It is `factor * sqrt(hidden_size)`, rounded to a multiple of 32 (ties to the even multiple), and
    at least 32.
    """
    return max(32, round(factor * math.sqrt(hidden_size) / 32) * 32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config:
    """Configuration of an RWKV-7 model.

    Sizes that are not given are derived from the others, as in the official training code, when
    the object is made. `dataclasses.replace` keeps derived sizes, so make a new object to change
    `hidden_size`.

    Attributes:
      vocab_size: number of token ids.
      hidden_size: C, channels of the residual stream, a multiple of `head_size`.
      num_layers: number of blocks.
      head_size: K = V, channels of one head; at least 2.
      intermediate_size: F, inner width of the channel mix; by default `4 * hidden_size`.
      decay_rank: rank of the low-rank projection of the log decay; by default
        `low_rank(2.5, hidden_size)`.
      alpha_rank: rank of the low-rank projection of the in-context learning rate; by default
        `low_rank(2.5, hidden_size)`.
      value_rank: rank of the low-rank projection of the value residual's share; by default
        `low_rank(1.7, hidden_size)`.
      gate_rank: rank of the low-rank projection of the output gate; by default
        `low_rank(5.0, hidden_size)`.
      norm_eps: epsilon of the layer norms.
      head_norm_eps: epsilon of the norm over each head's output; by default `1e-5 * head_size`.
      param_dtype: dtype in which parameters are stored. This and `compute_dtype` take what JAX
        takes for a dtype, such as `jnp.bfloat16`, and keep its name, such as "bfloat16".
      compute_dtype: dtype of activations and of the operands of matrix products. Inputs of
        `TimeMix`, `ChannelMix` and `Block` must have it. The statistics of norms, log decays, wkv
        states and logits always have float32 at least.
      remat: what the backward pass computes again, block by block. "none" keeps all values that the
        operators need, "dots" keeps the results of matrix products, "full" keeps only the input of
        each block.
      implementation: implementation of `pallas_kernels.wkv7`, "mosaic_gpu", "xla" or "reference";
        None chooses one. "reference" also selects the reference of
        `pallas_kernels.wkv7_recurrent`, which reads short rows.

    Raises:
      ValueError: if a value is out of range; the message names it.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    head_size: int = 64
    intermediate_size: int = _DERIVED
    decay_rank: int = _DERIVED
    alpha_rank: int = _DERIVED
    value_rank: int = _DERIVED
    gate_rank: int = _DERIVED
    norm_eps: float = 1e-5
    head_norm_eps: float = cast(float, None)
    param_dtype: DTypeLike = "float32"
    compute_dtype: DTypeLike = "bfloat16"
    remat: Remat = "none"
    implementation: str | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "head_size"):
            check_positive(name, getattr(self, name))
        if self.head_size < 2 or self.hidden_size % self.head_size:
            raise ValueError(f"{self.head_size=} must be at least 2 and divide {self.hidden_size=}")
        derived = {
            "intermediate_size": 4 * self.hidden_size,
            "decay_rank": low_rank(2.5, self.hidden_size),
            "alpha_rank": low_rank(2.5, self.hidden_size),
            "value_rank": low_rank(1.7, self.hidden_size),
            "gate_rank": low_rank(5.0, self.hidden_size),
            "head_norm_eps": 1e-5 * self.head_size,
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            if name != "head_norm_eps":
                check_positive(name, getattr(self, name))
        for name in ("norm_eps", "head_norm_eps"):
            _check_epsilon(name, getattr(self, name))
        for name in ("param_dtype", "compute_dtype"):
            object.__setattr__(self, name, dtype_name(name, getattr(self, name)))
        if self.remat not in _REMAT:
            raise ValueError(f"{self.remat=} must be one of {_REMAT}")
        if self.implementation not in (None, *WKV7_IMPLEMENTATIONS):
            raise ValueError(
                f"{self.implementation=} must be None or one of {WKV7_IMPLEMENTATIONS}"
            )

    @property
    def num_heads(self) -> int:
        """H, the number of heads."""
        return self.hidden_size // self.head_size

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Returns the configuration of a released size.

        Ranks follow the official training code. Some released checkpoints have other ranks.

        Args:
          name: "0.1B", "0.4B", "1.5B", "2.9B", "7.2B" or "13.3B".
          **overrides: other values for some fields.

        Raises:
          ValueError: if the name is unknown.

        Example:
          >>> RWKV7Config.preset("0.1B", remat="full").num_heads
          12
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name=} is unknown; give one of {list(PRESETS)}")
        num_layers, hidden_size = PRESETS[name]
        sizes = {"num_layers": num_layers, "hidden_size": hidden_size}
        return cls(**({"vocab_size": WORLD_VOCAB_SIZE} | sizes | overrides))

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, including derived ones, as numbers, strings and None."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the configuration that `to_dict` gave.

        Raises:
          ValueError: if a key is unknown or missing, or a value is out of range.
        """
        fields = dataclasses.fields(cls)
        unknown = sorted(set(values) - {field.name for field in fields})
        missing = [
            field.name
            for field in fields
            if field.default is dataclasses.MISSING and field.name not in values
        ]
        if unknown or missing:
            raise ValueError(f"values for {cls.__name__} have {unknown=} and {missing=} keys")
        return cls(**values)


def _check_epsilon(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise ValueError(f"{name} must be a number > 0, got {value!r}")
