"""Positioned reads of files, direct or buffered, that leave nothing in the page cache. Floor 0."""

import errno
import os
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import FormatError
from .headers import TensorEntry
from .memory import Pile, aligned_memory

_BLOCK_BYTES = 8 << 20  # buffered reads drop their pages after so many bytes


def read_trunk_tensor(file: BinaryIO, entry: TensorEntry, pile: Pile | None = None) -> np.ndarray:
    """The bytes of one tensor, u8 [num_bytes], 64-byte aligned; leaves none in the page cache.

    Where a pile is given, they lie in it. Raises FormatError where the file ends too early or
    cannot be read.
    """
    data = pile.take(entry.num_bytes) if pile else aligned_memory(entry.num_bytes)
    done = 0
    while done < entry.num_bytes:
        offset = entry.offset + done
        try:
            got = read_some(file, data[done : done + _BLOCK_BYTES], offset)
        except OSError as error:
            raise FormatError(
                f"`{file.name}` cannot be read", os.strerror(error.errno or errno.EIO)
            ) from error
        if not got:
            raise FormatError(
                f"`{file.name}` is truncated",
                f"expected {entry.offset + entry.num_bytes} bytes, got {offset}",
            )
        advise(file, offset, got, "POSIX_FADV_DONTNEED")
        done += got
    return data


def drop_page_cache(path: str | Path) -> None:
    """Ask the system to forget a file's clean pages; nothing where it has no such call."""
    with open(path, "rb", buffering=0) as file:
        advise(file, 0, 0, "POSIX_FADV_DONTNEED")


def open_raw(path: Path, direct: bool) -> BinaryIO:
    """Open for `read_some`. Direct: offset, length and memory are multiples of 4096."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if direct and sys.platform != "darwin":
        if not hasattr(os, "O_DIRECT"):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        flags |= os.O_DIRECT
    file = os.fdopen(os.open(path, flags), "rb", buffering=0)
    if direct and sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(file.fileno(), fcntl.F_NOCACHE, 1)
    return file


_seek_lock = threading.Lock()


def read_some(file: BinaryIO, view: np.ndarray, offset: int) -> int:
    """One read at `offset`; bytes read, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [memoryview(view)], offset)
    with _seek_lock:  # systems without positioned reads share one position
        os.lseek(file.fileno(), offset, os.SEEK_SET)
        data = os.read(file.fileno(), view.size)
    view[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    return len(data)


def advise(file: BinaryIO, offset: int, num_bytes: int, advice: str) -> None:
    """posix_fadvise where there is one; `num_bytes` 0 means to the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, num_bytes, getattr(os, advice))
