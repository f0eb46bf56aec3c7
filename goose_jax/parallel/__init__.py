"""Training on several devices: a mesh, rules that divide parameters over it, and processes."""

from goose_jax.parallel.mesh import (
    AXES,
    check_mesh,
    describe_mesh,
    make_mesh,
    parse_mesh,
)
from goose_jax.parallel.placement import (
    create_sharded,
    place_batch,
    place_rows,
    place_tree,
    process_share,
    replicated,
)
from goose_jax.parallel.rules import PARTITION_RULES, batch_spec, partition_spec, tree_shardings

__all__ = [
    "AXES",
    "PARTITION_RULES",
    "batch_spec",
    "check_mesh",
    "create_sharded",
    "describe_mesh",
    "make_mesh",
    "parse_mesh",
    "partition_spec",
    "place_batch",
    "place_rows",
    "place_tree",
    "process_share",
    "replicated",
    "tree_shardings",
]
