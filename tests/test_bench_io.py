"""`edgemoe bench io`: what it reads, that no offset comes twice, and what it says of fio."""

import json
import shutil
from pathlib import Path

import pytest

from edgemoe import cli
from edgemoe.cli import bench_io
from edgemoe.runtime import core
from edgemoe.runtime.io import RecordReader

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")
DEMO = Path(bench_io.__file__).parent.parent / "demo" / "demo.edgemoe"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["bench", "io", str(DEMO), "-r", "2", "--depths", "1,2", *words])
    return code, *capsys.readouterr()


def test_every_arm_reads_its_own_records(capsys, monkeypatch):
    read: list[int] = []
    submit = RecordReader.submit
    monkeypatch.setattr(
        RecordReader,
        "submit",
        lambda self, keys, *rest: (read.extend(keys.tolist()), submit(self, keys, *rest)),
    )
    code, out, _ = run(capsys, "--json")
    document = json.loads(out)
    assert code == 0 and document["records"] == 192
    assert len(read) == len(set(read)) > 0
    arms = {row["arm"]: row for row in document["rows"]}
    assert {"threads, depth 1", "threads, depth 2", "buffered, depth 1"} <= set(arms)
    total = 0
    for row in document["rows"]:
        assert len(row["rounds"]) == 2
        for each in row["rounds"]:
            assert 0 < each["bytes"] <= document["part_bytes"]
            assert each["elapsed_s"] > 0
        if row["method"] != "fio":
            assert all(value > 0 for each in row["rounds"] for value in each["latency_s"])
            total += sum(len(each["latency_s"]) for each in row["rounds"])
            assert all(each["requests"] == 2 * len(each["latency_s"]) for each in row["rounds"])
    assert total == len(read)


def test_direct_reads_leave_the_page_cache_alone(capsys):
    _, out, _ = run(capsys, "--json")
    for row in json.loads(out)["rows"]:
        if row["method"] in ("io_uring", "threads"):
            growth = [each["cache_growth_bytes"] for each in row["rounds"]]
            assert all(value is None or value <= 0 for value in growth)


def test_without_fio_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, out, _ = run(capsys, "--markdown")
    assert code == 0
    assert "no reference: fio is not installed" in out
    assert "| threads, depth 2 |" in out and "| fio" not in out


def test_what_cannot_be_measured_is_refused(capsys):
    code, _, err = run(capsys, "-r", "500")
    assert code == 2 and "records are too few" in err
    code, _, err = run(capsys, "--depths", "300")
    assert code == 2 and "300" in err
