"""What calibration, pruning, merging, traces and inspection make of hash-routed layers."""

import json

import numpy as np
import pytest
from hashed_small import NUM_EXPERTS, NUM_HASHED, NUM_LAYERS, make_store, random_table, table_name
from sets_small import make_set

from edgemoe.cli import main
from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.models.fingerprint import checkpoint_fingerprint
from edgemoe.models.lookahead import observe_routers
from edgemoe.quant.calibrated import Calibration
from edgemoe.quant.compact import compact
from edgemoe.quant.convert import convert
from edgemoe.quant.crop import crop_store
from edgemoe.quant.layer_pass import LayerPass
from edgemoe.quant.layouts import expert_layouts, trunk_items
from edgemoe.quant.merge import Group, LayerMerge
from edgemoe.quant.merge_write import write_merged
from edgemoe.quant.options import ConvertOptions, ExpertSpec
from edgemoe.quant.store_source import open_source
from edgemoe.quant.variants import VariantModel
from edgemoe.quant.windows import Window
from edgemoe.runtime import core
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.index import load_index
from edgemoe.runtime.profile import Profile
from edgemoe.runtime.trace import Trace

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")

IDS = np.random.default_rng(8).integers(0, 400, 160)
WHOLE = tuple(range(NUM_EXPERTS))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("hashed"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.npy"
    np.save(file, IDS)
    return file


@pytest.fixture(scope="module")
def profile(path, text):
    assert main(["calibrate", str(path), "--text", str(text), "--name", "task"]) == 0
    return Profile.load(path / "profiles" / "task.safetensors")


def expected(layer, ids):
    return np.sort(random_table(layer).numpy()[ids], axis=-1)


def logits_of(path, ids=IDS[:20], **options):
    with Engine.from_pretrained(path, **{"context": 64, **options}) as engine:
        kv_cache = KVCache.for_model(engine.args, engine.context, 16)
        rows = [engine.forward(ids[:16].tolist(), kv_cache, "all")]
        rows += [engine.forward([token], kv_cache) for token in ids[16:].tolist()]
    return np.concatenate(rows)


def test_inspect_and_the_plan_name_them(path, capsys):
    assert main(["inspect", str(path)]) == 0
    assert "hash-routed layers 0, 1, 2" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["hash_layers"] == list(range(NUM_HASHED))
    names = {each["name"]: each for each in document["classes"]}
    assert names["trunk: experts by token id"]["formats"] == {"i32": NUM_HASHED}
    with Engine.from_pretrained(path, context=64) as engine:
        assert engine.report()["hash_routed"]["layers"] == [0, 1, 2]
        assert engine.report()["lossless"]


def test_calibration_counts_what_the_tables_choose(profile):
    for layer in range(NUM_HASHED):
        counts = np.bincount(expected(layer, IDS).ravel(), minlength=NUM_EXPERTS)
        assert np.array_equal(profile.layers[layer].hard_count, counts)


def test_a_trace_holds_them_and_replays(path, text, tmp_path, capsys):
    out = tmp_path / "trace.safetensors"
    command = ["trace", "record", str(path), "--text", str(text), "--out", str(out)]
    assert main(command) == 0
    capsys.readouterr()
    trace = Trace.load(out)
    for place in range(NUM_HASHED):
        assert np.array_equal(trace.experts[:, place], expected(place, IDS[: len(trace.experts)]))
    assert main(["trace", "replay", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_eval_runs_them_as_the_engine_does(path, text, capsys):
    command = ["eval", str(path), "--text", str(text), "--window", "160", "--stride", "160"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = logits_of(path, IDS, context=192).astype(np.float64)[:-1]
    chosen = np.take_along_axis(rows, IDS[1:, None], axis=1)[:, 0]
    losses = np.log(np.exp(rows).sum(axis=1)) - chosen
    assert np.isclose(document["perplexity"], np.exp(losses.mean()), rtol=1e-3)


def test_conversions_that_run_the_model_route_as_the_engine_does(path, text, tmp_path):
    """A calibrated conversion, and a plan that is found: both read the tables of a checkpoint."""
    source = path.parent / "source"
    windows = [IDS[:40].tolist(), IDS[40:60].tolist()]
    options = ConvertOptions(bits=3, group_size=32, quantizer="calibrated")
    calibration = Calibration(windows, ("text",))
    out = convert(source, tmp_path / "calibrated.edgemoe", options, calibration=calibration)
    assert np.isfinite(logits_of(out)).all()
    with open_source(source) as opened:
        layouts = expert_layouts(opened, options, [])
        trunk = trunk_items(opened, options, [])
        with LayerPass(opened, trunk, layouts, windows, 1) as states:
            ids = states.attend(0).expert_ids
    assert np.array_equal(ids, expected(0, IDS[:60]))
    variants = tuple(ExpertSpec(bits) for bits in (3, 4))
    both = convert(source, tmp_path / "both", ConvertOptions(variants=variants, group_size=32))
    with VariantModel(both, [Window(windows[0], 1)], 1) as model:
        assert np.isfinite(model.losses(dict.fromkeys(model.keys, 0)).nll.numpy()).all()


def test_lookahead_is_exact_for_them(path):
    with Engine.from_pretrained(path, context=64) as engine, engine.steps() as steps:
        kv_cache = KVCache.for_model(engine.args, engine.context, 16)
        routes, scores = observe_routers(steps, IDS[:20], kv_cache, depth=1)
    for place in range(1, NUM_HASHED):
        ahead = scores[place][1]
        assert np.array_equal(routes[:, place], expected(place, IDS[:20]))
        named = np.take_along_axis(ahead, routes[:, place].astype(np.int64), axis=1)
        assert (named > 0).all() and np.allclose(ahead.sum(axis=1), named.sum(axis=1))


# ---- fewer experts ------------------------------------------------------------------------------


def test_pruning_leaves_them_whole(path, profile, capsys):
    words = ["--profile", "task", "--experts", "4", "--name", "half", "--force"]
    assert main(["prune", str(path), *words]) == 0
    assert "hash-routed layers stay whole: 0, 1, 2" in capsys.readouterr().err
    kept = json.loads((path / "sets" / "half.json").read_text())["layers"]
    counts = [len(each["kept"]) for _, each in sorted(kept.items())]
    assert counts == [NUM_EXPERTS] * NUM_HASHED + [4] * (NUM_LAYERS - NUM_HASHED)
    with Engine.from_pretrained(path, context=64) as engine:
        engine.use_set("half", mode="hard")
        kv_cache = KVCache.for_model(engine.args, engine.context, 16)
        hard = engine.forward(IDS[:16].tolist(), kv_cache, "all")
    small = compact(path, "half", path.parent / "half.edgemoe")
    assert np.array_equal(logits_of(small.path, IDS[:16]), hard)


def test_a_set_that_leaves_some_out_is_refused_where_it_would_route(path):
    kept = {layer: WHOLE for layer in range(NUM_LAYERS)} | {1: (0, 1, 2, 3, 4, 6, 7)}
    make_set(path, "partial", kept)
    with Engine.from_pretrained(path, context=64) as engine:
        for mode in ("soft", "hard"):
            with pytest.raises(UsageError, match="layer 1 is hash-routed"):
                engine.use_set("partial", mode=mode)
        engine.use_set("partial")  # exact: it is read first, and changes nothing
        mask = {layer: np.isin(WHOLE, ids).astype(np.uint8) for layer, ids in kept.items()}
        with pytest.raises(UsageError, match="expert 5 would be out"):
            engine._model.set_masks(mask)
        gains = {2: np.array([1, 1, 0, 1, 1, 1, 1, 1], dtype=np.float32)}
        with pytest.raises(UsageError, match="layer 2 is hash-routed"):
            engine._model.set_gains(gains)
    with pytest.raises(UsageError, match="layer 1 is hash-routed"):
        compact(path, "partial", path.parent / "partial.edgemoe")


def test_merged_experts_are_found_by_the_map_of_their_rows(path, tmp_path):
    """Pairs become one: where a table names two of a pair there is one body, with both weights."""
    groups = tuple(Group(first, (first, first + 1), (0.5, 0.5)) for first in (0, 2, 4, 6))
    merge = {layer: LayerMerge(groups) for layer in range(NUM_LAYERS)}
    out = tmp_path / "merged.edgemoe"
    write_merged(path, merge, out)
    seen = {}
    for backend in ("native", "reference"):
        with Engine.from_pretrained(out, context=64, backend=backend) as engine:
            kv_cache, found = KVCache.for_model(engine.args, engine.context, 16), []
            for ids in (IDS[:16].tolist(), [int(IDS[16])]):
                engine.forward(ids, kv_cache, on_route=lambda *route, of=found: of.append(route))
            seen[backend] = found
            if backend == "native":
                assert engine.cache.foreseen[0] > 0
                assert (engine.cache.place_stats[:NUM_HASHED, 1] == 0).all()
    for layer, ids, weights in seen["native"]:
        if layer >= NUM_HASHED:
            continue
        token_ids = IDS[:16] if len(ids) == 16 else IDS[16:17]
        bodies = np.sort(random_table(layer).numpy()[token_ids] // 2, axis=1)
        is_one = bodies[:, 0] == bodies[:, 1]
        assert is_one.any() or len(ids) == 1
        assert np.array_equal(ids[:, 0], bodies[:, 0])
        assert np.array_equal(ids[:, 1], np.where(is_one, -1, bodies[:, 1]))
        assert (weights[is_one, 1] == 0).all()
    for (_, ids, _), (_, other, _) in zip(seen["native"][:3], seen["reference"][:3], strict=True):
        assert np.array_equal(ids, other)


def test_merging_that_changes_rows_leaves_them_whole_or_is_refused(path, profile, tmp_path, text):
    out = tmp_path / "merged.edgemoe"
    words = ["--method", "diversify", "--text", str(text), "--experts", "4", "--out", str(out)]
    assert main(["prune", str(path), *words]) == 0
    counts = load_index(out).layer_to_num_experts
    assert [counts[layer] for layer in range(NUM_LAYERS)] == [8, 8, 8, 4, 4]
    logits_of(out)
    source = path.parent / "source"
    words = ["--method", "uncurl", "--router", "untrained", "--checkpoint", str(source)]
    words += ["--profile", "task", "--experts", "4", "--out", str(tmp_path / "train")]
    assert main(["prune", str(path), *words]) == 2


def test_cropping_keeps_the_tables_of_what_is_left(path, tmp_path):
    cropped = crop_store(path, tmp_path / "two.edgemoe", 2)
    assert np.isfinite(logits_of(cropped)).all()


def test_the_fingerprint_knows_the_tables(path, tmp_path):
    def other(weights):
        weights[table_name(0)] = random_table(17)

    twin = make_store(tmp_path, change=other)
    mine, theirs = (checkpoint_fingerprint(load_index(each)) for each in (path, twin))
    assert mine != theirs
