"""The printing half of `bench kernels`: medians and spread, as aligned or Markdown tables."""

from collections.abc import Callable
from statistics import median
from typing import Any

from ..runtime.amounts import format_bytes
from .render import markdown as markdown_table
from .render import table

DECODE = ("format", "isa", "threads", "GB/s", "roof", "fraction", "spread", "us/layer", "hash")


def tables(document: dict[str, Any], markdown: bool = False) -> str:
    """One table for decode, one for prefill, and what a reader must know beside them."""
    draw: Callable[..., str] = markdown_table if markdown else table
    machine = document["machine"]
    parts = [
        f"one layer of 8 experts, hidden {document['hidden']}, width {document['width']}; pools of "
        f"{format_bytes(document['pool_bytes'])}, median of {document['repeats']} rounds\n"
        f"{machine['cpu']}, {machine['num_cpus']} CPUs, {format_bytes(machine['memory_bytes'])}",
        draw([_decode(row) for row in document["rows"] if row["tokens"] == 1], DECODE),
    ]
    tokens = sorted({row["tokens"] for row in document["rows"]} - {1})
    if tokens:
        header = ("format", "isa", "threads", *(f"GMAC/s, {count} tokens" for count in tokens))
        parts.append(draw(_prefill(document["rows"], tokens), header))
    hashes: dict[tuple[str, int], set[str]] = {}
    for row in document["rows"]:
        key = format_name(row), row["tokens"]
        hashes.setdefault(key, set()).update(each["output_hash"] for each in row["rounds"])
    for (name, count), found in hashes.items():
        if len(found) > 1:
            parts.append(f"NOT IDENTICAL: {name} with {count} tokens gave {len(found)} results")
    return "\n\n".join(parts)


def format_name(row: dict[str, Any]) -> str:
    """As the option --formats has it."""
    return row["mode"] if row["bits"] == 16 else f"{row['bits']}-{row['mode']}-{row['group_size']}"


def _mid(row: dict[str, Any], name: str) -> float:
    return median(each[name] for each in row["rounds"])


def _decode(row: dict[str, Any]) -> tuple[Any, ...]:
    fractions = [each["fraction"] for each in row["rounds"]]
    return (
        format_name(row),
        row["isa"],
        row["threads"],
        f"{_mid(row, 'bytes_per_s') / 1e9:.1f}",
        f"{_mid(row, 'roof_bytes_per_s') / 1e9:.1f}",
        f"{median(fractions):.2f}",
        f"{min(fractions):.2f}-{max(fractions):.2f}",
        f"{_mid(row, 'layer_s') * 1e6:,.0f}",
        row["rounds"][0]["output_hash"],
    )


def _prefill(rows: list[dict[str, Any]], tokens: list[int]) -> list[tuple[Any, ...]]:
    found: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in rows:
        if row["tokens"] > 1:
            key = format_name(row), row["isa"], row["threads"]
            found.setdefault(key, {})[row["tokens"]] = f"{_mid(row, 'macs_per_s') / 1e9:.0f}"
    return [(*key, *(cells[count] for count in tokens)) for key, cells in found.items()]
