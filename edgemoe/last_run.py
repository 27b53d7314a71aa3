"""Which expert records were in memory when an engine was closed, for the next one. Floor 3.

One small JSON file per store in the user's cache folder, `edgemoe/last-run/ID.json`: `format`,
`version`, `num_records` and `resident`, a bit for each record in (layer, expert) order, base64. It
may be deleted at any time; what does not belong to the store is not used.
"""

import base64
import binascii
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .runtime.errors import FormatError
from .runtime.index import EXPERTS_FILE, StoreIndex
from .runtime.outputs import replacing

_FORMAT, _VERSION = "edgemoe-last-run", 1
_MAX_BYTES = 1 << 20


def cache_folder() -> Path:
    """The user's folder for files that may be lost: XDG_CACHE_HOME, LOCALAPPDATA or Caches."""
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "edgemoe"


def last_run_path(index: StoreIndex) -> Path | None:
    """Where the state of this store is kept; None for a store that does not say what it holds."""
    name = index.sha256.get(EXPERTS_FILE)
    return cache_folder() / "last-run" / f"{name[:32]}.json" if name else None


def save_last_run(index: StoreIndex, resident: NDArray[np.bool_]) -> None:
    """Keep which records are in memory, bool [num_records]: to a temporary name, then renamed.
    A folder that cannot be written to is no error: the next start is then a cold one."""
    path = last_run_path(index)
    if path is None:
        return
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "num_records": len(resident),
        "resident": base64.b64encode(np.packbits(resident).tobytes()).decode(),
    }
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=False) as temporary:
            temporary.write_text(json.dumps(document), encoding="ascii")


def load_last_run(index: StoreIndex) -> NDArray[np.bool_] | None:
    """Which records were in memory, or None where nothing was kept. Raises FormatError."""
    path = last_run_path(index)
    if path is None or not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        document = json.loads(path.read_text(encoding="ascii"))
        if (document["format"], document["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"{document['format']} {document['version']}")
        if document["num_records"] != len(index.records):
            raise ValueError(f"{document['num_records']} records")
        data = base64.b64decode(document["resident"], validate=True)
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=len(index.records))
        if len(data) != -(-len(index.records) // 8):
            raise ValueError(f"{len(data)} bytes of bits")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise FormatError(f"`{path}` is damaged", str(error), "delete it") from error
    return bits.astype(np.bool_)
