"""Run a command and watch its memory from outside; optionally under a hard limit of the kernel.

    python tools/watch_memory.py --limit 1GiB -- edgemoe run MODEL "text" --memory 1GiB

Samples /proc every 20 ms over the process tree: resident, anonymous and file-backed bytes. With
`--limit` (Linux, root) the command runs in a fresh memory control group (version 1 or 2), where
anonymous memory *and* page cache count; the group's own peak and the number of times it hit the
limit are reported beside, and the kernel kills the command if it needs more. One line of JSON on
stderr at the end; the exit status is the command's (137: killed for memory).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from edgemoe.runtime.budget import parse_bytes

SAMPLE_S = 0.02


@dataclass(slots=True)
class Peaks:
    """Largest values seen, in bytes, summed over the process tree."""

    rss: int = 0
    anonymous: int = 0
    file_backed: int = 0


class MemoryGroup:
    """A fresh memory control group with a hard limit; removed on exit."""

    def __init__(self, limit_bytes: int) -> None:
        name = f"edgemoe-{os.getpid()}"
        if Path("/sys/fs/cgroup/cgroup.controllers").is_file():
            self.path = Path("/sys/fs/cgroup", name)
            self.limit_file, self.peak_file = "memory.max", "memory.peak"
        else:
            self.path = Path("/sys/fs/cgroup/memory", name)
            self.limit_file = "memory.limit_in_bytes"
            self.peak_file = "memory.max_usage_in_bytes"
        self.limit_bytes = limit_bytes

    def __enter__(self) -> "MemoryGroup":
        self.path.mkdir()
        (self.path / self.limit_file).write_text(str(self.limit_bytes))
        return self

    def __exit__(self, *_: object) -> None:
        self.path.rmdir()

    def enter(self) -> None:
        """Move the calling process in; runs in the child before it starts the command."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def stat(self) -> dict[str, int]:
        """Peak, and how often the limit was hit, as the kernel counts them."""
        found = {"group_peak": int((self.path / self.peak_file).read_text())}
        for name in ("memory.failcnt", "memory.events"):
            if (self.path / name).is_file():
                words = (self.path / name).read_text().split()
                found["limit_hits"] = int(words[0] if len(words) == 1 else words[5])
        return found

    def page_cache(self) -> int:
        lines = (self.path / "memory.stat").read_text().splitlines()
        values = dict(line.split() for line in lines)
        return int(values.get("cache", values.get("file", 0)))


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
    return now


def watch(command: list[str], group: MemoryGroup | None) -> tuple[int, dict[str, int]]:
    """Run the command to its end; returns its exit status and the peaks."""
    peaks, cache_peak = Peaks(), 0
    child = subprocess.Popen(command, preexec_fn=group.enter if group else None)
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            now = tree_memory(process)
        except psutil.Error:
            break
        for name, value in asdict(now).items():
            setattr(peaks, name, max(getattr(peaks, name), value))
        if group:
            cache_peak = max(cache_peak, group.page_cache())
        time.sleep(SAMPLE_S)
    status = child.wait()
    found = asdict(peaks)
    if group:
        found |= {"page_cache": cache_peak, **group.stat()}
    return (status if status >= 0 else 128 - status), found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=parse_bytes, help="hard limit, such as 1GiB (needs root)")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    if arguments.limit:
        with MemoryGroup(arguments.limit) as group:
            status, found = watch(arguments.command, group)
    else:
        status, found = watch(arguments.command, None)
    print(json.dumps({"exit": status, **found}), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
