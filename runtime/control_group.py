"""The control groups around this process, versions 1 and 2, as far as they can be seen. Floor 0."""

import os
from collections.abc import Iterator
from pathlib import Path


def levels(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the groups that rule `controller`, such as "memory", from ours to the top of each
    hierarchy, and whether the folder is of version 2. `root` is where /proc and /sys are looked up.
    """
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "/")
        if controllers and controller not in controllers.split(","):
            continue
        top = base / controller if controllers else base
        # Inside a container the path is often that of the host, which is not mounted here: what
        # can be found of it from the top down is looked at.
        group = top / path.lstrip("/")
        for level in (group, *group.parents):
            yield level, not controllers
            if level == top:
                break


def read_limit(file: Path, root: Path = Path("/")) -> int | None:
    """Bytes per second that control groups let us read from the disk of `file`; None: no limit."""
    number = file.stat().st_dev
    disk = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if (disk / "partition").is_file():  # limits belong to the whole disk
        disk = disk.resolve().parent
    device = _text(disk / "dev").strip()
    found = []
    for level, is_unified in levels(root, "blkio"):
        name = "io.max" if is_unified else "blkio.throttle.read_bps_device"
        for line in _text(level / name).splitlines():
            first, *words = line.split()
            rates = [word.removeprefix("rbps=") for word in words if "wbps" not in word]
            found += [int(rate) for rate in rates[:1] if first == device and rate.isdecimal()]
    return min(found, default=None)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
