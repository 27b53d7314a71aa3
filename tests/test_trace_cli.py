"""edgemoe trace record, replay and compare on a tiny store."""

import json
from pathlib import Path

import numpy as np
import pytest
from pictures import drawn
from stores_small import make_store

from edgemoe import cli
from edgemoe.cli import draw
from edgemoe.engine import Engine
from edgemoe.runtime import core
from edgemoe.runtime.trace import DECODE, PREFILL, Trace

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("trace"))


@pytest.fixture
def run(capfd):
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main(["trace", *map(str, arguments)])
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def recorded(store, tmp_path_factory) -> Path:
    """70 tokens in windows of 32."""
    folder = tmp_path_factory.mktemp("recorded")
    ids = np.random.default_rng(4).integers(0, 400, 70)
    np.save(folder / "ids.npy", ids)
    path = folder / "text.trace"
    arguments = ["--text", folder / "ids.npy", "--context", 32, "--out", path]
    assert cli.main(["trace", "record", str(store), *map(str, arguments)]) == 0
    return path


def test_a_recorded_text_has_the_routes_of_the_engine(store, recorded):
    trace = Trace.load(recorded)
    assert trace.num_steps == 70 and (trace.phase == DECODE).all()
    assert trace.metadata["fingerprint"] and trace.model == store.name.removesuffix(".edgemoe")
    ids = np.load(recorded.with_name("ids.npy")).tolist()
    with Engine.from_pretrained(store, context=32) as engine, engine.session() as session:
        found = []
        engine.on_route = lambda layer, ids, weights: found.append((ids, weights))
        for token in ids[32:64]:  # one by one, as they are decoded
            session.logits([*session.tokens, token])
        assert trace.table_bytes == sum(engine.cache.table.num_bytes)
    places = trace.num_places
    experts = np.stack([row for row, _ in found]).reshape(32, places, -1)
    weights = np.stack([row for _, row in found]).reshape(32, places, -1)
    assert np.array_equal(trace.experts[32:64], experts)
    assert np.array_equal(trace.weights[32:64], weights)


def test_a_prompt_is_prefill_and_its_answer_decoded(store, run, tmp_path):
    path = tmp_path / "a.trace"
    code, out, _ = run(
        "record", store, "--prompt", "hello", "--raw", "--tokens", 9, "--out", path, "--json"
    )
    trace = Trace.load(path)
    assert code == 0 and json.loads(out)["num_steps"] == trace.num_steps
    num_prompt = int((trace.phase == PREFILL).sum())
    assert num_prompt >= 1 and trace.num_steps - num_prompt <= 8  # the last is not fed again
    assert (np.diff(trace.phase) >= 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.trace"], "either --text FILE or --prompt"),
        (["--text", "a", "--prompt", "b", "--out", "x"], "either --text FILE or --prompt"),
        (["--prompt", "b"], "no --out"),
        (["--prompt", "b", "--out", "no/such/folder/x"], "its folder is not there"),
        (["--text", "missing.txt", "--out", "x.trace"], "no text at `missing.txt`"),
    ],
)
def test_record_refuses(store, run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("record", store, *arguments)
    assert code in (2, 4) and not out and message in err
    assert not list(tmp_path.iterdir())


def test_replay_says_what_each_policy_would_have_read(recorded, run):
    code, out, _ = run("replay", recorded, "--budgets", "10%,100%,16KiB", "--json")
    (found,) = json.loads(out)["traces"]
    assert code == 0 and found["num_replayed"] == 70 and len(found["budgets"]) == 3
    assert [b["below_floor"] for b in found["budgets"]] == [
        b["bytes"] < found["floor_bytes"] for b in found["budgets"]
    ]
    names = {"forecast", "cycle", "lru", "lfu", "fifo", "s3-fifo", "belady"}
    assert set(found["policies"]) == names
    whole = {row[1]["hits"] for row in found["policies"].values()}
    assert len(whole) == 1  # nothing is evicted
    assert set(found["predictors"]) == {"previous", "popular", "forecast", "oracle"}
    assert found["predictors"]["oracle"]["recall"] == 1.0
    code, out, _ = run("replay", recorded, "--policy", "lru,belady")
    assert code == 0 and "belady" in out and "fifo" not in out and "%*" in out


def test_a_npz_of_another_model_goes_through(run, tmp_path):
    rng = np.random.default_rng(0)
    experts = rng.integers(0, 40, (30, 7, 3)).astype(np.int16)
    experts[:5, 6] = -1
    np.savez_compressed(
        tmp_path / "third.npz",
        experts=experts,
        weights=rng.random(experts.shape).astype(np.float32),
        phase=np.array([0] * 10 + [1] * 20, dtype=np.int8),
        expert_bytes=rng.integers(1000, 2000, 7),
        num_experts=np.array(40),
        model=np.array("Third-Model-40E"),
    )
    code, out, _ = run("replay", tmp_path / "third.npz", "--json")
    (found,) = json.loads(out)["traces"]
    assert code == 0 and found["model"] == "Third-Model-40E" and found["num_replayed"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no trace given"),
        (["{trace}", "--policy", "arc"], "unknown eviction policy `arc`"),
        (["{trace}", "--budgets", "0%"], "`0%` is no budget"),
        (["{trace}", "--budgets", "much"], "`much` is no amount"),
        (["missing.trace"], "no trace at"),
        (["{folder}/ids.npy"], "neither a safetensors nor a .npz file"),
    ],
)
def test_replay_refuses(recorded, run, arguments, message):
    filled = [a.format(trace=recorded, folder=recorded.parent) for a in arguments]
    code, out, err = run("replay", *filled)
    assert code in (1, 2, 4) and not out and message in err and "Traceback" not in err


def test_plots_are_drawn(recorded, run, tmp_path):
    """Of what both commands say of a recording; their words are in the picture."""
    code, out, _ = run("replay", recorded, recorded, "--policy", "lru,belady", "--json")
    replayed = json.loads(out)["traces"]
    code, out, _ = run("compare", recorded, "--policy", "lru,fifo", "--json")
    texts = drawn(tmp_path, replayed=replayed, compared=json.loads(out))
    assert all(word in texts["replayed"] for word in ("belady", "lru", replayed[0]["model"]))
    assert all(f"{recorded.stem}, {policy}" in texts["compared"] for policy in ("lru", "fifo"))


def test_what_cannot_be_drawn_is_refused_by_name(recorded, run, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "find_spec", lambda name: None)
    for words in (("replay", recorded), ("compare", recorded, "--policy", "lru,fifo")):
        code, out, err = run(*words, "--plot", tmp_path / "p.svg")
        assert code == 2 and not out and "needs matplotlib" in err and "edgemoe[plot]" in err
    monkeypatch.setattr(draw, "find_spec", lambda name: True)
    assert "is no picture" in run("replay", recorded, "--plot", tmp_path / "p.txt")[2]
    missing = tmp_path / "none" / "p.svg"
    assert "its folder is not there" in run("replay", recorded, "--plot", missing)[2]


def test_compare_two_traces_and_two_policies(recorded, run, tmp_path):
    code, out, _ = run("compare", recorded, recorded, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["overlap"] == pytest.approx({"usage": 1, "hot_overlap": 1, "agreement": 1})
    assert found["curves"][0] == found["curves"][1]
    code, out, _ = run("compare", recorded, "--policy", "lru,forecast")
    assert code == 0 and "difference" in out and "reused" in out
    other = Trace.load(recorded)
    experts = other.experts.copy()
    experts[:, :, 0] = np.where((experts == 0).any(axis=2), experts[:, :, 0], 0)
    Trace(
        **{n: getattr(other, n) for n in ("weights", "phase", "num_experts", "expert_bytes")},
        experts=experts,
    ).save(tmp_path / "b.trace")
    code, out, _ = run("compare", recorded, tmp_path / "b.trace", "--json")
    assert 0 < json.loads(out)["overlap"]["agreement"] < 1


@pytest.mark.parametrize(
    "arguments", [[], ["{}"], ["{}", "{}", "--policy", "lru,fifo"], ["{}"] * 3]
)
def test_compare_refuses(recorded, run, arguments):
    code, _, err = run("compare", *(a.format(recorded) for a in arguments))
    assert code == 2 and "two traces, or one trace and two policies" in err
