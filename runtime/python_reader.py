"""The twin of the core's store: reader threads in Python, same rules, same statuses. Floor 0."""

import ctypes
import errno
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .checksum import crc32c
from .errors import FormatError
from .files import advise, open_raw, read_some
from .format import PAGE_BYTES
from .index import ExpertRecord
from .memory import Arena

# Status of a record: edgemoe_core.h. Other negative values are -errno.
ABSENT, READING, READY = 0, 1, 2
ERR_CRC, ERR_SHORT, ERR_ARG = -10001, -10002, -10003


class PythonReader:
    handle = None

    def __init__(
        self, path: Path, records: Sequence[ExpertRecord], num_threads: int, direct: bool
    ) -> None:
        for record in records:
            if record.offset < 0 or record.offset % PAGE_BYTES:
                raise FormatError(f"`{path}`: a record is not on page boundaries")
        self._records = list(records)
        self._direct = direct
        self.status = np.zeros(len(records), dtype=np.int32)
        self._verified = [False] * len(records)
        self._num_reads = self._num_bytes = self._read_ns = self._cpu_ns = 0
        self._file = open_raw(path, direct)
        try:
            if direct:
                with Arena(PAGE_BYTES, backend="reference") as page:
                    offset = records[0].offset if records else 0
                    read_some(self._file, page.view(0, PAGE_BYTES), offset)
        except OSError:
            self._file.close()
            raise
        if not direct:
            advise(self._file, 0, 0, "POSIX_FADV_RANDOM")
        self._queue: deque[tuple[int, int]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        # Daemons: a reader that was never closed must not keep the interpreter from ending.
        self._threads = [
            threading.Thread(target=self._run, name=f"edgemoe-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, keys: np.ndarray, addresses: np.ndarray) -> int:
        with self._changed:
            requests = list(zip(keys.tolist(), addresses.tolist(), strict=True))
            for key, address in requests:
                if not 0 <= key < len(self._records) or not address or address % PAGE_BYTES:
                    return ERR_ARG
                if self.status[key] == READING:
                    return ERR_ARG
            if len({key for key, _ in requests}) != len(requests):
                return ERR_ARG
            self.status[keys] = READING
            self._queue.extend(requests)
            self._changed.notify_all()
        return 0

    def wait(self, key: int) -> int:
        if not 0 <= key < len(self._records):
            return ERR_ARG
        with self._changed:
            self._changed.wait_for(lambda: self.status[key] != READING)
            return int(self.status[key])

    def stats(self) -> tuple[int, int, int, int]:
        with self._changed:
            return self._num_reads, self._num_bytes, self._read_ns, self._cpu_ns

    def close(self) -> None:
        with self._changed:
            self._closing = True
            for key, _ in self._queue:
                self.status[key] = ABSENT
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._file.close()

    def _run(self) -> None:

        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._queue)
                if self._closing:
                    return
                key, address = self._queue.popleft()
            record = self._records[key]
            memory = (ctypes.c_uint8 * record.num_bytes).from_address(address)
            view = np.frombuffer(memory, dtype=np.uint8)
            begin, cpu_begin = time.monotonic_ns(), time.thread_time_ns()
            status, done = self._read(record, view)
            read_ns = time.monotonic_ns() - begin
            if status == READY and not self._verified[key]:
                down = record.layout.down_offset
                found = tuple(crc32c(part, 0, "reference") for part in (view[:down], view[down:]))
                self._verified[key] = found == record.crc32c
                status = READY if self._verified[key] else ERR_CRC
            with self._changed:
                self._num_reads += 1
                self._num_bytes += done
                self._read_ns += read_ns
                self._cpu_ns += time.thread_time_ns() - cpu_begin
                self.status[key] = status
                self._changed.notify_all()

    def _read(self, record: ExpertRecord, view: np.ndarray) -> tuple[int, int]:
        done = 0
        while done < record.num_bytes:
            offset = record.offset + done
            try:
                got = read_some(self._file, view[done:], offset)
            except OSError as error:
                return -(error.errno or errno.EIO), done
            if not self._direct:
                advise(self._file, offset, got, "POSIX_FADV_DONTNEED")
            done += got
            # A direct read that ends inside a page has met the end of the file.
            if not got or (self._direct and got % PAGE_BYTES):
                break
        return (READY if done == record.num_bytes else ERR_SHORT), done
