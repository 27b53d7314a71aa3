"""Pruned sets at run time: what exact, soft and hard mean, reads, switching, labels."""

import hashlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
from sets_small import make_set
from stores import damage_record
from stores_small import make_store

from edgemoe.active_set import plan_with_set
from edgemoe.cli import main
from edgemoe.cli.chat_commands import handle
from edgemoe.cli.conversation import Conversation
from edgemoe.engine import Engine
from edgemoe.models.moe import Router
from edgemoe.runtime import core
from edgemoe.runtime.errors import RecordError, UsageError
from edgemoe.runtime.index import load_index
from edgemoe.sampling import SamplingParams
from edgemoe.session import Session

PROMPT = np.random.default_rng(7).integers(0, 400, 40).tolist()
KEPT = {0: (0, 2, 5, 6), 1: (1, 2, 3, 7), 2: (0, 4, 6)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = make_store(tmp_path_factory.mktemp("active"))
    shares = {layer: tuple(1 / len(ids) for ids in [KEPT[layer]] for _ in ids) for layer in KEPT}
    make_set(path, "code", KEPT, pick_share=shares)
    make_set(path, "prose", {0: (0, 1, 3), 1: (0, 4, 5), 2: (1, 2, 3)})
    return path


def answer_hash(engine: Engine, num_tokens: int = 12, num_prompt: int = 40) -> str:
    """sha256 of the logits of a greedy answer, from a session of its own."""
    digest, ids = hashlib.sha256(), PROMPT[:num_prompt]
    with Session(engine) as session:
        for _ in range(num_tokens):
            logits = session.logits(ids)
            digest.update(logits.tobytes())
            ids.append(int(logits.argmax()))
    return digest.hexdigest()


def small_cache(path) -> int:
    return 3 * load_index(path).max_record_bytes


def masked_keys(engine: Engine, kept=KEPT) -> list[int]:
    names = engine.cache.table.names
    return [key for key, (layer, expert) in enumerate(names) if expert not in kept[layer]]


class Logits:
    """A router's matrix whose product is given."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits

    def linear(self, x: np.ndarray) -> np.ndarray:
        return self.logits


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_masked_router_is_the_sliced_one(renormalise):
    """papers R8 in NumPy: the same ids and the same bits of every weight."""

    class Args:
        top_k, norm_topk = 3, renormalise

    logits = 2 * np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    mask = np.array([1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0], dtype=np.uint8)
    kept = np.flatnonzero(mask)
    router, sliced = Router(Args, Logits(logits)), Router(Args, Logits(logits[:, kept]))
    full_ids, full_weights = router(logits)
    router.set_mask(mask, 2.0)
    ids, weights = router(logits)
    few_ids, few_weights = sliced(logits)
    assert np.array_equal(ids, kept[few_ids]) and np.array_equal(weights, few_weights)
    router.set_mask(mask, 1.0)  # soft, with nobody that insists
    assert all(np.array_equal(*pair) for pair in zip(router(logits), (ids, weights), strict=True))
    router.set_mask(mask, 0.0)  # soft, with all that insist
    assert np.array_equal(router(logits)[0], full_ids)
    assert np.array_equal(router(logits)[1], full_weights)
    router.set_mask(None, 0.0)
    assert np.array_equal(router(logits)[1], full_weights)


@pytest.mark.skipif(core.lib is None, reason="native core not built")
@pytest.mark.parametrize("threshold", [2.0, 0.3, 0.0])
@pytest.mark.parametrize("renormalise", [False, True])
def test_the_core_chooses_as_the_reference_does(tmp_path, monkeypatch, threshold, renormalise):
    """Of the same router input, in every layer: the same ids, weights within rounding."""
    path = make_store(tmp_path, norm_topk_prob=renormalise)
    with Engine.from_pretrained(path, context=64) as engine, Session(engine) as session:
        masks = {layer: np.isin(np.arange(8), ids).astype(np.uint8) for layer, ids in KEPT.items()}
        engine._model.set_masks(masks, threshold)
        seen, run = [], engine._executor.run

        def watch(layer, x, ids, weights):
            seen.append((layer, x.copy(), ids.astype(np.int64), weights.copy()))
            return run(layer, x, ids, weights)

        monkeypatch.setattr(engine._executor, "run", watch)
        session.logits(PROMPT)
        outside = 0
        for layer, x, ids, weights in seen:
            router = Router(engine.args, engine._model._layers._weights[0][layer].router)
            router.set_mask(masks[layer], threshold)
            expected_ids, expected_weights = router(x)
            assert np.array_equal(ids, expected_ids)
            assert np.allclose(weights, expected_weights, rtol=2e-6, atol=1e-9)
            outside += int((masks[layer][ids] == 0).sum())
        assert len(seen) == 3 and (outside > 0) == (threshold < 1)


def test_exact_changes_no_bit_and_hard_does(path):
    options = {"context": 64}
    with Engine.from_pretrained(path, **options) as engine:
        full = answer_hash(engine)
    seen = {}
    for cache_bytes in (small_cache(path), None):
        for mode in ("exact", "hard"):
            with Engine.from_pretrained(
                path, set="code", set_mode=mode, cache_bytes=cache_bytes, **options
            ) as engine:
                seen.setdefault(mode, set()).add(answer_hash(engine))
                assert engine.report()["lossless"] == (mode == "exact")
    assert seen["exact"] == {full}
    assert len(seen["hard"]) == 1 and full not in seen["hard"]


NATIVE = pytest.mark.skipif(core.lib is None, reason="native core not built")


@pytest.mark.parametrize(
    ("backend", "cache", "size"),
    [
        pytest.param("native", "small", (12, 40), marks=NATIVE),
        pytest.param("native", "large", (12, 40), marks=NATIVE),
        ("reference", "small", (2, 8)),
    ],
)
def test_a_masked_expert_is_never_read(path, backend, cache, size):
    """By the reader's own clock of landed records; the same text reads them without a mask."""
    with Engine.from_pretrained(
        path,
        set="code",
        set_mode="hard",
        backend=backend,
        context=64,
        cache_bytes=small_cache(path) if cache == "small" else None,
    ) as engine:
        masked = masked_keys(engine)
        answer_hash(engine, *size)
        landed = np.asarray(engine.reader.landed_ns)
        assert not landed[masked].any() and landed.any()
        if cache == "large":
            assert (landed != 0).sum() == sum(map(len, KEPT.values()))
        engine.use_set(None)
        answer_hash(engine, *size)
        assert np.asarray(engine.reader.landed_ns)[masked].any()


def test_a_hard_set_in_memory_reads_nothing_after_warm_up(path):
    """No budget given: what keeps the set is enough, and less than what keeps all."""
    with Engine.from_pretrained(path, context=64) as engine:
        everything = engine.plan.budget_bytes
    with Engine.from_pretrained(path, set="code", set_mode="hard", context=64) as engine:
        before = engine.reader.stats()["num_reads"]
        assert before == sum(map(len, KEPT.values()))
        assert engine.plan.budget_bytes <= everything
        assert "11 of 11 experts of the set code, 100 %" in "\n".join(engine.plan.table())
        answer_hash(engine)
        assert engine.reader.stats()["num_reads"] == before
        assert engine.report()["resident"] and engine.cache.misses == 0


def test_sets_switch_without_a_reload(path):
    """Each state has the bits of an engine opened in it, whatever came before."""
    states = [(None, "exact"), ("code", "hard"), ("code", "soft"), ("prose", "hard")]
    states += [("code+prose", "hard"), ("code", "exact")]
    fresh = []
    for name, mode in states:
        options = {} if name is None else {"set": name, "set_mode": mode}
        with Engine.from_pretrained(path, context=64, **options) as engine:
            fresh.append(answer_hash(engine, 4))
    assert len(set(fresh)) == len(fresh) - 1 and fresh[0] == fresh[-1]
    with Engine.from_pretrained(path, context=64) as engine:
        for turn in (0, 1, 2, 0, 3, 4, 5, 1):
            engine.use_set(*states[turn])
            assert answer_hash(engine, 4) == fresh[turn], turn


def test_a_session_does_not_keep_what_another_set_computed(path):
    """A kept prefix has the bits of the present set; a switch in mid-answer is allowed."""
    with Engine.from_pretrained(path, context=64) as engine, Session(engine) as session:
        full = session.logits(PROMPT)
        engine.use_set("code", "hard")
        hard = session.logits(PROMPT)
        assert not np.array_equal(full, hard)
        engine.use_set("code", "exact")
        assert np.array_equal(session.logits(PROMPT), full)
        events = session.stream(PROMPT, SamplingParams(max_tokens=6))
        next(events)
        engine.use_set("prose", "hard")
        last = list(events)[-1]
        assert last.stats.routing == "set prose, hard"
        assert session.tokens[: len(PROMPT)] == PROMPT
        assert not np.array_equal(session.logits(PROMPT), full)  # computed anew, by prose alone
        engine.use_set(None)
        assert np.array_equal(session.logits(PROMPT), full)


def test_a_damaged_record_is_told_when_it_is_wanted(path, tmp_path):
    """Not while a set is warmed up: the other experts can be used."""
    copy = tmp_path / "copy.edgemoe"
    shutil.copytree(path, copy)
    damage_record(load_index(copy), 1, 5)
    make_set(copy, "bad", {0: (0, 1), 1: (1, 5), 2: (0, 1)})
    make_set(copy, "good", {0: (0, 1), 1: (1, 2), 2: (0, 1)})
    with Engine.from_pretrained(copy, set="bad", set_mode="hard", context=64) as engine:
        with pytest.raises(RecordError, match="layers.1.experts.5"):
            answer_hash(engine, 1)
        engine.use_set("good", "hard")
        assert answer_hash(engine, 1)


def test_soft_lies_between_hard_and_the_full_model(path):
    def hash_of(**options) -> str:
        with Engine.from_pretrained(path, context=64, **options) as engine:
            return answer_hash(engine)

    full, hard = hash_of(), hash_of(set="code", set_mode="hard")
    soft = {
        threshold: hash_of(set="code", set_mode="soft", set_threshold=threshold)
        for threshold in (0.0, 0.4, 1.0)
    }
    assert soft[0.0] == full and soft[1.0] == hard and soft[0.4] not in (full, hard)


def test_labels(path):
    with Engine.from_pretrained(path, context=64, set="code", set_mode="soft") as engine:
        stats = engine.generate(PROMPT, SamplingParams(max_tokens=3)).stats
        assert stats.to_dict()["routing"] == "set code, soft 0.4"
        assert stats.footer().endswith(" · set code, soft 0.4")
        report = engine.report()
        assert report["set"]["mode"] == "soft" and report["set"]["num_kept"] == 11
        assert report["set"]["changes_output"] and not report["lossless"]
        engine.use_set("code", "exact")
        stats = engine.generate(PROMPT, SamplingParams(max_tokens=3)).stats
        assert stats.routing is None and "set" not in stats.footer()
        assert engine.report()["lossless"] and engine.report()["set"]["name"] == "code"


def test_the_chat_command(path, capsys):
    with Engine.from_pretrained(path, context=64) as engine:
        conversation = Conversation(engine, SamplingParams(max_tokens=3))
        assert not handle(conversation, "/set set")
        assert "no set (there are: code, prose)" in capsys.readouterr().err
        handle(conversation, "/set set code hard")
        assert "set code, hard" in capsys.readouterr().err
        assert engine.active_set.expert_set.name == "code"
        for line in ("/set set nothing", "/set set code hrad", "/set set code soft much"):
            with pytest.raises(Exception, match="nothing|hrad|much"):
                handle(conversation, line)
        assert engine.active_set.mode == "hard"  # a refusal changes nothing
        handle(conversation, "/set set code soft 0.25")
        assert "soft 0.25" in capsys.readouterr().err
        handle(conversation, "/set set off")
        assert engine.active_set is None


def test_a_chat_switches_and_its_footers_say_so(path, capsys, monkeypatch):
    """One running session: the full model, a hard set, a soft one, exact, the full model again."""
    switches = ("off", "code hard", "code soft 0.25", "code exact", "off")
    script = "".join(f"/set set {words}\n/clear\nwhich way?\n" for words in switches)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(script.encode())))
    assert main(["chat", str(path), "-n", "8", "--context", "128"]) == 0
    printed = capsys.readouterr()
    footers = [line for line in printed.err.splitlines() if " tok · " in line]
    labels = [line.rsplit(" GiB", 1)[1] for line in footers]
    assert labels == ["", " · set code, hard", " · set code, soft 0.25", "", ""]
    with Engine.from_pretrained(path, context=128) as engine:
        asked = [{"role": "user", "content": "which way?"}]
        full = engine.generate(asked, SamplingParams(max_tokens=8)).text
        engine.use_set("code", "hard")
        hard = engine.generate(asked, SamplingParams(max_tokens=8)).text
    assert full != hard and printed.out.startswith(f"{full}\n{hard}\n")
    assert printed.out.endswith(f"{full}\n{full}\n")


def test_commands_label_what_they_print(path, tmp_path, capsys, monkeypatch):
    """`run --json`, `eval` against the full model, and `bench`."""
    from edgemoe.cli import bench_limits

    options = ["--set", "code", "--set-mode", "hard"]
    assert main(["run", str(path), "hello", "-n", "2", "--json", "--context", "64", *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stats"]["routing"] == "set code, hard"
    assert document["engine"]["set"]["mode"] == "hard" and not document["engine"]["lossless"]
    np.save(tmp_path / "text.npy", np.array(PROMPT))
    words = ["--text", str(tmp_path / "text.npy"), "--window", "32", "--json"]
    assert main(["eval", str(path), str(path), *words, *options]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["routing"] == "set code, hard" and document["kl"] > 0
    assert main(["eval", str(path), str(path), *words, "--set", "code"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["routing"] is None and document["kl"] == 0
    monkeypatch.setattr(bench_limits, "sweep_bytes", lambda: 8 << 20)
    words = ["-p", "16", "-n", "4", "-r", "1", "--memory", "1GiB", "--no-control", "--json"]
    assert main(["bench", str(path), *words, *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["rounds"][0]["routing"] == "set code, hard"


def test_the_plan_speaks_of_the_set(path, capsys):
    with Engine.from_pretrained(path, context=64, set="code", set_mode="hard") as engine:
        index, active = engine._index, engine.active_set
        full = engine._full_plan
        plan = plan_with_set(full, index, active)
        assert plan.num_experts == 11 and full.num_experts == 24
        assert sum(line.num_bytes for line in plan.lines) == plan.budget_bytes
        assert plan.max_cache_bytes == sum(
            index.records[p].num_bytes for p in active.expert_set.pairs
        )
        engine.use_set("code", "exact")
        assert engine.plan == full
    words = ["plan", str(path), "--context", "64", "--json"]
    assert main([*words, "--set", "code", "--set-mode", "hard"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_experts"], document["num_cached_experts"]) == (11, 11)
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["budget_bytes"] > document["budget_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set_mode": "hard"}, "a set mode without a set"),
        ({"set_threshold": 0.5}, "a set mode without a set"),
        ({"set": "code", "set_mode": "hard", "set_threshold": 0.5}, "for soft sets only"),
        ({"set": "code", "set_mode": "soft", "set_threshold": -0.1}, "expected 0 to 1"),
        ({"set": "code", "set_mode": "soft", "set_threshold": float("nan")}, "expected 0 to 1"),
        ({"set": "code", "set_mode": "firm"}, "set_mode"),
    ],
)
def test_options_that_cannot_be_meant(path, options, message):
    with pytest.raises(UsageError, match=message):
        Engine.from_pretrained(path, **options)
