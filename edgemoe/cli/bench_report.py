"""The printing half of `bench`: medians and spread of the rounds, as aligned or Markdown tables."""

from collections.abc import Callable
from statistics import median
from typing import Any

from ..runtime.amounts import format_bytes
from .bench_arms import describe_limits
from .render import markdown as markdown_table
from .render import table

SPEED = ("budget", "experts", "prefill t/s", "TTFT s", "decode t/s", "spread", "step p95 ms")
READS = ("budget", "hit", "read/token", "stall", "storage limit t/s", "DRAM limit t/s", "reached")
MEMORY = ("budget", "bytes", "peak RSS", "anonymous", "page cache", "output hash")


def tables(document: dict[str, Any], markdown: bool = False) -> str:
    """Three tables and what a reader must know beside them."""
    draw: Callable[..., str] = markdown_table if markdown else table
    rows = [row for row in document["rows"] if row["rounds"]]
    prompts = document["prompts"]
    rounds = max((len(row["rounds"]) for row in rows), default=0)
    machine = document["machine"]
    parts = [
        f"{document['model']}: {prompts['tokens']} prompt tokens ({prompts['note']}), "
        f"{document['decoded_tokens']} decoded, median of {rounds} rounds\n"
        f"{machine['cpu']}, {machine['num_cpus']} CPUs, {format_bytes(machine['memory_bytes'])}; "
        f"{describe_limits(document['limits'])}",
        draw([_speed(row) for row in rows], SPEED),
        draw([_reads(row) for row in rows], READS),
        draw([_memory(row) for row in rows], MEMORY),
    ]
    parts += [f"{row['arm']}: {row['error']}" for row in document["rows"] if "error" in row]
    if len({_hash(row) for row in rows}) > 1:
        parts.append("NOT IDENTICAL: the budgets produced different tokens")
    return "\n\n".join(parts)


def _values(row: dict[str, Any], name: str) -> list[float]:
    return [each[name] for each in row["rounds"] if each[name] is not None]


def _mid(row: dict[str, Any], name: str, form: str = ".1f", scale: float = 1.0) -> str:
    values = _values(row, name)
    return format(scale * median(values), form) if values else "-"


def _bytes(row: dict[str, Any], name: str, choose: Callable[[list[float]], float] = median) -> str:
    values = _values(row, name)
    return format_bytes(int(choose(values))) if values else "-"


def _speed(row: dict[str, Any]) -> tuple[str, ...]:
    speeds = _values(row, "decode_tokens_per_s")
    spread = f"{min(speeds):.1f}-{max(speeds):.1f}" if speeds else "-"
    return (
        row["arm"],
        _bytes(row, "expert_cache_bytes"),
        _mid(row, "prefill_tokens_per_s"),
        _mid(row, "ttft_s", ".2f"),
        _mid(row, "decode_tokens_per_s"),
        spread,
        _mid(row, "step_p95_s", ".1f", 1e3),
    )


def _reads(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["arm"],
        _mid(row, "hit_rate", ".0f", 100) + " %",
        _bytes(row, "bytes_read_per_token"),
        _mid(row, "stall_share", ".0f", 100) + " %",
        _limit(row, "storage_bound_s"),
        _limit(row, "dram_bound_s"),
        _mid(row, "reached", ".0f", 100) + " %",
    )


def _limit(row: dict[str, Any], name: str) -> str:
    seconds = median(_values(row, name))
    return f"{1 / seconds:,.0f}" if seconds else "none"


def _memory(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["arm"],
        format_bytes(row["budget_bytes"]),
        _bytes(row, "peak_rss_bytes", max),
        _bytes(row, "peak_anonymous_bytes", max),
        _bytes(row, "peak_page_cache_bytes", max),
        _hash(row),
    )


def _hash(row: dict[str, Any]) -> str:
    """One hash over the outputs of all rounds."""
    import hashlib

    joined = ",".join(each["output_hash"] for each in row["rounds"])
    return hashlib.sha256(joined.encode()).hexdigest()[:16]
