"""The commands that plan, make, show, check and measure stores, on a tiny one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_small import EXPERTS, LAYERS, Cli, caller, make

from edgemoe.runtime import core
from edgemoe.runtime.index import EXPERTS_FILE, load_index

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def checkpoint(made: tuple[Path, Path]) -> Path:
    return made[0]


@pytest.fixture
def store(made: tuple[Path, Path]) -> Path:
    return made[1]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return caller(capfd, monkeypatch)


# ---- plan, convert, inspect ---------------------------------------------------------------------


def test_plan_shows_every_line(run: Cli, store: Path, checkpoint: Path) -> None:
    code, out, _ = run("plan", store)
    assert code == 0
    for line in ("runtime", "trunk", "KV cache", "activations", "expert cache", "budget"):
        assert f"{line} " in out
    assert f"{LAYERS * EXPERTS} of {LAYERS * EXPERTS} experts, 100 %" in out
    # A checkpoint is planned as the store that would be made of it.
    assert run("plan", checkpoint)[1] == out
    smaller = json.loads(run("plan", checkpoint, "--bits", 2, "--json")[1])
    plan = json.loads(run("plan", store, "--json")[1])
    assert plan["fits"] and smaller["fits"]
    assert plan["budget_bytes"] == sum(line["num_bytes"] for line in plan["lines"])
    assert smaller["max_cache_bytes"] <= plan["max_cache_bytes"]
    longer = json.loads(run("plan", store, "--json", "--context", 128, "--kv-bits", 32)[1])
    kv = {line["name"]: line["num_bytes"] for line in longer["lines"]}["KV cache"]
    assert kv == LAYERS * 2 * 2 * 16 * 128 * 4


def test_plan_refuses_what_does_not_fit(run: Cli, store: Path) -> None:
    code, out, err = run("plan", store, "--memory", "10MiB")
    assert (code, out) == (3, "")
    assert "below the floor" in err and "    floor " in err
    code, out, _ = run("plan", store, "--memory", "10MiB", "--json")
    assert code == 3
    least = json.loads(out)
    assert least["fits"] is False
    assert run("plan", store, "--memory", least["floor_bytes"])[0] == 0
    assert run("plan", store, "--memory", least["floor_bytes"] - 1)[0] == 3


def test_plan_of_something_else(run: Cli, tmp_path: Path) -> None:
    code, _, err = run("plan", tmp_path)
    assert code == 4
    assert "neither a store nor a checkpoint" in err


def test_convert_dry_run_writes_nothing(run: Cli, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "dry.edgemoe"
    code, out, _ = run("convert", checkpoint, "--out", target, "--dry-run", "--bits", 8)
    assert code == 0
    assert "experts" in out and "total" in out
    assert not list(tmp_path.iterdir())
    plan = json.loads(run("convert", checkpoint, "--dry-run", "--json", "--bits", 8)[1])
    assert plan["bits"] == 8 and plan["output_bytes"] > 0


def test_convert_refuses_to_overwrite(run: Cli, checkpoint: Path, store: Path) -> None:
    before = sorted((file.name, file.stat().st_mtime_ns) for file in store.iterdir())
    code, _, err = run("convert", checkpoint, "--out", store)
    assert code == 2
    assert "already exists" in err
    assert before == sorted((file.name, file.stat().st_mtime_ns) for file in store.iterdir())


def test_convert_takes_formats(run: Cli, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.edgemoe"
    formats = ("--bits", 2, "--group-size", "channel", "--trunk-bits", 8)
    assert run("convert", checkpoint, "--out", target, *formats)[0] == 0
    store = json.loads(run("inspect", target, "--json")[1])
    experts = next(each for each in store["classes"] if each["name"] == "experts")
    assert all(name.startswith("2-bit") for name in experts["formats"])
    attention = next(each for each in store["classes"] if each["name"] == "trunk: attention")
    assert any(name.startswith("8-bit") for name in attention["formats"])
    assert run("run", target, "a", "-n", 1)[0] == 0


def test_inspect_adds_up(run: Cli, store: Path) -> None:
    document = json.loads(run("inspect", store, "--json")[1])
    index = load_index(store)
    assert document["num_experts"] == LAYERS * EXPERTS == len(index.records)
    assert document["bytes"] == sum(each["bytes"] for each in document["classes"])
    assert sum(layer["bytes"] for layer in document["layers"]) == index.expert_bytes
    assert {file["name"]: file["bytes"] for file in document["files"]} == {
        file.name: file.stat().st_size for file in store.iterdir()
    }
    assert document["provenance"]["bits"] == 4
    text = run("inspect", store, "--layers")[1]
    assert "olmoe" in text and EXPERTS_FILE in text
    table = text.split("gate|up / down")[1]
    assert all(f"\n{layer}  " in table for layer in range(LAYERS))


def test_inspect_names_what_a_store_was_made_of(run: Cli, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.edgemoe"
    shutil.copytree(store, copy)
    document = json.loads((copy / "store.json").read_text())
    document["plan"]["set"] = {"name": "code", "method": "reap"}
    (copy / "store.json").write_text(json.dumps(document))
    assert "set         code, by reap" in run("inspect", copy)[1]
    document["plan"]["set"] = ["reap"]
    (copy / "store.json").write_text(json.dumps(document))
    code, out, _ = run("inspect", copy)
    assert code == 0 and "`plan` of store.json is damaged" in out


# ---- verify, bench ------------------------------------------------------------------------------


def test_verify_compares_streamed_and_resident(run: Cli, store: Path) -> None:
    arguments = ("--tokens", 12, "--policies", "cycle,lru", "--threads", "1,2", "--json")
    code, out, _ = run("verify", store, *arguments)
    assert code == 0
    document = json.loads(out)
    assert document["ok"] and document["identical"]
    assert document["num_records"] == LAYERS * EXPERTS
    runs = document["runs"]
    assert len(runs) == 4 * 2 * 2
    assert len({each["logits_hash"] for each in runs}) == 1
    by_size = {each["budget"]: each["misses"] for each in runs if each["policy"] == "lru"}
    assert by_size["floor"] > by_size["half"] > by_size["resident"]
    other = json.loads(run("verify", store, "--tokens", 11, "--json")[1])
    assert other["runs"][0]["logits_hash"] != runs[0]["logits_hash"]


def test_verify_names_the_damaged_record(run: Cli, store: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.edgemoe"
    shutil.copytree(store, damaged)
    record = load_index(damaged).records[1, 5]
    with open(damaged / EXPERTS_FILE, "r+b") as file:
        file.seek(record.offset + 100)
        byte = file.read(1)[0]
        file.seek(record.offset + 100)
        file.write(bytes([byte ^ 1]))
    code, out, _ = run("verify", damaged)
    assert code == 1
    assert "BAD  expert record `layers.1.experts.5`" in out
    assert f"BAD  {EXPERTS_FILE}" in out
    assert out.count("BAD") == 2
    assert "logits" not in out
    document = json.loads(run("verify", damaged, "--quick", "--json")[1])
    assert document["damaged"] == [{"layer": 1, "expert": 5}, {"file": EXPERTS_FILE}]
    # A run that needs the record stops with its name instead of computing with it.
    code, _, err = run("run", damaged, "the router picks a few experts for every token")
    assert code == 1
    assert "`layers.1.experts.5` is unusable" in err


def test_verify_reports_a_difference(
    run: Cli, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemoe.cli import decode

    honest = decode.greedy

    def flawed(session, prompt, num_tokens):  # type: ignore[no-untyped-def]
        result = honest(session, prompt, num_tokens)
        if session.engine.cache.capacity_bytes < session.engine.plan.max_cache_bytes:
            result.logits_hash = "0" * 64
        return result

    monkeypatch.setattr(decode, "greedy", flawed)
    code, out, _ = run("verify", store, "--tokens", 2)
    assert code == 1
    assert "NOT IDENTICAL" in out


def test_verify_quick_and_policies(run: Cli, store: Path) -> None:
    code, out, _ = run("verify", store, "--quick")
    assert code == 0 and "logits" not in out and "the store is whole" in out
    code, _, err = run("verify", store, "--policies", "oracle")
    assert code == 2 and "policies: all, forecast, cycle" in err


def test_bench_measures_every_arm(store: Path, tmp_path: Path) -> None:
    """In a process of its own: what a test process has grown to would count against the budgets."""
    target = tmp_path / "bench.json"
    words = ["-p", "24", "-n", "6", "-r", "2", "--memory", "floor,1%,100%", "--json", str(target)]
    command = [sys.executable, "-m", "edgemoe", "bench", str(store), *words]
    plain = {name: os.environ[name] for name in os.environ if not name.startswith("EDGEMOE_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=plain)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    document = json.loads(target.read_text())
    floor, tiny, full = document["rows"]
    assert not full["is_control"]
    assert "below the floor" in tiny["error"] and not tiny["rounds"]
    assert f"1%: {tiny['error']}" in out
    for row in (floor, full):
        assert len(row["rounds"]) == 2
        for each in row["rounds"]:
            assert each["decode_tokens_per_s"] > 0 and each["ttft_s"] > 0
            assert each["peak_rss_bytes"] > 0
            assert each["reached"] > 0 and each["overlapped"] > 0
            rates = [name for name in each["limits"] if name.endswith("bytes_per_s")]
            assert len(rates) == 4 and all(each["limits"][name] > 0 for name in rates)
            assert len(each["limits_around"]) == 2
    assert [r["logits_hash"] for r in floor["rounds"]] == [r["logits_hash"] for r in full["rounds"]]
    assert floor["rounds"][0]["logits_hash"] != floor["rounds"][1]["logits_hash"]
    assert floor["rounds"][0]["bytes_read_per_token"] > 0 == full["rounds"][0]["prefill_bytes_read"]
    assert document["prompts"]["kind"] == "real" and "built-in text" in out
    assert "reached" in out and "round 2 of 2: 100%" in done.stderr


def test_bench_random_and_markdown(run: Cli, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgemoe.cli import bench_limits

    monkeypatch.setattr(bench_limits, "sweep_bytes", lambda: 8 << 20)
    size = ("-p", 8, "-n", 2, "-r", 1, "--memory", "4GiB", "--prompts", "random")
    code, out, _ = run("bench", store, *size, "--markdown")
    assert code == 0
    assert "random tokens" in out and "| 4GiB |" in out
    code, out, _ = run("bench", store, *size, "--json")
    assert json.loads(out)["prompts"]["kind"] == "random"


def test_bench_takes_a_prompt_that_the_context_has_room_for(
    run: Cli, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemoe.cli import bench_limits
    from edgemoe.models import parse_config
    from edgemoe.runtime.index import load_index

    monkeypatch.setattr(bench_limits, "sweep_bytes", lambda: 8 << 20)
    words = ("bench", store, "-n", 4, "-r", 1, "--memory", "4GiB", "--json")
    code, out, _ = run(*words)
    most = parse_config(load_index(store).config).max_context
    assert code == 0 and most < 512
    assert json.loads(out)["prompts"]["tokens"] == most - 4
    code, out, _ = run(*words, "--context", 20)
    assert json.loads(out)["prompts"]["tokens"] == 16
    assert run("bench", store, "-n", most)[0] == 2


def test_bench_refuses(run: Cli, store: Path, tmp_path: Path) -> None:
    assert run("bench", store, "--memory", "1%", "-r", 1, "-p", 8, "-n", 2)[0] == 3
    assert run("bench", store, "--memory", "0%")[0] == 2
    assert run("bench", store, "--json", tmp_path)[0] == 2
    assert run("bench", store, "-p", 8, "-n", 8, "--context", 4)[0] == 2
