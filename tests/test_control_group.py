"""What control groups let a process read."""

import os
from pathlib import Path

import pytest

from edgemoe.runtime.control_group import read_limit

V1 = {"proc/self/cgroup": "7:cpu,blkio:/jobs/one\n0::/\n"}
V1_FILE = "sys/fs/cgroup/blkio/{}blkio.throttle.read_bps_device"
V2 = {"proc/self/cgroup": "0::/jobs/one\n"}
V2_FILE = "sys/fs/cgroup/{}io.max"


@pytest.fixture
def disk(tmp_path) -> Path:
    """Below `tmp_path`, a system's folder for the disk of that path, 259:5."""
    number = tmp_path.stat().st_dev
    folder = tmp_path / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    folder.mkdir(parents=True)
    (folder / "dev").write_text("259:5\n")
    return folder


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "rate"),
    [
        ({}, None),
        (V1 | {V1_FILE.format("jobs/one/"): "8:0 100\n259:5 7000\n"}, 7000),
        (V1 | {V1_FILE.format("jobs/"): "259:5 7000\n", V1_FILE.format(""): "259:5 900\n"}, 900),
        (V1 | {V1_FILE.format("other/"): "259:5 7000\n"}, None),
        (V2 | {V2_FILE.format("jobs/one/"): "259:5 rbps=5000 wbps=10 riops=max wiops=max\n"}, 5000),
        (V2 | {V2_FILE.format("jobs/"): "259:5 rbps=max wbps=10 riops=4 wiops=max\n"}, None),
        (V2 | {V2_FILE.format(""): "259:15 rbps=5000 wbps=max riops=max wiops=max\n"}, None),
    ],
)
def test_the_strictest_group_above_us_counts(tmp_path, disk, files, rate):
    assert read_limit(tmp_path, write(tmp_path, files)) == rate


def test_a_partition_is_limited_as_its_disk(tmp_path, disk):
    part = disk.parent / "part"
    disk.rename(part)
    whole = tmp_path / "sys/devices/disk"
    whole.mkdir(parents=True)
    (whole / "dev").write_text("259:0\n")
    (part / "partition").write_text("5\n")
    part.rename(whole / "part")
    disk.symlink_to(whole / "part")
    root = write(tmp_path, V1 | {V1_FILE.format(""): "259:0 300\n"})
    assert read_limit(tmp_path, root) == 300


def test_a_file_on_no_disk_has_no_limit(tmp_path):
    assert read_limit(tmp_path, write(tmp_path, V1 | {V1_FILE.format(""): "259:0 300\n"})) is None
