"""What the machine could do: storage and memory bandwidth, measured in the same minute as a run."""

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MIN_SWEEP_BYTES = 256 << 20
SWEEP_CACHES = 4  # times the last-level cache, which some servers have a quarter of a gigabyte of
BATCH_BYTES = 32 << 20
READ_SECONDS = 1.0


def dram_bandwidth(num_threads: int, repeats: int = 3) -> float:
    """Bytes per second of the best of `repeats` parallel sweeps over memory no cache can hold."""
    import numpy as np

    data = np.ones(sweep_bytes() // 8, dtype=np.int64)
    parts = np.array_split(data, num_threads)
    best = 0.0
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(repeats + 1):  # the first one wakes the threads
            begin = time.perf_counter()
            for _ in pool.map(np.bitwise_or.reduce, parts):
                pass
            best = max(best, data.nbytes / (time.perf_counter() - begin))
    return best


def sweep_bytes() -> int:
    """Bytes to sweep, from the largest cache that the system tells of; a quarter of what is free at
    most."""
    import psutil

    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            largest = max(largest, int(text[:-1]) << 10)
    free = psutil.virtual_memory().available
    return min(max(MIN_SWEEP_BYTES, SWEEP_CACHES * largest), free // 4)


def storage_bandwidth(index: Any, io: str, num_threads: int = 2) -> dict[str, Any]:
    """Read whole records in random order for a second, with nothing else going on.

    Uses the reader of the engine itself. Returns bytes per second, how it read, and how much: a
    buffered read may come out of the page cache, and then says nothing about the drive.
    """
    import numpy as np

    from ..runtime.index import EXPERTS_FILE
    from ..runtime.io import Arena, RecordReader

    keys = sorted(index.records)
    records = [index.records[key] for key in keys]
    order = list(range(len(records)))
    random.Random(0).shuffle(order)
    slot_bytes = index.max_record_bytes
    batch = max(1, min(BATCH_BYTES // slot_bytes, len(records)))
    reader = RecordReader(index.path / EXPERTS_FILE, records, num_threads=num_threads, io=io)
    arena = Arena(batch * slot_bytes)
    num_bytes, begin, elapsed = 0, time.perf_counter(), 0.0
    try:
        for first in range(0, len(order), batch):
            chunk = np.sort(np.array(order[first : first + batch], dtype=np.int32))
            slots = arena.address + np.arange(len(chunk), dtype=np.uint64) * np.uint64(slot_bytes)
            reader.submit(chunk, slots.astype(np.uint64))
            for key in chunk:
                reader.wait(int(key))
                num_bytes += records[key].num_bytes
            elapsed = time.perf_counter() - begin
            if elapsed > READ_SECONDS:
                break
        note = reader.io_note
    finally:
        reader.close()
        arena.close()
    return {"bytes_per_s": num_bytes / max(elapsed, 1e-9), "bytes": num_bytes, "io": note}


def touched_bytes(index: Any, num_tokens: int, kv_bits: int) -> float:
    """Bytes of weights and KV cache that decoding one token after `num_tokens` goes through."""
    from ..models import parse_config
    from ..runtime.format import read_header
    from ..runtime.index import TRUNK_FILE

    model = parse_config(index.config)
    with open(index.path / TRUNK_FILE, "rb") as file:
        tensors, _ = read_header(file, TRUNK_FILE)
    total = sum(
        entry.num_bytes
        for name, entry in tensors.items()
        if model.tie_embeddings or "embed_tokens" not in name  # of an embedding, one row is read
    )
    for layer, num_experts in index.layer_to_num_experts.items():
        records = (index.records[layer, expert].num_bytes for expert in range(num_experts))
        total += model.top_k * sum(records) / num_experts
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * kv_bits // 8
    return total + num_tokens * per_token


def machine() -> dict[str, Any]:
    """What a reader of the figures must know about the machine."""
    import platform

    import psutil

    from .. import __version__

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line[:10] == "model name")
    except (OSError, StopIteration):
        pass
    return {
        "cpu": name,
        "num_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "edgemoe": __version__,
    }
