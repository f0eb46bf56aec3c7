"""Writes binidx files after the format's description, without the code under test."""

import struct


def index_bytes(sizes, *, code=8, width=2, version=1, magic=b"MMIDIDX\0\0", bounds=None):
    """Returns the bytes of an `.idx`; documents have one item each, unless `bounds` are given."""
    bounds = list(range(len(sizes) + 1)) if bounds is None else bounds
    out = magic + struct.pack("<Q", version) + struct.pack("<B", code)
    out += struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(bounds))
    out += b"".join(struct.pack("<i", size) for size in sizes)
    address = 0
    for size in sizes:
        out += struct.pack("<q", address)
        address += size * width
    return out + b"".join(struct.pack("<q", bound) for bound in bounds)


def write_by_hand(prefix, items, *, letter="H", **options):
    """Writes `.bin` and `.idx` of lists of tokens."""
    width = struct.calcsize(letter)
    data = b"".join(struct.pack(f"<{len(item)}{letter}", *item) for item in items)
    prefix.with_suffix(".bin").write_bytes(data)
    index = index_bytes([len(item) for item in items], width=width, **options)
    prefix.with_suffix(".idx").write_bytes(index)
    return prefix
