"""The command line in a process of its own, which starts quickly and may be killed."""

import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing.process import BaseProcess

import jax

from goose_jax.cli.main import main
from goose_jax.training import Trainer

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


def start(arguments, *, output, cache, file_limit=None, last_step=None) -> BaseProcess:
    """Starts `goose-jax` with these arguments.

    Args:
      arguments: the arguments.
      output: file that gets stdout and stderr.
      cache: folder of compiled programs.
      file_limit: size in bytes of the largest file; a larger one is an error, as on a full disk.
      last_step: the step after which training waits, until the process is killed.
    """
    process = _CONTEXT.Process(target=_run, args=(arguments, output, cache, file_limit, last_step))
    process.start()
    return process


def _run(arguments, output, cache, file_limit, last_step) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    # A background job of a shell would inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    if last_step is not None:
        _wait_after(last_step)
    main(arguments)


def _wait_after(last_step) -> None:
    make_step, made = Trainer._step, []

    def step(self, state, batch):
        if not made:
            made.append(int(state.step))
        if made[0] >= last_step:
            signal.pause()
        made[0] += 1
        return make_step(self, state, batch)

    Trainer._step = step
