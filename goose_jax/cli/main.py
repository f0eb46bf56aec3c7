"""The command `goose-jax`."""

import io
import re
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Annotated, NoReturn

import jax
import tyro

from goose_jax.cli.chat import chat
from goose_jax.cli.closed_pipes import discard_output
from goose_jax.cli.compilation_cache import use_compilation_cache
from goose_jax.cli.convert import convert
from goose_jax.cli.evaluate import evaluate
from goose_jax.cli.flags import name_flags, typed_names
from goose_jax.cli.generate import generate
from goose_jax.cli.inspect_checkpoint import inspect
from goose_jax.cli.merge import merge
from goose_jax.cli.prompts import join_texts
from goose_jax.cli.tokenize import tokenize
from goose_jax.cli.train import train
from goose_jax.cli.train_arguments import settings_before_flags
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.parallel.processes import leave
from pallas_kernels import __version__

_OURS = ("goose_jax", "pallas_kernels")
_MORE_MEMORY = {
    "train": "a smaller --batch-size with more --microbatches makes the same step with less; "
    "--remat projections and --remat full need less, too",
    "evaluate": "a smaller --batch-size or --sequence-length needs less",
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\.? ?([KMGTP]i?B|bytes)\b")


def run() -> None:
    """Runs the program `goose-jax`: `main`, with compiled programs kept for the next time."""
    use_compilation_cache()
    main()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand.

    An error of the user or of the machine (a wrong value, a missing file, a full disk) prints one
    line on stderr and exits with status 2. A bug shows its traceback. A reader that closes the pipe
    ends the program silently, with status 141.

    Args:
      arguments: the command's arguments, without the name of the program; None takes `sys.argv`.
    """
    arguments = join_texts(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"goose-jax {__version__}")
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # its encoding may lack characters
            stream.reconfigure(errors="replace")
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "train": _train_command(arguments),
                "tokenize": tokenize,
                "evaluate": evaluate,
                "generate": generate,
                "chat": chat,
                "convert": convert,
                "merge": merge,
                "inspect": inspect,
            },
            prog="goose-jax",
            description="RWKV-7 for JAX: train or tune a model, let it write, talk with it. "
            "--version prints the version.",
            args=arguments,
        )
    except KeyboardInterrupt:
        print("goose-jax: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        discard_output()
        sys.exit(141)  # 128 and SIGPIPE
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(_out_of_memory(error, arguments[0]))
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, ValueError) and not _raised_by_us(error.__traceback__):
            raise
        _fail(name_flags(str(error), typed_names(arguments)))


def _fail(message: str) -> NoReturn:
    print(f"goose-jax: error: {message}", file=sys.stderr, flush=True)
    leave(2)
    sys.exit(2)


def _out_of_memory(error: Exception, command: str) -> str:
    size = _SIZE.search(str(error))
    needed = f"{size[1]} {size[2]} could not be had" if size else "there is not enough"
    return f"out of memory: {needed}; {_MORE_MEMORY.get(command, 'a smaller --dtype needs less')}"


def _train_command(arguments: Sequence[str]) -> Callable[[TrainSettings], None]:
    """Returns `train` as a function whose default settings are those of --config or --resume."""
    is_train = list(arguments[:1]) == ["train"]
    before = settings_before_flags(arguments) if is_train else TrainSettings()

    def command(settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = before) -> None:
        train(settings)

    command.__doc__ = train.__doc__
    return command


def _raised_by_us(traceback: TracebackType | None) -> bool:
    """Returns whether a check in our code raised an error, not a library."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    module = traceback.tb_frame.f_globals.get("__name__", "")
    return module.split(".")[0] in _OURS


if __name__ == "__main__":
    run()
