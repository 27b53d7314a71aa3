"""Signs that memory is short: major faults, waiting for memory, what is left of it. Floor 0."""

from dataclasses import dataclass
from pathlib import Path

from .process import memory_limit, process_memory

_AUTO_SHARE = 0.8  # of what is available
_MAJOR_FAULTS = 9  # of /proc/self/stat, counted behind the command's name in parentheses


@dataclass(frozen=True, slots=True)
class Pressure:
    """Sums since the start of process or system, and what is left now; None: not told."""

    major_faults: int | None
    stalled_s: float | None  # time in which some task waited for memory (Linux PSI)
    available_bytes: int | None


def read_pressure(root: Path = Path("/")) -> Pressure:
    """Read from /proc and the control group on Linux; elsewhere what psutil and getrusage tell."""
    return Pressure(_major_faults(root), _stalled_s(root), _available_bytes(root))


def auto_budget(root: Path = Path("/")) -> int:
    """The bound that `--memory auto` stands for: what this process has, and four fifths of what is
    left in the system and in its control group."""
    return process_memory().rss_bytes + int(_AUTO_SHARE * (_available_bytes(root) or 0))


def _major_faults(root: Path) -> int | None:
    try:
        text = (root / "proc/self/stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[_MAJOR_FAULTS])
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    except ImportError:  # Windows
        return None


def _stalled_s(root: Path) -> float | None:
    try:
        some = (root / "proc/pressure/memory").read_text(encoding="ascii").splitlines()[0]
        return int(some.rpartition("total=")[2]) * 1e-6
    except (OSError, ValueError, IndexError):
        return None


def _available_bytes(root: Path) -> int | None:
    """The least of what the system could give and what the control group has left."""
    left = []
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    if not left:
        import psutil

        left.append(psutil.virtual_memory().available)
    limit = memory_limit(root)
    if limit.group_used_bytes is not None:
        left.append(max(0, limit.num_bytes - limit.group_used_bytes))
    return min(left)
