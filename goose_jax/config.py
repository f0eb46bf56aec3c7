"""The sizes and numerical choices of a model, in one frozen, validated object."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

import jax

from pallas_kernels.validation import FLOAT_DTYPES, check_positive

type Remat = Literal["none", "dots", "full"]
type Dtype = Literal["float32", "bfloat16", "float16"]
"""The dtypes that a user can choose for parameters and computation."""

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
_DERIVED = cast(int, None)  # a default that __post_init__ replaces by a number


def default_compute_dtype() -> Dtype:
    """Returns the dtype that is fastest on this machine: float32 on CPUs, else bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def low_rank(factor: float, hidden_size: int) -> int:
    """Width of a low-rank projection: `factor * sqrt(hidden_size)` to a multiple of 32, >= 32.

    As in the official training code, ties round to the even multiple.
    """
    return max(32, round(factor * math.sqrt(hidden_size) / 32) * 32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config:
    """Configuration of an RWKV-7 model.

    Sizes that default to None are derived, as the official training code does, when the object is
    made; afterwards they are numbers. (So `dataclasses.replace` keeps them: make a new object to
    change `hidden_size`.)

    Attributes:
      vocab_size: number of token ids.
      hidden_size: C, channels of the residual stream, a multiple of `head_size`.
      num_layers: number of blocks.
      head_size: K = V, channels of one head; at least 2.
      intermediate_size: F, inner width of the channel mix; None means `4 * hidden_size`.
      decay_rank: width of the decay's low-rank projection; None means the official width.
      alpha_rank: likewise, of the in-context learning rate.
      value_rank: likewise, of the value residual's gate.
      gate_rank: likewise, of the output gate.
      norm_eps: epsilon of the layer norms.
      head_norm_eps: epsilon of the norm over each head's output; None means `1e-5 * head_size`.
      param_dtype: name of the dtype that parameters are stored in.
      compute_dtype: name of the dtype of activations and of the operands of matrix products. Norm
        statistics, decays, the recurrent state and logits are float32 at least, whatever it is.
      remat: what the backward pass computes again, block by block: "none" keeps everything the
        operators ask for, "dots" keeps the results of matrix products, "full" keeps only each
        block's input.
      implementation: of the wkv7 operator; None chooses (see `pallas_kernels.wkv7`). A few tokens
        at a time are read by `wkv7_recurrent`, of which this only names "reference".

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
    param_dtype: str = "float32"
    compute_dtype: str = "bfloat16"
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
            _check_dtype_name(name, getattr(self, name))
        if self.remat not in _REMAT:
            raise ValueError(f"{self.remat=} must be one of {_REMAT}")
        if self.implementation is not None and not isinstance(self.implementation, str):
            raise ValueError(f"{self.implementation=} must be None or a name")

    @property
    def num_heads(self) -> int:
        """H, the number of heads."""
        return self.hidden_size // self.head_size

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration of a released size: "0.1B", "0.4B", "1.5B", "2.9B", "7.2B", "13.3B".

        Low-rank widths are those of the official training code, which some released checkpoints
        do not share.

        Args:
          name: the size.
          **overrides: fields to set otherwise.

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
        """All fields, derived ones included, as numbers, strings and None."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that `to_dict` described.

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


def _check_dtype_name(name: str, value: Any) -> None:
    if value not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be one of {FLOAT_DTYPES}, got {value!r}")
    if value == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(f"{name}='float64' needs jax.config.update('jax_enable_x64', True)")
