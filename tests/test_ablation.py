"""The schemes of the EdgeMoE paper by name (arXiv 2308.14352, section 6): what each reads."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import stores_small
from stores import trunk_names
from test_replay import write_trace

from edgemoe.cli import bench_ablation, main
from edgemoe.cli.ablation_arms import ARMS, ORDER, Arm, bytes_per_token, capacity, num_tokens
from edgemoe.cli.ablation_report import tables
from edgemoe.cli.bench_ablation import PROCESS_BYTES
from edgemoe.quant.bitplan import BitPlan
from edgemoe.quant.convert import convert
from edgemoe.quant.crop import crop_store
from edgemoe.quant.options import ConvertOptions, ExpertSpec
from edgemoe.runtime import core
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.index import load_index
from edgemoe.runtime.kernels import PackedMatrix
from edgemoe.runtime.store import Store

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")
SLOW, FAST = 50_000_000, 550_000_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_experts": 16}
    return stores_small.make_store(tmp_path_factory.mktemp("ablation"), bits=8, **sizes)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main(["bench", *map(str, words)])
    return code, capsys.readouterr().out


@pytest.fixture
def document(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    keys = load_index(store).records
    specs = {(layer, expert): ExpertSpec(2 if expert % 2 else 4) for layer, expert in keys}
    mixed = tmp_path / "mixed.edgemoe"
    convert(store, mixed, ConvertOptions(plan=BitPlan("odd", specs)))
    words = ("--ablation", "--work", tmp_path, "--rates", "50MB/s,550MB/s", "--json")
    words += ("--mixed", mixed)
    sizes = ("-r", 1, "--seconds", 0.05, "--warm-up", 8, "--eval-tokens", 64)
    code, out = run(capsys, store, *words, *sizes)
    assert code == 0
    return json.loads(out)


def test_the_arms_read_as_much_as_their_scheme_says(document: dict) -> None:
    """Bytes and the emulated drive's own clock; the time of a run is not for a test."""
    rows = {row["arm"]: row for row in document["rows"]}
    assert list(rows) == [arm.name for arm in ARMS]
    stores = document["stores"]
    for rate in (SLOW, FAST):
        read, served = {}, {}
        for name, row in rows.items():
            (cell,) = row["rates"][str(rate)]["rounds"]
            read[name] = cell["bytes_per_token"]
            served[name] = cell["drive_busy_share"] * cell["tpot_s"]
            if name in ("IO-EXP", "IO-QEXP", "+bits"):  # the others leave reads under way
                assert served[name] == pytest.approx(read[name] / rate, rel=1e-3)
            assert cell["ttft_s"] > 0
        assert read["IO-FREE"] == read["IO-QFREE"] == 0
        assert all(read[slow] > read[fast] for slow, fast in pairwise(ORDER))
        cycle = 3 * 2  # layers x top-k
        assert read["IO-EXP"] == cycle * stores["16"]["max_record_bytes"]
        assert read["IO-QEXP"] == cycle * stores["4"]["max_record_bytes"]
        # What was under way when the count began is counted, too: part of the memory at most.
        assert read["STI-like"] <= stores["4"]["expert_bytes"] + document["share_bytes"]
        assert read["STI-like"] > read["IO-QEXP"]
    slow, fast = (
        [rows[name]["rates"][str(rate)]["rounds"][0] for name in ("IO-EXP", "+forecast (ours)")]
        for rate in (SLOW, FAST)
    )
    # What reading alone would take: the same bytes at either rate, so that what is not reading
    # weighs more at the faster one.
    assert slow[0]["bytes_per_token"] == fast[0]["bytes_per_token"]


def test_arms_on_one_store_compute_the_same(document: dict) -> None:
    hashes: dict[str, set[str]] = {}
    for row in document["rows"]:
        hashes.setdefault(row["store"], set()).add(row["logits_hash"])
    assert all(len(found) == 1 for found in hashes.values()) and len(hashes) == 4
    assert len(set().union(*hashes.values())) == 4
    text = tables(document, markdown=True)
    assert "NOT IDENTICAL" not in text and all(f"| {arm.name} " in text for arm in ARMS)
    assert document["loss"]["16"]["rise_percent"] == 0
    seconds = dict(zip(ORDER, (4, 3, 2, 1), strict=True))
    for row in document["rows"]:
        row["rates"][str(SLOW)]["rounds"][0]["tpot_s"] = seconds.get(row["arm"], 9)
    assert f"{' > '.join(ORDER)}: yes; +forecast (ours) is 2.00 times" in tables(document)
    document["rows"][0]["rates"][str(SLOW)]["rounds"][0]["tpot_s"] = 2
    assert ": NO, +forecast (ours) is not slower than IO-FREE;" in tables(document)


def test_hits_and_memory_are_those_of_the_scheme(document: dict) -> None:
    rows = {row["arm"]: row for row in document["rows"]}
    for name, row in rows.items():
        (cell,) = row["rates"][str(SLOW)]["rounds"]
        if name in ("IO-FREE", "IO-QFREE"):
            assert cell["hit_rate"] == 1
        elif name in ("IO-EXP", "IO-QEXP", "+bits"):
            assert cell["hit_rate"] == 0
        elif name == "STI-like":
            assert cell["hit_rate"] is None
    share = document["share_bytes"]
    assert rows["STI-like"]["expert_cache_bytes"] == rows["+forecast (ours)"]["expert_cache_bytes"]
    assert rows["+forecast (ours)"]["expert_cache_bytes"] == share


def test_no_rate_knows_the_tokens_from_the_one_before(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """A cache that learns has the same hits at every rate."""
    monkeypatch.setattr(bench_ablation, "ARMS", (Arm("learns", "4", "share", policy="forecast"),))
    words = ("--ablation", "--work", tmp_path, "--rates", "500MB/s,600MB/s", "--json", "-r", 1)
    code, out = run(capsys, store, *words, "--seconds", 1, "--warm-up", 8, "--eval-tokens", 64)
    (row,) = json.loads(out)["rows"]
    first, second = (row["rates"][rate]["rounds"][0] for rate in ("500000000", "600000000"))
    assert code == 0 and first["hit_rate"] == second["hit_rate"] < 1


def test_a_trace_is_replayed_on_the_first_layers(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(tmp_path / "t.trace", layers=3, experts=16, top_k=2)
    words = ("--ablation", "--work", tmp_path, "--rates", "550MB/s", "--json", "-r", 1)
    words += ("--seconds", 0.05, "--warm-up", 2, "--replay", tmp_path / "t.trace")
    some = ("--replay-layers", 2, "--arms", "IO-EXP,IO-QEXP,+bits")
    code, out = run(capsys, store, *words, *some, "--prepare")
    made = sorted(map(Path, out.split()))
    assert code == 0 and made == sorted(tmp_path.glob("*.edgemoe"))
    assert len(made) == 3 and not list(tmp_path.glob("*.cropped"))
    times = [path.stat().st_mtime_ns for path in made]
    code, out = run(capsys, store, *words, *some)
    assert code == 0 and times == [path.stat().st_mtime_ns for path in made]
    document = json.loads(out)
    assert document["layers"] == 2 and document["loss"] == {}
    read = [row["rates"][str(FAST)]["rounds"][0]["bytes_per_token"] for row in document["rows"]]
    assert read[0] == 2 * 2 * document["stores"]["16"]["max_record_bytes"]
    assert read[0] > read[1] > read[2]
    assert "random weights" in tables(document)
    assert run(capsys, store, *words, "--arms", "IO-SLOW")[0] == 2


def test_what_cannot_be_measured_is_refused_before_stores_are_made(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(tmp_path / "t.trace", layers=3, experts=16, top_k=2)
    (tmp_path / "broken.trace").write_bytes(b"\0" * 64)
    trace, missing = tmp_path / "t.trace", tmp_path / "missing"
    for words, code in (
        (("--text", missing), 4),
        (("--replay", missing), 4),
        (("--replay", tmp_path / "broken.trace"), 1),
        (("--replay", trace, "--text", trace), 2),
        (("--replay-layers", 2), 2),
    ):
        assert run(capsys, store, "--ablation", "--work", tmp_path / "work", *words)[0] == code
    assert not (tmp_path / "work").exists()


def test_arms_that_do_not_fit_into_memory_are_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    write_trace(tmp_path / "t.trace", layers=3, experts=16, top_k=2)
    words = ("--ablation", "--work", tmp_path, "--replay", tmp_path / "t.trace", "-r", 1)
    assert run(capsys, store, *words, "--prepare")[0] == 0
    free = psutil.virtual_memory()._replace(available=PROCESS_BYTES)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert main(["bench", *map(str, (store, *words))]) == 3
    error = capsys.readouterr().err
    assert "IO-FREE does not fit into memory" in error and "--arms" in error


def test_a_cropped_store_is_the_first_layers(store: Path, tmp_path: Path) -> None:
    cropped = crop_store(store, tmp_path / "c.edgemoe", 2)
    index, whole = load_index(cropped), load_index(store)
    assert index.layer_to_num_experts == {0: 16, 1: 16}
    with Store(cropped) as first, Store(store) as second:
        assert all(ok for *_, ok in first.verify()) and all(ok for _, ok in first.verify_files())
        names = trunk_names(cropped)
        assert set(names) < set(trunk_names(store))
        for name in names:
            a, b = first.trunk_tensor(name), second.trunk_tensor(name)
            a, b = (each.data if isinstance(each, PackedMatrix) else each for each in (a, b))
            assert np.array_equal(a, b)
    assert [r.crc32c for r in index.records.values()] == [
        whole.records[key].crc32c for key in index.records
    ]
    with pytest.raises(UsageError, match="already"):
        crop_store(store, cropped, 1)
    with pytest.raises(UsageError, match="4 layers"):
        crop_store(store, tmp_path / "d.edgemoe", 4)


def test_tokens_adapt_to_the_rate(store: Path) -> None:
    index = load_index(store)
    by_name = {arm.name: arm for arm in ARMS}
    record = index.max_record_bytes
    assert bytes_per_token(by_name["IO-EXP"], index, 2) == 3 * 2 * record
    assert bytes_per_token(by_name["STI-like"], index, 2) == index.expert_bytes
    assert capacity(by_name["+preload"], index, 2, 0) == 4 * record
    assert num_tokens(1e6, 50_000_000, 1.0, 100) == 50
    assert num_tokens(1e6, 500_000_000, 1.0, 100) == 64
    assert num_tokens(1e8, 50_000_000, 1.0, 100) == 2
    assert num_tokens(1e9, 50_000_000, 1.0, 100) == 1
    assert num_tokens(0, 50_000_000, 1.0, 30) == 30
