"""The command `goose-jax`."""

import io
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Annotated, Any, NoReturn

import jax
import tyro

from goose_jax.cli.chat import chat
from goose_jax.cli.closed_pipes import discard_output
from goose_jax.cli.compilation_cache import use_compilation_cache
from goose_jax.cli.convert import convert
from goose_jax.cli.evaluate import evaluate
from goose_jax.cli.flags import name_flags, typed_names, typed_values
from goose_jax.cli.generate import generate
from goose_jax.cli.inspect_checkpoint import inspect
from goose_jax.cli.memory import is_out_of_memory, out_of_memory
from goose_jax.cli.merge import merge
from goose_jax.cli.prompts import join_texts
from goose_jax.cli.short_warnings import short_warnings
from goose_jax.cli.tokenize import tokenize
from goose_jax.cli.train import train
from goose_jax.cli.train_arguments import settings_before_flags
from goose_jax.cli.train_checks import check_warmup
from goose_jax.cli.train_settings import TrainSettings
from goose_jax.parallel.processes import leave
from pallas_kernels import NotServed, __version__

_OURS = ("goose_jax", "pallas_kernels")


def run() -> None:
    """Runs the program `goose-jax`: `main`, with compiled programs kept for the next time."""
    use_compilation_cache()
    main()


@short_warnings()
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand.

    An error of the user or of the machine (a wrong value, a missing file, a full disk) prints one
    line on stderr and exits with status 2. A bug shows its traceback. A reader that closes the pipe
    ends the program silently, with status 141.

    Args:
      arguments: the command's arguments, without the name of the program; None takes `sys.argv`.
    """
    arguments = join_texts(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # its encoding may lack characters
            stream.reconfigure(errors="replace")
    try:
        try:
            _run_command(arguments)
        finally:  # not at the end of Python, which would show a closed pipe
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("goose-jax: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        discard_output()
        sys.exit(141)  # 128 and SIGPIPE
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(out_of_memory(error, arguments[0]))
    except NotServed as error:
        if arguments[0] == "train":  # it names --implementation, if that was given
            raise
        _fail(
            f"the implementation that the checkpoint records cannot run here: {error}; a copy by "
            "goose-jax convert --layout pth records none"
        )
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, ValueError) and not _raised_by_us(error.__traceback__):
            raise
        _fail(name_flags(str(error), typed_names(arguments), typed_values(arguments)))


def _run_command(arguments: Sequence[str]) -> None:
    if arguments == ["--version"]:
        print(f"goose-jax {__version__}")
    else:
        commands: dict[str, Callable[..., Any]] = {
            "train": _train_command(arguments),
            "tokenize": tokenize,
            "evaluate": evaluate,
            "generate": generate,
            "chat": chat,
            "convert": convert,
            "merge": merge,
            "inspect": inspect,
        }
        if arguments[:1] in (["-h"], ["--help"]):  # a line for each, without its examples
            commands = {name: _summary(command) for name, command in commands.items()}
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="goose-jax",
            description="RWKV-7 for JAX: train or tune a model, let it write, talk with it. "
            "--version prints the version.",
            args=arguments,
        )


def _summary(command: Callable[..., Any]) -> Callable[[], None]:
    """Returns a function whose docstring is the first line of that of a command."""

    def summary() -> None: ...

    summary.__doc__ = (command.__doc__ or "").partition("\n")[0]
    return summary


def _fail(message: str) -> NoReturn:
    print(f"goose-jax: error: {message}", file=sys.stderr, flush=True)
    leave(2)
    sys.exit(2)


def _train_command(arguments: Sequence[str]) -> Callable[[TrainSettings], None]:
    """Returns `train` as a function whose default settings are those of --config or --resume."""
    is_train = list(arguments[:1]) == ["train"]
    before = settings_before_flags(arguments) if is_train else TrainSettings()

    def command(settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = before) -> None:
        check_warmup(settings, typed_names(arguments))
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
