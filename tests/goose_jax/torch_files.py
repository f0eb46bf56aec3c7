"""Writes files as `torch.save` does, with Python's pickle and stand-ins for what torch pickles.

Independent of the writer in the package, and able to write what no honest program would.
"""

import collections
import contextlib
import io
import pickle
import sys
import types
import zipfile
from unittest import mock

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments

    def __call__(self):
        """Only so that pickle takes the result of a call for a function."""


class Storage:
    """Pickled as a persistent id."""

    def __init__(self, identity):
        self.identity = identity


class _Pickler(pickle._Pickler):  # the one that can be shown modules that do not exist
    # The package dill, which `datasets` imports, changes how pickle writes functions.
    dispatch = pickle._Pickler.dispatch | {
        types.FunctionType: pickle._Pickler.save_global,
        type: pickle._Pickler.save_type,
    }

    def persistent_id(self, value):
        return value.identity if isinstance(value, Storage) else None


def stand_in(module, name):
    """Something that pickle takes for `module.name`."""

    def function():
        raise AssertionError("a stand-in was called")

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


@contextlib.contextmanager
def _modules(*functions):
    modules = {}
    for function in functions:
        module = modules.setdefault(function.__module__, types.ModuleType(function.__module__))
        setattr(module, function.__name__, function)
    with mock.patch.dict(sys.modules, modules):
        yield


REBUILD = stand_in("torch._utils", "_rebuild_tensor_v2")
PARAMETER = stand_in("torch._utils", "_rebuild_parameter")
SIZE, DTYPE = stand_in("torch", "Size"), stand_in("torch", "float32")
TYPES = {name: stand_in("torch", name) for name in STORAGES.values()}


def storage(dtype, size, key="0"):
    return Storage(("storage", TYPES[STORAGES[np.dtype(dtype).name]], key, "cpu", size))


def tensor(storage, offset, shape, strides):
    hooks = collections.OrderedDict()
    return Call(REBUILD, storage, offset, shape, strides, False, hooks)


def parameter(tensor):
    return Call(PARAMETER, tensor, True, collections.OrderedDict())


def dumps(content, protocol=2):
    stream = io.BytesIO()
    with _modules(REBUILD, PARAMETER, SIZE, DTYPE, *TYPES.values()):
        _Pickler(stream, protocol).dump(content)
    return stream.getvalue()


def write(path, pickled, storages=(), *, byteorder=b"little", compression=zipfile.ZIP_STORED):
    """An archive of a pickle and of storages (bytes or arrays), named by their number."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("name/data.pkl", pickled)
        if byteorder is not None:
            archive.writestr("name/byteorder", byteorder)
        for key, values in enumerate(storages):
            archive.writestr(f"name/data/{key}", bytes(values))
        archive.writestr("name/version", b"3\n")
    return path


def write_arrays(path, arrays, protocol=2, wrap=lambda tensor: tensor, wrap_all=lambda x: x):
    """A dict or list of arrays, each with a storage of its own."""
    content, storages = describe(arrays, wrap)
    return write(path, dumps(wrap_all(content), protocol), storages)


def write_before_1_6(path, arrays):
    """A dict of arrays in the format of torch before 1.6."""
    content, storages = describe(arrays)
    for value in content.values():
        identity = value.arguments[0].identity
        value.arguments[0].identity = (*identity, None)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    with path.open("wb") as file:
        for pickled in (0x1950A86A20F9469CFC6C, 1001, system, content):
            file.write(dumps(pickled))
        file.write(dumps([str(key) for key in range(len(storages))]))
        for array, data in zip(arrays.values(), storages, strict=True):
            file.write(array.size.to_bytes(8, "little") + data)
    return path


def describe(arrays, wrap=lambda tensor: tensor):
    """What is pickled for arrays, and the bytes of their storages."""
    items = arrays.items() if isinstance(arrays, dict) else enumerate(arrays)
    tensors, storages = {}, []
    for key, (name, array) in enumerate(items):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        whole = storage(array.dtype, array.size, str(key))
        tensors[name] = wrap(tensor(whole, 0, array.shape, strides))
        storages.append(array.tobytes())
    return tensors if isinstance(arrays, dict) else list(tensors.values()), storages
