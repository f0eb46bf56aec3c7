"""The sizes and numerical choices of a model, in one frozen, validated object."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

import jax
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import WKV7_IMPLEMENTATIONS
from pallas_kernels.types import Precision
from pallas_kernels.validation import FLOAT_DTYPES, check_positive, check_precision

type Remat = Literal["none", "dots", "projections", "full"]
"""What the backward computes again: nothing, passes over memory, all but projections, or layers."""


@dataclasses.dataclass(frozen=True)
class OfficialModel:
    """The sizes of an official model, as its newest release in `BlinkDL/rwkv7-g1` has them.

    The head size is 64, and the vocabulary has `WORLD_VOCAB_SIZE` ids. At all sizes but 0.1B some
    ranks differ from the formula of the training code (`low_rank`).

    Attributes:
      file: name of the newest file, without the ending `.pth`.
      num_layers: number of blocks.
      hidden_size: C, channels of the residual stream.
      ranks: ranks of the low-rank projections: decay, alpha, value residual, gate.
      context_length: number of tokens of the texts that the release was trained on at last. It is
        no limit: a state can read any number of tokens.
    """

    file: str
    num_layers: int
    hidden_size: int
    ranks: tuple[int, int, int, int]
    context_length: int


OFFICIAL_MODELS = {
    "0.1B": OfficialModel("rwkv7-g1d-0.1b-20260129-ctx8192", 12, 768, (64, 64, 32, 128), 8192),
    "0.4B": OfficialModel("rwkv7-g1d-0.4b-20260210-ctx8192", 24, 1024, (64, 64, 32, 128), 8192),
    "1.5B": OfficialModel("rwkv7-g1k-1.5b-20260930-ctx25600", 24, 2048, (96, 96, 64, 256), 25600),
    "2.9B": OfficialModel("rwkv7-g1k-2.9b-20260930-ctx25600", 32, 2560, (96, 96, 64, 320), 25600),
    "7.2B": OfficialModel("rwkv7-g1k-7.2b-20260930-ctx25600", 32, 4096, (128, 128, 96, 480), 25600),
    "13.3B": OfficialModel(
        "rwkv7-g1k-13.3b-20260930-ctx25600", 61, 4096, (192, 192, 128, 384), 25600
    ),
}
"""The released sizes of RWKV-7, by name."""

_EXPERIMENTAL = {
    "7a": "DeepEmbed: the channel mix has factors for each token id",
    "7b": "DeepEmbed and an attention over all tokens",
}

type Dtype = Literal["float32", "bfloat16", "float16"]
"""The dtypes that the command line offers for parameters and computation."""

WORLD_VOCAB_SIZE = 65536
_RANKS = ("decay_rank", "alpha_rank", "value_rank", "gate_rank")

_REMAT = ("none", "dots", "projections", "full")
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
    except (TypeError, ValueError):
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
      embedding_norm: whether a layer norm follows the embedding, as in the official code. False is
        for checkpoints whose embedding has been normalised when they were converted.
      param_dtype: dtype in which parameters are stored. This and `compute_dtype` take what JAX
        takes for a dtype, such as `jnp.bfloat16`, and keep its name, such as "bfloat16".
      compute_dtype: dtype of activations and of the operands of matrix products. Inputs of
        `TimeMix`, `ChannelMix` and `Block` must have it. The statistics of norms, log decays, wkv
        states and logits always have float32 at least.
      remat: what the backward pass computes again, block by block. "dots" keeps the residual stream
        and the results of `wkv7`, of `output_correction` and of matrix products except low-rank
        ones; "projections" keeps the residual stream and the results of matrix products of the time
        mix, except low-rank ones; "full" keeps only the input of each block; "none" keeps all
        values that the operators need. States between pieces of rows that a mesh divides are small,
        and are always kept.
      unroll_layers: whether each layer is compiled by itself. False runs one compiled layer in a
        loop: it compiles faster, but training copies what each layer keeps.
      implementation: implementation of the operators, "mosaic_gpu", "xla" or "reference"; None
        chooses for each call. "mosaic_gpu" concerns `pallas_kernels.wkv7` only, and only
        "reference" concerns `pallas_kernels.wkv7_recurrent`, which reads short rows.
      precision: of matrix products in `pallas_kernels.wkv7`. "high" keeps float32's digits, which
        matters where keys are nearly parallel, and leaves that operator to XLA.

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
    embedding_norm: bool = True
    param_dtype: DTypeLike = "float32"
    compute_dtype: DTypeLike = "bfloat16"
    remat: Remat = "dots"
    unroll_layers: bool = False
    implementation: str | None = None
    precision: Precision = None

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
        for name in ("embedding_norm", "unroll_layers"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"self.{name}={getattr(self, name)!r} must be True or False")
        for name in ("param_dtype", "compute_dtype"):
            object.__setattr__(self, name, dtype_name(name, getattr(self, name)))
        if self.remat not in _REMAT:
            raise ValueError(f"{self.remat=} must be one of {_REMAT}")
        if self.implementation not in (None, *WKV7_IMPLEMENTATIONS):
            raise ValueError(
                f"{self.implementation=} must be None or one of {WKV7_IMPLEMENTATIONS}"
            )
        check_precision("precision", self.precision)
        if self.implementation == "mosaic_gpu" and self.precision is not None:
            raise ValueError(f"{self.precision=} is not what {self.implementation=} offers")

    @property
    def implementation_around_wkv7(self) -> str | None:
        """Implementation of all operators but `pallas_kernels.wkv7`."""
        return None if self.implementation == "mosaic_gpu" else self.implementation

    @property
    def num_heads(self) -> int:
        """H, the number of heads."""
        return self.hidden_size // self.head_size

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """Returns the configuration of a released size.

        The ranks are those of the released models, of which some differ from the formula for new
        models. With another `hidden_size` all follow the formula.

        Args:
          name: "0.1B", "0.4B", "1.5B", "2.9B", "7.2B" or "13.3B".
          **overrides: other values for some fields.

        Raises:
          ValueError: if the name is unknown, or that of RWKV-7a or RWKV-7b, which are experimental.

        Example:
          >>> RWKV7Config.preset("0.1B", remat="full").num_heads
          12
        """
        if name not in OFFICIAL_MODELS:
            family = re.fullmatch(r"(?i)(?:rwkv-?)?(7[ab])(?:-.*)?", str(name))
            reason = "is unknown"
            if family:
                kind = family[1].lower()
                reason = f"is RWKV-{kind}, which is experimental and not supported"
                reason += f" ({_EXPERIMENTAL[kind]})"
            raise ValueError(f"preset {name=} {reason}; give one of {list(OFFICIAL_MODELS)}")
        model = OFFICIAL_MODELS[name]
        values: dict[str, Any] = {
            "vocab_size": WORLD_VOCAB_SIZE,
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
        }
        if overrides.get("hidden_size", model.hidden_size) == model.hidden_size:
            values |= zip(_RANKS, model.ranks, strict=True)
        return cls(**(values | overrides))

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
