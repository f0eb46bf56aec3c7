"""What training keeps of a layer for the backward; the rest is computed again."""

from collections.abc import Callable
from typing import Any

import jax

from goose_jax.config import RWKV7Config
from pallas_kernels import KEPT, KEPT_STATES

PROJECTED = "goose_jax.projected"
"""Name of results of projections, and of the residual stream between the halves of a layer.

They are small for the time that it takes to compute them.
"""


def rematerialised[**P, R](run_layer: Callable[P, R], config: RWKV7Config) -> Callable[P, R]:
    """Returns a layer whose backward computes again what `config.remat` does not keep."""
    kept = {
        "dots": (PROJECTED, KEPT, KEPT_STATES),
        "projections": (PROJECTED, KEPT_STATES),
        "full": (KEPT_STATES,),
    }
    if config.remat == "none":
        return run_layer
    policy: Any = jax.checkpoint_policies.save_only_these_names(*kept[config.remat])
    # A loop needs no barrier: the compiler cannot merge what its backward computes again.
    return jax.checkpoint(run_layer, policy=policy, prevent_cse=config.unroll_layers)


__all__ = ["PROJECTED", "rematerialised"]
