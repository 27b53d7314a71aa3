"""`edgemoe bench kernels`: every format and level answers, and their outputs agree."""

import json

import numpy as np
import pytest

from edgemoe.cli import bench_kernels
from edgemoe.cli.bench_kernels import formats, shape
from edgemoe.cli.bench_kernels_report import tables
from edgemoe.runtime import core
from edgemoe.runtime.errors import EdgeMoeError, UsageError
from edgemoe.runtime.format import QuantSpec
from edgemoe.runtime.kernels import ThreadPool
from edgemoe.runtime.memory import Arena

native = pytest.mark.skipif(core.lib is None, reason="native core not built")


def test_formats_and_shapes_are_named() -> None:
    assert formats("4-nf4-32,bf16") == [QuantSpec(4, 32, "nf4"), QuantSpec(16, 0, "bf16")]
    assert len(set(formats("all"))) == 2 * 3 * 4 + 3 + 2
    assert shape("qwen3-30b") == (2048, 768) and shape("64x32") == (64, 32)
    for wrong in ("5-sym-64", "4-sym", "nf4", "4-sym-64-1", ""):
        with pytest.raises(UsageError):
            formats(wrong)
    with pytest.raises(UsageError):
        shape("64x")


@native
def test_levels_take_turns_and_agree(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from edgemoe.cli import main

    monkeypatch.delenv("EDGEMOE_ISA", raising=False)
    levels = {core.lib.em_isa().decode(), "scalar"}
    words = ["--isa", ",".join(levels), "--shape", "128x64", "--pool", "4MiB", "--threads", "1,2"]
    words += ["--formats", "4-nf4-64,2-asym-32,bf16", "--tokens", "3", "-r", "2", "--json"]
    assert main(["bench", "kernels", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["rows"]) == 3 * 2 * 2 * len(levels)
    hashes: dict[tuple, set[str]] = {}
    for row in document["rows"]:
        assert len(row["rounds"]) == 2
        for each in row["rounds"]:
            assert each["layer_s"] > 0
            hashes.setdefault((row["mode"], row["tokens"]), set()).add(each["output_hash"])
    assert all(len(found) == 1 for found in hashes.values()) and len(hashes) == 6
    text = tables(document)
    assert "4-nf4-64" in text and "NOT IDENTICAL" not in text
    document["rows"][0]["rounds"][0]["output_hash"] = "other"
    assert "NOT IDENTICAL: 4-nf4-64 with 1 tokens" in tables(document, markdown=True)


@native
def test_what_cannot_be_measured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    from edgemoe.cli import main

    small = ["--formats", "4-sym-64", "--isa", "scalar", "--threads", "1"]
    assert main(["bench", "kernels", *small, "--pool", "1MiB"]) == 1
    assert "raise --pool" in capsys.readouterr().err
    assert main(["bench", "kernels", *small[:2], "--isa", "avx1024"]) == 2
    assert "no `avx1024`" in capsys.readouterr().err


@native
def test_a_child_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels.sys, "executable", "/bin/false")
    with pytest.raises(EdgeMoeError, match="ended early"):
        bench_kernels.Child("scalar", bench_kernels.argparse.Namespace(shape=(64, 64)), 1 << 20)


@native
@pytest.mark.parametrize("num_bytes", (64, 64 * 5, 3 * (256 << 10) + 64 * 7))
def test_a_sweep_reads_every_byte(num_bytes: int) -> None:
    arena = Arena(1 << 20)
    data = arena.view(0, num_bytes + 64)
    data[:] = 0
    data[num_bytes:] = 255  # behind its end
    with ThreadPool(2) as pool:
        for bit in range(0, num_bytes // 8, max(1, num_bytes // 8 // 97)):
            words = data.view(np.uint64)
            words[bit] = 1 << bit % 64
            expected = 1 << bit % 64
            assert core.lib.em_memory_sweep(pool.handle, arena.address, num_bytes) == expected
            words[bit] = 0
    arena.close()
