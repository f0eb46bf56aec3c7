"""Saves and loads models and states, in our own format and in the formats of others."""

from goose_jax.checkpoints.contents import CheckpointContents, read_contents
from goose_jax.checkpoints.directory_writer import Saving
from goose_jax.checkpoints.errors import CheckpointError
from goose_jax.checkpoints.model_and_tokenizer import load_model_and_tokenizer
from goose_jax.checkpoints.native import (
    CheckpointMetadata,
    CheckpointWarning,
    begin_checkpoint,
    load_checkpoint,
    load_optimizer_state,
    save_checkpoint,
)
from goose_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from goose_jax.checkpoints.state_files import load_merged_state, load_state, save_state

__all__ = [
    "CheckpointContents",
    "CheckpointError",
    "CheckpointMetadata",
    "CheckpointWarning",
    "Saving",
    "begin_checkpoint",
    "load_checkpoint",
    "load_merged_state",
    "load_model_and_tokenizer",
    "load_optimizer_state",
    "load_pretrained",
    "load_state",
    "read_contents",
    "save_checkpoint",
    "save_pretrained",
    "save_state",
]
