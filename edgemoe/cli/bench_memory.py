"""Peak memory of a stretch of a run: resident, anonymous, and the model files' page cache.

The kernel's own peak (VmHWM) is exact where it can be reset; the other two are sampled. On systems
without /proc only the resident size is sampled.
"""

import ctypes
import mmap
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

INTERVAL_S = 0.05
CACHE_EVERY = 10  # mincore walks every page of the files: look less often


class PeakMemory:
    """Context manager; read the fields, in bytes, after it."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.rss_bytes = 0
        self.anonymous_bytes: int | None = None
        self.page_cache_bytes: int | None = None
        self._files = files
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._can_reset = _write("/proc/self/clear_refs", "5")
        self._sample(True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample(True)
        if self._can_reset:
            self.rss_bytes = max(self.rss_bytes, _status().get("VmHWM", 0))

    def _watch(self) -> None:
        turn = 0
        while not self._stop.wait(INTERVAL_S):
            turn += 1
            self._sample(turn % CACHE_EVERY == 0)

    def _sample(self, with_cache: bool) -> None:
        status = _status()
        rss = status.get("VmRSS") or self._process.memory_info().rss
        self.rss_bytes = max(self.rss_bytes, rss)
        if "RssAnon" in status:
            self.anonymous_bytes = max(self.anonymous_bytes or 0, status["RssAnon"])
        if with_cache:
            cached = page_cache_bytes(self._files)
            if cached is not None:
                self.page_cache_bytes = max(self.page_cache_bytes or 0, cached)


def page_cache_bytes(files: Sequence[Path]) -> int | None:
    """Bytes of `files` that lie in the page cache; None where the system does not tell."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError, TypeError):
        return None
    total = 0
    for path in files:
        try:
            with open(path, "rb") as file:
                num_bytes = file.seek(0, 2)
                if not num_bytes:
                    continue
                # A private mapping, since ctypes asks for a writable buffer; nothing is touched.
                with mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_COPY) as view:
                    pages = (ctypes.c_ubyte * -(-num_bytes // mmap.PAGESIZE))()
                    start = ctypes.c_char.from_buffer(view)
                    failed = mincore(
                        ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(num_bytes), pages
                    )
                    del start
                    if failed:
                        return None
                    total += bytes(pages).translate(_LOW_BIT).count(1) * mmap.PAGESIZE
        except OSError:
            return None
    return total


_LOW_BIT = bytes(value & 1 for value in range(256))


def _status() -> dict[str, int]:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    fields = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in fields}


def _write(path: str, text: str) -> bool:
    try:
        Path(path).write_text(text)
    except OSError:
        return False
    return True
