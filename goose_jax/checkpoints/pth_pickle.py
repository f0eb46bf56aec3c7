"""Reads the pickle inside a `.pth` file without Python's unpickler.

A pickle is a program. Python's unpickler runs it and calls any function that it names. This module
interprets only the instructions that describe values. It imports and calls nothing that the pickle
names: of the names that it knows, a few describe tensors, and all others become `Inert` objects,
which hold nothing but the name. A pickle that names anything else is refused.
"""

import dataclasses
import pickletools
import reprlib
from collections.abc import Callable
from typing import Any, BinaryIO

from goose_jax.checkpoints.errors import cause, shorten_name
from goose_jax.checkpoints.pth_tensor import (
    STORAGE_DTYPES,
    Inert,
    PickleError,
    StorageType,
    TensorView,
    storage_of,
    tensor_of,
)


class _OrderedDict(dict[Any, Any]):
    """The type of a module's state dict. Unlike a plain dict, a pickle may set its attributes."""


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


_MARK = object()
_FRAME_LENGTH = 9  # bytes of the instruction that begins a frame


def describe_pickle(data: bytes | BinaryIO) -> Any:
    """Returns the dicts, lists, tuples, numbers, strings, `TensorView`s and `Inert`s in a pickle.

    Args:
      data: the pickle, or a file, which is read from its position to the end of the pickle.

    Raises:
      PickleError: if the pickle is damaged, or contains anything else. The message names it.
    """
    reader, frames = _Reader(), _Frames()
    try:
        for opcode, argument, position in pickletools.genops(data):
            frames.step(opcode.name, argument, position or 0)
            reader.step(opcode.name, argument)
    except PickleError:
        raise
    except (
        *(ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError),
        RecursionError,
    ) as error:
        raise PickleError(f"the pickle is damaged: {cause(error)}") from error
    return reader.result


class _Frames:
    """Checks that instructions do not cross the ends of frames, the blocks of newer pickles."""

    def __init__(self) -> None:
        self._end, self._last = 0, 0

    def step(self, opcode: str, argument: Any, position: int) -> None:
        if self._last < self._end < position:
            raise ValueError("an instruction crosses the end of a frame")
        if opcode == "FRAME":
            if position < self._end:
                raise ValueError("a frame begins in a frame")
            self._end = position + _FRAME_LENGTH + argument
        if opcode == "STOP" and position + 1 < self._end:
            raise ValueError("a frame is cut off")
        self._last = position


class _Reader:
    """A pickle machine with a stack, a memo, and the supported instructions."""

    def __init__(self) -> None:
        self.result: Any = None
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode in _TUPLES:
            length = _TUPLES[opcode]
            self._stack.append(tuple(self._pop() for _ in range(length))[::-1])
        elif opcode in _HANDLERS:
            _HANDLERS[opcode](self, argument)
        elif opcode not in _IGNORED:
            what = "" if argument is None else f" {reprlib.repr(argument)}"
            raise PickleError(f"the pickle is refused: it has the instruction {opcode}{what}")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark is in the place of a value")
        return value

    def _pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _top(self, *types: type) -> Any:
        if not isinstance(self._stack[-1], types):
            raise ValueError(f"found {type(self._stack[-1]).__name__} in the place of a container")
        return self._stack[-1]

    def stop(self, _: Any) -> None:
        self.result = self._pop()
        if self._stack:
            raise ValueError("values are left over")

    def protocol(self, version: int) -> None:
        if version > _MAX_PROTOCOL:
            raise ValueError(f"it has protocol {version}")

    def tuple_to_mark(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def set_items(self, _: Any) -> None:
        items = self._pop_to_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        # A tuple is hashed again each time, and so is what is in it.
        parts = key if type(key) is tuple and len(key) <= _MOST_PARTS else (key,)
        if not all(type(part) in _KEY_TYPES and _is_small(part) for part in parts):
            raise ValueError(f"a dict has a key that is {reprlib.repr(key)}")
        target = self._top(dict, Inert)
        if isinstance(target, dict):
            target[key] = value

    def append(self, _: Any) -> None:
        self._extend([self._pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._top(list, Inert)
        if isinstance(target, list):
            target.extend(values)

    def add_items(self, _: Any) -> None:
        self._pop_to_mark()
        self._top(Inert)

    def frozen_set(self, _: Any) -> None:
        self._pop_to_mark()
        self._stack.append(Inert("frozenset"))

    def build(self, _: Any) -> None:
        """Attributes, as `_metadata` of a module's state dict: not needed."""
        self._pop()
        self._top(_OrderedDict, Inert, TensorView)

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def pop_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def duplicate(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def name(self, argument: str) -> None:
        self._stack.append(_find(*argument.split(" ", 1)))

    def stack_name(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(_find(module, name))

    def persistent(self, _: Any) -> None:
        self._stack.append(storage_of(self._pop()))

    def reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        self._call(function, arguments)

    def new_object(self, _: Any) -> None:
        arguments, cls = self._pop(), self._pop()
        if not isinstance(cls, Inert):
            raise PickleError(f"the pickle is refused: it makes a {_name_of(cls)}")
        self._call(cls, arguments)

    def new_object_with_names(self, _: Any) -> None:
        self._pop()
        self.new_object(_)

    def _call(self, function: Any, arguments: Any) -> None:
        if isinstance(function, _Global) and isinstance(arguments, tuple):
            self._stack.append(_MAKERS[function.name](*arguments))
        elif isinstance(function, Inert) and isinstance(arguments, tuple):
            self._stack.append(Inert(function.name))
        else:
            raise PickleError(f"the pickle is refused: it calls {_name_of(function)}")


def _find(module: Any, name: Any) -> Any:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise PickleError(f"the pickle is refused: it names {reprlib.repr((module, name))}")
    if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
        return StorageType(STORAGE_DTYPES[name])
    path = f"{module}.{name}"
    if path in _MAKERS:
        return _Global(path)
    # An attribute of a known name is not a known name.
    if "." not in name and (path in _INERT or module.split(".")[0] in _INERT_PACKAGES):
        return Inert(path)
    raise PickleError(
        f"the pickle is refused: it names {shorten_name(path)}, which a checkpoint of weights does "
        "not need; the file may be malicious"
    )


def _name_of(value: Any) -> str:
    return value.name if isinstance(value, _Global | Inert) else reprlib.repr(value)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuilt(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    """Returns the tensor that `_rebuild_from_type_v2` makes, without its attributes."""
    if isinstance(function, _Global) and isinstance(arguments, tuple):
        return _MAKERS[function.name](*arguments)
    return Inert("torch._tensor._rebuild_from_type_v2")


def _size(numbers: Any = ()) -> Any:
    is_short = isinstance(numbers, tuple | list) and len(numbers) <= _MOST_PARTS
    return tuple(numbers) if is_short else Inert("torch.Size")  # a long one is not copied


def _is_small(key: Any) -> bool:
    return type(key) is not int or key.bit_length() <= _MOST_BITS


_MAX_PROTOCOL = 5
_MOST_PARTS = 16  # of a key, and axes of a size
_MOST_BITS = 64  # of a key that is a number
_KEY_TYPES = (str, int, float, bool, bytes, type(None), Inert)
_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor_of,
    "torch._utils._rebuild_tensor_v2": tensor_of,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuilt,
    "torch.Size": _size,
    "collections.OrderedDict": lambda: _OrderedDict(),
    "collections.defaultdict": lambda *_: _OrderedDict(),
}
_BUILTIN_TYPES = (
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
    *("object", "range", "set", "slice", "str", "tuple"),
)
# What training programs save beside weights. Nothing of it is imported or called.
_INERT = {
    *("argparse.Namespace", "types.SimpleNamespace", "collections.Counter", "collections.deque"),
    *("copyreg._reconstructor", "copy_reg._reconstructor", "_codecs.encode"),
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
    *("pathlib.PureWindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
    *("datetime.datetime", "datetime.date", "datetime.timedelta", "uuid.UUID"),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__")
      for name in _BUILTIN_TYPES),
}  # fmt: skip
_INERT_PACKAGES = {
    *("torch", "numpy", "deepspeed", "pytorch_lightning", "lightning", "lightning_fabric"),
    *("transformers", "accelerate", "peft", "omegaconf"),
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Inert("set"),
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_HANDLERS: dict[str, Callable[[_Reader, Any], None]] = {
    "PROTO": _Reader.protocol,
    "STOP": _Reader.stop,
    "TUPLE": _Reader.tuple_to_mark,
    "BINPUT": _Reader.put,
    "LONG_BINPUT": _Reader.put,
    "MEMOIZE": _Reader.memoize,
    "BINGET": _Reader.get,
    "LONG_BINGET": _Reader.get,
    "SETITEMS": _Reader.set_items,
    "SETITEM": _Reader.set_item,
    "APPEND": _Reader.append,
    "APPENDS": _Reader.appends,
    "ADDITEMS": _Reader.add_items,
    "FROZENSET": _Reader.frozen_set,
    "BUILD": _Reader.build,
    "GLOBAL": _Reader.name,
    "STACK_GLOBAL": _Reader.stack_name,
    "BINPERSID": _Reader.persistent,
    "REDUCE": _Reader.reduce,
    "NEWOBJ": _Reader.new_object,
    "NEWOBJ_EX": _Reader.new_object_with_names,
    "POP": _Reader.pop,
    "POP_MARK": _Reader.pop_mark,
    "DUP": _Reader.duplicate,
}
_IGNORED = {"FRAME"}
