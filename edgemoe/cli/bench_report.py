"""The printing half of `bench`: medians and spread of the rounds, as aligned or Markdown tables."""

from collections.abc import Callable
from statistics import median
from typing import Any

from ..runtime.amounts import format_bytes, format_rate
from .render import markdown as markdown_table
from .render import table

SPEED = (
    "budget",
    "experts",
    "prefill t/s",
    "spread",
    "TTFT s",
    "decode t/s",
    "spread",
    "step p95 ms",
    "dispatch ms",
)
PROFILE = ("budget", "dispatch ms", "Python", "deciding", "guessing", "handing over", "reads")
READS = ("budget", "hit", "read/token", "read in prefill", "stall", "CPU s/GB", "crc s/GB")
DECODE = ("budget", "storage t/s", "DRAM t/s", "reached", "no reads t/s", "overlapped")
PREFILL = ("budget", "storage s", "no reads s", "took s", "overlapped")
MEMORY = ("budget", "bytes", "peak RSS", "anonymous", "page cache", "output hash")
LEGEND = """\
storage, DRAM: the decode speed that each alone allows (bytes read and bytes
touched per token, over the rates measured right before and after the run).
reached: share of the lower of the two. no reads: the same tokens with every
expert in memory. overlapped: the larger of reading alone and computing alone,
over the time both took together."""


def tables(document: dict[str, Any], markdown: bool = False) -> str:
    """Six tables and what a reader must know beside them."""
    draw: Callable[..., str] = markdown_table if markdown else table
    every = [row for row in document["rows"] if row["rounds"]]
    rows = [row for row in every if not row["is_control"]]
    prompts = document["prompts"]
    rounds = max((len(row["rounds"]) for row in rows), default=0)
    machine = document["machine"]
    throttle = document["throttle_bytes_per_s"]
    slowed = f" slowed down to {format_rate(throttle)}" if throttle else ""
    routing = {each["routing"] for row in every for each in row["rounds"]} - {None}
    with_set = "".join(f", {label}" for label in sorted(routing))
    parts = [
        f"{document['model']}{with_set}: {prompts['tokens']} prompt tokens ({prompts['note']}), "
        f"{document['decoded_tokens']} decoded, median of {rounds} rounds\n"
        f"{machine['cpu']}, {machine['num_cpus']} CPUs, {format_bytes(machine['memory_bytes'])}; "
        f"{describe_limits(every)}{slowed}",
        draw([_speed(row) for row in rows], SPEED),
        "decode\n\n" + draw([_decode(row) for row in rows], DECODE),
        "prefill\n\n" + draw([_prefill(row) for row in rows], PREFILL),
        "profile of a token\n\n" + draw([_profile(row) for row in rows], PROFILE),
        draw([_reads(row) for row in rows], READS),
        draw([_memory(row) for row in rows], MEMORY),
        LEGEND,
    ]
    parts += [f"{row['arm']}: {row['error']}" for row in document["rows"] if "error" in row]
    if len({_hash(row) for row in every}) > 1:
        parts.append("NOT IDENTICAL: the budgets produced different tokens")
    return "\n\n".join(parts)


def describe_limits(rows: list[dict[str, Any]]) -> str:
    """One line about the machine, for people."""
    limits = [each["limits"] for row in rows for each in row["rounds"]]

    def rates(name: str) -> str:
        found = [each[name] for each in limits]
        return f"{format_bytes(int(min(found)))}/s to {format_bytes(int(max(found)))}/s"

    return (
        f"storage {rates('storage_bytes_per_s')} ({limits[0]['io']}) and beside compute "
        f"{rates('storage_beside_compute_bytes_per_s')}, memory {rates('dram_bytes_per_s')} and "
        f"beside reads {rates('dram_beside_reads_bytes_per_s')}, measured around each run"
    )


def _values(row: dict[str, Any], name: str) -> list[float]:
    return [each[name] for each in row["rounds"] if each.get(name) is not None]


def _mid(row: dict[str, Any], name: str, form: str = ".1f", scale: float = 1.0) -> str:
    values = _values(row, name)
    return format(scale * median(values), form) if values else "-"


def _share(row: dict[str, Any], name: str) -> str:
    return _mid(row, name, ".0f", 100) + (" %" if _values(row, name) else "")


def _spread(row: dict[str, Any], name: str) -> str:
    values = _values(row, name)
    return f"{min(values):.1f}-{max(values):.1f}" if values else "-"


def _bytes(row: dict[str, Any], name: str, choose: Callable[[list[float]], float] = median) -> str:
    values = _values(row, name)
    return format_bytes(int(choose(values))) if values else "-"


def _speed(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["arm"],
        _bytes(row, "expert_cache_bytes"),
        _mid(row, "prefill_tokens_per_s"),
        _spread(row, "prefill_tokens_per_s"),
        _mid(row, "ttft_s", ".2f"),
        _mid(row, "decode_tokens_per_s"),
        _spread(row, "decode_tokens_per_s"),
        _mid(row, "step_p95_s", ".1f", 1e3),
        _mid(row, "dispatch_s_per_token", ".2f", 1e3),
    )


def _decode(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["arm"],
        _limit(row, "storage_bound_s"),
        _limit(row, "dram_bound_s"),
        _share(row, "reached"),
        _mid(row, "no_read_tokens_per_s"),
        _share(row, "overlapped"),
    )


def _profile(row: dict[str, Any]) -> tuple[str, ...]:
    parts = ("dispatch", "python", "decide", "guess", "submit")
    return (
        row["arm"],
        *(_mid(row, f"{part}_s_per_token", ".2f", 1e3) for part in parts),
        _mid(row, "misses_per_token", ".1f"),
    )


def _limit(row: dict[str, Any], name: str) -> str:
    seconds = median(_values(row, name))
    return f"{1 / seconds:,.1f}" if seconds else "none"


def _prefill(row: dict[str, Any]) -> tuple[str, ...]:
    tokens = [each["ttft_s"] * each["prefill_tokens_per_s"] for each in row["rounds"]]
    alone = _values(row, "prefill_no_read_tokens_per_s")
    return (
        row["arm"],
        _mid(row, "prefill_storage_bound_s", ".2f"),
        f"{median(tokens) / median(alone):.2f}" if alone else "-",
        _mid(row, "ttft_s", ".2f"),
        _share(row, "prefill_overlapped"),
    )


def _reads(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["arm"],
        _share(row, "hit_rate"),
        _bytes(row, "bytes_read_per_token"),
        _bytes(row, "prefill_bytes_read"),
        _share(row, "stall_share"),
        _mid(row, "reader_cpu_s_per_gb", ".3f"),
        _mid(row, "crc_s_per_gb", ".3f"),
    )


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
