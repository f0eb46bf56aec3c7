"""Cross entropy of a language model's head."""

from pallas_kernels.operators.cross_entropy.api import cross_entropy, cross_entropy_sum

__all__ = ["cross_entropy", "cross_entropy_sum"]
