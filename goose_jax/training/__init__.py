"""Training: text, batches, the official recipe, and a loop that can be interrupted."""

from goose_jax.training.corpus import (
    Document,
    encode_documents,
    read_documents,
    split_documents,
    standard_library,
)
from goose_jax.training.data import (
    NOT_COUNTED,
    Batch,
    evaluation_batches,
    next_token_batch,
    pack_documents,
    random_batch,
)
from goose_jax.training.evaluation import make_evaluation
from goose_jax.training.loop import NonFiniteError, StepReport, StopRequest, train_steps
from goose_jax.training.loss import mean_loss, token_losses
from goose_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, optimizer
from goose_jax.training.step import (
    Metrics,
    TrainState,
    init_train_state,
    make_train_step,
    with_params,
)

__all__ = [
    "NOT_COUNTED",
    "Batch",
    "Document",
    "Metrics",
    "NonFiniteError",
    "OptimizerConfig",
    "StepReport",
    "StopRequest",
    "TrainState",
    "encode_documents",
    "evaluation_batches",
    "init_train_state",
    "learning_rate_schedule",
    "make_evaluation",
    "make_train_step",
    "mean_loss",
    "next_token_batch",
    "optimizer",
    "pack_documents",
    "random_batch",
    "read_documents",
    "split_documents",
    "standard_library",
    "token_losses",
    "train_steps",
    "with_params",
]
