"""Priorities, promotion, cancelling and waiting, for reader threads, io_uring and the twin."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_io import Slots, submit, write_records

from edgemoe.runtime import core
from edgemoe.runtime.checksum import crc32c
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.format import QuantSpec, RecordLayout
from edgemoe.runtime.index import ExpertRecord
from edgemoe.runtime.io import (
    ABSENT,
    DEMAND,
    NEXT_LAYER,
    READING,
    READY,
    SPECULATION,
    RecordReader,
)

MIB = 1 << 20
KINDS = ["reference threads"] + (["native threads", "native io_uring"] if core.lib else [])
PATIENCE_S = 60  # a deadlock is what takes longer


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def open_reader(kind, path, records, depth=2):
    """A direct reader of this kind, or a skip that says why there is none."""
    backend, method = kind.split()
    try:
        return RecordReader(path, records, depth, "direct", backend, method)
    except UsageError as error:
        pytest.skip(f"{error.what}: {error.why}")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "experts.safetensors"
    return path, *write_records(path, 40)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Records of 4 + 2 MiB, in a file that is nothing else."""
    path = tmp_path_factory.mktemp("large") / "records"
    spec = QuantSpec(16, 0, "bf16")
    layout = RecordLayout(spec, spec, 1024, 1024)
    assert (layout.down_offset, layout.num_bytes) == (4 * MIB, 6 * MIB)
    rng = np.random.default_rng(3)
    contents = [rng.integers(0, 256, layout.num_bytes, dtype=np.uint8) for _ in range(3)]
    path.write_bytes(b"".join(data.tobytes() for data in contents))
    records = [
        ExpertRecord(
            i * layout.num_bytes, layout, (crc32c(data[: 4 * MIB]), crc32c(data[4 * MIB :]))
        )
        for i, data in enumerate(contents)
    ]
    return path, records, contents


def guess(reader, slots, keys, priority=SPECULATION):
    reader.submit(np.array(keys, dtype=np.int32), slots.addresses(keys), priority)


def landed_between(reader, keys, begin_ns, key):
    """Those of `keys` that landed after a time and before record `key`."""
    landed = reader.landed_ns
    return [k for k in keys if begin_ns < landed[k] < landed[key]]


@pytest.mark.parametrize("way", ["submit", "promote"])
def test_a_demand_overtakes_queued_guesses(kind, small, way):
    path, records, contents = small
    last = len(records) - 1
    guesses = list(range(last))
    with open_reader(kind, path, records, depth=1) as reader:
        slots = Slots(records)
        guess(reader, slots, guesses if way == "submit" else [*guesses, last])
        if way == "submit":
            submit(reader, slots, [last])
        else:
            reader.promote(np.array([last]))
        asked_ns = time.monotonic_ns()
        for key in [last, *guesses]:
            assert reader.wait(key) == READY
            np.testing.assert_array_equal(slots.bytes_of(key), contents[key])
        assert len(landed_between(reader, guesses, asked_ns, last)) <= 1  # what was under way
        assert (np.diff(reader.landed_ns[guesses]) >= 0).all()  # the guesses keep their order
        if "io_uring" in kind:  # nothing is read behind our back, so nearly all came later
            assert sum(reader.landed_ns[guesses] > reader.landed_ns[last]) >= last - 1


def test_a_guess_for_the_next_layer_goes_before_speculation(kind, small):
    path, records, _ = small
    first, second = list(range(20)), list(range(20, 40))
    with open_reader(kind, path, records, depth=1) as reader:
        slots = Slots(records)
        guess(reader, slots, first, SPECULATION)
        guess(reader, slots, second, NEXT_LAYER)
        asked_ns = time.monotonic_ns()
        assert all(reader.wait(key) == READY for key in first + second)
        assert len(landed_between(reader, first, asked_ns, second[-1])) <= 1


def test_a_demanded_section_is_one_request_and_a_guess_or_a_lone_record_several(kind, large):
    path, records, _ = large
    with open_reader(kind, path, records) as reader:
        slots = Slots(records)
        submit(reader, slots, [0, 1])
        assert reader.wait(0) == reader.wait(1) == READY
        assert reader.stats()["num_requests"] == 4
        guess(reader, slots, [2])
        assert reader.wait(2) == READY
        stats = reader.stats()
        assert stats["num_requests"] == 4 + 4 + 2
        assert stats["priority_bytes"] == [12 * MIB, 0, 6 * MIB]
        assert stats["num_bytes"] == 18 * MIB and stats["num_reads"] == 3
        assert stats["crc_s"] > 0 and stats["cpu_s"] > 0 and stats["read_s"] > 0
        submit(reader, slots, [0])
        assert reader.wait(0) == READY
        assert reader.stats()["num_requests"] == 10 + (4 + 2 if "io_uring" in kind else 2)
    with open_reader(kind, path, records, depth=1) as reader:  # nothing to read beside it
        submit(reader, slots, [0])
        assert reader.wait(0) == READY
        assert reader.stats()["num_requests"] == 2


def test_a_checksum_is_checked_once(kind, large):
    path, records, _ = large
    with open_reader(kind, path, records) as reader:
        slots = Slots(records)
        spent = []
        for _ in range(2):
            submit(reader, slots, [0])
            assert reader.wait(0) == READY
            spent.append(reader.stats()["crc_s"])
            reader.status[0] = ABSENT
        assert spent[1] == spent[0]


def test_cancel_stops_a_guess_under_way(kind, large):
    path, records, contents = large
    with open_reader(kind, path, records, depth=1) as reader:
        slots = Slots(records)
        guess(reader, slots, [0, 1])
        reader.cancel(np.array([0, 1]))
        if "io_uring" in kind:
            assert list(reader.status[:2]) == [READING, ABSENT]  # a request of 1 MiB is under way
        assert {reader.wait(0), reader.wait(1)} <= {ABSENT, READY}
        stats = reader.stats()
        if "io_uring" in kind:
            assert list(reader.status) == [ABSENT] * 3
            assert stats["num_bytes"] == stats["cancelled_bytes"] == MIB
            assert stats["num_reads"] == 0
        assert stats["cancelled_bytes"] + 6 * MIB * stats["num_reads"] == stats["num_bytes"]
        absent = [key for key in (0, 1) if reader.status[key] == ABSENT]
        submit(reader, slots, [*absent, 2])
        for key in range(3):
            assert reader.wait(key) == READY
            np.testing.assert_array_equal(slots.bytes_of(key), contents[key])
        reader.cancel(np.arange(3))  # too late: nothing changes
        assert list(reader.status) == [READY] * 3


def test_what_is_wholly_under_way_is_not_cancelled(kind, small):
    path, records, contents = small
    with open_reader(kind, path, records, depth=2) as reader:
        slots = Slots(records)
        submit(reader, slots, [0])
        if "io_uring" in kind:  # both sections were handed over by submit
            reader.cancel(np.array([0]))
        assert reader.wait(0) == READY
        np.testing.assert_array_equal(slots.bytes_of(0), contents[0])


def test_bad_keys_and_priorities_are_refused(kind, small):
    path, records, _ = small
    with open_reader(kind, path, records) as reader:
        slots = Slots(records)
        for priority in (-1, 3):
            with pytest.raises(UsageError):
                guess(reader, slots, [0], priority)
            with pytest.raises(UsageError):
                reader.promote(np.array([0]), priority)
        for key in (-1, len(records)):
            with pytest.raises(UsageError):
                reader.promote(np.array([key]))
            with pytest.raises(UsageError):
                reader.cancel(np.array([0, key]))
        reader.promote(np.array([0]))
        reader.cancel(np.array([0]))  # neither is being read
        assert list(reader.status) == [ABSENT] * len(records)


def test_a_file_that_is_replaced_stays_readable(kind, small, tmp_path):
    path, records, contents = small
    copy = tmp_path / "experts"
    copy.write_bytes(path.read_bytes())
    with open_reader(kind, copy, records) as reader:
        (tmp_path / "other").write_bytes(bytes(100))
        (tmp_path / "other").replace(copy)
        slots = Slots(records)
        submit(reader, slots, [5])
        assert reader.wait(5) == READY
        np.testing.assert_array_equal(slots.bytes_of(5), contents[5])


def test_the_thread_that_asked_may_end(kind, large):
    path, records, contents = large
    with open_reader(kind, path, records) as reader:
        slots = Slots(records)
        thread = threading.Thread(target=submit, args=(reader, slots, range(3)))
        thread.start()
        thread.join()
        for key in range(3):
            assert reader.wait(key) == READY
            np.testing.assert_array_equal(slots.bytes_of(key), contents[key])


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_close_waits_for_what_is_under_way(kind, large, depth):
    path, records, contents = large
    for priority in (DEMAND, SPECULATION):
        slots = Slots(records)
        reader = open_reader(kind, path, records, depth)
        guess(reader, slots, range(3), priority)
        reader.close()
        found = [slots.bytes_of(key).copy() for key in range(3)]
        for key in range(3):  # nothing is written after close
            np.testing.assert_array_equal(slots.bytes_of(key), found[key])


def test_threads_submit_wait_pump_and_cancel_at_once(kind, small):
    """Every waiter returns, whoever takes note of its record."""
    path, records, contents = small
    with open_reader(kind, path, records, depth=3) as reader:
        slots = Slots(records)
        stop, failures = threading.Event(), []

        def own(first):  # the only one who submits these records
            rng = np.random.default_rng(first)
            keys = list(range(first, first + 10))
            for _ in range(25):
                chosen = rng.permutation(keys)[:6].tolist()
                for key in chosen:
                    slots.bytes_of(key)[:] = 0
                    reader.status[key] = ABSENT
                guess(reader, slots, chosen, int(rng.integers(3)))
                if rng.random() < 0.5:
                    reader.cancel(np.array(chosen[:3]))
                reader.promote(np.array(chosen[3:]), DEMAND)
                for key in chosen:
                    status = reader.wait(key)
                    whole = np.array_equal(slots.bytes_of(key), contents[key])
                    if status != (READY if whole else ABSENT) and status != ABSENT:
                        failures.append((key, status))

        def look(seed):
            rng = np.random.default_rng(seed)
            while not stop.is_set():
                reader.pump()
                reader.wait(int(rng.integers(len(records))))

        owners = [threading.Thread(target=own, args=(10 * i,), daemon=True) for i in range(4)]
        watchers = [threading.Thread(target=look, args=(i,), daemon=True) for i in range(2)]
        for thread in owners + watchers:
            thread.start()
        for thread in owners:
            thread.join(PATIENCE_S)
        stop.set()
        for thread in watchers:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in owners + watchers)
        assert not failures and not (reader.status == READING).any()
        stats = reader.stats()
        assert sum(stats["priority_bytes"]) == stats["num_bytes"]


DENIED = """
import ctypes, struct, sys
import numpy as np
sys.path.insert(0, {tests!r})
from test_io import Slots, submit, write_records
from edgemoe.runtime.io import READY, RecordReader
from pathlib import Path

path = Path({path!r})
records, contents = write_records(path)
# A filter as containers have: system call {call} fails with EPERM, all others pass.
code = [(0x20, 0, 0, 0), (0x15, 0, 1, {call}), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, header, 0, 0) == 0
with RecordReader(path, records) as reader:
    slots = Slots(records)
    submit(reader, slots, range(len(records)))
    for key in range(len(records)):
        assert reader.wait(key) == READY
        np.testing.assert_array_equal(slots.bytes_of(key), contents[key])
    print(reader.io_note)
"""


@pytest.mark.skipif(core.lib is None, reason="native core not built")
@pytest.mark.skipif(sys.platform != "linux", reason="filters of system calls are Linux's")
@pytest.mark.parametrize("call", [425, 426], ids=["io_uring_setup", "io_uring_enter"])
def test_where_io_uring_is_denied_threads_read(small, tmp_path, call):
    open_reader("native io_uring", *small[:2]).close()  # or a skip: there is nothing to deny
    source = DENIED.format(
        tests=str(__file__).rpartition("/")[0], path=str(tmp_path / "experts"), call=call
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    note = "direct, reader threads: io_uring refused (Operation not permitted)\n"
    assert done.stdout == note
