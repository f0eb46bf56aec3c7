"""Log-likelihoods of texts, and an adapter for EleutherAI's lm-evaluation-harness.

The adapter is `goose_jax.evaluation.harness`. It needs the extra "lm-eval", the rest does not.
"""

from goose_jax.evaluation.scoring import Score, score_continuations

__all__ = ["Score", "score_continuations"]
