"""A training run: steps, measurements on held-out text, checkpoints, and resuming from them."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from goose_jax.checkpoints import CheckpointMetadata, Saving, load_optimizer_state
from goose_jax.data import Batch, BatchSource
from goose_jax.parallel import check_mesh, place_rows, place_tree, process_share
from goose_jax.parallel.processes import Agreement
from goose_jax.training.checkpoint_saver import CheckpointSaver
from goose_jax.training.evaluation import Evaluation
from goose_jax.training.metrics import MetricsWriter, summarise
from goose_jax.training.optimizer import OptimizerConfig, make_optimizer
from goose_jax.training.run_directory import HELD_OUT_METRIC, RunDirectory
from goose_jax.training.step import Metrics, TrainState, init_tuning_state, make_tuning_step
from goose_jax.training.throughput import flops_per_token, peak_memory
from goose_jax.training.training_loop import (
    STEPS_AHEAD,
    NonFiniteError,
    StepReport,
    raise_non_finite,
    train_steps,
)
from goose_jax.training.tuning import Tuning
from pallas_kernels.validation import check_positive

_CHECKSUM_OF_DATA = "text"  # its name in the metadata of checkpoints
_CHECKSUM_OF_HELD_OUT = "held_out_text"
_MOST_SKIPPED = 10  # steps one after another

type OnNonFinite = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The length of a run, and what it does between steps.

    Attributes:
      optimizer: numbers of the optimizer; `optimizer.total_steps` is the length of the run.
      log_every: number of steps that make one line of metrics.
      evaluate_every: number of steps between two measurements on held-out text. The run also
        measures before its first step and after its last.
      save_every: number of steps between two checkpoints. The run also saves after its last step.
      keep: number of newest checkpoints to keep. Others are removed, except for the next two.
      keep_best: whether to keep the checkpoint at whose step held-out text was measured best.
      keep_every: checkpoints whose step is a multiple of this are kept; None keeps no others.
      non_finite: what a loss or gradient does that is not finite. "stop" ends the run. "skip" goes
        on without this step, but ends the run after ten such steps one after another. Both write
        the batch of the step to the run's folder.
      peak_flops: operations that the devices make per second at most, for the metric "mfu"; None
        leaves it out.

    Raises:
      ValueError: if a number is not a positive integer.
    """

    optimizer: OptimizerConfig
    log_every: int = 10
    evaluate_every: int = 300
    save_every: int = 300
    keep: int = 2
    keep_best: bool = True
    keep_every: int | None = None
    non_finite: OnNonFinite = "stop"
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        for name in ("log_every", "evaluate_every", "save_every", "keep"):
            check_positive(name, getattr(self, name))
        if self.keep_every is not None:
            check_positive("keep_every", self.keep_every)


class Trainer:
    """Trains in the folder of a run, which receives metrics and checkpoints.

    A run that is resumed makes the same steps as one that was never interrupted. Nothing is
    printed: `fit` reports to functions that it is given.

    On a mesh of several processes, each process has a trainer and calls the same methods. The first
    process writes the metrics.

    Args:
      run: folder of the run.
      tuning: what is trained.
      batches: the data, one batch for each step.
      evaluate: measures held-out text, from `make_evaluation`.
      config: length of the run, and what it does between steps.
      tokenizer: name or path of the tokenizer, which checkpoints record.
      writers: get the metrics, too, which the run's folder gets in any case.
      mesh: the mesh to train on, from `goose_jax.parallel.make_mesh`; None for one device. A
        resumed run may have another mesh. `evaluate` must have been made for the same mesh.

    Raises:
      ValueError: if the mesh does not divide the model.

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
      evaluate: measures held-out text.
      config: length of the run, and what it does between steps.
      writers: get the metrics, too.
      mesh: the mesh to train on, or None.
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
        writers: Sequence[MetricsWriter] = (),
        mesh: Mesh | None = None,
    ):
        self.run, self.tuning, self.batches, self.config = run, tuning, batches, config
        self.evaluate, self.writers, self._tokenizer = evaluate, writers, tokenizer
        self.mesh = mesh
        if mesh is not None:
            check_mesh(mesh, tuning.model.config)
        self._frozen = tuning.frozen if mesh is None else place_tree(tuning.frozen, mesh)
        self._tuning_step = make_tuning_step(tuning.loss, config.optimizer, mesh=mesh)
        self._saver = CheckpointSaver(
            run, keep=config.keep, keep_best=config.keep_best, keep_every=config.keep_every
        )

    def start(self) -> TrainState:
        """Returns the state before the first step. Call this or `resume`, once."""
        return init_tuning_state(self.tuning.init(), self.config.optimizer, mesh=self.mesh)

    def resume(self, checkpoint: Path | None = None) -> TrainState:
        """Loads the state of a checkpoint of the run.

        Args:
          checkpoint: the checkpoint; None takes the newest. Call `run.rewind` before training on
            from another one.

        Raises:
          OSError: if the checkpoint cannot be read.
          CheckpointError: if it is damaged, or belongs to another model.
          ValueError: if it was trained on other data or measured on other held-out text, or no step
            is left.
        """
        path, total = checkpoint or self.run.newest_checkpoint, self.config.optimizer.total_steps
        params, metadata = self.tuning.load(path, mesh=self.mesh)
        if metadata.extra.get(_CHECKSUM_OF_DATA) != self.batches.checksum:
            raise ValueError(
                f"{self.run.path} cannot be resumed: it was trained on another text than is in "
                f"{self.batches.source} now"
            )
        if metadata.extra.get(_CHECKSUM_OF_HELD_OUT, self.evaluate.checksum) != (
            self.evaluate.checksum
        ):
            raise ValueError(
                f"{self.run.path} cannot be resumed: the held-out text is not the one it measured "
                "before"
            )
        if metadata.step >= total:
            raise ValueError(
                f"{self.run.path} has made all of its {total} steps; more steps train it longer"
            )
        like = jax.eval_shape(make_optimizer(self.config.optimizer).init, params)
        opt_state = load_optimizer_state(path, like, mesh=self.mesh)
        step = jnp.int32(metadata.step)
        step = step if self.mesh is None else place_tree(step, self.mesh)
        return TrainState(step, params, opt_state)

    def fit(
        self,
        state: TrainState,
        *,
        on_step: Callable[[StepReport], None] | None = None,
        on_evaluation: Callable[[int, float], None] | None = None,
        stop_requested: Callable[[], bool] | None = None,
    ) -> TrainState:
        """Trains to the last step, or until it is asked to stop.

        Checkpoints are written while training goes on; the last one is complete at the end.

        Steps are dispatched before those before them are done, so reports come some steps late. The
        device waits for the host only around measurements and checkpoints.

        Args:
          state: the state to start from, of `start` or `resume`. The first step uses it up.
          on_step: called with the report of each step.
          on_evaluation: called after each measurement on held-out text, with the number of steps
            made and bits per byte.
          stop_requested: asked after each step whether to save a checkpoint and stop. On several
            processes one of them suffices, and all stop some steps later.

        Returns:
          The state after the last step. If the run was stopped, its `step` is less than
          `config.optimizer.total_steps`.

        Raises:
          RunInUseError: if another process trains in the run's folder.
          NonFiniteError: if a loss, a gradient or a parameter is not finite. The error names the
            step and the newest checkpoint. Nothing is saved after that step.
          OSError: if metrics or a checkpoint cannot be written.
        """
        log = _Log(self, on_step or (lambda report: None), on_evaluation or (lambda *_: None))
        config, total = self.config, self.config.optimizer.total_steps
        stop, agree = False, Agreement(self.mesh, delay=STEPS_AHEAD)

        def wait_after(step: int) -> bool:
            nonlocal stop
            stop = agree(stop_requested is not None and stop_requested())
            return stop or step % config.evaluate_every == 0 or step % config.save_every == 0

        # One process holds the lock of the run for all.
        lock = self.run.lock() if jax.process_index() == 0 else contextlib.nullcontext()
        with lock:
            if int(state.step) == 0:
                log.measure(0, state)
            steps = train_steps(
                self._step,
                state,
                self.batches.for_process(*process_share(self.mesh)),
                steps=total,
                on_report=log.add,
                on_non_finite=log.non_finite,
                wait_after=wait_after,
            )
            try:
                for step, state in steps:
                    at_end = step == total
                    if at_end or step % config.evaluate_every == 0:
                        log.measure(step, state)
                    if at_end or stop or step % config.save_every == 0:
                        log.flush()
                        self._save(step, state)
                    if stop and not at_end:
                        break
                self._saver.finish()
            except NonFiniteError as error:
                log.flush()
                self._saver.finish()
                raise NonFiniteError(f"{error}; {self._saved_so_far()}") from error
            if int(state.step) < total:
                return state
            self.tuning.export(self.run.path, state.params)
        return state

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self._tuning_step(state, self._frozen, place_rows(batch, self.mesh))

    def evaluate_state(self, state: TrainState) -> float:
        """Returns bits per byte of held-out text."""
        return self.evaluate(state.params, self._frozen)

    def _save(self, step: int, state: TrainState) -> None:
        if names := _not_finite({"params": state.params, "optimizer": state.opt_state}):
            raise NonFiniteError(f"step {step}: {', '.join(names[:3])} is not finite")
        extra = {
            _CHECKSUM_OF_DATA: self.batches.checksum,
            _CHECKSUM_OF_HELD_OUT: self.evaluate.checksum,
        }
        metadata = CheckpointMetadata(self._tokenizer, step, extra)

        def begin(path: Path) -> Saving:
            return self.tuning.begin_save(path, state.params, metadata, opt_state=state.opt_state)

        self._saver.begin(step, begin)

    def _saved_so_far(self) -> str:
        if not self.run.checkpoints:
            return "no checkpoint was saved before"
        return f"{self.run.newest_checkpoint} is from before"


class _Log:
    """Writes what a trainer measures, and passes it on."""

    def __init__(
        self,
        trainer: Trainer,
        on_step: Callable[[StepReport], None],
        on_evaluation: Callable[[int, float], None],
    ):
        self._trainer, self._on_step, self._on_evaluation = trainer, on_step, on_evaluation
        self._reports: list[StepReport] = []
        self._skipped = 0  # steps one after another
        tuning = trainer.tuning
        self._flops_per_token = flops_per_token(tuning.model.config, all_trained=not tuning.frozen)

    def add(self, report: StepReport) -> None:
        """Takes the report of the next step."""
        self._skipped = 0 if report.is_finite else self._skipped + 1
        self._reports.append(report)
        self._on_step(report)
        if report.step % self._trainer.config.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Writes one line for the reports since the last line, if there are any."""
        if not self._reports:
            return
        values = summarise(
            self._reports,
            bytes_per_token=self._trainer.evaluate.bytes_per_token,
            flops_per_token=self._flops_per_token,
            peak_flops=self._trainer.config.peak_flops,
        )
        self._reports = []
        self._write(values | peak_memory())

    def measure(self, step: int, state: TrainState) -> None:
        """Measures held-out text, after a line for the steps before."""
        self.flush()
        bits_per_byte = self._trainer.evaluate_state(state)
        values = {"step": step}
        if math.isfinite(bits_per_byte):
            self._write(values | {HELD_OUT_METRIC: bits_per_byte})
        self._on_evaluation(step, bits_per_byte)

    def non_finite(self, report: StepReport, batch: Batch) -> None:
        """Writes the batch of a step that is not finite, and raises an error if the run must end.

        Raises:
          NonFiniteError: if such a step ends the run, or ten came one after another.
        """
        file = self._trainer.run.save_batch(report.step, batch)
        if self._trainer.config.non_finite == "skip" and self._skipped + 1 < _MOST_SKIPPED:
            return
        try:
            raise_non_finite(report, batch)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (its batch is in {file})") from None

    def _write(self, values: dict[str, Any]) -> None:
        if jax.process_index() > 0:
            return
        self._trainer.run.log(values)
        step = values["step"]
        for writer in self._trainer.writers:
            writer.write(step, {name: value for name, value in values.items() if name != "step"})


@jax.jit
def _are_finite(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)


def _not_finite(tree: Any) -> list[str]:
    """Returns the paths of the arrays that hold a value that is infinite or NaN."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, is_finite in jax.tree.leaves_with_path(jax.device_get(_are_finite(tree)))
        if not is_finite
    ]


__all__ = ["OnNonFinite", "Trainer", "TrainerConfig"]
