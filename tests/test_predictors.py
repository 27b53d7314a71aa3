"""Predictors of experts: what they say, how they are scored, and the tool that prints it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from merge_small import FAMILIES, make_families
from stores_small import make_store

from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.models.lookahead import observe_routers
from edgemoe.quant.merge import Group, LayerMerge
from edgemoe.quant.merge_write import write_merged
from edgemoe.runtime.predictors import (
    likeliest,
    noisy_oracle,
    previous_scores,
    profile_scores,
    recall,
    score,
    score_texts,
)
from edgemoe.runtime.profile import Profile

TOOLS = Path(__file__).resolve().parent.parent / "tools"
NUM_EXPERTS, TOP_K, PLACES = 12, 2, 3


def planted(num_tokens: int, seed: int, follows: float = 0.871) -> np.ndarray:
    """Routes [T, places, K] of which a layer's experts follow from those of the layer before: e is
    followed by e + 1 with this probability, else by anything."""
    rng = np.random.default_rng(seed)
    flat = np.zeros((num_tokens * PLACES, TOP_K), dtype=np.int32)
    flat[0] = [0, 1]
    for at in range(1, len(flat)):
        chosen: set[int] = set()
        for expert in flat[at - 1]:
            if rng.random() < follows:
                chosen.add((int(expert) + 1) % NUM_EXPERTS)
        while len(chosen) < TOP_K:
            chosen.add(int(rng.integers(NUM_EXPERTS)))
        flat[at] = sorted(chosen)
    return flat.reshape(num_tokens, PLACES, TOP_K)


def profile_of(routes: np.ndarray) -> Profile:
    profile = Profile.empty(dict.fromkeys(range(PLACES), NUM_EXPERTS), TOP_K)
    profile.add_routes(routes)
    return profile


def test_recall_counts_the_wanted_among_the_likeliest():
    scores = np.array([[0.1, 0.5, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    assert likeliest(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]
    chosen = np.array([[1, 3], [2, 3]])
    assert recall(scores, chosen, 1) == 1 / 4
    assert recall(scores, chosen, 3) == 3 / 4
    assert recall(scores, chosen, 4) == 1


def test_the_previous_token_is_its_own_experts():
    routes = np.array([[0, 3], [1, 2], [1, 3]])
    scores = previous_scores(routes, 5)
    assert scores.tolist() == [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]]
    assert recall(scores, routes[1:], 2) == 1 / 4


def test_tables_learn_what_was_planted_and_lose_it_when_shuffled():
    profile = profile_of(planted(4000, seed=1))
    held = planted(600, seed=2)
    found = score_texts([held], [None], [0, 1, 2], [NUM_EXPERTS] * PLACES, (TOP_K,), profile)
    by_name = {name: [r for r in found if r.predictor == name] for name in ("profile", "previous")}
    for result in by_name["profile"]:
        # A choice follows with .871, or is met by chance.
        assert 0.86 < result.at[TOP_K] < 0.94
        assert result.shuffled[TOP_K] < 0.35
    assert all(result.at[TOP_K] < 0.5 for result in by_name["previous"])


def test_tables_know_the_state_before_the_first_layer():
    """The first layer is predicted from the last one of the token before."""
    profile, held = profile_of(planted(3000, seed=3)), planted(50, seed=4)
    scores = profile_scores(profile, 0, held)
    tables = profile.tables(0)
    for token in range(1, len(held)):
        expected = tables.scores(held[token - 1, 2], held[token - 1, 1])
        assert np.array_equal(scores[token - 1], expected)
    scores = profile_scores(profile, 1, held)
    assert np.array_equal(scores[0], profile.tables(1).scores(held[1, 0], held[0, 2]))


def test_the_control_is_another_token():
    rng = np.random.default_rng(5)
    chosen = np.sort(np.array([rng.choice(16, 4, replace=False) for _ in range(500)]))
    scores = np.zeros((500, 16), dtype=np.float32)
    np.put_along_axis(scores, chosen, 1.0, axis=1)
    result = score("any", 0, scores, chosen, (4,))
    assert result.at[4] == 1 and 0.15 < result.shuffled[4] < 0.35


@pytest.mark.parametrize("right", [0.0, 0.3, 1.0])
def test_a_noisy_oracle_is_right_as_often_as_asked(right):
    routes = planted(2000, seed=6)
    guesses = noisy_oracle(routes, [NUM_EXPERTS] * PLACES, right, seed=7)
    assert abs(float((guesses == routes).mean()) - right) < 0.03
    chosen = (guesses[..., None] == routes[:, :, None, :]).any(axis=-1)
    assert np.array_equal(chosen, guesses == routes)  # what is wrong is wrong for the whole token
    assert np.array_equal(guesses, noisy_oracle(routes, [NUM_EXPERTS] * PLACES, right, seed=7))
    # Where a token takes all experts, nothing is wrong but no guess.
    assert (noisy_oracle(np.array([[[0, 1]]]), [2], 0.0) == -1).all()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("predictors"))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_routers_on_their_own_input_are_always_right(path, backend):
    ids = np.random.default_rng(8).integers(0, 400, 40)
    with Engine.from_pretrained(path, context=64, backend=backend) as engine:
        layers, seen = engine._model._layers, []
        engine.forward(
            ids.tolist(),
            KVCache.for_model(engine.args, 64, 16),
            on_route=lambda *routing: seen.append(routing[1]),
        )
        kv_cache = KVCache.for_model(engine.args, 64, 16)
        routes, scores = observe_routers(layers, ids, kv_cache, 2)
        assert kv_cache.offset == len(ids)
    assert np.array_equal(routes, np.stack(seen, axis=1))
    assert [sorted(each) for each in scores] == [[0], [0, 1], [0, 1, 2]]
    for place, by_depth in enumerate(scores):
        found = {depth: recall(rows, routes[:, place], 2) for depth, rows in by_depth.items()}
        assert found[0] == 1
        assert all(value < 1 for depth, value in found.items() if depth)


def test_rows_that_stand_for_one_expert_are_scored_as_one(tmp_path):
    """Merged experts whose rows are alike: both rows are chosen, or neither."""
    groups = tuple(Group(family[0], family, (0.5, 0.5)) for family in FAMILIES)
    merged = tmp_path / "merged.edgemoe"
    write_merged(make_families(tmp_path), dict.fromkeys(range(3), LayerMerge(groups)), merged)
    ids = np.random.default_rng(8).integers(0, 400, 40)
    with Engine.from_pretrained(merged, context=64) as engine:
        kv_cache = KVCache.for_model(engine.args, 64, 16)
        routes, scores = observe_routers(engine._model._layers, ids, kv_cache, 1)
    for place, by_depth in enumerate(scores):
        for rows in by_depth.values():
            assert rows.shape == (len(ids), len(FAMILIES))
            np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-5)
        chosen = routes[:, place]
        assert (np.sort(chosen, axis=1)[:, 0] == -1).all()  # one expert for both of a token's rows
        assert recall(by_depth[0], chosen, 1) == 1


def test_the_tool_prints_a_row_for_every_layer(path, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(TOOLS))
    import recall as tool

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    with Engine.from_pretrained(path, context=64) as engine:
        sizes = {layer: 8 for layer in engine.args.moe_layers}
    profile = Profile.empty(sizes, 2)
    profile.add_routes(np.tile(np.array([0, 1], dtype=np.int32), (9, 3, 1)))
    profile.save(tmp_path / "profile.safetensors")
    command = ["recall.py", str(path), "--text", str(text), "--tokens", "128"]
    command += ["--profile", str(tmp_path / "profile.safetensors")]
    monkeypatch.setattr(sys, "argv", command)
    tool.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 + 1
    for name in ("previous", "profile", "popularity", "own", "router 1", "router 2"):
        assert f" {name} |" in lines[0]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    tool.main()
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"] > 50
    own = [row["recall"]["2"] for row in document["results"] if row["predictor"] == "own"]
    assert own == [1, 1, 1]
