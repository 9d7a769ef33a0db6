"""Sizes of memory: from text to bytes and back."""

from __future__ import annotations

import re

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)


def parse_bytes(size: str | int) -> int:
    """Bytes of `"8GB"` (8 · 10⁹), `"8 GiB"` (8 · 2³⁰), `"640MB"` or a number of bytes.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ValueError(f"{size!r} is not a size of memory: write '8GB', '7.5GiB' or '640MB', or a number of bytes.")
    return int(float(match[1]) * unit)


def format_bytes(size: int) -> str:
    """`"7.9 GB"`, `"640 MB"`: three digits, powers of ten."""
    for unit in ("GB", "MB", "KB"):
        if size >= UNITS[unit]:
            return (
                f"{size / UNITS[unit]:.3g} {unit}" if size < 1000 * UNITS[unit] else f"{size / UNITS[unit]:.0f} {unit}"
            )
    return f"{size} B"
