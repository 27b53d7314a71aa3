"""What this process uses of the memory, and what the system lets it use. Floor 0."""

import sys
from dataclasses import dataclass
from pathlib import Path

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


def memory_limit(root: Path = Path("/"), physical_bytes: int | None = None) -> MemoryLimit:
    """The tightest of the machine's memory and the limits of the control groups around us.

    `root` is where /proc and /sys are looked up.
    """
    if physical_bytes is None:
        import psutil

        physical_bytes = psutil.virtual_memory().total
    limits = [MemoryLimit(physical_bytes, "this machine")]
    limits += [
        MemoryLimit(num_bytes, "this container or control group")
        for num_bytes in _cgroup_limits(root)
        if num_bytes < physical_bytes
    ]
    return min(limits, key=lambda limit: limit.num_bytes)


def _cgroup_limits(root: Path) -> list[int]:
    """Every memory limit between our control group and the top, version 1 and version 2."""
    base = root / "sys/fs/cgroup"
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in groups:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "/")
        if controllers == "":
            folder, name = base, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = base / "memory", "memory.limit_in_bytes"
        else:
            continue
        # Inside a container the path is often that of the host, which is not mounted here: what
        # can be found of it from the top down is looked at.
        group = folder / path.lstrip("/")
        for level in (group, *group.parents):
            limits += _read_limit(level / name)
            if level == folder:
                break
    return limits


def _read_limit(file: Path) -> list[int]:
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return []
    return [int(text)] if text.isdecimal() else []  # version 2 writes `max` for none
