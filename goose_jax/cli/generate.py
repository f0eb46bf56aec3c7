"""`goose-jax generate`: continues a prompt and prints the text."""

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from goose_jax.checkpoints import load_model_and_tokenizer
from goose_jax.cli.flags import IfGiven
from goose_jax.cli.model_devices import mesh_for_one_text
from goose_jax.cli.prompts import read_prompt
from goose_jax.config import Dtype
from goose_jax.generation import SamplingConfig
from goose_jax.generation import generate as generate_tokens
from goose_jax.generation.validation import check_max_new_tokens, check_seed
from goose_jax.text import TextStop, TextStream
from goose_jax.training import starting_state
from pallas_kernels.types import Precision


def generate(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    *,
    prompt: str = "",
    prompt_file: IfGiven[Path] = None,
    tokenizer: IfGiven[str] = None,
    dtype: IfGiven[Dtype] = None,
    precision: IfGiven[Precision] = None,
    state: IfGiven[Path] = None,
    max_new_tokens: int = 256,
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig(top_p=0.85),  # noqa: B008
    stop: tuple[str, ...] = (),
    seed: int = 0,
    echo: bool = True,
    mesh: IfGiven[str] = None,
) -> None:
    """Continues a prompt with a trained model and prints the text as it comes.

    In use:
      goose-jax generate runs/stdlib-1 --prompt "def "
      goose-jax generate rwkv7.pth --prompt "The goose" --temperature 0.8
      goose-jax generate rwkv7.pth --prompt-file - < beginning.txt
      goose-jax generate my-model/ --tokenizer my-vocabulary.txt --stop "User:"
      goose-jax generate rwkv7.pth --state runs/poems-1/state.pth
      goose-jax generate runs/large-1 --mesh tensor=4

    Args:
      checkpoint: A .pth or safetensors file, a folder of Hugging Face, a checkpoint of goose-jax,
        or the folder of a training run (then its newest intact one).
      prompt: Text to continue; without one, a new document begins.
      prompt_file: File with the text to continue, in UTF-8; - for stdin.
      tokenizer: byte, world, or the path of a tokenizer.json or a vocabulary file; by default the
        tokenizer that the checkpoint names.
      dtype: Dtype of parameters and computation; by default parameters keep their dtype.
      precision: high keeps float32's digits in the matrix products of the wkv operator.
      state: State that the text begins with: a file of a tuned initial state or of a state of the
        rwkv package, or the folder of a run of state tuning. By default a trained initial state
        that lies beside the weights, or zeros.
      max_new_tokens: Maximum number of new tokens. The end of the document ends the text sooner.
      sampling: How tokens are drawn.
      stop: Texts that end the generation; they are not printed. A text that begins with two dashes
        is given as in --stop=--end.
      seed: The same seed gives the same text.
      echo: Print the prompt, too.
      mesh: Devices to divide the model over, as in fsdp=2,tensor=4 (see docs/parallel.md); by
        default it is on one device.

    Raises:
      ValueError: if an argument is out of range, or the checkpoint is damaged.
      OSError: if the checkpoint does not exist or cannot be read.
      NonFiniteLogitsError: if the logits are NaN or infinite.
    """
    check_seed(seed)
    check_max_new_tokens(max_new_tokens)
    stop_texts = TextStop(stop)
    devices = mesh_for_one_text(mesh)
    prompt = read_prompt(prompt, prompt_file)
    model, found = load_model_and_tokenizer(
        checkpoint, tokenizer=tokenizer, dtype=dtype, precision=precision, mesh=devices
    )
    start = starting_state(checkpoint, state, model)
    end = found.end_of_document
    tokens = found.encode(prompt) or ([] if end is None else [end])
    if not tokens:
        raise ValueError("give a --prompt: this tokenizer has no token that begins a document")
    stream = TextStream(found, tokens, stop_texts)

    def write_tokens(new: list[np.ndarray]) -> bool:
        _write(stream.push(new[0].tolist()))
        return stream.stopped

    if echo:
        _write(prompt)
    generate_tokens(
        model,
        [tokens],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=[] if end is None else [end],
        seed=seed,
        state=start,
        on_tokens=write_tokens,
    )
    _write(stream.finish() + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


__all__ = ["generate"]
