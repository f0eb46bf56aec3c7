"""Opens what a run of `goose-jax train` begins with: its model, tokenizer and text."""

import dataclasses
from pathlib import Path
from typing import Any, assert_never

from flax import nnx
from jax.sharding import Mesh

from goose_jax.checkpoints import load_merged_state, load_pretrained, load_state
from goose_jax.checkpoints.containers import checkpoint_kind
from goose_jax.checkpoints.pretrained import open_foreign
from goose_jax.cli.memory import parameters_fit
from goose_jax.cli.train_defaults import lora_config, model_config
from goose_jax.cli.train_devices import open_mesh
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.config import Dtype, default_compute_dtype
from goose_jax.data import BatchSource, PrefetchedBatches, TrainingData
from goose_jax.nn import RWKV7
from goose_jax.parallel import create_sharded, place_tree
from goose_jax.text import (
    Tokenizer,
    find_tokenizer_file,
    get_tokenizer,
    open_tokenizer,
    tokenizer_name,
)
from goose_jax.text.tokenizer_lookup import absolute_name
from goose_jax.training import FullTuning, LoraTuning, StateTuning, Tuning


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run begins with.

    Attributes:
      tuning: what is trained.
      text: the data, with its tokenizer.
      batches: the batches of the text.
      tokenizer_name: name or path of the tokenizer.
      mesh: the mesh to train on; None for one device.
    """

    tuning: Tuning
    text: TrainingData
    batches: BatchSource
    tokenizer_name: str
    mesh: Mesh | None

    def close(self) -> None:
        """Ends the threads or processes that make batches."""
        if isinstance(self.batches, PrefetchedBatches):
            self.batches.close()


def prepare(settings: TrainSettings, checkpoint: Path | None) -> Prepared:
    """Opens the model, the tokenizer and the text. Each is opened once.

    Args:
      settings: settings of the run, which `with_defaults` filled in.
      checkpoint: the checkpoint to go on from; None for a new run.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if a file is damaged, the text is too short, or the tokenizer does not fit.
    """
    if checkpoint is not None and (file := find_tokenizer_file(checkpoint)) is not None:
        settings = dataclasses.replace(settings, tokenizer=str(file))
    match settings.tune:
        case None | "full" if checkpoint is not None:
            return _resume_model(settings, checkpoint)
        case None:
            return _new_model(settings)
        case "full":
            return _whole_model(settings)
        case "lora":
            return _adapters(settings)
        case "state":
            return _initial_state(settings, resumed=checkpoint is not None)
        case _:
            assert_never(settings.tune)


def name_of_run(settings: TrainSettings) -> str:
    """Returns the name of a new run's folder, without its number."""
    return "stdlib" if settings.data is None else settings.data.absolute().stem or "run"


def _new_model(settings: TrainSettings) -> Prepared:
    name = absolute_name(settings.tokenizer or "byte")
    tokenizer = get_tokenizer(name)
    config = model_config(settings, vocab_size=tokenizer.vocab_size)
    text, batches = _load_text(settings, tokenizer)
    mesh = open_mesh(settings, config)

    def make() -> RWKV7:
        return RWKV7(config, rngs=nnx.Rngs(settings.seed))

    with parameters_fit(settings):
        model = make() if mesh is None else create_sharded(make, mesh)
    return Prepared(FullTuning(model, l2wrap=settings.l2wrap), text, batches, name, mesh)


def _resume_model(settings: TrainSettings, path: Path) -> Prepared:
    overrides: dict[str, Any] = {
        "remat": settings.remat,
        "unroll_layers": settings.unroll_layers,
        "implementation": settings.implementation,
        "precision": settings.precision,
    }
    if settings.compute_dtype is not None:
        overrides["compute_dtype"] = settings.compute_dtype
    tuning = FullTuning.from_checkpoint(path, l2wrap=settings.l2wrap, **overrides)
    name = tokenizer_name(path, given=settings.tokenizer, recorded=None)
    tokenizer = open_tokenizer(name, tuning.model.config.vocab_size)
    mesh = open_mesh(settings, tuning.model.config)
    return Prepared(tuning, *_load_text(settings, tokenizer), name, mesh)


def _whole_model(settings: TrainSettings) -> Prepared:
    model, name, tokenizer, mesh = _open_base(settings, "float32")
    text, batches = _load_text(settings, tokenizer)
    return Prepared(FullTuning(model, l2wrap=settings.l2wrap), text, batches, name, mesh)


def _adapters(settings: TrainSettings) -> Prepared:
    model, name, tokenizer, mesh = _open_base(settings, settings.frozen_dtype)
    text, batches = _load_text(settings, tokenizer)
    tuning = LoraTuning(
        model,
        lora_config(settings),
        base_path=_base(settings),
        seed=settings.seed,
        l2wrap=settings.l2wrap,
    )
    return Prepared(tuning, text, batches, name, mesh)


def _initial_state(settings: TrainSettings, *, resumed: bool) -> Prepared:
    model, name, tokenizer, mesh = _open_base(settings, settings.frozen_dtype)
    text, batches = _load_text(settings, tokenizer)
    base, start = _base(settings), None
    # A resumed run has its state in its checkpoint.
    if settings.state is not None and not resumed:
        start = load_state(settings.state, model.config)
    elif not resumed:
        start = load_merged_state(base, model.config)
    tuning = StateTuning(model, base_path=base, start=start, l2wrap=settings.l2wrap)
    return Prepared(tuning, text, batches, name, mesh)


def _base(settings: TrainSettings) -> Path:
    assert settings.from_ is not None
    return settings.from_


def _open_base(
    settings: TrainSettings, dtype: Dtype | None
) -> tuple[RWKV7, str, Tokenizer, Mesh | None]:
    """Returns the model to fine-tune, name and tokenizer of its text, and the mesh it is on."""
    base = _base(settings)
    if settings.tune != "state" and _has_state(base):
        raise ValueError(
            f"{base} begins with a trained initial state, which this training would not "
            "use; take it off by goose-jax convert --state"
        )
    with parameters_fit(settings):
        model, metadata = load_pretrained(
            base,
            dtype=dtype,
            compute_dtype=settings.compute_dtype or default_compute_dtype(),
            remat=settings.remat,
            unroll_layers=settings.unroll_layers,
            implementation=settings.implementation,
            precision=settings.precision,
        )
    name = tokenizer_name(base, given=settings.tokenizer, recorded=metadata.tokenizer)
    tokenizer = open_tokenizer(name, model.config.vocab_size)
    mesh = open_mesh(settings, model.config)
    return (model if mesh is None else place_tree(model, mesh)), name, tokenizer, mesh


def _has_state(checkpoint: Path) -> bool:
    return checkpoint_kind(checkpoint) != "native" and bool(open_foreign(checkpoint).states)


def _load_text(settings: TrainSettings, tokenizer: Tokenizer) -> tuple[TrainingData, BatchSource]:
    text = settings.open_data(tokenizer, settings.out)
    assert settings.batch_size is not None
    assert settings.sequence_length is not None
    batches = settings.open_batches(
        text,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
        microbatches=settings.microbatches or 1,
    )
    return text, batches


__all__ = ["Prepared", "name_of_run", "prepare"]
