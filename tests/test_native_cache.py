"""The expert cache of the core decides as its reference does, whatever is asked of both."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import NUM_EXPERTS, NUM_LAYERS, damage_record, make_store
from stores_small import make_store as make_model

from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.runtime import core
from edgemoe.runtime.cache import ExpertCache
from edgemoe.runtime.errors import BudgetError, RecordError, UsageError
from edgemoe.runtime.format import QuantSpec
from edgemoe.runtime.index import EXPERTS_FILE
from edgemoe.runtime.io import READY, Arena, RecordReader
from edgemoe.runtime.native_cache import NativeCache
from edgemoe.runtime.policy import POLICIES
from edgemoe.runtime.policy_memory import WINDOW

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")

NUM_KEYS = NUM_LAYERS * NUM_EXPERTS
EQUAL = (QuantSpec(4, 32, "sym"), QuantSpec(4, 32, "sym"))


class Rig:
    """A cache with its reader and arena, and what its counters and places are."""

    def __init__(self, index, kind, capacity, policy="cycle", arena=None, **options):
        records = list(index.records.values())
        self.reader = RecordReader(index.path / EXPERTS_FILE, records, backend="native")
        self.arena = Arena(arena or max(capacity, 1), "native")
        self.cache = kind(self.reader, self.arena, capacity, index.records, policy, **options)
        self.contents = (index.path / EXPERTS_FILE).read_bytes()
        self.records = records

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cache.close()
        self.reader.close()

    def arrive(self) -> None:
        """Let every read end."""
        for key in range(len(self.records)):
            self.reader.wait(key)

    def state(self):
        cache = self.cache
        start = self.arena.address
        places = [a and a - start for a in cache.addresses(list(range(len(self.records))))]
        counters = [cache.hits, cache.misses, cache.bytes_read, cache.evictions, cache.moved_bytes]
        counters += [cache.capacity_bytes, cache.resident_bytes, cache.pinned_bytes]
        return places, counters, cache.num_resident, cache.place_stats.tolist()

    def check_bytes(self) -> None:
        for key, address in enumerate(self.cache.addresses(list(range(len(self.records))))):
            record = self.records[key]
            if address and self.reader.status[key] == READY:
                end = record.offset + record.num_bytes
                assert self.cache.view(key).tobytes() == self.contents[record.offset : end]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("native") / "mixed.edgemoe")


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "equal.edgemoe"
    return make_store(folder, widths=(64,), specs=(EQUAL,))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    index = make_store(tmp_path_factory.mktemp("native") / "damaged.edgemoe")
    damage_record(index, 1, 3)
    return index


keys_of_a_hint = st.lists(st.integers(0, NUM_KEYS - 1), min_size=1, max_size=6, unique=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_both_decide_alike(mixed, equal, damaged, data):
    """Hints that overlap and are released in any order, before or after their reads have ended;
    chunks with several waves; preloads and changes of the capacity; records that are damaged."""
    index = data.draw(st.sampled_from([mixed, equal, damaged]))
    whole = index.expert_bytes
    options = {"policy": data.draw(st.sampled_from(sorted(POLICIES)))}
    options["max_moved_per_byte"] = data.draw(st.sampled_from([0.0, 2.0, np.inf]))
    capacity = data.draw(st.integers(2, whole // 8192)) * 8192
    with (
        Rig(index, ExpertCache, capacity, arena=whole, **options) as reference,
        Rig(index, NativeCache, capacity, arena=whole, **options) as native,
    ):
        rigs, held = (reference, native), []
        actions = ["layer", "hint", "hint", "hint", "drop", "release", "release", "preload"]
        actions += ["seed", "trim"]
        for _ in range(data.draw(st.integers(1, 40))):
            action = data.draw(st.sampled_from(actions))
            if action == "layer":
                layer, tokens = (
                    data.draw(st.integers(0, NUM_LAYERS - 1)),
                    data.draw(st.sampled_from([1, 1, 7, 5000])),
                )
                wanted = data.draw(st.just([]) | keys_of_a_hint)
                routes = None
                if tokens > 1 and data.draw(st.booleans()):
                    routes = np.random.default_rng(tokens).integers(-1, 4, (tokens, 2))
                for rig in rigs:
                    rig.cache.begin_layer(layer, tokens, wanted, routes)
            elif action == "hint":
                keys, counts = data.draw(keys_of_a_hint), None
                if data.draw(st.booleans()):
                    counts = np.arange(1, len(keys) + 1)
                results = [rig.cache.try_hint(keys, counts) for rig in rigs]
                assert results[0] == results[1]
                if results[0] is not None:
                    held.append(keys)
                if data.draw(st.booleans()):
                    for rig in rigs:
                        rig.arrive()
            elif action == "drop":  # released while it is being read
                keys, results = data.draw(keys_of_a_hint), []
                for rig in rigs:
                    rig.reader.throttle(1000)
                    results.append(rig.cache.try_hint(keys))
                    if results[-1] is not None:
                        rig.cache.release(keys)
                    rig.reader.throttle(0)
                assert results[0] == results[1]
            elif action == "release" and held:
                keys = held.pop(data.draw(st.integers(0, len(held) - 1)))
                for rig in rigs:
                    rig.cache.release(keys)
            elif action == "preload":
                keys = data.draw(st.none() | keys_of_a_hint)
                errors = []
                for rig in rigs:
                    try:
                        errors.append(rig.cache.preload(keys))
                    except RecordError as error:
                        errors.append(str(error))
                assert errors[0] == errors[1]
            elif action == "seed":
                keys = data.draw(keys_of_a_hint)
                for rig in rigs:
                    rig.cache.seed(keys, np.arange(len(keys)) / 3)
            elif action == "trim" and not held:
                new = data.draw(st.integers(0, whole // 4096)) * 4096
                for rig in rigs:
                    rig.cache.trim(new)
            for rig in rigs:
                rig.arrive()  # what a cache finds must not depend on how fast its reads are
            assert native.state() == reference.state()
        native.check_bytes()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "many.edgemoe"
    return make_store(folder, num_experts=200, hidden=32, widths=(32,))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_both_decide_alike_among_many_records(many, policy, share):
    """Tokens and chunks of four layers of 200 experts, whose blocks of keys end inside a layer."""
    rng = np.random.default_rng(3)
    capacity = int(share * many.expert_bytes)
    with (
        Rig(many, ExpertCache, capacity, policy) as reference,
        Rig(many, NativeCache, capacity, policy) as native,
    ):
        for step in range(30):
            num_tokens = 16 if step % 10 == 5 else 1
            for layer in range(NUM_LAYERS):
                count = 40 if num_tokens > 1 else 6
                chosen = np.minimum(rng.geometric(0.03, 3 * count), 200) - 1
                keys = (rng.permutation(np.unique(chosen))[:count] + layer * 200).tolist()
                counts = rng.integers(1, num_tokens + 1, len(keys)) if num_tokens > 1 else None
                results, routes = [], None
                if num_tokens > 1 and step != 15:
                    routes = rng.choice(keys, (num_tokens, 4)) - layer * 200
                for rig in (reference, native):
                    rig.cache.begin_layer(layer, num_tokens, keys, routes)
                    results.append(rig.cache.hint(keys, counts))
                    rig.arrive()
                    rig.cache.release(keys)
                assert results[0] == results[1]
            assert native.state() == reference.state()
        assert native.cache.evictions > 100
        native.check_bytes()


@pytest.mark.parametrize("kind", [ExpertCache, NativeCache])
def test_a_prompt_spares_what_it_has_yet_to_reach(many, kind):
    """Of 200 experts a layer half fit. Tokens between two prompts have favourites, the prompts want
    all; then at most a tenth more is read than what the pool does not hold."""
    rng = np.random.default_rng(7)
    with Rig(many, kind, many.expert_bytes // 2, "forecast") as rig:

        def run(layer, num_tokens, experts):
            keys = (np.unique(experts) + layer * 200).tolist()
            rig.cache.begin_layer(layer, num_tokens, keys, experts if num_tokens > 1 else None)
            for begin in range(0, len(keys), 50):
                rig.cache.hint(wave := keys[begin : begin + 50], [1] * len(wave))
                rig.arrive()
                rig.cache.release(wave)

        for num_tokens in [100] + [1] * 30 + [100]:
            misses = rig.cache.misses
            for layer in range(NUM_LAYERS):
                if num_tokens == 1:
                    run(layer, 1, np.minimum(rng.geometric(0.1, 8), 200) - 1)
                else:
                    run(layer, 100, rng.permutation(800).reshape(100, 8) % 200)
        assert rig.cache.misses - misses < 1.1 * NUM_LAYERS * 100


def test_what_does_not_fit_is_refused_and_changes_no_account(mixed):
    with Rig(mixed, NativeCache, 3 * mixed.max_record_bytes) as rig:
        rig.cache.hint([0, 1])
        before = rig.state()
        with pytest.raises(BudgetError, match="do not fit into the expert cache"):
            rig.cache.hint(list(range(8, 20)))
        assert rig.state() == before
        with pytest.raises(UsageError, match="in use"):
            rig.cache.trim(0)


def test_what_cannot_be_is_refused(mixed):
    with Rig(mixed, NativeCache, mixed.expert_bytes) as rig:
        for keys in ([NUM_KEYS], [-1], [3, 4, 3]):
            with pytest.raises(UsageError, match="cannot be"):
                rig.cache.hint(keys)
        with pytest.raises(UsageError, match="does not fit into its arena"):
            rig.cache.trim(2 * mixed.expert_bytes)
        assert rig.cache.resident_bytes == rig.cache.pinned_bytes == 0
    with pytest.raises(UsageError, match="unknown eviction policy `best`"):
        Rig(mixed, NativeCache, 1 << 16, "best")


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_a_decoded_token_leaves_it_as_a_run_per_layer_does(tmp_path_factory, share):
    """The routes of tokens that the core decoded, once more through the reference."""
    path = make_model(tmp_path_factory.mktemp("routes"))
    tokens = np.random.default_rng(8).integers(0, 400, 40).tolist()
    with Engine.from_pretrained(path, context=64, prefetch="none") as engine:
        capacity = max(
            int(share * engine.cache.capacity_bytes),
            engine.args.top_k * engine._index.max_record_bytes,
        )
        engine.cache.trim(0)
        engine.cache.trim(capacity)
        kv_cache = KVCache.for_model(engine.args, engine.context, 16)
        routes = []
        for token in tokens:
            engine.forward([token], kv_cache, on_route=lambda *routed: routes.append(routed[:2]))
        with Rig(engine._index, ExpertCache, capacity, engine.config.policy) as rig:
            for layer, ids in routes:
                keys = [rig.cache.table.first_key[layer] + i for i in ids[0].tolist()]
                rig.cache.begin_layer(layer)
                rig.cache.hint(keys)
                rig.arrive()
                rig.cache.release(keys)
            cache, twin = engine.cache, rig.cache
            assert (cache.hits, cache.misses, cache.evictions) == (
                (twin.hits, twin.misses, twin.evictions)
            )
            everything = range(len(twin.table))
            resident = [bool(address) for address in cache.addresses(everything)]
            assert resident == [bool(address) for address in twin.addresses(everything)]
            assert np.array_equal(cache.place_stats[:, :3], twin.place_stats[:, :3])
            assert cache.misses and (share == 1.0) == (cache.evictions == 0)
            assert cache.core_s[0] > 0 and cache.pinned_bytes == 0


def test_a_forecast_is_the_same_when_its_memory_has_gone_round(equal):
    """More tokens than it remembers, with routes that come back."""
    rng = np.random.default_rng(5)
    words = [np.sort(rng.permutation(NUM_EXPERTS)[:2]) for _ in range(12)]
    capacity = equal.expert_bytes // 3 // 4096 * 4096
    with (
        Rig(equal, ExpertCache, capacity, "forecast") as reference,
        Rig(equal, NativeCache, capacity, "forecast") as native,
    ):
        for _ in range(WINDOW + 100):
            word = int(12 * rng.random() ** 2)
            for layer in range(2):
                keys = (words[(word + layer) % 12] + layer * NUM_EXPERTS).tolist()
                for rig in (reference, native):
                    rig.cache.begin_layer(layer)
                    rig.cache.hint(keys)
                    for key in keys:
                        rig.cache.wait(key)
                    rig.cache.release(keys)
        assert reference.state() == native.state() and native.cache.evictions > 100
