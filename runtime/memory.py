"""Memory for expert records and for the trunk. Floor 0."""

import contextlib
import ctypes
import mmap
import sys

import numpy as np

from . import core
from .errors import EdgeMoeError, UsageError
from .format import LINE_BYTES

HUGE_PAGE_BYTES = 2 << 20


class Arena:
    """`num_bytes` of 2 MiB-aligned memory on huge pages where the system has them, not touched.

    Memory lives until `close` was called and the last view is gone. Raises EdgeMoeError where the
    system has no such memory.
    """

    def __init__(self, num_bytes: int, backend: str | None = None) -> None:
        if num_bytes < 1:
            raise UsageError(f"expected an arena of at least one byte, got {num_bytes}")
        self.num_bytes = num_bytes
        try:
            if (backend or core.BACKEND) == "native":
                self._memory: np.ndarray | None = np.asarray(_NativeMemory(num_bytes))
            else:
                self._memory = _map_memory(num_bytes)
        except (MemoryError, OSError, OverflowError) as error:
            raise EdgeMoeError(
                f"no memory for an arena of {num_bytes} bytes", str(error), "lower --memory"
            ) from error
        self.address = int(self._memory.ctypes.data)

    def view(self, offset: int, num_bytes: int) -> np.ndarray:
        """Bytes `offset` .. `offset + num_bytes`, u8 [num_bytes]."""
        if self._memory is None or offset < 0 or num_bytes < 0:
            raise UsageError("an arena was used after its end or outside its bytes")
        if offset + num_bytes > self.num_bytes:
            raise UsageError(f"an arena of {self.num_bytes} bytes has no byte {offset + num_bytes}")
        return self._memory[offset : offset + num_bytes]

    def discard(self, offset: int, num_bytes: int) -> None:
        """Give whole pages back to the system; their bytes read as zeros afterwards.

        Does nothing where the system has no such call; the memory is then merely unused.
        """
        page = mmap.PAGESIZE
        start = -(-(self.address + offset) // page) * page
        end = (self.address + offset + self.view(offset, num_bytes).size) // page * page
        if sys.platform == "linux" and end > start:
            madvise = ctypes.CDLL(None, use_errno=True).madvise
            madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            madvise(start, end - start, mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._memory = None

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def aligned_memory(num_bytes: int) -> np.ndarray:
    """u8 [num_bytes], 64-byte aligned, not cleared."""
    room = np.empty(num_bytes + LINE_BYTES, dtype=np.uint8)
    start = -room.ctypes.data % LINE_BYTES
    return room[start : start + num_bytes]


class Pile:
    """Memory for matrices that stay, on huge pages where the system has them.

    A token reads the whole trunk once: on 4 KiB pages the processor's prefetch stops at every page
    and most pages miss its table of addresses. Matrices lie one after the other in few arenas, of
    which only what is written takes memory; small ones lie elsewhere, since a huge page for each
    model of a few MB would be much.
    """

    def __init__(self, backend: str | None = None, arena_bytes: int = 256 << 20) -> None:
        self._backend = backend
        self._arena_bytes = arena_bytes
        self._arena: Arena | None = None
        self._used = 0

    def take(self, num_bytes: int) -> np.ndarray:
        """u8 [num_bytes], 64-byte aligned, not cleared; stays until the last view is gone."""
        if num_bytes < HUGE_PAGE_BYTES:
            return aligned_memory(num_bytes)
        if self._arena is None or self._used + num_bytes > self._arena.num_bytes:
            self._arena = Arena(max(num_bytes, self._arena_bytes), self._backend)
            self._used = 0
        first, end = self._used, self._used + num_bytes
        self._used = -(-end // LINE_BYTES) * LINE_BYTES
        return self._arena.view(first, num_bytes)


class _NativeMemory:
    """Owns memory of the core as long as an array looks at it."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._address = core.lib.em_arena_create(num_bytes)
        if not self._address:
            raise MemoryError("the system refused it")
        self.__array_interface__ = {
            "version": 3,
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self._address, False),
        }

    def __del__(self) -> None:
        if self._address:
            core.lib.em_arena_destroy(self._address, self._num_bytes)


def _map_memory(num_bytes: int) -> np.ndarray:
    room = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            room.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(room, dtype=np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE_BYTES
    return memory[start : start + num_bytes]
