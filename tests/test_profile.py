"""Profiles: sums that add up, files that hold them, and the tables made of them."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edgemoe.runtime.errors import EdgeMoeError, FormatError, NotFoundError, UsageError
from edgemoe.runtime.profile import Profile, profile_path
from edgemoe.runtime.profile_parts import read_tables
from edgemoe.runtime.profile_sums import LayerSums
from edgemoe.runtime.transitions import ALL_ENTRIES, StateCounts, count_pairs, path_keys

EXPERTS = {1: 8, 2: 8, 4: 6}  # layers differ in size, and the first of the model is dense
TOP_K = 2


def routes_of(num_tokens: int, seed: int = 0) -> np.ndarray:
    """Random choices [T, places, K], ascending and distinct."""
    rng = np.random.default_rng(seed)
    chosen = [
        np.argsort(rng.random((num_tokens, size)) - np.arange(size) / size)[:, :TOP_K]
        for size in EXPERTS.values()
    ]
    return np.sort(np.stack(chosen, axis=1), axis=-1).astype(np.int16)


def profile_of(*texts: np.ndarray) -> Profile:
    profile = Profile.empty(EXPERTS, TOP_K, fingerprint="f")
    profile.add_routes(*texts, token_ids=[routes[:, 0, 0] % 5 for routes in texts])
    rng = np.random.default_rng(sum(map(len, texts)))
    for sums in profile.layers.values():
        size = sums.num_experts
        sums.soft_count = sums.hard_count * 0.75
        sums.reap_sum, sums.weight_sum = rng.random(size), rng.random(size)
        sums.input_square_sum = rng.random((size, 16)).astype(np.float32)
        sums.logit_gram = rng.normal(size=(size, size))
    return profile


def same(a: LayerSums, b: LayerSums) -> None:
    for name in ("hard_count", "next_count", "token_count"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in ("key", "expert", "count"):
        np.testing.assert_array_equal(getattr(a.paths, name), getattr(b.paths, name))
        np.testing.assert_array_equal(getattr(a.tokens, name), getattr(b.tokens, name))


def test_counts_are_those_of_a_plain_loop() -> None:
    routes = routes_of(40)
    profile = profile_of(routes)
    cycle = [(t, place) for t in range(40) for place in range(len(EXPERTS))]
    layers = list(profile.layers.values())
    expected = [np.zeros_like(sums.next_count) for sums in layers]
    for (t, place), (t2, place2) in pairwise(cycle):
        for a in routes[t, place]:
            for b in routes[t2, place2]:
                expected[place][a, b] += 1
    for place, sums in enumerate(layers):
        np.testing.assert_array_equal(sums.next_count, expected[place])
        assert sums.hard_count.sum() == 40 * TOP_K
        assert sums.token_count.sum() == 39 * TOP_K * TOP_K
    paths: list[dict[tuple[int, int], int]] = [{} for _ in layers]
    for (t0, p0), (t1, p1), (t2, p2) in zip(cycle, cycle[1:], cycle[2:], strict=False):
        key = int(path_keys(routes[t0, p0][None], routes[t1, p1][None])[0])
        for expert in routes[t2, p2].tolist():
            paths[p1][key, expert] = paths[p1].get((key, expert), 0) + 1
    for sums, expected_paths in zip(layers, paths, strict=True):
        found = zip(sums.paths.key.tolist(), sums.paths.expert.tolist(), strict=True)
        assert dict(zip(found, sums.paths.count.tolist(), strict=True)) == expected_paths


def test_two_profiles_merge_to_the_joint_one() -> None:
    first, second = routes_of(300, 1), routes_of(200, 2)
    joint = profile_of(first, second)
    merged = profile_of(first).merge(profile_of(second))
    assert merged.num_tokens == joint.num_tokens == 500
    for layer in EXPERTS:
        same(merged.layers[layer], joint.layers[layer])
        soft = merged.layers[layer].soft_count
        np.testing.assert_allclose(soft, joint.layers[layer].soft_count, rtol=1e-9)
    merged.validate()


def test_what_only_one_profile_has_is_left_out() -> None:
    first, second = profile_of(routes_of(50, 1)), profile_of(routes_of(50, 2))
    second.layers[2].logit_gram = None
    merged = first.merge(second)
    assert merged.layers[2].logit_gram is None and merged.layers[1].logit_gram is not None


def test_beyond_their_limit_the_states_seen_least_go() -> None:
    none = StateCounts.empty(ALL_ENTRIES // 100)  # 100 entries
    keys = np.arange(90, dtype=np.uint64)
    once = none.add(keys, np.zeros((90, 1), dtype=np.int16))
    twice = once.add(keys[:60] + np.uint64(30), np.ones((60, 1), dtype=np.int16))
    # 90 states, of which 60 have been seen twice: 150 entries, and 120 without the others.
    assert len(once.key) == 90 and len(twice.key) == 0
    most = once.add(keys[:20], np.zeros((20, 1), dtype=np.int16))
    more = most.add(keys[:11] + np.uint64(500), np.zeros((11, 1), dtype=np.int16))
    assert len(most.key) == 90 and more.key.tolist() == list(range(20))
    assert more.count.tolist() == [2] * 20


def test_profiles_of_different_models_do_not_merge() -> None:
    with pytest.raises(UsageError, match="different models"):
        profile_of(routes_of(5)).merge(Profile.empty({1: 8, 2: 8, 4: 7}, TOP_K))
    with pytest.raises(UsageError, match="another model"):
        profile_of(routes_of(5)).check_model({1: 8, 2: 8}, TOP_K)
    profile_of(routes_of(5)).check_model(EXPERTS, TOP_K)


def test_a_file_holds_it_all(tmp_path: Path) -> None:
    profile = profile_of(routes_of(80))
    profile.texts = [{"name": "a.txt", "sha256": "00", "tokens": 80}]
    path = profile_path(tmp_path, "task")
    profile.save(path)
    again = Profile.load(path)
    assert again.texts == profile.texts and again.num_tokens == 80 and again.fingerprint == "f"
    for layer, sums in profile.layers.items():
        same(sums, again.layers[layer])
        for name in ("soft_count", "reap_sum", "weight_sum", "input_square_sum", "logit_gram"):
            np.testing.assert_array_equal(getattr(sums, name), getattr(again.layers[layer], name))
    assert [each.name for each in path.parent.iterdir()] == ["task.safetensors"]


def test_an_engine_reads_the_tables_only(tmp_path: Path) -> None:
    """All of them where they fit; else the states seen most, in no more bytes than given."""
    profile = profile_of(routes_of(400))
    path = profile_path(tmp_path)
    profile.save(path)
    whole, few = read_tables(path), read_tables(path, 6_000)
    for place in range(len(EXPERTS)):
        active, before = np.array([1, 4]), np.array([0, 3])
        expected = profile.tables(place).scores(active, before, 2)
        np.testing.assert_array_equal(whole.tables(place).scores(active, before, 2), expected)
        assert whole.popularity(place).tolist() == profile.popularity(place).tolist()
    assert all(sums.logit_gram is None for sums in whole.layers.values())
    tables = [few.tables(place) for place in range(len(EXPERTS))]
    parts = [part for t in tables for part in (t.tokens, t.paths)]
    taken = sum(getattr(p, name).nbytes for p in parts for name in p.__slots__)
    assert 1_000 < taken < 6_000 + 8 * len(parts)
    kept = few.layers[1].paths
    least = min(seen_of(kept).values())
    lost = {k: n for k, n in seen_of(profile.layers[1].paths).items() if k not in seen_of(kept)}
    assert lost and max(lost.values()) < least
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(FormatError):
        read_tables(path)


def seen_of(counts: StateCounts) -> dict[int, int]:
    """How often each state was seen."""
    keys, rows = np.unique(counts.key, return_inverse=True)
    return dict(zip(keys.tolist(), np.bincount(rows, counts.count).tolist(), strict=True))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = profile_path(tmp_path)
    with pytest.raises(NotFoundError):
        Profile.load(path)
    profile_of(routes_of(30)).save(path)
    data = path.read_bytes()
    for broken in (b"", data[:100], data[: len(data) // 2], b"\xff" * 64):
        path.write_bytes(broken)
        with pytest.raises(FormatError):
            Profile.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda sums: sums.hard_count.__setitem__(0, sums.hard_count[0] + 1),
        lambda sums: sums.soft_count.__setitem__(0, np.nan),
        lambda sums: sums.next_count.__setitem__((0, 0), -1),
        lambda sums: setattr(sums, "token_count", sums.token_count[:-1]),
        lambda sums: sums.paths.expert.__setitem__(-1, 99),
        lambda sums: sums.paths.key.__setitem__(0, 2**64 - 1),
    ],
)
def test_what_does_not_add_up_is_refused(damage: object, tmp_path: Path) -> None:
    profile = profile_of(routes_of(30))
    damage(profile.layers[2])
    profile.save(tmp_path / "p.safetensors")
    with pytest.raises(FormatError):
        Profile.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_a_task_is_named_like_a_file(name: str) -> None:
    with pytest.raises(EdgeMoeError):
        profile_path("store", name)


# ---- the tables --------------------------------------------------------------------------------


def planted(num_tokens: int, probability: float, num_experts: int = 8) -> np.ndarray:
    """K = 1: after expert 1 and then 3, the third layer takes 5 with this probability."""
    rng = np.random.default_rng(3)
    routes = rng.integers(0, num_experts, (num_tokens, 3, 1)).astype(np.int16)
    hit = (routes[:, 0, 0] == 1) & (routes[:, 1, 0] == 3)
    other = np.where(rng.random(num_tokens) < probability, 5, 6)
    routes[hit, 2, 0] = other[hit]
    return routes


def test_a_planted_probability_is_learnt() -> None:
    profile = Profile.empty({0: 8, 1: 8, 2: 8}, top_k=1)
    profile.add_routes(planted(150_000, 0.871))
    scores = profile.tables(2).scores(np.array([3]), np.array([1]))
    assert scores[5] == pytest.approx(0.871, abs=0.02)
    assert scores.argmax() == 5 and scores.sum() == pytest.approx(1, abs=1e-5)
    pair = profile.tables(2).scores(np.array([3]))
    assert pair[5] == pytest.approx(0.125 + (0.871 - 0.125) / 8, abs=0.02)


def test_what_was_never_seen_falls_back() -> None:
    profile = Profile.empty({0: 8, 1: 8, 2: 8}, top_k=1)
    routes = planted(4_000, 0.871)
    profile.add_routes(routes[(routes[:, 1, 0] != 7) & (routes[:, 0, 0] != 0)])
    tables = profile.tables(2)
    never, seen = np.array([0]), np.array([3])
    np.testing.assert_array_equal(tables.scores(seen, never), tables.scores(seen))
    np.testing.assert_allclose(tables.scores(np.array([7])), tables.popularity, rtol=1e-6)


def test_the_first_layer_is_predicted_from_the_token_before() -> None:
    profile = Profile.empty({0: 4, 1: 4}, top_k=1)
    cycle = np.arange(400)
    routes = np.stack((cycle % 4, (cycle + 1) % 4), axis=1)[:, :, None].astype(np.int16)
    profile.add_routes(routes)
    # Token t has t mod 4 in the first layer, t + 1 mod 4 in the last: 2 is followed by 2.
    assert profile.tables(0).scores(np.array([2]), np.array([1])).argmax() == 2
    assert profile.tables(1).scores(np.array([2]), np.array([2])).argmax() == 3


def test_without_pairs_the_popularity_predicts() -> None:
    profile = profile_of(routes_of(50))
    for sums in profile.layers.values():
        sums.next_count = sums.paths = None
    tables = profile.tables(2)
    np.testing.assert_allclose(tables.scores(np.array([0, 3])), tables.popularity, rtol=1e-6)


def test_a_token_id_predicts_where_it_was_seen() -> None:
    profile = Profile.empty({0: 8, 1: 8}, top_k=1)
    ids = np.random.default_rng(0).integers(0, 8, 4_000)
    profile.add_routes(np.stack((ids, 7 - ids), axis=1)[:, :, None], token_ids=[ids])
    for place, expected in ((0, 3), (1, 4)):
        scores = profile.tables(place).scores(None, None, 3)
        assert scores.argmax() == expected and scores[expected] > 0.99
        np.testing.assert_allclose(
            profile.tables(place).scores(None, None, 99), profile.popularity(place), rtol=1e-5
        )
        few = profile.tables(place, max_entries=5)
        assert 0 < len(few.tokens.key) <= 5


def test_rows_of_a_table_add_up_to_the_choices_of_a_token() -> None:
    profile = profile_of(routes_of(200))
    for place in range(len(EXPERTS)):
        np.testing.assert_allclose(profile.tables(place).pairwise.sum(axis=1), TOP_K, rtol=1e-5)


def test_pairs_are_counted_within_a_row() -> None:
    found = count_pairs(np.array([[0, 1], [1, 2]]), np.array([[3], [0]]), (3, 4))
    assert found[1].tolist() == [1, 0, 0, 1] and found.sum() == 4


def test_keys_differ_by_order_of_layers_and_content() -> None:
    rng = np.random.default_rng(0)
    sets = np.sort(np.argsort(rng.random((20_000, 64)))[:, :8], axis=1)
    keys = path_keys(sets[:-1], sets[1:])
    distinct = len(np.unique(np.concatenate((sets[:-1], sets[1:]), axis=1), axis=0))
    assert len(np.unique(keys)) == distinct
    assert path_keys(sets[:1], sets[1:2]) != path_keys(sets[1:2], sets[:1])
