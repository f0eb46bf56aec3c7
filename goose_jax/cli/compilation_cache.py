"""Keeps compiled programs, so that later commands need not compile them again."""

import os
import sys
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keeps compiled programs in `goose-jax/compiled` of the user's cache (`XDG_CACHE_HOME`).

    JAX decides what it keeps: programs that took more than a second to compile. The environment
    variable `JAX_COMPILATION_CACHE_DIR` names another folder, and `JAX_ENABLE_COMPILATION_CACHE=0`
    turns the cache off. If the folder cannot be made, a line on stderr says so.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "goose-jax" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"goose-jax: compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


__all__ = ["use_compilation_cache"]
