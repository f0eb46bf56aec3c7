"""`goose-jax`, but it kills itself in the middle of its second checkpoint if $KILLED says so.

    python -m tests.goose_jax.train_process train ...

`test_processes.py` runs this. The first of two folders of arrays is being written then.
"""

import os
import signal

import orbax.checkpoint as ocp

from goose_jax.cli.main import main


def kill_at_call(number):
    save, calls = ocp.AsyncCheckpointer.save, []

    def killed(*args, **kwargs):
        save(*args, **kwargs)
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    ocp.AsyncCheckpointer.save = killed


if __name__ == "__main__":
    if os.environ.get("KILLED") == "yes":
        kill_at_call(3)  # each checkpoint has two folders of arrays
    main()
