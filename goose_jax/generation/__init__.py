"""Sampling and generating text."""

from goose_jax.generation.continuous_batch import ContinuousBatch, FinishReason, RequestUpdate
from goose_jax.generation.generate import Generation, generate, prefill
from goose_jax.generation.sampling import (
    SamplingConfig,
    sample_token,
    stack_sampling,
    token_probabilities,
)

__all__ = [
    "ContinuousBatch",
    "FinishReason",
    "Generation",
    "RequestUpdate",
    "SamplingConfig",
    "generate",
    "prefill",
    "sample_token",
    "stack_sampling",
    "token_probabilities",
]
