"""Opens what a run of `goose-jax train` begins with: its settings, model, tokenizer and text."""

import dataclasses
from pathlib import Path

from flax import nnx

from goose_jax.checkpoints import load_merged_state, load_pretrained, load_state
from goose_jax.checkpoints.containers import checkpoint_kind
from goose_jax.checkpoints.pretrained import open_foreign
from goose_jax.cli.train_flags import TrainFlags, option
from goose_jax.cli.train_settings import (
    Adapters,
    InitialState,
    NewModel,
    TrainSettings,
    WholeModel,
)
from goose_jax.config import Dtype, RWKV7Config, default_compute_dtype
from goose_jax.data import RandomWindows, TrainingText, read_documents, standard_library
from goose_jax.nn import RWKV7
from goose_jax.text import Tokenizer, get_tokenizer, open_tokenizer, tokenizer_name
from goose_jax.training import FullTuning, LoraTuning, RunDirectory, StateTuning, Tuning


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run begins with.

    Attributes:
      tuning: what is trained.
      text: the text, with its tokenizer.
      batches: the batches of the text.
      tokenizer_name: name or path of the tokenizer.
    """

    tuning: Tuning
    text: TrainingText
    batches: RandomWindows
    tokenizer_name: str


def open_run(flags: TrainFlags) -> tuple[RunDirectory | None, TrainSettings]:
    """Returns the run to resume, or None for a new run; and the settings.

    Raises:
      OSError: if the run does not exist.
      ValueError: if the run is damaged, a setting is out of range, or flags were given beside
        `--resume`.
    """
    if flags.resume is None:
        return None, TrainSettings.from_flags(flags)
    changed = [
        option(field.name)
        for field in dataclasses.fields(flags)
        if field.name != "resume" and getattr(flags, field.name) != field.default
    ]
    if changed:
        raise ValueError(f"a resumed run keeps its settings; leave out {', '.join(changed)}")
    run, values = RunDirectory.open(flags.resume)
    return run, TrainSettings.from_flags(TrainFlags.from_json(values))


def prepare(settings: TrainSettings, run: RunDirectory | None) -> Prepared:
    """Opens the model, the tokenizer and the text. Each is opened once.

    Args:
      settings: settings of the run.
      run: the run to resume; None for a new run.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if a file is damaged, the text is too short, or the tokenizer does not fit.
    """
    match settings.subject:
        case NewModel() | WholeModel() if run is not None:
            return _resume_model(settings, run)
        case NewModel() as subject:
            return _new_model(settings, subject)
        case WholeModel() as subject:
            return _whole_model(settings, subject)
        case Adapters() as subject:
            return _adapters(settings, subject)
        case InitialState() as subject:
            return _initial_state(settings, subject, resumed=run is not None)


def name_of_run(settings: TrainSettings) -> str:
    """Returns the name of a new run's folder, without its number."""
    return "stdlib" if settings.data is None else settings.data.absolute().stem or "run"


def _new_model(settings: TrainSettings, subject: NewModel) -> Prepared:
    name = settings.tokenizer or "byte"
    tokenizer = get_tokenizer(name)
    text, batches = _load_text(settings, tokenizer)
    config = RWKV7Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=subject.hidden_size,
        num_layers=subject.num_layers,
        head_size=subject.head_size,
        compute_dtype=settings.compute_dtype or default_compute_dtype(),
        remat=settings.remat,
    )
    model = RWKV7(config, rngs=nnx.Rngs(settings.seed))
    return Prepared(FullTuning(model), text, batches, name)


def _resume_model(settings: TrainSettings, run: RunDirectory) -> Prepared:
    path = run.newest_checkpoint
    tuning = FullTuning.from_checkpoint(path)
    name = tokenizer_name(path, given=settings.tokenizer, recorded=None)
    tokenizer = open_tokenizer(name, tuning.model.config.vocab_size)
    return Prepared(tuning, *_load_text(settings, tokenizer), name)


def _whole_model(settings: TrainSettings, subject: WholeModel) -> Prepared:
    model, name, tokenizer = _open_base(settings, subject, "float32")
    text, batches = _load_text(settings, tokenizer)
    return Prepared(FullTuning(model), text, batches, name)


def _adapters(settings: TrainSettings, subject: Adapters) -> Prepared:
    model, name, tokenizer = _open_base(settings, subject, subject.frozen_dtype)
    text, batches = _load_text(settings, tokenizer)
    tuning = LoraTuning(model, subject.lora, base_path=subject.base, seed=settings.seed)
    return Prepared(tuning, text, batches, name)


def _initial_state(settings: TrainSettings, subject: InitialState, *, resumed: bool) -> Prepared:
    model, name, tokenizer = _open_base(settings, subject, subject.frozen_dtype)
    text, batches = _load_text(settings, tokenizer)
    # A resumed run has its state in its checkpoint.
    start = None
    if subject.start is not None and not resumed:
        start = load_state(subject.start, model.config)
    elif not resumed:
        start = load_merged_state(subject.base, model.config)
    tuning = StateTuning(model, base_path=subject.base, start=start)
    return Prepared(tuning, text, batches, name)


def _open_base(
    settings: TrainSettings, subject: WholeModel | Adapters | InitialState, dtype: Dtype | None
) -> tuple[RWKV7, str, Tokenizer]:
    """Returns the model to fine-tune, and the name and the tokenizer of its text."""
    if not isinstance(subject, InitialState) and _has_state(subject.base):
        raise ValueError(
            f"{subject.base} begins with a trained initial state, which this training would not "
            "use; take it off by goose-jax convert --state"
        )
    model, metadata = load_pretrained(
        subject.base,
        dtype=dtype,
        compute_dtype=settings.compute_dtype or default_compute_dtype(),
        remat=settings.remat,
    )
    name = tokenizer_name(subject.base, given=settings.tokenizer, recorded=metadata.tokenizer)
    return model, name, open_tokenizer(name, model.config.vocab_size)


def _has_state(checkpoint: Path) -> bool:
    return checkpoint_kind(checkpoint) != "native" and bool(open_foreign(checkpoint).states)


def _load_text(settings: TrainSettings, tokenizer: Tokenizer) -> tuple[TrainingText, RandomWindows]:
    if settings.data is None:
        source, documents = "the standard library of this Python", standard_library()
    else:
        source = str(settings.data)
        documents = read_documents(settings.data, pattern=settings.pattern)
    text = TrainingText.from_documents(
        documents, tokenizer, source=source, held_out_bytes=settings.held_out_bytes
    )
    batches = text.windows(
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        microbatches=settings.microbatches,
    )
    return text, batches


__all__ = ["Prepared", "name_of_run", "open_run", "prepare"]
