"""The printing half of `bench --sets`: what each arm is, what it costs, what it saves."""

from collections.abc import Callable
from statistics import median
from typing import Any

from ..runtime.amounts import format_bytes, format_rate
from .bench_sets import NAMES
from .render import markdown as markdown_table
from .render import table

OTHER = {"text": "in domain", "other": "elsewhere"}
LEGEND = """Stored: what a store of this arm alone takes. Picks that go: of the full model's.
KL: mean divergence from the full model's distribution, in nats. Read/token: demanded bytes, the
same given tokens for all arms. Faster: median and range of the ratios to the full model within
each round; bound: what that ratio would be if reads and the rest were perfectly side by side.
Limiter: what takes longest alone: bytes read at the drive's rate, bytes gone through at that of
DRAM, and what a run without reads takes beyond that (compute), in ms. TTFT: the same prompt with
nothing in memory."""
Draw = Callable[..., str]


def tables(document: dict[str, Any], markdown: bool = False) -> str:
    """What the arms are, what they save, what they cost, and their curves."""
    rows, draw = document["rows"], markdown_table if markdown else table
    parts = [_head(document), _what(rows, document, draw), _speed(rows, draw)]
    parts += [_quality(rows, document, draw), *_curves(rows, document, draw), LEGEND]
    wrong = [row["arm"] for row in rows if row["lossless"] and _hashes(row) != _hashes(rows[0])]
    if wrong:
        parts.append(f"NOT IDENTICAL: {', '.join(wrong)} and the full model gave different logits")
    return "\n\n".join(parts)


def _head(document: dict[str, Any]) -> str:
    machine, texts = document["machine"], document["texts"]
    limits = document["limits"]
    share = f"{format_bytes(document['expert_cache_bytes'])}, {document['expert_cache_share']:.0%}"
    budget = f"an expert cache of {share} of all experts"
    if document["budget_bytes"] is not None:
        budget = f"{format_bytes(document['budget_bytes'])} for the process, {budget}"
    slowed = document["throttle_bytes_per_s"]
    files = document["text_files"]
    named = "; ".join(
        f"{OTHER[name]}: {files[name]}, {count:,} tokens" for name, count in texts.items()
    )

    def rates(name: str) -> str:
        found = sorted(each[name] for each in limits)
        return f"{format_rate(int(found[0]))} to {format_rate(int(found[-1]))}"

    return (
        f"{document['model']}: {budget}\n"
        f"{named}\n"
        f"{document['prompt_tokens']} prompt tokens, {document['decoded_tokens']} decoded, "
        f"{len(document['rows'][0]['rounds'])} rounds, guesses: {document['prefetch']}; "
        f"{machine['cpu']}, {machine['num_cpus']} CPUs; "
        f"storage {rates('storage_bytes_per_s')}"
        + (f" (slowed down to {format_rate(slowed)})" if slowed else "")
        + f", memory {rates('dram_bytes_per_s')}"
    )


def _what(rows: list[dict[str, Any]], document: dict[str, Any], draw: Draw) -> str:
    names = [name for name in NAMES if name in document["texts"]]
    header = ["arm", "experts", "stored", *(f"picks that go, {OTHER[name]}" for name in names)]
    header += ["output", "logits"]
    cells = [
        [
            row["arm"],
            f"{row['num_experts']:,}",
            format_bytes(row["stored_bytes"]),
            *(_percent(row["removed_picks"].get(name)) for name in names),
            "exact" if row["lossless"] else "changed",
            _hashes(row),
        ]
        for row in rows
    ]
    return draw(cells, header)


def _speed(rows: list[dict[str, Any]], draw: Draw) -> str:
    header = ("arm", "read/token", "fewer reads", "hit", "tok/s", "spread", "faster", "bound")
    header += ("limiter", "alone: drive, DRAM, compute", "TTFT s", "peak")
    return draw([_speed_row(row, rows[0]) for row in rows], header)


def _speed_row(row: dict[str, Any], full: dict[str, Any]) -> list[str]:
    speeds = values(row, "decode_tokens_per_s")
    faster = ratios(full, row, lambda own: own["decode_tokens_per_s"], is_more=True)
    bound = ratios(full, row, lambda own: own["bound_s"], is_more=False)
    alone = [each["alone_s"] for each in row["rounds"]]
    times = [
        f"{1e3 * median(each[name] for each in alone):.2f}"
        for name in ("storage", "DRAM", "compute")
        if name in alone[0]
    ]
    return [
        row["arm"],
        format_bytes(int(median(values(row, "bytes_read_per_token")))),
        _times(fewer_reads(full, row)),
        _percent(median(values(row, "hit_rate"))),
        f"{median(speeds):.1f}",
        f"{min(speeds):.1f}-{max(speeds):.1f}",
        f"{median(faster):.2f} ({min(faster):.2f}-{max(faster):.2f})",
        f"{median(bound):.2f}",
        limiter_of(row),
        " ".join(times),
        f"{median(values(row, 'ttft_s')):.3f}",
        format_bytes(max(values(row, "peak_rss_bytes"))),
    ]


def _quality(rows: list[dict[str, Any]], document: dict[str, Any], draw: Draw) -> str:
    names = [name for name in NAMES if name in document["texts"]]
    header = ["arm"]
    for name in names:
        header += [f"perplexity, {OTHER[name]}", f"KL, {OTHER[name]}"]
    asked = rows[0]["answers"]
    if asked:
        header += ["right answers", "all right", "as the full model", "tokens alike"]
    cells = []
    for row in rows:
        cell = [row["arm"]]
        for name in names:
            losses = row["losses"][name]
            rise = losses["rise_percent"]
            cell.append(
                f"{losses['perplexity']:.3f}" + ("" if rise is None else f" ({rise:+.1f} %)")
            )
            cell.append("" if losses["kl"] is None else f"{losses['kl']:.4f}")
        if asked:
            own = row["answers"]
            cell += [
                f"{own['num_right']}/{own['num_answers']}",
                f"{own['num_all_right']}/{own['num_conversations']}",
                f"{own['num_same']}/{own['num_conversations']}",
                f"{own['mean_same_tokens']:.1f} of {own['mean_tokens']:.1f}",
            ]
        cells.append(cell)
    return draw(cells, header)


def _curves(rows: list[dict[str, Any]], document: dict[str, Any], draw: Draw) -> list[str]:
    """Hit rates and reads of each arm's own routing by size of the expert cache."""
    whole = rows[0]["expert_bytes"]
    sizes = [each["bytes"] for each in rows[0]["curve"]]
    header = [f"{100 * size / whole:.3g} %" for size in sizes]
    hits = [[row["arm"], *(f"{each['hit_rate']:.3f}" for each in row["curve"])] for row in rows]
    reads = [
        [row["arm"], *(format_bytes(int(each["bytes_per_token"])) for each in row["curve"])]
        for row in rows
    ]
    count = document["curve_tokens"]
    return [
        f"By size of the expert cache, in shares of the full model's experts ({count:,} tokens of "
        "the text, by each arm's own routing, caches empty at first):",
        draw(hits, ["hit rate", *header]),
        draw(reads, ["read/token", *header]),
    ]


# ---- figures of rows, for the picture too --------------------------------------------------------


def values(row: dict[str, Any], name: str) -> list[Any]:
    """A figure of every round that has it; one NaN where none has."""
    return [each[name] for each in row["rounds"] if each[name] is not None] or [float("nan")]


def ratios(full: dict[str, Any], row: dict[str, Any], of: Any, is_more: bool) -> list[float]:
    """Within each round, the arm's figure over the full model's, or the other way round."""
    pairs = [(of(a), of(b)) for a, b in zip(full["rounds"], row["rounds"], strict=True)]
    return [b / a if is_more else a / b for a, b in pairs]


def fewer_reads(full: dict[str, Any], row: dict[str, Any]) -> float:
    """How many times fewer bytes a token reads; infinite where it reads none."""
    own, all_of_it = (
        sum(each["bytes_read_per_token"] for each in each_row["rounds"]) for each_row in (row, full)
    )
    if not own:
        return float("inf") if all_of_it else 1.0
    return all_of_it / own


def limiter_of(row: dict[str, Any]) -> str:
    """What limited most of the rounds."""
    names = [each["limiter"] for each in row["rounds"]]
    return max(sorted(set(names)), key=names.count)


def _times(value: float) -> str:
    return "none left" if value == float("inf") else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{100 * value:.1f} %"


def _hashes(row: dict[str, Any]) -> str:
    """One hash over the logits of all rounds."""
    import hashlib

    joined = ",".join(each["output_hash"] for each in row["rounds"])
    return hashlib.sha256(joined.encode()).hexdigest()[:8]
