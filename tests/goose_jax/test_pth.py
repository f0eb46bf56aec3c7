"""The reader and the writer of `.pth` files."""

import collections
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from goose_jax.checkpoints import CheckpointError
from goose_jax.checkpoints.pth import read_pth
from goose_jax.checkpoints.pth_pickle import describe_pickle
from goose_jax.checkpoints.pth_tensor import PickleError
from goose_jax.checkpoints.pth_writer import write_pth, write_pth_list
from tests.goose_jax import torch_files
from tests.goose_jax.official_weights import GOLDEN

VALUES = np.arange(24, dtype=np.float32)


def arrays_of(path):
    found = read_pth(path)
    if isinstance(found, list):
        return [tensor.read() for tensor in found]
    return {name: tensor.read() for name, tensor in found.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


def test_a_file_that_torch_wrote():
    found = read_pth(GOLDEN / "tiny_official.pth")
    assert len(found) == 105
    assert found["blocks.2.att.w1"].shape == (128, 32)
    assert found["blocks.2.att.x_r"].shape == (1, 1, 128)
    values = found["blocks.0.ln1.weight"].read()
    assert values.dtype == np.float32
    assert not values.flags.writeable
    assert 0.5 < values.mean() < 1.5


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_dtypes_and_protocols(tmp_path, dtype, protocol):
    arrays = {"a.b": VALUES.astype(dtype).reshape(2, 3, 4), "c": VALUES[:1].astype(dtype)}
    assert_same(arrays_of(torch_files.write_arrays(tmp_path / "x.pth", arrays, protocol)), arrays)


def test_state_dict_of_a_module(tmp_path):
    """An OrderedDict with attributes, of parameters."""
    whole = torch_files.storage(np.float32, 24)
    content = collections.OrderedDict(
        x=torch_files.parameter(torch_files.tensor(whole, 2, (3, 2), (1, 3)))
    )
    content._metadata = collections.OrderedDict({"": {"version": 1}})
    path = torch_files.write(tmp_path / "x.pth", torch_files.dumps(content), [VALUES])
    # A view of a part of the storage, transposed.
    np.testing.assert_array_equal(arrays_of(path)["x"], VALUES[2:8].reshape(2, 3).T)


def test_an_older_file_without_byte_order(tmp_path):
    content = [torch_files.tensor(torch_files.storage(np.float32, 24), 0, (24,), (1,))]
    pickled = torch_files.dumps(content)
    path = torch_files.write(tmp_path / "x.pth", pickled, [VALUES], byteorder=None)
    np.testing.assert_array_equal(arrays_of(path)[0], VALUES)


MARKER = "executed"
ATTACKS = {
    "posix.system": lambda: torch_files.Call(os.system, f"touch {MARKER}"),
    "builtins.eval": lambda: torch_files.Call(eval, f"open({MARKER!r}, 'w')"),
    "builtins.exec": lambda: torch_files.Call(exec, f"open({MARKER!r}, 'w')"),
    "builtins.getattr": lambda: torch_files.Call(
        torch_files.Call(getattr, torch_files.Call(__import__, "os"), "system"), f"touch {MARKER}"
    ),
    "builtins.__import__": lambda: torch_files.Call(__import__, "os"),
    f"{pathlib.Path.__module__}.Path": lambda: torch_files.Call(pathlib.Path, MARKER),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ATTACKS)
def test_malicious_pickles_are_refused(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    content = {"x": ATTACKS[name](), "y": 1}
    path = torch_files.write(tmp_path / "x.pth", torch_files.dumps(content, protocol))
    name = name.replace("builtins", "__builtin__") if protocol == 2 else name  # as in Python 2
    with pytest.raises(PickleError, match=rf"x\.pth: .*refused: it names {name}, .*malicious"):
        read_pth(path)
    assert not (tmp_path / MARKER).exists()


RAW_ATTACKS = {  # instructions, and what the error says
    b"(ios\nsystem\n.": "instruction INST 'os system'",
    b"(cos\nsystem\nV\no.": "names os.system",
    # An attribute of something that is allowed.
    b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.": "__globals__",
    b"\x80\x04K\x01K\x02\x93.": r"names \(1, 2\)",
    # Calls of what is no function, objects made without a call, extensions, text ids.
    b"\x80\x02}}\x52.": "calls",
    b"\x80\x02X\x01\x00\x00\x00x)R.": "calls 'x'",
    b"\x80\x02ccollections\nOrderedDict\n)\x81.": "makes a collections.OrderedDict",
    b"\x80\x02\x82\x01.": "instruction EXT1",
    b"P0\n.": "instruction PERSID",
    # Persistent ids that are no storages.
    b"\x80\x02X\x03\x00\x00\x00abcQ.": "persistent id 'abc' is refused",
    b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nK\x05X\x03\x00\x00\x00cpuK\x01tQ.": (
        "persistent id .* is refused"
    ),
    # Attributes for what is no state dict; arguments that a function does not have.
    b"\x80\x02}}b.": "damaged",
    b"\x80\x02ccollections\nOrderedDict\n}b.": "damaged",
    b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.": "damaged",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.": "damaged",
    # Damaged: no values, no mark, no memo, values left over, cut off.
    b"\x80\x02.": "damaged",
    b"\x80\x02K\x01t.": "damaged",
    b"\x80\x02h\x07.": "damaged",
    b"\x80\x02K\x01K\x02.": "damaged",
    b"\x80\x02K\x05K\x01K\x02s.": "damaged",
    b"\x80\x22}.": "damaged: it has protocol 34",
    b"\x80\x04\x95\x02\0\0\0\0\0\0\0}J\x01\0\0\0.": "crosses the end of a frame",
    b"\x80\x04\x95\x09\0\0\0\0\0\0\0}.": "a frame is cut off",
    b"\x80\x02K\x01K\x02a.": "damaged",
    b"\x80\x02((s.": "damaged",
    b"\x80\x02}": "damaged",
    b"\x80\x02X\xff\xff\xff\xffabc.": "damaged",
    b"": "damaged",
}


@pytest.mark.parametrize("pickled", RAW_ATTACKS)
def test_other_instructions_are_refused(pickled):
    with pytest.raises(PickleError, match=RAW_ATTACKS[pickled]):
        describe_pickle(pickled)


def test_nested_and_doubled_values_cost_nothing():
    deep = b"\x80\x02" + b")" + b"\x85" * 50_000 + b"Q."
    with pytest.raises(PickleError, match="persistent id"):
        describe_pickle(deep)
    as_key = b"\x80\x02}" + b")" + b"\x85" * 50_000 + b"K\x01s."
    with pytest.raises(PickleError, match=r"a key that is \(\("):
        describe_pickle(as_key)
    for key in (b"}", b"]", b"}\x85"):
        with pytest.raises(PickleError, match="a key that is "):
            describe_pickle(b"\x80\x02}" + key + b"K\x01s.")
    assert describe_pickle(b"\x80\x02}K\x07K\x08\x86K\x01s.") == {(7, 8): 1}
    doubled = b"\x80\x02)" + b"q\x00h\x00\x86" * 100 + b"Q."
    with pytest.raises(PickleError, match="persistent id"):
        describe_pickle(doubled)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (25,), (1,)),
        (1, (24,), (1,)),
        (24, (1,), (1,)),
        (0, (4, 6), (7, 1)),
        (10**30, (1,), (1,)),
        (0, (10**12, 10**12), (0, 0)),
        (0, (5, 5), (0, 1)),
        (-1, (4,), (1,)),
        (0, (-4,), (1,)),
        (23, (4,), (-1,)),
        (0, (4,), (1, 1)),
        (0, (4.0,), (1,)),
        (True, (4,), (1,)),
        (0, (1,) * 9, (1,) * 9),
        (0, 4, (1,)),
        (0, (4,), 1),
        (0, (10**5000,), (1,)),
        (0, (0, 1 << 40, 1 << 40), (1, 1, 1)),
    ],
)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, offset, shape, strides):
    whole = torch_files.storage(np.float32, 24)
    pickled = torch_files.dumps({"x": torch_files.tensor(whole, offset, shape, strides)})
    path = torch_files.write(tmp_path / "x.pth", pickled, [VALUES])
    with pytest.raises(CheckpointError, match=r"a tensor is refused|4300 digits"):
        read_pth(path)


def one_tensor(size=24):
    whole = torch_files.storage(np.float32, size)
    return torch_files.dumps({"x": torch_files.tensor(whole, 0, (size,), (1,))})


def test_a_storage_of_too_many_numbers_is_refused(tmp_path):
    path = torch_files.write(tmp_path / "x.pth", one_tensor(10**5000), [VALUES])
    with pytest.raises(CheckpointError, match=r"refused|damaged"):
        read_pth(path)


@pytest.mark.parametrize("size", [23, 25, 1 << 40])
def test_a_storage_of_another_size_is_refused(tmp_path, size):
    path = torch_files.write(tmp_path / "x.pth", one_tensor(size), [VALUES])
    with pytest.raises(CheckpointError, match=f"storage 0 should hold {size} numbers .* 96 bytes"):
        read_pth(path)


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "x.pth"

    def assert_refused(message, content=None):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_pth(path)

    torch_files.write(path, one_tensor(), [VALUES])
    whole = path.read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        assert_refused("is damaged", whole[:length])
    assert_refused("begins with b''", b"")
    assert_refused("begins with b'abcd'", b"abcdef")
    assert_refused("damaged: pickle exhausted", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    assert_refused(
        "data/0 is cut off",
        whole.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 2),
    )

    torch_files.write(path, one_tensor(), [VALUES], compression=zipfile.ZIP_DEFLATED)
    assert_refused("byteorder is compressed|data.pkl is compressed")
    torch_files.write(path, one_tensor(), [VALUES], byteorder=b"big")
    assert_refused("big-endian")
    torch_files.write(path, one_tensor(), [])
    assert_refused("data/0 is missing")
    torch_files.write(path, pickle.dumps("text", 2))
    assert_refused("holds str, not tensors")
    torch_files.write(path, pickle.dumps({"x": 1}, 2))
    assert_refused("holds no tensors: x is a int")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("text.txt", "text")
    assert_refused("none that torch.save has written")
    with pytest.raises(FileNotFoundError):
        read_pth(tmp_path / "missing.pth")


def test_an_entry_that_claims_too_many_bytes(tmp_path):
    path = torch_files.write(tmp_path / "x.pth", one_tensor(1 << 20), [VALUES])
    content = bytearray(path.read_bytes())
    record = content.index(b"name/data/0", content.index(b"PK\x01\x02")) - 46
    content[record + 20 : record + 28] = (4 << 20).to_bytes(4, "little") * 2  # sizes
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cut off"):
        read_pth(path)


def test_what_is_written_is_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.normal(size=(3, 5)).astype(np.float32),
        "transposed": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16).T,
        "half": rng.normal(size=(1, 1, 7)).astype(np.float16),
        "double": rng.normal(size=()),
        "empty": np.zeros((0, 3), np.float32),
        "größe": np.arange(3),
    }
    write_pth(tmp_path / "x.pth", arrays.items())
    assert_same(arrays_of(tmp_path / "x.pth"), arrays)
    write_pth_list(tmp_path / "list.pth", arrays.values())
    assert_same(dict(zip(arrays, arrays_of(tmp_path / "list.pth"), strict=True)), arrays)


def test_the_layout_that_torch_writes(tmp_path):
    """Entries that torch looks for, uncompressed, and storages at multiples of 64 bytes."""
    write_pth(tmp_path / "x.pth", {"a": VALUES, "b": VALUES[:5]}.items())
    content = (tmp_path / "x.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        names = {"data/0", "data/1", "data.pkl", "byteorder", "version"}
        assert set(archive.namelist()) == {f"archive/{name}" for name in names}
        assert archive.read("archive/byteorder") == b"little"
    assert content.index(VALUES.tobytes()) % 64 == 0


def test_pythons_unpickler_reads_the_same(tmp_path):
    """As torch's does, which is stricter than Python's and was seen to read such files."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            return lambda *arguments: (module, name, arguments)

        def persistent_load(self, identity):
            kind, storage_type, *rest = identity
            return (kind, storage_type()[:2], *rest)

    write_pth(tmp_path / "x.pth", {"a": VALUES.reshape(6, 4).T}.items())
    with zipfile.ZipFile(tmp_path / "x.pth") as archive, archive.open("archive/data.pkl") as file:
        content = Unpickler(file).load()
    storage = ("storage", ("torch", "FloatStorage"), "0", "cpu", 24)
    hooks = ("collections", "OrderedDict", ())
    arguments = (storage, 0, (4, 6), (6, 1), False, hooks)
    assert content == {"a": ("torch._utils", "_rebuild_tensor_v2", arguments)}


def test_nothing_is_written_over_or_left_half_written(tmp_path):
    path = tmp_path / "x.pth"

    def failing():
        yield "a", VALUES
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_pth(path, failing())
    with pytest.raises(ValueError, match="dtype complex64"):
        write_pth(path, {"a": VALUES.astype(np.complex64)}.items())
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="exists"):
        write_pth(path, {"a": VALUES}.items())
    assert path.read_text() == "mine"


def test_entries_that_contradict_the_directory_of_the_archive(tmp_path):
    """Two names, two sizes or a patch: another reader might read other numbers."""
    path = torch_files.write(tmp_path / "x.pth", one_tensor(), [VALUES])
    whole = path.read_bytes()
    local = whole.index(b"name/data/0")
    record = whole.index(b"name/data/0", whole.index(b"PK\x01\x02")) - 46
    for at, value, message in (
        (local + 10, b"1", "the entry data/0 has two names"),
        (record + 20, (80).to_bytes(4, "little"), "the entry data/0 is cut off"),
        (record + 8, (0x20).to_bytes(2, "little"), "is compressed or encrypted|is damaged"),
    ):
        path.write_bytes(whole[:at] + value + whole[at + len(value) :])
        with pytest.raises(CheckpointError, match=message):
            read_pth(path)


def test_small_pickles_cost_little():
    """Nested calls, copies and hashes of what is long: each would take all memory, or hours."""
    begin = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00"
    rebuilt = b")" + b"".join([b"q\x01(h\x00Nh\x01Nt"] * 3000)  # (rebuild, None, arguments, None)
    with pytest.raises(PickleError, match="damaged"):
        describe_pickle(begin + rebuilt + b"q\x01h\x00h\x01R.")
    many = b"\x80\x02(" + b"K\x01" * 50_000 + b"tq\x00"
    size = b"ctorch\nSize\nq\x01(" + b"h\x01h\x00\x85R" * 50_000 + b"l."
    with pytest.raises(PickleError, match="instruction LIST"):
        describe_pickle(many + size)
    keys = b"}q\x01" + b"h\x00K\x01s" * 50_000 + b"."
    with pytest.raises(PickleError, match="a dict has a key that is"):
        describe_pickle(many + keys)
    number = b"\x80\x02\x8b" + (1 << 20).to_bytes(4, "little") + b"\x7f" * (1 << 20) + b"q\x00"
    with pytest.raises(PickleError, match="damaged"):
        describe_pickle(number + keys)


def test_a_pickle_of_many_bytes_is_refused(tmp_path):
    path = torch_files.write(tmp_path / "x.pth", b"\x80\x02" + b"}" * (8 << 20), [])
    with pytest.raises(CheckpointError, match=r"data\.pkl has 8,388,610 bytes, more than are read"):
        read_pth(path)
