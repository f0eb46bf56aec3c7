"""The defaults of `goose-jax train`, which depend on what is trained, and the official presets."""

import dataclasses
import math
from typing import Any

from goose_jax.cli.flags import name_flags, option
from goose_jax.cli.train_settings import OF_A_NEW_MODEL, Preset, TrainSettings, Tune
from goose_jax.config import RWKV7Config, default_compute_dtype
from goose_jax.training import LoraConfig, OptimizerConfig

_TUNING_RATES: dict[Tune, float] = {"full": 2e-5, "lora": 2e-4, "state": 0.1}
_LONGEST_WARMUP = 30
_OF_A_STEP = ("batch_size", "microbatches", "sequence_length")
_SIZES = (
    *("num_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("decay_rank", "alpha_rank", "value_rank", "gate_rank"),
)
_MOST_TOKENS, _MOST_PARAMETERS = 2**40, 2**50  # far more than any machine holds

# 240 sequences make a step in the official training on the Pile, which has 332,115,325,534 tokens.
_PILE = {
    "num_layers": 24,
    "tokenizer": "world",
    "sequence_length": 4096,
    "batch_size": 30,
    "microbatches": 8,
    "steps": 337_846,
    "final_learning_rate": 3e-5,
    "warmup_steps": 10,
    "weight_decay": 0.1,
}
PRESETS: dict[Preset, dict[str, Any]] = {
    "minipile-12x768": {
        "num_layers": 12,
        "hidden_size": 768,
        "tokenizer": "world",
        "sequence_length": 512,
        "batch_size": 16,
        "microbatches": 1,
        "steps": 182_889,  # 1,498,226,207 tokens, once
        "learning_rate": 6e-4,
        "final_learning_rate": 6e-5,
        "warmup_steps": 10,
        "weight_decay": 0.001,
    },
    "pile-24x1024": _PILE | {"hidden_size": 1024, "learning_rate": 4e-4},
    "pile-24x2048": _PILE | {"hidden_size": 2048, "learning_rate": 3e-4},
}
"""Settings of official trainings, by name.

Source: RWKV-v7/train_temp/demo-training-run.sh and demo-training-run-v7-pile.sh of RWKV-LM, except
for the peaks of the learning rate of 24 layers, which are those of the official runs.
"""


def with_defaults(settings: TrainSettings) -> TrainSettings:
    """Fills in a value for each setting that was left out and has a default.

    A setting of the preset overrides the default; its warm-up, like the default one, is at most a
    tenth of the steps. Settings that depend on the model's checkpoint
    (`tokenizer` with `from_`), on the machine (`compute_dtype`, `implementation`) or on the text
    (`prompt`) stay None, and so do sizes that `RWKV7Config` derives from others.

    Raises:
      ValueError: if a value is out of range; the message names its flag.
    """
    longest_warmup = _LONGEST_WARMUP
    if settings.preset is not None:
        preset = dict(PRESETS[settings.preset])
        longest_warmup = preset.pop("warmup_steps")
        settings = _fill(settings, preset)
    if settings.from_ is None:
        defaults: dict[str, Any] = {
            "num_layers": 2,
            "hidden_size": 128,
            "head_size": 64,
            "tokenizer": "byte",
            "sequence_length": 128,
            "learning_rate": 3e-3,
            "weight_decay": 0.1,
        }
    else:
        tune = settings.tune or "full"
        defaults = {
            "tune": tune,
            "sequence_length": 512,
            "learning_rate": _TUNING_RATES[tune],
            "weight_decay": 0.0,
        }
        if tune == "lora":
            defaults |= {"lora_rank": 16, "lora_alpha": 32.0}
    settings = _fill(settings, defaults | {"steps": 1200, "batch_size": 8, "microbatches": 1})
    assert settings.steps is not None
    assert settings.learning_rate is not None
    peak = settings.learning_rate
    final = min(2e-4, peak) if settings.from_ is None else peak / 10
    warmup = min(longest_warmup, settings.steps // 10)
    settings = _fill(settings, {"final_learning_rate": final, "warmup_steps": warmup})
    optimizer_config(settings)
    _check_tokens(settings)
    if settings.from_ is None:
        model_config(settings, vocab_size=1)
    elif settings.tune == "lora":
        lora_config(settings)
    return settings


def _check_tokens(settings: TrainSettings) -> None:
    sizes = {name: getattr(settings, name) or 1 for name in _OF_A_STEP}
    tokens = math.prod(sizes.values())
    if tokens > _MOST_TOKENS:
        named = ", ".join(f"{option(name)}={size}" for name, size in sizes.items())
        raise ValueError(f"{named} make {tokens:.1e} tokens of a step, more than 2**40")


def _check_parameters(settings: TrainSettings, config: RWKV7Config) -> None:
    """Refuses a model whose arrays have more bytes than JAX can count."""
    width = 4 * config.hidden_size + 2 * config.intermediate_size
    ranks = config.decay_rank + config.alpha_rank + config.value_rank + config.gate_rank
    of_layers = config.num_layers * (width + 2 * ranks) * config.hidden_size
    parameters = of_layers + 2 * config.vocab_size * config.hidden_size
    if parameters > _MOST_PARAMETERS:
        sizes = {name: getattr(settings, name) for name in _SIZES}
        named = ", ".join(f"{option(n)}={size}" for n, size in sizes.items() if size is not None)
        raise ValueError(f"{named} make {parameters:.1e} parameters, more than 2**50")


def _fill(settings: TrainSettings, values: dict[str, Any]) -> TrainSettings:
    missing = {name: value for name, value in values.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, **missing)


def optimizer_config(settings: TrainSettings) -> OptimizerConfig:
    """Returns the numbers of the optimizer in settings that `with_defaults` filled in.

    Raises:
      ValueError: if a number is out of range; the message names its flag.
    """
    names = {field.name for field in dataclasses.fields(OptimizerConfig)} - {"total_steps"}
    values = {name: getattr(settings, name) for name in names} | {"total_steps": settings.steps}
    try:
        return OptimizerConfig(**values)
    except ValueError as error:
        message = str(error).replace("total_steps", "steps")
        raise ValueError(name_flags(message, {*names, "steps"})) from error


def lora_config(settings: TrainSettings) -> LoraConfig:
    """Returns size and weight of the adapters in settings that `with_defaults` filled in.

    Raises:
      ValueError: if a number is out of range; the message names its flag.
    """
    assert settings.lora_rank is not None
    assert settings.lora_alpha is not None
    try:
        return LoraConfig(rank=settings.lora_rank, alpha=settings.lora_alpha)
    except ValueError as error:
        raise ValueError(f"--lora-{error}") from error


def model_config(settings: TrainSettings, *, vocab_size: int) -> RWKV7Config:
    """Returns the configuration of the new model in settings that `with_defaults` filled in.

    Args:
      settings: settings without `from_`.
      vocab_size: number of ids of the tokenizer.

    Raises:
      ValueError: if a number is out of range; the message names its flag.
    """
    given = {name: getattr(settings, name) for name in OF_A_NEW_MODEL}
    values = {"vocab_size": vocab_size} | {k: v for k, v in given.items() if v is not None}
    if values["vocab_size"] < vocab_size:
        raise ValueError(
            f"--vocab-size must be at least the {vocab_size} ids of the tokenizer, "
            f"got {settings.vocab_size}"
        )
    try:
        config = RWKV7Config(
            **values,
            compute_dtype=settings.compute_dtype or default_compute_dtype(),
            remat=settings.remat,
            unroll_layers=settings.unroll_layers,
            implementation=settings.implementation,
            precision=settings.precision,
        )
    except ValueError as error:
        raise ValueError(name_flags(str(error), values)) from error
    _check_parameters(settings, config)
    return config


__all__ = ["PRESETS", "lora_config", "model_config", "optimizer_config", "with_defaults"]
