"""Run a command and watch its memory from outside; optionally under hard limits of the kernel.

    python tools/watch_memory.py --limit 1GiB -- edgemoe run MODEL "text" --memory 1GiB
    python tools/watch_memory.py --read-limit 500MB/s --on MODEL -- edgemoe bench MODEL

Samples /proc every 20 ms over the process tree: resident, anonymous and file-backed bytes, major
faults, bytes read from storage. With `--limit` (Linux, root) the command runs in a fresh memory
control group (version 1 or 2), where anonymous memory *and* page cache count; the group's own peak
and the number of times it hit the limit are reported beside, and the kernel kills the command if it
needs more. `--read-limit` throttles what the command reads from the disk that holds `--on`;
`--read-ahead` sets that disk's read-ahead for the time of the command (an mmap reader depends on
it; an open file keeps the value it was opened with), and puts it back; `--drop-caches` empties the
page cache before. One line of JSON on stderr at the end; the exit status is the command's (137:
killed for memory).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from edgemoe.runtime.budget import parse_bytes

SAMPLE_S = 0.02
GROUPS = Path("/sys/fs/cgroup")


@dataclass(slots=True)
class Peaks:
    """Largest values seen, in bytes, summed over the process tree; faults and reads so far."""

    rss: int = 0
    anonymous: int = 0
    file_backed: int = 0
    major_faults: int = 0
    read: int = 0


class ControlGroup:
    """Fresh control groups with a hard limit of memory, of reading, or both; removed on exit.

    Version 2 has one group for all controllers, version 1 a folder of groups for each.
    """

    def __init__(
        self,
        limit_bytes: int | None = None,
        read_limit: tuple[str, int] | None = None,
        root: Path = GROUPS,
    ) -> None:
        """`read_limit` is a disk as MAJOR:MINOR and bytes per second."""
        name = f"edgemoe-{os.getpid()}"
        unified = (root / "cgroup.controllers").is_file()
        memory = root / name if unified else root / "memory" / name
        blocks = root / name if unified else root / "blkio" / name
        self._limits: list[tuple[Path, str]] = []
        self._root = root if unified else None
        self.memory: Path | None = None
        if limit_bytes is not None:
            self.memory = memory
            file = "memory.max" if unified else "memory.limit_in_bytes"
            self._limits.append((memory / file, str(limit_bytes)))
        if read_limit is not None:
            device, rate = read_limit
            file = "io.max" if unified else "blkio.throttle.read_bps_device"
            text = f"{device} rbps={rate}" if unified else f"{device} {rate}"
            self._limits.append((blocks / file, text))
        self.paths = sorted({file.parent for file, _ in self._limits})
        self._peak_file = "memory.peak" if unified else "memory.max_usage_in_bytes"

    def __enter__(self) -> "ControlGroup":
        if self._root and self.paths:
            (self._root / "cgroup.subtree_control").write_text("+memory +io")
        for path in self.paths:
            path.mkdir()
        for file, text in self._limits:
            file.write_text(text)
        return self

    def __exit__(self, *_: object) -> None:
        for path in self.paths:
            path.rmdir()

    def enter(self) -> None:
        """Move the calling process in; runs in the child before it starts the command."""
        for path in self.paths:
            (path / "cgroup.procs").write_text(str(os.getpid()))

    def stat(self) -> dict[str, int]:
        """Peak, and how often the limit was hit, as the kernel counts them."""
        if self.memory is None:
            return {}
        found = {"group_peak": int((self.memory / self._peak_file).read_text())}
        for name in ("memory.failcnt", "memory.events"):
            if (self.memory / name).is_file():
                words = (self.memory / name).read_text().split()
                found["limit_hits"] = int(words[0] if len(words) == 1 else words[5])
        return found

    def page_cache(self) -> int:
        """Bytes of page cache that the group is charged for."""
        if self.memory is None:
            return 0
        lines = (self.memory / "memory.stat").read_text().splitlines()
        values = dict(line.split() for line in lines)
        return int(values.get("cache", values.get("file", 0)))


class ReadAhead:
    """Sets the read-ahead of a disk and puts the old value back."""

    def __init__(self, disk: Path, num_bytes: int) -> None:
        """`disk` is its folder in /sys."""
        self._file = disk / "queue" / "read_ahead_kb"
        self._kib = num_bytes // 1024

    def __enter__(self) -> "ReadAhead":
        self._before = self._file.read_text()
        self._file.write_text(str(self._kib))
        return self

    def __exit__(self, *_: object) -> None:
        self._file.write_text(self._before)


def disk_of(path: Path, sys_block: Path = Path("/sys/dev/block")) -> tuple[Path, str]:
    """The /sys folder of the whole disk that holds `path`, and its MAJOR:MINOR."""
    number = path.stat().st_dev
    folder = (sys_block / f"{os.major(number)}:{os.minor(number)}").resolve()
    if not folder.is_dir():
        raise SystemExit(f"`{path}` lies on no disk: name a file on one with --on")
    if (folder / "partition").is_file():  # the limits belong to the whole disk
        folder = folder.parent
    return folder, (folder / "dev").read_text().strip()


def drop_caches() -> None:
    """Write back, then forget clean pages, dentries and inodes."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def tree_memory(process: psutil.Process) -> Peaks:
    """Memory of a process and its children now."""
    now = Peaks()
    for member in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
        except OSError:
            continue
        values = dict(line.split(":", 1) for line in lines)
        for name, key in (("rss", "VmRSS"), ("anonymous", "RssAnon"), ("file_backed", "RssFile")):
            text = values.get(key, "0 kB").split()[0]
            setattr(now, name, getattr(now, name) + int(text) * 1024)
        now.major_faults += _major_faults(member.pid)
        now.read += _read_bytes(member.pid)
    return now


def _major_faults(pid: int) -> int:
    try:
        # the name in parentheses may hold spaces; field 12 of the line is the tenth after it
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[9])
    except (OSError, IndexError):
        return 0


def _read_bytes(pid: int) -> int:
    """Bytes that came from storage, page faults included."""
    try:
        text = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return 0
    return int(text.split("read_bytes:")[1].split()[0])


def watch(command: list[str], group: ControlGroup) -> tuple[int, dict[str, int | float]]:
    """Run the command to its end; returns its exit status, the peaks and the times."""
    peaks, cache_peak, begin = Peaks(), 0, time.perf_counter()
    child = subprocess.Popen(command, preexec_fn=group.enter)
    try:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                now = tree_memory(process)
            except psutil.Error:
                break
            for name, value in asdict(now).items():
                setattr(peaks, name, max(getattr(peaks, name), value))
            cache_peak = max(cache_peak, group.page_cache())
            time.sleep(SAMPLE_S)
        status = child.wait()
    finally:
        if child.poll() is None:  # interrupted: the groups can be removed only when it has gone
            child.kill()
            child.wait()
    found = {**asdict(peaks), "wall_s": time.perf_counter() - begin, **group.stat()}
    if group.memory:
        found["page_cache"] = cache_peak
    return (status if status >= 0 else 128 - status), found


def rate(text: str) -> int:
    """`500MB/s` in bytes per second."""
    return parse_bytes(text.removesuffix("/s"))


def main() -> int:
    """The command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=parse_bytes, help="hard limit, such as 1GiB (needs root)")
    parser.add_argument("--read-limit", type=rate, help="such as 500MB/s (needs root)")
    parser.add_argument("--read-ahead", type=parse_bytes, help="such as 128KiB (needs root)")
    parser.add_argument("--drop-caches", action="store_true", help="before (needs root)")
    parser.add_argument("--on", type=Path, default=Path(), help="a file on the disk that is meant")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is put back
    with ExitStack() as stack:
        read_limit = None
        if arguments.read_limit or arguments.read_ahead:
            disk, number = disk_of(arguments.on)
            if arguments.read_limit:
                read_limit = (number, arguments.read_limit)
            if arguments.read_ahead:
                stack.enter_context(ReadAhead(disk, arguments.read_ahead))
        if arguments.drop_caches:
            drop_caches()
        group = stack.enter_context(ControlGroup(arguments.limit, read_limit))
        status, found = watch(arguments.command, group)
    print(json.dumps({"exit": status, **found}), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
