"""Changes checkpoints at random and reads them.

Each reader must raise a `CheckpointError` or return what the changed file says, as an independent
reader understands it. It must not raise another error, hang, take much memory or run code.

By hand: `python -m tests.goose_jax.checkpoint_fuzz --count 10000`. A case is a function of the seed
and its number, so that `--only NUMBER` repeats it.
"""

import argparse
import contextlib
import functools
import io
import json
import pathlib
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
import zlib

import ml_dtypes
import numpy as np

from goose_jax import load_pretrained, load_state, save_pretrained
from goose_jax.checkpoints import (
    CheckpointError,
    CheckpointMetadata,
    load_merged_state,
    read_contents,
)
from goose_jax.checkpoints.containers import open_tensors
from goose_jax.checkpoints.directory import CHECKSUMS
from goose_jax.training import TuningCheckpoint, load_tuning_checkpoint, save_tuning_checkpoint
from tests.goose_jax import safetensors_by_hand, torch_files
from tests.goose_jax.layouts_by_hand import CONFIG, RENAME, WRAPPED
from tests.goose_jax.random_parameters import flat_params, make_model

SECONDS = 20  # in which a reader must end
MEMORY = 64 << 20  # bytes that reading a file of a few thousand bytes may add
SIZES = {"vocab_size": 11, "hidden_size": 8, "num_layers": 2, "head_size": 4,
         "intermediate_size": 6, "decay_rank": 2, "alpha_rank": 3, "value_rank": 2,
         "gate_rank": 3}  # fmt: skip
RUNS_CODE = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn",
             "pickle.find_class", "socket.connect", "ctypes.dlopen"}  # fmt: skip
MARKER = "executed"
TUNED = {"wkv": np.arange(64, dtype=np.float32).reshape(2, 2, 4, 4)}
RENEWED = "renewed"  # a file that tells that the checksums were made anew


INSTRUCTIONS = "".join(opcode.code for opcode in pickletools.opcodes)


class FoundError(Exception):
    """A reader did what no reader may do."""


def small_model():
    return make_model(**SIZES, compute_dtype="float32", head_norm_eps=64e-5)


def official_arrays(folder):
    """The weights of a small model by official name."""
    save_pretrained(small_model(), folder / "official.pth", "pth")
    with zipfile.ZipFile(folder / "official.pth"):
        return arrays_in_pth(folder / "official.pth")[0]


def write_seeds(folder):
    """Writes the checkpoints that are changed, and returns their paths."""
    arrays = official_arrays(folder)
    states = {f"blocks.{i}.att.time_state": np.ones((2, 4, 4), np.float32) for i in range(2)}
    renamed = {
        layout: {
            name: np.ascontiguousarray(value)
            for name, value in (RENAME[layout](*item) for item in arrays.items())
        }
        for layout in ("transformers", "rwkv-rs", "web-rwkv")
    }
    torch_files.write_arrays(folder / "merged.pth", arrays | states)
    torch_files.write_arrays(folder / "protocol-4.pth", arrays, 4)
    for kind in ("module", "arguments", "lightning"):
        wrap = WRAPPED[kind]
        path = folder / f"{kind}.pth"
        if kind == "lightning":  # whose step is a view of the golden model's embedding
            wrap = WRAPPED["two prefixes"]
        torch_files.write_arrays(path, arrays, wrap_all=wrap)
    attack = torch_files.Call(eval, f"open({MARKER!r}, 'w')")
    torch_files.write_arrays(folder / "attack.pth", arrays, wrap_all=lambda x: x | {"x": attack})
    torch_files.write_before_1_6(folder / "before.pth", arrays)
    layer = [np.ones(8, np.float32), np.ones((2, 4, 4), np.float32), np.ones(8, np.float32)]
    torch_files.write_arrays(folder / "list.pth", layer * 2)
    safetensors_by_hand.write(folder / "official.safetensors", arrays)
    safetensors_by_hand.write(folder / "web-rwkv.st", renamed["web-rwkv"] | states)
    safetensors_by_hand.write(folder / "rwkv-rs.st", renamed["rwkv-rs"])
    shards = safetensors_by_hand.write_shards(folder / "transformers", renamed["transformers"])
    names = {"hidden_size": 8, "vocab_size": 11, "num_hidden_layers": 2, "head_size": 4,
             "intermediate_size": 6, "num_attention_heads": 2, "decay_low_rank_dim": 2,
             "a_low_rank_dim": 3, "v_low_rank_dim": 2, "gate_low_rank_dim": 3}  # fmt: skip
    (shards / "config.json").write_text(json.dumps(CONFIG | names))
    fla = make_model(**SIZES, compute_dtype="float32", head_norm_eps=4e-5)
    save_pretrained(fla, folder / "fla", "huggingface")
    save_pretrained(fla, folder / "fla-shards", "huggingface-x-x", max_shard_bytes=2000)
    save_pretrained(small_model(), folder / "native", "native")
    metadata = CheckpointMetadata(tokenizer="byte")
    path = str(folder / "native")
    tuned = TuningCheckpoint(TUNED, None, small_model().config, "0badf00d", path, metadata)
    save_tuning_checkpoint(folder / "tuned", tuned)
    return sorted(folder.iterdir())


def change(data, rng):
    """Returns changed bytes, and the name of the change."""
    kind = rng.choice(
        ["bits", "bits", "bits", "bytes", "cut", "zeros", "swap", "insert", "repeat", "numbers",
         "names", "deep", "instructions"]
    )  # fmt: skip
    data = bytearray(data)
    if not data:
        return bytes(rng.randbytes(9)), "insert"
    head = rng.random() < 0.5  # where headers, pickles and indexes lie
    places = min(len(data), 2500) if head else len(data)
    at = rng.randrange(places)
    length = rng.randint(1, 64)
    match kind:
        case "bits":
            for _ in range(rng.choice([1, 1, 2, 8, 40])):
                data[rng.randrange(places)] ^= 1 << rng.randrange(8)
        case "bytes":
            data[at : at + length] = rng.randbytes(length)
        case "cut":
            del data[at:]
        case "zeros":
            data[at : at + length] = bytes([rng.choice([0, 255])]) * length
        case "swap":
            other = rng.randrange(places)
            first, second = data[at : at + length], data[other : other + length]
            if len(first) == len(second):
                data[at : at + length], data[other : other + length] = second, first
        case "insert":
            data[at:at] = rng.randbytes(length)
        case "repeat":
            data[at:at] = data[at : at + length]
        case "numbers":
            data = change_a_number(data, rng)
        case "deep":
            data[at:at] = rng.choice([b"[", b'{"a":', b"(", b")\x85", b"}"]) * 20_000
        case "instructions":
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(places)] = ord(rng.choice(INSTRUCTIONS))
        case "names":
            data = swap_names(data, rng)
    return bytes(data), kind


def change_a_number(data, rng):
    """Puts another number in the place of one that is written in digits."""
    found = [match.span() for match in re.finditer(rb"\d+", data)]
    if not found:
        return data
    begin, end = rng.choice(found)
    numbers = [b"0", b"-1", b"7", b"1e999", b"9" * 30, b"null", b"1" + b"0" * (end - begin)]
    number = rng.choice(numbers)
    return data[:begin] + number[: rng.choice([end - begin, 40])] + data[end:]


def swap_names(data, rng):
    """Swaps two names of tensors, files or entries of the same length, wherever they stand."""
    names = sorted(set(re.findall(rb"[A-Za-z_][\w./-]{3,60}|data/\d+", data)))
    if len(names) < 2:
        return data
    first = rng.choice(names)
    others = [name for name in names if len(name) == len(first) and name != first]
    if not others:
        return data
    second = rng.choice(others)
    swapped = data.replace(first, b"\xff\0\xfe").replace(second, first)
    return bytearray(swapped.replace(b"\xff\0\xfe", second))


def arrays_in_safetensors(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    kinds = {name: np.dtype(kind) for kind, name in safetensors_by_hand.NAMES.items()}
    kinds |= {"I32": np.dtype(np.int32)}
    arrays = {}
    for name, told in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in told["data_offsets"])
            values = np.frombuffer(data[begin:end], kinds[told["dtype"]])
            arrays[name] = values.reshape(told["shape"])
    return [arrays]


class Described:
    """What the independent reader makes of anything that a pickle names."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    extend = append


class OrderedDict(dict):
    def __setstate__(self, state):
        pass


class Unpickler(pickle._Unpickler):
    """Python's own, with stand-ins for all that a pickle names."""

    def find_class(self, module, name):
        if module == "collections" and name in ("OrderedDict", "defaultdict"):
            return OrderedDict if name == "OrderedDict" else lambda *_: OrderedDict()
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if name.startswith("_rebuild_parameter"):
            return lambda value, *_: value
        if name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return Tensor
        if (module, name) == ("torch", "Size"):
            return tuple
        return type("Other", (Described,), {})

    def persistent_load(self, identity):
        return identity


class Tensor:
    def __init__(self, storage, offset, shape, strides, *_):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def __setstate__(self, state):
        pass

    @property
    def is_known(self):
        """Whether the dtype is one that is read; others are left out."""
        return isinstance(self.storage[1], np.dtype)

    def read(self, read_storage):
        _, dtype, key, _, size, *_ = self.storage
        values = np.frombuffer(read_storage(key), dtype)
        assert len(values) == size
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        indices = np.zeros((), int) + self.offset
        for axis, (length, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            step = np.arange(length) * stride
            indices = indices[..., None] + step if axis else indices + step
        return values[indices]


STORAGES = {
    "FloatStorage": np.dtype(np.float32), "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16), "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16), "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8), "BoolStorage": np.dtype(np.bool_),
}  # fmt: skip


def arrays_in_pth(path):
    """The tensors of all dicts in a file, one dict of arrays for each; a list has numbers."""
    if path.read_bytes()[:2] == b"PK":
        archive = zipfile.ZipFile(path)
        prefix = next(n for n in archive.namelist() if n.endswith("/data.pkl"))[: -len("data.pkl")]

        def read(key):
            with archive.open(f"{prefix}data/{key}") as entry:
                entry._expected_crc = None  # torch writes checksums, and may be told not to
                return entry.read()

        with archive.open(f"{prefix}data.pkl") as entry:
            entry._expected_crc = None
            content = Unpickler(io.BytesIO(entry.read())).load()
    else:
        content, read = open_before_1_6(path)
    waiting, seen, dicts = [content], [], []
    while waiting:
        node = waiting.pop()
        if any(node is other for other in seen):
            continue
        seen.append(node)
        items = dict(enumerate(node)) if isinstance(node, list) else node
        if isinstance(items, dict):
            waiting += [x for x in items.values() if isinstance(x, dict)]
            tensors = {k: x for k, x in items.items() if isinstance(x, Tensor) and x.is_known}
            dicts.append({k: x.read(read) for k, x in tensors.items()})
    return dicts


def open_before_1_6(path):
    file = io.BytesIO(path.read_bytes())
    for _ in range(3):
        Unpickler(file).load()
    used = []

    class Recording(Unpickler):
        def persistent_load(self, identity):
            used.append(identity)
            return identity

    content, keys = Recording(file).load(), Unpickler(file).load()
    dtypes = {identity[2]: identity[1] for identity in used}
    storages = {}
    for key in keys:
        size = struct.unpack("<q", file.read(8))[0]
        storages[key] = file.read(size * dtypes[key].itemsize)
    return content, storages.__getitem__


def arrays_at(path):
    """All arrays at a path, as the independent readers understand them: dicts by name."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        return [{k: v for file in files for k, v in arrays_in_safetensors(file)[0].items()}]
    if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        return arrays_in_pth(path)
    return arrays_in_safetensors(path)


def same(found, expected):
    return (
        found.shape == expected.shape
        and found.dtype == expected.dtype
        and found.tobytes() == expected.tobytes()
    )


def check_values(path):
    """Reads all tensors of a foreign checkpoint and compares them with the independent reader's."""
    tensors, _ = open_tensors(path)
    items = tensors.items() if isinstance(tensors, dict) else enumerate(tensors)
    found = {name: tensor.read() for name, tensor in items}
    try:
        expected = arrays_at(path)
    except Exception as error:
        raise FoundError(f"read what the independent reader cannot: {error!r}") from error
    for name, value in found.items():
        if not any(name in arrays and same(value, arrays[name]) for arrays in expected):
            raise FoundError(f"{name} is not what the file says")


def renew_checksums(folder):
    """Makes a changed checkpoint of ours look as if it had been saved so."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != CHECKSUMS]
    told = {
        f.relative_to(folder).as_posix(): [f.stat().st_size, zlib.crc32(f.read_bytes())]
        for f in files
    }
    (folder / CHECKSUMS).write_text(json.dumps(told))


def check_native(path, original):
    model, _ = load_pretrained(path)
    if (path / RENEWED).exists():
        return
    for name, value in flat_params(model).items():
        if not same(value, original[name]):
            raise FoundError(f"{name} of a damaged checkpoint is not what was saved")


def check_tuned(path):
    found = load_tuning_checkpoint(path)
    if not (path / RENEWED).exists() and not same(np.asarray(found.params["wkv"]), TUNED["wkv"]):
        raise FoundError("a damaged state is not what was saved")


def readers(path, original):
    """The readers by name. Each may raise a CheckpointError, and a FoundError of this module."""
    config = small_model().config
    if "tuned" in path.name:
        yield "load_tuning_checkpoint", lambda: check_tuned(path)
        return
    yield "read_contents", lambda: read_contents(path)
    if path.is_dir() and (path / CHECKSUMS).exists():
        yield "load_pretrained", lambda: check_native(path, original)
        return
    yield "tensors", lambda: check_values(path)
    yield "load_pretrained", lambda: load_pretrained(path, dtype="float32")
    yield "load_state", lambda: load_state(path, config)
    yield "load_merged_state", lambda: load_merged_state(path, config)


@contextlib.contextmanager
def limits():
    """Raises a FoundError if the body takes too much time or memory."""

    def stop(*_):
        raise FoundError(f"took longer than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if added > MEMORY:
        raise FoundError(f"took {added >> 20} MiB of memory")


_watching = False
_seen = []


def watch(event, arguments):
    if _watching and event in RUNS_CODE:
        _seen.append(f"{event} {arguments!r}")


@functools.cache
def _install_watch():
    sys.addaudithook(watch)


def run_reader(reader):
    """Runs a reader. Returns whether it accepted the file."""
    global _watching
    _seen.clear()
    try:
        with limits():
            _watching = True
            reader()
    except CheckpointError as error:
        if len(str(error)) > 2000:
            raise FoundError(f"an error of {len(str(error))} characters") from error
        return False
    finally:
        _watching = False
    return True


def run_case(number, seed, seeds, original, folder):
    """Changes one checkpoint and reads it. Returns which readers accepted it.

    Raises:
      FoundError: naming the case.
    """
    rng = random.Random(seed * 1_000_003 + number)
    source = rng.choice(seeds)
    path = folder / source.name
    kinds = []
    (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
    try:
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        is_ours = path.name in ("native", "tuned")
        for _ in range(1 if is_ours else rng.choice([1, 1, 1, 2])):
            file = rng.choice(files)
            if path.is_dir() and rng.random() < 0.1:
                other = rng.choice(files)
                kinds.append(f"{file.name} over {other.name}")
                if other != file:
                    shutil.copy(file, other)
                continue
            data, kind = change(file.read_bytes(), rng)
            kinds.append(f"{kind} in {file.name}")
            file.write_bytes(data)
        # Orbax's files are guarded by the checksums alone.
        of_us = path.is_dir() and (path / "params").is_dir() and file.parent == path
        if of_us and file.name != CHECKSUMS and rng.random() < 0.5:
            (path / RENEWED).touch()
            renew_checksums(path)
        accepted = []
        for name, reader in readers(path, original):
            try:
                if run_reader(reader):
                    accepted.append(name)
                if _seen:
                    raise FoundError(f"ran code: {_seen}")
            except Exception as error:
                where = "".join(traceback.format_exception(error))
                raise FoundError(f"case {number}: {kinds}, {name}: {error!r}\n{where}") from error
        return accepted
    finally:
        (shutil.rmtree if path.is_dir() else pathlib.Path.unlink)(path)


def fuzz(count, seed=0, begin=0, report=lambda number, accepted: None):
    """Runs cases. Returns what was found, as text, and how many files were accepted by a reader."""
    _install_watch()
    found, accepted = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "seeds").mkdir()
        (folder / "work").mkdir()
        seeds = write_seeds(folder / "seeds")
        original = flat_params(small_model())
        with contextlib.chdir(folder / "work"):
            for path in seeds:  # warms up, and every seed but the attack is read
                results = [run_reader(reader) for _, reader in readers(path, original)]
                if path.name != "attack.pth" and not any(results[-4:]):
                    found.append(f"the unchanged {path.name} is refused")
            for number in range(begin, begin + count):
                try:
                    accepted += bool(run_case(number, seed, seeds, original, folder / "work"))
                except FoundError as error:
                    found.append(str(error))
                if pathlib.Path(MARKER).exists():
                    found.append(f"case {number} executed code")
                    pathlib.Path(MARKER).unlink()
                report(number, accepted)
    return found, accepted


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="number of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one case to run")
    options = parser.parse_args()

    def report(number, accepted):
        if (number + 1) % 500 == 0:
            print(f"{number + 1} files, {accepted} accepted by some reader", flush=True)

    begin, count = (0, options.count) if options.only is None else (options.only, 1)
    found, accepted = fuzz(count, options.seed, begin, report)
    print("\n\n".join(found[:20]))
    print(f"{count} files: {accepted} accepted by some reader, {len(found)} found to be wrong")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
