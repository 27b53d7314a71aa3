"""What this process uses of the memory, and what the system lets it use. Floor 0."""

import sys
from dataclasses import dataclass
from pathlib import Path

from .control_group import levels

_STATUS_FIELDS = {
    "VmRSS": "rss_bytes",
    "VmHWM": "peak_rss_bytes",
    "RssAnon": "anonymous_bytes",
    "RssFile": "file_bytes",
}


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Resident bytes of this process; None where the system does not tell."""

    rss_bytes: int
    peak_rss_bytes: int | None = None
    anonymous_bytes: int | None = None
    file_bytes: int | None = None  # mapped files: shared libraries, mostly


def process_memory(status: Path = Path("/proc/self/status")) -> ProcessMemory:
    """Read from /proc on Linux, asked of psutil elsewhere."""
    if status.is_file():
        found = {}
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name in _STATUS_FIELDS and value.split()[1:] == ["kB"]:
                found[_STATUS_FIELDS[name]] = int(value.split()[0]) * 1024
        if "rss_bytes" in found:
            return ProcessMemory(**found)
    import psutil

    info = psutil.Process().memory_info()
    peak = getattr(info, "peak_wset", None)
    if peak is None and sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return ProcessMemory(info.rss, peak)


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The most memory that this process can have, and who says so."""

    num_bytes: int
    source: str  # completes "the limit of ..."
    group_used_bytes: int | None = None  # of a control group that sets the limit


def memory_limit(root: Path = Path("/"), physical_bytes: int | None = None) -> MemoryLimit:
    """The tightest of the machine's memory and the limits of the control groups around us.

    `root` is where /proc and /sys are looked up.
    """
    if physical_bytes is None:
        import psutil

        physical_bytes = psutil.virtual_memory().total
    limits = [MemoryLimit(physical_bytes, "this machine")]
    limits += [
        MemoryLimit(num_bytes, "this container or control group", used_bytes)
        for num_bytes, used_bytes in _cgroup_limits(root)
        if num_bytes < physical_bytes
    ]
    return min(limits, key=lambda limit: limit.num_bytes)


def _cgroup_limits(root: Path) -> list[tuple[int, int | None]]:
    """Every memory limit between our control group and the top, version 1 and version 2, and what
    the group uses; its page cache, which it gives back, does not count."""
    limits = []
    for level, is_unified in levels(root, "memory"):
        if is_unified:
            name, used = "memory.max", "memory.current"
        else:
            name, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        used_bytes = _read_number(level / used)
        if used_bytes is not None:
            used_bytes = max(0, used_bytes - _file_bytes(level / "memory.stat"))
        limit = _read_number(level / name)  # version 2 writes `max` for none
        limits += [] if limit is None else [(limit, used_bytes)]
    return limits


def _read_number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdecimal() else None


def _file_bytes(file: Path) -> int:
    """Page cache of a control group that is not in use now, by its `memory.stat`."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return 0
    values = dict(line.split() for line in lines if len(line.split()) == 2)
    for name in ("total_inactive_file", "inactive_file"):  # version 1 with subgroups, version 2
        if values.get(name, "").isdecimal():
            return int(values[name])
    return 0
