"""Sampling and generating text."""

from goose_jax.generation.generate import Generation, generate, prefill
from goose_jax.generation.sampling import SamplingConfig, sample_token, token_probabilities

__all__ = [
    "Generation",
    "SamplingConfig",
    "generate",
    "prefill",
    "sample_token",
    "token_probabilities",
]
