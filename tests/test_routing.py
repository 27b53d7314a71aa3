"""Options that change routes: what they compute and read, that nothing of them stays, labels."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from sets_small import make_set
from stores_small import make_store

from edgemoe.cli import main
from edgemoe.cli.chat_commands import handle
from edgemoe.cli.conversation import Conversation
from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.models.fingerprint import checkpoint_fingerprint
from edgemoe.routing import Routing
from edgemoe.runtime import core
from edgemoe.runtime.errors import EdgeMoeError, UsageError
from edgemoe.runtime.index import load_index
from edgemoe.runtime.reference import softmax
from edgemoe.sampling import SamplingParams
from edgemoe.session import Session

PROMPT = np.random.default_rng(9).integers(0, 400, 40).tolist()
BACKENDS = ["reference"] + ["native"] * (core.lib is not None)
NATIVE = pytest.mark.skipif(core.lib is None, reason="native core not built")
OPTIONS = {"context": 64, "warm_start": "off"}
SMALL = 1 << 16  # of an expert cache


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = make_store(tmp_path_factory.mktemp("routing"), num_experts_per_tok=4)
    make_set(path, "five", dict.fromkeys(range(3), (0, 1, 2, 3, 4)))
    return path


@pytest.fixture(scope="module")
def thetas(path):
    """Files of thetas that are 1, and that are not."""
    rng = np.random.default_rng(10)
    files = {"ones": path.parent / "ones.safetensors", "random": path.parent / "random.safetensors"}
    for name, file in files.items():
        rows = {f"layers.{layer}.theta": np.ones((8, 64), np.float32) for layer in range(3)}
        if name == "random":
            for row in rows.values():
                row += 0.5 * rng.normal(size=row.shape).astype(np.float32)
        save_file(rows, file)
    return files


def opened(path, routing: Routing | None = None, **options) -> Engine:
    return Engine.from_pretrained(path, routing=routing, **(OPTIONS | options))


def logits_of(engine: Engine, ids=PROMPT, split: int = 20) -> np.ndarray:
    """Of a prompt of `split` tokens, and of the others one by one."""
    kv_cache = KVCache.for_model(engine.args, engine.context, 16)
    rows = [engine.forward(ids[:split], kv_cache, "all")]
    rows += [engine.forward([token], kv_cache) for token in ids[split:]]
    return np.concatenate(rows)


def landed(engine: Engine) -> np.ndarray:
    return np.asarray(engine.reader.landed_ns).reshape(3, 8) != 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_an_option_stays(path, thetas, backend):
    """Set and taken back in one engine: the bits of an engine that never had it."""
    ids, split = (PROMPT, 20) if backend == "native" else (PROMPT[:3], 2)
    tuned = Routing(tune="0:1=off,1:2=0.5,2:0=off,2:7=off")
    options = [Routing(active_experts=2), Routing(top_p=0.4), tuned]
    options += [Routing(compressed=str(thetas["random"])), Routing(drop_cold=0.9, max_dropped=1.0)]
    if backend == "reference":  # each takes seconds
        options = [Routing(top_p=0.4, tune=tuned.tune), options[-2], options[-1]]
    with opened(path, backend=backend, cache_bytes=SMALL) as engine:
        plain = logits_of(engine, ids, split)
        assert engine.report()["lossless"] and engine.report()["routing"] is None
        for routing in options:
            engine.use_routing(routing)
            assert not np.array_equal(logits_of(engine, ids, split), plain), routing
            assert not engine.report()["lossless"]
            engine.use_routing(None)
            assert np.array_equal(logits_of(engine, ids, split), plain), routing
        engine.use_routing(Routing(active_experts=4, top_p=1.0))
        assert np.array_equal(logits_of(engine, ids, split), plain)  # as many, and no fewer


@NATIVE
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_reads_shrink_with_the_active_experts(path, top_k):
    """SEER-MoE: bytes a token demands scale by k'/k."""
    demand = {}
    for routing in (None, Routing(active_experts=top_k)):
        with opened(path, routing) as engine:
            engine.take_step_stats()
            logits_of(engine, split=1)
            stats = engine.take_step_stats()
            demand[routing] = stats.hits + stats.misses + stats.guessed
    assert demand[routing] * 4 == demand[None] * top_k


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_that_is_off_is_neither_chosen_nor_read(path, tmp_path, backend):
    """papers 3.11; by flag and by file, and with a set on top."""
    ids, split = (PROMPT, 20) if backend == "native" else (PROMPT[:3], 2)
    off = {0: [0, 3, 6], 2: [1]}
    experts = {f"{layer}:{expert}": "off" for layer in off for expert in off[layer]}
    file = tmp_path / "tuning.json"
    mark = checkpoint_fingerprint(load_index(path))
    file.write_text(json.dumps({"experts": experts | {"1:1": 1.5}, "fingerprint": mark}))
    flag = ",".join([*(f"{name}=off" for name in experts), "1:1=1.5"])
    with opened(path, backend=backend) as engine:
        logits_of(engine, PROMPT[:12], 12)
        assert any(landed(engine)[layer, expert] for layer in off for expert in off[layer])
    rows = []
    for tune in (str(file), flag):
        with opened(path, Routing(tune=tune), backend=backend) as engine:
            seen = []
            engine.on_route = lambda layer, ids, _, seen=seen: seen.append((layer, ids))
            rows.append(logits_of(engine, ids, split))
            for layer, ids_of in seen:
                assert not np.isin(ids_of, off.get(layer, [])).any()
            assert not any(landed(engine)[layer, expert] for layer in off for expert in off[layer])
    assert np.array_equal(*rows)
    routing = Routing(tune="0:1=off")
    with opened(path, routing, backend=backend, set="five", set_mode="hard") as engine:
        engine.on_route = lambda layer, ids, _: seen.append((layer, ids))
        seen.clear()
        logits_of(engine, ids, split)
        assert {int(e) for layer, row in seen if layer == 0 for e in row.flatten()} == {0, 2, 3, 4}
        assert engine.routing.label == "set five, hard, tuned experts"


def plain_top(path, num_active: int, **options) -> np.ndarray:
    with opened(path, Routing(active_experts=num_active), **options) as engine:
        return logits_of(engine)


@NATIVE
@pytest.mark.parametrize("num_active", [None, 1, 3])
def test_thetas_of_one_are_plain_top_k(path, thetas, num_active):
    """2503.00634 with theta = 1, bit for bit; auxiliary experts read nothing."""
    routing = Routing(compressed=str(thetas["ones"]), active_experts=num_active)
    expected = plain_top(path, num_active or 2)
    with opened(path, routing) as engine:
        engine.take_step_stats()
        assert np.array_equal(logits_of(engine), expected)
        assert np.array_equal(logits_of(engine, split=1), expected)
        stats = engine.take_step_stats()
        assert engine.report()["routing"]["mean_active_experts"] == (num_active or 2)
        demanded = stats.hits + stats.misses + stats.guessed
        assert demanded - 40 * 3 * (num_active or 2) <= 3 * 8 + 20 * 3 * (num_active or 2)


@NATIVE
@pytest.mark.parametrize("renormalise", [False, True])
def test_compressed_experts_are_the_formula(tmp_path, thetas, monkeypatch, renormalise):
    """Mains take x * sum of a' theta, weights those of plain top-k_m; core and reference alike."""
    path = make_store(tmp_path, num_experts_per_tok=4, norm_topk_prob=renormalise)
    routing = Routing(compressed=str(thetas["random"]), active_experts=1)
    given = {}
    for backend in BACKENDS:
        with opened(path, routing, backend=backend) as engine:
            seen, run = given.setdefault(backend, []), engine._executor.run
            logits_of(engine, PROMPT[:6], 6)
            attend = engine._model._layers.attend
            normed = []

            def watch(layer, x, kv_cache, routed, ids, attend=attend, normed=normed):
                attend(layer, x, kv_cache, routed, ids)
                normed.append(routed.normed.copy())

            def keep(layer, x, ids, weights, run=run, seen=seen, normed=normed):
                seen.append((layer, normed[-1], x.copy(), ids.astype(np.int64), weights.copy()))
                return run(layer, x, ids, weights)

            monkeypatch.setattr(engine._model._layers, "attend", watch)
            monkeypatch.setattr(engine._executor, "run", keep)
            logits_of(engine, PROMPT[:6], 6)
            for layer, x, inputs, ids, weights in seen:
                router = engine._model._layers.weights[layer].router
                scores = softmax(router.linear(x))
                order = (-scores).argsort(axis=-1)
                top = np.take_along_axis(scores, order, axis=-1)
                main, auxiliary = order[:, :1], order[:, 1:4]
                share = top[:, 1:4] / top[:, 1:4].sum(axis=-1, keepdims=True)
                theta = engine._prepared.thetas[layer][auxiliary]
                expected = x * (share[..., None] * theta).sum(axis=1)
                assert np.allclose(inputs, expected, rtol=1e-4, atol=1e-5)
                assert np.array_equal(ids[:, :1], main) and (ids[:, 1:] == -1).all()
                weight = np.ones_like(top[:, :1]) if renormalise else top[:, :1]
                assert np.allclose(weights[:, :1], weight, rtol=1e-5)


@NATIVE
@pytest.mark.parametrize("prefetch", ["none", "router"])
def test_cold_experts_are_left_out_within_bounds(path, prefetch):
    """Of the first layer, whose routes nothing else changes: what goes is light and absent, the
    largest stays, and weights stay as they are. What a cache holds is never dropped."""
    with opened(path, prefetch=prefetch) as engine:
        full = []
        engine.on_route = lambda layer, *routes: layer or full.append(routes)
        plain = logits_of(engine, split=1)
        engine.on_route = None
        engine.warm_up()
        logits_of(engine)  # every expert that is wanted is in memory
        engine.use_routing(Routing(drop_cold=1.0, max_dropped=1.0))
        assert np.array_equal(logits_of(engine, split=1), plain)
        assert engine.report()["routing"]["dropped"] == 0
    for limit in (0.1, 1.0):
        routing = Routing(drop_cold=0.2, max_dropped=limit)
        with opened(path, routing, cache_bytes=SMALL, prefetch=prefetch) as engine:
            seen, num_picks, num_gone = [], 0, 0
            engine.on_route = lambda layer, *routes, seen=seen: layer or seen.append(routes)
            logits_of(engine, split=1)
            for (ids, weights), (left, left_weights) in zip(full, seen, strict=True):
                is_left = np.isin(ids[0], left[0])
                num_picks, num_gone = num_picks + 4, num_gone + int((~is_left).sum())
                assert np.array_equal(left[0, : is_left.sum()], ids[0, is_left])
                assert np.array_equal(left_weights[0, : is_left.sum()], weights[0, is_left])
                assert is_left[int(weights[0].argmax())]
                assert (weights[0, ~is_left] < 0.2 * weights[0].sum()).all()
                assert (left[0, is_left.sum() :] == -1).all()
            report = engine.report()["routing"]
            assert report["dropped"] >= num_gone > 0 and report["depends_on_memory"]
            assert report["dropped"] <= limit * 40 * 3 * 4
            mean_active = 4 - report["dropped"] / (40 * 3)
            assert report["mean_active_experts"] == pytest.approx(mean_active)


def test_cold_experts_in_the_reference():
    """The twin's rule on its own: lightest first, within the cap, never the largest."""
    from edgemoe.runtime.cold import ColdRule

    rule = ColdRule(0.3, 0.5)
    ids = np.array([1, 4, 6, -1])
    weights = np.array([0.05, 0.1, 0.5, 0.0], dtype=np.float32)
    where = {10: 0, 11: 0, 14: 0, 16: 0}
    left = rule.left_of(ids, weights, lambda keys: [where[k] for k in keys], 10)
    assert left[0].tolist() == [4, 6, -1, -1] and left[1].tolist() == [*weights[1:3], 0.0, 0.0]
    left = rule.left_of(ids, weights, lambda keys: [where[k] for k in keys], 10)
    assert left[0].tolist() == [6, -1, -1, -1] and rule.num_dropped == 3 and rule.num_picks == 6
    left = rule.left_of(ids, weights, lambda keys: [1] * len(keys), 10)
    assert left[0].tolist() == ids.tolist() and rule.num_dropped == 3


@NATIVE
def test_a_session_computes_anew_what_another_routing_computed(path):
    with opened(path) as engine, Session(engine) as session:
        plain = session.logits(PROMPT)
        engine.use_routing(Routing(active_experts=1))
        few = session.logits(PROMPT)
        assert not np.array_equal(few, plain)
        engine.use_routing(None)
        assert np.array_equal(session.logits(PROMPT), plain)
    with opened(path, Routing(active_experts=1)) as engine, Session(engine) as session:
        assert np.array_equal(session.logits(PROMPT), few)


@NATIVE
def test_labels(path, tmp_path, capsys):
    routing = Routing(active_experts=2, drop_cold=0.2)
    label = "2 active experts, cold experts below 0.2 dropped"
    with opened(path, routing, cache_bytes=SMALL) as engine:
        stats = engine.generate(PROMPT, SamplingParams(max_tokens=8)).stats
        assert stats.routing == label and 1 <= stats.active_experts <= 2
        assert label in stats.footer() and "experts a layer" in stats.footer()
        assert stats.to_dict()["dropped"] == stats.dropped
    words = ["run", str(path), "hello", "-n", "3", "--json", "--context", "64"]
    assert main([*words, "--active-experts", "2", "--router-top-p", "0.5"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stats"]["routing"] == "2 active experts, router top-p 0.5"
    assert not document["engine"]["lossless"] and document["engine"]["routing"]["top_p"] == 0.5
    np.save(tmp_path / "text.npy", np.array(PROMPT))
    words = ["eval", str(path), str(path), "--text", str(tmp_path / "text.npy"), "--window", "32"]
    assert main([*words, "--json", "--active-experts", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["routing"] == "2 active experts" and document["kl"] > 0
    assert document["mean_active_experts"] == 2 and document["dropped"] == 0
    assert main([*words, "--json", "--drop-cold", "0.9"]) == 0  # all are in memory, once read
    assert json.loads(capsys.readouterr().out)["routing"] == "cold experts below 0.9 dropped"


@NATIVE
def test_the_chat_command(path, capsys):
    with opened(path) as engine:
        conversation = Conversation(engine, SamplingParams(max_tokens=3))
        handle(conversation, "/set routing")
        assert "the model's own routes" in capsys.readouterr().err
        handle(conversation, "/set routing active-experts 2 drop-cold 0.1")
        assert "2 active experts, cold experts below 0.1" in capsys.readouterr().err
        before = engine.routing
        for line, message in (
            ("top-p 0.9", "`top-p` cannot be set so"),
            ("drop-cold", "`drop-cold` cannot be set so"),
            ("drop-cold much", "is no number"),
            ("active-experts 9", "9 active experts are too many"),
        ):
            with pytest.raises(EdgeMoeError, match=message):
                handle(conversation, f"/set routing {line}")
        assert engine.routing == before
        handle(conversation, "/set routing off")
        assert engine.routing is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active_experts": 5}, "5 active experts are too many"),
        ({"active_experts": 0}, "no number of active experts"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"top_p": 1.1}, "`top_p`"),
        ({"top_p": float("nan")}, "`top_p`"),
        ({"drop_cold": -0.1}, "`drop_cold`"),
        ({"drop_cold": 0.1, "max_dropped": 0.0}, "`max_dropped`"),
        ({"max_dropped": 0.5}, "without `drop_cold`"),
        ({"tune": "3:1=off"}, "layer 3 has no experts"),
        ({"tune": "0:8=off"}, "no such expert"),
        ({"tune": "0=off"}, "names no expert"),
        ({"tune": "0:1=much"}, "is no gain"),
        ({"tune": "0:1=-1"}, "is no gain"),
        ({"tune": ",".join(f"1:{e}=off" for e in range(5))}, "too many experts of layer 1"),
        ({"tune": "absent.json"}, "no tuning at"),
        ({"compressed": "absent.safetensors"}, "no thetas at"),
    ],
)
def test_options_that_cannot_be_meant(path, options, message):
    with pytest.raises(EdgeMoeError, match=message):
        opened(path, Routing(**options))


def test_files_that_do_not_go_with_the_model(path, thetas, tmp_path):
    rows = {f"layers.{layer}.theta": np.ones((8, 64), np.float32) for layer in range(3)}
    file, tuning = tmp_path / "theta.safetensors", tmp_path / "tuning.json"
    for wrong, metadata, message in (
        (
            {"layers.1.theta": np.ones((7, 64), np.float32)},
            None,
            r"expected real numbers \[8, 64\]",
        ),
        ({"layers.1.theta": np.ones((8, 64), np.int32)}, None, "I32"),
        ({"layers.9.theta": np.ones((1, 1), np.float32)}, None, None),
        ({}, {"fingerprint": "0" * 32}, "another checkpoint"),
    ):
        save_file(rows | wrong, file, metadata)
        if message is None:
            opened(path, Routing(compressed=str(file))).close()
            continue
        with pytest.raises(EdgeMoeError, match=message):
            opened(path, Routing(compressed=str(file)))
    del rows["layers.2.theta"]
    save_file(rows, file)
    with pytest.raises(EdgeMoeError, match=r"no tensor `layers.2.theta`"):
        opened(path, Routing(compressed=str(file)))
    file.write_bytes(b"no safetensors")
    with pytest.raises(EdgeMoeError, match="is damaged"):
        opened(path, Routing(compressed=str(file)))
    for text, message in (
        ("[]", "no tuning file"),
        ('{"experts": []}', "no tuning file"),
        ('{"experts": {"0:1": "off"}, "fingerprint": "x"}', "another checkpoint"),
        ('{"experts": {}}', "tunes no expert"),
    ):
        tuning.write_text(text)
        with pytest.raises(EdgeMoeError, match=message):
            opened(path, Routing(tune=str(tuning)))
    with opened(path, Routing(tune="0:0=off,0:1=off")) as engine:
        before = engine.routing
        with pytest.raises(UsageError, match="too many experts of layer 0"):
            engine.use_set("five", "hard")
        with pytest.raises(EdgeMoeError, match="too many"):
            engine.use_routing(Routing(active_experts=9))
        assert engine.routing == before and engine.active_set is None
