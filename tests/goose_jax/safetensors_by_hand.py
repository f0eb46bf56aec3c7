"""Writes safetensors without the library and without the writer in the package."""

import json
import struct

NAMES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int64": "I64",
    "int8": "I8",
    "uint8": "U8",
}
INDEX = "model.safetensors.index.json"


def write(path, arrays):
    header, data = {}, b""
    for name, array in arrays.items():
        places = [len(data), len(data) + array.nbytes]
        kind = NAMES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": places}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_shards(folder, arrays, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    places = {}
    for k in range(count):
        file = f"model-{k + 1:05d}-of-{count:05d}.safetensors"
        shard = dict(list(arrays.items())[k::count])
        write(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder
