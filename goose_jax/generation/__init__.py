"""Sampling tokens, and generating text for one batch or for many requests."""

from goose_jax.generation.continuous_batch import ContinuousBatch, FinishReason, RequestUpdate
from goose_jax.generation.non_finite import NonFiniteLogitsError
from goose_jax.generation.sampling import (
    SamplingConfig,
    sample_token,
    stack_sampling,
    token_probabilities,
)
from goose_jax.generation.static_batch import Generation, generate, prefill

__all__ = [
    "ContinuousBatch",
    "FinishReason",
    "Generation",
    "NonFiniteLogitsError",
    "RequestUpdate",
    "SamplingConfig",
    "generate",
    "prefill",
    "sample_token",
    "stack_sampling",
    "token_probabilities",
]
