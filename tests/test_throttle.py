"""The emulated drive: its schedule on given clocks, and that every reader keeps it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe import Engine
from edgemoe.runtime import core
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.io import READY, RecordReader
from edgemoe.runtime.throttle import NEVER, Throttle
from tests.test_io import Slots, write_records

WAYS = [("reference", "auto"), *([("native", "auto"), ("native", "threads")] if core.lib else [])]
MEGA = 10**6  # at this rate a byte takes a microsecond


def ends(throttle: Throttle, tags: list[int]) -> dict[int, int]:
    """When each request ends, asked at every end there is."""
    found: dict[int, int] = {}
    while (now := throttle.due()) != NEVER:
        found |= {tag: now for tag in tags if throttle.take(now, tag)}
    return found


def test_it_serves_one_after_the_other():
    drive = Throttle(rate=MEGA)
    drive.add(1, key=0, priority=0, num_bytes=10, now=5_000)
    drive.add(2, key=1, priority=0, num_bytes=20, now=6_000)
    assert not drive.take(14_999, 1)
    assert ends(drive, [1, 2]) == {1: 15_000, 2: 35_000}
    drive.add(3, key=2, priority=0, num_bytes=1, now=90_000)
    assert ends(drive, [3]) == {3: 91_000}
    assert drive.busy_ns == 31_000


def test_a_demand_waits_for_no_more_than_the_chunk_under_way():
    drive = Throttle(rate=MEGA)
    for tag in (1, 2, 3):
        drive.add(tag, key=tag, priority=2, num_bytes=100, now=0)
    drive.add(4, key=4, priority=0, num_bytes=100, now=0)
    drive.promote(key=3, priority=0, now=50_000)
    assert ends(drive, [1, 2, 3, 4]) == {1: 100_000, 4: 200_000, 3: 300_000, 2: 400_000}


def test_switching_it_off_ends_everything():
    drive = Throttle(rate=MEGA)
    for tag in (1, 2):
        drive.add(tag, key=0, priority=0, num_bytes=1000, now=0)
    drive.set_rate(0, now=250_000)
    assert drive.take(250_000, 1) and drive.take(250_000, 2)
    assert drive.busy_ns == 250_000 and drive.due() == NEVER


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 50), st.integers(0, 30_000)),
        min_size=1,
        max_size=12,
    )
)
def test_it_never_idles_while_a_request_waits(requests):
    """Against the definition: at every end, the most urgent of those that have come is next."""
    drive, now, arrivals = Throttle(rate=MEGA), 0, []
    for tag, (priority, num_bytes, pause) in enumerate(requests):
        now += pause
        arrivals.append((now, priority, tag, num_bytes * 1000))
        drive.add(tag, tag, priority, num_bytes, now)
    expected, clock, waiting = {}, 0, list(arrivals)
    while waiting:
        clock = max(clock, min(waiting)[0])
        here = [item for item in waiting if item[0] <= clock]
        chosen = min(here, key=lambda item: item[1:3])
        waiting.remove(chosen)
        clock += chosen[3]
        expected[chosen[2]] = clock
    found = {tag: now for tag in range(len(requests)) if drive.take(now, tag)}
    assert all(expected[tag] <= now for tag in found)
    assert ends(drive, list(range(len(requests)))) == {
        tag: end for tag, end in expected.items() if tag not in found
    }
    assert drive.busy_ns == sum(item[3] for item in arrivals)


@pytest.mark.parametrize(("backend", "method"), WAYS)
def test_a_reader_hands_over_nothing_too_early(tmp_path: Path, backend: str, method: str):
    records, contents = write_records(tmp_path / "experts.safetensors")
    rate, keys = 5 * MEGA, np.arange(len(records), dtype=np.int32)
    with RecordReader(tmp_path / "experts.safetensors", records, 4, "auto", backend, method) as r:
        slots = Slots(records, backend)
        r.throttle(rate)
        r.submit(keys[:1], slots.addresses(keys[:1]))
        assert r.wait(0) == READY
        first = int(r.landed_ns[0])
        r.submit(keys[1:], slots.addresses(keys[1:]))
        assert [r.wait(int(key)) for key in keys] == [READY] * len(records)
        stats, num_bytes = r.stats(), sum(record.num_bytes for record in records)
        assert stats["throttle_bytes_per_s"] == rate and stats["num_bytes"] == num_bytes
        assert stats["throttle_busy_s"] == pytest.approx(num_bytes / rate, rel=1e-5)
        least = (num_bytes - records[0].num_bytes) * 10**9 // rate
        assert int(r.landed_ns.max()) - first >= least
        for key, content in enumerate(contents):
            assert np.array_equal(slots.bytes_of(key), content)
        r.throttle(1)  # a record would take hours
        r.submit(keys, slots.addresses(keys))
        r.throttle(0)
        assert [r.wait(int(key)) for key in keys] == [READY] * len(records)
        r.throttle(1)
        r.submit(keys, slots.addresses(keys))  # closing does not wait for it
        with pytest.raises(UsageError):
            r.throttle(-1)


@pytest.mark.parametrize(("backend", "method"), WAYS)
def test_a_demand_overtakes_guesses(tmp_path: Path, backend: str, method: str):
    """All of them are under way when the demand comes; only the one being served goes before."""
    records, _ = write_records(tmp_path / "experts.safetensors")
    with RecordReader(tmp_path / "experts.safetensors", records, 4, "auto", backend, method) as r:
        slots = Slots(records, backend)
        r.throttle(MEGA // 4)
        guesses, demand = np.arange(4, dtype=np.int32), np.array([7], dtype=np.int32)
        r.submit(guesses, slots.addresses(guesses), 2)
        r.submit(demand, slots.addresses(demand))
        assert r.wait(7) == READY
        r.throttle(0)
        assert [r.wait(int(key)) for key in guesses] == [READY] * 4
        assert (r.landed_ns[:4] < r.landed_ns[7]).sum() <= 1


@pytest.mark.parametrize("rate", ["50MB/s", 50_000_000])
def test_an_engine_takes_a_rate(rate):
    with Engine.from_pretrained(throttle=rate, context=64) as engine:
        assert engine.reader.stats()["throttle_bytes_per_s"] == 50_000_000
        assert any("50 MB/s" in line for line in engine.notes)


def test_a_rate_that_is_none_is_refused():
    with pytest.raises(UsageError, match="rate"):
        Engine.from_pretrained(throttle="50 parsecs")
