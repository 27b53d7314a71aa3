"""`bench --sets`: arms of one budget on the same tokens, what they cost and what they save."""

import json
from pathlib import Path

import numpy as np
import pytest
from pictures import drawn
from sets_small import make_set
from stores_small import make_store

from edgemoe.cli import bench_limits, main
from edgemoe.cli.sets_once import removed
from edgemoe.cli.sets_report import fewer_reads, tables
from edgemoe.cli.sets_speed import limiter
from edgemoe.quant.compact import compact
from edgemoe.runtime.index import load_index

KEPT = {0: (0, 2, 5, 6), 1: (1, 2, 3, 7), 2: (0, 4, 6)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a set, the same as a store of its own, texts, questions."""
    folder = tmp_path_factory.mktemp("report")
    path = make_store(folder)
    shares = {layer: tuple(1 / len(ids) for _ in ids) for layer, ids in KEPT.items()}
    make_set(path, "code", KEPT, pick_share=shares)
    compact(path, "code", folder / "small.edgemoe")
    rng = np.random.default_rng(0)
    for name in ("text", "other"):
        np.save(folder / f"{name}.npy", rng.integers(0, 400, 300))
    turns = [{"question": "who?", "answer": "nobody"}, {"question": "why?", "answer": "because"}]
    (folder / "q.jsonl").write_text(json.dumps({"turns": turns}), encoding="utf-8")
    return folder


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["bench", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def document(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One report of everything."""
    out = tmp_path_factory.mktemp("out") / "report.json"
    words = [
        folder / "tiny.edgemoe",
        "--sets",
        "code,code:exact",
        "--with",
        folder / "small.edgemoe",
    ]
    words += ["--text", folder / "text.npy", "--other-text", folder / "other.npy"]
    words += ["--questions", folder / "q.jsonl", "--json", out, "-p", 40, "-n", 40, "-r", 2]
    words += ["--curve-tokens", 200, "--eval-tokens", 200, "--context", 128]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_limits, "sweep_bytes", lambda: 8 << 20)
        assert main(["bench", *map(str, words)]) == 0
    return json.loads(out.read_text())


def rows_of(document: dict) -> dict[str, dict]:
    return {row["arm"]: row for row in document["rows"]}


def test_the_arms_have_one_budget_and_their_own_output(folder: Path, document: dict) -> None:
    rows = rows_of(document)
    assert list(rows) == ["full", "code, soft 0.4", "code, hard", "code, exact", "small"]
    share = load_index(folder / "tiny.edgemoe").expert_bytes // 4
    for row in rows.values():
        assert len(row["rounds"]) == 2
        for each in row["rounds"]:
            assert each["expert_cache_bytes"] == share // 4096 * 4096
            assert each["limiter"] in ("storage", "DRAM", "compute")
    hashes = {name: [each["output_hash"] for each in row["rounds"]] for name, row in rows.items()}
    assert hashes["code, exact"] == hashes["full"] and rows["code, exact"]["lossless"]
    assert hashes["small"] == hashes["code, hard"] != hashes["full"]
    assert hashes["code, soft 0.4"] not in (hashes["full"], hashes["code, hard"])
    assert [rows[name]["rounds"][0]["routing"] for name in ("full", "code, exact", "small")] == (
        [None] * 3
    )
    assert rows["code, hard"]["rounds"][0]["routing"] == "set code, hard"


def test_losses_and_answers_are_measured_against_the_full_model(document: dict) -> None:
    rows = rows_of(document)
    for name in ("text", "other"):
        losses = {arm: row["losses"][name] for arm, row in rows.items()}
        assert losses["full"]["kl"] is None and losses["code, exact"]["kl"] == 0
        assert losses["code, hard"] == losses["small"] and losses["code, hard"]["kl"] > 0
        assert losses["code, hard"]["other_perplexity"] == losses["full"]["perplexity"]
        assert losses["full"]["num_tokens"] == 199
    answers = {arm: row["answers"] for arm, row in rows.items()}
    assert answers["full"]["num_same"] == answers["code, exact"]["num_same"] == 1
    assert answers["small"]["texts"] == answers["code, hard"]["texts"]
    assert answers["full"]["num_answers"] == 2


def test_what_an_arm_is_and_what_its_caches_read(folder: Path, document: dict) -> None:
    rows, index = rows_of(document), load_index(folder / "tiny.edgemoe")
    hard, small, full = rows["code, hard"], rows["small"], rows["full"]
    assert hard["num_experts"] == small["num_experts"] == 11 and full["num_experts"] == 24
    assert hard["expert_bytes"] == small["expert_bytes"] == 11 * index.max_record_bytes
    assert abs(hard["stored_bytes"] - small["stored_bytes"]) < 16 << 10  # routers' rows, headers
    assert rows["code, soft 0.4"]["stored_bytes"] == full["stored_bytes"]
    assert full["removed_picks"] == {"text": None, "other": None}
    assert hard["removed_picks"] == small["removed_picks"]
    assert all(0.2 < share < 0.9 for share in hard["removed_picks"].values())
    assert rows["code, exact"]["curve"] == full["curve"]
    for own, other in zip(hard["curve"], small["curve"], strict=True):  # ties go by number
        assert own["hit_rate"] == pytest.approx(other["hit_rate"], abs=0.02)
    for row in rows.values():
        rates = [each["hit_rate"] for each in row["curve"]]
        assert rates == sorted(rates) and rates[-1] > 0
    for own, other in zip(hard["curve"][2:], full["curve"][2:], strict=True):
        assert own["bytes_per_token"] < other["bytes_per_token"]
    assert fewer_reads(full, hard) > 1


def test_the_tables_say_it_all(document: dict) -> None:
    text = tables(document, markdown=True)
    assert "| code, hard |" in text and "NOT IDENTICAL" not in text and "in domain" in text
    lines = [line for line in text.splitlines() if line.startswith("| code, soft 0.4 ")]
    assert len(lines) == 5
    document = json.loads(json.dumps(document))
    rows_of(document)["code, exact"]["rounds"][0]["output_hash"] = "0" * 16
    assert "NOT IDENTICAL: code, exact" in tables(document)


def test_the_picture(document: dict, tmp_path: Path) -> None:
    text = drawn(tmp_path, sets=document)["sets"]
    assert all(row["arm"] in text for row in document["rows"])
    assert "in domain" in text and "elsewhere" in text and "tokens/s" in text


def test_one_text_and_no_questions(folder: Path, capsys, monkeypatch) -> None:
    """The built-in text, one budget of the process, and Markdown on standard output."""
    monkeypatch.setattr(bench_limits, "sweep_bytes", lambda: 8 << 20)
    words = [folder / "tiny.edgemoe", "--with", folder / "small.edgemoe", "-p", 8, "-n", 8, "-r", 1]
    words += ["--memory", "2GiB", "--no-control", "--eval-tokens", 32, "--curve-tokens", 32]
    words += ["--active-experts", 1]
    code, out, _ = bench(capsys, *words)
    (line,) = [line for line in out.splitlines() if line.startswith("| 1 active experts | 24 |")]
    assert line.split("|")[-3].strip() == "changed"
    assert code == 0 and "the built-in text" in out and "elsewhere" not in out
    assert "right answers" not in out and "2.00 GiB for the process" in out


def test_the_limiter_is_what_takes_longest_alone() -> None:
    limits = {"storage_bytes_per_s": 100.0, "dram_bytes_per_s": 1000.0}

    def of(num_bytes: float, touched: float, no_read_s: float | None) -> tuple[str, float]:
        found = limiter({"bytes_read_per_token": num_bytes}, limits, touched, no_read_s)
        return found["limiter"], found["bound_s"]

    assert of(50, 100, 0.3) == ("storage", 0.5)
    assert of(10, 200, 0.3) == ("DRAM", 0.3)
    assert of(10, 100, 0.3) == ("compute", 0.3)
    assert of(10, 200, None) == ("DRAM", 0.2)


def test_picks_that_go() -> None:
    routes = np.array([[[0, 1], [2, 3]], [[1, 2], [3, -1]]])
    assert removed(routes, {0: (0, 1), 4: (3,)}) == pytest.approx(2 / 7)
    assert removed(routes, {0: (0, 1, 2), 4: (2, 3)}) == 0 and removed(routes, None) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sets", "cod"], "no set `cod`"),
        (["--sets", "code:firm"], "unknown set mode `firm`"),
        (["--sets", "code:hard:0.2"], "for soft sets only"),
        (["--sets", "code:soft:much"], "is no set with a mode"),
        (["--sets", "code,code:hard"], "two arms are called `code, hard`"),
        (["--sets", "code", "--with", "nowhere.edgemoe"], "no model at"),
        (["--sets", "code", "--memory", "1GiB,2GiB"], "one budget for all arms"),
        (["--sets", "code", "--set", "code"], "names its arms itself"),
        (["--sets", "code", "--ablation"], "two reports"),
        (["--sets", "code", "--questions", "none.jsonl"], "no questions at"),
        (["--sets", "code", "--text", "none.txt"], "no text at"),
        (["--sets", "code", "-p", "600"], "too many tokens"),
        (["--plot", "x.svg"], "draws what --sets measures"),
    ],
)
def test_what_cannot_be_meant(folder: Path, capsys, words: list[str], message: str) -> None:
    code, out, err = bench(capsys, folder / "tiny.edgemoe", *words)
    assert code in (2, 4) and not out and message in err


def test_a_store_of_another_model_is_no_arm(folder: Path, tmp_path: Path, capsys) -> None:
    other = make_store(tmp_path, vocab_size=480)
    code, _, err = bench(capsys, folder / "tiny.edgemoe", "--with", other)
    assert code == 2 and "another vocabulary or tokenizer" in err
