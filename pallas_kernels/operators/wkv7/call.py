"""The arguments of a call of WKV, with names."""

from typing import Any, NamedTuple


class WKVInputs(NamedTuple):
    """The arrays with an entry for each token; also gradients, or references, for each of them.

    Attributes:
      r: `[B, T, H, K]`, receptance.
      log_decay: `[B, T, H, K]`, <= 0; a channel's decay is its exponential.
      k: `[B, T, H, K]`, the key that writes.
      v: `[B, T, H, V]`, value.
      a: `[B, T, H, K]`, reads what is to be removed.
      b: `[B, T, H, K]`, where it is removed.
    """

    r: Any
    log_decay: Any
    k: Any
    v: Any
    a: Any
    b: Any


__all__ = ["WKVInputs"]
