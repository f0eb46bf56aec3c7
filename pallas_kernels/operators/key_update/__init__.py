"""The keys of the recurrence."""

from pallas_kernels.operators.key_update.api import key_update

__all__ = ["key_update"]
