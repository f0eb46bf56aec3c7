"""The settings of `goose-jax train`: its flags, as they are typed and as a run records them."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from goose_jax.cli.data_settings import DataSettings
from goose_jax.cli.flags import IfGiven, option
from goose_jax.config import Dtype, Remat
from goose_jax.training import L2WRAP
from pallas_kernels.types import Precision
from pallas_kernels.validation import check_positive

type Tune = Literal["full", "lora", "state"]
type Preset = Literal["minipile-12x768", "pile-24x1024", "pile-24x2048"]

_POSITIVE = (
    *("steps", "batch_size", "microbatches", "sequence_length", "vocab_size"),
    *("log_every", "evaluate_every", "save_every", "keep", "keep_every"),
)
OF_A_NEW_MODEL = (
    *("num_layers", "hidden_size", "head_size", "intermediate_size", "vocab_size"),
    *("decay_rank", "alpha_rank", "value_rank", "gate_rank"),
    *("norm_eps", "head_norm_eps", "embedding_norm"),
)
"""The settings that only a new model has."""
_OF_LORA = ("lora_rank", "lora_alpha")
_OF_PROCESSES = ("coordinator", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(DataSettings):
    """The text to train on, what to train, and how.

    `None` stands for a setting that was left out; `with_defaults` fills it in, where it has a
    default.

    Attributes:
      config: YAML file with settings by the names of these flags, such as the settings.yaml of a
        run. Flags on the command line override it.
      preset: settings of an official training: sizes of the model, batches, number of steps and the
        optimizer. Other flags and --config override it.
      out: the run gets a numbered folder of its own in this folder.
      resume: folder of a run to continue, with the settings of that run.
      from_: checkpoint of a model to fine-tune: a .pth or safetensors file, a folder of Hugging
        Face, a checkpoint of goose-jax or the folder of a run. By default a new model is trained.
      tune: with --from, what is trained. full: the whole model; lora: adapters beside its matrices;
        state: only the states that a text begins with. By default full.
      lora_rank: with --tune lora, rank of the adapters; by default 16.
      lora_alpha: with --tune lora, the adapters are scaled by alpha / rank; by default 32.
      state: with --tune state, a file with the initial states to start from; by default those that
        lie beside the weights, or zeros.
      tokenizer: byte, world, or the path of a tokenizer.json or a vocabulary file. By default the
        tokenizer that the checkpoint names, or byte for a new model.
      num_layers: number of blocks of a new model; by default 2.
      hidden_size: width of a new model, a multiple of the head size; by default 128.
      head_size: channels of each head of a new model; by default 64.
      intermediate_size: inner width of a new model's channel mix; by default 4 times the width.
      vocab_size: number of ids of a new model; by default that of the tokenizer.
      decay_rank: rank of a new model's projection of the log decay; by default from the width.
      alpha_rank: rank of a new model's projection of the in-context learning rate; by default from
        the width.
      value_rank: rank of a new model's projection of the value residual; by default from the width.
      gate_rank: rank of a new model's projection of the gate; by default from the width.
      norm_eps: epsilon of a new model's layer norms; by default 1e-5.
      head_norm_eps: epsilon of a new model's norms of heads; by default 1e-5 times the head size.
      embedding_norm: whether a new model has a norm after the embedding; by default it has.
      frozen_dtype: with --tune lora or state, dtype of the frozen model's parameters; by default
        the dtype in the checkpoint.
      compute_dtype: dtype of activations; by default float32 on a CPU, bfloat16 elsewhere.
      remat: what the backward pass computes again to save memory.
      unroll_layers: compile each layer by itself, which may run faster and takes longer to compile.
      implementation: implementation of the operators; by default the fastest that serves them.
      precision: high keeps float32's digits in the matrix products of the wkv operator; kernels
        round operands to 16 bits, but are far faster.
      steps: number of optimizer steps; by default 1200.
      batch_size: number of sequences that are read at once; by default 8.
      microbatches: number of batches whose gradients make one optimizer step; by default 1.
      sequence_length: tokens of a sequence; by default 128, with --from 512.
      learning_rate: learning rate at its peak; by default 3e-3, with --from 2e-5 (full), 2e-4
        (lora) or 0.1 (state).
      final_learning_rate: learning rate at the end; by default 2e-4, with --from a tenth of the
        learning rate at the peak; never above the peak.
      warmup_steps: number of steps until the learning rate is at its peak; by default 30, with a
        preset 10, but at most a tenth of the steps. A file of --config keeps its number.
      weight_decay: weight decay of the large matrices, but not of adapters and states; by default
        0.1, with --from 0.
      beta1: decay of Adam's first moment.
      beta2: decay of Adam's second moment.
      eps: added to the square root of Adam's second moment.
      max_gradient_norm: gradients with a larger norm are scaled down to it.
      decay_base_rate: factor on the learning rate of the base of the log decay.
      l2wrap: factor of the pull on each token's largest logit; 0 turns it off.
      log_every: number of steps that make one line of metrics.
      tensorboard: also write the metrics for TensorBoard.
      wandb: also send the metrics to this project at Weights & Biases (needs wandb).
      peak_tflops: peak speed of all devices together, in 10^12 floating-point operations per
        second. The metric mfu is the share of it that the model uses. By default the peak that the
        GPU's maker states, if it is known.
      non_finite: what happens if the loss or gradient is infinite or NaN. stop: the run ends. skip:
        the step is left out, but ten such steps in a row end the run. Both save the batch.
      evaluate_every: number of steps between two measurements. The run also measures before the
        first step and after the last.
      save_every: number of steps between two checkpoints. The run also saves at the end and at
        Ctrl-C.
      keep: number of newest checkpoints to keep; older ones are removed.
      keep_best: also keep the checkpoint with the fewest bits per byte on held-out text.
      keep_every: also keep the checkpoints whose step is a multiple of this number.
      plot: draw the loss curve (needs matplotlib).
      prompt: text that the sample at the end continues; by default the beginning of the held-out
        text.
      sample_length: tokens of the sample at the end; 0 for none.
      seed: seed of initial weights or adapters, batches and the sample.
      mesh: how the devices are arranged, as in data=2,fsdp=4; axes are data, fsdp, tensor and
        context (see docs/parallel.md). By default all devices are used for data parallelism.
      cluster: join the processes that SLURM, Kubernetes or Open MPI started with this command.
      coordinator: HOST:PORT of the first of several processes, which are started by hand.
      num_processes: number of processes that are started by hand.
      process_id: number of this process, from 0.
    """

    config: IfGiven[Path] = None
    preset: IfGiven[Preset] = None
    out: Path = Path("runs")
    resume: IfGiven[Path] = None
    from_: Annotated[IfGiven[Path], tyro.conf.arg(name="from")] = None
    tune: IfGiven[Tune] = None
    lora_rank: IfGiven[int] = None
    lora_alpha: IfGiven[float] = None
    state: IfGiven[Path] = None
    tokenizer: IfGiven[str] = None
    num_layers: IfGiven[int] = None
    hidden_size: IfGiven[int] = None
    head_size: IfGiven[int] = None
    intermediate_size: IfGiven[int] = None
    vocab_size: IfGiven[int] = None
    decay_rank: IfGiven[int] = None
    alpha_rank: IfGiven[int] = None
    value_rank: IfGiven[int] = None
    gate_rank: IfGiven[int] = None
    norm_eps: IfGiven[float] = None
    head_norm_eps: IfGiven[float] = None
    embedding_norm: IfGiven[bool] = None
    frozen_dtype: IfGiven[Dtype] = None
    compute_dtype: IfGiven[Dtype] = None
    remat: Remat = "dots"
    unroll_layers: bool = False
    implementation: IfGiven[Literal["mosaic_gpu", "xla", "reference"]] = None
    precision: IfGiven[Precision] = None
    steps: IfGiven[int] = None
    batch_size: IfGiven[int] = None
    microbatches: IfGiven[int] = None
    sequence_length: IfGiven[int] = None
    learning_rate: IfGiven[float] = None
    final_learning_rate: IfGiven[float] = None
    warmup_steps: IfGiven[int] = None
    weight_decay: IfGiven[float] = None
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-18
    max_gradient_norm: float = 1.0
    decay_base_rate: float = 2.0
    l2wrap: float = L2WRAP
    log_every: int = 10
    tensorboard: bool = True
    wandb: IfGiven[str] = None
    peak_tflops: IfGiven[float] = None
    non_finite: Literal["stop", "skip"] = "stop"
    evaluate_every: int = 300
    save_every: int = 300
    keep: int = 2
    keep_best: bool = True
    keep_every: IfGiven[int] = None
    plot: bool = True
    prompt: IfGiven[str] = None
    sample_length: int = 400
    seed: int = 0
    mesh: IfGiven[str] = None
    cluster: bool = False
    coordinator: IfGiven[str] = None
    num_processes: IfGiven[int] = None
    process_id: IfGiven[int] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _POSITIVE:
            if getattr(self, name) is not None:
                check_positive(option(name), getattr(self, name))
        for name in ("sample_length", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{option(name)} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.l2wrap < math.inf:
            raise ValueError(f"--l2wrap must be a finite number >= 0, got {self.l2wrap}")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"--peak-tflops must be more than 0, got {self.peak_tflops}")
        if self.tokenizer == "":
            raise ValueError("--tokenizer must be a name or a path, got ''")
        if self.sample_length and self.prompt == "":
            raise ValueError("--prompt must not be empty; --sample-length 0 turns the sample off")
        self._check_processes()
        tuned = ("tune", "frozen_dtype", *_OF_LORA, "state")
        if self.from_ is None:
            self._refuse(tuned, "needs --from CHECKPOINT, the model to tune")
            return
        self._refuse(OF_A_NEW_MODEL, "cannot be given with --from: the checkpoint tells it")
        self._refuse(("preset",), "cannot be given with --from: it is for new models")
        if self.tune != "lora":
            self._refuse(_OF_LORA, "needs --tune lora")
        if self.tune != "state":
            self._refuse(("state",), "needs --tune state")
        elif self.sampling == "packed":
            raise ValueError(
                "--sampling packed cannot be given with --tune state: in a row only the first "
                "document would begin with the state; use --sampling windows"
            )
        if self.tune in (None, "full"):
            self._refuse(("frozen_dtype",), "needs --tune lora or state: else nothing is frozen")

    def _check_processes(self) -> None:
        given = [name for name in _OF_PROCESSES if getattr(self, name) is not None]
        if given and len(given) < len(_OF_PROCESSES):
            raise ValueError(f"{', '.join(map(option, _OF_PROCESSES))} must be given together")
        if given and self.cluster:
            raise ValueError(f"--cluster finds {', '.join(map(option, given))} itself")
        if self.num_processes is not None:
            check_positive("--num-processes", self.num_processes)

    def _refuse(self, names: Iterable[str], why: str) -> None:
        given = [option(name) for name in names if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{', '.join(given)} {why}")


__all__ = ["OF_A_NEW_MODEL", "Preset", "TrainSettings", "Tune"]
