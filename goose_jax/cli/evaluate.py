"""`goose-jax evaluate`: measures bits per byte of a text."""

from pathlib import Path
from typing import Annotated

import tyro
from flax import nnx

from goose_jax.checkpoints import load_model_and_tokenizer
from goose_jax.cli.data_settings import check_field, check_pattern_given, read_texts
from goose_jax.cli.flags import IfGiven, check_integers
from goose_jax.cli.model_devices import mesh_for_batches
from goose_jax.cli.train_devices import describe_devices
from goose_jax.config import Dtype
from goose_jax.data import open_documents
from goose_jax.parallel import place_tree
from goose_jax.training import make_evaluation, starting_state, state_loss, wkv_of
from pallas_kernels.types import Precision
from pallas_kernels.validation import check_positive


def evaluate(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    text: Annotated[Path, tyro.conf.Positional],
    *,
    pattern: tuple[str, ...] = ("*",),
    field: IfGiven[str] = None,
    strict: bool = False,
    tokenizer: IfGiven[str] = None,
    dtype: IfGiven[Dtype] = None,
    precision: IfGiven[Precision] = None,
    state: IfGiven[Path] = None,
    batch_size: int = 8,
    sequence_length: int = 1024,
    mesh: IfGiven[str] = None,
) -> None:
    """Measures how well a model predicts a text, in bits per byte.

    Bits per byte can be compared between models with different tokenizers. The text is read in
    windows, each without memory of the window before it, so longer windows give a smaller number.
    Of conversations only what the assistant says is measured.

    In use:
      goose-jax evaluate runs/stdlib-1 book.txt
      goose-jax evaluate rwkv7.pth my-texts/ --pattern "*.md" --sequence-length 4096
      goose-jax evaluate rwkv7-g1.pth chats.jsonl
      goose-jax evaluate runs/large-1 book.txt --mesh data=2,fsdp=4

    Args:
      checkpoint: A .pth or safetensors file, a folder of Hugging Face, a checkpoint of goose-jax,
        or the folder of a training run (then its newest intact one).
      text: A file or a folder of texts, as goose-jax train reads them.
      pattern: Which files of a folder are read, as in "*.txt".
      field: The field of JSONL and data sets that holds the text or the conversation; by default
        text, messages or conversations.
      strict: Treat a file of a folder that is not UTF-8 text as an error. Without it, such files
        are left out.
      tokenizer: byte, world, or the path of a tokenizer.json or a vocabulary file; by default the
        tokenizer that the checkpoint names.
      dtype: Dtype of parameters and computation; by default parameters keep their dtype.
      precision: high keeps float32's digits in the matrix products of the wkv operator.
      state: State that each window begins with, as for goose-jax generate. By default a trained
        initial state that lies beside the weights, or zeros.
      batch_size: Number of windows that are read at once.
      sequence_length: Tokens of a window.
      mesh: Devices to divide the model and the windows over, as in data=2,fsdp=4 (see
        docs/parallel.md); by default the model is on one device.

    Raises:
      ValueError: if an argument is out of range, or a file is damaged.
      OSError: if a file does not exist or cannot be read.
    """
    check_positive("--batch-size", batch_size)
    check_positive("--sequence-length", sequence_length)
    check_integers({"batch_size": batch_size, "sequence_length": sequence_length})
    check_pattern_given(pattern)
    check_field(field, [open_documents(text, patterns=pattern)])
    devices = mesh_for_batches(mesh, batch_size=batch_size, sequence_length=sequence_length)
    documents = read_texts(text, pattern=pattern, field=field, strict=strict)
    model, found = load_model_and_tokenizer(
        checkpoint, tokenizer=tokenizer, dtype=dtype, precision=precision, mesh=devices
    )
    start = starting_state(checkpoint, state, model)
    measure = make_evaluation(
        model,
        documents,
        found,
        batch_size=batch_size,
        sequence_length=sequence_length,
        loss=None if start is None else state_loss(model),
        mesh=devices,
    )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if start is None:
        bits = measure(params)
    else:
        wkv = wkv_of(start)
        bits = measure(wkv if devices is None else place_tree(wkv, devices), params)
    num_bytes = sum(document.num_counted_bytes for document in documents)
    print(
        f"{bits:.4f} bits per byte: {len(documents):,} documents, {num_bytes:,} bytes, "
        f"{measure.num_tokens:,} tokens in windows of {sequence_length}, "
        f"on {describe_devices(devices)} in {model.config.compute_dtype}"
    )


__all__ = ["evaluate"]
