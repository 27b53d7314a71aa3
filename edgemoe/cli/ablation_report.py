"""The printing half of `bench --ablation`: a table for each rate, gains, and what the order is."""

from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

from ..runtime.amounts import format_bytes, format_rate
from .ablation_arms import BASELINE, BEST, MAX_TOKENS, ORDER, PAPER_GAIN
from .ablation_stores import ABOUT
from .render import markdown as markdown_table
from .render import table

COLUMNS = ("arm", "TPOT ms", "spread", "gain", "TTFT s", "read/token", "hit", "stall", "tokens")
SIZES = ("arm", "experts at", "stored", "experts in memory", "peak RSS", "loss", "output hash")


def tables(document: dict[str, Any], markdown: bool = False) -> str:
    """One table for each rate, one of sizes, and the conclusions."""
    draw: Callable[..., str] = markdown_table if markdown else table
    layers = f", the first {document['layers']} layers" if document["layers"] else ""
    machine = document["machine"]
    parts = [
        f"{document['model']}{layers}: {document['routing']}\n"
        f"{document['prompt_tokens']} prompt tokens, {document['warm_up_tokens']} to warm up what "
        f"keeps records, medians of {document['rounds']} rounds; {machine['cpu']}, "
        f"{machine['num_cpus']} CPUs; tokens: as many as take about {document['seconds']:g} s, one "
        f"to {MAX_TOKENS}"
    ]
    for rate in document["rates"]:
        rows = [_speed(row, document, rate) for row in document["rows"]]
        parts.append(f"emulated drive of {format_rate(rate)}\n\n" + draw(rows, COLUMNS))
    parts.append(draw([_sizes(row, document) for row in document["rows"]], SIZES))
    parts += conclusions(document)
    return "\n\n".join(parts)


def tpot(document: dict[str, Any], arm: str, rate: int) -> float | None:
    """Median seconds per token of an arm at a rate; None where it was left out."""
    for row in document["rows"]:
        if row["arm"] == arm:
            return median(each["tpot_s"] for each in row["rates"][str(rate)]["rounds"])
    return None


def gain(document: dict[str, Any], arm: str, rate: int) -> float | None:
    """How many times as fast as the baseline an arm is."""
    base, own = tpot(document, BASELINE, rate), tpot(document, arm, rate)
    return base / own if base and own else None


def out_of_order(document: dict[str, Any], rate: int) -> list[str] | None:
    """The arms that are not as slow as the paper has them, each beside the one it should be slower
    than; None where one of them was left out."""
    times = [time for arm in ORDER if (time := tpot(document, arm, rate)) is not None]
    if len(times) < len(ORDER):
        return None
    neighbours = zip(pairwise(ORDER), pairwise(times), strict=True)
    return [f"{a} is not slower than {b}" for (a, b), (own, next_) in neighbours if own <= next_]


def conclusions(document: dict[str, Any]) -> list[str]:
    """What the table shows, rate by rate."""
    lines = []
    for rate in document["rates"]:
        wrong, total = out_of_order(document, rate), gain(document, BEST, rate)
        if wrong is not None and total is not None:
            chain, verdict = " > ".join(ORDER), "NO, " + ", ".join(wrong) if wrong else "yes"
            lines.append(
                f"{format_rate(rate)}: {chain}: {verdict}; {BEST} is {total:.2f} "
                f"times as fast as {BASELINE} (the paper: {PAPER_GAIN})"
            )
    if different := _different(document):
        lines.append(f"NOT IDENTICAL: arms on one store gave different logits: {different}")
    return lines


def _different(document: dict[str, Any]) -> str:
    """The stores on which two arms did not compute the same."""
    hashes: dict[str, set[str]] = {}
    for row in document["rows"]:
        hashes.setdefault(row["store"], set()).add(row["logits_hash"])
    return ", ".join(store for store, found in hashes.items() if len(found) > 1)


def _speed(row: dict[str, Any], document: dict[str, Any], rate: int) -> tuple[str, ...]:
    cell = row["rates"][str(rate)]
    times = [each["tpot_s"] for each in cell["rounds"]]
    factor = gain(document, row["arm"], rate)
    first = [each["ttft_s"] for each in cell["rounds"] if each["ttft_s"] is not None]
    return (
        row["arm"],
        f"{1e3 * median(times):,.2f}",
        f"{1e3 * min(times):,.2f}-{1e3 * max(times):,.2f}",
        f"{factor:.2f}" if factor else "-",
        f"{first[0]:.3f}" if first else "-",
        format_bytes(int(median(each["bytes_per_token"] for each in cell["rounds"]))),
        _share(cell, "hit_rate"),
        _share(cell, "stall_share"),
        str(cell["tokens"]),
    )


def _share(cell: dict[str, Any], name: str) -> str:
    values = [each[name] for each in cell["rounds"] if each[name] is not None]
    return f"{100 * median(values):.0f} %" if values else "-"


def _sizes(row: dict[str, Any], document: dict[str, Any]) -> tuple[str, ...]:
    store = document["stores"][row["store"]]
    loss = document["loss"].get(row["store"])
    return (
        row["arm"],
        ABOUT[row["store"]],
        format_bytes(store["stored_bytes"]),
        format_bytes(row["expert_cache_bytes"]),
        format_bytes(max(row["peak_rss_bytes"])),
        _loss(loss),
        row["logits_hash"],
    )


def _loss(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "random weights"
    rise = figures["rise_percent"]
    return f"ppl {figures['perplexity']:.3f} ({rise:+.2f} %)"
