"""Second records at fewer bits: the file, the rule, core and twin alike, nothing left when off."""

import json
import shutil

import numpy as np
import pytest
from stores_small import make_store
from tiny_checkpoint import make_checkpoint

from edgemoe.cli import main
from edgemoe.cli.chat_commands import handle
from edgemoe.cli.conversation import Conversation
from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.models.steps import Routed
from edgemoe.quant.convert import convert
from edgemoe.quant.options import ConvertOptions
from edgemoe.quant.progress import Silent
from edgemoe.quant.stand_ins import make_stand_ins
from edgemoe.routing import Routing
from edgemoe.runtime import core, kernels
from edgemoe.runtime.errors import EdgeMoeError, FormatError, NotFoundError, RecordError, UsageError
from edgemoe.runtime.index import load_index
from edgemoe.runtime.reference import silu
from edgemoe.runtime.stand_ins import STAND_INS_FILE, StandInRule
from edgemoe.sampling import SamplingParams

PROMPT = np.random.default_rng(9).integers(0, 400, 40).tolist()
BACKENDS = ["reference"] + ["native"] * (core.lib is not None)
NATIVE = pytest.mark.skipif(core.lib is None, reason="native core not built")
OPTIONS = {"context": 64, "warm_start": "off", "prefetch": "none"}
TWO_BITS = ConvertOptions(bits=2, group_size=32)
SMALL = 6 * 20480  # of an expert cache: six records of 24


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = make_store(tmp_path_factory.mktemp("stand-ins"), bits=8, num_experts_per_tok=4)
    make_stand_ins(path, TWO_BITS)
    return path


def opened(path, after: float | None = None, **options) -> Engine:
    routing = None if after is None else Routing(stand_in=after)
    return Engine.from_pretrained(path, routing=routing, **(OPTIONS | options))


def logits_of(engine: Engine, ids=PROMPT, split: int = 20) -> np.ndarray:
    """Of a prompt of `split` tokens, and of the others one by one."""
    kv_cache = KVCache.for_model(engine.args, engine.context, 16)
    rows = [engine.forward(ids[:split], kv_cache, "all")]
    for token in ids[split:]:
        rows.append(engine.forward([token], kv_cache))
        assert engine.cache.resident_bytes <= engine.cache.capacity_bytes
        assert engine.cache.pinned_bytes == 0
    return np.concatenate(rows)


def twin_logits_of(engine: Engine, ids=PROMPT, split: int = 20) -> np.ndarray:
    """The same with the layers' experts run by the Python executor."""
    kv_cache = KVCache.for_model(engine.args, engine.context, 16)
    rows = [engine.forward(ids[:split], kv_cache, "all")]
    for token in ids[split:]:
        with engine.steps() as steps:
            x, routed = steps.embed(np.array([token])), Routed.room(engine.args, 1)
            for layer in range(engine.args.num_layers):
                steps.attend(layer, x, kv_cache, routed, np.array([token]))
                y = steps.experts.run(layer, *routed)
                steps.finish(layer, x, routed, y)
            kv_cache.advance(1)
            rows.append(steps.logits(x))
    return np.concatenate(rows)


def state(engine: Engine) -> tuple:
    """What was demanded, how often a stand-in was taken, and what is in memory."""
    stats = engine.take_step_stats()
    counts = (stats.hits, stats.misses, stats.bytes_read)
    return *counts, engine.routing_counts().num_stand_ins, engine.cache.resident_mask().tolist()


# ---- the rule -----------------------------------------------------------------------------------


def test_the_rule():
    """HOBBIT's T1 by hand: absent, smaller, more than `after` gone before it, most weight first."""
    rule = StandInRule(0.5)
    weights = np.array([0.1, 0.5, 0.3, 0.1], dtype=np.float32)
    sizes = [8] * 8 + [4] * 7 + [8]  # the stand-in of record 7 is as large as it is
    there = {3: 0, 4: 0, 5: 0, 7: 0}

    def keys_of(keys=(3, 4, 5, 7), weights=weights):
        return rule.keys_of(list(keys), weights, lambda k: [there[i] for i in k], sizes, 8)

    # Shares before: 4: 0, 5: .5 (not more than .5), 3: .8, 7: .9 (not smaller).
    assert keys_of() == [11, 4, 5, 7] and rule.num_used == 1
    there[3] = 1
    assert keys_of() == [3, 4, 5, 7] and rule.num_used == 1
    there[3], rule.after = 0, 0.0
    assert keys_of() == [11, 4, 13, 7]
    equal = np.full(3, 0.25, dtype=np.float32)  # of equal ones the first is the largest
    assert keys_of((3, 4, 5), equal) == [3, 12, 13]
    rule.after = 1.0
    assert keys_of() == [3, 4, 5, 7]


@NATIVE
@pytest.mark.parametrize(
    "options",
    [{}, {"stand_in": 0.3}, {"stand_in": 0.7}, {"drop_cold": 0.2}, {"active_experts": 3}],
    ids=str,
)
def test_core_and_twin_are_one_rule(path, options):
    """Bits of the logits, demand, and what is in memory afterwards."""
    seen = []
    routing = Routing(**({"stand_in": 0.0} | options))
    for run in (logits_of, twin_logits_of):
        with Engine.from_pretrained(path, routing=routing, cache_bytes=SMALL, **OPTIONS) as engine:
            engine.take_step_stats()
            seen.append((run(engine), *state(engine)))
            assert (engine.routing_counts().num_dropped > 0) == (routing.drop_cold is not None)
    assert np.array_equal(seen[0][0], seen[1][0])
    assert seen[0][1:] == seen[1][1:]
    assert seen[0][4] > 0


def test_the_reference_backend(path):
    with opened(path, 0.3, cache_bytes=SMALL, backend="reference") as engine:
        engine.take_step_stats()
        rows, *counts = logits_of(engine, PROMPT[:6], 2), *state(engine)
    if core.lib is None:
        assert counts[3] > 0
        return
    with opened(path, 0.3, cache_bytes=SMALL) as engine:
        engine.take_step_stats()
        expected = logits_of(engine, PROMPT[:6], 2)
        assert list(state(engine)) == counts
    assert np.linalg.norm(rows - expected) < 0.1 * np.linalg.norm(
        expected
    )  # the core rounds activations


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_computed(path, backend):
    """y of one token: the full record of the first expert, 2 bits of the others, since nothing else
    is in memory; once their full records are, those."""
    x = np.random.default_rng(1).normal(size=(1, 64)).astype(np.float32)
    ids = np.array([[1, 3, 4, 6]])
    weights = np.array([[0.1, 0.4, 0.3, 0.2]], dtype=np.float32)
    with opened(path, 0.0, backend=backend) as engine:
        cache, table = engine.cache, engine.cache.table

        def expert(key: int) -> np.ndarray:
            cache.begin_layer(1)
            cache.hint([key])
            cache.wait(key)
            parts = kernels.unpack_record(cache.view(key).copy(), table.layouts[key])
            cache.release([key])
            gate, up, down = parts
            return (silu(x @ gate.T) * (x @ up.T)) @ down.T

        first = table.first_key[1]
        engine.take_step_stats()
        y = engine._executor.run(1, x, ids, weights)
        stats = engine.take_step_stats()
        keys = [first + 8 + 1, first + 3, first + 8 + 4, first + 8 + 6]
        assert stats.bytes_read == sum(table.num_bytes[key] for key in keys)
        assert np.flatnonzero(cache.resident_mask()).tolist() == sorted(keys)
        expected = sum(w * expert(key) for w, key in zip(weights[0], keys, strict=True))
        assert np.allclose(y, expected, rtol=5e-2, atol=5e-2 * float(np.abs(expected).max()))
        full = [expert(first + e) for e in ids[0].tolist()]
        y = engine._executor.run(1, x, ids, weights)
        expected = sum(w * part for w, part in zip(weights[0], full, strict=True))
        assert np.allclose(y, expected, rtol=5e-2, atol=5e-2 * float(np.abs(expected).max()))
        assert engine._executor.stand_ins.num_used == 3
        engine.use_routing(None)
        assert np.array_equal(engine._executor.run(1, x, ids, weights), y)


# ---- nothing is left of it ----------------------------------------------------------------------


@NATIVE
@pytest.mark.parametrize("prefetch", ["none", "previous", "router"])
def test_off_is_bit_identical(path, prefetch):
    """Taken back, never reached, or nothing absent: the bits of an engine without stand-ins."""
    with opened(path, cache_bytes=SMALL, prefetch=prefetch) as engine:
        plain = logits_of(engine)
        assert engine.report()["lossless"]
    with opened(path, 0.0, cache_bytes=SMALL, prefetch=prefetch) as engine:
        assert not np.array_equal(logits_of(engine), plain)
        assert not engine.report()["lossless"]
        engine.use_routing(None)
        assert engine.report()["lossless"] and np.array_equal(logits_of(engine), plain)
        engine.use_routing(Routing(stand_in=1.0))
        assert np.array_equal(logits_of(engine), plain)
        engine.use_routing(Routing(stand_in=0.0, active_experts=1))
        assert engine.routing.label == "1 active experts, stand-ins after 0"
    with opened(path, 0.0, prefetch=prefetch) as engine:
        engine.cache.preload()
        assert np.array_equal(logits_of(engine), plain)
        assert engine.routing_counts().num_stand_ins == 0


@NATIVE
def test_prompts_use_full_records_and_tokens_read_less(path):
    read = {}
    for after in (None, 0.6, 0.0):
        with opened(path, after, cache_bytes=SMALL) as engine:
            engine.take_step_stats()
            whole = logits_of(engine, split=40)
            assert engine.routing_counts().num_stand_ins == 0
            prompt = engine.take_step_stats().bytes_read
            logits_of(engine, split=1)
            read[after] = (whole, prompt, engine.take_step_stats().bytes_read)
    assert np.array_equal(read[None][0], read[0.0][0])
    assert read[None][1] == read[0.0][1]
    assert read[0.0][2] < read[0.6][2] < read[None][2]


@NATIVE
def test_what_is_said(path, tmp_path, capsys):
    with opened(path, 0.1, cache_bytes=SMALL) as engine:
        stats = engine.generate(PROMPT, SamplingParams(max_tokens=8)).stats
        assert stats.routing == "stand-ins after 0.1" and stats.stand_ins > 0
        assert "stand-ins after 0.1" in stats.footer() and "stand-ins a token" in stats.footer()
        report = engine.report()["routing"]
        assert report["stand_ins"] == stats.stand_ins and report["depends_on_memory"]
        assert report["stand_in"] == 0.1
    words = ["run", str(path), "hello", "-n", "3", "--json", "--context", "64", "--stand-in", "0"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert not document["engine"]["lossless"] and document["stats"]["stand_ins"] > 0
    np.save(tmp_path / "text.npy", np.array(PROMPT))
    words = ["eval", str(path), str(path), "--text", str(tmp_path / "text.npy"), "--window", "32"]
    assert main([*words, "--json", "--stand-in", "0"]) == 0  # token by token
    document = json.loads(capsys.readouterr().out)
    assert document["stand_ins"] > 0 and document["kl"] > 0
    assert main(["verify", str(path), "--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_records"] == 24 and document["num_stand_ins"] == 24
    assert main(["inspect", str(path)]) == 0
    assert "stand-ins   8.00 KiB each, 2-bit sym g32" in capsys.readouterr().out
    assert main(["plan", str(path)]) == 0
    assert "stand-ins of 8.00 KiB (192 KiB on disk)" in capsys.readouterr().out


# ---- the file -----------------------------------------------------------------------------------


def test_from_where_it_was_made(path, tmp_path):
    """From the checkpoint and from the store: the right shape; from another model: refused."""
    source = path.parent / "source"
    fine = convert(source, tmp_path / "fine.edgemoe", ConvertOptions(bits=16))
    target = convert(source, tmp_path / "t.edgemoe", ConvertOptions(bits=4, group_size=32))
    made = [make_stand_ins(target, TWO_BITS, each).read_bytes() for each in (source, fine, target)]
    records = [data[-24 * (8192 + 8) :] for data in made]  # and their checksums
    assert records[0] == records[1] != records[2]
    (tmp_path / "other").mkdir()
    strange = make_checkpoint(tmp_path / "other" / "source", "olmoe", num_experts=8, hidden_size=64)
    for wrong in (strange, convert(strange, tmp_path / "other.edgemoe", ConvertOptions(bits=8))):
        with pytest.raises(UsageError, match="is not the model of"):
            make_stand_ins(target, TWO_BITS, wrong)
    with pytest.raises(UsageError, match="not smaller"):
        make_stand_ins(target, ConvertOptions(bits=8, group_size=32))

    class Interrupted(Silent):
        def advance(self, count: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_stand_ins(target, ConvertOptions(bits=3, group_size=32), progress=Interrupted())
    assert (target / STAND_INS_FILE).read_bytes() == made[2]
    assert not list(target.glob("*.partial"))


def test_files_that_do_not_go_with_the_store(path, tmp_path, capsys):
    copy = tmp_path / "copy.edgemoe"
    shutil.copytree(path, copy)
    file = copy / STAND_INS_FILE
    whole = file.read_bytes()

    def refuses(kind, message: str) -> None:
        with pytest.raises(kind, match=message):
            opened(copy, 0.5)

    file.unlink()
    refuses(NotFoundError, "has no stand-ins")
    file.write_bytes(whole[:-5000])
    refuses(FormatError, "truncated")
    file.write_bytes(b"")
    refuses(FormatError, "no safetensors")
    file.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    refuses(FormatError, "no stand-ins that this edgemoe reads")
    mark = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    file.write_bytes(whole.replace(mark["fingerprint"].encode(), b"0" * 32))
    refuses(UsageError, "another model")
    file.write_bytes(whole.replace(b'\\"bits\\": 2', b'\\"bits\\": 8'))
    refuses(FormatError, "another size")
    file.write_bytes(whole.replace(b'\\"bits\\": 2', b'\\"bits\\": 7'))
    refuses(FormatError, "unknown quantization")
    file.write_bytes(whole.replace(b'"crc32c"', b'"crc32d"'))
    refuses(FormatError, "has no `crc32c`")
    damaged = bytearray(whole)
    damaged[-8 * 24 - 8192 * 4 + 100] ^= 1  # layer 2, expert 4
    file.write_bytes(damaged)
    assert main(["verify", str(copy), "--quick"]) == 1
    assert "BAD  stand-in of `layers.2.experts.4`" in capsys.readouterr().out
    with opened(copy, 0.0) as engine:
        key = engine.cache.table.first_stand_in[2] + 4
        engine.cache.begin_layer(2)
        engine.cache.hint([key])
        with pytest.raises(RecordError, match="layers.2.experts.4.*its stand-in: checksum"):
            engine.cache.wait(key)
        engine.cache.release([key])
    file.write_bytes(whole)
    opened(copy, 0.5).close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stand_in": -0.1}, "`stand_in`"),
        ({"stand_in": 1.1}, "`stand_in`"),
        ({"stand_in": float("nan")}, "`stand_in`"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(EdgeMoeError, match=message):
        Routing(**options)


@NATIVE
def test_an_engine_that_was_opened_without_them(path):
    with opened(path) as engine:
        with pytest.raises(UsageError, match="has no stand-ins"):
            engine.use_routing(Routing(stand_in=0.5))
        conversation = Conversation(engine, SamplingParams(max_tokens=3))
        with pytest.raises(UsageError, match="has no stand-ins"):
            handle(conversation, "/set routing stand-in 0.5")
        assert engine.report()["lossless"]
    with opened(path, 0.5) as engine:
        handle(Conversation(engine, SamplingParams(max_tokens=3)), "/set routing stand-in 0.25")
        assert engine.routing.label == "stand-ins after 0.25"


def test_a_store_made_of_another_has_none(path, tmp_path):
    from sets_small import make_set

    from edgemoe.quant.compact import compact

    copy = tmp_path / "copy.edgemoe"
    shutil.copytree(path, copy)
    make_set(copy, "five", dict.fromkeys(range(3), (0, 1, 2, 3, 4)))
    compact(copy, "five", tmp_path / "five.edgemoe")
    with pytest.raises(UsageError, match="pruned set"):
        make_stand_ins(tmp_path / "five.edgemoe", TWO_BITS)
    shutil.copy(path / STAND_INS_FILE, tmp_path / "five.edgemoe")
    with pytest.raises(EdgeMoeError, match="another model|damaged"):
        opened(tmp_path / "five.edgemoe", 0.5)
    assert load_index(path).layer_to_num_experts == {0: 8, 1: 8, 2: 8}
