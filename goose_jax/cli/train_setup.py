"""What a run of `goose-jax train` begins with: its settings, model, text and state."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from goose_jax.checkpoints import load_checkpoint, load_optimizer_state
from goose_jax.cli.train_settings import TrainSettings, known, option
from goose_jax.cli.tuning import Full, Tuning, load_base, tuning_of
from goose_jax.data import RandomWindows, TrainingText, read_documents, standard_library
from goose_jax.nn import RWKV7
from goose_jax.text import Tokenizer, open_tokenizer, tokenizer_name
from goose_jax.training.optimizer import make_optimizer
from goose_jax.training.run_directory import RunDirectory
from goose_jax.training.step import TrainState, init_tuning_state
from goose_jax.training.tuning_checkpoint import check_base, load_tuning_checkpoint


def load_text(settings: TrainSettings, tokenizer: Tokenizer) -> TrainingText:
    """Reads, divides and encodes the text of a run.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is no text, or too short.
    """
    if settings.data is None:
        source, documents = "the standard library of this Python", standard_library()
    else:
        source = str(settings.data)
        documents = read_documents(settings.data, pattern=settings.pattern)
    return TrainingText.from_documents(
        documents, tokenizer, source=source, held_out_bytes=settings.held_out_bytes
    )


def name_of_run(settings: TrainSettings) -> str:
    """Returns what the folder of a new run is called, without its number."""
    return "stdlib" if settings.data is None else settings.data.absolute().stem or "run"


def windows_of(settings: TrainSettings, text: TrainingText) -> RandomWindows:
    """Returns the batches that a run trains on.

    Raises:
      ValueError: if the text is too short.
    """
    return text.windows(
        batch_size=settings.batch_size,
        sequence_length=known(settings.sequence_length),
        seed=settings.seed,
        microbatches=settings.microbatches,
    )


def open_run(settings: TrainSettings) -> tuple[RunDirectory | None, TrainSettings]:
    """The run that is resumed, or None for a new one; and all of its settings.

    Raises:
      OSError: if there is no such run.
      ValueError: if it is damaged, or settings were given that it has already.
    """
    if settings.resume is None:
        return None, settings.with_defaults()
    changed = [
        option(field.name)
        for field in dataclasses.fields(settings)
        if field.name != "resume" and getattr(settings, field.name) != field.default
    ]
    if changed:
        raise ValueError(f"a resumed run keeps its settings; leave out {', '.join(changed)}")
    run, values = RunDirectory.open(settings.resume)
    return run, TrainSettings.from_json(values).with_defaults()


def find_base(settings: TrainSettings, *, resumed: bool) -> tuple[RWKV7 | None, TrainSettings]:
    """The model to fine-tune, unless the run's own checkpoint is it; and the tokenizer's name."""
    if settings.from_ is None or (resumed and settings.tune == "full"):
        return None, settings
    model, metadata = load_base(settings)
    name = tokenizer_name(settings.from_, given=settings.tokenizer, recorded=metadata.tokenizer)
    open_tokenizer(name, model.config.vocab_size)
    return model, dataclasses.replace(settings, tokenizer=name)


def start_run(
    settings: TrainSettings, base: RWKV7 | None, tokenizer: Tokenizer
) -> tuple[Tuning, TrainState]:
    """What a new run trains, and the state before its first step.

    Args:
      settings: of the run.
      base: the model to fine-tune; None makes a new one.
      tokenizer: gives a new model's vocabulary.
    """
    config = settings.optimizer_config()
    if base is None:
        rngs = nnx.Rngs(settings.seed)
        base = RWKV7(settings.model_config(tokenizer.vocab_size), rngs=rngs)
    tuning = tuning_of(settings, base)
    return tuning, init_tuning_state(tuning.initial, config)


def continue_run(
    settings: TrainSettings, run: RunDirectory, batches: RandomWindows, base: RWKV7 | None
) -> tuple[Tuning, TrainState]:
    """What a run trains, and the state of its newest checkpoint.

    Args:
      settings: of the run.
      run: to be resumed.
      batches: which must be those of the run.
      base: the model beside which something is tuned; None takes that of the checkpoint.

    Raises:
      OSError: if the checkpoint cannot be read.
      ValueError: if it is damaged, the text or the base is another, or no step is left.
    """
    path = run.newest_checkpoint
    if base is None:
        model, metadata = load_checkpoint(path)
        tuning: Tuning = Full(model)
        params = tuning.initial
    else:
        adapter = load_tuning_checkpoint(path)
        check_base(adapter, base, known(settings.from_))
        tuning = tuning_of(dataclasses.replace(settings, state=None), base)
        params, metadata = adapter.params, adapter.metadata
    if metadata.extra.get("text") != batches.checksum:
        raise ValueError(
            f"{run.path} cannot be resumed: it was trained on another text than is "
            f"{'in ' + str(settings.data) if settings.data else 'in this standard library'} now"
        )
    if metadata.step >= settings.steps:
        raise ValueError(f"{run.path} has made all of its {settings.steps} steps")
    like = jax.eval_shape(make_optimizer(settings.optimizer_config()).init, params)
    opt_state = load_optimizer_state(path, like)
    # The state's buffers are used up by the first step, the model's are not.
    params = jax.tree.map(jnp.copy, params)
    return tuning, TrainState(jnp.int32(metadata.step), params, opt_state)


__all__ = [
    "continue_run",
    "find_base",
    "load_text",
    "name_of_run",
    "open_run",
    "start_run",
    "windows_of",
]
