"""The command `goose-jax`."""

import io
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Annotated

import tyro

from goose_jax.cli.chat import chat
from goose_jax.cli.convert import convert
from goose_jax.cli.generate import generate
from goose_jax.cli.inspect_checkpoint import inspect
from goose_jax.cli.merge import merge
from goose_jax.cli.tokenize import tokenize
from goose_jax.cli.train import train
from goose_jax.cli.train_arguments import settings_before_flags
from goose_jax.cli.train_settings import TrainSettings

_OURS = ("goose_jax", "pallas_kernels")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand.

    An error of the user or of the machine (a wrong value, a missing file, a full disk) prints one
    line on stderr and exits with status 2. A bug shows its traceback.

    Args:
      arguments: the command's arguments, without the name of the program; None takes `sys.argv`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # its encoding may lack characters
            stream.reconfigure(errors="replace")
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "train": _train_command(arguments),
                "tokenize": tokenize,
                "generate": generate,
                "chat": chat,
                "convert": convert,
                "merge": merge,
                "inspect": inspect,
            },
            prog="goose-jax",
            description="RWKV-7 for JAX: train or tune a model, let it write, talk with it.",
            args=arguments,
        )
    except KeyboardInterrupt:
        print("goose-jax: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, ValueError) and not _raised_by_us(error.__traceback__):
            raise
        print(f"goose-jax: error: {error}", file=sys.stderr)
        sys.exit(2)


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
    main()
