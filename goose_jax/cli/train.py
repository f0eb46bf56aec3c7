"""`goose-jax train`: from a text to a trained or fine-tuned model in a folder of its own."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import jax
import tqdm
import tyro

from goose_jax.checkpoints import CheckpointMetadata
from goose_jax.cli.train_settings import TrainSettings, known
from goose_jax.cli.train_setup import (
    continue_run,
    find_base,
    load_text,
    name_of_run,
    open_run,
    start_run,
    windows_of,
)
from goose_jax.cli.tuning import Tuning
from goose_jax.data import Batch, RandomWindows, TrainingText
from goose_jax.generation import SamplingConfig, generate
from goose_jax.text import Tokenizer, get_tokenizer
from goose_jax.training.evaluation import make_evaluation
from goose_jax.training.plots import check_matplotlib, plot_loss
from goose_jax.training.run_directory import RunDirectory
from goose_jax.training.step import Metrics, Parameters, TrainState, make_tuning_step
from goose_jax.training.stop_request import StopRequest
from goose_jax.training.training_loop import NonFiniteError, StepReport, train_steps

_HELD_OUT = "held_out_bits_per_byte"
_PROGRESS = (
    "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} passed, ETA {remaining}"
    "{postfix}"
)


def train(settings: Annotated[TrainSettings, tyro.conf.arg(name="")]) -> None:
    """Trains an RWKV-7 and keeps it in a folder, with its metrics and a loss curve.

    With --from it fine-tunes a model: all of it, adapters beside it (LoRA), or the state that a
    text begins with. Ctrl-C saves a checkpoint and says how to go on from it.

    In use:
      goose-jax train
      goose-jax train --data my-texts/ --steps 2000 --hidden-size 256
      goose-jax train --from rwkv7.pth --tune lora --data my-texts/ --steps 500
      goose-jax train --resume runs/my-texts-1
    """
    run, settings = open_run(settings)
    if settings.plot:
        check_matplotlib()
    base, settings = find_base(settings, resumed=run is not None)
    tokenizer = get_tokenizer(known(settings.tokenizer))
    text = load_text(settings, tokenizer)
    batches = windows_of(settings, text)
    if run is None:
        tuning, state = start_run(settings, base, tokenizer)
        run = RunDirectory.create(settings.out, name_of_run(settings), settings.to_json())
    else:
        tuning, state = continue_run(settings, run, batches, base)
    _print_summary(settings, run, text, tuning, state)

    state = _Training(settings, run, text, batches, tuning).fit(state)

    bits = [line[_HELD_OUT] for line in run.metrics() if _HELD_OUT in line]
    print(f"held out: {bits[0]:.3f} bits per byte before training, {bits[-1]:.3f} after")
    if settings.plot:
        plot_loss(run.metrics(), run.path / "loss.png", title=run.path.name)
    if settings.sample_length:
        print(f"\n{_sample(tuning, state, settings, tokenizer)}\n")
    print(f"saved in {run.path}: {', '.join(sorted(file.name for file in run.path.iterdir()))}")
    print("to let the model continue a text:")
    commands = tuning.how_to_use(run.path, known(settings.tokenizer))
    print("\n".join(f"  {line}" for line in commands), f"--prompt {shlex.quote(settings.prompt)}")


def _print_summary(
    settings: TrainSettings,
    run: RunDirectory,
    text: TrainingText,
    tuning: Tuning,
    state: TrainState,
) -> None:
    config, device = tuning.model.config, jax.devices()[0]
    weights = tuning.initial if tuning.frozen is None else tuning.frozen
    held_out = sum(document.num_bytes for document in text.held_out)
    lines = [
        f"model:  {config.num_layers} layers, width {config.hidden_size}, "
        f"{config.num_heads} heads of {config.head_size}, {_millions(weights)} parameters",
        f"text:   {text.source}: {len(text.tokens)} tokens to train on, {held_out} bytes held out",
        f"device: {device.device_kind} ({jax.default_backend()}), computing in "
        f"{config.compute_dtype}",
        f"run:    {run.path}"
        + (f", from step {int(state.step)}" if state.step else "")
        + f", {settings.steps} steps of {settings.batch_size * settings.microbatches} x "
        f"{settings.sequence_length} tokens",
    ]
    if settings.from_ is not None:
        trained = f"{tuning.purpose}, {_millions(state.params)} numbers"
        lines.insert(1, f"tuning: {settings.from_}: {trained}")
    print("\n".join(lines), flush=True)


def _millions(tree: Parameters) -> str:
    return f"{sum(array.size for array in jax.tree.leaves(tree)) / 1e6:.2f} million"


class _Training:
    """The run itself: steps, measurements and checkpoints."""

    def __init__(
        self,
        settings: TrainSettings,
        run: RunDirectory,
        text: TrainingText,
        batches: RandomWindows,
        tuning: Tuning,
    ) -> None:
        self._settings, self._run, self._batches, self._tuning = settings, run, batches, tuning
        self._tuning_step = make_tuning_step(tuning.losses, settings.optimizer_config())
        self._evaluate = make_evaluation(
            tuning.model,
            text.held_out,
            text.tokenizer,
            batch_size=settings.batch_size,
            sequence_length=known(settings.sequence_length),
            losses=tuning.losses,
        )

    def fit(self, state: TrainState) -> TrainState:
        """Trains to the end and returns the last state; exits if asked to stop before."""
        settings = self._settings
        if int(state.step) == 0:
            self._measure(state)
        steps = train_steps(self._step, state, self._batches, steps=settings.steps)
        with (
            StopRequest(on_request=_tell_request) as stop,
            tqdm.tqdm(
                total=settings.steps,
                initial=int(state.step),
                desc="compiling",
                bar_format=_PROGRESS,
                smoothing=0.05,
            ) as progress,
        ):
            try:
                for state, report in steps:
                    self._report(report, progress)
                    at_end = report.step == settings.steps
                    if at_end or report.step % settings.evaluate_every == 0:
                        progress.write(f"step {report.step}: {self._measure(state)}")
                    if at_end or stop.requested or report.step % settings.save_every == 0:
                        self._save(state)
                    if stop.requested and not at_end:
                        break
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}; {self._saved_so_far()}") from error
        if int(state.step) < settings.steps:
            print(f"stopped after step {int(state.step)}; to go on from there:")
            print(f"  goose-jax train --resume {shlex.quote(str(self._run.path))}", flush=True)
            sys.exit(130)
        self._tuning.export(self._run.path, state.params)
        return state

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self._tuning_step(state, self._tuning.frozen, batch)

    def _report(self, report: StepReport, progress: tqdm.tqdm) -> None:
        self._run.log(
            dataclasses.asdict(report) | {"tokens_per_second": round(report.tokens_per_second)}
        )
        progress.set_description("training", refresh=False)
        progress.set_postfix_str(
            f"loss {report.loss:.3f}, {report.tokens_per_second:,.0f} tokens/s", refresh=False
        )
        progress.update()

    def _measure(self, state: TrainState) -> str:
        bits = self._evaluate(state.params, self._tuning.frozen)
        self._run.log({"step": int(state.step), _HELD_OUT: bits})
        return f"{bits:.3f} bits per byte on held-out text"

    def _save(self, state: TrainState) -> None:
        step, extra = int(state.step), {"text": self._batches.checksum}
        metadata = CheckpointMetadata(self._settings.tokenizer, step, extra)

        def write(path: Path) -> None:
            self._tuning.save(path, state.params, metadata, state.opt_state)

        self._run.save(step, write, keep=self._settings.keep)

    def _saved_so_far(self) -> str:
        checkpoints = self._run.path / "checkpoints"
        if not checkpoints.exists():
            return "no checkpoint was saved before; try a lower --learning-rate"
        return f"{self._run.newest_checkpoint} is from before; try a lower --learning-rate"


def _tell_request() -> None:
    tqdm.tqdm.write("saving after this step; press Ctrl-C again to stop at once", file=sys.stderr)


def _sample(
    tuning: Tuning, state: TrainState, settings: TrainSettings, tokenizer: Tokenizer
) -> str:
    model, start = tuning.result(state.params)
    end = tokenizer.end_of_document
    prompt = tokenizer.encode(settings.prompt)
    generation = generate(
        model,
        [prompt],
        max_new_tokens=settings.sample_length,
        sampling=SamplingConfig(temperature=0.8, top_p=0.9),
        stop_tokens=[] if end is None else [end],
        seed=settings.seed,
        state=start,
    )
    return tokenizer.decode(prompt + generation.sequences[0])


__all__ = ["train"]
