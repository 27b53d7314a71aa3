"""What the machine could do: storage and memory rates, measured right before and after a run."""

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

MIN_SWEEP_BYTES = 256 << 20
SWEEP_CACHES = 4  # times the last-level cache, which some servers have a quarter of a gigabyte of
STRETCH_BYTES = 128 << 20  # swept in one go: Ctrl-C waits for it
PIECE_BYTES = 8 << 20  # swept in one go beside reads
BATCH_BYTES = 32 << 20
NUM_WINDOWS, WINDOW_S = 3, 0.2


def measure_limits(
    index: Any, io: str, num_threads: int, throttle: int | None = None
) -> dict[str, Any]:
    """Rates in bytes per second: memory, storage, and storage while all threads sweep memory.

    On some machines both share one path, so that the last is less than the one before. `io` says
    how the storage was read; a buffered read may come out of the page cache, and then says nothing
    about the drive. `throttle`: as a drive of so many bytes per second.
    """
    reader = StorageReads(index, io, throttle)
    with closing(MemorySweep(num_threads)) as sweep, closing(reader) as reads:
        dram = sweep.best()
        storage = reads.rate()
        with sweep.running() as swept:
            beside = reads.rate()
        return {
            "dram_bytes_per_s": dram,
            "storage_bytes_per_s": storage,
            "storage_beside_compute_bytes_per_s": beside,
            "dram_beside_reads_bytes_per_s": swept(),
            "io": reads.io_note,
        }


class MemorySweep:
    """Reads memory that no cache can hold with several threads, as fast as it goes.

    In huge pages and with the core's widest loads, as experts are read; in NumPy without the core.
    """

    def __init__(self, num_threads: int) -> None:
        import numpy as np

        from ..runtime.io import Arena
        from ..runtime.kernels import ThreadPool

        self._num_bytes = sweep_bytes() // PIECE_BYTES * PIECE_BYTES
        self._arena = Arena(self._num_bytes)
        self._data = self._arena.view(0, self._num_bytes).view("u8")
        for piece in np.split(self._data, self._num_bytes // PIECE_BYTES):
            piece.fill(1)  # not all at once: Ctrl-C waits for the end of a call
        self._pool = ThreadPool(num_threads)
        self._executor = ThreadPoolExecutor(num_threads)
        self._num_threads = num_threads

    def best(self, repeats: int = 3) -> float:
        """Bytes per second of the best of some sweeps."""
        best = 0.0
        for _ in range(repeats + 1):  # the first one wakes the threads
            begin = time.perf_counter()
            for first in range(0, self._num_bytes, STRETCH_BYTES):
                self._read(first, min(STRETCH_BYTES, self._num_bytes - first))
            best = max(best, self._num_bytes / (time.perf_counter() - begin))
        return best

    def running(self) -> "_Running":
        """Sweeps for as long as the context lasts; gives a function that tells the rate after."""
        return _Running(self)

    def until(self, stop: threading.Event) -> float:
        """Sweep piece by piece until `stop`; bytes per second."""
        num_bytes, begin = 0, time.perf_counter()
        while not stop.is_set():
            self._read(num_bytes % self._num_bytes, PIECE_BYTES)
            num_bytes += PIECE_BYTES
        return num_bytes / (time.perf_counter() - begin)

    def _read(self, first: int, num_bytes: int) -> None:
        import numpy as np

        from ..runtime import core

        if self._pool.handle is not None:
            core.lib.em_memory_sweep(self._pool.handle, self._arena.address + first, num_bytes)
            return
        parts = np.array_split(self._data[first // 8 : (first + num_bytes) // 8], self._num_threads)
        for _ in self._executor.map(np.bitwise_or.reduce, parts):
            pass

    def close(self) -> None:
        """Give the memory and the threads back."""
        self._executor.shutdown()
        self._pool.close()
        del self._data
        self._arena.close()


class _Running:
    def __init__(self, sweep: MemorySweep) -> None:
        self._sweep, self._stop = sweep, threading.Event()
        self._executor = ThreadPoolExecutor(1)

    def __enter__(self) -> Callable[[], float]:
        self._job = self._executor.submit(self._sweep.until, self._stop)
        return self._job.result

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._executor.shutdown()


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
    return max(PIECE_BYTES, min(max(MIN_SWEEP_BYTES, SWEEP_CACHES * largest), free // 4))


class StorageReads:
    """Reads whole records in random order with the reader of the engine itself."""

    def __init__(self, index: Any, io: str, throttle: int | None = None) -> None:
        import numpy as np

        from ..runtime.control_group import read_limit
        from ..runtime.index import EXPERTS_FILE
        from ..runtime.io import Arena, RecordReader

        keys = sorted(index.records)
        self._records = [index.records[key] for key in keys]
        order = list(range(len(self._records)))
        random.Random(0).shuffle(order)
        slot_bytes = index.max_record_bytes
        batch_bytes = min(BATCH_BYTES, int(throttle * WINDOW_S / 4)) if throttle else BATCH_BYTES
        size = max(1, min(batch_bytes // slot_bytes, len(order) // 2))
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        self._batches = [np.sort(np.array(batch, dtype=np.int32)) for batch in batches]
        self._next = 0
        path = index.path / EXPERTS_FILE
        self._granted = read_limit(path) or float("inf")
        self._reader = RecordReader(path, self._records, io=io)
        self._reader.throttle(throttle or 0)
        self.io_note = self._reader.io_note
        self._arena = Arena(2 * size * slot_bytes)
        steps = np.arange(2 * size, dtype=np.uint64) * np.uint64(slot_bytes)
        slots = np.uint64(self._arena.address) + steps
        self._halves = (slots[:size], slots[size:])

    def rate(self) -> float:
        """Bytes per second of the best of some windows, since it is to be a roof, but not more
        than a control group grants, which lets bursts through.

        There is always a batch queued behind the one that is waited for; the first one only warms
        its memory.
        """
        best, num_bytes, begin, num_windows = 0.0, 0, 0.0, 0
        waiting, turn = self._submit(0), 0
        while num_windows < NUM_WINDOWS:
            turn += 1
            following = self._submit(turn)
            for key in waiting:
                self._reader.wait(int(key))
                num_bytes += self._records[key].num_bytes
            waiting = following
            elapsed = time.perf_counter() - begin
            if turn == 1:
                num_bytes, begin = 0, time.perf_counter()
            elif elapsed > WINDOW_S:
                best = max(best, num_bytes / elapsed)
                num_bytes, begin, num_windows = 0, time.perf_counter(), num_windows + 1
        for key in waiting:
            self._reader.wait(int(key))
        return min(best, self._granted)

    def _submit(self, turn: int) -> Any:
        """Queue the next batch; it must not hold a record of the one being read."""
        batch = self._batches[self._next % len(self._batches)]
        self._next += 1
        self._reader.submit(batch, self._halves[turn % 2][: len(batch)])
        return batch

    def close(self) -> None:
        """Close the file and give the memory back."""
        self._reader.close()
        self._arena.close()


def touched_bytes(index: Any, num_tokens: int, kv_bits: int, top_k: int | None = None) -> float:
    """Bytes of weights and KV cache that decoding one token after `num_tokens` goes through.

    `top_k`: experts a token, where it is not the model's own.
    """
    from ..models import parse_config
    from ..runtime.budget import kv_head_bytes
    from ..runtime.headers import read_header
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
        total += (top_k or model.top_k) * sum(records) / num_experts
    heads = model.num_layers * model.num_kv_heads
    per_token = heads * kv_head_bytes(model.head_dim, kv_bits)
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
