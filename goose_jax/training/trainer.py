"""A training run: steps, measurements on held-out text, checkpoints, and resuming from them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from goose_jax.checkpoints import CheckpointMetadata, load_optimizer_state
from goose_jax.data import Batch, BatchSource
from goose_jax.training.evaluation import Evaluation
from goose_jax.training.optimizer import OptimizerConfig, make_optimizer
from goose_jax.training.run_directory import HELD_OUT_METRIC, RunDirectory
from goose_jax.training.step import Metrics, TrainState, init_tuning_state, make_tuning_step
from goose_jax.training.training_loop import NonFiniteError, StepReport, train_steps
from goose_jax.training.tuning import Tuning
from pallas_kernels.validation import check_positive

_CHECKSUM_OF_DATA = "text"  # its name in the metadata of checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The length of a run, and what it does between steps.

    Attributes:
      optimizer: numbers of the optimizer; `optimizer.total_steps` is the length of the run.
      evaluate_every: number of steps between two measurements on held-out text. The run also
        measures before its first step and after its last.
      save_every: number of steps between two checkpoints. The run also saves after its last step.
      keep: number of checkpoints to keep; older ones are removed.

    Raises:
      ValueError: if a number is not a positive integer.
    """

    optimizer: OptimizerConfig
    evaluate_every: int = 300
    save_every: int = 300
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "save_every", "keep"):
            check_positive(name, getattr(self, name))


class Trainer:
    """Trains in the folder of a run, which receives metrics and checkpoints.

    A run that is resumed makes the same steps as one that was never interrupted. Nothing is
    printed: `fit` reports to functions that it is given.

    Args:
      run: folder of the run.
      tuning: what is trained.
      batches: the data, one batch for each step.
      evaluate: measures held-out text, from `make_evaluation`.
      config: length of the run, and what it does between steps.
      tokenizer: name or path of the tokenizer, which checkpoints record.

    Example:
      >>> model = RWKV7(RWKV7Config(vocab_size=257, hidden_size=64, num_layers=1), rngs=nnx.Rngs(0))
      >>> tuning, tokenizer = FullTuning(model), ByteTokenizer()
      >>> text = TrainingText.from_documents(
      ...     read_documents("poems"), tokenizer, source="poems", held_out_bytes=4096
      ... )
      >>> size = {"batch_size": 8, "sequence_length": 128}
      >>> trainer = Trainer(
      ...     RunDirectory.create("runs", "poems", settings={}),
      ...     tuning,
      ...     text.windows(**size, seed=0),
      ...     make_evaluation(model, text.held_out, tokenizer, **size),
      ...     TrainerConfig(optimizer=OptimizerConfig(total_steps=1000)),
      ...     tokenizer="byte",
      ... )
      >>> state = trainer.fit(trainer.start(), on_step=lambda report: print(report.loss))
      >>> trained, _ = tuning.result(state.params)

    Attributes:
      run: folder of the run.
      tuning: what is trained.
      batches: the data.
      config: length of the run, and what it does between steps.
    """

    def __init__(
        self,
        run: RunDirectory,
        tuning: Tuning,
        batches: BatchSource,
        evaluate: Evaluation,
        config: TrainerConfig,
        *,
        tokenizer: str,
    ):
        self.run, self.tuning, self.batches, self.config = run, tuning, batches, config
        self._evaluate, self._tokenizer = evaluate, tokenizer
        self._tuning_step = make_tuning_step(tuning.loss, config.optimizer)

    def start(self) -> TrainState:
        """Returns the state before the first step."""
        return init_tuning_state(self.tuning.init(), self.config.optimizer)

    def resume(self) -> TrainState:
        """Loads the state of the run's newest checkpoint.

        Raises:
          OSError: if the checkpoint cannot be read.
          CheckpointError: if it is damaged, or belongs to another model.
          ValueError: if it was trained on other data, or no step is left.
        """
        path, total = self.run.newest_checkpoint, self.config.optimizer.total_steps
        params, metadata = self.tuning.load(path)
        if metadata.extra.get(_CHECKSUM_OF_DATA) != self.batches.checksum:
            raise ValueError(
                f"{self.run.path} cannot be resumed: it was trained on another text than is in "
                f"{self.batches.source} now"
            )
        if metadata.step >= total:
            raise ValueError(f"{self.run.path} has made all of its {total} steps")
        like = jax.eval_shape(make_optimizer(self.config.optimizer).init, params)
        return TrainState(jnp.int32(metadata.step), params, load_optimizer_state(path, like))

    def fit(
        self,
        state: TrainState,
        *,
        on_step: Callable[[StepReport], None] | None = None,
        on_evaluation: Callable[[int, float], None] | None = None,
        stop_requested: Callable[[], bool] | None = None,
    ) -> TrainState:
        """Trains to the last step, or until it is asked to stop.

        Args:
          state: the state to start from, of `start` or `resume`. The first step uses it up.
          on_step: called with a report after each step.
          on_evaluation: called after each measurement on held-out text, with the number of steps
            made and bits per byte.
          stop_requested: asked after each step whether to save a checkpoint and stop.

        Returns:
          The state after the last step. If the run was stopped, its `step` is less than
          `config.optimizer.total_steps`.

        Raises:
          NonFiniteError: if a loss or gradient is not finite. The error names the step and the
            newest checkpoint. Nothing is saved after that step.
          OSError: if metrics or a checkpoint cannot be written.
        """
        total = self.config.optimizer.total_steps

        def measure(step: int, state: TrainState) -> None:
            bits_per_byte = self._evaluate(state.params, self.tuning.frozen)
            self.run.log({"step": step, HELD_OUT_METRIC: bits_per_byte})
            if on_evaluation is not None:
                on_evaluation(step, bits_per_byte)

        if int(state.step) == 0:
            measure(0, state)
        steps = train_steps(self._step, state, self.batches, steps=total)
        try:
            for state, report in steps:
                self._log(report)
                if on_step is not None:
                    on_step(report)
                at_end = report.step == total
                if at_end or report.step % self.config.evaluate_every == 0:
                    measure(report.step, state)
                stop = stop_requested is not None and stop_requested()
                if at_end or stop or report.step % self.config.save_every == 0:
                    self._save(report.step, state)
                if stop and not at_end:
                    return state
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {self._saved_so_far()}") from error
        self.tuning.export(self.run.path, state.params)
        return state

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self._tuning_step(state, self.tuning.frozen, batch)

    def _log(self, report: StepReport) -> None:
        speed = {"tokens_per_second": round(report.tokens_per_second)}
        self.run.log(dataclasses.asdict(report) | speed)

    def _save(self, step: int, state: TrainState) -> None:
        extra = {_CHECKSUM_OF_DATA: self.batches.checksum}
        metadata = CheckpointMetadata(self._tokenizer, step, extra)

        def write(path: Path) -> None:
            self.tuning.save(path, state.params, metadata, opt_state=state.opt_state)

        self.run.save(step, write, keep=self.config.keep)

    def _saved_so_far(self) -> str:
        if not self.run.checkpoints:
            return "no checkpoint was saved before"
        return f"{self.run.newest_checkpoint} is from before"


__all__ = ["Trainer", "TrainerConfig"]
