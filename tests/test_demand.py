"""A token that the core decodes by itself leaves the expert cache as a run per layer does."""

import numpy as np
import pytest
import torch
from stores import HIDDEN, NUM_EXPERTS, NUM_LAYERS, make_store

from edgemoe.runtime import core, kernels
from edgemoe.runtime.cache import ExpertCache
from edgemoe.runtime.errors import BudgetError
from edgemoe.runtime.executor import Executor
from edgemoe.runtime.index import EXPERTS_FILE
from edgemoe.runtime.io import READING, READY, Arena, RecordReader
from edgemoe.runtime.policy import POLICIES

TOP_K = 3
BACKEND = "native" if core.lib else "reference"


class Rig:
    """An executor over an expert cache of `capacity` bytes."""

    def __init__(self, index, capacity, policy):
        records = list(index.records.values())
        self.reader = RecordReader(index.path / EXPERTS_FILE, records, backend=BACKEND)
        self.arena = Arena(capacity, BACKEND)
        self.cache = ExpertCache(self.reader, self.arena, capacity, index.records, policy)
        self.pool = kernels.ThreadPool(1)
        self.executor = Executor(
            self.cache, self.pool, BACKEND, hidden=HIDDEN, top_k=TOP_K, chunk=16
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.reader.close()
        self.pool.close()

    def holds(self):
        """Where everything lies, and all counters."""
        cache = self.cache
        counters = (cache.hits, cache.misses, cache.bytes_read, cache.evictions)
        start = self.arena.address
        places = [a and a - start for a in cache.addresses(range(len(cache.table)))]
        return counters, places

    def run(self, place, ids) -> None:
        """One layer as the torch path runs it."""
        ids = torch.as_tensor(ids, dtype=torch.int64)
        self.executor.run(place, torch.ones(len(ids), HIDDEN), ids, torch.ones(ids.shape))

    def decode(self, routes) -> None:
        """One token as the native path runs it: demand only where a record is absent or failed."""
        executor, known = self.executor, np.full_like(routes, -1)
        for place, experts in enumerate(routes):
            known[place] = experts
            keys = place * NUM_EXPERTS + experts
            statuses = self.reader.status[keys]
            if (executor.addresses[keys] == 0).any() or (statuses < READING).any():
                executor.demand(place, known)
            for key in keys.tolist():
                assert self.reader.wait(key) == READY
                assert executor.addresses[key] == self.cache.addresses([key])[0] != 0
        executor.finish_token(routes, stall_s=0.25, compute_s=0.5, native_s=1.0)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("demand") / "tiny.edgemoe")


def random_routes(num_tokens, seed):
    """[num_tokens, layers, K] int32, ascending; low ids are preferred."""
    rng = np.random.default_rng(seed)
    odds = 1 / np.arange(1, NUM_EXPERTS + 1)
    chosen = [
        np.sort(rng.choice(NUM_EXPERTS, TOP_K, replace=False, p=odds / odds.sum()))
        for _ in range(num_tokens * NUM_LAYERS)
    ]
    return np.array(chosen, dtype=np.int32).reshape(num_tokens, NUM_LAYERS, TOP_K)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("share", [0.14, 0.3, 0.5, 0.75, 1.0])
def test_it_hits_evicts_and_places_as_a_run_per_layer(index, policy, share):
    capacity = max(int(share * index.expert_bytes), TOP_K * index.max_record_bytes)
    routes = random_routes(60, seed=7)
    chunk = [[[0, 1, 2], [5, 6, 7]]] * NUM_LAYERS
    with Rig(index, capacity, policy) as layered, Rig(index, capacity, policy) as native:
        for number, token in enumerate(routes):
            if number % 20 == 9:  # a prompt in between
                for rig in (layered, native):
                    for place, ids in enumerate(chunk):
                        rig.run(place, ids)
            for place, experts in enumerate(token):
                layered.run(place, experts[None])
            native.decode(token)
            assert native.holds() == layered.holds()
            assert native.cache.pinned_bytes == 0
        wanted, found = layered.executor.take_stats(), native.executor.take_stats()
        assert (found.hits, found.misses, found.bytes_read, found.num_calls) == (
            (wanted.hits, wanted.misses, wanted.bytes_read, wanted.num_calls)
        )
        submit_s = native.cache.reader.submit_s
        assert len(routes) <= found.native_s <= len(routes) + submit_s
        assert found.misses and (share == 1.0) == (native.cache.evictions == 0)


def test_what_is_resident_costs_no_demand(index):
    with Rig(index, index.expert_bytes, "cycle") as rig:
        token = random_routes(1, seed=1)[0]
        rig.decode(token)
        rig.executor.demand = None  # would raise where it is called
        rig.decode(token)
        assert rig.executor.take_stats().misses == token.size


def test_a_token_that_failed_holds_nothing(index):
    capacity = TOP_K * index.max_record_bytes
    with Rig(index, capacity, "cycle") as layered, Rig(index, capacity, "cycle") as native:
        first, second = random_routes(2, seed=2)
        for place in range(3):
            layered.run(place, first[place][None])
            native.executor.demand(place, first)
            for key in (place * NUM_EXPERTS + first[place]).tolist():
                native.reader.wait(key)
        assert native.cache.pinned_bytes
        native.executor.abort_token(3, first)
        assert native.cache.pinned_bytes == 0
        assert native.holds() == layered.holds()
        for place, experts in enumerate(second):
            layered.run(place, experts[None])
        native.decode(second)
        assert native.holds() == layered.holds()


def test_what_does_not_fit_is_refused_and_leaves_nothing(index):
    with Rig(index, index.max_record_bytes, "cycle") as rig:
        routes = random_routes(1, seed=3)[0]
        with pytest.raises(BudgetError):
            rig.executor.demand(2, routes)
        rig.executor.abort_token(2, routes)
        assert rig.cache.pinned_bytes == rig.cache.resident_bytes == 0
