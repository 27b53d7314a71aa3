"""The expert cache on real stores and real readers, against a replay of what it should hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import NUM_EXPERTS, damage_record, make_store
from test_extents import free_extents

from edgemoe.runtime import core
from edgemoe.runtime.cache import ExpertCache
from edgemoe.runtime.errors import BudgetError, RecordError, UsageError
from edgemoe.runtime.index import EXPERTS_FILE
from edgemoe.runtime.io import ABSENT, READING, READY, Arena, RecordReader
from edgemoe.runtime.policy import NO_VICTIM, POLICIES, make_policy

BACKENDS = ["reference"] + (["native"] if core.lib else [])


class RecordingReader(RecordReader):
    """The real reader, which remembers what it was asked for. Reads of the key `slow` begin only
    when somebody waits."""

    slow = None

    def submit(self, keys, addresses):
        self.submitted = [*getattr(self, "submitted", []), *keys.tolist()]
        if self.slow in keys:
            self.status[keys] = READING
            self.held = keys, addresses
        else:
            super().submit(keys, addresses)

    def wait(self, key):
        if self.slow is not None:
            keys, addresses = self.held
            self.slow = None
            assert self.cache.addresses(keys) == addresses.tolist()  # still where they were
            self.status[keys] = ABSENT
            super().submit(keys, addresses)
        return super().wait(key)


def file_contents(index) -> list[bytes]:
    """The records on disk, by key."""
    data = (index.path / EXPERTS_FILE).read_bytes()
    return [data[r.offset : r.offset + r.num_bytes] for r in index.records.values()]


class Rig:
    """A store, what its records hold, and a cache with its reader and arena."""

    def __init__(self, index, capacity, policy="cycle", backend="reference", arena=None, **options):
        self.index = index
        records = list(index.records.values())
        self.reader = RecordingReader(index.path / EXPERTS_FILE, records, backend=backend)
        self.arena = Arena(arena or max(capacity, 1), backend)
        self.cache = ExpertCache(
            self.reader, self.arena, capacity, index.records, policy, **options
        )
        self.reader.cache = self.cache
        self.sizes = [record.num_bytes for record in records]
        self.contents = file_contents(index)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.reader.close()

    def resident(self) -> set[int]:
        addresses = self.cache.addresses(range(len(self.sizes)))
        return {key for key, address in enumerate(addresses) if address}

    def check(self) -> None:
        """Accounts are exact, nothing overlaps, and what is whole has the bytes of the file."""
        cache, resident = self.cache, self.resident()
        assert cache.resident_bytes == sum(self.sizes[key] for key in resident)
        assert cache.resident_bytes <= cache.capacity_bytes
        assert cache.num_resident == len(resident)
        start = self.arena.address
        keys = sorted(resident)
        spans = sorted(
            (address - start, self.sizes[key])
            for key, address in zip(keys, cache.addresses(keys), strict=True)
        )
        position = 0
        for offset, num_bytes in spans:
            assert offset >= position
            position = offset + num_bytes
        assert position <= cache.capacity_bytes
        for key in resident:
            if self.reader.status[key] == READY:
                assert cache.view(key).tobytes() == self.contents[key]

    def use(self, keys) -> None:
        self.cache.hint(keys)
        for key in keys:
            self.cache.wait(key)
        self.cache.release(keys)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("cache") / "tiny.edgemoe")


def random_steps(num_tokens, seed, top_k=2):
    """Demand of a router that prefers low ids: layer and keys, token by token."""
    rng = np.random.default_rng(seed)
    odds = 1 / np.arange(1, NUM_EXPERTS + 1)
    for _ in range(num_tokens):
        for layer in range(4):
            chosen = rng.choice(NUM_EXPERTS, top_k, replace=False, p=odds / odds.sum())
            yield layer, (layer * NUM_EXPERTS + np.sort(chosen)).tolist()


def replay(steps, sizes, capacity, policy_name):
    """What a cache of bytes, without places, holds after each step; with hits and misses."""
    policy = make_policy(policy_name, [key // NUM_EXPERTS for key in range(len(sizes))], 4)
    policy.set_sizes(sizes)
    policy.set_share(capacity / sum(sizes))
    resident, blocked = {}, np.ones(len(sizes), dtype=np.bool_)
    token, last = 0, 0
    for layer, keys in steps:
        token += layer <= last
        last = layer
        missing = [key for key in keys if key not in resident]
        blocked[keys] = True
        policy.expect(np.array(keys))
        for key in missing:
            while sum(resident.values()) + sizes[key] > capacity:
                victim = policy.victim(layer, blocked)
                assert victim != NO_VICTIM
                del resident[victim]
                blocked[victim] = True
                policy.remove(victim)
            resident[key] = sizes[key]
        policy.touch(np.array(keys), token)
        for key in missing:
            policy.insert(key)
        blocked[list(resident)] = False
        yield set(resident), len(keys) - len(missing), len(missing)


@pytest.mark.parametrize(
    ("backend", "policy"), [("reference", "cycle")] + [(BACKENDS[-1], name) for name in POLICIES]
)
@pytest.mark.parametrize("share", [0.16, 0.3, 0.7])
def test_it_holds_what_a_replay_holds(index, backend, policy, share):
    capacity = int(share * index.expert_bytes) // 4096 * 4096
    steps = list(random_steps(40, seed=1))
    with Rig(index, capacity, policy, backend, max_moved_per_byte=np.inf) as rig:
        for (layer, keys), (resident, hits, misses) in zip(
            steps, replay(steps, rig.sizes, capacity, policy), strict=True
        ):
            rig.cache.begin_layer(layer)
            result = rig.cache.hint(keys)
            assert (result.num_hits, result.num_misses) == (hits, misses)
            for key in keys:
                rig.cache.wait(key)
            rig.check()
            rig.cache.release(keys)
            assert rig.resident() == resident
        cache = rig.cache
        assert cache.hits + cache.misses == sum(len(keys) for _, keys in steps)
        assert cache.misses == len(rig.reader.submitted) == rig.reader.stats()["num_reads"]
        assert cache.bytes_read == rig.reader.stats()["num_bytes"]
        assert cache.evictions == cache.misses - cache.num_resident


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_store_is_read_once_where_it_fits(index, backend):
    with Rig(index, index.expert_bytes, backend=backend) as rig:
        for _, keys in random_steps(40, seed=2):
            rig.use(keys)
        for key in range(len(rig.sizes)):
            rig.use([key])
        rig.check()
        assert rig.cache.evictions == 0
        assert sorted(rig.reader.submitted) == list(range(len(rig.sizes)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_preload_fills_what_is_free_and_counts_no_demand(index, backend, share):
    with Rig(index, int(share * index.expert_bytes), backend=backend) as rig:
        cache = rig.cache
        if share:
            rig.use([3, 9])
        before, counters = rig.resident(), (cache.hits, cache.misses, cache.bytes_read)
        num_bytes = cache.preload()
        rig.check()
        assert before <= rig.resident()
        assert num_bytes == sum(rig.sizes[key] for key in rig.resident() - before)
        assert (cache.hits, cache.misses, cache.bytes_read) == counters
        assert cache.evictions == cache.pinned_bytes == 0
        free = [offset_bytes for _, offset_bytes in free_extents(cache._slots.extents)]
        absent = set(range(len(rig.sizes))) - rig.resident()
        assert max(free, default=0) < min((rig.sizes[key] for key in absent), default=1 << 60)
        by_layer = np.bincount([key // NUM_EXPERTS for key in rig.resident()], minlength=4)
        assert share == 0 or by_layer.min() > 0
        assert cache.preload() == 0
        for _, keys in random_steps(20, seed=4):  # the policy knows what was read
            if cache.fits(keys):
                rig.use(keys)
        rig.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_preload_names_a_damaged_record_and_keeps_the_others(tmp_path, backend):
    index = make_store(tmp_path / "bad.edgemoe")
    damage_record(index, 2, 4)
    with Rig(index, index.expert_bytes, backend=backend) as rig:
        with pytest.raises(RecordError) as error:
            rig.cache.preload()
        assert (error.value.layer, error.value.expert) == (2, 4)
        assert rig.resident() == set(range(len(rig.sizes))) - {2 * NUM_EXPERTS + 4}
        rig.check()
        damage_record(index, 2, 4)  # the same bit again: repaired
        assert rig.cache.preload() == rig.sizes[2 * NUM_EXPERTS + 4]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_history_of_hints_keeps_its_promises(index, backend, data):
    """Overlapping hints, released early or late, in any order, with and without waiting."""
    capacity = data.draw(st.integers(2, 40)) * 8192
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    ratio = data.draw(st.sampled_from([0, 2, np.inf]))
    with Rig(index, capacity, policy, backend, max_moved_per_byte=ratio) as rig:
        held: list[tuple[list[int], list[int]]] = []
        for _ in range(data.draw(st.integers(1, 15))):
            action = data.draw(st.sampled_from(["hint", "hint", "release", "wait", "layer"]))
            number = data.draw(st.integers(0, 14))  # always: what is held depends on the drive
            if action == "hint":
                keys = data.draw(st.lists(st.integers(0, 31), min_size=1, max_size=4, unique=True))
                fits, before = rig.cache.fits(keys), rig.resident()
                counters = rig.cache.hits, rig.cache.misses
                result = rig.cache.try_hint(keys)
                assert fits or result is None
                if result is None:
                    assert held or not fits  # with nothing pinned, what fits finds room
                    assert rig.resident() <= before
                    assert (rig.cache.hits, rig.cache.misses) == counters
                else:
                    held.append((keys, rig.cache.addresses(keys)))
                    assert result.num_hits == len(before & set(keys))
            elif action == "release" and held:
                rig.cache.release(held.pop(number % len(held))[0])
            elif action == "wait" and held:
                for key in held[-1][0]:
                    rig.cache.wait(key)
            elif action == "layer":
                later = data.draw(st.sets(st.integers(0, 31), max_size=5))
                rig.cache.begin_layer(data.draw(st.integers(0, 3)), keys=sorted(later))
            for keys, addresses in held:
                assert rig.cache.addresses(keys) == addresses
            pinned = {key for keys, _ in held for key in keys}
            assert rig.cache.pinned_bytes == sum(rig.sizes[key] for key in pinned)
            rig.check()
        for keys, _ in held:
            for key in keys:
                rig.cache.wait(key)
            rig.cache.release(keys)
        rig.check()
        largest = int(np.argmax(rig.sizes))
        if rig.sizes[largest] <= capacity:  # nothing is stuck: the largest record finds room
            rig.use([largest])


def test_reads_are_asked_for_in_the_order_of_urgency(index):
    with Rig(index, index.expert_bytes) as rig:
        rig.use([9])
        rig.use([12, 3, 9, 27, 5])
        assert rig.reader.submitted == [9, 12, 3, 27, 5]
        assert (rig.cache.hits, rig.cache.misses) == (1, 5)


def three_in_a_row(index) -> tuple[list[int], int]:
    """Three records, and a fourth that needs the memory of the first and the third joined."""
    sizes = [record.num_bytes for record in index.records.values()]
    large = max(range(32), key=sizes.__getitem__)
    a, b, c = (key for key in range(32) if sizes[key] == 20480)
    assert max(sizes[a], sizes[c]) < sizes[large] <= sizes[a] + sizes[c]
    return [a, b, c], large


def test_a_pinned_record_stays_where_it_is(index):
    (a, b, c), large = three_in_a_row(index)
    with Rig(index, 3 * 20480) as rig:
        for keys in ([a], [b], [c]):
            rig.use(keys)
        rig.cache.hint([b])
        address = rig.cache.addresses([b])
        assert rig.cache.fits([large]) and rig.cache.try_hint([large]) is None
        assert rig.cache.addresses([b]) == address
        rig.check()
        rig.cache.release([b])
        rig.cache.hint([b, large])  # an address that was not given out yet may move
        rig.cache.wait(large)
        assert rig.cache.moved_bytes == rig.sizes[b]
        rig.check()


def test_a_record_being_read_stays_where_it_is(index):
    (a, b, c), large = three_in_a_row(index)
    with Rig(index, 3 * 20480) as rig:
        rig.use([a])
        rig.reader.slow = b
        rig.cache.hint([b])
        rig.cache.release([b])
        rig.cache.hint([c])
        RecordReader.wait(rig.reader, c)
        rig.cache.release([c])
        rig.cache.hint([large])  # waits for b in the end
        assert rig.reader.slow is None
        rig.cache.wait(large)
        rig.check()


def test_what_does_not_fit_is_refused_and_changes_no_account(index):
    with Rig(index, 3 * index.max_record_bytes) as rig:
        pinned = [key for key, size in enumerate(rig.sizes) if size == max(rig.sizes)][:2]
        rig.cache.hint(pinned)
        others = [key for key in range(32) if key not in pinned][:6]
        assert not rig.cache.fits(others)
        assert rig.cache.try_hint(others) is None
        with pytest.raises(BudgetError, match="do not fit into the expert cache"):
            rig.cache.hint(others)
        assert rig.cache.misses == 2 and rig.cache.pinned_bytes == 2 * max(rig.sizes)
        rig.cache.wait(pinned[0])
        rig.cache.wait(pinned[1])
        rig.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_record_is_named_and_its_memory_freed(tmp_path, backend):
    index = make_store(tmp_path / "bad.edgemoe")
    whole = file_contents(index)
    damage_record(index, 1, 3)
    with Rig(index, index.expert_bytes // 2, backend=backend) as rig:
        keys = [10, 11, 12]
        for _ in range(2):  # the second attempt reads and fails again
            rig.cache.hint(keys)
            rig.cache.wait(10)
            with pytest.raises(RecordError, match="layers.1.experts.3.*checksum") as error:
                rig.cache.wait(11)
            assert (error.value.layer, error.value.expert) == (1, 3)
            rig.cache.wait(12)
            rig.cache.release(keys)
            assert rig.resident() == {10, 12}
            rig.check()
        damage_record(index, 1, 3)  # the same bit again: repaired
        rig.contents = whole
        rig.use(keys)
        rig.check()
        assert rig.resident() == {10, 11, 12}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_read_that_nobody_waited_for_is_cleaned_up(tmp_path, backend):
    index = make_store(tmp_path / "bad.edgemoe")
    damage_record(index, 0, 0)
    with Rig(index, index.expert_bytes, backend=backend) as rig:
        rig.cache.hint([0, 1])
        rig.cache.release([0, 1])
        rig.reader.wait(0)
        rig.use([1, 2])
        assert rig.resident() == {1, 2}
        rig.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_was_cut_short_is_a_record_error(tmp_path, backend):
    index = make_store(tmp_path / "short.edgemoe")
    with Rig(index, index.expert_bytes, backend=backend) as rig:
        with open(index.path / EXPERTS_FILE, "r+b") as file:
            file.truncate(index.records[3, 7].offset + 4096)
        rig.cache.hint([31])
        with pytest.raises(RecordError, match="layers.3.experts.7.*short"):
            rig.cache.wait(31)
        rig.cache.release([31])
        rig.use([0])
        assert rig.resident() == {0}


def test_records_needed_later_in_the_layer_are_kept_for_their_turn(index):
    capacity = int(0.5 * index.expert_bytes)
    with Rig(index, capacity, "fifo") as rig:
        rig.use([6, 7])
        for key in range(8, 32):
            if rig.cache.resident_bytes + rig.sizes[key] <= capacity:
                rig.use([key])
        rig.cache.begin_layer(0, 8, [0, 1, 6, 7])
        rig.use([0, 1])  # first in, first out would take 6 and 7
        assert rig.cache.evictions and {0, 1, 6, 7} <= rig.resident()
        rig.cache.begin_layer(1, 8)
        before = rig.cache.evictions
        rig.use([2, 3, 4])
        assert rig.cache.evictions > before and not {6, 7} <= rig.resident()


def test_of_records_needed_later_the_last_goes_first(index):
    sizes = [record.num_bytes for record in index.records.values()]
    with Rig(index, sum(sizes[:4])) as rig:
        rig.use([0, 1, 2, 3])
        rig.cache.begin_layer(0, 8, [0, 1, 2, 3, 5])
        rig.cache.hint([0])
        rig.cache.hint([5])
        assert {0, 1, 5} <= rig.resident() and 3 not in rig.resident()
        rig.cache.wait(5)
        rig.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_capacity_changes_live(index, backend):
    whole = index.expert_bytes
    with Rig(index, whole // 2, backend=backend, arena=whole) as rig:
        rig.use(list(range(6)))
        rig.cache.trim(whole)
        for key in range(32):
            rig.use([key])
        rig.check()
        assert rig.cache.resident_bytes == whole
        for share in (0.6, 0.61, 0.3, 0.05, 0.0, 0.5):
            rig.cache.trim(int(share * whole))
            assert rig.cache.capacity_bytes == int(share * whole) // 4096 * 4096
            rig.check()
            if share == 0.6:
                assert rig.cache.resident_bytes > 0.45 * whole  # most found a new place
        rig.use([0, 8, 31])
        rig.check()
        rig.cache.hint([0])
        with pytest.raises(UsageError, match="in use"):
            rig.cache.trim(whole)
        rig.cache.release([0])
        with pytest.raises(UsageError, match="does not fit into its arena"):
            rig.cache.trim(whole + 4096)


def test_trim_waits_for_reads_nobody_waited_for(index):
    with Rig(index, index.expert_bytes) as rig:
        keys = list(range(32))
        rig.cache.hint(keys)
        rig.cache.release(keys)
        rig.cache.trim(index.expert_bytes // 4)
        rig.check()
        assert rig.cache.num_resident


def test_a_wrong_policy_or_capacity_is_refused(index):
    with pytest.raises(UsageError, match="unknown eviction policy `best`"):
        Rig(index, 1 << 16, "best")
    with pytest.raises(UsageError, match="does not fit into its arena"):
        Rig(index, 1 << 20, arena=1 << 16)
