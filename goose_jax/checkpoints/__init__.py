"""Checkpoints: saving and loading models."""

from goose_jax.checkpoints.native import (
    CheckpointError,
    CheckpointMetadata,
    load_checkpoint,
    load_optimizer_state,
    save_checkpoint,
)

__all__ = [
    "CheckpointError",
    "CheckpointMetadata",
    "load_checkpoint",
    "load_optimizer_state",
    "save_checkpoint",
]
