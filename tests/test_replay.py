"""Recorded routing in the place of the routers: what fits, what is filled in, and what is run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import stores_small

from edgemoe.cli import bench_limits, main
from edgemoe.cli.bench_arms import decode_warm
from edgemoe.cli.bench_report import tables
from edgemoe.cli.replay import fit, replay, token_id
from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.runtime import core
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.index import load_index
from edgemoe.runtime.trace import Trace
from edgemoe.session import Session

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from make_store import main as make_store  # noqa: E402

LAYERS, EXPERTS, TOP_K = 3, 8, 2
native = pytest.mark.skipif(core.lib is None, reason="native core not built")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return stores_small.make_store(tmp_path_factory.mktemp("replay"), num_experts_per_tok=3)


def write_trace(path: Path, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, prompt=4, steps=10):
    rng = np.random.default_rng(4)
    ids = [[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(prompt + steps)]
    weights = rng.random((prompt + steps, layers, top_k)).astype(np.float32)
    trace = Trace(
        experts=np.array(ids, dtype=np.int32),
        weights=weights / weights.sum(axis=2, keepdims=True),
        phase=np.array([0] * prompt + [1] * steps, dtype=np.int8),
        num_experts=np.full(layers, experts),
        expert_bytes=np.full(layers, 1 << 15),
        model="Some-MoE",
    )
    trace.save(path)
    return trace


def test_a_trace_is_cut_into_its_prompt_and_its_steps(store, tmp_path):
    trace = write_trace(tmp_path / "t.trace")
    recorded = fit(tmp_path / "t.trace", load_index(store))
    assert (len(recorded.prompt), len(recorded.decoded)) == (4, 10) and recorded.notes == []
    assert np.array_equal(recorded.decoded.ids, np.sort(trace.experts[4:], axis=2))
    for step in range(4):
        for place in range(LAYERS):
            found = dict(
                zip(
                    recorded.prompt.ids[step, place].tolist(),
                    recorded.prompt.weights[step, place].tolist(),
                    strict=True,
                )
            )
            ids, weights = trace.experts[step, place].tolist(), trace.weights[step, place].tolist()
            assert found == dict(zip(ids, weights, strict=True))


def test_what_was_not_recorded_takes_the_next_token(store, tmp_path):
    trace = write_trace(tmp_path / "t.trace")
    trace.experts[:3, 2] = -1
    trace.experts[13, 0, 1] = -1
    trace.save(tmp_path / "t.trace")
    recorded = fit(tmp_path / "t.trace", load_index(store))
    assert np.array_equal(recorded.prompt.ids[0, 2], np.sort(trace.experts[3, 2]))
    assert np.array_equal(recorded.decoded.ids[9, 0], recorded.decoded.ids[8, 0])
    assert "4 of 42" in recorded.notes[0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"layers": 4}, "4 layers"),
        ({"layers": 2}, "2 layers"),
        ({"experts": 9}, "9 experts"),
        ({"top_k": 4}, "4 experts a token"),
        ({"steps": 0}, "no decoded tokens"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(store, tmp_path, shape, message):
    write_trace(tmp_path / "t.trace", **shape)
    with pytest.raises(UsageError) as caught:
        fit(tmp_path / "t.trace", load_index(store))
    assert message in caught.value.what + caught.value.why
    if "steps" not in shape:
        assert "make_store.py --like" in caught.value.next_step


def test_layers_are_cropped_where_asked(store, tmp_path):
    write_trace(tmp_path / "t.trace", layers=5)
    recorded = fit(tmp_path / "t.trace", load_index(store), LAYERS)
    assert recorded.decoded.ids.shape == (10, LAYERS, TOP_K)
    assert recorded.notes == ["only the first 3 of 5 layers are replayed"]


@native
def test_every_demand_is_that_of_the_trace(store, tmp_path):
    write_trace(tmp_path / "t.trace")
    recorded = fit(tmp_path / "t.trace", load_index(store))
    with Engine.from_pretrained(store, context=64) as engine:
        kv_cache = KVCache.for_model(engine.args, 64, 16)
        result = replay(engine, kv_cache, recorded.prompt, recorded.decoded)
        assert result.prefill["hits"] + result.prefill["misses"] == sum(
            len(np.unique(recorded.prompt.ids[:, place])) for place in range(LAYERS)
        )
        demand = sum(result.decode[name] for name in ("hits", "misses", "guessed"))
        assert demand == 10 * LAYERS * TOP_K
        assert kv_cache.offset == 14 and len(result.step_s) == len(result.token_ids) == 10
        kv_cache.trim(0)
        tokens = [token_id(i, engine.args.vocab) for i in range(14)]
        routes = [
            np.concatenate([getattr(recorded.prompt, name), getattr(recorded.decoded, name)])
            for name in ("ids", "weights")
        ]
        logits = engine.forward(tokens, kv_cache, "all", forced=tuple(routes))
        assert logits[4:].argmax(axis=1).tolist() == result.token_ids


@native
def test_the_warm_up_of_bench_decodes_nothing_that_is_measured(store, tmp_path, monkeypatch):
    """A cache learns from what it sees, and would know it."""
    write_trace(tmp_path / "t.trace")
    recorded = fit(tmp_path / "t.trace", load_index(store))
    prompt, num_tokens, fed = [5, 3, 9, 2], 3, []
    with Engine.from_pretrained(store, context=16, warm_start="off") as engine:
        forward, step = engine.forward, Session.step
        with monkeypatch.context() as patch:
            patch.setattr(
                engine,
                "forward",
                lambda *words, forced: (
                    fed.append(forced[0].tolist()) or forward(*words, forced=forced)
                ),
            )
            decode_warm(engine, recorded, num_tokens)
        warm_up, measured = recorded.prompt.ids.tolist(), recorded.decoded.ids.tolist()
        assert fed == [warm_up, *warm_up[:num_tokens], warm_up, *measured[:num_tokens]]
        fed.clear()
        monkeypatch.setattr(
            Session, "step", lambda session, token: fed.append(token) or step(session, token)
        )
        found, _ = decode_warm(engine, prompt, num_tokens)
        assert fed == prompt[:num_tokens] + found.token_ids[:-1]


def test_bench_replays_a_trace(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_limits, "sweep_bytes", lambda: 8 << 20)
    write_trace(tmp_path / "t.trace")
    words = ["bench", str(store), "--replay", str(tmp_path / "t.trace"), "-r", "1", "-n", "6"]
    words += ["--memory", "4GiB,3GiB", "--no-control", "--throttle", "500MB/s"]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prompts"]["kind"] == "replay" and document["prompts"]["tokens"] == 4
    assert document["decoded_tokens"] == 6 and document["throttle_bytes_per_s"] == 500_000_000
    first, second = (row["rounds"][0] for row in document["rows"])
    assert first["logits_hash"] == second["logits_hash"]
    assert "replays" in tables(document, markdown=True)
    assert main([*words, "--text", "a.txt"]) == 2
    assert main([*words, "--replay-layers", "2"]) == 2


@native
def test_a_store_is_made_for_a_trace(tmp_path):
    """36 layers of 128 experts would do as well; the record is a stated share of the recorded."""
    trace = write_trace(tmp_path / "t.trace", layers=2, experts=16, top_k=4)
    trace.expert_bytes[:] = 300_000
    trace.save(tmp_path / "t.trace")
    out = tmp_path / "like.edgemoe"
    words = ["--like", str(tmp_path / "t.trace"), "--fraction", "0.5", "--pool", "4"]
    assert make_store([*words, "--set", "vocab_size=1024", "--out", str(out)]) == 0
    index = load_index(out)
    assert index.layer_to_num_experts == {0: 16, 1: 16} and index.config["vocab_size"] == 1024
    assert 0.6 < index.max_record_bytes / 150_000 < 1.6
    recorded = fit(tmp_path / "t.trace", index)
    with Engine.from_pretrained(out, context=64) as engine:
        kv_cache = KVCache.for_model(engine.args, 64, 16)
        assert replay(engine, kv_cache, recorded.prompt, recorded.decoded).decode["misses"] >= 0
