"""Conversions that are killed, starved or measured: run by test_resume.py as a program of its own.

A process is killed in a fork, so that the imports are paid for once. Prints one JSON document.
"""

import ctypes
import filecmp
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from edgemoe.quant.checkpoint import Checkpoint
from edgemoe.quant.convert import convert
from edgemoe.quant.journal import JOURNAL_FILE, partial_path
from edgemoe.quant.options import ConvertOptions
from edgemoe.runtime.errors import EdgeMoeError
from edgemoe.runtime.index import load_index

EVENTS = ("write", "fsync", "fdatasync", "ftruncate", "replace", "rename", "unlink", "mkdir")


def in_fork(work: Callable[[], None], kill_after_s: float | None = None) -> int:
    """Run `work` in a child; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def die_at(event: int, log: Path) -> None:
    """SIGKILL this process at its n-th change of the disk, in the middle of it if it is a write.

    The number of changes is written to `log` when there are fewer.
    """
    count = 0

    def wrap(name: str, original: Callable) -> Callable:
        def changed(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == event:
                if name == "write":
                    original(args[0], memoryview(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            log.write_text(str(count))
            return original(*args, **kwargs)

        return changed

    for name in EVENTS:
        setattr(os, name, wrap(name, getattr(os, name)))


def opens(path: Path) -> bool:
    try:
        load_index(path)
        return True
    except EdgeMoeError:
        return False


def same(first: Path, second: Path) -> bool:
    names = sorted(file.name for file in first.iterdir())
    if names != sorted(file.name for file in second.iterdir()):
        return False
    return filecmp.cmpfiles(first, second, names, shallow=False)[0] == names


def kill(source: Path, folder: Path, num_points: int, num_random: int) -> object:
    """Kill conversions at many points, resume each, compare with one that was left alone."""
    reference, target = folder / "reference.edgemoe", folder / "killed.edgemoe"
    log = folder / "log"

    def counted() -> None:
        die_at(-1, log)
        convert(source, reference)

    started = time.monotonic()
    assert in_fork(counted) == 0
    whole_s = time.monotonic() - started
    num_events = int(log.read_text())
    points: list[int | float] = [*range(num_events - 7, num_events + 1)]
    points += [1 + n * num_events // num_points for n in range(num_points)]
    chance = random.Random(7)
    points += [chance.random() * whole_s for _ in range(num_random)]
    found = []
    for point in points:

        def victim(point: int | float = point) -> None:
            if isinstance(point, int):
                die_at(point, log)
            convert(source, target)

        status = in_fork(victim, point if isinstance(point, float) else None)
        partial = partial_path(target)
        journal = partial / JOURNAL_FILE
        finished = []
        if journal.exists():
            finished = [int(layer) for layer in json.loads(journal.read_text())["layers"]]
        opened = [path for path in (partial, target) if opens(path)]
        result = {
            "point": point,
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "finished": finished,
            # What opens must already be whole: all but the journal is as in the reference.
            "opened_wrong": [
                str(path)
                for path in opened
                if filecmp.cmpfiles(reference, path, os.listdir(reference), shallow=False)[1:]
                != ([], [])
            ],
        }
        log.write_text("")

        def again() -> None:
            read = Checkpoint.expert

            def logged(self: Checkpoint, at: int, expert: int) -> object:
                with open(log, "a") as file:
                    file.write(f"{at}\n")
                return read(self, at, expert)

            Checkpoint.expert = logged  # type: ignore[method-assign]
            convert(source, target)

        # A timed kill may come too late: the target is whole, and would be refused.
        late = target.exists() and not (target / JOURNAL_FILE).exists()
        status = 0 if late else in_fork(again)
        redone = {int(line) for line in log.read_text().split()}
        result["resumed"] = status == 0
        result["redone"] = sorted(redone & set(finished))
        result["same"] = target.is_dir() and same(reference, target)
        result["left"] = partial.exists()
        found.append(result)
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
    return {"num_events": num_events, "runs": found}


def starve(source: Path, target: Path, num_bytes: int) -> object:
    """Convert where no file may be longer than `num_bytes` (0: the disk itself is small)."""
    if num_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    # The disk looked large enough at the start; it fills up meanwhile.
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda folder: type(usage)(1 << 60, 0, 1 << 60)
    try:
        convert(source, target)
    except EdgeMoeError as error:
        return {"error": type(error).__name__, "text": str(error), "code": error.exit_code}
    return {}


def status_bytes(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def cached_bytes(path: Path) -> int:
    """Bytes of a file in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    num_pages = -(-size // mmap.PAGESIZE)
    pages = (ctypes.c_ubyte * num_pages)()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def measure(source: Path, target: Path, bits: int) -> object:
    """Peak growth of resident memory over a conversion, and what it left in the page cache."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status_bytes("VmRSS")
    convert(source, target, ConvertOptions(bits))
    growth = status_bytes("VmHWM") - before
    files = [*source.glob("*.safetensors"), *target.glob("*.safetensors")]
    return {"growth_bytes": growth, "cached_bytes": sum(cached_bytes(file) for file in files)}


def main() -> None:
    command, first, second, *numbers = sys.argv[1:]
    work = {"kill": kill, "starve": starve, "measure": measure}[command]
    print(json.dumps(work(Path(first), Path(second), *(int(number) for number in numbers))))


if __name__ == "__main__":
    main()
