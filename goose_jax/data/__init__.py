"""Text to train on, and batches of tokens as a function of a seed and a step."""

from goose_jax.data.batches import (
    NOT_COUNTED,
    Batch,
    BatchSource,
    RandomWindows,
    evaluation_batches,
    next_token_batch,
    process_rows,
    random_batch,
)
from goose_jax.data.binidx import Binidx
from goose_jax.data.binidx_writer import BinidxWriter, Written
from goose_jax.data.documents import (
    Document,
    encode_counted,
    encode_document,
    encode_documents,
    split_documents,
)
from goose_jax.data.packing import pack_documents
from goose_jax.data.prefetch import PrefetchedBatches
from goose_jax.data.samplers import (
    BinidxBatches,
    MagicPrimeWindows,
    PackedDocuments,
    RandomBinidxWindows,
    magic_prime,
)
from goose_jax.data.sources import (
    DocumentSource,
    Position,
    open_documents,
    open_standard_library,
    read_documents,
    standard_library,
)
from goose_jax.data.tokenization import TokenizeProgress, tokenize
from goose_jax.data.training_data import (
    Sampling,
    TrainingData,
    open_tokens,
    prepare_documents,
)
from goose_jax.data.training_text import TrainingText

__all__ = [
    "NOT_COUNTED",
    "Batch",
    "BatchSource",
    "Binidx",
    "BinidxBatches",
    "BinidxWriter",
    "Document",
    "DocumentSource",
    "MagicPrimeWindows",
    "PackedDocuments",
    "Position",
    "PrefetchedBatches",
    "RandomBinidxWindows",
    "RandomWindows",
    "Sampling",
    "TokenizeProgress",
    "TrainingData",
    "TrainingText",
    "Written",
    "encode_counted",
    "encode_document",
    "encode_documents",
    "evaluation_batches",
    "magic_prime",
    "next_token_batch",
    "open_documents",
    "open_standard_library",
    "open_tokens",
    "pack_documents",
    "prepare_documents",
    "process_rows",
    "random_batch",
    "read_documents",
    "split_documents",
    "standard_library",
    "tokenize",
]
