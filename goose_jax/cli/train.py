"""`goose-jax train`: from a text to a trained or fine-tuned model in a folder of its own."""

import contextlib
import dataclasses
import functools
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import assert_never

import jax

from goose_jax.checkpoints.directory import verify_directory
from goose_jax.cli.memory import parameters_fit
from goose_jax.cli.settings_file import to_values
from goose_jax.cli.train_arguments import check_changes
from goose_jax.cli.train_checks import check_before_training, check_steps_left, refusals_named
from goose_jax.cli.train_defaults import optimizer_config, with_defaults
from goose_jax.cli.train_devices import describe_devices, joined_processes
from goose_jax.cli.train_progress import Progress, tell_request, terminals
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.cli.train_setup import Prepared, name_of_run, prepare
from goose_jax.cli.unused_run import removed_if_unused
from goose_jax.generation import SamplingConfig, generate
from goose_jax.parallel.processes import from_first_process, lost_processes_named
from goose_jax.text import tokenizer_files
from goose_jax.training import (
    MetricsWriter,
    NonFiniteError,
    RunDirectory,
    StopRequest,
    TensorBoardWriter,
    Trainer,
    TrainerConfig,
    TrainState,
    WandbWriter,
    make_evaluation,
)
from goose_jax.training.plots import has_matplotlib, plot_loss
from goose_jax.training.run_directory import HELD_OUT_METRIC
from goose_jax.training.step import Parameters
from goose_jax.training.throughput import peak_flops
from goose_jax.training.tuning import STATE_FILE

_PROMPT_WORDS = 3  # words of a line at least, and
_PROMPT_LENGTH = 40  # characters at most, of the held-out text that the sample continues


def train(settings: TrainSettings) -> None:
    """Trains an RWKV-7 and keeps it in a folder, with its metrics and a loss curve.

    With --from it fine-tunes a model: all of it, adapters beside it (LoRA), or the state that a
    text begins with. Ctrl-C saves a checkpoint and says how to go on from it.

    In use:
      goose-jax train
      goose-jax train --data my-texts/ --steps 2000 --hidden-size 256
      goose-jax train --from rwkv7.pth --tune lora --data chats.jsonl --sampling packed --steps 500
      goose-jax train --config my-settings.yaml --seed 2
      goose-jax train --resume runs/my-texts-1
      goose-jax train --resume runs/my-texts-1 --steps 4000
      goose-jax train --mesh data=2,fsdp=4
      goose-jax train --coordinator host0:9876 --num-processes 2 --process-id 0
    """
    with joined_processes(settings), lost_processes_named(), refusals_named(settings):
        _train(settings)


def _train(settings: TrainSettings) -> None:
    settings = with_defaults(settings)
    if settings.plot and not has_matplotlib():
        raise ValueError(
            "the loss curve needs matplotlib: pip install 'goose-jax[plots]', or give --no-plot"
        )
    check_before_training(settings)
    if settings.resume is None:
        prepared = prepare(settings, None)
        settings = dataclasses.replace(settings, tokenizer=prepared.tokenizer_name)
        with _new_run(settings, prepared) as (run, kept):
            prepared = dataclasses.replace(prepared, tokenizer_name=kept)
            _train_in(run, settings, prepared, None)
        return
    run = RunDirectory.open(settings.resume)
    check_changes(settings, run)
    resume = settings.resume
    with _locked(run):
        checkpoint = Path(from_first_process(lambda: str(_checkpoint_to_resume(resume, run))))
        check_steps_left(settings, checkpoint)
        beside = run.path.resolve().parent  # --out may be relative to another folder than this
        prepared = prepare(dataclasses.replace(settings, out=beside), checkpoint)
        _train_in(run, settings, prepared, checkpoint)


@contextlib.contextmanager
def _new_run(settings: TrainSettings, prepared: Prepared) -> Iterator[tuple[RunDirectory, str]]:
    """Makes the folder of a new run, and yields it locked, with the tokenizer that it keeps."""

    def create() -> str:
        name = name_of_run(settings)
        return str(RunDirectory.create(settings.out, name, to_values(settings)).path)

    files = tokenizer_files(prepared.tokenizer_name)
    run = RunDirectory(from_first_process(create))
    with _locked(run), removed_if_unused(run, files):
        kept = from_first_process(lambda: run.keep_tokenizer(prepared.tokenizer_name))
        yield run, kept


def _locked(run: RunDirectory) -> contextlib.AbstractContextManager[None]:
    """Locks a run for all its processes, by the first one."""
    return run.lock() if jax.process_index() == 0 else contextlib.nullcontext()


def _checkpoint_to_resume(path: Path, run: RunDirectory) -> Path:
    """Returns the checkpoint that the user named, or the newest one of the run that is intact."""
    if path.resolve() != run.path.resolve():
        verify_directory(path)
        return path.absolute()
    return run.intact_checkpoint()


def _train_in(
    run: RunDirectory, settings: TrainSettings, prepared: Prepared, checkpoint: Path | None
) -> None:
    """Trains in the folder of a run, from its beginning or from a checkpoint."""
    with contextlib.ExitStack() as stack:
        stack.callback(prepared.close)
        writers: list[MetricsWriter] = []
        trainer = _make_trainer(settings, run, prepared, writers)
        if checkpoint is None:
            with parameters_fit(settings):
                state = trainer.start()
        else:
            state = trainer.resume(checkpoint)
            from_first_process(lambda: _rewind(run, int(state.step), settings))
        for writer in _open_writers(settings, run, int(state.step)):
            stack.callback(writer.close)
            writers.append(writer)
        _print_summary(settings, prepared, trainer, state)
        state = _fit(trainer, state)

    path = run.path
    bits = [line[HELD_OUT_METRIC] for line in run.metrics() if HELD_OUT_METRIC in line]
    if bits:  # those that were not finite are not recorded
        print(f"held out: {bits[0]:.3f} bits per byte before training, {bits[-1]:.3f} after")
    if settings.plot and jax.process_index() == 0:
        plot_loss(run.metrics(), path / "loss.png", title=path.name)
    prompt = _prompt(settings, prepared)
    if settings.sample_length:
        print(f"\n{_sample(settings, prepared, state, prompt)}\n")
    left = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
    print(f"saved in {path}: {', '.join(left)}")
    print("to let the model continue a text:")
    commands = _how_to_use(settings, run, prepared.tokenizer_name)
    print("\n".join(f"  {line}" for line in commands), shlex.quote(f"--prompt={prompt}"))


def _rewind(run: RunDirectory, step: int, settings: TrainSettings) -> str:
    """Makes the run what it was after a step; returns where later checkpoints are, or ""."""
    folder = run.rewind(step)
    if folder is not None:  # told before anything else can fail
        print(f"later checkpoints and a copy of the metrics are in {folder}", flush=True)
    run.write_settings(to_values(settings))
    return "" if folder is None else str(folder)


def _open_writers(settings: TrainSettings, run: RunDirectory, step: int) -> Iterator[MetricsWriter]:
    if jax.process_index() > 0:
        return
    if settings.tensorboard:
        yield TensorBoardWriter(run.path / "tensorboard", first_step=step)
    if settings.wandb is not None:
        yield WandbWriter(settings.wandb, run.path, to_values(settings))


def _make_trainer(
    settings: TrainSettings, run: RunDirectory, prepared: Prepared, writers: list[MetricsWriter]
) -> Trainer:
    assert settings.batch_size is not None
    assert settings.sequence_length is not None
    evaluate = make_evaluation(
        prepared.tuning.model,
        prepared.text.held_out,
        prepared.text.tokenizer,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        loss=prepared.tuning.loss,
        mesh=prepared.mesh,
    )
    config = TrainerConfig(
        optimizer=optimizer_config(settings),
        log_every=settings.log_every,
        evaluate_every=settings.evaluate_every,
        save_every=settings.save_every,
        keep=settings.keep,
        keep_best=settings.keep_best,
        keep_every=settings.keep_every,
        non_finite=settings.non_finite,
        peak_flops=_peak_flops(settings, prepared),
    )
    return Trainer(
        run,
        prepared.tuning,
        prepared.batches,
        evaluate,
        config,
        tokenizer=prepared.tokenizer_name,
        writers=writers,
        mesh=prepared.mesh,
    )


def _peak_flops(settings: TrainSettings, prepared: Prepared) -> float | None:
    if settings.peak_tflops is not None:
        return settings.peak_tflops * 1e12
    of_one = peak_flops(jax.devices()[0], str(prepared.tuning.model.config.compute_dtype))
    devices = 1 if prepared.mesh is None else prepared.mesh.size
    return None if of_one is None else of_one * devices


def _print_summary(
    settings: TrainSettings, prepared: Prepared, trainer: Trainer, state: TrainState
) -> None:
    config = prepared.tuning.model.config
    held_out = sum(document.num_bytes for document in prepared.text.held_out)
    skipped = prepared.text.num_skipped
    lines = [
        f"model:  {config.num_layers} layers, width {config.hidden_size}, "
        f"{config.num_heads} heads of {config.head_size}, "
        f"{_millions(prepared.tuning.frozen or state.params)} parameters",
        f"text:   {prepared.text.source}: {len(prepared.text.tokens)} tokens to train on, "
        f"{held_out} bytes held out"
        + (f", {skipped} files left out that are not text" if skipped else ""),
        f"device: {describe_devices(prepared.mesh)}, computing in {config.compute_dtype}",
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
    """Trains with a progress bar; exits with 128 plus the signal's number if one stops the run.

    A closed pipe of what is printed is taken as SIGPIPE: it stops the run, which saves first.
    """
    total = trainer.config.optimizer.total_steps
    tell = functools.partial(tell_request, terminals=terminals())
    stop = StopRequest(tell)
    closed_pipe = functools.partial(stop.request, signal.SIGPIPE)
    with stop, Progress(total, closed_pipe) as progress:
        if jax.process_index() == 0:
            print("compiling ...", file=sys.stderr, flush=True)
        try:
            state = trainer.fit(
                state,
                on_step=progress.add,
                on_evaluation=progress.tell_evaluation,
                stop_requested=lambda: stop.requested,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; try a lower --learning-rate") from error
    if int(state.step) < total:
        print(f"stopped after step {int(state.step)}; to go on from there:")
        print(f"  goose-jax train --resume {shlex.quote(str(trainer.run.path))}", flush=True)
        sys.exit(stop.exit_status or 128 + signal.SIGTERM)  # another process got the signal
    return state


def _prompt(settings: TrainSettings, prepared: Prepared) -> str:
    """Returns the text that the sample continues: the user's, or the beginning of a held-out text.

    The latter is the beginning of the first line with some words, or else of the text.
    """
    if settings.prompt is not None:
        return settings.prompt
    texts = [document.text for document in prepared.text.held_out]
    lines = (line for text in texts for line in text.splitlines())
    chosen = next((line for line in lines if len(line.split()) >= _PROMPT_WORDS), texts[0])
    return chosen[:_PROMPT_LENGTH].rstrip() or texts[0][:_PROMPT_LENGTH]


def _sample(settings: TrainSettings, prepared: Prepared, state: TrainState, prompt: str) -> str:
    if jax.process_count() > 1:
        return "(no sample: the model is divided over several processes)"
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
        implementation=None if prepared.mesh is None else "xla",
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
