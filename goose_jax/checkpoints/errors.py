"""The error of all checkpoints."""


class CheckpointError(ValueError):
    """A path is not a checkpoint, the checkpoint is damaged, or it does not fit the model."""


__all__ = ["CheckpointError"]
