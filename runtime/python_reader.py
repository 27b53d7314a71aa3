"""The twin of the core's store: reader threads in Python, same rules, same statuses. Floor 0."""

import ctypes
import errno
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .checksum import crc32c
from .errors import FormatError
from .files import advise, open_raw, read_some
from .format import PAGE_BYTES
from .index import ExpertRecord
from .memory import Arena
from .read_tasks import Read, ReadStats, Request
from .throttle import Throttle

# Status of a record: edgemoe_core.h. Other negative values are -errno.
ABSENT, READING, READY = 0, 1, 2
ERR_CRC, ERR_SHORT, ERR_ARG = -10001, -10002, -10003

# Requests and their order: csrc/read_queue.
DEMAND_BYTES = 16 << 20
GUESS_BYTES = 1 << 20


class PythonReader:
    handle = None
    why_threads = "the reference has no io_uring"

    def __init__(
        self,
        paths: Sequence[Path],
        records: Sequence[ExpertRecord],
        depth: int,
        direct: bool,
        with_threads: bool,  # always
    ) -> None:
        for record in records:
            if record.offset < 0 or record.offset % PAGE_BYTES:
                raise FormatError(f"`{paths[0]}`: a record is not on page boundaries")
        self._records = list(records)
        self._direct = direct
        self.status = np.zeros(len(records), dtype=np.int32)
        self.landed_ns = np.zeros(len(records), dtype=np.int64)
        self._verified = [[False, False] for _ in records]
        self._stats = ReadStats()
        self._throttle, self._num_throttled = Throttle(), 0
        self._files = []
        try:
            for number, path in enumerate(paths):
                self._files.append(file := open_raw(path, direct))
                if not direct:
                    advise(file, 0, 0, "POSIX_FADV_RANDOM")
                    continue
                with Arena(PAGE_BYTES, backend="reference") as page:
                    offset = next((r.offset for r in records if r.file == number), 0)
                    read_some(file, page.view(0, PAGE_BYTES), offset)
        except OSError:
            self._close_files()
            raise
        self._reads: dict[int, Read] = {}  # by key
        self._turn = 0
        self._changed = threading.Condition()
        self._closing = False
        # Daemons: a reader that was never closed must not keep the interpreter from ending.
        self._threads = [
            threading.Thread(target=self._run, name=f"edgemoe-read-{i}", daemon=True)
            for i in range(depth)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, keys: np.ndarray, addresses: np.ndarray, priority: int) -> int:
        with self._changed:
            requests = list(zip(keys.tolist(), addresses.tolist(), strict=True))
            for key, address in requests:
                if not 0 <= key < len(self._records) or not address or address % PAGE_BYTES:
                    return ERR_ARG
                if self.status[key] == READING:
                    return ERR_ARG
            if len({key for key, _ in requests}) != len(requests) or not 0 <= priority < 3:
                return ERR_ARG
            for key, address in requests:
                record = self._records[key]
                down, end = record.layout.down_offset, record.num_bytes
                view = np.frombuffer((ctypes.c_uint8 * end).from_address(address), dtype=np.uint8)
                self._reads[key] = Read(
                    view, [down, end], self._turn, priority, [0, down], [down, end - down]
                )
                self._turn += 1
            self.status[keys] = READING
            self._changed.notify_all()
        return 0

    def promote(self, keys: np.ndarray, priority: int) -> int:
        if not self._are_keys(keys) or not 0 <= priority < 3:
            return ERR_ARG
        with self._changed:
            for key in keys.tolist():
                read = self._reads.get(key)
                if read is not None and priority < read.priority:
                    read.priority, read.turn = priority, self._turn
                    self._turn += 1
                    self._throttle.promote(key, priority, time.monotonic_ns())
        return 0

    def cancel(self, keys: np.ndarray) -> int:
        if not self._are_keys(keys):
            return ERR_ARG
        with self._changed:
            for key in keys.tolist():
                read = self._reads.get(key)
                if read is not None and read.tasks():
                    read.is_cancelled = True
                    if not read.num_in_flight:
                        self._publish(key, ABSENT)
            self._changed.notify_all()
        return 0

    def wait(self, key: int) -> int:
        if not 0 <= key < len(self._records):
            return ERR_ARG
        with self._changed:
            self._changed.wait_for(lambda: self.status[key] != READING)
            return int(self.status[key])

    def pump(self) -> None:
        """Nothing: the reader threads do it."""

    def throttle(self, bytes_per_s: int) -> int:
        if bytes_per_s < 0:
            return ERR_ARG
        with self._changed:
            self._throttle.set_rate(bytes_per_s, time.monotonic_ns())
            self._changed.notify_all()
        return 0

    def stats(self) -> ReadStats:
        with self._changed:
            self._stats.throttle_bytes_per_s = self._throttle.rate
            self._stats.throttle_busy_ns = self._throttle.busy_ns
            return self._stats

    def close(self) -> None:
        self.cancel(np.arange(len(self._records)))
        with self._changed:
            self._closing = True
            self._throttle.set_rate(0, time.monotonic_ns())
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            file.close()

    def _are_keys(self, keys: np.ndarray) -> bool:
        return all(0 <= key < len(self._records) for key in keys.tolist())

    # ---- reader threads: everything but `_read` and the checksum holds the lock ----------------

    def _run(self) -> None:
        while True:
            with self._changed:
                request = None
                while request is None:
                    if self._closing:
                        return
                    request = self._next()
                    if request is None:
                        self._changed.wait()
                read = self._reads[request.key]
                begin, cpu_begin = time.monotonic_ns(), time.thread_time_ns()
                tag = self._pass(request, begin)
            error, num_bytes = self._read(request, read.view)
            cpu_end = time.thread_time_ns()
            with self._changed:
                self._await(tag)
                end = time.monotonic_ns()
                stats = self._stats
                stats.num_requests += 1
                stats.num_bytes += num_bytes
                stats.priority_bytes[request.priority] += num_bytes
                stats.read_ns += end - begin
                stats.cpu_ns += cpu_end - cpu_begin
                read.left[request.section] -= request.num_bytes
                if error:
                    read.fail(error)
                is_whole = not error and not read.left[request.section]
            if is_whole:
                self._check(request, read)
            with self._changed:
                self._settle(request.key, read)
                self._changed.notify_all()

    def _pass(self, request: Request, now: int) -> int:
        """Through the throttle where one is on; returns its tag, 0: none."""
        if not self._throttle.rate:
            return 0
        self._num_throttled += 1
        self._throttle.add(
            self._num_throttled, request.key, request.priority, request.num_bytes, now
        )
        return self._num_throttled

    def _await(self, tag: int) -> None:
        while tag and not self._throttle.take(now := time.monotonic_ns(), tag):
            self._changed.wait((self._throttle.due() - now) * 1e-9)

    def _next(self) -> Request | None:
        tasks = [(*task, key) for key, read in self._reads.items() for task in read.tasks()]
        if not tasks:
            return None
        priority, _, section, key = min(tasks)
        read = self._reads[key]
        begin = read.issued[section]
        limit = DEMAND_BYTES if priority == 0 else GUESS_BYTES
        num_bytes = min(read.ends[section] - begin, limit)
        read.issued[section] += num_bytes
        read.num_in_flight += 1
        return Request(key, section, priority, begin, num_bytes)

    def _read(self, request: Request, view: np.ndarray) -> tuple[int, int]:
        """0 or a negative status, and the bytes read."""
        record = self._records[request.key]
        file, base, done = self._files[record.file], record.offset + request.begin, 0
        part = view[request.begin : request.begin + request.num_bytes]
        while done < request.num_bytes:
            try:
                got = read_some(file, part[done:], base + done)
            except OSError as error:
                return -(error.errno or errno.EIO), done
            if not self._direct:
                advise(file, base + done, got, "POSIX_FADV_DONTNEED")
            done += got
            # A direct read that ends inside a page has met the end of the file.
            if not got or (self._direct and got % PAGE_BYTES):
                break
        return (0 if done == request.num_bytes else ERR_SHORT), done

    def _check(self, request: Request, read: Read) -> None:
        """Compare a section with its checksum, the first time."""
        section, verified = request.section, self._verified[request.key]
        good = verified[section]
        if not good:
            begin = time.thread_time_ns()
            part = read.view[(0, read.ends[0])[section] : read.ends[section]]
            found = crc32c(part, 0, "reference")
            good = found == self._records[request.key].crc32c[section]
            with self._changed:
                self._stats.crc_ns += time.thread_time_ns() - begin
        with self._changed:
            read.is_done[section] = verified[section] = good
            if not good:
                read.fail(ERR_CRC)

    def _settle(self, key: int, read: Read) -> None:
        read.num_in_flight -= 1
        if read.num_in_flight:
            return
        if read.is_cancelled:
            self._publish(key, ABSENT)
        elif read.error:
            self._publish(key, read.error)
        elif all(read.is_done):
            self._publish(key, READY)

    def _publish(self, key: int, status: int) -> None:
        read = self._reads.pop(key)
        if status == ABSENT:
            self._stats.cancelled_bytes += len(read.view) - sum(read.left)
        else:
            self._stats.num_reads += 1
        self.landed_ns[key] = time.monotonic_ns()
        self.status[key] = status
