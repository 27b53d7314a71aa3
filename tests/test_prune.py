"""Pruning: scores and choices on planted profiles, what the plan says, the command."""

import json

import numpy as np
import pytest
from sets_small import owner
from stores_small import make_store

from edgemoe.cli import main
from edgemoe.engine import Engine
from edgemoe.quant.prune import METHODS, Amount, choose, scores_of
from edgemoe.quant.prune_plan import (
    LayerPlan,
    counted_rows,
    make_plan,
    replayed_rows,
    warnings_on,
)
from edgemoe.quant.prune_reads import expected_reads, spare_reads
from edgemoe.quant.prune_replay import NOBODY, redirect
from edgemoe.runtime.errors import BudgetError, UsageError
from edgemoe.runtime.index import load_index
from edgemoe.runtime.profile import Profile
from edgemoe.runtime.sets import load_set, set_names
from edgemoe.runtime.trace import DECODE, Trace

TOKENS, TOP_K = 1000, 2


def planted(path, name: str = "code", seed: int = 0) -> Profile:
    """A profile whose picks fall with the expert's id plus the layer's number, but in which the
    last expert of each layer, hardly picked, says the most when it speaks."""
    of, rng = owner(path), np.random.default_rng(seed)
    profile = Profile.empty(
        of.num_experts,
        of.top_k,
        name=name,
        fingerprint=of.fingerprint,
        tokenizer=of.tokenizer_sha256,
    )
    odds = np.stack([0.6 ** ((np.arange(8) + layer) % 8) for layer in range(3)])
    scores = np.log(odds) + rng.gumbel(size=(TOKENS, 3, 8))
    routes = np.sort(np.argsort(-scores, axis=-1)[..., :TOP_K], axis=-1)
    profile.add_routes(routes)
    for layer, sums in profile.layers.items():
        sums.soft_count = odds[layer] / odds[layer].sum() * TOKENS
        norms = np.ones(8)
        norms[7] = 20.0
        sums.reap_sum = sums.hard_count * norms
    return profile


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = make_store(tmp_path_factory.mktemp("prune"))
    planted(path).save(path / "profiles" / "code.safetensors")
    return path


@pytest.fixture(scope="module")
def profile(path):
    return planted(path)


@pytest.fixture(scope="module")
def index(path):
    return load_index(path)


def test_scores_are_what_they_are_called(profile):
    for layer, sums in profile.layers.items():
        assert np.array_equal(scores_of(profile, "frequency")[layer], sums.hard_count)
        assert np.array_equal(scores_of(profile, "soft-count")[layer], sums.soft_count)
        assert np.allclose(scores_of(profile, "reap")[layer], [1] * 7 + [20])
    assert set(METHODS) == {"reap", "frequency", "soft-count"}


def test_an_expert_that_nobody_picked_goes_first(path, index):
    profile = planted(path)
    sums = profile.layers[1]
    sums.hard_count[4], sums.reap_sum[4] = 0, 0.0
    for method in ("reap", "frequency"):
        kept = choose(scores_of(profile, method), index, TOP_K, Amount(experts=7))
        assert 4 not in kept[1] and len(kept[1]) == 7


def test_a_profile_without_norms_has_no_reap(path):
    profile = planted(path)
    profile.layers[0].reap_sum = None
    with pytest.raises(UsageError, match="no norms of expert outputs"):
        scores_of(profile, "reap")


def test_as_many_of_every_layer_stay(profile, index):
    kept = choose(scores_of(profile, "frequency"), index, TOP_K, Amount(share=0.5))
    assert kept == {0: (0, 1, 2, 3), 1: (0, 1, 2, 7), 2: (0, 1, 6, 7)}
    reap = choose(scores_of(profile, "reap"), index, TOP_K, Amount(share=0.5))
    assert all(7 in ids for ids in reap.values())
    first = choose(scores_of(profile, "reap"), index, TOP_K, Amount(0.5, keep_first=True))
    assert first[0] == tuple(range(8)) and first[1] == reap[1] and first[2] == reap[2]


def test_the_best_of_all_layers_stay(index):
    """Layer 1 is even, layer 0 lives by two experts: layers come out different, top-k is kept."""
    scores = {0: np.array([9.0, 8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]), 1: np.ones(8), 2: np.ones(8)}
    kept = choose(scores, index, TOP_K, Amount(share=0.5), by_layer=False)
    assert sum(map(len, kept.values())) == 12 and kept[0] == (0, 1)
    assert len(kept[1]) == len(kept[2]) == 5


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_set_that_fits_leaves_no_room_for_another(profile, index, by_layer):
    scores, size = scores_of(profile, "frequency"), index.max_record_bytes
    for room in (6, 7, 13, 24, 100):
        amount = Amount(num_bytes=room * size + size // 2)
        kept = choose(scores, index, TOP_K, amount, by_layer)
        assert sum(map(len, kept.values())) == min(room, 24)
        if by_layer:
            assert max(map(len, kept.values())) - min(map(len, kept.values())) <= 1 + room % 3
    with pytest.raises(BudgetError, match="no set is small enough.*2 experts of every layer"):
        choose(scores, index, TOP_K, Amount(num_bytes=6 * size - 1), by_layer)


@pytest.mark.parametrize("amount", [Amount(experts=1), Amount(experts=9), Amount(share=0.1)])
def test_amounts_that_cannot_be(profile, index, amount):
    with pytest.raises(UsageError, match=r"cannot stay; every token needs 2"):
        choose(scores_of(profile, "reap"), index, TOP_K, amount)


def test_the_plan_adds_up(profile, index):
    scores = scores_of(profile, "frequency")
    kept = choose(scores, index, TOP_K, Amount(share=0.5))
    plan = make_plan(kept, scores, profile, index)
    assert plan.num_kept == 12 and plan.num_experts == 24
    assert plan.kept_bytes == 12 * index.max_record_bytes
    for each in plan.layers:
        lost = profile.layers[each.layer].hard_count[
            [e for e in range(8) if e not in kept[each.layer]]
        ]
        assert each.removed_pick_share == pytest.approx(lost.sum() / (TOKENS * TOP_K))
        assert each.removed_score_share == pytest.approx(each.removed_pick_share)
    rows = counted_rows(profile, kept, index, [index.expert_bytes // 4, index.expert_bytes])
    assert 0 < rows[0].full_hit_rate < rows[0].set_hit_rate < 1
    assert rows[0].set_bytes_per_token < rows[0].full_bytes_per_token
    assert rows[1].full_hit_rate == pytest.approx(1) == rows[1].set_hit_rate


@pytest.mark.parametrize(
    ("num_experts", "num_kept", "top_k", "words"),
    [
        (32, 8, 1, []),
        (32, 7, 1, ["1 in 4", "8 x 1"]),
        (64, 32, 4, []),
        (64, 31, 4, ["1 in 2", "8 x 4"]),
        (128, 63, 8, ["1 in 2", "8 x 8"]),
        (8, 8, 2, []),
        (8, 4, 2, ["8 x 2"]),
    ],
)
def test_warnings_stand_where_others_broke(num_experts, num_kept, top_k, words):
    found = warnings_on([LayerPlan(3, num_experts, num_kept, 0.1, 0.1)], top_k)
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


def test_a_replay_counts_what_a_cache_would_read(index):
    """Of the same tokens, half of the experts are wanted twice as often."""
    rng, size = np.random.default_rng(2), index.max_record_bytes
    routes = np.sort(rng.random((400, 3, 8)).argsort(axis=-1)[..., :2], axis=-1)
    few = np.sort(rng.random((400, 3, 4)).argsort(axis=-1)[..., :2], axis=-1)
    few[:, 1, 1] = NOBODY
    rows = replayed_rows(routes, few, index, [6 * size, 12 * size, 24 * size])
    assert [row.share for row in rows] == pytest.approx([1 / 4, 1 / 2, 1])
    assert rows[0].full_hit_rate < rows[0].set_hit_rate < rows[1].set_hit_rate
    # The 11 of the set fit into the second cache, all 24 into the third: each is read once.
    assert rows[1].set_bytes_per_token == rows[2].set_bytes_per_token == 11 * size / 400
    assert rows[2].full_bytes_per_token == 24 * size / 400
    assert rows[1].set_hit_rate == pytest.approx(1 - 11 / (400 * 5))


def test_lost_picks_go_to_others():
    rng = np.random.default_rng(0)
    routes = np.sort(rng.random((200, 2, 6)).argsort(axis=-1)[..., :3], axis=-1)
    kept = {4: (0, 1, 2, 5), 9: (1, 3, 4)}
    weights = {4: np.array([1.0, 1, 50, 9, 9, 1]), 9: np.ones(6)}
    moved = redirect(routes, kept, weights)
    for place, layer in enumerate(kept):
        ids = moved[:, place]
        assert np.isin(ids, kept[layer]).all()
        assert all(len(set(row)) == 3 for row in ids.tolist())
        stays = np.isin(routes[:, place], kept[layer])
        assert np.array_equal(ids[stays], routes[:, place][stays])
    assert (moved[:, 0] == 2).sum() > 170  # the one with the odds


def test_the_command_makes_a_set_that_runs(path, capsys):
    assert main(["prune", str(path), "--profile", "code", "--experts", "5", "--name", "five"]) == 0
    printed = capsys.readouterr()
    assert "keeps 15 of 24 experts" in printed.out and "--set five" in printed.err
    made = load_set(path, "five")
    assert made.method == "reap" and made.parameters["experts"] == 5
    assert all(0 < sum(made.pick_share[layer]) < 1 for layer in made.kept)
    with Engine.from_pretrained(path, set="five", set_mode="hard", context=64) as engine:
        assert engine.generate("hello").stats.routing == "set five, hard"
    assert main(["prune", str(path), "--profile", "code", "--experts", "6", "--name", "five"]) == 2
    assert load_set(path, "five").num_kept == 15  # not replaced


def test_json_and_dry_run(path, capsys):
    arguments = ["prune", str(path), "--profile", "code", "--keep", "50%", "--name", "half"]
    assert main([*arguments, "--method", "frequency", "--json", "--dry-run"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kept"]["0"] == [0, 1, 2, 3] and document["num_kept"] == 12
    assert [row["share"] for row in document["rows"]] == pytest.approx([1 / 8, 1 / 4, 1 / 2])
    assert "half" not in set_names(path)


def test_fit_streams_no_more(path, capsys):
    """The set of --fit runs in that budget without a read after it was warmed up."""
    with Engine.from_pretrained(path, context=64) as engine:
        spare = 8 * engine._index.max_record_bytes
        budget = engine.plan.resident_budget_bytes - spare
    words = ["--fit", str(budget), "--context", "64", "--name", "fits"]
    assert main(["prune", str(path), "--profile", "code", *words]) == 0
    assert "keeps" in capsys.readouterr().out
    assert main(["prune", str(path), "--profile", "code", "--fit", "1MiB", "--name", "none"]) == 3
    said = capsys.readouterr().err
    assert "--fit 1.00 MiB is below the floor" in said and "next: give --fit " in said
    made = load_set(path, "fits")
    options = {"set": "fits", "set_mode": "hard", "context": 64, "memory": budget + (64 << 20)}
    with Engine.from_pretrained(path, **options) as engine:
        assert engine.report()["resident"]
        reads = engine.reader.stats()["num_reads"]
        assert reads == made.num_kept
        engine.generate(list(range(5, 60)))
        assert engine.reader.stats()["num_reads"] == reads


def test_a_text_is_run_with_and_without_the_set(path, tmp_path, capsys):
    """Nothing is kept with the store but the set; a cache of the set's size misses nothing."""
    np.save(tmp_path / "task.npy", np.random.default_rng(3).integers(0, 400, 700))
    words = ["--text", str(tmp_path / "task.npy"), "--keep", "50%", "--name", "texted", "--json"]
    assert main(["prune", str(path), *words, "--caches", "50%"]) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]
    assert row["set_hit_rate"] > row["full_hit_rate"] and row["set_bytes_per_token"] > 0
    assert document["rows_from"] == "by replay of 700 tokens of the text"
    made = load_set(path, "texted")
    assert made.parameters["tokens"] == 700 and made.parameters["texts"][0]["name"] == "task.npy"
    assert [file.name for file in (path / "profiles").iterdir()] == ["code.safetensors"]
    assert main(["prune", str(path), *words, "--profile", "code", "--force"]) == 2


def test_a_recorded_routing_is_replayed(path, tmp_path, capsys):
    of, rng = owner(path), np.random.default_rng(1)
    experts = np.sort(rng.random((60, 3, 8)).argsort(axis=-1)[..., :2], axis=-1)
    trace = Trace(
        experts=experts.astype(np.int32),
        weights=None,
        phase=np.full(60, DECODE, dtype=np.int8),
        num_experts=np.array(list(of.num_experts.values())),
        expert_bytes=np.full(3, load_index(path).max_record_bytes),
    )
    trace.save(tmp_path / "trace.safetensors")
    arguments = ["prune", str(path), "--profile", "code", "--keep", "50%", "--name", "t", "--json"]
    assert main([*arguments, "--dry-run", "--trace", str(tmp_path / "trace.safetensors")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "replay" in document["rows_from"]
    for row in document["rows"]:
        assert row["set_hit_rate"] > row["full_hit_rate"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "0" * 64}, "another tokenizer"),
        ({"fingerprint": "0" * 32}, "another checkpoint"),
        ({"top_k": 1}, "another model"),
        ({"num_tokens": 0}, "is empty"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(path, tmp_path, capsys, change, message):
    profile = planted(path)
    for name, value in change.items():
        setattr(profile, name, value)
    for sums in profile.layers.values():
        if "num_tokens" in change:
            sums.hard_count[:] = 0
        elif "top_k" in change:
            sums.hard_count[:] = [TOKENS, *[0] * 7]
    file = tmp_path / "wrong.safetensors"
    profile.save(file)
    arguments = ["prune", str(path), "--profile", str(file), "--keep", "50%", "--name", "w"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and "w" not in set_names(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "x"], "how much stays"),
        (["--keep", "50%", "--experts", "4", "--name", "x"], "how much stays"),
        (["--keep", "50%"], "needs a name"),
        (["--keep", "50%", "--name", "../x"], "cannot be the name"),
        (["--keep", "150%", "--name", "x"], "expected a share"),
        (["--keep", "50%", "--name", "x", "--profile", "nothing"], "no profile"),
        (["--keep", "50%", "--name", "x", "--profile", "code", "--caches", "x%"], "--caches"),
    ],
)
def test_command_lines_that_cannot_be_meant(path, capsys, words, message):
    assert main(["prune", str(path), *words]) in (2, 4)
    assert message in capsys.readouterr().err


def test_what_is_read_most_lies_between(path, index):
    """Misses of a cache that forgets what was not used for a while, from counts alone."""
    profile = planted(path)
    cache_bytes = index.expert_bytes * 5 // 8
    reads = expected_reads(profile, index, cache_bytes)
    uses = {layer: sums.hard_count / TOKENS for layer, sums in profile.layers.items()}
    for layer, misses in reads.items():
        assert (misses <= uses[layer]).all() and misses.min() > 0
        most, least = uses[layer].argmax(), uses[layer].argmin()
        assert misses.argmax() not in (most, least)  # always there; hardly ever wanted
    kept = sum(
        float((1 - misses / uses[layer]).sum()) * index.max_record_bytes
        for layer, misses in reads.items()
    )
    assert kept == pytest.approx(cache_bytes, rel=1e-6)
    everything = expected_reads(profile, index, index.expert_bytes)
    assert max(misses.max() for misses in everything.values()) < 1e-6


def test_reads_are_spared_where_they_cost_more_than_they_are_worth(path, index, capsys):
    profile = planted(path)
    scores = scores_of(profile, "frequency")
    assert spare_reads(scores, profile, index, 0.0) is scores
    kept = choose(scores, index, TOP_K, Amount(experts=4))
    sparing = choose(spare_reads(scores, profile, index, 0.9), index, TOP_K, Amount(experts=4))
    reads = expected_reads(profile, index, index.expert_bytes // 4)
    for layer in kept:
        assert sparing[layer] != kept[layer]
        assert reads[layer][list(sparing[layer])].sum() < reads[layer][list(kept[layer])].sum()
    words = ["--profile", "code", "--keep", "50%", "--name", "sparing", "--spare-reads"]
    assert main(["prune", str(path), *words, "0.5"]) == 0
    assert load_set(path, "sparing").parameters["spare_reads"] == 0.5
    capsys.readouterr()
    assert main(["prune", str(path), *words, "1.5", "--force"]) == 2
    assert "expected 0 to below 1" in capsys.readouterr().err
