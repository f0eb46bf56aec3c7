"""What happens to the recurrence's output before the output projection."""

from pallas_kernels.operators.output_correction.api import output_correction

__all__ = ["output_correction"]
