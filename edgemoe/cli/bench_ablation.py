"""`bench --ablation`: the schemes of the EdgeMoE paper by name, side by side on emulated drives.

Every round opens each arm once, measures it at every rate, and closes it, so that the arms are
interleaved. Decoded tokens are the same for all arms at a rate, as far as they are many enough.
"""

import argparse
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.amounts import format_bytes, format_rate
from ..runtime.errors import BudgetError, UsageError
from ..runtime.index import EXPERTS_FILE, TRUNK_FILE, StoreIndex
from .ablation_arms import (
    ARMS,
    RATES,
    REFERENCE,
    SHARED,
    Arm,
    bytes_per_token,
    capacity,
    num_tokens,
)
from .ablation_stores import derive, work_folder
from .ablation_workload import Workload
from .bench_limits import machine
from .bench_memory import PeakMemory
from .render import note

if TYPE_CHECKING:
    from ..engine import Engine

SCHEMA = 1
PROCESS_BYTES = 512 << 20  # what an arm holds besides its store, libraries included
CHECKED_TOKENS = 8  # of the output hash
TTFT_SECONDS = 4  # so many times --seconds may the slowest prompt take


def measure(source: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every arm in every round; returns the JSON document."""
    arms = _arms(args)
    stores = prepare(source, args)
    work = Workload(stores[arms[0].store], args)
    _check_memory(arms, stores)
    share_bytes = int(args.share * stores[SHARED].expert_bytes)
    rates = args.rates or list(RATES)
    rows = [_row(arm, stores[arm.store], work, share_bytes, rates, args) for arm in arms]
    work.cut_prompt(_affordable_prompt(arms, stores, work, rates, args.seconds))
    note(f"about {_expected_minutes(arms, rows, stores, work, args.repeats)} minutes of reading")
    for turn in range(args.repeats):
        for arm, row in zip(arms, rows, strict=True):
            note(f"round {turn + 1} of {args.repeats}: {arm.name}")
            _measure_arm(arm, row, stores[arm.store], work, turn == 0, args)
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "model": source.name.removesuffix(".edgemoe"),
        "layers": args.replay_layers,
        "routing": work.about,
        "prompt_tokens": work.prompt_tokens,
        "warm_up_tokens": args.warm_up,
        "rates": rates,
        "share": args.share,
        "share_bytes": share_bytes,
        "seconds": args.seconds,
        "rounds": args.repeats,
        "stores": {kind: _describe(index) for kind, index in stores.items()},
        "loss": work.losses(stores, REFERENCE),
        "rows": rows,
    }


def prepare(source: Path, args: argparse.Namespace) -> dict[str, StoreIndex]:
    """The stores that the arms need, by kind: made where they are not there yet."""
    from .ablation_mixed import mixed_store

    _check_inputs(source, args)
    kinds = {arm.store for arm in _arms(args)} | {SHARED}
    if args.replay is None:
        kinds.add(REFERENCE)  # of the loss
    given = None if args.mixed is None else Path(args.mixed)
    folder = work_folder(args, source)
    return derive(source, folder, args.replay_layers, mixed_store(args), given, kinds)


def _check_inputs(source: Path, args: argparse.Namespace) -> None:
    """Raises for options and files that nothing can be measured with, before stores are made."""
    from ..quant.windows import read_tokens
    from ..runtime.trace import Trace
    from ..tokenizer import Tokenizer

    if args.replay_layers and not args.replay:
        raise UsageError("--replay-layers goes with --replay", "", "name the trace")
    if args.replay is not None and args.text is not None:
        raise UsageError("--replay brings its own tokens", "", "leave --text out")
    if args.replay is not None:
        Trace.load(args.replay)
    if args.text is not None:
        read_tokens(Path(args.text), Tokenizer.load(source))


def _arms(args: argparse.Namespace) -> list[Arm]:
    if unknown := set(args.arms or ()) - {arm.name for arm in ARMS}:
        raise UsageError(
            f"no arm is called `{sorted(unknown)[0]}`",
            f"known are {', '.join(arm.name for arm in ARMS)}",
        )
    return [arm for arm in ARMS if not args.arms or arm.name in args.arms]


def _check_memory(arms: list[Arm], stores: dict[str, StoreIndex]) -> None:
    """BudgetError where an arm that keeps all experts would not find the memory."""
    import psutil

    free = psutil.virtual_memory().available
    for arm in arms:
        needed = _describe(stores[arm.store])["stored_bytes"] + PROCESS_BYTES
        if arm.is_resident and needed > free:
            raise BudgetError(
                f"{arm.name} does not fit into memory",
                f"it keeps all experts: {format_bytes(needed)}, {format_bytes(free)} are free",
                "leave it out with --arms, or take fewer layers with --replay-layers",
            )


def _expected_minutes(
    arms: list[Arm], rows: list[Any], stores: dict[str, StoreIndex], work: Workload, rounds: int
) -> int:
    """At least so long does it take, by the bytes alone: prompts once, then tokens."""
    seconds = 0.0
    for arm, row in zip(arms, rows, strict=True):
        per_token = bytes_per_token(arm, stores[arm.store], work.top_k)
        prompts = 1 if arm.streams else work.prompt_tokens
        for rate, cell in row["rates"].items():
            seconds += per_token / int(rate) * (prompts + rounds * cell["tokens"])
    return max(1, round(seconds / 60))


def _row(
    arm: Arm, index: StoreIndex, work: Workload, share: int, rates: list[int], args: Any
) -> dict[str, Any]:
    expected = bytes_per_token(arm, index, work.top_k)
    available = work.available - (args.warm_up if arm.is_warm else 0)
    least = capacity(arm, index, max(work.top_k, work.model_top_k), share)
    return {
        "arm": arm.name,
        "store": arm.store,
        "prefetch": arm.prefetch,
        "expert_cache_bytes": min(least, index.expert_bytes),
        "rates": {
            str(rate): {
                "tokens": num_tokens(expected, rate, args.seconds, available),
                "rounds": [],
            }
            for rate in rates
        },
        "peak_rss_bytes": [],
    }


def _affordable_prompt(
    arms: list[Arm],
    stores: dict[str, StoreIndex],
    work: Workload,
    rates: list[int],
    seconds: float,
) -> int:
    """Prompt tokens that the slowest arm can read the experts of in some seconds, one at least."""
    index = stores[max((arm.store for arm in arms), key=lambda kind: stores[kind].expert_bytes)]
    per_token = work.top_k * len(index.layer_to_num_experts) * index.max_record_bytes
    if index.expert_bytes <= min(rates) * seconds * TTFT_SECONDS:
        return work.prompt_tokens
    return max(1, int(TTFT_SECONDS * seconds * min(rates) / per_token))


def _measure_arm(
    arm: Arm, row: dict[str, Any], index: StoreIndex, work: Workload, is_first: bool, args: Any
) -> None:
    """One round of an arm: at each rate by an engine of its own, since a cache learns from the
    tokens and would know them when they come again."""
    from ..engine import Engine
    from ..preflight import release_free_memory
    from .layer_stream import LayerStream

    for rate, cell in row["rates"].items():
        gc.collect()
        release_free_memory()
        with (
            PeakMemory([index.path / EXPERTS_FILE, index.path / TRUNK_FILE]) as peak,
            Engine.from_pretrained(
                index.path,
                context=work.context,
                cache_bytes=row["expert_cache_bytes"],
                policy=arm.policy,
                threads=args.threads,
                prefetch=arm.prefetch,
                warm_start="off",
            ) as engine,
        ):
            if arm.is_resident:
                engine.cache.preload()
            if arm.streams:
                engine.use_executor(LayerStream)
            work.open(engine, layerwise=arm.streams, guesses=arm.prefetch != "none")
            cell["rounds"].append(
                _measure_rate(arm, engine, work, int(rate), cell["tokens"], is_first, args)
            )
            if "logits_hash" not in row:
                row["logits_hash"] = work.checked(CHECKED_TOKENS)
        row["peak_rss_bytes"].append(peak.rss_bytes)


def _measure_rate(
    arm: Arm,
    engine: "Engine",
    work: Workload,
    rate: int,
    count: int,
    with_prompt: bool,
    args: Any,
) -> dict[str, Any]:
    """TTFT with nothing in memory (in the first round), then a warm-up at full speed where what is
    read may serve later, then the tokens that count."""
    result: dict[str, Any] = {"ttft_s": None, "prefill_bytes_read": None}
    prompt = work.begin()
    if with_prompt:  # the second one: memory that is new to a process comes slowly
        if not arm.is_resident and not arm.streams:
            held = engine.cache.capacity_bytes
            engine.cache.trim(0)
            engine.cache.trim(held)
        engine.reader.throttle(rate)
        prompt = work.begin()
        result |= {"ttft_s": prompt.prefill_s, "prefill_bytes_read": prompt.prefill["bytes_read"]}
    engine.reader.throttle(0)
    if arm.is_warm or arm.is_resident:
        work.go_on(args.warm_up)
    engine.reader.throttle(rate)
    before = engine.reader.stats()
    decoded = work.go_on(count)
    busy_s = engine.reader.stats()["throttle_busy_s"] - before["throttle_busy_s"]
    engine.reader.throttle(0)
    demand = sum(decoded.decode[name] for name in ("hits", "misses", "guessed"))
    has_hits = demand and not arm.streams
    num_bytes = engine.reader.stats()["num_bytes"] - before["num_bytes"]
    return result | {
        "tpot_s": decoded.decode_s / count,
        "bytes_per_token": num_bytes / count,
        "hit_rate": decoded.decode["hits"] / demand if has_hits else None,
        "guessed_rate": decoded.decode["guessed"] / demand if has_hits else None,
        "stall_share": decoded.decode["stall_s"] / decoded.decode_s,
        "drive_busy_share": busy_s / decoded.decode_s,
    }


def _describe(index: StoreIndex) -> dict[str, Any]:
    files = (index.path / EXPERTS_FILE, index.path / TRUNK_FILE)
    widths: dict[int, int] = {}
    for record in index.records.values():
        bits = record.layout.gate_up.bits
        widths[bits] = widths.get(bits, 0) + 1
    return {
        "path": str(index.path),
        "stored_bytes": sum(file.stat().st_size for file in files),
        "expert_bytes": index.expert_bytes,
        "max_record_bytes": index.max_record_bytes,
        "experts_by_bits": dict(sorted(widths.items())),
    }


def summary(document: dict[str, Any]) -> str:
    """One line for standard error."""
    rates = ", ".join(format_rate(rate) for rate in document["rates"])
    return f"{document['model']}: {rates}; our expert cache {format_bytes(document['share_bytes'])}"
