"""Training: the official recipe, fine-tuning, and runs that can be interrupted."""

from goose_jax.training.evaluation import Evaluation, make_evaluation
from goose_jax.training.initial_state import load_initial_state, starting_state
from goose_jax.training.lora import LoraConfig, apply_lora, init_lora, lora_loss, merge_lora
from goose_jax.training.loss import L2WRAP, mean_loss, sum_of_losses, token_losses
from goose_jax.training.metrics import MetricsWriter, TensorBoardWriter, WandbWriter
from goose_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from goose_jax.training.run_directory import RunDirectory
from goose_jax.training.state_tuning import init_wkv, state_loss, tuned_state, wkv_of
from goose_jax.training.step import (
    Metrics,
    TrainState,
    full_loss,
    init_train_state,
    init_tuning_state,
    make_train_step,
    make_tuning_step,
    with_params,
)
from goose_jax.training.stop_request import StopRequest
from goose_jax.training.trainer import Trainer, TrainerConfig
from goose_jax.training.training_loop import NonFiniteError, StepReport, train_steps
from goose_jax.training.tuning import FullTuning, LoraTuning, StateTuning, Tuning
from goose_jax.training.tuning_checkpoint import (
    TuningCheckpoint,
    check_base,
    load_tuning_checkpoint,
    save_tuning_checkpoint,
)

__all__ = [
    "L2WRAP",
    "Evaluation",
    "FullTuning",
    "LoraConfig",
    "LoraTuning",
    "Metrics",
    "MetricsWriter",
    "NonFiniteError",
    "OptimizerConfig",
    "RunDirectory",
    "StateTuning",
    "StepReport",
    "StopRequest",
    "TensorBoardWriter",
    "TrainState",
    "Trainer",
    "TrainerConfig",
    "Tuning",
    "TuningCheckpoint",
    "WandbWriter",
    "apply_lora",
    "check_base",
    "full_loss",
    "init_lora",
    "init_train_state",
    "init_tuning_state",
    "init_wkv",
    "learning_rate_schedule",
    "load_initial_state",
    "load_tuning_checkpoint",
    "lora_loss",
    "make_evaluation",
    "make_optimizer",
    "make_train_step",
    "make_tuning_step",
    "mean_loss",
    "merge_lora",
    "save_tuning_checkpoint",
    "starting_state",
    "state_loss",
    "sum_of_losses",
    "token_losses",
    "train_steps",
    "tuned_state",
    "with_params",
    "wkv_of",
]
