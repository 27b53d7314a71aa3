"""The executor on real stores: the same bits whatever the cache, and one read per record."""

import itertools

import numpy as np
import pytest
from stores import HIDDEN, NUM_EXPERTS, damage_record, make_store

from edgemoe.runtime import core, kernels
from edgemoe.runtime.cache import ExpertCache
from edgemoe.runtime.errors import BudgetError, RecordError, UsageError
from edgemoe.runtime.executor import Executor
from edgemoe.runtime.index import EXPERTS_FILE
from edgemoe.runtime.io import Arena, RecordReader
from edgemoe.runtime.policy import POLICIES

TOP_K = 3
BACKENDS = ["reference"] + (["native"] if core.lib else [])
native = pytest.mark.skipif(core.lib is None, reason="native core not built")


class CountingReader(RecordReader):
    """The real reader, which remembers what it was asked for since `asked` was cleared."""

    asked: list[int]

    def submit(self, keys, addresses):
        self.asked += keys.tolist()
        super().submit(keys, addresses)


class Rig:
    def __init__(self, index, capacity, policy="cycle", backend="native", threads=1, chunk=64):
        records = list(index.records.values())
        self.reader = CountingReader(index.path / EXPERTS_FILE, records, backend=backend)
        self.reader.asked = []
        self.cache = ExpertCache(
            self.reader, Arena(max(capacity, 1), backend), capacity, index.records, policy
        )
        self.pool = kernels.ThreadPool(threads)
        self.executor = Executor(
            self.cache, self.pool, backend, hidden=HIDDEN, top_k=TOP_K, chunk=chunk
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.reader.close()
        self.pool.close()

    def run(self, steps) -> list[np.ndarray]:
        """Outputs of all steps; each asks for a record at most once, and only for what it needs."""
        outputs = []
        for layer, x, ids, weights in steps:
            outputs.append(self.executor.run(layer, x, ids, weights))
            wanted = {layer * NUM_EXPERTS + expert for expert in ids.flatten().tolist()}
            assert len(set(self.reader.asked)) == len(self.reader.asked)
            assert set(self.reader.asked) <= wanted
            assert self.cache.pinned_bytes == 0
            assert self.cache.resident_bytes <= self.cache.capacity_bytes
            self.reader.asked = []
        return outputs


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("executor") / "tiny.edgemoe")


def make_steps(sizes, seed=0):
    """One step per layer and size: layer, x [T, D], expert_ids [T, K], routing_weights [T, K]."""
    rng = np.random.default_rng(seed)
    steps = []
    for num_tokens in sizes:
        for layer in range(4):
            x = rng.normal(size=(num_tokens, HIDDEN)).astype(np.float32)
            ids = rng.random((num_tokens, NUM_EXPERTS)).argsort(axis=-1)[:, :TOP_K]
            weights = rng.random((num_tokens, TOP_K), dtype=np.float32)
            steps.append((layer, x, ids, weights))
    return steps


def expected(index, step) -> np.ndarray:
    """float64, straight from the definition and the unpacked bytes of the file."""
    layer, x, ids, weights = step
    data = (index.path / EXPERTS_FILE).read_bytes()
    y = np.zeros(x.shape)
    for t, k in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        record = index.records[layer, int(ids[t, k])]
        part = np.frombuffer(data, np.uint8, record.num_bytes, record.offset)
        gate, up, down = (m.astype(np.float64) for m in kernels.unpack_record(part, record.layout))
        inputs = x[t].astype(np.float64)
        h = gate @ inputs
        h *= (up @ inputs) / (1 + np.exp(-h))
        y[t] += weights[t, k] * (down @ h)
    return y


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_computes_the_weighted_sum_of_experts(index, backend):
    # The native path rounds activations to int8 in groups of 32, the reference rounds nothing.
    tolerance = 0.02 if backend == "native" else 1e-5
    with Rig(index, index.expert_bytes, backend=backend) as rig:
        steps = make_steps([1, 5])
        for step, y in zip(steps, rig.run(steps), strict=True):
            wanted = expected(index, step)
            assert y.dtype == np.float32
            assert np.linalg.norm(y - wanted) <= tolerance * np.linalg.norm(wanted)


def capacities(index) -> list[int]:
    three = TOP_K * index.max_record_bytes
    return [three, 2 * three, index.expert_bytes // 2, index.expert_bytes]


@native
def test_the_bits_do_not_depend_on_cache_policy_or_threads(index):
    steps = make_steps([1, 5, 64, 1])
    with Rig(index, index.expert_bytes) as rig:
        wanted = rig.run(steps)
        again = rig.run(steps)  # everything is resident now
        assert rig.executor.take_stats().misses == 4 * NUM_EXPERTS
    assert all(np.array_equal(a, b) for a, b in zip(wanted, again, strict=True))
    for capacity, policy, threads in itertools.product(
        capacities(index), sorted(POLICIES), (1, 2, 3)
    ):
        with Rig(index, capacity, policy, threads=threads) as rig:
            found = rig.run(steps)
            assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))


@native
@pytest.mark.parametrize("capacity_records", [1, 2])
def test_one_record_is_enough_memory(index, capacity_records):
    steps = make_steps([1, 64])
    with Rig(index, index.expert_bytes) as whole:
        wanted = whole.run(steps)
    with Rig(index, capacity_records * index.max_record_bytes) as rig:
        found = rig.run(steps)
        assert rig.cache.evictions
    assert all(np.array_equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_the_reference_has_the_same_bits_for_every_capacity(index):
    steps = make_steps([1, 5, 64])
    results = []
    for capacity in (capacities(index)[0], index.expert_bytes):
        with Rig(index, capacity, backend="reference") as rig:
            results.append(rig.run(steps))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@native
def test_a_row_has_the_same_bits_alone_and_in_a_chunk(index):
    (layer, x, ids, weights), *_ = make_steps([64])
    with Rig(index, capacities(index)[1]) as rig:
        together = rig.executor.run(layer, x, ids, weights)
        for t in range(0, 64, 7):
            row = slice(t, t + 1)
            assert np.array_equal(
                rig.executor.run(layer, x[row], ids[row], weights[row]), together[row]
            )


@native
def test_an_expert_chosen_twice_counts_twice(index):
    layer, x, _, weights = make_steps([1])[0]
    with Rig(index, index.expert_bytes) as rig:
        found = rig.executor.run(layer, x, np.array([[5, 2, 5]]), weights)
        total = np.stack([weights[:, 1], weights[:, 0] + weights[:, 2]], axis=1)
        wanted = rig.executor.run(layer, x, np.array([[2, 5]]), total)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@native
def test_more_pairs_than_one_wave_takes(index):
    """A chunk of 4 has waves of 8 pairs: 12 pairs need two waves even where all is resident."""
    (layer, x, ids, weights), *_ = make_steps([4])
    with Rig(index, index.expert_bytes) as wide, Rig(index, index.expert_bytes, chunk=4) as narrow:
        wanted = wide.executor.run(layer, x, ids, weights)
        for _ in range(2):
            assert np.array_equal(narrow.executor.run(layer, x, ids, weights), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stats_count_records_once_per_run(index, backend):
    steps = make_steps([1, 64])
    with Rig(index, index.expert_bytes, backend=backend) as rig:
        rig.run(steps)
        stats = rig.executor.take_stats()
        needed = sum(len(set(ids.flatten().tolist())) for _, _, ids, _ in steps)
        distinct = len({(lay, e) for lay, _, ids, _ in steps for e in ids.flatten().tolist()})
        assert (stats.hits + stats.misses, stats.misses) == (needed, distinct)
        assert stats.bytes_read == rig.reader.stats()["num_bytes"] > 0
        assert stats.compute_s > 0 and stats.stall_s >= 0
        empty = rig.executor.take_stats()
        assert (empty.hits, empty.misses, empty.compute_s) == (0, 0, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.15, 1.0])
def test_a_damaged_record_is_named_and_the_executor_stays_usable(tmp_path, backend, share):
    index = make_store(tmp_path / "bad.edgemoe")
    capacity = int(share * index.expert_bytes)
    steps = make_steps([64])
    with Rig(index, capacity, backend=backend) as rig:
        wanted = rig.run(steps)
    damage_record(index, 2, 4)
    with Rig(index, capacity, backend=backend) as rig:
        for _ in range(2):
            with pytest.raises(RecordError) as error:
                rig.executor.run(*steps[2])
            assert (error.value.layer, error.value.expert) == (2, 4)
            assert error.value.exit_code == 1
            assert rig.cache.pinned_bytes == 0
        rig.reader.asked = []
        assert np.array_equal(rig.run(steps[3:])[0], wanted[3])
        damage_record(index, 2, 4)  # the same bit again: repaired
        assert np.array_equal(rig.run(steps[2:3])[0], wanted[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_smaller_than_one_record_is_refused(index, backend):
    largest = max(index.records, key=lambda name: index.records[name].num_bytes)
    ids = np.array([[largest[1]]])
    with Rig(index, index.max_record_bytes - 4096, backend=backend) as rig:
        with pytest.raises(BudgetError, match="larger --memory"):
            rig.executor.run(
                largest[0], np.zeros((1, HIDDEN), np.float32), ids, np.ones((1, 1), np.float32)
            )
        assert rig.cache.pinned_bytes == 0


def test_what_cannot_be_meant_is_refused(index):
    with Rig(index, index.expert_bytes, backend=BACKENDS[-1]) as rig:
        layer, x, ids, weights = make_steps([5])[0]
        run = rig.executor.run
        for wrong, found in (
            ((9, x, ids, weights), "layer 9 has no expert records"),
            ((layer, x, ids + NUM_EXPERTS, weights), "has no expert 1"),
            ((layer, x, ids - NUM_EXPERTS, weights), "has no expert -"),
            ((layer, x[:, :32], ids, weights), "do not go together"),
            ((layer, x[:4], ids, weights), "do not go together"),
            ((layer, x, ids, weights[:, :2]), "do not go together"),
            ((layer, x.astype(np.float64), ids, weights), "expected fp32"),
            ((layer, x, ids, weights.astype(np.float16)), "expected fp32"),
            (make_steps([65])[0], "at most 64 tokens"),
            ((layer, x, ids[:, :1].repeat(4, 1), weights[:, :1].repeat(4, 1)), "3 experts each"),
        ):
            with pytest.raises(UsageError, match=found):
                run(*wrong)
        assert run(layer, x[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)
        assert np.array_equal(
            run(layer, np.asfortranarray(x), ids, weights), run(layer, x, ids, weights)
        )
