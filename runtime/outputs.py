"""Files that are written whole or not at all. Floor 0."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import EdgeMoeError, NotFoundError


def need_place(path: str | Path, makes_folder: bool = False) -> None:
    """Before long work whose result goes to `path`: raise where it could not be written.

    `makes_folder`: a missing folder is made, if the one around it is there.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise EdgeMoeError(f"`{path}` cannot be written", "it is a folder", "name a file")
    folder = path.parent
    if makes_folder and not folder.is_dir():
        folder = folder.parent
    if not folder.is_dir():
        raise NotFoundError(
            f"`{path}` cannot be written", "its folder is not there", "make it, or name another"
        )
    if not os.access(folder, os.W_OK):
        raise EdgeMoeError(
            f"`{path}` cannot be written", f"`{folder}` is read-only", "name another folder"
        )


@contextmanager
def replacing(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A temporary file beside `path`, of the same ending, for the block to write. At its end the
    file becomes `path`; after an error it is removed, and an OSError names `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, document: Any) -> None:
    """Write `document` as indented JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
