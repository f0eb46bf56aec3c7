"""Reads the pickle inside a `.pth` file without Python's unpickler.

A pickle is a program. Python's unpickler runs it and calls any function that it names. This module
interprets only the few instructions that describe tensors in dicts and lists. It refuses all other
instructions, and all names that are not in the table below. It imports and calls nothing that the
pickle names.
"""

import dataclasses
import pickletools
import reprlib
from collections.abc import Callable
from typing import Any

from goose_jax.checkpoints.pth_tensor import (
    STORAGE_DTYPES,
    PickleError,
    StorageType,
    storage_of,
    tensor_of,
)


class _OrderedDict(dict[str, Any]):
    """The type of a module's state dict. Unlike a plain dict, a pickle may set its attributes."""


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


_MARK = object()


def describe_pickle(data: bytes) -> Any:
    """Returns the dicts, lists, tuples, numbers, strings and `TensorView`s in a pickle.

    Raises:
      PickleError: if the pickle is damaged, or contains anything else. The message names it.
    """
    reader = _Reader()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            reader.step(opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
        raise PickleError(f"the pickle is damaged: {error}") from error
    return reader.result


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
        if type(key) is not str:
            raise ValueError(f"a dict has a key that is {type(key).__name__}")
        self._top(dict)[key] = value

    def append(self, _: Any) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self, _: Any) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def build(self, _: Any) -> None:
        """Attributes, as `_metadata` of a module's state dict: not needed."""
        self._pop()
        self._top(_OrderedDict)

    def name(self, argument: str) -> None:
        self._stack.append(_find(*argument.split(" ", 1)))

    def stack_name(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(_find(module, name))

    def persistent(self, _: Any) -> None:
        self._stack.append(storage_of(self._pop()))

    def reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise PickleError(f"the pickle is refused: it calls {reprlib.repr(function)}")
        self._stack.append(_MAKERS[function.name](*arguments))


def _find(module: Any, name: Any) -> Any:
    if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
        return StorageType(STORAGE_DTYPES[name])
    path = f"{module}.{name}"
    if path not in _MAKERS:
        raise PickleError(
            f"the pickle is refused: it names {path}, but a checkpoint of weights needs nothing "
            "beyond tensors; the file may be malicious"
        )
    return _Global(path)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Any:
    return tensor


_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": tensor_of,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": lambda: _OrderedDict(),
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_HANDLERS: dict[str, Callable[[_Reader, Any], None]] = {
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
    "BUILD": _Reader.build,
    "GLOBAL": _Reader.name,
    "STACK_GLOBAL": _Reader.stack_name,
    "BINPERSID": _Reader.persistent,
    "REDUCE": _Reader.reduce,
}
_IGNORED = {"PROTO", "FRAME"}
