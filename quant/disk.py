"""Large files written to a disk that may be full, and past the page cache."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from ..runtime.amounts import format_bytes
from ..runtime.errors import BudgetError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputFile:
    """Appends to one file; keeps the bytes it has written out of the page cache."""

    sync_every_bytes = 64 << 20

    def __init__(self, path: Path, header: bytes, num_bytes: int) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(path, flags, 0o666)
        self._position = self._synced = 0
        if num_bytes:
            self._position = self._synced = len(header) + num_bytes
            os.ftruncate(self._descriptor, self._position)
            os.lseek(self._descriptor, self._position, os.SEEK_SET)
        else:
            os.ftruncate(self._descriptor, 0)
            self.write(header)

    def write(self, data: Any) -> None:
        """Append a bytes-like object; a full disk raises BudgetError."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.write(self._descriptor, view[done : done + self.sync_every_bytes])
                if self._position + done - self._synced >= self.sync_every_bytes:
                    self._drop(self._position + done)
        except OSError as error:
            raise write_error(error, self.path) from error
        self._position += len(view)

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        try:
            self._drop(self._position)
        except OSError as error:
            raise write_error(error, self.path) from error

    def _drop(self, end: int) -> None:
        # Only clean pages can be dropped, so the sync is what bounds the page cache.
        getattr(os, "fdatasync", os.fsync)(self._descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, end, os.POSIX_FADV_DONTNEED)
        self._synced = end

    def close(self) -> None:
        os.close(self._descriptor)


def need_room(
    folder: Path,
    num_bytes: int,
    what: str = "the store",
    next_step: str = "free some space, or choose another --out",
) -> None:
    """BudgetError where the disk of `folder` has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise BudgetError(
            f"the disk of `{folder}` is too small",
            f"{what} needs {format_bytes(num_bytes)} more, {format_bytes(free)} are free",
            next_step,
        )


def write_error(error: OSError, path: Path) -> Exception:
    """A full disk in words; any other error as it came."""
    if error.errno not in DISK_FULL:
        return error
    return BudgetError(
        f"the disk is full while writing `{path.name}`",
        os.strerror(error.errno or 0),
        "free some space and run the same command again: it goes on where it stopped",
    )


def sync_folder(path: Path) -> None:
    """Make renames in `path` durable, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
