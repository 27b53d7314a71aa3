"""Reads expert records and trunk tensors without filling the page cache. Floor 0.

Records: the core's reader threads, or their Python twin (`backend="reference"`).
"""

import ctypes
import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import core
from .errors import EdgeMoeError, FormatError, NotFoundError, UsageError
from .files import drop_page_cache, read_trunk_tensor
from .index import ExpertRecord
from .memory import Arena
from .python_reader import (
    ABSENT,
    ERR_ARG,
    ERR_CRC,
    ERR_SHORT,
    READING,
    READY,
    PythonReader,
    ReadStats,
)

__all__ = [
    "ABSENT",
    "DEFAULT_DEPTH",
    "DEMAND",
    "ERR_ARG",
    "ERR_CRC",
    "ERR_SHORT",
    "IO_MODES",
    "METHODS",
    "NEXT_LAYER",
    "READING",
    "READY",
    "SPECULATION",
    "Arena",
    "RecordReader",
    "drop_page_cache",
    "failure_text",
    "read_trunk_tensor",
]

DEMAND, NEXT_LAYER, SPECULATION = 0, 1, 2  # priorities
IO_MODES = ("auto", "direct", "buffered")  # the order is em_store_open's numbering
METHODS = ("auto", "io_uring", "threads")  # how direct reads are made
# Two records: the drive reads on while nobody looks, and one late request costs less. io_uring on
# two busy cores at depth 1, 2, 3, 4: .46, .74, .90, 1.02 GB/s.
DEFAULT_DEPTH = 4


def failure_text(status: int) -> str:
    """What a negative status means, in words."""
    if status == ERR_CRC:
        return "checksum mismatch"
    if status == ERR_SHORT:
        return "short file: it ends inside the record"
    if status == ERR_ARG:
        return "refused: unknown key, unaligned memory, or a read in flight"
    return f"read error: {os.strerror(-status)} (errno {-status})"


class RecordReader:
    """Reads whole records of one `experts.safetensors` into 4096-aligned memory, asynchronously.

    `more_paths`: the files 1, 2, ... that records may lie in instead. A key is a record's position
    in `records`. `status` [num_records] int32 holds ABSENT, READING, READY or a negative failure;
    the caller writes ABSENT when it gives a record's memory away, never while READING. `landed_ns`
    [num_records] int64 is the monotonic time when the last read of each record ended. Both are
    views of the core's memory, not to be used after `close`.

    `depth`: requests being read at a time. Direct reads go through io_uring where it is allowed,
    else through `depth` reader threads; `io_note` says which, and why. With io_uring nothing moves
    on its own: `submit`, `wait` and `pump` take note of what has landed and start what is queued.

    Raises NotFoundError, FormatError for records that cannot be, UsageError where `io="direct"` or
    `method="io_uring"` is refused, EdgeMoeError for other failures to open.
    """

    def __init__(
        self,
        path: str | Path,
        records: Sequence[ExpertRecord],
        depth: int = DEFAULT_DEPTH,
        io: str = "auto",
        backend: str | None = None,
        method: str = "auto",
        more_paths: Sequence[Path] = (),
    ) -> None:
        if io not in IO_MODES:
            raise UsageError(f"unknown io `{io}`", f"expected one of {', '.join(IO_MODES)}")
        if method not in METHODS:
            raise UsageError(f"unknown method `{method}`", f"expected {', '.join(METHODS)}")
        if not 1 <= depth <= 256:
            raise UsageError(f"expected 1 to 256 reads at a time, got {depth}")
        self.path, self.backend = Path(path), backend or core.BACKEND
        paths = [self.path, *more_paths]
        why_buffered = "as asked"
        make = _NativeReader if self.backend == "native" else PythonReader
        attempts = {"auto": (True, False), "direct": (True,), "buffered": (False,)}[io]
        for direct in attempts:
            try:
                self._reader = make(paths, records, depth, direct, method == "threads")
                break
            except OSError as error:
                if direct and error.errno not in (errno.ENOENT, errno.EACCES, errno.EPERM):
                    why_buffered = f"direct I/O refused ({os.strerror(error.errno)})"
                    if len(attempts) > 1:
                        continue
                    raise UsageError(
                        f"`{self.path}` cannot be read with direct I/O",
                        os.strerror(error.errno),
                        "use --io auto",
                    ) from error
                raise _open_error(self.path, error) from error
        self.is_direct: bool = direct
        why_threads = self._reader.why_threads  # None: io_uring
        if not direct:
            self.io_note = f"buffered, reader threads: {why_buffered}"
        elif why_threads is not None:
            self.io_note = f"direct, reader threads: {why_threads}"
        else:
            self.io_note = "direct, io_uring"
        if method == "io_uring" and why_threads is not None:
            self._reader.close()
            raise UsageError(
                f"`{self.path}` cannot be read with io_uring",
                why_threads if direct else why_buffered,
            )
        self.submit_s = 0.0  # in the reader's `submit`, where io_uring asks the system to read
        self.status: np.ndarray = self._reader.status
        self.landed_ns: np.ndarray = self._reader.landed_ns
        self.handle: int | None = self._reader.handle

    def submit(self, keys: np.ndarray, addresses: np.ndarray, priority: int = DEMAND) -> None:
        """Queue reads of records `keys` [n] int32 to `addresses` [n] uint64, most urgent first.

        A lower `priority` goes first; one above DEMAND is read in small requests. All or nothing:
        raises UsageError for an unknown key, an address that is not a multiple of 4096, or a record
        that is being read.
        """
        keys = np.ascontiguousarray(keys, dtype=np.int32)
        addresses = np.ascontiguousarray(addresses, dtype=np.uint64)
        if keys.ndim != 1 or keys.shape != addresses.shape:
            raise UsageError(f"{keys.shape} keys do not go with {addresses.shape} addresses")
        start = time.perf_counter()
        status = self._reader.submit(keys, addresses, priority)
        self.submit_s += time.perf_counter() - start
        _expect(status)

    def promote(self, keys: np.ndarray, priority: int = DEMAND) -> None:
        """Make queued reads more urgent; nothing to records that are as urgent or not being read.

        Raises UsageError for an unknown key or priority.
        """
        _expect(self._reader.promote(np.ascontiguousarray(keys, dtype=np.int32), priority))

    def cancel(self, keys: np.ndarray) -> None:
        """Do not read what was not yet asked of the system.

        A status becomes ABSENT when the memory may be used again: at once, or when requests under
        way have ended. Records of which everything is under way, or that are not being read, stay
        as they are. Raises UsageError for an unknown key.
        """
        _expect(self._reader.cancel(np.ascontiguousarray(keys, dtype=np.int32)))

    def wait(self, key: int) -> int:
        """Block until record `key` is not being read; returns its status."""
        return self._reader.wait(key)

    def pump(self) -> None:
        """Bring `status` up to date and start queued reads, without blocking."""
        self._reader.pump()

    def throttle(self, bytes_per_s: int) -> None:
        """Emulate a drive of this rate from now on, 0: none any more. It serves one request at a
        time, of those under way the most urgent next. Raises UsageError for a negative rate."""
        _expect(self._reader.throttle(bytes_per_s))

    def stats(self) -> dict[str, Any]:
        """num_reads (records), num_requests, num_bytes, cancelled_bytes (read in vain),
        priority_bytes [3], read_s (sum over requests), cpu_s (reading), crc_s (CPU of checking),
        throttle_bytes_per_s (0: none) and throttle_busy_s, for which the emulated drive served;
        idle_s, in which nothing was queued or being read (the core's reader)."""
        stats = self._reader.stats()
        return {
            "num_reads": stats.num_reads,
            "num_requests": stats.num_requests,
            "num_bytes": stats.num_bytes,
            "cancelled_bytes": stats.cancelled_bytes,
            "priority_bytes": list(stats.priority_bytes),
            "read_s": stats.read_ns * 1e-9,
            "cpu_s": stats.cpu_ns * 1e-9,
            "crc_s": stats.crc_ns * 1e-9,
            "throttle_bytes_per_s": stats.throttle_bytes_per_s,
            "throttle_busy_s": stats.throttle_busy_ns * 1e-9,
            "idle_s": stats.idle_ns * 1e-9,
        }

    def close(self) -> None:
        """Wait for reads in flight, forget queued ones, close the file."""
        if self._reader is not None:
            self.status = np.where(self.status == READING, np.int32(ABSENT), self.status)
            self.landed_ns = self.landed_ns.copy()
            self._reader.close()
            self._reader = self.handle = None

    def __enter__(self) -> "RecordReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_reader", None) is not None:
            self.close()


def _expect(status: int) -> None:
    if status:
        raise UsageError("a read was refused", failure_text(status))


def _open_error(path: Path, error: OSError) -> EdgeMoeError:
    if error.errno == errno.ENOENT:
        return NotFoundError(
            f"no file `{path}`", "it was there when the store was opened, or never"
        )
    return EdgeMoeError(f"cannot open `{path}`", os.strerror(error.errno or errno.EIO))


class _NativeReader:
    def __init__(
        self,
        paths: Sequence[Path],
        records: Sequence[ExpertRecord],
        depth: int,
        direct: bool,
        with_threads: bool,
    ) -> None:
        table = (core.Record * max(len(records), 1))()
        for row, record in zip(table, records, strict=False):
            row.describe(record.layout)
            row.offset, row.file = record.offset, record.file
            row.crc_gate_up, row.crc_down = record.crc32c
        error = ctypes.c_int32()
        mode = IO_MODES.index("direct" if direct else "buffered")
        names = (ctypes.c_char_p * len(paths))(*map(os.fsencode, paths))
        self.handle: int = core.lib.em_store_open_files(
            names, len(paths), table, len(records), depth, mode, with_threads, error
        )
        if not self.handle:
            if error.value == ERR_ARG:
                raise FormatError(f"`{paths[0]}`: a record is not on page boundaries")
            raise OSError(-error.value, os.strerror(-error.value))
        uring = core.lib.em_store_uring(self.handle)
        self.why_threads = None if uring == 1 else "as asked"
        if uring < 0:
            self.why_threads = f"io_uring refused ({os.strerror(-uring)})"
        status = core.lib.em_store_status(self.handle)
        landed = core.lib.em_store_landed_ns(self.handle)
        self.status = np.ctypeslib.as_array(status, shape=(len(records),))
        self.landed_ns = np.ctypeslib.as_array(landed, shape=(len(records),))

    def submit(self, keys: np.ndarray, addresses: np.ndarray, priority: int) -> int:
        return core.lib.em_store_submit(
            self.handle, keys.size, keys.ctypes.data, addresses.ctypes.data, priority
        )

    def promote(self, keys: np.ndarray, priority: int) -> int:
        return core.lib.em_store_promote(self.handle, keys.size, keys.ctypes.data, priority)

    def cancel(self, keys: np.ndarray) -> int:
        return core.lib.em_store_cancel(self.handle, keys.size, keys.ctypes.data)

    def wait(self, key: int) -> int:
        return core.lib.em_store_wait(self.handle, key)

    def pump(self) -> None:
        core.lib.em_store_pump(self.handle)

    def throttle(self, bytes_per_s: int) -> int:
        return core.lib.em_store_throttle(self.handle, bytes_per_s)

    def stats(self) -> ReadStats:
        stats = core.StoreStats()
        core.lib.em_store_get_stats(self.handle, stats)
        return ReadStats(**{name: getattr(stats, name) for name, _ in core.StoreStats._fields_})

    def close(self) -> None:
        core.lib.em_store_close(self.handle)
