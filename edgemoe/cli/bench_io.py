"""`edgemoe bench io MODEL`: how fast expert records come from storage, and what that costs."""

import argparse
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from ..runtime.amounts import format_bytes
from ..runtime.errors import UsageError
from . import options
from .render import markdown, open_output, table
from .reports import add_report_options, check_report_options, print_report

if TYPE_CHECKING:
    from ..runtime.index import StoreIndex

DESCRIPTION = """Read expert records in random order, each way that there is, and no offset twice.

The records are dealt out to the arms, a part for each arm and round, and the arms take turns, so
that a slow second of the drive hits all alike and no part is in anybody's cache. Where fio is
installed, it reads parts of its own with the same requests, as a reference."""
EPILOG = """latency: from asking for a record until all of it is there, with one record more
asked for at a time than the depth has requests. CPU s/GB: in the reader, which hands over, waits
and takes note. process: all of it, with this program's own Python. Both are without checksums
(crc). of fio: the median over the rounds of our rate over fio's at the same depth; fio's memory
lies on 4 KiB pages.

  edgemoe bench io NAME.edgemoe --depths 1,2,4 -r 5
"""
HEADER = (
    "arm",
    "GB/s",
    "spread",
    "of fio",
    "CPU s/GB",
    "process",
    "crc s/GB",
    "p50 ms",
    "p99 ms",
    "cache grew",
)
PART_BYTES = 256 << 20  # of memory for one part


class Arm(NamedTuple):
    """One way to read: `method` of the reader, `buffered`, or `fio`."""

    method: str
    depth: int

    @property
    def name(self) -> str:
        return f"{self.method}, depth {self.depth}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--depths",
        type=options.counts,
        default=[1, 2, 4],
        metavar="LIST",
        help="requests at a time (default: 1,2,4)",
    )
    parser.add_argument(
        "-r", "--repeats", type=options.count, default=5, metavar="N", help="default: 5"
    )
    add_report_options(parser)


def run(args: argparse.Namespace) -> int:
    path = Path(options.model_path(args) or options.bundled_model())
    check_report_options(args)
    open_output()
    document = measure(path, args.depths, args.repeats)
    print_report(document, args, lambda: report(document, markdown if args.markdown else table))
    return 0


def measure(path: Path, depths: Sequence[int], repeats: int) -> dict[str, Any]:
    """Rows of rounds: bytes, seconds, CPU seconds, latencies and growth of the page cache."""
    from ..runtime.index import EXPERTS_FILE, load_index
    from ..runtime.io import Arena
    from .bench_limits import machine

    index = load_index(path)
    arms, notes = _arms(index, depths)
    keys = list(range(len(index.records)))
    random.Random(0).shuffle(keys)
    size = min(len(keys) // (len(arms) * repeats), max(1, PART_BYTES // index.max_record_bytes))
    if size < 1:
        raise UsageError(
            f"{len(keys)} records are too few",
            f"{len(arms)} arms and {repeats} rounds read none of them twice",
            "fewer --depths or repeats",
        )
    rows: list[dict[str, Any]] = [{"arm": arm.name, **arm._asdict(), "rounds": []} for arm in arms]
    with Arena(size * index.max_record_bytes) as arena:
        arena.view(0, arena.num_bytes)[:] = 0  # no page faults while the clock runs
        for turn in range(repeats):
            for place, (arm, row) in enumerate(zip(arms, rows, strict=True)):
                first = (turn * len(arms) + place) * size
                part = keys[first : first + size]
                read = _read_fio if arm.method == "fio" else _read
                row["rounds"].append(read(index, arm, part, arena))
    return {
        "model": path.name,
        "file": str(index.path / EXPERTS_FILE),
        "records": len(keys),
        "part_bytes": size * index.max_record_bytes,
        "machine": machine(),
        "notes": notes,
        "rows": rows,
    }


def _arms(index: "StoreIndex", depths: Sequence[int]) -> tuple[list[Arm], list[str]]:
    """The ways that work here, and why others do not."""
    from ..runtime.index import EXPERTS_FILE
    from ..runtime.io import RecordReader

    arms, notes = [], []
    for method in ("io_uring", "threads"):
        try:
            RecordReader(index.path / EXPERTS_FILE, [], 1, "direct", method=method).close()
        except UsageError as error:
            notes.append(f"{method}: {error.what}; {error.why}")
        else:
            arms += [Arm(method, depth) for depth in depths]
    arms += [Arm("buffered", depth) for depth in depths]
    if shutil.which("fio") is None:
        notes.append("no reference: fio is not installed")
    else:
        arms += [Arm("fio", depth) for depth in depths]
    return arms, notes


def _read(index: "StoreIndex", arm: Arm, part: Sequence[int], arena: Any) -> dict[str, Any]:
    """One part through the engine's own reader: a queue of requests that never runs dry."""
    import numpy as np

    from ..runtime.index import EXPERTS_FILE
    from ..runtime.io import READY, RecordReader
    from .bench_memory import page_cache_bytes

    path = index.path / EXPERTS_FILE
    records = [index.records[pair] for pair in sorted(index.records)]
    keys = np.array(part, dtype=np.int32)
    steps = np.arange(len(part), dtype=np.uint64) * np.uint64(index.max_record_bytes)
    slots = np.uint64(arena.address) + steps
    is_buffered = arm.method == "buffered"
    io, method = ("buffered", "auto") if is_buffered else ("direct", arm.method)
    asked_ns = np.zeros(len(part), dtype=np.int64)
    with RecordReader(path, records, arm.depth, io, method=method) as reader:
        cached = page_cache_bytes([path])
        cpu, begin = time.process_time(), time.perf_counter()
        for i in range(len(part) + arm.depth):
            if i < len(part):
                asked_ns[i] = time.monotonic_ns()
                reader.submit(keys[i : i + 1], slots[i : i + 1])
            if i >= arm.depth and reader.wait(part[i - arm.depth]) != READY:
                raise UsageError("a record cannot be read", "", "edgemoe verify lists the damaged")
        elapsed, cpu = time.perf_counter() - begin, time.process_time() - cpu
        after = page_cache_bytes([path])
        stats = reader.stats()
        latency_s = (reader.landed_ns[keys] - asked_ns) * 1e-9
    return {
        "bytes": stats["num_bytes"],
        "requests": stats["num_requests"],
        "elapsed_s": elapsed,
        "cpu_s": cpu - stats["crc_s"],
        "reader_cpu_s": stats["cpu_s"],
        "crc_s": stats["crc_s"],
        "latency_s": latency_s.tolist(),
        "cache_growth_bytes": None if cached is None or after is None else after - cached,
    }


def _read_fio(index: "StoreIndex", arm: Arm, part: Sequence[int], arena: Any) -> dict[str, Any]:
    """One part through fio: the same two requests a record, replayed at this depth."""
    from ..runtime.index import EXPERTS_FILE

    path = (index.path / EXPERTS_FILE).resolve()
    records = [index.records[pair] for pair in sorted(index.records)]
    lines = ["fio version 2 iolog", f"{path} add", f"{path} open"]
    for record in (records[key] for key in part):
        down = record.layout.down_offset
        lines.append(f"{path} read {record.offset} {down}")
        lines.append(f"{path} read {record.offset + down} {record.num_bytes - down}")
    lines.append(f"{path} close")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "requests")
        log.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = ["fio", "--name=reference", f"--filename={path}", "--readonly", "--direct=1"]
        command += ["--ioengine=io_uring", f"--iodepth={arm.depth}", f"--read_iolog={log}"]
        command += ["--replay_no_stall=1", "--output-format=json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    try:
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    except (ValueError, LookupError) as error:
        raise UsageError("fio failed", done.stderr.strip()[-200:]) from error
    wall_s = job["job_runtime"] * 1e-3
    return {
        "bytes": job["read"]["io_bytes"],
        "requests": job["read"]["total_ios"],
        "elapsed_s": max(job["read"]["runtime"] * 1e-3, 1e-9),
        "cpu_s": (job["usr_cpu"] + job["sys_cpu"]) * 0.01 * wall_s,
    }


def report(document: dict[str, Any], draw: Callable[..., str]) -> str:
    """The table, and what a reader must know beside it."""
    rows, machine = document["rows"], document["machine"]
    rounds = len(rows[0]["rounds"])
    of_fio = {row["depth"]: row["rounds"] for row in rows if row["method"] == "fio"}
    parts = [
        f"{document['model']}: {document['records']} records, parts of "
        f"{format_bytes(document['part_bytes'])} in random order, median of {rounds} rounds\n"
        f"{machine['cpu']}, {machine['num_cpus']} CPUs; load {machine['load_average']}",
        draw([_line(row, of_fio.get(row["depth"])) for row in rows], HEADER),
        *document["notes"],
    ]
    return "\n\n".join(parts)


def _line(row: dict[str, Any], reference: list[dict[str, Any]] | None) -> tuple[str, ...]:
    rounds = row["rounds"]
    rates = [each["bytes"] / each["elapsed_s"] for each in rounds]
    share, growth = "-", "-"
    if reference and row["method"] != "fio":
        theirs = (each["bytes"] / each["elapsed_s"] for each in reference)
        share = f"{median(a / b for a, b in zip(rates, theirs, strict=True)):.2f}"
    cpu = [  # s/GB
        f"{median(each[name] / each['bytes'] for each in rounds) * 1e9:.3f}"
        if name in rounds[0]
        else "-"
        for name in ("reader_cpu_s", "cpu_s", "crc_s")
    ]
    latencies = sorted(value for each in rounds for value in each.get("latency_s", ()))
    grown = [each["cache_growth_bytes"] for each in rounds if "cache_growth_bytes" in each]
    if grown and None not in grown:
        growth = format_bytes(max(0, *grown))
    return (
        row["arm"],
        f"{median(rates) / 1e9:.2f}",
        f"{min(rates) / 1e9:.2f}-{max(rates) / 1e9:.2f}",
        share,
        *cpu,
        f"{latencies[len(latencies) // 2] * 1e3:.1f}" if latencies else "-",
        f"{latencies[len(latencies) * 99 // 100] * 1e3:.1f}" if latencies else "-",
        growth,
    )
