"""Amounts of memory as people write and read them. Floor 0."""

import math
import re

from .errors import UsageError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
_UNITS = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_UNITS |= {f"{unit}ib": size for unit, size in _UNITS.items() if unit}
_UNITS |= {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_bytes(text: str | int) -> int:
    """`4GiB`, `500MB`, `1.5G`, `4096`: KiB/MiB/GiB/TiB and K/M/G/T are powers of 1024, kB/MB/GB/TB
    powers of 1000. Raises UsageError."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(text).lower(), re.ASCII)
    if match and match[2] in _UNITS:
        whole, _, decimals = match[1].partition(".")
        scaled = int((whole + decimals) or "0") * _UNITS[match[2]]
        num_bytes = scaled // 10 ** len(decimals)
        if 0 < num_bytes < 1 << 62:
            return num_bytes
    raise UsageError(
        f"`{text}` is no amount of memory",
        "expected a positive number and a unit",
        "write 4GiB, 500MB or 1.5G",
    )


def parse_rate(text: str | int) -> int:
    """`550MB/s` in bytes per second, units as in `parse_bytes`. Raises UsageError."""
    try:
        return parse_bytes(text.strip().removesuffix("/s") if isinstance(text, str) else text)
    except UsageError as error:
        raise UsageError(
            f"`{text}` is no rate", "expected an amount of memory per second", "write 550MB/s"
        ) from error


def format_rate(bytes_per_s: float) -> str:
    """`550 MB/s`, `12.9 GB/s`: in powers of 1000, as drives are sold."""
    if bytes_per_s >= 9_999_500_000:  # five digits of MB
        return f"{bytes_per_s / 1e9:.1f} GB/s"
    return f"{bytes_per_s / 1e6:,.4g} MB/s"


def format_bytes(num_bytes: int) -> str:
    """`3.25 GiB`, `12 MiB`, `700 B`: three digits and a binary unit."""
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) * 2048 >= size * 2047:  # 1024 of the smaller unit is never written
            value = num_bytes / size
            digits = max(0, 2 - int(math.log10(abs(value))))
            return f"{value:.{digits}f} {unit}"
    return f"{num_bytes} B"


def format_count(count: int) -> str:
    """`18.87 M`, and small counts to the last one: `3,328`."""
    return f"{count / 1e6:,.2f} M" if count >= 10_000 else f"{count:,}"
