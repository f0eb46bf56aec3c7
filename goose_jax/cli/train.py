"""`goose-jax train`: from a text to a trained or fine-tuned model in a folder of its own."""

import dataclasses
import shlex
import sys
from typing import assert_never

import jax
import tqdm

from goose_jax.cli.settings_file import to_values
from goose_jax.cli.train_arguments import check_changes
from goose_jax.cli.train_defaults import optimizer_config, with_defaults
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.cli.train_setup import Prepared, name_of_run, prepare
from goose_jax.generation import SamplingConfig, generate
from goose_jax.training import (
    NonFiniteError,
    RunDirectory,
    StepReport,
    StopRequest,
    Trainer,
    TrainerConfig,
    TrainState,
    make_evaluation,
)
from goose_jax.training.plots import has_matplotlib, plot_loss
from goose_jax.training.run_directory import HELD_OUT_METRIC
from goose_jax.training.step import Parameters
from goose_jax.training.tuning import STATE_FILE

_PROGRESS = (
    "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} passed, ETA {remaining}"
    "{postfix}"
)
_PROMPT_LENGTH = 40  # characters of the held-out text that the sample continues


def train(settings: TrainSettings) -> None:
    """Trains an RWKV-7 and keeps it in a folder, with its metrics and a loss curve.

    With --from it fine-tunes a model: all of it, adapters beside it (LoRA), or the state that a
    text begins with. Ctrl-C saves a checkpoint and says how to go on from it.

    In use:
      goose-jax train
      goose-jax train --data my-texts/ --steps 2000 --hidden-size 256
      goose-jax train --from rwkv7.pth --tune lora --data my-texts/ --steps 500
      goose-jax train --config my-settings.yaml --seed 2
      goose-jax train --resume runs/my-texts-1
      goose-jax train --resume runs/my-texts-1 --steps 4000
    """
    settings = with_defaults(settings)
    resumed = None if settings.resume is None else RunDirectory.open(settings.resume)
    if resumed is not None:
        check_changes(settings, resumed)
    if settings.plot and not has_matplotlib():
        raise ValueError(
            "the loss curve needs matplotlib: pip install 'goose-jax[plots]', or give --no-plot"
        )
    prepared = prepare(settings, resumed)
    settings = dataclasses.replace(settings, tokenizer=prepared.tokenizer_name)
    if resumed is None:
        run = RunDirectory.create(settings.out, name_of_run(settings), to_values(settings))
        trainer = _make_trainer(settings, run, prepared)
        state = trainer.start()
    else:
        trainer = _make_trainer(settings, resumed, prepared)
        state = trainer.resume()
        resumed.forget_after(int(state.step))
        resumed.write_settings(to_values(settings))
    _print_summary(settings, prepared, trainer, state)

    state = _fit(trainer, state)

    path = trainer.run.path
    bits = [line[HELD_OUT_METRIC] for line in trainer.run.metrics() if HELD_OUT_METRIC in line]
    print(f"held out: {bits[0]:.3f} bits per byte before training, {bits[-1]:.3f} after")
    if settings.plot:
        plot_loss(trainer.run.metrics(), path / "loss.png", title=path.name)
    prompt = _prompt(settings, prepared)
    if settings.sample_length:
        print(f"\n{_sample(settings, prepared, state, prompt)}\n")
    print(f"saved in {path}: {', '.join(sorted(file.name for file in path.iterdir()))}")
    print("to let the model continue a text:")
    commands = _how_to_use(settings, trainer.run, prepared.tokenizer_name)
    print("\n".join(f"  {line}" for line in commands), shlex.quote(f"--prompt={prompt}"))


def _make_trainer(settings: TrainSettings, run: RunDirectory, prepared: Prepared) -> Trainer:
    assert settings.batch_size is not None
    assert settings.sequence_length is not None
    evaluate = make_evaluation(
        prepared.tuning.model,
        prepared.text.held_out,
        prepared.text.tokenizer,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        loss=prepared.tuning.loss,
    )
    config = TrainerConfig(
        optimizer=optimizer_config(settings),
        evaluate_every=settings.evaluate_every,
        save_every=settings.save_every,
        keep=settings.keep,
    )
    return Trainer(
        run,
        prepared.tuning,
        prepared.batches,
        evaluate,
        config,
        tokenizer=prepared.tokenizer_name,
    )


def _print_summary(
    settings: TrainSettings, prepared: Prepared, trainer: Trainer, state: TrainState
) -> None:
    config, device = prepared.tuning.model.config, jax.devices()[0]
    held_out = sum(document.num_bytes for document in prepared.text.held_out)
    lines = [
        f"model:  {config.num_layers} layers, width {config.hidden_size}, "
        f"{config.num_heads} heads of {config.head_size}, "
        f"{_millions(prepared.tuning.frozen or state.params)} parameters",
        f"text:   {prepared.text.source}: {len(prepared.text.tokens)} tokens to train on, "
        f"{held_out} bytes held out",
        f"device: {device.device_kind} ({jax.default_backend()}), computing in "
        f"{config.compute_dtype}",
        f"run:    {trainer.run.path}"
        + (f", from step {int(state.step)}" if state.step else "")
        + f", {settings.steps} steps of "
        f"{(settings.batch_size or 0) * (settings.microbatches or 0)} x "
        f"{settings.sequence_length} tokens",
    ]
    if settings.from_ is not None:
        trained = f"{_purpose(settings)}, {_millions(state.params)} numbers"
        lines.insert(1, f"tuning: {settings.from_}: {trained}")
    print("\n".join(lines), flush=True)


def _millions(tree: Parameters) -> str:
    return f"{sum(array.size for array in jax.tree.leaves(tree)) / 1e6:.2f} million"


def _purpose(settings: TrainSettings) -> str:
    match settings.tune:
        case None | "full":
            return "the whole model"
        case "lora":
            rank, alpha = settings.lora_rank, settings.lora_alpha
            return f"adapters of rank {rank} (LoRA), alpha {alpha:g}"
        case "state":
            return "the states that a text begins with"
        case _:
            assert_never(settings.tune)


def _fit(trainer: Trainer, state: TrainState) -> TrainState:
    """Trains with a progress bar; exits with status 130 if Ctrl-C stops the run."""
    total = trainer.config.optimizer.total_steps
    with (
        StopRequest(on_request=_tell_request) as stop,
        tqdm.tqdm(
            total=total,
            initial=int(state.step),
            desc="compiling",
            bar_format=_PROGRESS,
            smoothing=0.05,
        ) as progress,
    ):

        def on_step(report: StepReport) -> None:
            progress.set_description("training", refresh=False)
            progress.set_postfix_str(
                f"loss {report.loss:.3f}, {report.tokens_per_second:,.0f} tokens/s", refresh=False
            )
            progress.update()

        def on_evaluation(step: int, bits_per_byte: float) -> None:
            if step > 0:
                progress.write(f"step {step}: {bits_per_byte:.3f} bits per byte on held-out text")

        try:
            state = trainer.fit(
                state,
                on_step=on_step,
                on_evaluation=on_evaluation,
                stop_requested=lambda: stop.requested,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; try a lower --learning-rate") from error
    if int(state.step) < total:
        print(f"stopped after step {int(state.step)}; to go on from there:")
        print(f"  goose-jax train --resume {shlex.quote(str(trainer.run.path))}", flush=True)
        sys.exit(130)
    return state


def _tell_request() -> None:
    tqdm.tqdm.write("saving after this step; press Ctrl-C again to stop at once", file=sys.stderr)


def _prompt(settings: TrainSettings, prepared: Prepared) -> str:
    """Returns the text that the sample continues: the user's, or the beginning of a held-out text.

    The latter is a first line or a part of one.
    """
    if settings.prompt is not None:
        return settings.prompt
    for document in prepared.text.held_out:
        for line in document.text.splitlines():
            if line.strip():
                return line[:_PROMPT_LENGTH].rstrip()
    return prepared.text.held_out[0].text[:_PROMPT_LENGTH]


def _sample(settings: TrainSettings, prepared: Prepared, state: TrainState, prompt: str) -> str:
    model, start = prepared.tuning.result(state.params)
    tokenizer = prepared.text.tokenizer
    end = tokenizer.end_of_document
    tokens = tokenizer.encode(prompt)
    generation = generate(
        model,
        [tokens],
        max_new_tokens=settings.sample_length,
        sampling=SamplingConfig(temperature=0.8, top_p=0.9),
        stop_tokens=[] if end is None else [end],
        seed=settings.seed,
        state=start,
    )
    return tokenizer.decode(tokens + generation.sequences[0])


def _how_to_use(settings: TrainSettings, run: RunDirectory, tokenizer: str) -> list[str]:
    """Returns the commands with which the result of a run continues a text."""
    folder, base = shlex.quote(str(run.path)), shlex.quote(str(settings.from_))
    match settings.tune:
        case None | "full":
            return [f"goose-jax generate {folder}"]
        case "lora":
            merged = shlex.quote(str(run.path / "merged"))
            return [
                f"goose-jax merge {folder} --base {base} --out {merged}",
                f"goose-jax generate {merged}",
            ]
        case "state":
            file, name = shlex.quote(str(run.path / STATE_FILE)), shlex.quote(tokenizer)
            return [f"goose-jax generate {base} --state {file} --tokenizer {name}"]
        case _:
            assert_never(settings.tune)


__all__ = ["train"]
