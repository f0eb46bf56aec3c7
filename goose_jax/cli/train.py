"""`goose-jax train`: from a text to a trained model in a folder of its own."""

import dataclasses
import hashlib
import shlex
import sys
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro
from flax import nnx

from goose_jax.checkpoints import CheckpointMetadata, load_checkpoint, load_optimizer_state
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.generation import SamplingConfig, generate
from goose_jax.nn import RWKV7
from goose_jax.text.byte_tokenizer import ByteTokenizer
from goose_jax.training.corpus import (
    Document,
    encode_documents,
    read_documents,
    split_documents,
    standard_library,
)
from goose_jax.training.data import Batch, random_batch
from goose_jax.training.evaluation import make_evaluation
from goose_jax.training.loop import NonFiniteError, StepReport, StopRequest, train_steps
from goose_jax.training.optimizer import optimizer
from goose_jax.training.plots import check_matplotlib, plot_loss
from goose_jax.training.run_directory import RunDirectory
from goose_jax.training.step import TrainState, init_train_state, make_train_step, with_params

_TOKENIZER = "byte"
_HELD_OUT = "held_out_bits_per_byte"
_PROGRESS = (
    "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} passed, ETA {remaining}"
    "{postfix}"
)


def train(settings: Annotated[TrainSettings, tyro.conf.arg(name="")]) -> None:
    """Trains a byte-level RWKV-7 and keeps it in a folder, with its metrics and a loss curve.

    Ctrl-C saves a checkpoint and says how to go on from it.

    In use:
      goose-jax train
      goose-jax train --data my-texts/ --steps 2000 --hidden-size 256
      goose-jax train --resume runs/my-texts-1
    """
    run, settings = _open_run(settings)
    if settings.plot:
        check_matplotlib()
    text = _Text.load(settings)
    model, state = _start(settings) if run is None else _continue(settings, run, text)
    if run is None:
        run = RunDirectory.create(settings.out, text.name, settings.to_json())
    _print_summary(settings, run, text, model, state)

    model = _Training(settings, run, text, model).fit(state)

    bits = [line[_HELD_OUT] for line in run.metrics() if _HELD_OUT in line]
    print(f"held out: {bits[0]:.3f} bits per byte before training, {bits[-1]:.3f} after")
    if settings.plot:
        plot_loss(run.metrics(), run.path / "loss.png", title=run.path.name)
    if settings.sample_length:
        print(f"\n{_sample(model, settings)}\n")
    print(f"saved in {run.path}: {', '.join(sorted(file.name for file in run.path.iterdir()))}")
    print("to let the model continue a text:")
    print(
        f"  goose-jax generate {shlex.quote(str(run.path))} --prompt {shlex.quote(settings.prompt)}"
    )


@dataclasses.dataclass(frozen=True)
class _Text:
    """The text of a run.

    Attributes:
      name: for the run's folder.
      tokens: `[N]` int32, to train on.
      held_out: to measure on.
      checksum: of `tokens`.
    """

    name: str
    tokens: np.ndarray
    held_out: list[Document]
    checksum: str

    @classmethod
    def load(cls, settings: TrainSettings) -> "_Text":
        if settings.data is None:
            source, name, documents = "the standard library", "stdlib", standard_library()
        else:
            source, name = str(settings.data), settings.data.absolute().stem or "run"
            documents = read_documents(settings.data, pattern=settings.pattern)
        training, held_out = split_documents(documents, held_out_bytes=settings.held_out_bytes)
        tokens = encode_documents(training, ByteTokenizer())
        if len(tokens) <= settings.sequence_length:
            raise ValueError(
                f"{source} is too short: {len(tokens)} tokens to train on, "
                f"but {settings.sequence_length=}"
            )
        return cls(name, tokens, held_out, hashlib.sha256(tokens.tobytes()).hexdigest())


def _open_run(settings: TrainSettings) -> tuple[RunDirectory | None, TrainSettings]:
    if settings.resume is None:
        return None, settings
    given = dataclasses.replace(settings, resume=None)
    changed = [
        "--" + field.name.replace("_", "-")
        for field in dataclasses.fields(given)
        if getattr(given, field.name) != field.default
    ]
    if changed:
        raise ValueError(f"a resumed run keeps its settings; leave out {', '.join(changed)}")
    run, values = RunDirectory.open(settings.resume)
    return run, TrainSettings.from_json(values)


def _start(settings: TrainSettings) -> tuple[RWKV7, TrainState]:
    config = settings.model_config(ByteTokenizer.vocab_size)
    optimizer_config = settings.optimizer_config()
    model = RWKV7(config, rngs=nnx.Rngs(settings.seed))
    return model, init_train_state(model, optimizer_config)


def _continue(settings: TrainSettings, run: RunDirectory, text: _Text) -> tuple[RWKV7, TrainState]:
    path = run.newest_checkpoint
    model, metadata = load_checkpoint(path)
    if metadata.extra.get("text") != text.checksum:
        raise ValueError(
            f"{run.path} cannot be resumed: it was trained on another text than is "
            f"{'in ' + str(settings.data) if settings.data else 'in this standard library'} now"
        )
    if metadata.step >= settings.steps:
        raise ValueError(f"{run.path} has made all of its {settings.steps} steps")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    like = jax.eval_shape(optimizer(settings.optimizer_config()).init, params)
    opt_state = load_optimizer_state(path, like)
    # The state's buffers are used up by the first step, the model's are not.
    params = jax.tree.map(jnp.copy, params)
    return model, TrainState(jnp.int32(metadata.step), params, opt_state)


def _print_summary(
    settings: TrainSettings, run: RunDirectory, text: _Text, model: RWKV7, state: TrainState
) -> None:
    config = model.config
    count = sum(array.size for array in jax.tree.leaves(state.params))
    held_out = sum(document.num_bytes for document in text.held_out)
    device = jax.devices()[0]
    print(
        f"model:  {config.num_layers} layers, width {config.hidden_size}, "
        f"{config.num_heads} heads of {config.head_size}, {count / 1e6:.2f} million parameters\n"
        f"text:   {settings.data or 'the standard library of this Python'}: {len(text.tokens)} "
        f"bytes to train on, {held_out} held out\n"
        f"device: {device.device_kind} ({jax.default_backend()}), computing in "
        f"{config.compute_dtype}\n"
        f"run:    {run.path}"
        + (f", from step {int(state.step)}" if state.step else "")
        + f", {settings.steps} steps of {settings.batch_size * settings.microbatches} x "
        f"{settings.sequence_length} bytes",
        flush=True,
    )


class _Training:
    """The run itself: steps, measurements and checkpoints."""

    def __init__(
        self, settings: TrainSettings, run: RunDirectory, text: _Text, model: RWKV7
    ) -> None:
        self._settings, self._run, self._text, self._model = settings, run, text, model
        self._train_step = make_train_step(model, settings.optimizer_config())
        self._evaluate = make_evaluation(
            model,
            text.held_out,
            ByteTokenizer(),
            batch_size=settings.batch_size,
            sequence_length=settings.sequence_length,
        )

    def fit(self, state: TrainState) -> RWKV7:
        """Trains to the end and returns the trained model; exits if asked to stop before."""
        settings = self._settings
        if int(state.step) == 0:
            self._measure(state)
        steps = train_steps(self._train_step, state, self._batch, steps=settings.steps)
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
        return with_params(self._model, state.params)

    def _batch(self, step: int) -> Batch:
        return random_batch(
            self._text.tokens,
            step,
            batch_size=self._settings.batch_size,
            sequence_length=self._settings.sequence_length,
            seed=self._settings.seed,
            microbatches=self._settings.microbatches,
        )

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
        bits = self._evaluate(state.params)
        self._run.log({"step": int(state.step), _HELD_OUT: bits})
        return f"{bits:.3f} bits per byte on held-out text"

    def _save(self, state: TrainState) -> None:
        metadata = CheckpointMetadata(
            tokenizer=_TOKENIZER, step=int(state.step), extra={"text": self._text.checksum}
        )
        model = with_params(self._model, state.params)
        self._run.save(model, metadata, state.opt_state, keep=self._settings.keep)

    def _saved_so_far(self) -> str:
        checkpoints = self._run.path / "checkpoints"
        if not checkpoints.exists():
            return "no checkpoint was saved before; try a lower --learning-rate"
        return f"{self._run.newest_checkpoint} is from before; try a lower --learning-rate"


def _tell_request() -> None:
    tqdm.tqdm.write("saving after this step; press Ctrl-C again to stop at once", file=sys.stderr)


def _sample(model: RWKV7, settings: TrainSettings) -> str:
    tokenizer = ByteTokenizer()
    generation = generate(
        model,
        [tokenizer.encode(settings.prompt)],
        max_new_tokens=settings.sample_length,
        sampling=SamplingConfig(temperature=0.8, top_p=0.9),
        stop_tokens=[tokenizer.end_of_document],
        seed=settings.seed,
    )
    return settings.prompt + tokenizer.decode(generation.sequences[0])


__all__ = ["train"]
