"""Writes sizes in memory as a person reads them."""

import math

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def format_bytes(size: int) -> str:
    """Returns a size in the largest unit that fits, such as "1.4 GiB"."""
    if size < 1024:
        return f"{size} bytes"
    power = min(int(math.log(size, 1024)), 4)
    return f"{size / 1024**power:.3g} {_UNITS[power - 1]}"


__all__ = ["format_bytes"]
