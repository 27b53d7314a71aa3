"""Stores of merged experts: what is written, what runs, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from merge_small import FAMILIES, make_families, write_text
from sets_small import make_set, owner

from edgemoe.cli import main
from edgemoe.engine import Engine
from edgemoe.models.fingerprint import checkpoint_fingerprint
from edgemoe.quant.checkpoint import Checkpoint
from edgemoe.quant.compact import compact
from edgemoe.quant.convert import convert
from edgemoe.quant.merge import Group, LayerMerge
from edgemoe.quant.merge_bodies import merged_body
from edgemoe.quant.merge_export import export_merged
from edgemoe.quant.merge_write import write_merged
from edgemoe.quant.options import ConvertOptions, ExpertSpec
from edgemoe.quant.pack import pack_expert
from edgemoe.quant.store_source import StoreSource
from edgemoe.runtime import core
from edgemoe.runtime.errors import FormatError, UsageError
from edgemoe.runtime.index import load_index
from edgemoe.runtime.store import Store
from edgemoe.session import Session

native = pytest.mark.skipif(core.lib is None, reason="native core not built")
PROMPT = list(range(40, 90))
BODIES = (0, 1, 2, 1, 3, 0, 3, 2)  # of FAMILIES


def families():
    """The merge that the planted families ask for."""
    groups = tuple(Group(members[0], members, (0.75, 0.25)) for members in FAMILIES)
    return {layer: LayerMerge(groups) for layer in range(3)}


def logits_of(path, num_tokens: int = 8, **options) -> np.ndarray:
    """Logits of a prompt's last token and of what follows, always the same."""
    ids, rows = list(PROMPT), []
    with Engine.from_pretrained(path, context=64, **options) as engine, Session(engine) as session:
        for step in range(num_tokens):
            rows.append(session.logits(ids))
            ids.append(60 + step)
    return np.stack(rows)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def merged(path, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "merged.edgemoe"
    write_merged(path, families(), out)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.npy")


# ---- the file -----------------------------------------------------------------------------------


def test_an_alias_takes_no_record(path, merged):
    index, full = load_index(merged), load_index(path)
    assert len(index.records) == 12 and 2 * index.expert_bytes == full.expert_bytes
    assert index.layer_to_num_experts == {0: 4, 1: 4, 2: 4}
    assert index.layer_to_num_rows == {0: 8, 1: 8, 2: 8} == full.layer_to_num_experts
    assert index.layer_to_bodies == dict.fromkeys(range(3), BODIES)
    assert not full.layer_to_bodies and index.is_derived and not full.is_derived
    assert index.plan["merge"]["groups"]["0"] == [list(family) for family in FAMILIES]
    assert checkpoint_fingerprint(index) != checkpoint_fingerprint(full)
    with Store(merged) as store:
        assert all(good for *_, good in store.verify())
        assert all(good for _, good in store.verify_files())


@native
def test_the_core_knows_the_aliases(merged):
    """The index of the core, which other programs use."""
    index = core.lib.em_index_open(str(merged).encode(), None, 0)
    try:
        for layer in index.contents.layers[:3]:
            assert (layer.num_experts, layer.num_rows) == (4, 8)
            assert tuple(layer.bodies[:8]) == BODIES
    finally:
        core.lib.em_index_close(index)


def test_ragged_layers_and_what_stays_alone(path, tmp_path):
    """Layers with 8, 5 and 7 experts; those that stay alone are copied byte for byte."""
    one = {e: Group(e, (e,), (1.0,)) for e in range(8)}
    wide = Group(4, (0, 4, 5, 7), (0.1, 0.7, 0.1, 0.1))
    merge = {
        0: LayerMerge(tuple(one.values())),
        1: LayerMerge((one[1], one[2], one[3], wide, one[6])),
        2: LayerMerge((*(one[e] for e in (0, 1, 2, 3, 4, 5)), Group(7, (6, 7), (0.5, 0.5)))),
    }
    index = write_merged(path, merge, tmp_path / "ragged.edgemoe")
    again, full = load_index(tmp_path / "ragged.edgemoe"), load_index(path)
    assert index == again and again.layer_to_num_experts == {0: 8, 1: 5, 2: 7}
    assert again.layer_to_bodies == {1: (3, 0, 1, 2, 3, 3, 4, 3), 2: (0, 1, 2, 3, 4, 5, 6, 6)}
    for layer, number, expert in ((0, 7, 7), (1, 0, 1), (1, 4, 6), (2, 5, 5)):
        assert again.records[layer, number].crc32c == full.records[layer, expert].crc32c
    assert again.records[1, 3].crc32c != full.records[1, 4].crc32c


@pytest.mark.parametrize(
    "aliases",
    [
        [0, 1, 2, 1, 3, 0, 3],
        [0, 1, 2, 1, 3, 0, 3, 4],
        [0] * 8,
        [0, 1, 2, 1, 3, 0, 3, -2],
        [0.5] * 8,
    ],
    ids=["too few", "unknown", "unused", "below none", "no integers"],
)
def test_aliases_that_cannot_be(merged, tmp_path, aliases):
    copy = tmp_path / "copy.edgemoe"
    shutil.copytree(merged, copy)
    document = json.loads((copy / "store.json").read_text())
    document["layers"]["1"]["aliases"] = aliases
    (copy / "store.json").write_text(json.dumps(document))
    words = "aliases|disagree"
    with pytest.raises(FormatError, match=words):
        Engine.from_pretrained(copy)


def test_a_merge_that_was_interrupted_goes_on(path, merged, tmp_path, monkeypatch):
    out, seen = tmp_path / "again.edgemoe", []

    def stop(group, read, orders):
        seen.append(group.head)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return merged_body(group, read, orders)

    monkeypatch.setattr("edgemoe.quant.merge_records.merged_body", stop)
    with pytest.raises(KeyboardInterrupt):
        write_merged(path, families(), out)
    assert not out.exists()
    with pytest.raises(UsageError, match="not from this conversion"):
        write_merged(path, families(), out, router="merged")
    count = len(seen)
    write_merged(path, families(), out)
    assert len(seen) - count == 8  # the first layer was done
    assert load_index(out).sha256 == load_index(merged).sha256
    with pytest.raises(UsageError, match="already exists"):
        write_merged(path, families(), out)


def test_bodies_of_the_checkpoint(tmp_path):
    """Averages are of what 4 bits made of the weights, or of the weights before."""
    checkpoint = make_families(tmp_path / "noisy", noise=0.3).parent / "source"
    small = convert(checkpoint, tmp_path / "four.edgemoe", ConvertOptions(bits=4, group_size=32))
    layout, group = load_index(small).records[1, 0].layout, families()[1].groups[0]
    found = []
    for folder, source in ((None, StoreSource(small)), (checkpoint, Checkpoint(checkpoint))):
        out = tmp_path / f"{type(source).__name__}.edgemoe"
        index = write_merged(small, families(), out, checkpoint=folder)
        with source:
            body = merged_body(group, lambda expert, source=source: source.expert(1, expert))
        _, pair = pack_expert(body, layout, ExpertSpec(bits=4, group_size=32))
        assert index.records[1, 0].crc32c == pair and index.records[1, 0].layout == layout
        found.append(pair)
    assert found[0] != found[1]
    other = make_families(tmp_path / "other", noise=0.1, vocab_size=420)
    with pytest.raises(UsageError, match="config.json differs"):
        write_merged(small, families(), tmp_path / "x.edgemoe", checkpoint=other.parent / "source")
    other = make_families(tmp_path / "third", row_noise=0.1)
    with pytest.raises(UsageError, match="the router of layer 0 differs"):
        write_merged(small, families(), tmp_path / "x.edgemoe", checkpoint=other.parent / "source")
    assert not (tmp_path / "x.edgemoe").exists()


# ---- running ------------------------------------------------------------------------------------


def test_copies_merged_are_the_model_they_were(path, merged):
    """All pairs of a family are picked together: one body with the summed weight is what two equal
    bodies gave, and a token reads one record for two ids."""
    for backend in ("native", "reference") if core.lib is not None else ("reference",):
        options = {"backend": backend, "kv_bits": 32}
        full, small = (logits_of(each, 4, **options) for each in (path, merged))
        assert np.abs(full - small).max() < 1e-4 * np.abs(full).max()


@native
def test_leaving_the_copies_out_loses_more(path, merged):
    """As many experts, and those of every family that count: but a token that wanted both of a
    family now gets another one."""
    make_set(path, "heads", dict.fromkeys(range(3), tuple(family[0] for family in FAMILIES)))
    full, small = logits_of(path, 4), logits_of(merged, 4)
    masked = logits_of(path, 4, set="heads", set_mode="hard")
    assert np.square(masked - full).mean() > 100 * np.square(small - full).mean()


@native
def test_streamed_and_resident_are_equal(merged):
    record = load_index(merged).max_record_bytes
    assert np.array_equal(logits_of(merged), logits_of(merged, cache_bytes=2 * record))


@native
def test_one_slot_serves_every_alias(path, merged):
    """Every token picks two aliases of one body: one demand a layer, and a slot for each body is
    enough to never read again."""
    with Engine.from_pretrained(merged, context=64) as engine, Session(engine) as session:
        assert engine.cache.table.num_experts == {0: 4, 1: 4, 2: 4}
        ids = list(PROMPT)
        session.logits(ids)
        engine.take_step_stats()
        for token in range(8):
            ids.append(60 + token)
            session.logits(ids)
        stats = engine.take_step_stats()
    assert stats.hits + stats.misses == 8 * 3  # not 8 tokens x 3 layers x 2 ids


@native
def test_sets_and_profiles_of_a_merged_store_are_about_bodies(path, merged, text, tmp_path):
    """A hard set that keeps two bodies keeps their four rows, and reads nothing else."""
    copy = tmp_path / "copy.edgemoe"
    shutil.copytree(merged, copy)
    assert owner(copy).num_experts == {0: 4, 1: 4, 2: 4}
    make_set(copy, "few", dict.fromkeys(range(3), (0, 2)))
    with Engine.from_pretrained(copy, set="few", set_mode="hard", context=64) as engine:
        seen = set()
        engine.on_route = lambda layer, ids, _: seen.update(ids.reshape(-1).tolist())
        with Session(engine) as session:
            session.logits(PROMPT)
        assert seen - {-1} == {0, 2}
    rows = {layer: (0, 2, 5, 7) for layer in range(3)}  # of the full store: families 0 and 2
    full = tmp_path / "full.edgemoe"
    shutil.copytree(path, full)
    make_set(full, "few", rows)
    masked = logits_of(full, 4, set="few", set_mode="hard")
    own = logits_of(copy, 4, set="few", set_mode="hard")
    assert np.abs(masked - own).max() < 2e-3 * np.abs(masked).max()
    assert main(["calibrate", str(copy), "--text", str(text), "--tokens", "300"]) == 0
    assert main(["prune", str(copy), "--experts", "3", "--name", "three"]) == 0
    with pytest.raises(UsageError, match="other checkpoint|another checkpoint"):
        make_set(full, "wrong", rows, fingerprint=owner(copy).fingerprint).check(owner(full))
    for make in (
        lambda: compact(copy, "few", tmp_path / "y"),
        lambda: convert(copy, tmp_path / "y"),
    ):
        with pytest.raises(UsageError, match="by merging"):
            make()
    assert main(["prune", str(copy), "--method", "uncurl", "--keep", "75%", "--dry-run"]) == 2


@native
def test_commands_know_a_merged_store(merged, capsys):
    assert main(["verify", str(merged), "--tokens", "4"]) == 0
    assert "12 of 12 expert records for 24 that routers know" in capsys.readouterr().out
    assert main(["plan", str(merged)]) == 0
    assert "12 of 12 experts for 24 that routers know, 100 %" in capsys.readouterr().out
    assert main(["inspect", str(merged), "--layers"]) == 0
    text = capsys.readouterr().out
    assert "4 a layer for the 8 that routers know" in text and "routers: index-map" in text
    assert main(["inspect", str(merged), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["layers"][0]["num_experts"] == 4 and document["layers"][0]["num_rows"] == 8


def test_random_routers_are_for_training(path, tmp_path):
    """A checkpoint of the merged experts; what is converted from it before it was trained is
    refused, by the engine and by the core."""
    source, exported = path.parent / "source", tmp_path / "exported"
    export_merged(source, families(), exported)
    with Checkpoint(exported) as checkpoint, Checkpoint(source) as own:
        assert checkpoint.args.num_experts == 4 and own.args.num_experts == 8
        group = families()[2].groups[1]
        merged = merged_body(group, lambda expert: own.expert(2, expert))
        for found, part in zip(checkpoint.expert(2, 1), merged, strict=True):
            assert torch.equal(found, part.to(found.dtype))
        for name, where in own.trunk.items():
            is_router = name in own.router_names()
            assert torch.equal(checkpoint.read(name), own.read(where)) != is_router
    random = convert(exported, tmp_path / "random.edgemoe", ConvertOptions(bits=16))
    assert load_index(random).untrained_routers
    with pytest.raises(UsageError, match="routers are random.*--router index-map"):
        Engine.from_pretrained(random)
    if core.lib is not None:
        assert not core.lib.em_index_open(str(random).encode(), None, 0)
    config = json.loads((exported / "config.json").read_text())
    del config["untrained_routers"]
    (exported / "config.json").write_text(json.dumps(config))
    trained = convert(exported, tmp_path / "trained.edgemoe", ConvertOptions(bits=16))
    assert np.isfinite(logits_of(trained, 1)).all()
    uneven = families() | {0: LayerMerge(tuple(Group(e, (e,), (1.0,)) for e in range(8)))}
    with pytest.raises(UsageError, match="as many experts in every layer"):
        export_merged(source, uneven, tmp_path / "uneven")
    with pytest.raises(UsageError, match="is there already"):
        export_merged(source, families(), exported)
    assert not list(tmp_path.glob("*.partial"))


def test_merged_routers_have_a_row_for_every_group(path, tmp_path):
    """With rows that are equal in a family, the smaller router is the family's: a plain store, and
    with top-1 of 4 where top-2 of 8 was, the same model."""
    out = tmp_path / "rows.edgemoe"
    index = write_merged(path, families(), out, router="merged")
    assert index.kept == dict.fromkeys(range(3), (0, 1, 2, 4)) and not index.layer_to_bodies
    for store in (path, out):
        config = json.loads((store / "config.json").read_text())
        copy = tmp_path / f"{store.stem}-1.edgemoe"
        shutil.copytree(store, copy)
        (copy / "config.json").write_text(
            json.dumps(config | {"num_experts_per_tok": 2 if store == path else 1})
        )
    full = logits_of(tmp_path / "families-1.edgemoe", 4, backend="reference")
    small = logits_of(tmp_path / "rows-1.edgemoe", 4, backend="reference")
    assert np.abs(full - small).max() < 2e-3 * np.abs(full).max()


@native
def test_a_store_may_name_null_experts(merged, tmp_path):
    """AdaMoE (2406.13233): a row without a body is chosen, then neither read nor computed; some
    tokens go through fewer experts, and prompts and tokens agree for every capacity."""
    copy = tmp_path / "nulls.edgemoe"
    shutil.copytree(merged, copy)
    document = json.loads((copy / "store.json").read_text())
    for entry in document["layers"].values():
        entry["aliases"] = [0, -1, 2, -1, 3, 1, 3, 2]  # a pair of equal rows each; one of nothing
    (copy / "store.json").write_text(json.dumps(document))
    bodies = {k: np.array(v) for k, v in load_index(copy).layer_to_bodies.items()}
    rows, counts = [], []
    for path, options in ((merged, {}), (copy, {}), (copy, {"cache_bytes": 1 << 16})):
        with Engine.from_pretrained(path, context=64, **options) as engine:
            if path is merged:
                engine._model.set_bodies(bodies)
            engine.on_route = lambda _, ids, w: counts.append((ids >= 0).sum(axis=-1))
            with Session(engine) as session:
                rows.append(session.logits(PROMPT))
                rows.append(session.logits([*PROMPT, 7]))
    assert all(np.array_equal(rows[i], rows[i + 2]) for i in range(4))
    assert {int(n) for part in counts for n in part} == {0, 1, 2}
