"""The settings of a run of `goose-jax train`: its flags with every default filled in."""

import dataclasses
from pathlib import Path
from typing import assert_never

from goose_jax.cli.train_flags import TrainFlags, Tune
from goose_jax.config import Dtype, Remat
from goose_jax.training import LoraConfig, OptimizerConfig

_TUNING_RATES: dict[Tune, float] = {"full": 2e-5, "lora": 2e-4, "state": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewModel:
    """Trains a new model.

    Attributes:
      num_layers: number of blocks.
      hidden_size: channels of the residual stream.
      head_size: channels of a head.
    """

    num_layers: int
    hidden_size: int
    head_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeModel:
    """Trains all parameters of a model that exists.

    Attributes:
      base: path of the model's checkpoint.
    """

    base: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """Trains LoRA adapters beside a model.

    Attributes:
      base: path of the model's checkpoint.
      lora: size and weight of the adapters.
      frozen_dtype: dtype of the model's parameters; None keeps the checkpoint's dtype.
    """

    base: Path
    lora: LoraConfig
    frozen_dtype: Dtype | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialState:
    """Trains the state that texts begin with, beside a model.

    Attributes:
      base: path of the model's checkpoint.
      start: path of a file of the state to start from; None starts from zeros.
      frozen_dtype: dtype of the model's parameters; None keeps the checkpoint's dtype.
    """

    base: Path
    start: Path | None
    frozen_dtype: Dtype | None


type Subject = NewModel | WholeModel | Adapters | InitialState
"""What a run trains."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The complete settings of a run. Where None is allowed, it is a choice of its own.

    Attributes:
      data: text file or folder to train on; None takes the standard library of this Python.
      pattern: which files of the folder count.
      out: folder in which the run gets a folder of its own.
      subject: what is trained.
      tokenizer: name or path of the tokenizer; None takes the one that the checkpoint names.
      compute_dtype: dtype of activations; None takes the fastest one of this machine.
      remat: what the backward pass computes again to save memory.
      optimizer: numbers of the optimizer; its `total_steps` is the length of the run.
      batch_size: sequences that are read at once.
      microbatches: batches whose gradients make one optimizer step.
      sequence_length: tokens of a sequence.
      held_out_bytes: bytes of text to hold out at most.
      evaluate_every: steps between two measurements.
      save_every: steps between two checkpoints.
      keep: number of checkpoints to keep.
      plot: whether to draw the loss curve.
      prompt: text that the sample at the end continues.
      sample_length: tokens of the sample; 0 for none.
      seed: seed of initial values, batches and the sample.
    """

    data: Path | None
    pattern: str
    out: Path
    subject: Subject
    tokenizer: str | None
    compute_dtype: Dtype | None
    remat: Remat
    optimizer: OptimizerConfig
    batch_size: int
    microbatches: int
    sequence_length: int
    held_out_bytes: int
    evaluate_every: int
    save_every: int
    keep: int
    plot: bool
    prompt: str
    sample_length: int
    seed: int

    @classmethod
    def from_flags(cls, flags: TrainFlags) -> "TrainSettings":
        """Fills in a value for each flag that was left out.

        Raises:
          ValueError: if a value is out of range; the message names it.
        """
        subject = _subject(flags)
        is_new = isinstance(subject, NewModel)
        rate = _or(flags.learning_rate, 3e-3 if is_new else _TUNING_RATES[_tune(flags)])
        optimizer = OptimizerConfig(
            total_steps=flags.steps,
            learning_rate=rate,
            final_learning_rate=_or(flags.final_learning_rate, 2e-4 if is_new else rate / 10),
            warmup_steps=flags.warmup_steps,
            weight_decay=_or(flags.weight_decay, 0.1 if is_new else 0.0),
        )
        return cls(
            data=flags.data,
            pattern=flags.pattern,
            out=flags.out,
            subject=subject,
            tokenizer="byte" if is_new and flags.tokenizer is None else flags.tokenizer,
            compute_dtype=flags.compute_dtype,
            remat=flags.remat,
            optimizer=optimizer,
            batch_size=flags.batch_size,
            microbatches=flags.microbatches,
            sequence_length=_or(flags.sequence_length, 128 if is_new else 512),
            held_out_bytes=flags.held_out_bytes,
            evaluate_every=flags.evaluate_every,
            save_every=flags.save_every,
            keep=flags.keep,
            plot=flags.plot,
            prompt=flags.prompt,
            sample_length=flags.sample_length,
            seed=flags.seed,
        )

    def to_flags(self, tokenizer: str) -> TrainFlags:
        """Returns flags that give these settings even if defaults change, for the run's folder.

        Args:
          tokenizer: name or path of the tokenizer that the run uses.
        """
        flags = TrainFlags(
            data=self.data,
            pattern=self.pattern,
            out=self.out,
            tokenizer=tokenizer,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            steps=self.optimizer.total_steps,
            batch_size=self.batch_size,
            microbatches=self.microbatches,
            sequence_length=self.sequence_length,
            learning_rate=self.optimizer.learning_rate,
            final_learning_rate=self.optimizer.final_learning_rate,
            warmup_steps=self.optimizer.warmup_steps,
            weight_decay=self.optimizer.weight_decay,
            held_out_bytes=self.held_out_bytes,
            evaluate_every=self.evaluate_every,
            save_every=self.save_every,
            keep=self.keep,
            plot=self.plot,
            prompt=self.prompt,
            sample_length=self.sample_length,
            seed=self.seed,
        )
        match self.subject:
            case NewModel(num_layers=num_layers, hidden_size=hidden_size, head_size=head_size):
                return dataclasses.replace(
                    flags, num_layers=num_layers, hidden_size=hidden_size, head_size=head_size
                )
            case WholeModel(base=base):
                return dataclasses.replace(flags, from_=base, tune="full")
            case Adapters(base=base, lora=lora, frozen_dtype=dtype):
                return dataclasses.replace(
                    flags,
                    from_=base,
                    tune="lora",
                    lora_rank=lora.rank,
                    lora_alpha=lora.alpha,
                    frozen_dtype=dtype,
                )
            case InitialState(base=base, start=start, frozen_dtype=dtype):
                return dataclasses.replace(
                    flags, from_=base, tune="state", state=start, frozen_dtype=dtype
                )
            case _:
                assert_never(self.subject)


def _subject(flags: TrainFlags) -> Subject:
    if flags.from_ is None:
        return NewModel(
            num_layers=_or(flags.num_layers, 2),
            hidden_size=_or(flags.hidden_size, 128),
            head_size=_or(flags.head_size, 64),
        )
    match _tune(flags):
        case "full":
            return WholeModel(base=flags.from_)
        case "lora":
            lora = LoraConfig(rank=_or(flags.lora_rank, 16), alpha=_or(flags.lora_alpha, 32.0))
            return Adapters(base=flags.from_, lora=lora, frozen_dtype=flags.frozen_dtype)
        case "state":
            return InitialState(
                base=flags.from_, start=flags.state, frozen_dtype=flags.frozen_dtype
            )


def _tune(flags: TrainFlags) -> Tune:
    return _or(flags.tune, "full")


def _or[T](given: T | None, default: T) -> T:
    return default if given is None else given


__all__ = ["Adapters", "InitialState", "NewModel", "Subject", "TrainSettings", "WholeModel"]
