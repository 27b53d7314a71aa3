"""The folder a conversion writes into, and the journal that lets it go on after any interruption.

`NAME.edgemoe.partial/` lies beside the target. `journal.json` in it says what was asked for (the
fingerprint) and what is on disk for certain: a layer enters the journal only after its bytes were
synced. There is no store.json before the last step, so an unfinished folder never opens as a store.
One process at a time: the folder itself is locked, and the lock dies with the process.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runtime.errors import CheckpointError, FormatError, NotFoundError, UsageError
from .disk import OutputFile, sync_folder, write_error
from .progress import Progress

try:
    import fcntl
except ImportError:  # Windows: two conversions into one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

JOURNAL_FILE = "journal.json"

Crcs = list[tuple[int, int]]


def partial_path(target: Path) -> Path:
    """Where a store is written before it has its name."""
    return target.with_name(target.name + ".partial")


def check_target(target: Path) -> None:
    """Raise where `target` exists, or the folder it shall lie in does not."""
    if target.exists() or target.is_symlink():
        raise UsageError(
            f"`{target}` already exists",
            "a conversion never overwrites",
            "choose another --out, or remove it first",
        )
    if not target.parent.is_dir():
        raise NotFoundError(
            f"no folder `{target.parent}`",
            f"`{target.name}` was to be made in it",
            "make it first, or choose another --out",
        )


@contextmanager
def kept_for_later(partial: "Partial", progress: Progress) -> Iterator[None]:
    """What every writer of a store does at its end: what was written stays for the next run, unless
    the input is damaged, with which that could do no better."""
    try:
        yield
    except CheckpointError:
        partial.discard()
        raise
    except OSError as error:
        raise write_error(error, partial.path) from error
    except KeyboardInterrupt:
        progress.note("stopped; the same command goes on where it was")
        raise
    finally:
        partial.close()


class Partial:
    """An open, locked partial folder and its journal. Use `open`, then `publish` or `discard`."""

    def __init__(self, target: Path, lock: int | None, wanted: dict[str, Any]) -> None:
        self.target, self.path = target, partial_path(target)
        self._lock = lock
        self._fingerprint = wanted
        self.layer_to_crcs: dict[int, Crcs] = {}
        self.num_trunk_tensors = 0

    @classmethod
    def open(cls, target: Path, wanted: dict[str, Any]) -> "Partial":
        """Make the folder or take up one that an equal conversion left.

        Raises UsageError where another process writes it or another conversion left it.
        """
        path = partial_path(target)
        path.mkdir(exist_ok=True)
        partial = cls(target, _lock(path), wanted)
        try:
            check_target(target)  # once more: another process may have finished in between
            partial._load()
        except BaseException:
            partial.close()
            raise
        return partial

    def _load(self) -> None:
        journal = self.path / JOURNAL_FILE
        if not journal.exists():
            strangers = [name for name in os.listdir(self.path) if name != JOURNAL_FILE + ".tmp"]
            if strangers:
                raise self._refuse(f"it holds `{strangers[0]}` but no `{JOURNAL_FILE}`")
            self.save()
            return
        try:
            document = json.loads(journal.read_text(encoding="utf-8"))
            found = document["fingerprint"]
            layers = {
                int(layer): [(int(first), int(second)) for first, second in crcs]
                for layer, crcs in document["layers"].items()
            }
            num_trunk_tensors = int(document["num_trunk_tensors"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._refuse(f"its `{JOURNAL_FILE}` does not parse") from error
        if found != json.loads(json.dumps(self._fingerprint)):
            raise self._refuse(_difference(found, self._fingerprint))
        self.layer_to_crcs, self.num_trunk_tensors = layers, num_trunk_tensors

    def _refuse(self, why: str) -> UsageError:
        return UsageError(
            f"`{self.path}` is not from this conversion",
            why,
            f"repeat the conversion it came from, or start anew after: rm -r {self.path}",
        )

    def save(self) -> None:
        """Write the journal: temporary name, synced, renamed."""
        document = {
            "fingerprint": self._fingerprint,
            "layers": {str(layer): crcs for layer, crcs in self.layer_to_crcs.items()},
            "num_trunk_tensors": self.num_trunk_tensors,
        }
        journal = self.path / JOURNAL_FILE
        temporary = journal.with_suffix(".json.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, journal)
        sync_folder(self.path)

    def open_file(self, name: str, header: bytes, num_bytes: int) -> "OutputFile":
        """The file `name`, cut to `header` and the `num_bytes` of data the journal vouches for."""
        path = self.path / name
        size = path.stat().st_size if path.exists() else 0
        if num_bytes and size < len(header) + num_bytes:
            raise FormatError(
                f"`{path}` is shorter than its journal says",
                f"expected at least {len(header) + num_bytes} bytes, got {size}",
                f"start anew after: rm -r {self.path}",
            )
        return OutputFile(path, header, num_bytes)

    def publish(self) -> None:
        """Give the finished store its name. The journal goes last: till then the work is known."""
        sync_folder(self.path)
        os.rename(self.path, self.target)
        sync_folder(self.target.parent)
        (self.target / JOURNAL_FILE).unlink()
        self.close()

    def discard(self) -> None:
        """Remove everything written."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def finish_published(target: Path, wanted: dict[str, Any]) -> bool:
    """Whether `target` is this very conversion, interrupted between its name and its last step."""
    journal = target / JOURNAL_FILE
    try:
        found = json.loads(journal.read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if found != json.loads(json.dumps(wanted)):
        return False
    journal.unlink()
    return True


def _lock(path: Path) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return None  # a file system without locks
        raise UsageError(
            f"`{path}` is being written", "another conversion is running", "wait for it to end"
        ) from None
    return descriptor


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    keys = found if isinstance(found, dict) else {}
    before, now = keys.get("options"), wanted["options"]
    if before != now:
        before = before if isinstance(before, dict) else {}
        changed = [
            f"{name} {before.get(name)}, now {now[name]}"
            for name in now
            if before.get(name) != now[name]
        ]
        return "it was made with other options: " + "; ".join(changed)
    if keys.get("writer_version") != wanted["writer_version"]:
        return "it was made by another version of edgemoe"
    return "the checkpoint has changed since"
