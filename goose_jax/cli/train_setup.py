"""What a run of `goose-jax train` begins with: its settings, model, text and state."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from goose_jax.checkpoints import load_checkpoint, load_optimizer_state
from goose_jax.cli.train_settings import TrainSettings, known, option
from goose_jax.cli.tuning import Full, Tuning, load_base, tuning_of
from goose_jax.nn import RWKV7
from goose_jax.text import Tokenizer, open_tokenizer, tokenizer_name
from goose_jax.training.adapter import check_base, load_adapter
from goose_jax.training.corpus import (
    Document,
    encode_documents,
    read_documents,
    split_documents,
    standard_library,
)
from goose_jax.training.optimizer import optimizer
from goose_jax.training.run_directory import RunDirectory
from goose_jax.training.step import TrainState, init_tuning_state


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """The text of a run.

    Attributes:
      name: for the run's folder.
      tokens: `[N]` int32, to train on.
      held_out: to measure on.
      checksum: of `tokens`.
      tokenizer: which made them.
    """

    name: str
    tokens: np.ndarray
    held_out: list[Document]
    checksum: str
    tokenizer: Tokenizer

    @classmethod
    def load(cls, settings: TrainSettings, tokenizer: Tokenizer) -> "TrainingText":
        """Reads, divides and encodes the text.

        Raises:
          OSError: if it cannot be read.
          ValueError: if it is no text, or too short.
        """
        if settings.data is None:
            source, name, documents = "the standard library", "stdlib", standard_library()
        else:
            source, name = str(settings.data), settings.data.absolute().stem or "run"
            documents = read_documents(settings.data, pattern=settings.pattern)
        training, held_out = split_documents(documents, held_out_bytes=settings.held_out_bytes)
        tokens = encode_documents(training, tokenizer)
        if len(tokens) <= known(settings.sequence_length):
            raise ValueError(
                f"{source} is too short: {len(tokens)} tokens to train on, "
                f"but {settings.sequence_length=}"
            )
        checksum = hashlib.sha256(tokens.tobytes()).hexdigest()
        return cls(name, tokens, held_out, checksum, tokenizer)


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
    settings: TrainSettings, run: RunDirectory, text: TrainingText, base: RWKV7 | None
) -> tuple[Tuning, TrainState]:
    """What a run trains, and the state of its newest checkpoint.

    Args:
      settings: of the run.
      run: to be resumed.
      text: which must be that of the run.
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
        adapter = load_adapter(path)
        check_base(adapter, base, known(settings.from_))
        tuning = tuning_of(dataclasses.replace(settings, state=None), base)
        params, metadata = adapter.params, adapter.metadata
    if metadata.extra.get("text") != text.checksum:
        raise ValueError(
            f"{run.path} cannot be resumed: it was trained on another text than is "
            f"{'in ' + str(settings.data) if settings.data else 'in this standard library'} now"
        )
    if metadata.step >= settings.steps:
        raise ValueError(f"{run.path} has made all of its {settings.steps} steps")
    like = jax.eval_shape(optimizer(settings.optimizer_config()).init, params)
    opt_state = load_optimizer_state(path, like)
    # The state's buffers are used up by the first step, the model's are not.
    params = jax.tree.map(jnp.copy, params)
    return tuning, TrainState(jnp.int32(metadata.step), params, opt_state)


__all__ = ["TrainingText", "continue_run", "find_base", "open_run", "start_run"]
