"""Reads a written store back and compares checksums, before it gets its name."""

import hashlib
import os
from pathlib import Path

import numpy as np

from ..runtime.checksum import crc32c
from ..runtime.errors import RecordError
from ..runtime.index import EXPERTS_FILE, ExpertRecord
from .progress import Progress

_BLOCK_BYTES = 16 << 20
_MAX_CACHED_BYTES = 64 << 20  # of page cache


def check_experts(
    path: Path,
    expected: bytes,
    records: dict[tuple[int, int], ExpertRecord],
    progress: Progress,
) -> str:
    """The sha256 of experts.safetensors; RecordError where the disk gives back other bytes."""
    digest = hashlib.sha256()
    unforgotten = 0
    with open(path / EXPERTS_FILE, "rb", buffering=0) as file:
        header = file.read(len(expected))
        digest.update(header)
        progress.advance(len(header))
        for (layer, expert), record in records.items():
            data = np.empty(record.num_bytes, np.uint8)
            view, done = memoryview(data), 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise RecordError(layer, expert, f"`{EXPERTS_FILE}` ends inside it")
                done += count
            middle = record.layout.down_offset
            found = crc32c(data[:middle]), crc32c(data[middle:])
            if header != expected or found != record.crc32c:
                raise RecordError(
                    layer,
                    expert,
                    "what was written and what was read back differ",
                    f"check the disk, then start anew after: rm -r {path}",
                )
            digest.update(data)
            unforgotten += len(view)
            if unforgotten >= _MAX_CACHED_BYTES:
                _forget(file.fileno())
                unforgotten = 0
            progress.advance(len(view))
        _forget(file.fileno())
    return digest.hexdigest()


def sha256_of(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            progress.advance(len(block))
        _forget(file.fileno())
    return digest.hexdigest()


def _forget(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
