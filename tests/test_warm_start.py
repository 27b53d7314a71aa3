"""Warm start: what is read before the first request, why, and that it is harmless."""

import json
from pathlib import Path

import numpy as np
import pytest
from stores_small import make_store

from edgemoe import Engine
from edgemoe.last_run import cache_folder, last_run_path, load_last_run, save_last_run
from edgemoe.runtime import core
from edgemoe.runtime.errors import FormatError
from edgemoe.runtime.index import load_index
from edgemoe.runtime.profile import Profile
from edgemoe.sampling import SamplingParams
from edgemoe.warm_start import expected_use

BACKENDS = ["reference"] + (["native"] if core.lib else [])
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEMOE_WARM_START", "auto")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "user"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("warm"))


@pytest.fixture
def store(made):
    yield made
    (made / "profile.safetensors").unlink(missing_ok=True)


def write_profile(store: Path, top_k: int = 2) -> Profile:
    """Experts 5 and 6 of each layer are wanted most, then 4, then 0."""
    profile = Profile.empty({0: 8, 1: 8, 2: 8}, top_k)
    rows = [[5, 6]] * 6 + [[4, 6]] * 3 + [[0, 5]]
    profile.add_routes(np.repeat(np.array(rows, dtype=np.int16)[:, None, :top_k], 3, axis=1))
    profile.save(store / "profile.safetensors")
    return profile


def resident(engine) -> set[tuple[int, int]]:
    names = engine.cache.table.names
    return {names[key] for key in engine.cache.resident_mask().nonzero()[0]}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_profile_fills_the_cache_with_what_is_wanted_most(store, backend):
    write_profile(store)
    size = load_index(store).max_record_bytes
    with Engine.from_pretrained(store, cache_bytes=9 * size, backend=backend) as engine:
        num_bytes = engine.warm_up()
        assert resident(engine) == {(layer, e) for layer in range(3) for e in (4, 5, 6)}
        assert num_bytes == 9 * size == engine.warm_start.num_bytes
        assert engine.cache.resident_bytes <= engine.cache.capacity_bytes
        assert engine.cache.hits == engine.cache.misses == engine.cache.evictions == 0
        told = engine.report()["warm_start"]
        assert told["sources"] == ["profile"] and told["records"] == 9


def test_the_last_run_is_taken_up(store):
    size = load_index(store).max_record_bytes
    with Engine.from_pretrained(store, cache_bytes=9 * size) as engine:
        engine.generate([1, 2, 3], GREEDY)
        before = resident(engine)
    with Engine.from_pretrained(store, cache_bytes=9 * size) as engine:
        assert engine.warm_up() > 0
        assert resident(engine) == before
        assert engine.report()["warm_start"]["sources"] == ["last run"]


def test_an_engine_that_did_nothing_leaves_the_state_alone(store):
    with Engine.from_pretrained(store) as engine:
        engine.generate([1, 2, 3], GREEDY)
    path = last_run_path(load_index(store))
    before = path.read_bytes()
    with Engine.from_pretrained(store) as engine:
        engine.warm_up()
    assert path.read_bytes() == before


def test_everything_is_read_where_everything_fits(store):
    with Engine.from_pretrained(store) as engine:
        assert engine.warm_up() == engine._index.expert_bytes


def test_nothing_is_read_where_nothing_is_known(store):
    with Engine.from_pretrained(store, cache_bytes=9 * load_index(store).max_record_bytes) as e:
        assert e.warm_up() == 0 and not resident(e)


def test_off_reads_and_writes_nothing(store):
    write_profile(store)
    with Engine.from_pretrained(store, warm_start="off") as engine:
        assert engine.warm_up() == 0 and not resident(engine)
        engine.generate([1, 2, 3], GREEDY)
        assert engine.report()["warm_start"] is None
    assert not cache_folder().exists()


@pytest.mark.parametrize("share", (9, 24))
def test_no_logit_changes(store, share):
    write_profile(store)
    size = load_index(store).max_record_bytes
    found = []
    for warm in ("off", "auto"):
        options = {"cache_bytes": share * size, "warm_start": warm}
        with Engine.from_pretrained(store, **options) as engine:
            engine.warm_up()
            found.append(engine.session().logits(list(range(40))))
    assert np.array_equal(*found[:2])


def test_the_first_tokens_end_it(store):
    write_profile(store)
    size = load_index(store).max_record_bytes
    with Engine.from_pretrained(store, throttle=4 * size) as engine:  # 6 s for all of them
        engine.generate([1], SamplingParams(max_tokens=1))
        read = engine.warm_start.num_bytes
        engine.warm_up()
        assert engine.warm_start.num_bytes == read < engine._index.expert_bytes


def test_others_get_their_turn(store):
    size = load_index(store).max_record_bytes
    with Engine.from_pretrained(store, throttle=4 * size) as engine:
        engine.session().close()
        assert engine.warm_start.num_bytes < engine._index.expert_bytes


def test_closing_ends_it(store):
    size = load_index(store).max_record_bytes
    engine = Engine.from_pretrained(store, throttle=4 * size)
    engine.close()
    engine.warm_start.finish()
    assert engine.warm_start.num_bytes < engine._index.expert_bytes
    assert not cache_folder().exists()  # it has fed no token


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"format": "edgemoe-last-run", "version": 9}',
        '{"format": "edgemoe-last-run", "version": 1, "num_records": 24, "resident": "!"}',
        '{"format": "edgemoe-last-run", "version": 1, "num_records": 24, "resident": "AAAAAAA="}',
        '{"format": "edgemoe-last-run", "version": 1, "num_records": 25, "resident": "AAAA"}',
    ],
)
def test_a_damaged_or_foreign_state_is_one_note(store, text):
    index = load_index(store)
    path = last_run_path(index)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(FormatError):
        load_last_run(index)
    with Engine.from_pretrained(store) as engine:
        assert len([note for note in engine.notes if "last run" in note]) == 1
        engine.generate([1, 2, 3], GREEDY)
    assert load_last_run(index).any()  # written anew


def test_a_foreign_profile_is_one_note(store):
    write_profile(store, top_k=1)
    use, sources, notes = expected_use(load_index(store), 2)
    assert not use.any() and not sources and len(notes) == 1 and "another model" in notes[0]
    (store / "profile.safetensors").write_bytes(b"nothing of the kind")
    assert "damaged" in expected_use(load_index(store), 2)[2][0]


def test_the_state_of_a_run_holds_what_was_given(store):
    index = load_index(store)
    mask = np.random.default_rng(0).random(len(index.records)) < 0.5
    save_last_run(index, mask)
    assert load_last_run(index).tolist() == mask.tolist()
    assert json.loads(last_run_path(index).read_text())["num_records"] == len(mask)
    assert [p.name for p in last_run_path(index).parent.iterdir()] == [last_run_path(index).name]


def test_a_folder_that_cannot_be_written_is_no_error(store, tmp_path):
    index = load_index(store)
    cache_folder().parent.mkdir(parents=True, exist_ok=True)
    cache_folder().write_text("a file where the folder should be")
    save_last_run(index, np.ones(len(index.records), dtype=np.bool_))
    assert load_last_run(index) is None
