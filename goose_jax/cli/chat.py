"""`goose-jax chat`: a conversation on the terminal."""

import contextlib
import dataclasses
import io
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from goose_jax.chat import (
    SAMPLING_PRESETS,
    ChatSession,
    Ending,
    ReplySettings,
    SamplingPreset,
    load_chat,
    parse_tool_calls,
    save_chat,
    split_thinking,
    tool_output,
)
from goose_jax.chat.prompt import clean, reply_prefix
from goose_jax.checkpoints import load_model_and_tokenizer
from goose_jax.cli.flags import IfGiven
from goose_jax.cli.model_devices import mesh_for_one_text
from goose_jax.config import Dtype
from goose_jax.generation import NonFiniteLogitsError, SamplingConfig
from goose_jax.nn import RWKV7
from goose_jax.training import starting_state
from pallas_kernels.types import Precision

_HOW_TO_END = "Ctrl-D or /quit ends the session"
_SWITCH = {"on": True, "true": True, "off": False, "false": False}


def chat(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    settings: Annotated[
        tyro.conf.OmitArgPrefixes[ReplySettings], tyro.conf.arg(name="")
    ] = ReplySettings(),  # noqa: B008
    *,
    tokenizer: IfGiven[str] = None,
    dtype: IfGiven[Dtype] = None,
    precision: IfGiven[Precision] = None,
    state: IfGiven[Path] = None,
    load: IfGiven[Path] = None,
    preset: IfGiven[SamplingPreset] = None,
    tools: IfGiven[Path] = None,
    mesh: IfGiven[str] = None,
) -> None:
    """Holds a conversation with a model. In the session, /help lists the commands.

    In use:
      goose-jax chat rwkv7-g1.pth --think on --preset think
      goose-jax chat rwkv7-g1.pth --tools functions.json --preset tools
      goose-jax chat my-model/ --dtype bfloat16 --system "Be brief." --temperature 0.8
      goose-jax chat my-model/ --load yesterday.chat
      goose-jax chat runs/large-1 --mesh tensor=4

    Args:
      checkpoint: A .pth or safetensors file, a folder of Hugging Face, a checkpoint of goose-jax,
        or the folder of a training run.
      settings: How replies are written.
      tokenizer: byte, world, or the path of a tokenizer.json or a vocabulary file; by default the
        tokenizer that the checkpoint names.
      dtype: Dtype of parameters and computation; by default parameters keep their dtype.
      precision: high keeps float32's digits in the matrix products of the wkv operator.
      state: State that conversations begin with: a file of a tuned initial state or of a state of
        the rwkv package, or the folder of a run of state tuning. By default a trained initial
        state that lies beside the weights, or zeros.
      load: File of a saved conversation to continue.
      preset: Recommended sampling, in place of all settings of sampling; /set changes single ones.
      tools: File with a JSON list of functions that the model may call: objects with name,
        description and parameters (a JSON schema).
      mesh: Devices to divide the model over, as in fsdp=2,tensor=4 (see docs/parallel.md); by
        default it is on one device.

    Raises:
      ValueError: if an argument is out of range, a file is damaged, or it belongs to another model.
      OSError: if a file does not exist or cannot be read.
    """
    if preset is not None:
        if settings.sampling != ReplySettings().sampling:
            raise ValueError(f"give either --preset {preset} or settings of sampling, not both")
        settings = dataclasses.replace(settings, sampling=SAMPLING_PRESETS[preset])
    devices = mesh_for_one_text(mesh)
    functions = [] if tools is None else _read_tools(tools)
    model, found = load_model_and_tokenizer(
        checkpoint, tokenizer=tokenizer, dtype=dtype, precision=precision, mesh=devices
    )
    start = starting_state(checkpoint, state, model)
    session = ChatSession(model, found, settings, start, functions)
    if load is not None:
        session.conversation = load_chat(load, model)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lets the user edit lines, on systems that have it
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    print("/help lists the commands.")
    _Terminal(session, model).run()


class _Terminal:
    """Reads lines from the terminal, and runs their commands or replies to them."""

    def __init__(self, session: ChatSession, model: RWKV7):
        self._session = session
        self._model = model
        self._ended = False
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "list the commands", self._help),
            "set": ("[NAME VALUE]", "show the settings, or change one", self._set),
            "reset": ("", "forget the conversation and begin anew", self._reset),
            "regenerate": ("", "write another reply to the last message", self._regenerate),
            "output": ("TEXT", "give the model the output of the function it called", self._output),
            "history": ("", "show the conversation as the model has read it", self._history),
            "save": ("FILE", "save the conversation", self._save),
            "load": ("FILE", "go on with a conversation that was saved", self._load),
            "quit": ("", "end the session", self._quit),
        }

    def run(self) -> None:
        """Runs until the user ends the session."""
        while not self._ended:
            try:
                self._obey(_read_message())
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print(f"\n[{_HOW_TO_END}]")
            except (ValueError, OSError) as error:
                print(f"error: {error}")

    def _obey(self, message: str) -> None:
        if not message.startswith("/"):
            if clean(message):
                self._write_reply(lambda *how: self._session.reply(message, *how))
            return
        name, _, argument = message[1:].partition(" ")
        if name not in self._commands:
            raise ValueError(
                f"there is no command /{name}; /help lists them "
                "(to send a message that begins with /, put a space before it)"
            )
        usage, _, command = self._commands[name]
        argument = argument.strip()
        if not usage.startswith("[") and bool(usage) != bool(argument):
            raise ValueError(f"usage: /{name} {usage}".rstrip())
        command(argument)

    def _write_reply(
        self, reply: Callable[[Callable[[str], None], Callable[[], bool]], Ending]
    ) -> None:
        begun = reply_prefix(self._session.settings.think, calls=bool(self._session.tools))
        label = [f"\nAssistant:{begun}"]

        def write(text: str) -> None:
            _write("".join(label) + text)
            label.clear()

        try:
            with _first_ctrl_c() as pressed:
                ending = reply(write, pressed.is_set)
        except KeyboardInterrupt:
            print("\n[stopped at once: this message and its reply are forgotten]\n")
            return
        except NonFiniteLogitsError as error:
            print(f"\nerror: {error}\n[this message and its reply are forgotten]\n")
            return
        note = {
            "end": "",
            "length": f"\n[stopped: max_new_tokens {self._session.settings.max_new_tokens}]",
            "interrupted": "\n[interrupted]",
        }
        print(f"{note[ending]}\n")
        if self._session.tools and ending == "end":
            self._show_calls()

    def _show_calls(self) -> None:
        calls = parse_tool_calls(split_thinking(self._session.last_reply)[1])
        for call in calls:
            print(f"[calls {call.name} with {json.dumps(call.arguments, ensure_ascii=False)}]")
        if calls:
            print("[/output TEXT gives the model what the function returns]\n")

    def _help(self, _argument: str) -> None:
        for name, (usage, purpose, _command) in self._commands.items():
            print(f"  {f'/{name} {usage}':<19} {purpose}")
        print("A line that ends with \\ goes on in the next one. Ctrl-C stops a reply;")
        print(f"{_HOW_TO_END}.")

    def _set(self, argument: str) -> None:
        if argument:
            self._session.settings = _changed(self._session.settings, argument)
        for name, value in _flat(self._session.settings).items():
            print(f"  {name} {value!r}")
        if argument.startswith("system ") and self._session.conversation.text:
            print("[a conversation begins with it: it counts after /reset]")

    def _reset(self, _argument: str) -> None:
        self._session.reset()
        print("[forgotten]")

    def _regenerate(self, _argument: str) -> None:
        self._write_reply(self._session.regenerate)

    def _output(self, argument: str) -> None:
        self._write_reply(lambda *how: self._session.reply(tool_output(argument), *how))

    def _history(self, _argument: str) -> None:
        print(self._session.conversation.text)

    def _save(self, argument: str) -> None:
        save_chat(Path(argument).expanduser(), self._session.conversation, self._model)
        print(f"[saved in {argument}]")

    def _load(self, argument: str) -> None:
        self._session.conversation = load_chat(Path(argument).expanduser(), self._model)
        print(f"[loaded: {len(self._session.conversation.text)} characters]")

    def _quit(self, _argument: str) -> None:
        self._ended = True


def _read_message() -> str:
    """Reads a message: one line, and another one after each line that ends with a backslash."""
    lines = [input("User: ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("  ... "))
    return "\n".join(lines)


def _flat(settings: ReplySettings) -> dict[str, Any]:
    """Returns the settings by name, with the numbers of `sampling` in its place."""
    values: dict[str, Any] = {}
    for name, value in dataclasses.asdict(settings).items():
        values |= value if name == "sampling" else {name: value}
    return values


def _changed(settings: ReplySettings, argument: str) -> ReplySettings:
    """Returns the settings after the command `/set NAME VALUE`."""
    name, _, text = argument.partition(" ")
    defaults = _flat(ReplySettings())
    if name == "preset":
        return dataclasses.replace(settings, sampling=_preset(text.strip()))
    if name not in defaults:
        known = ", ".join([*defaults, "preset"])
        raise ValueError(f"there is no setting {name!r}; give one of {known}")
    change = {name: _parse(name, text.strip(), type(defaults[name]))}
    if not hasattr(settings, name):
        change = {"sampling": dataclasses.replace(settings.sampling, **change)}
    return dataclasses.replace(settings, **change)


def _preset(name: str) -> SamplingConfig:
    for preset, sampling in SAMPLING_PRESETS.items():
        if preset == name:
            return sampling
    raise ValueError(f"preset must be one of {', '.join(SAMPLING_PRESETS)}, got {name!r}")


def _read_tools(path: Path) -> list[Any]:
    """Reads descriptions of functions. `ChatSession` checks each of them."""
    try:
        functions = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(functions, list):
        raise ValueError(f"{path} must hold a list of functions")
    return functions


def _parse(name: str, text: str, kind: type) -> Any:
    """Converts the text of a setting to the setting's type."""
    if kind is tuple:
        return (text,) if text else ()
    try:
        return _SWITCH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = "on or off" if kind is bool else f"of type {kind.__name__}"
        raise ValueError(f"{name} must be {expected}, got {text!r}") from None


@contextlib.contextmanager
def _first_ctrl_c() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets. The second Ctrl-C raises KeyboardInterrupt."""
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


__all__ = ["chat"]
