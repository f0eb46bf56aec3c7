"""Cross entropy of a language model's head."""

from pallas_kernels.operators.cross_entropy.api import cross_entropy

__all__ = ["cross_entropy"]
