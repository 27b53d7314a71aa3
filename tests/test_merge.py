"""Merging without a store: assignment, clusters, groups, averages (papers.md 2.5, 3.1, 3.4)."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from merge_small import WIDTH, output_of, permuted, random_body

from edgemoe.quant.assignment import best_assignment
from edgemoe.quant.calibrate import logit_sums
from edgemoe.quant.clustering import k_means, logit_similarity, spectral_clusters
from edgemoe.quant.merge import (
    Group,
    LayerMerge,
    choose_groups,
    dominant_experts,
    router_of,
)
from edgemoe.quant.merge_bodies import merged_body, merged_rows, neuron_order, ordered
from edgemoe.quant.merge_outputs import output_similarities
from edgemoe.quant.merge_plan import merged_routes
from edgemoe.quant.prune import Amount
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.profile import Profile

TOP_K = 2


# ---- assignment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("seed", range(4))
def test_no_assignment_is_better(size, seed):
    scores = np.random.default_rng(seed).normal(size=(size, size)).round(seed % 2 + 1)  # ties too
    found = best_assignment(scores)
    best = max(sum(scores[i, p[i]] for i in range(size)) for p in permutations(range(size)))
    assert sorted(found) == list(range(size))
    assert scores[np.arange(size), found].sum() == pytest.approx(best)


def test_a_large_assignment_is_optimal_by_its_prices():
    """No exchange of two and no cycle of three is better, and a planted order is found."""
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(90, 90))
    found = best_assignment(scores)
    assert sorted(found) == list(range(90))
    value = scores[:, found]  # [row, the row whose column it would take]
    own = np.diagonal(value)
    gain = value - own[:, None]
    assert (gain + gain.T).max() <= 1e-9
    around = gain[:, :, None] + gain[None, :, :] + gain.T[:, None, :]  # i -> j -> k -> i
    assert around.max() <= 1e-9
    order = rng.permutation(90)
    assert np.array_equal(best_assignment(np.eye(90)[order] + 0.1 * rng.random((90, 90))), order)


# ---- clusters -----------------------------------------------------------------------------------


def planted(labels, rng, alike=0.9, apart=0.55, noise=0.02):
    labels = np.asarray(labels)
    similarity = np.where(labels[:, None] == labels, alike, apart)
    similarity = similarity + noise * rng.random(similarity.shape)
    similarity = (similarity + similarity.T) / 2
    np.fill_diagonal(similarity, 1.0)
    return similarity


@pytest.mark.parametrize("seed", range(5))
def test_planted_blocks_are_found(seed):
    rng = np.random.default_rng(seed)
    labels = np.concatenate((np.arange(6), rng.integers(0, 6, 18)))
    rng.shuffle(labels)
    found = spectral_clusters(planted(labels, rng), 6, seed)
    assert np.array_equal(found[:, None] == found, labels[:, None] == labels)


def test_clusters_are_the_same_every_time_and_none_is_empty():
    rng = np.random.default_rng(1)
    similarity = rng.random((20, 20))
    similarity = (similarity + similarity.T) / 2
    for count in (1, 2, 7, 19, 20):
        found = spectral_clusters(similarity, count, seed=4)
        assert np.array_equal(found, spectral_clusters(similarity, count, seed=4))
        assert sorted(set(found.tolist())) == list(range(count))
        firsts = [int(np.flatnonzero(found == each)[0]) for each in range(count)]
        assert firsts == sorted(firsts)  # numbered as they come
    for points in (np.ones((9, 3)), np.repeat(np.eye(3), 3, axis=0)):
        assert set(k_means(points, 5).tolist()) == set(range(5))
    assert len(set(spectral_clusters(np.ones((6, 6)), 3).tolist())) == 3
    with pytest.raises(ValueError, match="6 experts cannot be 7 clusters"):
        spectral_clusters(np.ones((6, 6)), 7)


def test_similarity_of_logits_is_their_cosine_and_chunks_add_up():
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn((300, 16), generator=rng), torch.randn((6, 16), generator=rng)

    class Router:
        def linear(self, x):
            return x @ weight.numpy().T

    soft, gram = logit_sums(Router(), x.numpy())
    parts = [logit_sums(Router(), part.numpy()) for part in x.split(77)]
    assert torch.allclose(sum(g for _, g in parts), gram, rtol=1e-10)
    assert torch.allclose(sum(s for s, _ in parts), soft, rtol=1e-10)
    logits = (x @ weight.T).double()
    cosine = torch.nn.functional.cosine_similarity(logits[:, 1], logits[:, 4], dim=0)
    found = logit_similarity(gram.numpy())
    assert found[1, 4] == pytest.approx((1 + float(cosine)) / 2)
    assert np.array_equal(found, found.T) and (np.diagonal(found) == 1).all()
    gram[2] = gram[:, 2] = 0.0  # never said a word
    assert logit_similarity(gram.numpy())[2, 3] == 0.5


# ---- groups -------------------------------------------------------------------------------------


def profile_of(*counts) -> Profile:
    """With these picks by layer (in order of ids) and logits that fall into the families of
    `i // 2`."""
    profile = Profile.empty({layer: len(each) for layer, each in enumerate(counts)}, TOP_K)
    for sums, each in zip(profile.layers.values(), counts, strict=True):
        sums.hard_count[:] = each
        family = np.arange(len(each)) // 2
        sums.logit_gram = np.where(family[:, None] == family, 0.98, 0.1)
        np.fill_diagonal(sums.logit_gram, 1.0)
    return profile


def similarities(profile):
    return {k: logit_similarity(sums.logit_gram) for k, sums in profile.layers.items()}


def test_uncurl_finds_the_families_and_their_heads():
    profile = profile_of([9, 1, 3, 4, 0, 0, 7, 7], [1, 2, 3, 4, 5, 6, 7, 8])
    merge = choose_groups("uncurl", profile, similarities(profile), TOP_K, Amount(experts=4))
    first, second = merge[0], merge[1]
    assert [group.members for group in first.groups] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert first.heads == (0, 3, 4, 6) and second.heads == (1, 3, 5, 7)
    assert first.bodies == (0, 0, 1, 1, 2, 2, 3, 3)
    assert first.groups[0].weights == (0.9, 0.1)
    assert first.groups[2].weights == (0.5, 0.5)  # nobody was picked
    whole = choose_groups(
        "uncurl", profile, similarities(profile), TOP_K, Amount(0.5, None, None, True)
    )
    assert whole[0].bodies == tuple(range(8)) and whole[1] == second


def test_dominant_experts_follow_the_picks_of_all_layers():
    """Shares of layer 0 are 70, 10, 10, 5, 5; of layer 1 all 20: after top-k of each, the places
    left go to the even layer."""
    picks = {0: np.array([70, 10, 10, 5, 5]), 1: np.array([20, 20, 20, 20, 20])}
    assert dominant_experts(picks, {0: 3, 1: 3}, 1) == {0: [0], 1: [0, 1, 2, 3, 4]}
    assert dominant_experts(picks, {0: 3, 1: 3}, 2) == {0: [0, 1], 1: [0, 1, 2, 3]}
    assert dominant_experts(picks, {0: 5, 1: 3}, 1) == {0: [0, 1, 2, 3, 4], 1: [0, 1, 2]}


def test_msmoe_counts_differ_by_layer_and_others_join_the_most_alike():
    profile = profile_of([50, 2, 30, 2, 8, 4, 2, 2], [12, 13, 12, 13, 12, 13, 12, 13])
    merge = choose_groups("msmoe", profile, similarities(profile), TOP_K, Amount(experts=4))
    assert merge[0].heads == (0, 2) and len(merge[1].groups) == 6
    assert merge[1].heads == (0, 1, 2, 3, 5, 7)
    assert merge[0].bodies[:4] == (0, 0, 1, 1)  # by likeness
    members = {group.head: group.members for group in merge[1].groups}
    assert members[5] == (4, 5) and members[7] == (6, 7)


def test_amounts_and_routers_that_cannot_be():
    profile = profile_of([1] * 8)
    for amount in (Amount(experts=1), Amount(experts=9)):
        with pytest.raises(UsageError, match="every token needs 2"):
            choose_groups("uncurl", profile, similarities(profile), TOP_K, amount)
    assert router_of("uncurl", None) == "index-map" and router_of("diversify", None) == "merged"
    assert router_of("uncurl", "untrained") == "untrained"
    for method, router in (
        ("msmoe", "untrained"),
        ("diversify", "index-map"),
        ("uncurl", "merged"),
    ):
        with pytest.raises(UsageError, match="does not go with"):
            router_of(method, router)


def test_outputs_are_compared_and_every_expert_is_read_once():
    """A permuted copy computes the same (1), a scaled one is as alike, strangers are not."""
    first, second = random_body(0), random_body(1)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))
    scaled = (second[0], second[1], 3 * second[2])
    bodies, read = [first, second, permuted(first, order), scaled], []

    class Source:
        args = SimpleNamespace(num_experts=4)

        def expert(self, layer, expert):
            read.append((layer, expert))
            return bodies[expert]

    rng = torch.Generator().manual_seed(3)
    inputs = {layer: torch.randn((200, 64), generator=rng) for layer in (1, 4)}
    alike = output_similarities(Source(), inputs)
    assert read == [(layer, expert) for layer in (1, 4) for expert in range(4)]
    for found in alike.values():
        assert np.array_equal(found, found.T)
        assert found[0, 2] == pytest.approx(1, abs=1e-5) == found[1, 3]
        assert found[0, 1] < 0.9
        assert np.array_equal(spectral_clusters(found, 2), [0, 1, 0, 1])


def test_merged_routes_name_each_body_once():
    groups = (Group(0, (0, 2), (0.5, 0.5)), Group(1, (1,), (1.0,)), Group(3, (3,), (1.0,)))
    merge = {0: LayerMerge(groups)}
    routes = np.array([[[0, 2, 3]], [[0, 1, 3]], [[1, 2, -1]]])
    assert merged_routes(routes, merge).tolist() == [[[0, 2, -1]], [[0, 1, 2]], [[0, 1, -1]]]


# ---- bodies -------------------------------------------------------------------------------------


def test_alignment_is_one_permutation_of_all_three_matrices():
    """A copy whose gate, up and down were shuffled together is put back; its down alone says too
    little to do so."""
    body = random_body(0)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    copy = permuted(body, order)
    found = neuron_order(body, copy)
    assert torch.equal(order[found], torch.arange(WIDTH))
    assert all(
        torch.equal(a, b)
        for a, b in zip(ordered(copy, neuron_order(body, copy)), body, strict=True)
    )


def test_an_expert_and_its_permuted_copy_are_the_expert():
    bodies = {0: random_body(0)}
    for expert in (1, 2):
        rng = torch.Generator().manual_seed(expert)
        bodies[expert] = permuted(bodies[0], torch.randperm(WIDTH, generator=rng))
    group = Group(0, (0, 1, 2), (0.6, 0.3, 0.1))
    merged = merged_body(group, bodies.__getitem__)
    x = torch.randn((50, 64), generator=torch.Generator().manual_seed(7))
    assert (output_of(merged, x) - output_of(bodies[0], x)).abs().max() <= 1e-5
    plain = merged_body(Group(0, (0, 1), (0.5, 0.5)), {0: bodies[0], 1: bodies[1]}.__getitem__)
    naive = [(a + b) / 2 for a, b in zip(bodies[0], bodies[1], strict=True)]
    assert (output_of(plain, x) - output_of(bodies[0], x)).abs().max() <= 1e-5
    assert (output_of(naive, x) - output_of(bodies[0], x)).abs().max() > 0.05  # without alignment


def test_identical_experts_merge_exactly():
    body, rows = random_body(3), torch.randn((4, 8)).bfloat16().float()
    rows[2] = rows[0]
    group = Group(0, (0, 2), (0.7, 0.3))
    merged = merged_body(group, lambda _: tuple(part.clone() for part in body))
    assert all(torch.equal(a, b) for a, b in zip(merged, body, strict=True))
    assert torch.equal(merged_rows(group, rows), rows[0])


def test_the_average_is_weighted_by_use():
    bodies = {0: random_body(0), 1: random_body(1)}
    merged = merged_body(Group(1, (0, 1), (0.25, 0.75)), bodies.__getitem__)
    other = ordered(bodies[0], neuron_order(bodies[1], bodies[0]))
    for part, a, b in zip(merged, bodies[1], other, strict=True):
        assert torch.allclose(part, 0.75 * a + 0.25 * b, atol=1e-6)
    rows = torch.randn((2, 8))
    expected = 0.25 * rows[0] + 0.75 * rows[1]
    assert torch.allclose(merged_rows(Group(1, (0, 1), (0.25, 0.75)), rows), expected, atol=1e-6)
    unused = merged_body(Group(1, (0, 1), (0.0, 1.0)), bodies.__getitem__)
    assert all(torch.equal(a, b) for a, b in zip(unused, bodies[1], strict=True))
